//! LoRA adapters of a running vLLM, through its own endpoints. They are meant for us alone: no
//! client can reach them through Wharf.

use std::collections::BTreeMap;
use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use super::request::{Answer, HttpError, get, post};
use crate::runtime::Running;
use crate::scheduler::event::{Fault, FaultKind};

/// One adapter may have to be downloaded first.
const LOAD_WITHIN: Duration = Duration::from_secs(120);
const ASK_WITHIN: Duration = Duration::from_secs(10);

/// Loads `source` (a path or repository, as the engine sees it) under the name `name`.
pub async fn load(running: &Running, name: &str, source: &str) -> Result<(), Fault> {
    let body = json!({ "lora_name": name, "lora_path": source });
    let answer = post(&running.endpoint, "/v1/load_lora_adapter", Some(&body), LOAD_WITHIN).await;
    judged(answer, name, &format!("adapter \"{name}\" ({source}) could not be loaded"))
}

/// One that is not there counts as unloaded.
pub async fn unload(running: &Running, name: &str) -> Result<(), Fault> {
    let body = json!({ "lora_name": name });
    let answer = post(&running.endpoint, "/v1/unload_lora_adapter", Some(&body), ASK_WITHIN).await;
    if answer.as_ref().is_ok_and(|a| a.status == StatusCode::NOT_FOUND && !says_no_path(a)) {
        return Ok(());
    }
    judged(answer, name, &format!("adapter \"{name}\" could not be unloaded"))
}

/// Names that the engine serves, and where each was loaded from.
pub async fn served(running: &Running) -> Result<BTreeMap<String, String>, Fault> {
    let answer = get(&running.endpoint, "/v1/models", ASK_WITHIN).await.map_err(|error| {
        Fault::new(
            FaultKind::AdapterFailed,
            format!("the engine does not list its models: {error}"),
        )
    })?;
    let rows = answer.json();
    let rows = rows["data"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(rows.iter().map(|row| (text(&row["id"]), text(&row["root"]))).collect())
}

/// A server without these endpoints, rather than one that does not know the adapter.
fn says_no_path(answer: &Answer) -> bool {
    let body = answer.json();
    body.get("detail").is_some_and(|detail| detail == "Not Found")
}

fn judged(answer: Result<Answer, HttpError>, name: &str, what: &str) -> Result<(), Fault> {
    let fault = |why: String| Err(Fault::new(FaultKind::AdapterFailed, format!("{what}: {why}")));
    match answer {
        Ok(answer) if answer.status.is_success() => Ok(()),
        // Loaded before, by the same name: that is what was wanted.
        Ok(answer) if answer.excerpt().contains("has already been loaded") => Ok(()),
        Ok(answer) if says_no_path(&answer) => fault(format!(
            "the engine has no adapter endpoint: it needs --enable-lora and \
             VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 ({name})"
        )),
        Ok(answer) => {
            let body = answer.json();
            let message = body["error"]["message"].as_str().or(body["message"].as_str());
            match message {
                Some(message) => fault(format!("the engine says: {message}")),
                None => fault(format!("the engine answered {}", answer.excerpt())),
            }
        }
        Err(error) => fault(error.to_string()),
    }
}
