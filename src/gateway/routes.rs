//! Every path of the gateway, in one table.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode, Uri};

use super::infer::Asking;
use super::reject::Reject;
use super::{Gateway, browser, infer, pages, pass, site};
use crate::api;
use crate::api::endpoint::{self, Route, Row, any, get, post};
use crate::api::guard::{self, Needs};

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

/// What is asked at a path, if a body names its model there.
pub fn inference(path: &str) -> Option<&'static Inference> {
    INFERENCE.iter().find(|known| known.path == path)
}

/// The gateway's own paths; where no body names the model.
fn table() -> Vec<Row<Arc<Gateway>>> {
    let mut table = vec![
        ("/v1/models", Needs::Inference, get(pages::models)),
        ("/v1/models/{*id}", Needs::Inference, get(pages::model)),
        ("/health", Needs::Nothing, get(pages::health)),
        ("/status", Needs::Read, get(pages::status)),
        ("/metrics", Needs::Read, get(pages::metrics)),
        ("/openapi.json", Needs::Nothing, get(api::openapi::document)),
        ("/upstream", Needs::Inference, get(pass::list)),
        ("/upstream/", Needs::Inference, get(pass::list)),
        ("/upstream/{*path}", Needs::InferenceOrAdmin, any(pass::upstream)),
        // llama-swap's ways to servers that are no LLM's.
        ("/comfyui", Needs::Nothing, any(pass::comfyui_moved)),
        ("/comfyui/", Needs::InferenceOrAdmin, any(pass::comfyui)),
        ("/comfyui/{*path}", Needs::InferenceOrAdmin, any(pass::comfyui)),
        ("/sdapi/v1/{*path}", Needs::InferenceOrAdmin, any(pass::named)),
        ("/v1/audio/voices", Needs::InferenceOrAdmin, get(pass::named)),
        ("/v1/audio/voices", Needs::InferenceOrAdmin, post(pass::named)),
    ];
    for inference in &INFERENCE {
        let serve = move |State(gateway): State<Arc<Gateway>>, request: Request| {
            let peer = site::peer(request.extensions());
            async move {
                let asking = Asking::new(request, peer, None);
                infer::infer(&gateway, inference, asking).await.into_response()
            }
        };
        table.push((inference.path, Needs::Inference, post(serve)));
    }
    table
}

/// The rows of the gateway's listener, without the control paths that it serves too.
pub fn routes() -> Vec<Route> {
    endpoint::listed(&table())
}

pub fn router(gateway: Arc<Gateway>) -> Router {
    let handle = gateway.handle.clone();
    let mut router = Router::new();
    for (path, needs, endpoint) in table() {
        router = router.route(path, guard::guarded(endpoint, needs, &handle));
    }
    let metrics = Arc::clone(&gateway.metrics);
    let control = api::on_gateway(handle.clone(), metrics, gateway.traffic.clone());
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(gateway)
        .merge(control)
        .layer(from_fn_with_state(handle, browser::guard))
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
