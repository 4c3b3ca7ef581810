//! Requests: those in flight, cancelling one, and captures of ended ones.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::Api;
use super::error::{bad, not_found};
use super::extract::PathText;
use super::render::{Snapshot, seconds};
use crate::gateway::{Capture, Entry, Reject};

/// `{"total", "requests": [{"id", "request_id", "model", …}]}`, oldest first.
pub async fn in_flight(State(api): State<Api>) -> Json<Value> {
    let at = Snapshot::of(&api.handle);
    let requests: Vec<Value> =
        api.traffic.in_flight.list().iter().map(|entry| row(&at, entry)).collect();
    Json(json!({ "total": requests.len(), "requests": requests }))
}

fn row(at: &Snapshot<'_>, entry: &Entry) -> Value {
    let who = &entry.who;
    json!({
        "id": entry.id,
        "request_id": who.request_id.to_str().unwrap_or_default(),
        "model": entry.model().as_str(),
        "requested": who.requested,
        "key": who.key,
        "path": who.path,
        "arrived": at.wall(who.arrived),
        "seconds": seconds(at.now.since(who.arrived)),
        "stage": entry.stage(),
        "bytes": entry.bytes(),
    })
}

/// `msg` is llama-swap's answer.
pub async fn cancel(State(api): State<Api>, PathText(id): PathText) -> Result<Json<Value>, Reject> {
    let number: u64 = id.parse().map_err(|_| {
        bad("id", format!("\"{id}\" is no id of a request; GET /api/inflight lists them"))
    })?;
    if !api.traffic.in_flight.cancel(number) {
        let message = format!("no request {number} is in flight; GET /api/inflight lists them");
        return Err(not_found("request_not_found", message));
    }
    Ok(Json(json!({ "status": "cancelled", "id": number, "msg": "ok" })))
}

/// In llama-swap's shape, errors included; `req_bytes` and `resp_bytes` tell what was cut.
pub async fn capture(State(api): State<Api>, PathText(id): PathText) -> Response {
    let refused = |status, why: &str| (status, Json(json!({ "error": why }))).into_response();
    let Ok(id) = id.parse::<i64>() else {
        return refused(StatusCode::BAD_REQUEST, "invalid capture ID");
    };
    let enabled = api.handle.catalog().settings.captures.enabled;
    let found = u64::try_from(id).ok().filter(|_| enabled);
    match found.and_then(|id| api.traffic.captures.get(id)) {
        Some(capture) => Json(shown(id, &capture)).into_response(),
        None => refused(StatusCode::NOT_FOUND, "capture not found"),
    }
}

fn shown(id: i64, capture: &Arc<Capture>) -> Value {
    let headers = |headers: &[(String, String)]| -> Map<String, Value> {
        headers.iter().map(|(name, value)| (name.clone(), json!(value))).collect()
    };
    json!({
        "id": id,
        "req_path": capture.path,
        "req_headers": headers(&capture.request_headers),
        "req_body": STANDARD.encode(&capture.request_body),
        "req_bytes": capture.request_bytes,
        "resp_headers": headers(&capture.response_headers),
        "resp_body": STANDARD.encode(&capture.response_body),
        "resp_bytes": capture.response_bytes,
    })
}
