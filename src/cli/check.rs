//! `wharf check`: is the configuration right, and what does it say?

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use crate::config::catalog::{Catalog, ModelSpec, SwapMode};
use crate::config::{self, ConfigErrors, Loaded, Override, Problem, Report, Severity};
use crate::gateway::Certificate;

/// Exit codes: 0 the configuration can be used, 1 it cannot, 2 the file cannot be read.
const USABLE: u8 = 0;
const UNUSABLE: u8 = 1;
const UNREADABLE: u8 = 2;

/// Checks the file and prints the result: a summary on stdout, problems on stderr; with `json`
/// one object on stdout.
pub fn run(path: &Path, json: bool) -> ExitCode {
    let file = path.display().to_string();
    let loaded = config::load(path).and_then(|loaded| with_files(&file, loaded));
    let outcome = outcome(&file, loaded, json);
    if !outcome.problems.is_empty() {
        eprintln!("{}", outcome.problems);
    }
    if !outcome.result.is_empty() {
        println!("{}", outcome.result);
    }
    ExitCode::from(outcome.code)
}

/// What the file names and only a start reads.
fn with_files(file: &str, mut loaded: Loaded) -> Result<Loaded, ConfigErrors> {
    let tls = loaded.catalog.settings.tls.as_ref().map(Certificate::load);
    match tls {
        None => {}
        Some(Ok(certificate)) => loaded
            .warnings
            .extend(certificate.warning.map(|why| Problem::warning("listen.tls", why))),
        Some(Err(why)) => {
            let mut problems = loaded.warnings;
            problems.push(Problem::error("listen.tls", why));
            return Err(ConfigErrors::Invalid { file: file.to_owned(), problems });
        }
    }
    Ok(loaded)
}

/// What `wharf check` says, apart from printing it.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub result: String,
    pub problems: String,
    pub code: u8,
}

pub fn outcome(file: &str, loaded: Result<Loaded, ConfigErrors>, json: bool) -> Outcome {
    if json {
        return as_json(file, loaded);
    }
    match loaded {
        Ok(Loaded { catalog, warnings, overrides, .. }) => {
            let problems = if warnings.is_empty() {
                String::new()
            } else {
                Report { file, problems: &warnings }.to_string()
            };
            Outcome { result: summary(&catalog, &overrides), problems, code: USABLE }
        }
        Err(errors) => {
            let code = match &errors {
                ConfigErrors::Unreadable { .. } => UNREADABLE,
                ConfigErrors::Invalid { .. } => UNUSABLE,
            };
            Outcome { result: String::new(), problems: errors.to_string(), code }
        }
    }
}

fn summary(catalog: &Catalog, overrides: &[Override]) -> String {
    let models: Vec<&ModelSpec> = catalog.models.values().map(|spec| &**spec).collect();
    let counted = |names: &[&'static str]| -> String {
        let mut counts: Vec<(&str, usize)> = Vec::new();
        for name in names {
            match counts.iter_mut().find(|(known, _)| known == name) {
                Some((_, count)) => *count += 1,
                None => counts.push((name, 1)),
            }
        }
        counts.iter().map(|(name, n)| format!("{n} {name}")).collect::<Vec<_>>().join(", ")
    };
    let engines: Vec<&str> = models.iter().map(|m| m.engine.as_str()).collect();
    let runtimes: Vec<&str> = models.iter().map(|m| m.runtime.as_str()).collect();
    let warm = models.iter().filter(|m| m.warmup).count();
    let several =
        |n: usize, one: &str, more: &str| format!("{n} {}", if n == 1 { one } else { more });
    let settings = &catalog.settings;
    let mode = match settings.swap.mode {
        SwapMode::MultiActive => "multi-active",
        SwapMode::SingleActive => "single-active",
    };
    let mut text = format!(
        "ok: {} ({}; {}), {}, {warm} loaded at start, {mode}, gateway {}, orchestrator {}",
        several(models.len(), "model", "models"),
        counted(&engines),
        counted(&runtimes),
        several(catalog.aliases.len(), "alias", "aliases"),
        settings.gateway,
        settings.orchestrator,
    );
    for Override { variable, key, value } in overrides {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n    {key} = {value} (from {variable})");
    }
    text
}

#[derive(Serialize)]
struct JsonReport<'a> {
    ok: bool,
    file: &'a str,
    models: Vec<JsonModel<'a>>,
    overrides: &'a [Override],
    errors: Vec<&'a Problem>,
    warnings: Vec<&'a Problem>,
    /// Why the file could not be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<&'a str>,
}

#[derive(Serialize)]
struct JsonModel<'a> {
    name: &'a str,
    engine: &'static str,
    runtime: &'static str,
    aliases: &'a [String],
    line: u32,
}

fn as_json(file: &str, loaded: Result<Loaded, ConfigErrors>) -> Outcome {
    let mut report = JsonReport {
        ok: loaded.is_ok(),
        file,
        models: Vec::new(),
        overrides: &[],
        errors: Vec::new(),
        warnings: Vec::new(),
        unreadable: None,
    };
    let (problems, code) = match &loaded {
        Ok(loaded) => {
            report.overrides = &loaded.overrides;
            report.models = loaded.catalog.models.values().map(|spec| json_model(spec)).collect();
            (loaded.warnings.as_slice(), USABLE)
        }
        Err(errors @ ConfigErrors::Invalid { .. }) => (errors.problems(), UNUSABLE),
        Err(ConfigErrors::Unreadable { reason, .. }) => {
            report.unreadable = Some(reason);
            (&[][..], UNREADABLE)
        }
    };
    (report.errors, report.warnings) =
        problems.iter().partition(|problem| problem.severity == Severity::Error);
    // Plain data with string keys: serialising it cannot fail.
    let result = serde_json::to_string_pretty(&report).unwrap_or_default();
    Outcome { result, problems: String::new(), code }
}

fn json_model(spec: &ModelSpec) -> JsonModel<'_> {
    JsonModel {
        name: spec.name.as_str(),
        engine: spec.engine.as_str(),
        runtime: spec.runtime.as_str(),
        aliases: &spec.aliases,
        line: spec.line,
    }
}
