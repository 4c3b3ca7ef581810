//! Recorded traffic against the real scheduler, on a virtual clock (`wharf replay`).

pub mod bound;
pub mod figures;
pub mod generate;
pub mod plot;
pub mod read;
pub mod sessions;
pub mod setup;
mod world;

use std::time::Duration;

use crate::scheduler::Policy;
use crate::units::{Bytes, GpuId, ModelName, Time};
use sessions::Agent;
use setup::Setup;
use world::World;
pub use world::WorldFault;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    pub at: Time,
    pub model: ModelName,
    /// How long it holds its place on a ready engine.
    pub service: Duration,
}

/// What became of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visit {
    pub model: ModelName,
    pub arrived: Time,
    /// Start of service; `None`: refused, or the trace ended first.
    pub began: Option<Time>,
    pub ended: Option<Time>,
    /// Why it was refused, in words.
    pub refused: Option<String>,
}

/// One model on its GPUs, from the decision to start it until its memory was free again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    pub model: ModelName,
    pub gpus: Vec<GpuId>,
    pub bytes: Bytes,
    pub began: Time,
    /// Ready to serve; `None`: it never was.
    pub ready: Option<Time>,
    /// No request was granted any more.
    pub left: Option<Time>,
    pub ended: Time,
}

/// One policy's way through a trace.
#[derive(Clone, Debug, Default)]
pub struct Run {
    pub policy: String,
    pub visits: Vec<Visit>,
    pub stays: Vec<Stay>,
    pub ended: Time,
}

/// One policy's way through a trace.
pub fn run(setup: &Setup, policy: Policy, arrivals: &[Arrival]) -> Result<Run, WorldFault> {
    World::new(setup, policy).with_trace(arrivals).run()
}

/// One policy's way with callers that wait for each answer.
pub fn run_sessions(setup: &Setup, policy: Policy, agents: Vec<Agent>) -> Result<Run, WorldFault> {
    World::new(setup, policy).with_agents(agents).run()
}
