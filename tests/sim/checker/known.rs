//! What the scheduler was told of each instance.

use std::sync::Arc;

use wharf::config::catalog::{GpuRequest, ModelSpec};
use wharf::scheduler::event::{Done, FaultKind};
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, SwapId};

use super::Checker;

/// What the scheduler was told of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Preparing,
    Starting,
    Ready,
    FallingAsleep,
    Asleep,
    Waking,
    Stopping,
    /// A stop failed: it may still be there.
    StopFailed,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    Preflight,
    Fetch,
    Start,
    Stop,
    Sleep,
    Wake,
}

#[derive(Clone, Debug)]
pub struct Known {
    pub model: ModelName,
    pub spec: Arc<ModelSpec>,
    pub gpus: Vec<GpuId>,
    pub told: Told,
    /// Set by the start action.
    pub footprint: Option<Bytes>,
    pub under_way: Option<(Move, SwapId)>,
    pub preflight: bool,
    pub fetched: bool,
    pub open: bool,
    pub closed_at: Option<u64>,
    /// First named as the one that leaves.
    pub listed_at: Option<u64>,
    /// The swap of its last move.
    pub last_for: Option<SwapId>,
    pub launched: bool,
    /// Of unknown size, beside a pinned one: nobody can say what it will take.
    pub gamble: bool,
    pub cancelled: bool,
    pub lost: bool,
    /// vLLM between start and the end of its profiling.
    pub profiling: bool,
    /// Told leases in flight.
    pub in_flight: u32,
    /// When a lease was taken or ended last, and when it became ready; milliseconds.
    pub last_used: u64,
    pub ready_at: u64,
    /// Its ttl does not end before this.
    pub extended: u64,
}

impl Known {
    pub fn wants_gpu(&self) -> bool {
        !self.spec.is_external() && self.spec.gpus != GpuRequest::None
    }

    pub fn new(model: &ModelName, spec: Arc<ModelSpec>, gpus: &[GpuId]) -> Known {
        Known {
            model: model.clone(),
            spec,
            gpus: gpus.to_vec(),
            told: Told::Preparing,
            footprint: None,
            under_way: None,
            preflight: false,
            fetched: false,
            open: false,
            closed_at: None,
            listed_at: None,
            last_for: None,
            launched: false,
            gamble: false,
            cancelled: false,
            lost: false,
            profiling: false,
            in_flight: 0,
            last_used: 0,
            ready_at: 0,
            extended: 0,
        }
    }
}

impl Checker {
    pub(super) fn adopted(
        &mut self,
        now: u64,
        instance: InstanceId,
        model: &ModelName,
        gpus: &[GpuId],
        footprint: Bytes,
    ) {
        let Some(spec) = self.catalog.model(model).cloned() else { return };
        let known = Known {
            footprint: Some(footprint),
            told: Told::Ready,
            preflight: true,
            fetched: true,
            launched: true,
            ready_at: now,
            ..Known::new(model, spec, gpus)
        };
        self.insts.insert(instance, known);
        self.live.insert(instance);
    }

    pub(super) fn told_dead(&mut self, instance: InstanceId) {
        if let Some(known) = self.insts.get(&instance) {
            self.failed_models.insert(known.model.clone());
        }
        self.told_gone(instance);
    }

    fn told_gone(&mut self, instance: InstanceId) {
        if let Some(known) = self.insts.get_mut(&instance) {
            known.told = Told::Gone;
            (known.profiling, known.lost) = (false, false);
            self.live.remove(&instance);
            self.forced.remove(&known.model);
            if matches!(known.under_way, Some((Move::Start | Move::Wake | Move::Sleep, _))) {
                known.under_way = None;
            }
        }
    }

    pub(super) fn move_done(&mut self, swap: SwapId, instance: InstanceId, done: &Done) {
        let Some(known) = self.insts.get_mut(&instance) else { return };
        let ended = match done {
            Done::Preflight(_) => Move::Preflight,
            Done::Fetch(_) => Move::Fetch,
            Done::Start(_) => Move::Start,
            Done::Stop(_) => Move::Stop,
            Done::Sleep(_) => Move::Sleep,
            Done::Wake(_) => Move::Wake,
        };
        if known.under_way != Some((ended, swap)) {
            return;
        }
        known.under_way = None;
        let failed = known.model.clone();
        match done {
            Done::Preflight(result) => known.preflight = result.is_ok(),
            Done::Fetch(result) => known.fetched = result.is_ok(),
            // It answers, whatever its runtime does.
            Done::Start(Ok(_)) | Done::Wake(Ok(_)) => {
                (known.told, known.lost) = (Told::Ready, false);
            }
            Done::Sleep(Ok(_)) => (known.told, known.lost) = (Told::Asleep, false),
            Done::Sleep(Err(_)) => known.told = Told::Ready,
            Done::Wake(Err(_)) => known.told = Told::Asleep,
            Done::Stop(Err(_)) if known.told != Told::Gone => known.told = Told::StopFailed,
            Done::Stop(_) | Done::Start(Err(_)) => known.told = Told::Gone,
        }
        if ended == Move::Start {
            known.profiling = false;
        }
        if known.told == Told::Gone {
            self.live.remove(&instance);
            self.forced.remove(&failed);
        }
        let fault = match done {
            Done::Preflight(Err(fault))
            | Done::Fetch(Err(fault))
            | Done::Start(Err(fault))
            | Done::Wake(Err(fault)) => Some(fault),
            _ => None,
        };
        if fault.is_some_and(|fault| fault.kind != FaultKind::Cancelled) {
            self.failed_models.insert(failed);
        }
    }

    /// The instance of `model` that the scheduler was told is ready.
    pub(super) fn ready(&self, model: &ModelName) -> Option<InstanceId> {
        let ready = |id: &&InstanceId| {
            let known = &self.insts[id];
            known.model == *model && known.told == Told::Ready && !known.lost
        };
        self.live.iter().find(ready).copied()
    }
}
