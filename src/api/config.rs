//! `/config`: what is in force and where it is from, patches, and reloading.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

use super::Api;
use super::effective::{self, effective};
use super::error::{bad, unknown_model};
use super::extract::Body;
use super::render::Snapshot;
use crate::config::{ConfigErrors, Severity, patch};
use crate::gateway::reject::Reject;
use crate::reload::{Changed, Rejected, Reloads};

/// Errors told in the message itself; all of them are in `problems`.
const TOLD_MAX: usize = 5;

/// `GET /config`
pub async fn show(State(api): State<Api>) -> Json<Value> {
    Json(effective(&Snapshot::of(&api.handle)))
}

/// `PATCH /config`
pub async fn patch(
    State(api): State<Api>,
    Body(body): Body<Map<String, Value>>,
) -> Result<Response, Response> {
    let catalog = api.handle.catalog();
    let wanted = patch::read(&body, &catalog).map_err(|errors| {
        let reject = bad("body", format!("nothing was patched: {}", errors.join("; ")));
        with(reject, [("patchable", json!(patch::patchable()))])
    })?;
    let paths: Vec<String> = wanted.patches.keys().cloned().collect();
    let removed = |path: &String| wanted.patches.get(path).is_some_and(Value::is_null);
    let (gone, set): (Vec<String>, Vec<String>) = paths.into_iter().partition(removed);
    let mut notes = wanted.notes;
    let changed = match wanted.patches.is_empty() {
        true => Changed::default(),
        false => {
            let changed = reloads(&api).map_err(|why| *why)?.patch(wanted.patches).await;
            changed.map_err(|why| rejected(why, "nothing was patched", &api))?
        }
    };
    let at = Snapshot::of(&api.handle);
    for row in effective::overruled(&at, &set) {
        notes.push(row);
    }
    let mut answer = effective(&at);
    let told = json!({
        "status": "success",
        "message": format!("configuration patched: {}", changed.changes),
        "patched": set,
        "unpatched": gone,
        "notes": notes,
    });
    if let (Some(answer), Value::Object(told)) = (answer.as_object_mut(), told) {
        answer.extend(told);
        answer.extend(what_changed(&changed));
    }
    Ok(Json(answer).into_response())
}

/// `POST /config/reload`
pub async fn reload(State(api): State<Api>) -> Result<Response, Response> {
    let changed = reloads(&api).map_err(|why| *why)?.reload("POST /config/reload").await;
    let changed = changed.map_err(|why| rejected(why, "nothing was changed", &api))?;
    let mut answer = Map::from_iter([
        ("status".to_owned(), json!("success")),
        ("message".to_owned(), json!(format!("configuration reloaded: {}", changed.changes))),
    ]);
    answer.extend(what_changed(&changed));
    Ok(Json(answer).into_response())
}

fn what_changed(changed: &Changed) -> Map<String, Value> {
    let Changed { changes, needs_restart, warnings, left_out, replaced: _ } = changed;
    super::render::object(json!({
        "added": changes.added,
        "removed": changes.removed,
        "changed": changes.changed,
        "adjusted": changes.adjusted,
        "settings": changes.settings,
        "needs_restart": needs_restart,
        "warnings": warnings,
        "left_out": left_out,
    }))
}

pub(super) fn reloads(api: &Api) -> Result<&Reloads, Box<Response>> {
    let closed = || rejected(Rejected::Closed, "nothing was changed", api);
    api.handle.reloads().ok_or_else(|| Box::new(closed()))
}

/// Why a change was refused; `outcome` is what came of it.
pub(super) fn rejected(why: Rejected, outcome: &str, api: &Api) -> Response {
    let (status, code) = match &why {
        Rejected::Config(_) | Rejected::Unfit(_) => {
            (StatusCode::BAD_REQUEST, "invalid_configuration")
        }
        Rejected::Taken(_) => (StatusCode::CONFLICT, "address_taken"),
        Rejected::InFile(_) => (StatusCode::CONFLICT, "model_in_file"),
        Rejected::Full(_) => (StatusCode::CONFLICT, "registry_full"),
        Rejected::NotRegistered(name) => {
            return unknown_model(&api.handle.catalog(), name.as_str()).into_response();
        }
        Rejected::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "store_unavailable"),
        Rejected::Closed => (StatusCode::SERVICE_UNAVAILABLE, "not_available"),
    };
    let Rejected::Config(errors) = &why else {
        return Reject::new(status, code, format!("{outcome}: {why}")).into_response();
    };
    let ConfigErrors::Invalid { file, problems } = errors else {
        return Reject::new(status, code, format!("{outcome}: {errors}")).into_response();
    };
    let wrong: Vec<_> = problems.iter().filter(|p| p.severity == Severity::Error).collect();
    let told = wrong.iter().take(TOLD_MAX).map(|problem| {
        let place = match problem.place.line {
            0 => problem.path.clone(),
            line => format!("{file}:{line}:{}", problem.place.column),
        };
        format!("{place}: {}", problem.in_a_line())
    });
    let mut message = format!("{outcome}: {}", told.collect::<Vec<_>>().join("; "));
    if wrong.len() > TOLD_MAX {
        message.push_str(&format!("; and {} more", wrong.len() - TOLD_MAX));
    }
    with(Reject::new(status, code, message), [("problems", json!(problems)), ("file", json!(file))])
}

/// An error with more beside it than its message.
pub(super) fn with<const N: usize>(reject: Reject, more: [(&str, Value); N]) -> Response {
    let mut body = reject.body();
    for (key, value) in more {
        body[key] = value;
    }
    let mut response = (reject.problem().status, Json(body)).into_response();
    if let Some(after) = reject.problem().retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs()));
    }
    response
}
