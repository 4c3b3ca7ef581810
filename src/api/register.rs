//! `POST /models/register` and `DELETE /models/{id}`.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::Api;
use super::config::{rejected, reloads};
use super::error::bad;
use super::extract::{Body, PathText};
use super::render::{self, Snapshot, object};
use crate::gateway::reject::Reject;
use crate::store::Registration;
use crate::units::ModelName;

const KEYS: [&str; 8] = [
    "model_id",
    "template",
    "display_name",
    "model_type",
    "warmup",
    "ttl_minutes",
    "priority",
    "tags",
];

pub async fn register(
    State(api): State<Api>,
    Body(body): Body<Map<String, Value>>,
) -> Result<Response, Response> {
    let registration = read(body).map_err(IntoResponse::into_response)?;
    let name = ModelName::new(&registration.model_id);
    let changed = reloads(&api).map_err(|why| *why)?.register(registration).await;
    let changed = changed.map_err(|why| rejected(why, "the model was not registered", &api))?;
    let (status, message) = match changed.replaced {
        false => (StatusCode::CREATED, format!("Model {name} registered")),
        true => (StatusCode::OK, format!("Model {name} registered anew")),
    };
    let at = Snapshot::of(&api.handle);
    let row = at.catalog.model(&name).map(|spec| render::model(&at, spec));
    let mut answer = object(row.unwrap_or_else(|| json!({})));
    answer.extend(object(render::done(&name, message)));
    answer.insert("warnings".to_owned(), json!(changed.warnings));
    Ok((status, Json(answer)).into_response())
}

pub async fn delete(
    State(api): State<Api>,
    PathText(path): PathText,
) -> Result<Response, Response> {
    let name = ModelName::new(&path);
    let was_loaded = render::is_loaded(Snapshot::of(&api.handle).residency(&name));
    let changed = reloads(&api).map_err(|why| *why)?.unregister(name.clone()).await;
    changed.map_err(|why| rejected(why, "the model was not removed", &api))?;
    let message = match was_loaded {
        true => format!("Model {name} removed; its requests end, then it is stopped"),
        false => format!("Model {name} removed"),
    };
    let mut answer = object(render::done(&name, message));
    answer.insert("model_id".to_owned(), json!(name));
    answer.insert("was_loaded".to_owned(), json!(was_loaded));
    Ok(Json(answer).into_response())
}

/// Nothing that could be run can be registered, by any name: unknown keys are refused.
fn read(body: Map<String, Value>) -> Result<Registration, Reject> {
    if let Some(key) = body.keys().find(|key| !KEYS.contains(&key.as_str())) {
        let message = format!(
            "\"{}\" cannot be registered: a model names a template that the operator allowed and \
             gives {}",
            key.escape_debug(),
            KEYS.join(", ")
        );
        return Err(bad("body", message));
    }
    let missing = || bad("model_id", "the body must name the model: {\"model_id\":\"…\"}");
    if body.get("model_id").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err(missing());
    }
    // `null` is as good as nothing.
    let body: Map<String, Value> = body.into_iter().filter(|(_, value)| !value.is_null()).collect();
    for (key, value) in &body {
        let mut alone = object(json!({ "model_id": "x" }));
        alone.insert(key.clone(), value.clone());
        if let Err(error) = serde_json::from_value::<Registration>(Value::Object(alone)) {
            return Err(bad("body", format!("\"{key}\" is not as expected: {error}")));
        }
    }
    serde_json::from_value(Value::Object(body))
        .map_err(|error| bad("body", format!("the body is not as expected: {error}")))
}
