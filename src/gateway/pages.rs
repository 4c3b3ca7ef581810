//! The gateway's own small answers: models, health, status, metrics.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, header};
use serde::Deserialize;
use serde_json::{Value, json};

use super::choose::{choose, may_see};
use super::reject::Reject;
use super::{Gateway, admit, auth};
use crate::api::{self, PathText, QueryText};
use crate::config::catalog::{ModelSpec, Route, Scope};
use crate::orchestrator::{Handle, View};
use crate::units::Time;

#[derive(Deserialize)]
pub struct Listing {
    /// Also a row for every alias.
    #[serde(default)]
    aliases: bool,
}

pub async fn models(
    State(gateway): State<Arc<Gateway>>,
    QueryText(listing): QueryText<Listing>,
    headers: HeaderMap,
) -> Result<Response, Reject> {
    let catalog = gateway.handle.catalog();
    let key = auth::authorize(&catalog.settings, &headers, Scope::Inference)?;
    let view = gateway.handle.view();
    let mut rows = Vec::new();
    for spec in catalog.models.values().filter(|spec| !spec.unlisted) {
        if auth::may_use(key, spec.name.as_str(), spec.name.as_str()) {
            rows.push(row(spec.name.as_str(), spec, &gateway.handle, &view));
        }
        for alias in spec.aliases.iter().filter(|_| listing.aliases) {
            if auth::may_use(key, spec.name.as_str(), alias) {
                rows.push(row(alias, spec, &gateway.handle, &view));
            }
        }
    }
    let routes = catalog.routes.iter().filter(|(name, route)| may_see(&catalog, name, route, key));
    rows.extend(routes.map(|(name, route)| route_row(name, route, &gateway.handle)));
    Ok(Json(json!({ "object": "list", "data": rows })).into_response())
}

pub async fn model(
    State(gateway): State<Arc<Gateway>>,
    PathText(id): PathText,
    headers: HeaderMap,
) -> Result<Response, Reject> {
    let catalog = gateway.handle.catalog();
    let key = auth::authorize(&catalog.settings, &headers, Scope::Inference)?;
    if let Some(route) = catalog.routes.get(&id).filter(|_| catalog.resolve(&id).is_none()) {
        choose(&gateway.handle, &catalog, &id, key)?;
        return Ok(Json(route_row(&id, route, &gateway.handle)).into_response());
    }
    let spec = admit::model(&catalog, &id, key)?;
    let row = row(&id, spec, &gateway.handle, &gateway.handle.view());
    Ok(Json(row).into_response())
}

/// A name that leads to one of several models.
fn route_row(id: &str, route: &Route, handle: &Handle) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": created(handle),
        "owned_by": "wharf",
        "meta": { "route": route.kind, "models": route.models },
    })
}

/// One row of `/v1/models`: what OpenAI clients read, and ours in `meta`.
fn row(id: &str, spec: &ModelSpec, handle: &Handle, view: &View) -> Value {
    let state = view.model(&spec.name).map_or("stopped", |model| model.residency.as_str());
    json!({
        "id": id,
        "object": "model",
        "created": created(handle),
        "owned_by": "wharf",
        "meta": {
            "model": spec.name,
            "state": state,
            "type": spec.model_type,
            "tags": spec.tags,
            "engine": spec.engine,
            "peer": spec.peer,
            "aliases": spec.aliases,
            "name": spec.display_name,
            "description": spec.description,
            "metadata": spec.metadata,
            "context_length": handle.context_length(&spec.name),
        },
    })
}

/// What marks a model as one for pictures, by its type or a tag.
const PICTURES: [&str; 6] =
    ["image", "images", "diffusion", "stable-diffusion", "txt2img", "sdapi"];

/// Models for pictures in the shape of the Stable Diffusion web UI. Their names are what
/// `POST /sdapi/v1/txt2img` takes as `model`.
pub fn sd_models(gateway: &Gateway, headers: &HeaderMap) -> Result<Json<Value>, Reject> {
    let catalog = gateway.handle.catalog();
    let key = auth::authorize(&catalog.settings, headers, Scope::Inference)?;
    let paints = |word: &str| PICTURES.iter().any(|known| word.eq_ignore_ascii_case(known));
    let rows = catalog
        .models
        .values()
        .filter(|spec| !spec.unlisted && auth::may_use(key, spec.name.as_str(), spec.name.as_str()))
        .filter(|spec| paints(&spec.model_type) || spec.tags.iter().any(|tag| paints(tag)))
        .map(|spec| {
            let title = spec.display_name.as_deref().unwrap_or(spec.name.as_str());
            json!({
                "title": title, "model_name": spec.name, "filename": spec.name,
                "hash": null, "sha256": null, "config": null,
            })
        });
    Ok(Json(Value::Array(rows.collect())))
}

fn created(handle: &Handle) -> u64 {
    handle.wall(Time::ZERO).duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// 200 only if requests can be served. Open without a key: probes have none.
pub async fn health(State(gateway): State<Arc<Gateway>>) -> Response {
    api::health_answer(&gateway.handle).await
}

pub async fn status(State(gateway): State<Arc<Gateway>>) -> Json<Value> {
    let mut body = api::status_answer(&gateway.handle);
    body["body_bytes"] = json!(gateway.bodies.in_use());
    Json(body)
}

pub async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
    let text = gateway.metrics.render(&gateway.handle);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
