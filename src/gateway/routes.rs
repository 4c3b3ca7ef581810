//! Every path of the gateway, in one table.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http::{Method, StatusCode, Uri};

use super::reject::Reject;
use super::{Gateway, browser, infer, pages, pass};
use crate::api;

/// Which shape a stream's chunks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    Chat,
    Completions,
    Other,
}

/// Where the model's name stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyKind {
    /// The field `model` of a JSON object, whatever the content type says.
    Json,
    /// The field `model` of a multipart form.
    Form,
}

/// A path on which the body names its model.
#[derive(Debug)]
pub struct Inference {
    pub path: &'static str,
    /// The engine's path.
    pub upstream: &'static str,
    pub api: Api,
    pub body: BodyKind,
}

const fn same(path: &'static str, api: Api) -> Inference {
    short(path, path, api)
}

const fn short(path: &'static str, upstream: &'static str, api: Api) -> Inference {
    Inference { path, upstream, api, body: BodyKind::Json }
}

const fn form(path: &'static str) -> Inference {
    Inference { path, upstream: path, api: Api::Other, body: BodyKind::Form }
}

pub static INFERENCE: [Inference; 20] = [
    same("/v1/chat/completions", Api::Chat),
    short("/chat/completions", "/v1/chat/completions", Api::Chat),
    same("/v1/completions", Api::Completions),
    short("/completions", "/v1/completions", Api::Completions),
    same("/v1/embeddings", Api::Other),
    same("/v1/responses", Api::Other),
    same("/v1/messages", Api::Other),
    same("/v1/messages/count_tokens", Api::Other),
    same("/v1/rerank", Api::Other),
    same("/rerank", Api::Other),
    same("/v1/score", Api::Other),
    same("/v1/audio/speech", Api::Other),
    same("/v1/images/generations", Api::Other),
    same("/tokenize", Api::Other),
    same("/detokenize", Api::Other),
    same("/infill", Api::Other),
    same("/completion", Api::Other),
    form("/v1/audio/transcriptions"),
    form("/v1/audio/translations"),
    form("/v1/images/edits"),
];

pub fn router(gateway: Arc<Gateway>) -> Router {
    let handle = gateway.handle.clone();
    let mut router = Router::new()
        .route("/v1/models", get(pages::models))
        .route("/v1/models/{*id}", get(pages::model))
        .route("/health", get(pages::health))
        .route("/status", get(pages::status))
        .route("/metrics", get(pages::metrics))
        .route("/upstream", get(pass::list))
        .route("/upstream/", get(pass::list))
        .route("/upstream/{*path}", any(pass::upstream))
        // llama-swap's ways to servers that are no LLM's.
        .route("/comfyui", any(pass::comfyui))
        .route("/comfyui/", any(pass::comfyui))
        .route("/comfyui/{*path}", any(pass::comfyui))
        .route("/sdapi/v1/{*path}", any(pass::named))
        .route("/v1/audio/voices", get(pass::named).post(pass::named));
    for inference in &INFERENCE {
        let serve = move |State(gateway): State<Arc<Gateway>>, request: Request| {
            infer::infer(gateway, inference, request)
        };
        router = router.route(inference.path, post(serve));
    }
    let metrics = Arc::clone(&gateway.metrics);
    let control = api::on_gateway(handle.clone(), metrics, gateway.traffic.clone());
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(gateway)
        .merge(control)
        .layer(middleware::from_fn_with_state(handle, browser::guard))
}

pub async fn unknown_path(State(gateway): State<Arc<Gateway>>, uri: Uri) -> Response {
    let path: String = uri.path().chars().take(200).collect();
    let settings = &gateway.handle.catalog().settings;
    let hint = match INFERENCE.iter().find(|known| known.path == format!("/v1{path}")) {
        Some(known) => format!("; did you mean {}?", known.path),
        None if settings.gateway != settings.orchestrator && api::is_control(&path) => format!(
            ": this is the gateway; the orchestrator (listen.orchestrator) listens on {}",
            settings.orchestrator
        ),
        None => String::new(),
    };
    let message = format!("there is nothing at {path}{hint}");
    Reject::new(StatusCode::NOT_FOUND, "path_not_found", message).into_response()
}

pub async fn wrong_method(method: Method, uri: Uri) -> Response {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("{path} does not answer to {method}");
    Reject::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message).into_response()
}
