//! What is counted about one request, whatever way it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::HeaderValue;

use super::limits::Permit;
use super::usage::Tokens;
use crate::orchestrator::StartKind;
use crate::telemetry::metrics::Metrics;
use crate::units::ModelName;

/// Reports the request's end exactly once: a client that leaves drops this unended.
#[derive(Debug)]
pub struct Account {
    metrics: Arc<Metrics>,
    model: ModelName,
    /// As in `X-Request-Id`.
    request: String,
    began: Instant,
    outcome: &'static str,
    /// Set while the first byte of the answer is awaited.
    first: Option<StartKind>,
    /// The share of its key's limits, to the end of the answer.
    permit: Permit,
}

impl Account {
    pub fn open(metrics: Arc<Metrics>, model: ModelName, request: String) -> Account {
        tracing::debug!(%request, %model, "request arrived");
        let began = Instant::now();
        Account {
            metrics,
            model,
            request,
            began,
            outcome: "client_gone",
            first: None,
            permit: Permit::default(),
        }
    }

    pub fn hold(&mut self, permit: Permit) {
        self.permit = permit;
    }

    pub fn model(&self) -> &ModelName {
        &self.model
    }

    pub fn granted(&mut self, start: StartKind, waited: Duration) {
        self.first = Some(start);
        self.metrics.queue_waited(&self.model, waited);
    }

    pub fn first_byte(&mut self) {
        if let Some(start) = self.first.take() {
            self.metrics.first_token(&self.model, start, self.began.elapsed());
        }
    }

    pub fn tokens(&self, tokens: Tokens) {
        self.metrics.tokens(&self.model, "prompt", tokens.prompt);
        self.metrics.tokens(&self.model, "completion", tokens.completion);
    }

    pub fn end(&mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

/// A request that never came as far as an account.
pub fn turned_away(request: &HeaderValue, code: &str) {
    tracing::debug!(request = request.to_str().unwrap_or_default(), code, "request refused");
}

impl Drop for Account {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        tracing::debug!(
            request = self.request.as_str(),
            model = %self.model,
            outcome = self.outcome,
            seconds = took.as_secs_f64(),
            "request ended"
        );
        self.metrics.request_ended(&self.model, self.outcome, took);
    }
}
