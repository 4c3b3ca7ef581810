//! What differs between engines: arguments, readiness, load phases from logs, sleep and wake.

pub mod adapters;
mod command_line;
mod context;
mod contradict;
mod derive;
mod hub;
mod key;
mod log_lines;
mod pace;
pub mod paths;
mod probe;
mod ready;
mod release;
pub mod request;
mod sleep;
mod token;
mod weights;

use std::collections::BTreeMap;

use tokio::time::Instant;

use crate::config::catalog::ModelSpec;
use crate::runtime::{EngineKey, Given, LaunchKey, Progress, Running};
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::Bytes;

pub use context::context_length;
pub use hub::{HubModel, hub_model};
pub use pace::{sleep_finely, until_next_look};
pub use weights::weight_files;

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
pub fn contradictions(spec: &ModelSpec) -> Vec<(String, String)> {
    contradict::contradictions(spec)
}

/// Arguments and environment derived from the catalog. `footprint` is the promise per GPU and
/// `total` the smallest total of the GPUs used. What the configured arguments already say is not
/// said again.
pub fn derive(
    spec: &ModelSpec,
    port: u16,
    gpus: usize,
    footprint: Option<Bytes>,
    total: Option<Bytes>,
) -> Derived {
    derive::derive(spec, port, gpus, footprint.zip(total))
}

/// Its own command says all that adapters need.
pub fn says_lora(spec: &ModelSpec) -> bool {
    derive::says_lora(spec)
}

/// The key of an instance about to start: the one that the configuration names, or a new one if
/// the engine takes keys. `inherited`: the environment that a process gets from Wharf's own.
/// `None`: the operating system gave no randomness.
pub fn launch_key(
    spec: &ModelSpec,
    inherited: impl Fn(&str) -> Option<String>,
) -> Option<LaunchKey> {
    key::launch_key(spec, inherited)
}

/// The key of an engine that runs already, by what it was given.
pub fn running_key(spec: &ModelSpec, given: &Given) -> Option<EngineKey> {
    key::running_key(spec, given)
}

/// Waits until the engine answers by its own rule; fails on its exit, a known fatal line in its
/// log, a stall, or the deadline. Reports load phases as they appear.
pub async fn wait_ready(
    spec: &ModelSpec,
    running: &Running,
    progress: &Progress,
    deadline: Instant,
) -> Result<(), Fault> {
    ready::wait_ready(spec, running, progress, deadline).await
}

/// What a model is asked before it is called ready, where its entry says so.
pub async fn first_request(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    if spec.canary {
        return canary(spec, running).await;
    }
    if spec.warmup_request
        && let Err(fault) = canary(spec, running).await
    {
        if fault.kind == FaultKind::Exited {
            return Err(fault);
        }
        tracing::warn!(model = %spec.name, "warm-up request: {}", fault.message);
    }
    Ok(())
}

/// Asks for one token (for one vector, of an embedding model). Ends at the latest after two
/// minutes.
pub async fn canary(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    token::canary(spec, running).await
}

/// Whether the engine says that it sleeps: its health is 200 all the same, and requests hang.
pub async fn is_asleep(running: &Running) -> bool {
    sleep::is_asleep(running).await
}

/// Puts a vLLM engine to sleep at the configured level, and returns once it says that it sleeps.
/// What is in flight is aborted.
pub async fn sleep(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    sleep::sleep(spec, running).await
}

/// Wakes it again, and returns once it says that it is awake.
pub async fn wake(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    sleep::wake(spec, running).await
}

/// Asks a server that is no LLM's to let go of its memory, where its configuration says how.
/// Five seconds at most; a failure is logged and changes nothing.
pub async fn release(spec: &ModelSpec, running: &Running) {
    release::release(spec, running).await;
}

/// Lines of the engine's log that go with a fault.
const LOG_TAIL_LINES: usize = 20;

fn fault(
    spec: &ModelSpec,
    running: &Running,
    kind: crate::scheduler::event::FaultKind,
    text: &str,
) -> Fault {
    Fault::new(kind, format!("model {}: {text}", spec.name))
        .with_log(running.log.last(LOG_TAIL_LINES))
}

/// How the instance ended, once it did; waits for ever for one whose end cannot be seen.
async fn ended(running: &Running) -> crate::runtime::ExitReport {
    let mut exit = running.exit.clone();
    let report = exit.wait_for(Option::is_some).await.ok().and_then(|report| report.clone());
    match report {
        Some(report) => report,
        None => std::future::pending().await,
    }
}
