//! The one place that turns a refusal or a bad request into HTTP.
//!
//! The body is what OpenAI clients expect, `{"error":{"message","type","param","code"}}`, and
//! beside it `model`, `swap_id` and `cause` where they apply. A message names the thing and the fix.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::orchestrator::View;
use crate::scheduler::action::Refusal;
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::{ModelName, SwapId, Time};

/// Advice where nothing was learned yet.
const RETRY_UNKNOWN: Duration = Duration::from_secs(5);
const RETRY_MAX: Duration = Duration::from_secs(600);

/// "Client closed request": no answer was, or shall be, given.
pub const CLIENT_CLOSED: u16 = 499;

/// Why a request gets an error. Boxed: it travels in the `Err` of most of the gateway.
#[derive(Debug)]
pub struct Reject(Box<Problem>);

#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    pub status: StatusCode,
    /// Closed set: it is also a metric label.
    pub code: &'static str,
    pub message: String,
    pub param: Option<&'static str>,
    pub model: Option<String>,
    pub swap: Option<SwapId>,
    pub cause: Option<Value>,
    pub retry_after: Option<Duration>,
    /// The same request can never succeed: tells SDKs not to retry a 5xx.
    pub hopeless: bool,
}

/// How much of a failure the client may see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Viewer {
    /// Engine log lines and arguments: local callers without keys, and keys with `read` or
    /// `admin`. Others see the cause, and the line of a log from which it is known.
    pub sees_logs: bool,
}

impl Viewer {
    fn told(self, fault: &Fault) -> &str {
        if self.sees_logs { &fault.message } else { fault.public_message() }
    }
}

impl Reject {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Reject {
        let retry_after = matches!(status.as_u16(), 429 | 503).then_some(RETRY_UNKNOWN);
        Reject(Box::new(Problem {
            status,
            code,
            message: message.into(),
            param: None,
            model: None,
            swap: None,
            cause: None,
            retry_after,
            hopeless: false,
        }))
    }

    /// An operator ended it. A 4xx, so that SDKs do not send it again by themselves.
    pub fn cancelled(model: &ModelName) -> Reject {
        let status = StatusCode::from_u16(CLIENT_CLOSED).unwrap_or(StatusCode::BAD_REQUEST);
        let message = format!("the request to model \"{model}\" was cancelled by an operator");
        Reject::new(status, "cancelled", message).model(model)
    }

    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Reject {
        Reject::new(StatusCode::BAD_REQUEST, code, message)
    }

    #[must_use]
    pub fn param(mut self, param: &'static str) -> Reject {
        self.0.param = Some(param);
        self
    }

    #[must_use]
    pub fn model(mut self, model: impl ToString) -> Reject {
        self.0.model = Some(model.to_string());
        self
    }

    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Reject {
        self.0.retry_after = Some(after);
        self
    }

    #[must_use]
    pub fn swap(mut self, swap: Option<SwapId>) -> Reject {
        self.0.swap = swap;
        self
    }

    /// In other words, where the usual ones do not fit.
    #[must_use]
    pub fn saying(mut self, message: impl Into<String>) -> Reject {
        self.0.message = message.into();
        self
    }

    /// Why, in words, where there is no fault to tell.
    #[must_use]
    pub fn because(mut self, why: &str) -> Reject {
        self.0.cause = Some(json!({ "message": why }));
        self
    }

    fn cause(mut self, fault: &Fault, viewer: Viewer) -> Reject {
        let mut cause = json!({ "kind": fault.kind, "message": viewer.told(fault) });
        if viewer.sees_logs && !fault.log_tail.is_empty() {
            cause["log"] = json!(fault.log_tail);
        }
        self.0.cause = Some(cause);
        self
    }

    /// To send it again would end alike.
    #[must_use]
    pub fn hopeless(mut self) -> Reject {
        self.0.hopeless = true;
        self
    }

    pub fn problem(&self) -> &Problem {
        &self.0
    }

    pub fn code(&self) -> &'static str {
        self.0.code
    }

    /// What the scheduler's refusal means to a client.
    pub fn refusal(
        refusal: &Refusal,
        model: &ModelName,
        view: &View,
        now: Time,
        viewer: Viewer,
    ) -> Reject {
        let status = status_of(refusal);
        let reject = Reject::new(status, code_of(refusal), message_of(refusal, model, now, viewer));
        let estimate = view.model(model).and_then(|model| model.ready_in).unwrap_or(RETRY_UNKNOWN);
        let reject =
            match refusal {
                Refusal::StartFailed { swap, fault, retry_at } => {
                    reject.swap(*swap).cause(fault, viewer).retry_after(retry_at.since(now))
                }
                Refusal::VramNeverFreed { swap, fault, retry_at } => {
                    reject.swap(Some(*swap)).cause(fault, viewer).retry_after(retry_at.since(now))
                }
                Refusal::Overloaded { expected_ms, timeout_ms } => reject
                    .retry_after(Duration::from_millis(expected_ms.saturating_sub(*timeout_ms))),
                Refusal::CannotFit { .. } | Refusal::KeptApart { .. } => reject.hopeless(),
                Refusal::NotLoaded
                | Refusal::QueueFull { .. }
                | Refusal::QueueTimeout { .. }
                | Refusal::Unloaded
                | Refusal::InstanceLost { .. } => reject.retry_after(estimate),
                Refusal::UnknownModel | Refusal::Removed => reject.param("model"),
                Refusal::RuntimeLost { message } => reject
                    .cause(&Fault::new(FaultKind::RuntimeUnreachable, message.as_str()), viewer),
                Refusal::NoVramProof { .. } | Refusal::ShuttingDown => reject,
            };
        reject.model(model)
    }

    pub fn body(&self) -> Value {
        let problem = &*self.0;
        let mut body = json!({ "error": {
            "message": problem.message,
            "type": type_of(problem.status),
            "param": problem.param,
            "code": problem.code,
        }});
        if let Some(model) = &problem.model {
            body["model"] = json!(model);
        }
        if let Some(swap) = problem.swap {
            body["swap_id"] = json!(swap.to_string());
        }
        if let Some(cause) = &problem.cause {
            body["cause"] = cause.clone();
        }
        body
    }

    /// For a stream whose head was already sent: both OpenAI SDKs raise it.
    pub fn event(&self) -> Bytes {
        Bytes::from(format!("data: {}\n\n", self.body()))
    }
}

impl IntoResponse for Reject {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.body().to_string()));
        *response.status_mut() = self.0.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(after) = self.0.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(retry_seconds(after)));
        }
        if self.0.hopeless {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.0.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Whole seconds, never zero: "at once" would make a busy loop of an obedient client.
fn retry_seconds(after: Duration) -> u64 {
    after.min(RETRY_MAX).as_millis().div_ceil(1000).max(1).try_into().unwrap_or(1)
}

fn type_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    }
}

/// Every value of [`code_of`], so that its metric can begin at 0.
pub const REFUSAL_CODES: [&str; 14] = [
    "model_not_found",
    "model_not_loaded",
    "queue_full",
    "overloaded",
    "queue_timeout",
    "cannot_fit",
    "kept_apart",
    "start_failed",
    "vram_not_freed",
    "no_vram_proof",
    "runtime_lost",
    "model_unloaded",
    "instance_lost",
    "shutting_down",
];

/// The refusal's name in answers and in metric labels.
pub fn code_of(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::UnknownModel | Refusal::Removed => "model_not_found",
        Refusal::NotLoaded => "model_not_loaded",
        Refusal::QueueFull { .. } => "queue_full",
        Refusal::Overloaded { .. } => "overloaded",
        Refusal::QueueTimeout { .. } => "queue_timeout",
        Refusal::CannotFit { .. } => "cannot_fit",
        Refusal::KeptApart { .. } => "kept_apart",
        Refusal::StartFailed { .. } => "start_failed",
        Refusal::VramNeverFreed { .. } => "vram_not_freed",
        Refusal::NoVramProof { .. } => "no_vram_proof",
        Refusal::RuntimeLost { .. } => "runtime_lost",
        Refusal::Unloaded => "model_unloaded",
        Refusal::InstanceLost { .. } => "instance_lost",
        Refusal::ShuttingDown => "shutting_down",
    }
}

fn status_of(refusal: &Refusal) -> StatusCode {
    match refusal {
        Refusal::UnknownModel | Refusal::Removed => StatusCode::NOT_FOUND,
        Refusal::QueueFull { .. } => StatusCode::TOO_MANY_REQUESTS,
        Refusal::QueueTimeout { .. } => StatusCode::GATEWAY_TIMEOUT,
        // Not 503: that promises that waiting helps.
        Refusal::CannotFit { .. } => StatusCode::INSUFFICIENT_STORAGE,
        Refusal::KeptApart { .. } => StatusCode::CONFLICT,
        Refusal::NotLoaded
        | Refusal::Overloaded { .. }
        | Refusal::StartFailed { .. }
        | Refusal::VramNeverFreed { .. }
        | Refusal::NoVramProof { .. }
        | Refusal::RuntimeLost { .. }
        | Refusal::Unloaded
        | Refusal::InstanceLost { .. }
        | Refusal::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// `: speech, coder`, after "pinned models".
fn named(models: &[ModelName]) -> String {
    let names: Vec<&str> = models.iter().map(ModelName::as_str).collect();
    if names.is_empty() { String::new() } else { format!(": {}", names.join(", ")) }
}

fn message_of(refusal: &Refusal, model: &ModelName, now: Time, viewer: Viewer) -> String {
    let next = |at: &Time| retry_seconds(at.since(now));
    match refusal {
        Refusal::UnknownModel => format!("model \"{model}\" is not configured"),
        Refusal::Removed => {
            format!("model \"{model}\" was removed from models.yaml while the request waited")
        }
        Refusal::NotLoaded => format!(
            "model \"{model}\" is not loaded, and the request forbids to start it \
             (X-Wharf-Start: never); send it without that header to load the model"
        ),
        Refusal::QueueFull { limit, per_model: true } => format!(
            "{limit} requests already wait for model \"{model}\" (queue.per_model); \
             send again later or raise the limit"
        ),
        Refusal::QueueFull { limit, per_model: false } => format!(
            "{limit} requests already wait for models (queue.limit); \
             send again later or raise the limit"
        ),
        Refusal::Overloaded { expected_ms, timeout_ms } => format!(
            "model \"{model}\" has about {} s of work ahead of this request, which may wait {} s \
             (queue.timeout); send again later, or raise its `concurrency` or the limit",
            expected_ms / 1000,
            timeout_ms / 1000
        ),
        Refusal::QueueTimeout { waited_ms, waiting_for } => format!(
            "waited {:.0} s for model \"{model}\" (queue.timeout): {}",
            *waited_ms as f64 / 1000.0,
            if waiting_for.is_empty() { "its turn did not come" } else { waiting_for },
        ),
        Refusal::CannotFit { need, available, host: true, pinned, .. } => format!(
            "model \"{model}\" needs {need} of host RAM, but at most {available} can ever be free \
             there (total less reserve and pinned models{}); give it a smaller `ram`, add memory, \
             or unpin a model",
            named(pinned)
        ),
        Refusal::CannotFit { need, available, pinned, .. } if need <= available => format!(
            "model \"{model}\" has no place: pinned models{} hold as many as may run at once; \
             unpin one, or raise `max_concurrent_models`",
            named(pinned)
        ),
        Refusal::CannotFit { need, available, gpus, host: false, pinned } => format!(
            "model \"{model}\" needs {need} on each of {gpus} GPU(s), but at most {available} can \
             ever be free there (total less reserve and pinned models{}); give it more GPUs, a \
             smaller `vram`, or unpin a model",
            named(pinned)
        ),
        Refusal::KeptApart { group, by } => format!(
            "model \"{model}\" may not be loaded beside \"{by}\", which does not leave: group \
             \"{group}\" keeps them apart; unload or unpin \"{by}\", or change the group"
        ),
        Refusal::StartFailed { fault, retry_at, .. } => format!(
            "model \"{model}\" could not be started: {}; next attempt in {} s",
            viewer.told(fault),
            next(retry_at)
        ),
        Refusal::VramNeverFreed { fault, retry_at, .. } => format!(
            "model \"{model}\" was not started because memory did not come back: {}; \
             next attempt in {} s",
            viewer.told(fault),
            next(retry_at)
        ),
        Refusal::NoVramProof { message } => {
            format!("model \"{model}\" is not started while GPU memory cannot be read: {message}")
        }
        Refusal::RuntimeLost { message } => {
            format!("the runtime of model \"{model}\" does not answer: {message}")
        }
        Refusal::Unloaded => {
            format!("model \"{model}\" was unloaded by an operator while the request waited")
        }
        Refusal::InstanceLost { message } => {
            format!("the instance of model \"{model}\" went away under the request: {message}")
        }
        Refusal::ShuttingDown => "Wharf is shutting down; send the request again later".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reject(refusal: Refusal, sees_logs: bool) -> Reject {
        let view = View::default();
        Reject::refusal(&refusal, &"mistral".into(), &view, Time(1000), Viewer { sees_logs })
    }

    fn failed() -> Refusal {
        let fault = Fault::new(FaultKind::OutOfMemory, "CUDA out of memory")
            .with_log(vec!["secret argument".into()]);
        Refusal::StartFailed { swap: Some(SwapId(7)), fault, retry_at: Time(11_500) }
    }

    #[test]
    fn a_failed_start_names_swap_cause_and_next_attempt() {
        let reject = reject(failed(), false);
        let body = reject.body();
        assert_eq!(body["swap_id"], "s7");
        assert_eq!(body["model"], "mistral");
        assert_eq!(body["cause"]["kind"], "out_of_memory");
        assert_eq!(body["error"]["type"], "server_error");
        assert!(body["error"]["message"].as_str().unwrap().contains("next attempt in 11 s"));
        let response = reject.into_response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "11");
    }

    #[test]
    fn log_lines_only_for_those_who_may_read_them() {
        assert!(!reject(failed(), false).body().to_string().contains("secret"));
        assert!(reject(failed(), true).body().to_string().contains("secret"));
    }

    #[test]
    fn a_message_that_quotes_the_log_is_for_those_who_may_read_it() {
        let fault = Fault::new(FaultKind::Exited, "it ended; its last line: `tell-tale`")
            .or_publicly("it ended");
        let refusal =
            || Refusal::StartFailed { swap: None, fault: fault.clone(), retry_at: Time(2000) };
        let (others, readers) = (reject(refusal(), false).body(), reject(refusal(), true).body());
        assert!(!others.to_string().contains("tell-tale"), "{others:#}");
        assert!(others["error"]["message"].as_str().unwrap().contains("it ended"));
        assert_eq!(others["cause"]["message"], "it ended");
        assert!(readers["error"]["message"].as_str().unwrap().contains("tell-tale"));
        assert!(readers["cause"]["message"].as_str().unwrap().contains("tell-tale"));
    }

    #[test]
    fn what_never_fits_is_not_to_be_retried() {
        use crate::units::Bytes;
        let refusal = Refusal::CannotFit {
            need: Bytes::gib(30),
            available: Bytes::gib(22),
            gpus: 1,
            host: false,
            pinned: vec![ModelName::new("speech")],
        };
        let reject = reject(refusal, false);
        assert!(reject.problem().message.contains("pinned models: speech"), "{reject:?}");
        let response = reject.into_response();
        assert_eq!(response.status(), 507);
        assert!(!response.headers().contains_key("retry-after"));
        assert_eq!(response.headers()["x-should-retry"], "false");
    }

    #[test]
    fn who_comes_too_late_is_told_when_there_is_a_place_again() {
        let reject = reject(Refusal::Overloaded { expected_ms: 95_000, timeout_ms: 60_000 }, false);
        assert!(reject.problem().message.contains("95 s of work"), "{reject:?}");
        let response = reject.into_response();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["retry-after"]),
            (503, &HeaderValue::from(35))
        );
    }

    #[test]
    fn a_lost_runtime_says_which_kind_of_cause_it_is() {
        let body = reject(Refusal::RuntimeLost { message: "no daemon".into() }, false).body();
        assert_eq!(body["cause"]["kind"], "runtime_unreachable");
        assert_eq!(body["cause"]["message"], "no daemon");
    }

    #[test]
    fn every_429_and_503_says_when_to_come_back() {
        for refusal in [
            Refusal::NotLoaded,
            Refusal::QueueFull { limit: 1, per_model: true },
            Refusal::Overloaded { expected_ms: 90_000, timeout_ms: 60_000 },
            Refusal::NoVramProof { message: "driver".into() },
            Refusal::RuntimeLost { message: "docker".into() },
            Refusal::Unloaded,
            Refusal::InstanceLost { message: "died".into() },
            Refusal::ShuttingDown,
        ] {
            let response = reject(refusal.clone(), false).into_response();
            assert!(response.headers().contains_key("retry-after"), "{refusal:?}");
            assert!(REFUSAL_CODES.contains(&code_of(&refusal)), "{refusal:?}");
        }
    }
}
