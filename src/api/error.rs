//! Errors of the control API: the gateway's own [`Reject`], with what only this API says.

use http::{Method, StatusCode, Uri};

use super::Api;
use crate::config::catalog::Catalog;
use crate::gateway::nearest::nearest;
use crate::gateway::reject::{Reject, Viewer};
use crate::scheduler::action::{Answer, Refusal};
use crate::units::ModelName;

/// Names listed in an answer to an unknown one.
const NAMES_MAX: usize = 50;
/// Longer names are cut in messages.
const WANTED_SHOWN_MAX: usize = 128;

/// 400 for one part of the request.
pub fn bad(param: &'static str, message: impl Into<String>) -> Reject {
    Reject::bad_request("invalid_request", message).param(param)
}

pub fn not_found(code: &'static str, message: impl Into<String>) -> Reject {
    Reject::new(StatusCode::NOT_FOUND, code, message)
}

/// An answer that the orchestrator never gives to what was asked.
pub fn internal(message: &str) -> Reject {
    Reject::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
}

/// An answer of the orchestrator that does not belong to the question.
pub fn unexpected(asked: &str, answer: &Answer) -> Reject {
    internal(&format!("{asked} was answered as something else: {answer:?}"))
}

/// 409: the model is in no state for what was asked.
pub fn declined(model: &ModelName, why: impl Into<String>) -> Reject {
    Reject::new(StatusCode::CONFLICT, "conflict", why).model(model)
}

/// Callers of this API administer Wharf: they see the engine's last log lines.
pub fn refused(refusal: &Refusal, model: &ModelName, api: &Api) -> Reject {
    let viewer = Viewer { sees_logs: true };
    Reject::refusal(refusal, model, &api.handle.view(), api.handle.now(), viewer)
}

/// 404 with the nearest names, and all that are known.
pub fn unknown_model(catalog: &Catalog, wanted: &str) -> Reject {
    let known = catalog.models.keys().map(ModelName::as_str);
    let aliases = catalog.aliases.keys().map(String::as_str);
    let near = nearest(wanted, known.clone().chain(aliases));
    let shown: String = wanted.chars().take(WANTED_SHOWN_MAX).collect();
    let mut message = format!("model \"{shown}\" is not configured");
    if !near.is_empty() {
        message.push_str(&format!("; did you mean {}?", near.join(" or ")));
    }
    if let Some(route) = catalog.routes.get(wanted) {
        let models = route.models.join(", ");
        message = format!("\"{shown}\" is a route, no model: name one of its models ({models})");
        return not_found("model_not_found", message).param("model").model(shown);
    }
    let listed: Vec<&str> = known.take(NAMES_MAX).collect();
    message.push_str(&format!(
        "{} known are {}",
        if near.is_empty() { ";" } else { "" },
        listed.join(", ")
    ));
    if catalog.models.len() > NAMES_MAX {
        message.push_str(&format!(" and {} more", catalog.models.len() - NAMES_MAX));
    }
    not_found("model_not_found", message).param("model")
}

pub async fn no_such_path(uri: Uri) -> Reject {
    not_found("not_found", format!("there is nothing at {}", uri.path()))
}

pub async fn method_not_allowed(method: Method, uri: Uri) -> Reject {
    Reject::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!("{} does not take {method}", uri.path()),
    )
}
