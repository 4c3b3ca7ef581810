//! Handlers that only read.

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::StatusCode;
use axum::http::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{not_found, unknown_model};
use super::extract::{PathText, QueryText};
use super::render::{self, Snapshot};
use super::{Api, health, ledger, machine, name};
use crate::config::catalog::ModelSpec;
use crate::gateway::reject::Reject;
use crate::orchestrator::Handle;
use crate::orchestrator::view::LEDGER_ROWS_MAX;
use crate::scheduler::record::SwapRecord;
use crate::units::ModelName;

/// Rows of `GET /swaps` where the caller sets no limit.
const SWAP_ROWS: usize = 100;
/// Of a model that is not ready: somebody may ask for it at any time.
const RETRY_AFTER_S: &str = "5";
/// The version of the text format is part of its content type.
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

pub async fn health(State(api): State<Api>) -> Response {
    health::answer(&api.handle).await
}

pub async fn status(State(api): State<Api>) -> Json<Value> {
    Json(status_of(&api.handle))
}

/// `GET /status` of both listeners.
pub fn status_of(handle: &Handle) -> Value {
    let at = Snapshot::of(handle);
    render::status(&at, health::is_healthy(&at))
}

pub async fn models(State(api): State<Api>) -> Json<Value> {
    let at = Snapshot::of(&api.handle);
    let rows = at.catalog.models.values().map(|spec| render::model(&at, spec));
    Json(json!({ "models": rows.collect::<Vec<_>>() }))
}

/// `GET /models/{name}` and `GET /models/{name}/health`: one route, because names may hold slashes.
pub async fn model(State(api): State<Api>, PathText(path): PathText) -> Result<Response, Reject> {
    let at = Snapshot::of(&api.handle);
    match name::split(&path, |name| at.catalog.asked(name).map(|asked| asked.spec)) {
        Some((spec, "")) => Ok(Json(render::model(&at, spec)).into_response()),
        Some((spec, "health")) => Ok(model_health(&at, spec)),
        _ => Err(unknown_model(&at.catalog, &path)),
    }
}

/// 200 only while the model is ready: a probe of one model.
fn model_health(at: &Snapshot<'_>, spec: &ModelSpec) -> Response {
    let (body, ready) = render::pool::model_health(at, spec);
    if ready {
        return Json(body).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, RETRY_AFTER_S)], Json(body)).into_response()
}

/// Prometheus text, or the swapper's JSON for who prefers it.
pub async fn metrics(State(api): State<Api>, headers: HeaderMap) -> Response {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if prefers_json(accept) {
        let at = Snapshot::of(&api.handle);
        let rows = at.catalog.models.keys().map(|name| render::metrics(&at, name));
        return Json(json!({ "metrics": rows.collect::<Vec<_>>() })).into_response();
    }
    ([(CONTENT_TYPE, PROMETHEUS_TEXT)], api.metrics.render(&api.handle)).into_response()
}

/// JSON named before any text. Prometheus itself names text (and protobuf) only.
fn prefers_json(accept: &str) -> bool {
    let kinds = accept.split(',').map(|kind| kind.split(';').next().unwrap_or_default().trim());
    for kind in kinds {
        match kind {
            "application/json" => return true,
            "text/plain" | "text/*" | "*/*" | "application/openmetrics-text" => return false,
            _ => {}
        }
    }
    false
}

pub async fn model_metrics(
    State(api): State<Api>,
    PathText(path): PathText,
) -> Result<Json<Value>, Reject> {
    let at = Snapshot::of(&api.handle);
    match name::split(&path, |name| at.catalog.resolve(name)) {
        Some((spec, "")) => Ok(Json(render::metrics(&at, &spec.name))),
        _ => Err(unknown_model(&at.catalog, &path)),
    }
}

#[derive(Debug, Deserialize)]
pub struct SwapsWanted {
    model: Option<String>,
    limit: Option<usize>,
    /// Go on after this one, to older ones.
    before: Option<String>,
}

/// Swaps, the newest first: those under way, then those that ended, in this run or an earlier one.
pub async fn swaps(
    State(api): State<Api>,
    QueryText(wanted): QueryText<SwapsWanted>,
) -> Result<Json<Value>, Reject> {
    let at = Snapshot::of(&api.handle);
    // A model of earlier runs may not be configured any more.
    let model = wanted.model.as_ref().map(|name| match at.catalog.resolve(name) {
        Some(spec) => spec.name.clone(),
        None => ModelName::new(name),
    });
    let limit = wanted.limit.unwrap_or(SWAP_ROWS).min(LEDGER_ROWS_MAX);
    let store = api.handle.store();
    // What has ended since the snapshot was taken is in the store.
    let mut under_way: Vec<&SwapRecord> = at.view.scheduler.swaps.iter().rev().collect();
    under_way.retain(|swap| store.recent_swap(swap.id).is_none());
    let mut before = None;
    if let Some(text) = &wanted.before {
        let id = ledger::parse_id(text).ok_or_else(|| no_swap(text))?;
        let place = under_way.iter().position(|swap| swap.id == id);
        under_way.drain(..place.map_or(under_way.len(), |place| place + 1));
        before = place.is_none().then_some(id);
    }
    under_way.retain(|swap| model.as_ref().is_none_or(|model| swap.model == *model));
    under_way.truncate(limit);
    let rest = limit - under_way.len();
    let page = store.swap_page(model.as_ref(), before, rest).await;
    let ended = page.ok_or_else(|| no_swap(wanted.before.as_deref().unwrap_or_default()))?;
    if let (Some(name), true, true) = (&wanted.model, under_way.is_empty(), ended.is_empty())
        && at.catalog.resolve(name).is_none()
    {
        return Err(unknown_model(&at.catalog, name));
    }
    let rows = under_way.into_iter().map(|swap| ledger::row(&at, swap));
    let rows: Vec<Value> = rows.chain(ended.iter().map(|swap| ledger::ended(&at, swap))).collect();
    Ok(Json(json!({ "swaps": rows })))
}

pub async fn swap(State(api): State<Api>, PathText(id): PathText) -> Result<Json<Value>, Reject> {
    let at = Snapshot::of(&api.handle);
    let wanted = ledger::parse_id(&id).ok_or_else(|| no_swap(&id))?;
    let store = api.handle.store();
    if let Some(ended) = store.recent_swap(wanted) {
        return Ok(Json(ledger::detail(&at, &ended)));
    }
    if let Some(swap) = at.view.scheduler.swaps.iter().find(|swap| swap.id == wanted) {
        return Ok(Json(ledger::row(&at, swap)));
    }
    match store.swap(wanted).await {
        Some(ended) => Ok(Json(ledger::detail(&at, &ended))),
        None => Err(no_swap(&id)),
    }
}

fn no_swap(id: &str) -> Reject {
    let message = format!("there is no swap `{id}` (any more): GET /swaps lists them");
    not_found("swap_not_found", message)
}

pub async fn gpus(State(api): State<Api>) -> Json<Value> {
    Json(machine::gpus(&Snapshot::of(&api.handle)))
}

pub async fn queue(State(api): State<Api>) -> Json<Value> {
    Json(machine::queue(&Snapshot::of(&api.handle)))
}

#[cfg(test)]
mod tests {
    use super::prefers_json;

    #[test]
    fn prometheus_gets_text_and_the_swappers_clients_json() {
        assert!(prefers_json("application/json"));
        assert!(prefers_json("application/json, text/plain, */*"));
        assert!(!prefers_json("*/*"));
        assert!(!prefers_json(""));
        assert!(!prefers_json(
            "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
        ));
        assert!(!prefers_json("text/html,application/xml;q=0.9,*/*;q=0.8,application/json"));
    }
}
