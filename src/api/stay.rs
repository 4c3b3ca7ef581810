//! Handlers for how long a model stays: extend-ttl, pin, sleep, wake.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;
use serde_json::json;

use super::Api;
use super::change::unload_limit;
use super::error::{bad, declined, refused, unexpected};
use super::render::{self, Snapshot, seconds};
use crate::config::catalog::{Catalog, ModelSpec};
use crate::gateway::reject::Reject;
use crate::scheduler::action::Answer;

/// The longest extension that one call may ask for.
const EXTENSION_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtendBody {
    /// Left out: as long as the model's own ttl.
    minutes: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinBody {
    pinned: Option<bool>,
}

/// `POST /models/{name}/extend-ttl`
pub async fn extend_ttl(api: &Api, spec: &ModelSpec, body: ExtendBody) -> Result<Response, Reject> {
    let by = body.minutes.map(minutes).transpose()?;
    let name = &spec.name;
    let (until, left, bounded) = match api.handle.extend_ttl(name.clone(), by).await {
        Answer::Extended { until, left, bounded } => (until, left, bounded),
        Answer::WithoutTtl { why } => return Ok(Json(without_ttl(spec, why)).into_response()),
        Answer::Declined { why } => return Err(declined(name, why)),
        Answer::Refused(refusal) => return Err(refused(&refusal, name, api)),
        answer => return Err(unexpected("extend-ttl", &answer)),
    };
    // It is in force already; a restart, too, shall keep to what is said here.
    let kept = api.handle.store().flush().await;
    let at = Snapshot::of(&api.handle);
    let left = render::minutes(left);
    let mut message = format!("TTL of {name} ends in {left} minutes");
    if bounded {
        message.push_str(", as far as ttl_bounds allow");
    }
    if let Err(fault) = kept {
        message.push_str(&format!("; a restart may forget it: {fault}"));
    }
    let mut body = render::object(render::done(name, message));
    body.extend(render::object(json!({
        "model_id": name,
        "ttl_remaining_minutes": left,
        "ttl_until": at.wall(until),
        "grace_seconds": seconds(spec.grace),
        "bounded": bounded,
    })));
    Ok(Json(body).into_response())
}

/// The pool manager's users extend models that never leave, too: that is a success, and 0 minutes
/// are its word for "no ttl".
fn without_ttl(spec: &ModelSpec, why: String) -> serde_json::Value {
    let mut body = render::object(render::done(&spec.name, why));
    body.extend(render::object(json!({
        "model_id": spec.name,
        "ttl_remaining_minutes": 0.0,
        "ttl_until": null,
        "grace_seconds": seconds(spec.grace),
        "bounded": false,
    })));
    body.into()
}

fn minutes(asked: f64) -> Result<Duration, Reject> {
    let by = Duration::try_from_secs_f64(asked * 60.0).ok();
    by.filter(|by| !by.is_zero() && *by <= EXTENSION_MAX).ok_or_else(|| {
        bad(
            "minutes",
            "minutes must be a number above 0, at most those of a year: {\"minutes\":30}",
        )
    })
}

/// `POST /models/{name}/pin`
pub async fn pin(api: &Api, spec: &ModelSpec, body: PinBody) -> Result<Response, Reject> {
    let name = &spec.name;
    let (pinned, shut_out) = match api.handle.pin(name.clone(), body.pinned.unwrap_or(true)).await {
        Answer::Pinned { pinned, shut_out } => (pinned, shut_out),
        Answer::Declined { why } => return Err(declined(name, why)),
        Answer::Refused(refusal) => return Err(refused(&refusal, name, api)),
        answer => return Err(unexpected("pin", &answer)),
    };
    let mut message = match pinned {
        true => format!("Model {name} is pinned: nothing evicts it, no ttl runs"),
        false => format!("Model {name} is not pinned"),
    };
    if !shut_out.is_empty() {
        let names: Vec<&str> = shut_out.iter().map(|name| name.as_str()).collect();
        message.push_str(&format!("; beside it there is no room for {}", names.join(", ")));
    }
    let mut body = render::object(render::done(name, message));
    body.extend(render::object(json!({ "pinned": pinned, "shut_out": shut_out })));
    Ok(Json(body).into_response())
}

/// `POST /models/{name}/sleep`
pub async fn sleep(api: &Api, spec: &ModelSpec, catalog: &Catalog) -> Result<Response, Reject> {
    let (name, limit) = (&spec.name, unload_limit(spec, catalog));
    let Ok(answer) = tokio::time::timeout(limit, api.handle.sleep(name.clone())).await else {
        let limit = humantime::format_duration(limit);
        let message = format!("{name} is not asleep after {limit}; GET /swaps says how far it is");
        return Err(Reject::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message).model(name));
    };
    match answer {
        Answer::Asleep { level } => {
            let message = format!("Model {name} sleeps at level {level}");
            let mut body = render::object(render::done(name, message));
            body.insert("sleep_level".to_owned(), json!(level));
            Ok(Json(body).into_response())
        }
        Answer::Declined { why } => Err(declined(name, why)),
        Answer::Refused(refusal) => Err(refused(&refusal, name, api)),
        answer => Err(unexpected("sleep", &answer)),
    }
}
