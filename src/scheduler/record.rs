//! One row of the swap ledger, and the scheduler's own view of the world for `/status`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::event::Fault;
use crate::units::{Bytes, GpuId, InstanceId, ModelName, RequestId, SwapId, Time};

/// Phases of a swap, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Preflight,
    Fetch,
    Drain,
    Vacate,
    Prove,
    Start,
    Vouch,
}

impl Phase {
    pub const ALL: [Phase; 7] = [
        Phase::Preflight,
        Phase::Fetch,
        Phase::Drain,
        Phase::Vacate,
        Phase::Prove,
        Phase::Start,
        Phase::Vouch,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Preflight => "preflight",
            Phase::Fetch => "fetch",
            Phase::Drain => "drain",
            Phase::Vacate => "vacate",
            Phase::Prove => "prove",
            Phase::Start => "start",
            Phase::Vouch => "vouch",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwapRecord {
    pub id: SwapId,
    pub model: ModelName,
    pub kind: SwapKind,
    pub cause: SwapCause,
    /// The decision in words: why now, and why these victims.
    pub decision: String,
    pub instance: Option<InstanceId>,
    pub gpus: Vec<GpuId>,
    pub evicted: Vec<Eviction>,
    pub began: Time,
    pub ended: Option<Time>,
    /// Finished phases and how long each took.
    pub phases: Vec<(Phase, Duration)>,
    /// The phase under way and when it began; `None` once ended.
    pub phase: Option<(Phase, Time)>,
    pub outcome: Option<SwapOutcome>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SwapKind {
    /// Makes a model ready.
    Load,
    /// Takes one away without another in its place.
    Unload,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwapCause {
    Request,
    Ensure,
    Load,
    Warmup,
    Restore,
    /// Another member of its group was loaded.
    Group,
    Unload,
    Ttl,
    /// A keep window is open: loaded before anybody asks.
    Keep,
    /// Put to sleep by an operator.
    Sleep,
    Reload,
    /// Its memory was wanted by another.
    Evict,
    /// It ended by itself; what it left behind is cleared up.
    Died,
    /// A second instance of one model, or one whose first stop failed.
    Cleanup,
}

impl SwapCause {
    pub const fn as_str(self) -> &'static str {
        match self {
            SwapCause::Request => "request",
            SwapCause::Ensure => "ensure",
            SwapCause::Load => "load",
            SwapCause::Warmup => "warmup",
            SwapCause::Restore => "restore",
            SwapCause::Group => "group",
            SwapCause::Unload => "unload",
            SwapCause::Ttl => "ttl",
            SwapCause::Keep => "keep",
            SwapCause::Sleep => "sleep",
            SwapCause::Reload => "reload",
            SwapCause::Evict => "evict",
            SwapCause::Died => "died",
            SwapCause::Cleanup => "cleanup",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eviction {
    pub model: ModelName,
    pub instance: InstanceId,
    /// "idle 41 s, cheapest to bring back, frees 18.0 GiB"
    pub why: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SwapOutcome {
    Ready,
    Unloaded,
    /// Put to sleep as asked for; what it does not keep is proven free.
    Asleep,
    /// It had ended by itself; its memory is proven free.
    Died(Fault),
    Failed(Fault),
    Cancelled {
        why: String,
    },
}

impl SwapOutcome {
    /// What went wrong, if something did.
    pub const fn fault(&self) -> Option<&Fault> {
        match self {
            SwapOutcome::Failed(fault) | SwapOutcome::Died(fault) => Some(fault),
            SwapOutcome::Ready
            | SwapOutcome::Unloaded
            | SwapOutcome::Asleep
            | SwapOutcome::Cancelled { .. } => None,
        }
    }

    /// Value of the `result` label.
    pub const fn as_str(&self) -> &'static str {
        match self {
            SwapOutcome::Ready => "ready",
            SwapOutcome::Unloaded => "unloaded",
            SwapOutcome::Asleep => "asleep",
            SwapOutcome::Died(_) => "died",
            SwapOutcome::Failed(_) => "failed",
            SwapOutcome::Cancelled { .. } => "cancelled",
        }
    }
}

/// Where a model is. Older tools' words are renderings of this in the API layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum ResidencyView {
    Stopped,
    Starting { phase: Phase },
    Ready,
    Draining,
    Stopping,
    FallingAsleep,
    Sleeping { level: u8 },
    Waking,
    Failed { retry_at: Time, fault: Fault },
    Lost,
}

impl ResidencyView {
    /// Value of the `state` label of `orchestrator_model_state`.
    pub const fn as_str(&self) -> &'static str {
        match self {
            ResidencyView::Stopped => "stopped",
            ResidencyView::Starting { .. } => "starting",
            ResidencyView::Ready => "ready",
            ResidencyView::Draining => "draining",
            ResidencyView::Stopping => "stopping",
            ResidencyView::FallingAsleep => "falling_asleep",
            ResidencyView::Sleeping { .. } => "sleeping",
            ResidencyView::Waking => "waking",
            ResidencyView::Failed { .. } => "failed",
            ResidencyView::Lost => "lost",
        }
    }
}

/// The scheduler's state, as others may see it. Advisory: it may be a few milliseconds old.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SchedulerView {
    pub models: Vec<ModelView>,
    pub gpus: Vec<GpuView>,
    #[serde(default)]
    pub ram: RamView,
    /// Swaps under way, oldest first.
    pub swaps: Vec<SwapRecord>,
    pub queued: u32,
    /// Set while nothing may start: the GPUs cannot be read.
    pub no_proof: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelView {
    pub name: ModelName,
    pub residency: ResidencyView,
    pub instance: Option<InstanceId>,
    pub gpus: Vec<GpuId>,
    /// When the residency was entered.
    pub since: Time,
    /// Declared or learned bytes per GPU.
    pub footprint: Option<Bytes>,
    pub swap: Option<SwapId>,
    /// Waiting requests in the order in which they will be granted.
    pub queue: Vec<RequestId>,
    pub oldest: Option<Time>,
    /// How long until this model is ready, as learned moves estimate it (0 when ready).
    pub ready_in: Option<Duration>,
    /// Why it still waits, in words; empty when nothing waits.
    pub waiting_for: String,
    /// Never evicted: as an operator wants it, else as configured.
    #[serde(default)]
    pub pinned: bool,
    /// One of its keep windows is open.
    #[serde(default)]
    pub kept: bool,
    /// A ttl runs for its instance: it counts from the last activity, which its gate knows best.
    #[serde(default)]
    pub ttl_runs: bool,
    /// The ttl does not end before this: it was extended.
    #[serde(default)]
    pub ttl_until: Option<Time>,
}

/// Host RAM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RamView {
    /// Declared, else what the kernel says; `None`: unknown, no limit.
    pub total: Option<Bytes>,
    /// As last sampled.
    pub available: Option<Bytes>,
    pub promised: Bytes,
    pub promised_to: Vec<ModelName>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuView {
    pub gpu: GpuId,
    pub total: Bytes,
    pub promised: Bytes,
    /// Free bytes of the last sample.
    pub free: Option<Bytes>,
}
