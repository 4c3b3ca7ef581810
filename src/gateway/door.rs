//! Front doors: a port for one model each, as the model pool manager had them. What comes in there
//! is served as everywhere (lease, key, limits), whatever the body says of its model.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use http::StatusCode;
use serde_json::json;

use super::infer::Asking;
use super::routes::{INFERENCE, Inference, wrong_method};
use super::{Gateway, Reject, browser, infer, site};
use crate::scheduler::record::ResidencyView;
use crate::units::ModelName;

/// The pool manager's services had these two.
const PATHS: [&str; 2] = ["/v1/chat/completions", "/v1/completions"];

#[derive(Clone)]
struct Door {
    gateway: Arc<Gateway>,
    model: ModelName,
    port: u16,
}

/// The paths of one model's door.
pub fn door(gateway: Arc<Gateway>, model: ModelName, port: u16) -> Router {
    let handle = gateway.handle.clone();
    let mut router = Router::new().route("/health", get(health));
    for inference in INFERENCE.iter().filter(|known| PATHS.contains(&known.path)) {
        let serve =
            move |State(door): State<Door>, request: Request| serve(door, inference, request);
        router = router.route(inference.path, post(serve));
    }
    router
        .fallback(nothing)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(handle, browser::guard))
        .with_state(Door { gateway, model, port })
}

async fn serve(door: Door, inference: &'static Inference, request: Request) -> Response {
    let peer = site::peer(request.extensions());
    let asking = Asking::new(request, peer, Some(&door.model));
    infer::infer(&door.gateway, inference, asking).await.into_response()
}

/// 200 unless the model cannot be had: one that is not loaded is loaded by the first request.
async fn health(State(door): State<Door>) -> Response {
    let handle = &door.gateway.handle;
    let view = handle.view();
    let stopped = ResidencyView::Stopped;
    let residency = view.model(&door.model).map_or(&stopped, |model| &model.residency);
    let facts = view.models.get(&door.model).cloned().unwrap_or_default();
    let gates = handle.gates();
    let granted = gates.get(&door.model).map_or(0, |gate| gate.granted());
    let loaded =
        facts.loaded_at.filter(|loaded| facts.unloaded_at.is_none_or(|gone| gone < *loaded));
    let status = match residency {
        ResidencyView::Failed { .. } | ResidencyView::Lost => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::OK,
    };
    let body = json!({
        "model": door.model,
        "status": residency.as_str(),
        "uptime_seconds": loaded.map_or(0, |loaded| handle.now().since(loaded).as_secs()),
        "requests_served": facts.requests_before + granted,
        "port": door.port,
    });
    (status, Json(body)).into_response()
}

async fn nothing(State(door): State<Door>, request: Request) -> Response {
    let path: String = request.uri().path().chars().take(200).collect();
    let gateway = door.gateway.handle.catalog().settings.gateway;
    let message = format!(
        "there is nothing at {path}: this port is the front door of {} and has {} and /health; \
         the gateway listens on {gateway}",
        door.model,
        PATHS.join(", ")
    );
    Reject::new(StatusCode::NOT_FOUND, "path_not_found", message).into_response()
}
