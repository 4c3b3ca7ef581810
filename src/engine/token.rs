//! Proof of life: one token.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};

use super::{ended, fault, request};
use crate::config::catalog::ModelSpec;
use crate::runtime::Running;
use crate::scheduler::event::{Fault, FaultKind};

/// The first inference may compile kernels.
const LIMIT: Duration = Duration::from_secs(120);

pub async fn canary(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    tokio::select! {
        biased;
        report = ended(running) => {
            let text = format!("the engine {report} while it was asked for one token");
            Err(fault(spec, running, FaultKind::Exited, &text))
        }
        result = tokio::time::timeout(LIMIT, ask(spec, running)) => {
            let why = match result {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(why)) => why,
                Err(_) => format!("no answer within {} s", LIMIT.as_secs()),
            };
            let text = format!("the engine says that it is healthy, but gives no token: {why}");
            Err(fault(spec, running, FaultKind::NeverHealthy, &text))
        }
    }
}

async fn ask(spec: &ModelSpec, running: &Running) -> Result<(), String> {
    let name = spec.served_name();
    if spec.model_type.contains("embed") {
        return post(running, "/v1/embeddings", &json!({"model": name, "input": "hi"})).await;
    }
    let chat = json!({
        "model": name, "max_tokens": 1, "stream": false,
        "messages": [{"role": "user", "content": "hi"}],
    });
    let Err(chat_error) = post(running, "/v1/chat/completions", &chat).await else { return Ok(()) };
    // A base model has no chat template.
    let plain = json!({"model": name, "max_tokens": 1, "stream": false, "prompt": "hi"});
    post(running, "/v1/completions", &plain)
        .await
        .map_err(|error| format!("/v1/chat/completions: {chat_error}; /v1/completions: {error}"))
}

async fn post(running: &Running, path: &str, body: &Value) -> Result<(), String> {
    match request::post(&running.endpoint, path, Some(body), LIMIT).await {
        Ok(answer) if answer.status == StatusCode::OK && answer.json()["error"].is_null() => Ok(()),
        Ok(answer) => Err(answer.excerpt()),
        Err(error) => Err(error.to_string()),
    }
}
