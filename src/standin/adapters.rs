//! vLLM's endpoints for LoRA adapters, which it has only where it was told to.

use std::sync::{Arc, PoisonError};

use axum::body::Bytes;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::engine::{Engine, say};
use super::options::{Options, Style};
use super::reply::unix_seconds;
use super::routes::error;

pub fn are_possible(options: &Options) -> bool {
    let updates = std::env::var("VLLM_ALLOW_RUNTIME_LORA_UPDATING");
    let allowed = updates.is_ok_and(|value| matches!(value.as_str(), "1" | "true" | "True"));
    options.style == Style::Vllm && options.real.enable_lora && allowed
}

pub fn routes() -> Router<Arc<Engine>> {
    Router::new()
        .route("/v1/load_lora_adapter", post(load))
        .route("/v1/unload_lora_adapter", post(unload))
}

/// Where the adapter of that name was loaded from.
pub fn source(engine: &Engine, name: &str) -> Option<String> {
    engine.adapters.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
}

/// As vLLM lists them, behind its own model.
pub fn rows(engine: &Engine) -> Vec<Value> {
    let base = engine.options.names.first().cloned();
    let adapters = engine.adapters.lock().unwrap_or_else(PoisonError::into_inner);
    let row = |(name, root): (&String, &String)| {
        json!({
            "id": name, "object": "model", "created": unix_seconds(), "owned_by": "wharf",
            "root": root, "parent": base,
        })
    };
    adapters.iter().map(row).collect()
}

#[derive(Deserialize)]
struct Adapter {
    lora_name: String,
    #[serde(default)]
    lora_path: String,
}

async fn load(State(engine): State<Arc<Engine>>, body: Bytes) -> Response {
    let adapter: Adapter = match serde_json::from_slice(&body) {
        Ok(adapter) => adapter,
        Err(problem) => return bad(&problem.to_string()),
    };
    let name = adapter.lora_name;
    tokio::time::sleep(engine.options.faults.adapter_time).await;
    if engine.options.faults.fail_adapter.contains(&name) {
        let message =
            format!("Loading lora {name} failed: No adapter found for {}", adapter.lora_path);
        return error(StatusCode::NOT_FOUND, "NotFoundError", None, &message);
    }
    if source(&engine, &name).is_some() {
        return bad(&format!("The lora adapter '{name}' has already been loaded."));
    }
    say(&format!("INFO: Loaded new LoRA adapter: name '{name}', path '{}'", adapter.lora_path));
    let mut adapters = engine.adapters.lock().unwrap_or_else(PoisonError::into_inner);
    adapters.insert(name.clone(), adapter.lora_path);
    format!("Success: LoRA adapter '{name}' added successfully.").into_response()
}

async fn unload(State(engine): State<Arc<Engine>>, body: Bytes) -> Response {
    let Ok(adapter) = serde_json::from_slice::<Adapter>(&body) else {
        return bad("'lora_name' needs to be provided.");
    };
    let name = adapter.lora_name;
    let mut adapters = engine.adapters.lock().unwrap_or_else(PoisonError::into_inner);
    if adapters.remove(&name).is_none() {
        let message = format!("The lora adapter '{name}' cannot be found.");
        return error(StatusCode::NOT_FOUND, "NotFoundError", None, &message);
    }
    say(&format!("INFO: Removed LoRA adapter: name '{name}'"));
    Json(format!("Success: LoRA adapter '{name}' removed successfully.")).into_response()
}

fn bad(message: &str) -> Response {
    error(StatusCode::BAD_REQUEST, "InvalidUserInput", None, message)
}
