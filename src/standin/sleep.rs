//! vLLM's development endpoints for sleeping and waking.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::StatusCode;
use serde_json::{Value, json};

use super::engine::{Engine, say};
use super::load::out_of_memory_line;
use super::routes::crash;

pub fn routes() -> Router<Arc<Engine>> {
    Router::new()
        .route("/sleep", post(sleep))
        .route("/wake_up", post(wake_up))
        .route("/is_sleeping", get(is_sleeping))
        .route("/collective_rpc", post(collective_rpc))
        .route("/reset_prefix_cache", post(|| async { StatusCode::OK }))
}

/// Values of `key` in a query. vLLM takes query parameters only, and `tags` more than once.
fn values<'a>(query: &'a Option<String>, key: &str) -> Vec<&'a str> {
    let pairs = query.as_deref().unwrap_or_default().split('&');
    pairs
        .filter_map(|pair| pair.split_once('='))
        .filter(|pair| pair.0 == key)
        .map(|pair| pair.1)
        .collect()
}

/// Aborts what is under way, as vLLM does by default.
async fn sleep(State(engine): State<Arc<Engine>>, RawQuery(query): RawQuery) -> Response {
    let level = match values(&query, "level").first() {
        None | Some(&"1") => 1,
        Some(&"2") => 2,
        Some(_) => return StatusCode::BAD_REQUEST.into_response(),
    };
    let _one_at_a_time = engine.sleep_change.lock().await;
    if engine.wakefulness.borrow().level > 0 {
        return StatusCode::OK.into_response();
    }
    engine.wakefulness.send_modify(|now| {
        now.weights = false;
        now.cache = false;
        now.level = level;
        now.stale = level == 2;
        now.sleeps += 1;
    });
    tokio::time::sleep(engine.options.load.sleep_time).await;
    let residue = engine.options.load.residue.min(engine.vram());
    // Shrinking cannot run short.
    let _ = engine.hold(residue);
    say(&format!(
        "INFO 01-01 00:00:00 [gpu_worker.py:1] Sleep mode (level {level}): {residue} memory is still in use."
    ));
    StatusCode::OK.into_response()
}

async fn wake_up(State(engine): State<Arc<Engine>>, RawQuery(query): RawQuery) -> Response {
    let tags = values(&query, "tags");
    let wakes = |tag| tags.is_empty() || tags.contains(&tag);
    let _one_at_a_time = engine.sleep_change.lock().await;
    let before = *engine.wakefulness.borrow();
    let (weights, cache) = (before.weights || wakes("weights"), before.cache || wakes("kv_cache"));
    tokio::time::sleep(engine.options.load.wake_time).await;
    // Half for each part, of what the whole engine takes.
    let share = u64::from(weights) + u64::from(cache);
    let bytes = crate::units::Bytes(engine.vram().0 / 2 * share);
    if let Err(shortage) = engine.hold(bytes.max(engine.options.load.residue.min(engine.vram()))) {
        say(&out_of_memory_line(&shortage));
        crash(&engine, "no memory to wake up into");
    }
    engine.wakefulness.send_modify(|now| {
        now.weights = weights;
        now.cache = cache;
        if weights && cache {
            now.level = 0;
        }
    });
    StatusCode::OK.into_response()
}

async fn is_sleeping(State(engine): State<Arc<Engine>>) -> Response {
    let sleeps = !engine.wakefulness.borrow().is_awake();
    axum::Json(json!({ "is_sleeping": sleeps })).into_response()
}

async fn collective_rpc(State(engine): State<Arc<Engine>>, body: Bytes) -> Response {
    let call: Value = serde_json::from_slice(&body).unwrap_or_default();
    match call["method"].as_str() {
        Some("reload_weights") => {
            engine.wakefulness.send_modify(|now| now.stale = now.stale && !now.weights);
            axum::Json(json!({"results": [null]})).into_response()
        }
        _ => StatusCode::BAD_REQUEST.into_response(),
    }
}
