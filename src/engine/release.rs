//! The call before the stop: such as ComfyUI's `POST /free`.

use std::time::Duration;

use http::Method;
use serde_json::Value;

use super::request;
use crate::config::catalog::ModelSpec;
use crate::runtime::Running;

const RELEASE_LIMIT: Duration = Duration::from_secs(5);

pub async fn release(spec: &ModelSpec, running: &Running) {
    let Some(service) = &spec.http else { return };
    let Some(call) = &service.release else { return };
    let method = call.method.clone().unwrap_or(Method::POST);
    let body: Option<Value> =
        service.release_body.as_deref().and_then(|body| serde_json::from_str(body).ok());
    let answer =
        request::send(&running.endpoint, method, &call.path, body.as_ref(), RELEASE_LIMIT).await;
    let model = &spec.name;
    match answer {
        Ok(answer) if answer.status.is_success() => {
            tracing::debug!(%model, path = call.path, "released its memory before the stop");
        }
        Ok(answer) => {
            tracing::warn!(%model, path = call.path, "release: it answered {}", answer.excerpt());
        }
        Err(error) => tracing::warn!(%model, path = call.path, "release: {error}"),
    }
}
