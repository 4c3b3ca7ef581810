//! Where a model is, and the instance that makes it so.
//!
//! ```text
//!            decided                  vouched for
//!  Stopped ───────────▶ Starting{phase} ───────▶ Ready ◀──────────────────────┐
//!   ▲  ▲                   │ failed or            │ ▲                          │ woken
//!   │  │                   │ cancelled    chosen  │ │ rescued before           │
//!   │  │                   │              to leave│ │ any stop or sleep      Waking
//!   │  │ retry_at          ▼                      ▼ │ was emitted              ▲
//!   │ Failed ◀────────  Stopping ◀────────────  Draining ──▶ FallingAsleep     │ wanted
//!   │                      │  ▲                                  │             │
//!   │ release proven       │  │        room wanted               ▼             │
//!   └──────────────────────┘  └───────────────────────────── Sleeping{level} ──┘
//!
//!  Ready, Draining, Sleeping ──▶ Lost (runtime unreachable) ──▶ Ready, Sleeping, Stopping
//! ```
//! `Stopping` lasts until the release of the memory is proven, not until the process has gone:
//! only then is the model `Stopped` and its promise given back. `Failed` belongs to the model
//! between two instances (see [`Failure`](super::queue::Failure)).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::event::{Fault, GateCount};
use super::record::Phase;
use crate::config::catalog::{EngineKind, ModelSpec};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, SwapId, Time};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Residency {
    Starting {
        phase: Phase,
    },
    Ready,
    Draining,
    Stopping,
    FallingAsleep,
    Sleeping {
        level: u8,
    },
    Waking,
    /// `asleep`: what to return to when the runtime answers again.
    Lost {
        asleep: bool,
    },
}

impl Residency {
    /// The edges of the diagram above.
    pub fn may_become(self, next: Residency) -> bool {
        match self {
            Residency::Starting { .. } => {
                matches!(next, Residency::Starting { .. } | Residency::Ready | Residency::Stopping)
            }
            Residency::Ready => {
                matches!(next, Residency::Draining | Residency::Stopping | Residency::Lost { .. })
            }
            Residency::Draining => matches!(
                next,
                Residency::Ready
                    | Residency::Stopping
                    | Residency::FallingAsleep
                    | Residency::Lost { .. }
            ),
            Residency::Stopping => false,
            Residency::FallingAsleep => {
                matches!(next, Residency::Sleeping { .. } | Residency::Stopping)
            }
            Residency::Sleeping { .. } => {
                matches!(next, Residency::Waking | Residency::Stopping | Residency::Lost { .. })
            }
            Residency::Waking => matches!(next, Residency::Ready | Residency::Stopping),
            Residency::Lost { .. } => {
                matches!(next, Residency::Ready | Residency::Sleeping { .. } | Residency::Stopping)
            }
        }
    }
}

/// An effect under way on an instance; at most one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub kind: MoveKind,
    pub swap: SwapId,
    pub since: Time,
    /// When the scheduler stops believing that its completion will come.
    pub deadline: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MoveKind {
    Preflight,
    Fetch,
    Start,
    Stop,
    Sleep,
    Wake,
}

impl MoveKind {
    /// Changes what the GPU holds (so it may not happen beside a profiling vLLM).
    pub fn touches_memory(self) -> bool {
        match self {
            MoveKind::Preflight | MoveKind::Fetch => false,
            MoveKind::Start | MoveKind::Stop | MoveKind::Sleep | MoveKind::Wake => true,
        }
    }
}

/// What we know of the instance's gate. Counts are advisory until it is closed and confirmed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GateState {
    pub open: bool,
    /// As it was opened with.
    pub permits: u32,
    /// A `CloseGate` was emitted and its `GateSeen` has not come yet.
    pub unconfirmed: bool,
    pub watched: bool,
    pub count: GateCount,
    /// When `count` was told last, or changed by a grant.
    pub counted_at: Time,
}

/// An instance on its way out, while requests may still run on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drain {
    pub swap: SwapId,
    pub deadline: Time,
    /// It leaves although it is busy. Without notice, one lease seen at closing calls it off.
    pub notice: bool,
    pub cancelled_at: Option<Time>,
}

/// Memory that should come back: the process is gone, or the engine sleeps.
#[derive(Clone, Debug)]
pub(super) struct Release {
    pub since: Time,
    /// Stays promised: the residue of a sleeper, else nothing.
    pub keep: Bytes,
    /// `keep` is a guess: what the driver lists once it has settled is the residue.
    pub keep_guessed: bool,
    /// Free bytes before it began, per GPU.
    pub free_before: BTreeMap<GpuId, Bytes>,
    /// For the learned duration.
    pub began: Time,
}

/// A ready model asked for by `ensure` stays until its first request ended, or this time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    pub until: Time,
    /// Leases that had ended when the hold began.
    pub ended_before: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Instance {
    pub id: InstanceId,
    pub model: ModelName,
    /// As it is configured now, or, if a reload changed what shapes the engine, as it was started.
    pub spec: Arc<ModelSpec>,
    pub gpus: Vec<GpuId>,
    /// Bytes promised on each of `gpus`; `None` until the start is emitted.
    pub promise: Option<Bytes>,
    /// Bytes kept while asleep.
    pub residue: Bytes,
    /// Bytes of host RAM promised to it beside `weights`, from its start to its end.
    pub ram_own: Bytes,
    /// Bytes in host RAM because it sleeps at level 1.
    pub weights: Bytes,
    /// It has slept: what it keeps in host RAM since says little about its next start.
    pub slept: bool,
    pub residency: Residency,
    pub since: Time,
    pub moving: Option<Move>,
    /// A stop that waits until the GPUs may be touched.
    pub stop_wanted: Option<SwapId>,
    pub release: Option<Release>,
    /// Why it can neither be stopped nor its memory be had back. Its promise stays.
    pub trouble: Option<Fault>,
    /// The swap that stopped it last.
    pub stopped_by: Option<SwapId>,
    pub stop_retry: Option<Time>,
    pub stop_tries: u32,
    pub gate: GateState,
    pub ready_at: Time,
    /// Its start was emitted (or it was found running).
    pub launched: bool,
    /// Started or woken and not vouched for yet: its promise may not show in samples.
    pub unvouched: bool,
    /// Bytes per GPU that it takes again when it wakes.
    pub awake: Bytes,
    /// It was ready once.
    pub served: bool,
    pub drain: Option<Drain>,
    pub hold: Option<Hold>,
    /// An operator wants it gone: `force` cancels leases.
    pub unload: Option<bool>,
    /// An operator wants it asleep.
    pub sleep_wanted: bool,
    /// Its ttl does not end before this: it was extended.
    pub ttl_until: Option<Time>,
    pub adopted: bool,
    /// Host pids seen holding memory for it.
    pub pids: BTreeSet<u32>,
    /// Most bytes seen on one of its GPUs, where the driver tells.
    pub measured: Option<Bytes>,
}

impl Instance {
    pub fn new(id: InstanceId, spec: &Arc<ModelSpec>, residency: Residency, now: Time) -> Instance {
        Instance {
            id,
            model: spec.name.clone(),
            spec: Arc::clone(spec),
            gpus: Vec::new(),
            promise: None,
            residue: Bytes::ZERO,
            ram_own: Bytes::ZERO,
            weights: Bytes::ZERO,
            slept: false,
            residency,
            since: now,
            moving: None,
            stop_wanted: None,
            release: None,
            trouble: None,
            stopped_by: None,
            stop_retry: None,
            stop_tries: 0,
            gate: GateState::default(),
            ready_at: now,
            launched: false,
            unvouched: false,
            awake: Bytes::ZERO,
            served: false,
            drain: None,
            hold: None,
            unload: None,
            sleep_wanted: false,
            ttl_until: None,
            adopted: false,
            pids: BTreeSet::new(),
            measured: None,
        }
    }

    pub fn enter(&mut self, next: Residency, now: Time) {
        debug_assert!(
            self.residency.may_become(next),
            "{} {}: {:?} → {next:?}",
            self.model,
            self.id,
            self.residency
        );
        self.residency = next;
        self.since = now;
    }

    pub fn is_ready(&self) -> bool {
        self.residency == Residency::Ready
    }

    pub fn is_stopping(&self) -> bool {
        self.residency == Residency::Stopping
    }

    pub fn is_sleeping(&self) -> bool {
        matches!(self.residency, Residency::Sleeping { .. })
    }

    pub fn is_lost(&self) -> bool {
        matches!(self.residency, Residency::Lost { .. })
    }

    /// The process may still be there.
    pub fn may_run(&self) -> bool {
        !(self.is_stopping() && self.release.is_some())
    }

    pub fn in_flight(&self) -> u32 {
        self.gate.count.in_flight
    }

    pub fn permits(&self) -> u32 {
        self.spec.concurrency.unwrap_or(u32::MAX)
    }

    /// No lease can appear any more, and none is left.
    pub fn is_drained(&self) -> bool {
        !self.gate.open && !self.gate.unconfirmed && self.in_flight() == 0
    }

    /// Requests that ended on this instance.
    pub fn ended(&self) -> u64 {
        self.gate.count.granted.saturating_sub(u64::from(self.in_flight()))
    }

    pub fn last_used(&self) -> Time {
        self.gate.count.last_used.max(self.ready_at)
    }

    pub fn idle_for(&self, now: Time) -> Duration {
        now.since(self.last_used())
    }

    pub fn can_sleep(&self) -> Option<u8> {
        (self.spec.engine == EngineKind::Vllm && !self.spec.is_external())
            .then_some(self.spec.sleep)
            .flatten()
    }

    pub fn is_moving(&self, kind: MoveKind) -> bool {
        self.moving.is_some_and(|m| m.kind == kind)
    }

    /// Bytes that a release would bring on each GPU, as far as known.
    pub fn held(&self) -> Bytes {
        let promise = self.promise.unwrap_or_default();
        match self.measured {
            // The peak was measured awake; it has slept since.
            Some(measured) if self.awake > Bytes::ZERO => measured.min(promise),
            Some(measured) => measured,
            None => promise,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_follow_the_diagram() {
        let starting = Residency::Starting { phase: Phase::Start };
        assert!(starting.may_become(Residency::Stopping));
        assert!(Residency::Draining.may_become(Residency::Ready));
        assert!(Residency::Sleeping { level: 1 }.may_become(Residency::Stopping));
        assert!(!Residency::Stopping.may_become(Residency::Ready));
        assert!(!Residency::Ready.may_become(starting));
        assert!(!Residency::Sleeping { level: 1 }.may_become(Residency::Ready));
    }
}
