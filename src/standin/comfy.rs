//! `--style http`: a server that is no LLM's, after ComfyUI's routes. It answers a prompt at once
//! and works through its queue one by one.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Extension, State};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, StatusCode, header};
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};

use super::engine::{Engine, say};
use super::server::UpgradeSwitch;

/// RFC 6455: appended to the client's key before it is hashed.
const WEBSOCKET_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

#[derive(Clone, Debug, Default)]
struct Work {
    next: u64,
    /// The first one runs.
    queue: Vec<u64>,
    done: Vec<u64>,
}

#[derive(Clone)]
struct Comfy {
    engine: Arc<Engine>,
    work: watch::Sender<Work>,
    turn: Arc<Semaphore>,
}

pub fn router(engine: Arc<Engine>) -> Router {
    let comfy = Comfy {
        engine,
        work: watch::Sender::new(Work::default()),
        turn: Arc::new(Semaphore::new(1)),
    };
    Router::new()
        .route("/", get(page))
        .route("/app.js", get(script))
        .route("/prompt", post(prompt))
        .route("/queue", get(queue))
        .route("/history", get(history))
        .route("/free", post(free))
        .route("/ws", get(socket))
        .with_state(comfy)
}

async fn page() -> Html<&'static str> {
    Html("<!doctype html><title>stand-in</title><script src=\"app.js\"></script>")
}

async fn script() -> Response {
    ([(header::CONTENT_TYPE, "text/javascript")], "document.title = 'ready'").into_response()
}

#[derive(Default, Deserialize)]
struct Prompt {
    seconds: Option<f64>,
}

async fn prompt(State(comfy): State<Comfy>, body: Bytes) -> Response {
    let asked: Prompt = serde_json::from_slice(&body).unwrap_or_default();
    let seconds = asked.seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let length = seconds.unwrap_or(comfy.engine.options.speed.work);
    let mut number = 0;
    comfy.work.send_modify(|work| {
        work.next += 1;
        number = work.next;
        work.queue.push(number);
    });
    say(&format!("got prompt {number}"));
    let worker = comfy.clone();
    tokio::spawn(async move {
        // Fair: in the order of their numbers. It is never closed.
        let turn = worker.turn.acquire().await;
        tokio::time::sleep(length).await;
        say(&format!("Prompt executed {number}"));
        worker.work.send_modify(|work| {
            work.queue.retain(|queued| *queued != number);
            work.done.push(number);
        });
        drop(turn);
    });
    let id = format!("prompt-{number}");
    Json(json!({ "prompt_id": id, "number": number, "node_errors": {} })).into_response()
}

async fn queue(State(comfy): State<Comfy>) -> Json<Value> {
    let work = comfy.work.borrow().clone();
    let entry = |number: &u64| json!([number, format!("prompt-{number}"), {}, {}, []]);
    let running: Vec<Value> = work.queue.iter().take(1).map(entry).collect();
    let pending: Vec<Value> = work.queue.iter().skip(1).map(entry).collect();
    Json(json!({ "queue_running": running, "queue_pending": pending }))
}

async fn history(State(comfy): State<Comfy>) -> Json<Value> {
    let done = comfy.work.borrow().done.clone();
    let row = |number: &u64| (format!("prompt-{number}"), json!({ "status": "success" }));
    Json(Value::Object(done.iter().map(row).collect()))
}

async fn free(body: Bytes) -> StatusCode {
    say(&format!("freeing memory: {}", String::from_utf8_lossy(&body)));
    StatusCode::OK
}

async fn socket(Extension(upgrade): Extension<UpgradeSwitch>, headers: HeaderMap) -> Response {
    let is_websocket = headers
        .get(header::UPGRADE)
        .is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket"));
    let key = headers.get(header::SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok());
    let (true, Some(key)) = (is_websocket, key) else {
        return (StatusCode::BAD_REQUEST, "No WebSocket UPGRADE hdr: None").into_response();
    };
    let accept = digest(&SHA1_FOR_LEGACY_USE_ONLY, format!("{key}{WEBSOCKET_GUID}").as_bytes());
    upgrade.pull();
    let headers = [
        (header::CONNECTION, "Upgrade".to_owned()),
        (header::UPGRADE, "websocket".to_owned()),
        (header::SEC_WEBSOCKET_ACCEPT, STANDARD.encode(accept)),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}
