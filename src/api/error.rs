//! Errors of the control API: `{"error":{message, type, param, code}}` plus `model`, `swap_id`,
//! `cause` and `log` where they apply.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde_json::{Value, json};

use super::Api;
use crate::config::catalog::Catalog;
use crate::scheduler::action::Refusal;
use crate::units::{ModelName, SwapId};

#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    code: String,
    message: String,
    param: Option<&'static str>,
    model: Option<ModelName>,
    swap: Option<SwapId>,
    cause: Option<String>,
    extra: Vec<(&'static str, Value)>,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            code: code.to_owned(),
            message: message.into(),
            param: None,
            model: None,
            swap: None,
            cause: None,
            extra: Vec::new(),
        }
    }

    /// 400 for one part of the request.
    pub fn bad(param: &'static str, message: impl Into<String>) -> ApiError {
        let mut error = ApiError::new(StatusCode::BAD_REQUEST, "invalid_request", message);
        error.param = Some(param);
        error
    }

    pub fn not_found(code: &str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, code, message)
    }

    pub fn internal(message: &str) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    pub fn of_model(mut self, model: &ModelName) -> ApiError {
        self.model = Some(model.clone());
        self
    }

    pub fn with_swap(mut self, swap: Option<SwapId>) -> ApiError {
        self.swap = swap;
        self
    }

    pub fn with_cause(mut self, cause: Option<String>) -> ApiError {
        self.cause = cause;
        self
    }

    pub fn refused(refusal: &Refusal, model: &ModelName, _api: &Api) -> ApiError {
        let _ = refusal;
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "SEAM", "SEAM").of_model(model)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut body = json!({"error": {
            "message": self.message, "type": "SEAM", "param": self.param, "code": self.code,
        }});
        body["model"] = json!(self.model);
        (self.status, Json(body)).into_response()
    }
}

/// 404 with the names that are known, the nearest first.
pub fn unknown_model(catalog: &Catalog, wanted: &str) -> ApiError {
    let names: Vec<&ModelName> = catalog.models.keys().collect();
    let mut error = ApiError::not_found("model_not_found", format!("there is no model `{wanted}`"));
    error.extra.push(("available_models", json!(names)));
    error
}

pub async fn not_found(uri: http::Uri) -> ApiError {
    ApiError::not_found("not_found", format!("there is nothing at {}", uri.path()))
}

pub async fn method_not_allowed(method: http::Method, uri: http::Uri) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!("{} does not take {method}", uri.path()),
    )
}
