//! What differs between engines: arguments, readiness, load phases from logs, sleep and wake.

use std::collections::BTreeMap;

use tokio::time::Instant;

use crate::config::catalog::ModelSpec;
use crate::runtime::{Progress, Running};
use crate::scheduler::event::Fault;
use crate::units::Bytes;

/// What Wharf adds to the configured command of an engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Derived {
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// Port on which the engine listens inside a container.
    pub container_port: u16,
}

/// Contradictions between a model's own arguments and what Wharf derives, for `wharf check`:
/// (argument, what is wrong and the fix).
pub fn contradictions(_spec: &ModelSpec) -> Vec<(String, String)> {
    Vec::new()
}

/// Arguments and environment derived from the catalog. `footprint` is the promise per GPU and
/// `total` the smallest total of the GPUs used.
pub fn derive(
    _spec: &ModelSpec,
    _port: u16,
    _gpus: usize,
    _footprint: Option<Bytes>,
    _total: Option<Bytes>,
) -> Derived {
    Derived::default()
}

/// Waits until the engine answers by its own rule; fails on its exit, a known fatal line in its
/// log, a stall, or the deadline. Reports load phases as they appear.
pub async fn wait_ready(
    _spec: &ModelSpec,
    _running: &Running,
    _progress: &Progress,
    _deadline: Instant,
) -> Result<(), Fault> {
    Ok(())
}

/// Asks for one token.
pub async fn canary(_spec: &ModelSpec, _running: &Running) -> Result<(), Fault> {
    Ok(())
}

pub async fn sleep(_spec: &ModelSpec, _running: &Running) -> Result<(), Fault> {
    Ok(())
}

pub async fn wake(_spec: &ModelSpec, _running: &Running) -> Result<(), Fault> {
    Ok(())
}
