//! Every metric name in one place.

use std::time::Duration;

use crate::orchestrator::{Handle, StartKind};
use crate::scheduler::record::SwapRecord;
use crate::units::ModelName;

#[derive(Debug, Default)]
pub struct Metrics {}

impl Metrics {
    pub fn new() -> Metrics {
        Metrics {}
    }
    /// A swap ended (`outcome` is set).
    pub fn swap_ended(&self, _swap: &SwapRecord) {}
    /// A request ended. `outcome`: `ok`, `client_gone`, `upstream_error`, `cut`, or the refusal's code.
    pub fn request_ended(&self, _model: &ModelName, _outcome: &str, _took: Duration) {}
    pub fn queue_waited(&self, _model: &ModelName, _waited: Duration) {}
    pub fn first_token(&self, _model: &ModelName, _start: StartKind, _took: Duration) {}
    pub fn tokens(&self, _model: &ModelName, _kind: &str, _count: u64) {}
    pub fn refused(&self, _reason: &str) {}
    pub fn instance_restarted(&self, _model: &ModelName) {}
    /// Prometheus text; gauges are read from the handle's view at this moment.
    pub fn render(&self, _handle: &Handle) -> String {
        String::new()
    }
}
