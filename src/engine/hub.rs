//! Which repository of the Hugging Face hub an engine's own arguments name.

use super::command_line::CommandLine;
use crate::config::catalog::{EngineKind, ModelSpec, RuntimeSpec};

const MODEL: &[&str] = &["--model"];
const REVISION: &[&str] = &["--revision"];
const DOWNLOAD_DIR: &[&str] = &["--download-dir"];
const LOAD_FORMAT: &[&str] = &["--load-format"];
const TOKEN: &[&str] = &["--hf-token"];
/// Load formats whose weights are not those of the repository, or are none at all.
const ELSEWHERE: &[&str] = &["dummy", "gguf", "tensorizer"];
/// What vLLM and the hub's client read before they go to the hub.
const OFFLINE: &[&str] = &["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE"];
/// The hub's own limit for `org/name`.
const REPO_CHARS_MAX: usize = 96;

/// Weights on the hub, as the engine would fetch them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubModel {
    /// `org/name`; a folder of that name in the container goes first.
    pub repo: String,
    /// Branch, tag or commit; `None`: the main branch.
    pub revision: Option<String>,
    /// The cache's folder in the container; `None`: the hub client's own choice.
    pub download_dir: Option<String>,
    /// A token in the arguments themselves.
    pub token: Option<String>,
}

/// `None`: nothing that vLLM would fetch from the hub.
pub fn hub_model(spec: &ModelSpec) -> Option<HubModel> {
    let RuntimeSpec::Docker(docker) = &spec.runtime else { return None };
    let offline = |name: &&str| docker.env.get(*name).is_some_and(|value| is_true(value.trim()));
    if spec.engine != EngineKind::Vllm || OFFLINE.iter().any(|name| offline(&name)) {
        return None;
    }
    let line = CommandLine::of(spec);
    if line.value(LOAD_FORMAT).is_some_and(|format| ELSEWHERE.contains(&format)) {
        return None;
    }
    // `vllm serve` is the usual entrypoint of images, so the model may be the first word.
    let served = line.positional("serve").filter(|word| is_repo(word)).or(line.value(MODEL));
    let text = |flags| line.value(flags).map(str::to_owned);
    Some(HubModel {
        repo: served.filter(|repo| is_repo(repo))?.to_owned(),
        revision: text(REVISION),
        download_dir: text(DOWNLOAD_DIR),
        token: text(TOKEN),
    })
}

/// As the hub's client reads its switches.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
}

fn is_repo(text: &str) -> bool {
    let fine = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
    };
    text.len() <= REPO_CHARS_MAX
        && text.split_once('/').is_some_and(|(org, name)| fine(org) && fine(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_org_and_name_make_a_repository() {
        for repo in ["mistralai/Mistral-7B-Instruct-v0.3", "Qwen/Qwen2.5-Coder-7B", "_x/y.z"] {
            assert!(is_repo(repo), "{repo}");
        }
        for other in
            ["/models/a", "./a", "../a", "gpt2", "a/b/c", "s3://a/b", "a/b:Q4", "a/${B}", "a/"]
        {
            assert!(!is_repo(other), "{other}");
        }
    }

    #[test]
    fn switches_are_read_as_the_hubs_client_does() {
        assert!(["1", "true", "Yes", "on"].iter().all(|value| is_true(value)));
        assert!(!["0", "", "false", "no"].iter().any(|value| is_true(value)));
    }
}
