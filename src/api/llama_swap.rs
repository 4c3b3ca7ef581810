//! llama-swap's control paths: what its users' scripts and dashboards call.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::http::header::ACCEPT;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::change::unloaded;
use super::error::{bad, unknown_model};
use super::extract::{PathText, QueryText};
use super::render::{Snapshot, llama_swap};
use crate::gateway::reject::Reject;
use crate::scheduler::record::ResidencyView;

/// Rows of `GET /api/metrics`; that tool keeps as many.
const ACTIVITY_ROWS: usize = 1000;

/// `GET /unload`
pub async fn unload(State(api): State<Api>) -> Result<&'static str, Reject> {
    unload_everything(&api).await?;
    Ok("OK")
}

/// `POST /api/models/unload`
pub async fn unload_all(State(api): State<Api>) -> Result<Json<Value>, Reject> {
    unload_everything(&api).await?;
    Ok(Json(json!({ "msg": "ok" })))
}

/// `POST /api/models/unload/{model}`
pub async fn unload_one(
    State(api): State<Api>,
    PathText(name): PathText,
    headers: HeaderMap,
) -> Result<Response, Reject> {
    let catalog = api.handle.catalog();
    let Some(spec) = catalog.resolve(&name) else {
        return Ok(match accepts_json(&headers) {
            true => unknown_model(&catalog, &name).into_response(),
            // Its text, word for word.
            false => (StatusCode::NOT_FOUND, "Model not found").into_response(),
        });
    };
    unloaded(&api, spec, true, &catalog).await?;
    Ok("OK".into_response())
}

/// As that tool does it: at once, whatever is in flight. Models that run elsewhere are not touched.
async fn unload_everything(api: &Api) -> Result<(), Reject> {
    let at = Snapshot::of(&api.handle);
    let there = at.catalog.models.values().filter(|spec| {
        let residency = at.residency(&spec.name);
        !spec.is_external()
            && !matches!(residency, ResidencyView::Stopped | ResidencyView::Failed { .. })
    });
    let unloads = there.map(|spec| unloaded(api, spec, true, &at.catalog));
    join_all(unloads).await.into_iter().try_for_each(|done| done.map(drop))
}

fn accepts_json(headers: &HeaderMap) -> bool {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.contains("application/json"))
}

/// `GET /running`
pub async fn running(State(api): State<Api>) -> Json<Value> {
    Json(llama_swap::running(&Snapshot::of(&api.handle)))
}

/// `GET /api/metrics`: the last requests, oldest first.
pub async fn metrics(State(api): State<Api>) -> Json<Value> {
    Json(activity_rows(&api))
}

pub(super) fn activity_rows(api: &Api) -> Value {
    api.handle.store().activity(0, ACTIVITY_ROWS).iter().map(llama_swap::activity).collect()
}

#[derive(Debug, Deserialize)]
pub struct PerformanceWanted {
    /// RFC 3339: only samples after it.
    after: Option<String>,
}

/// `GET /api/performance`
pub async fn performance(
    State(api): State<Api>,
    QueryText(wanted): QueryText<PerformanceWanted>,
) -> Result<Json<Value>, Reject> {
    let after = match wanted.after.as_deref().filter(|after| !after.is_empty()) {
        None => SystemTime::UNIX_EPOCH,
        Some(text) => rfc3339(text).ok_or_else(|| {
            bad("after", "invalid 'after' timestamp, use RFC3339 format: 2026-01-31T12:00:00Z")
        })?,
    };
    let samples = api.handle.performance().samples();
    let wanted = samples.iter().map(Arc::as_ref).filter(|sample| sample.at > after);
    Ok(Json(llama_swap::performance(wanted)))
}

/// With any offset. `+` in a query that nobody encoded arrives as a space.
fn rfc3339(text: &str) -> Option<SystemTime> {
    let text = text.trim().replace(' ', "+");
    if let Ok(time) = humantime::parse_rfc3339(&text) {
        return Some(time);
    }
    let at = text.len().checked_sub("+00:00".len())?;
    let (time, offset) = (text.get(..at)?, text.get(at..)?);
    let time = humantime::parse_rfc3339(&format!("{time}Z")).ok()?;
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let (hours, minutes): (u64, u64) = (hours.parse().ok()?, minutes.parse().ok()?);
    let offset_by = std::time::Duration::from_secs(hours * 3600 + minutes * 60);
    match offset.as_bytes()[0] {
        b'+' => time.checked_sub(offset_by),
        b'-' => time.checked_add(offset_by),
        _ => None,
    }
}

/// `GET /api/version`. Builds that are not told their commit say so.
pub async fn version() -> Json<Value> {
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": option_env!("WHARF_COMMIT").unwrap_or("unknown"),
        "build_date": option_env!("WHARF_BUILD_DATE").unwrap_or("unknown"),
    }))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::rfc3339;

    #[test]
    fn times_are_read_with_any_offset() {
        let noon = UNIX_EPOCH + Duration::from_secs(1_767_268_800);
        for text in [
            "2026-01-01T12:00:00Z",
            "2026-01-01T12:00:00.000Z",
            "2026-01-01T14:30:00+02:30",
            "2026-01-01T14:30:00 02:30",
            "2026-01-01T04:00:00-08:00",
        ] {
            assert_eq!(rfc3339(text), Some(noon), "{text}");
        }
        for text in ["yesterday", "", "2026-01-01", "12:00", "2026-01-01T12:00:00+2", "é+00:00"] {
            assert_eq!(rfc3339(text), None, "{text}");
        }
    }
}
