//! Environment variables of the swapper service; they outrank the file.

use std::time::Duration;

use super::catalog::RuntimeSpec;
use super::decode::Sink;
use super::models::ReadModel;
use super::problem::{Problem, Severity};
use super::settings::{MODES, ReadSettings};
use super::subst::Env;
use super::{Override, values};

pub(super) fn apply(read: &mut ReadSettings, env: Env<'_>, sink: &mut Sink) -> Vec<Override> {
    let mut applied = Vec::new();
    let given = |variable: &str| env(variable).filter(|value| !value.trim().is_empty());
    let swap = &mut read.settings.swap;
    let mut wrong = |variable: &str, value: &str, expected: &str| {
        let shown: String = value.chars().take(60).collect();
        let message =
            format!("environment variable {variable}: `{}` is not usable", shown.escape_debug());
        sink.problems.push(Problem::outside(Severity::Error, variable, message, expected));
    };
    if let Some(value) = given("SWAPPER_MODE") {
        match MODES.iter().find(|(name, _)| *name == value.trim()) {
            Some((_, mode)) => {
                swap.mode = *mode;
                applied.push(Override { variable: "SWAPPER_MODE", key: "swap.mode", value });
            }
            None => wrong("SWAPPER_MODE", &value, "expected `single-active` or `multi-active`"),
        }
    }
    if let Some(value) = given("MAX_CONCURRENT_MODELS") {
        match value.trim().parse() {
            Ok(count) => {
                swap.max_concurrent_models = count;
                applied.push(Override {
                    variable: "MAX_CONCURRENT_MODELS",
                    key: "swap.max_concurrent_models",
                    value,
                });
            }
            Err(_) => wrong("MAX_CONCURRENT_MODELS", &value, "expected a number; 0: no limit"),
        }
    }
    if let Some(value) = given("MODEL_SWAP_TIMEOUT") {
        // The swapper's unit is the second; ours are taken as well.
        let timeout = match value.trim().parse::<u32>() {
            Ok(seconds) => Some(Duration::from_secs(u64::from(seconds))),
            Err(_) => values::duration(&value).ok(),
        };
        match timeout.filter(|timeout| !timeout.is_zero()) {
            Some(timeout) => {
                swap.start_timeout = timeout;
                applied.push(Override {
                    variable: "MODEL_SWAP_TIMEOUT",
                    key: "swap.start_timeout",
                    value,
                });
            }
            None => wrong("MODEL_SWAP_TIMEOUT", &value, "expected seconds, such as 30"),
        }
    }
    applied
}

/// OLLAMA_BASE_URL is the address of models that name no `url`.
pub(super) fn ollama(models: &[ReadModel], env: Env<'_>, sink: &mut Sink) -> Option<Override> {
    const VARIABLE: &str = "OLLAMA_BASE_URL";
    let url = env(VARIABLE).filter(|url| !url.trim().is_empty())?;
    let used = models.iter().any(|model| match &model.spec.runtime {
        RuntimeSpec::External(external) => {
            let external_node = model.node.get("external");
            let says_url = external_node.is_some_and(|node| node.get("url").is_some());
            !says_url && external.url == url.trim().trim_end_matches('/')
        }
        RuntimeSpec::Docker(_) | RuntimeSpec::Process(_) => false,
    });
    if used {
        return Some(Override { variable: VARIABLE, key: "external.url", value: url });
    }
    sink.problems.push(Problem::outside(
        Severity::Warning,
        VARIABLE,
        "environment variable OLLAMA_BASE_URL is set, but no model uses it".to_owned(),
        "models with `engine: ollama` and no `external.url` are reached there",
    ));
    None
}
