//! Moves: one at a time per instance, in order, with reason, and alone where vLLM measures.

use wharf::config::catalog::{EngineKind, SwapMode};
use wharf::scheduler::record::Phase;
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, SwapId};

use super::{Checker, Known, Move, Told};
use crate::machine::{Machine, Real};

impl Checker {
    pub(super) fn preflight(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        model: &ModelName,
        gpus: &[GpuId],
    ) {
        let Some(spec) = self.catalog.model(model).cloned() else {
            return self.fail(format!("preflight of {model}, which is not configured"));
        };
        if let Some(known) = self.insts.get(&instance) {
            // A transient fault is tried again.
            let again = known.under_way.is_none() && known.footprint.is_none();
            self.require(again, || format!("{instance} is used twice"));
        }
        self.require(!self.shutting_down, || format!("{model} starts during shutdown"));
        self.insts.insert(instance, Known::new(model, spec, gpus));
        self.live.insert(instance);
        self.begin_move(Move::Preflight, swap, instance);
    }

    pub(super) fn fetch(&mut self, swap: SwapId, instance: InstanceId) {
        let Some(known) = self.existing(instance, "Fetch") else { return };
        let fine = known.preflight;
        self.require(fine, || format!("{instance} is fetched before its preflight passed"));
        self.begin_move(Move::Fetch, swap, instance);
    }

    /// Only for a start that has not begun, of a swap that goes on. (The one retry of a start is a new
    /// instance, which nobody has heard of: nothing is prepared for it.)
    pub(super) fn prepare(&mut self, swap: SwapId, instance: InstanceId) {
        let ended = self.ended.contains(&swap);
        self.require(!ended, || format!("{instance} is prepared for {swap}, which has ended"));
        let Some(known) = self.insts.get(&instance) else { return };
        let early = known.preflight && !known.launched && known.under_way.is_none();
        self.require(early, || format!("{instance} is prepared, but it is no start to come"));
    }

    fn begin_move(&mut self, what: Move, swap: SwapId, instance: InstanceId) {
        let Some(known) = self.existing(instance, "a move") else { return };
        let busy = known.under_way;
        let cancels = what == Move::Stop
            && matches!(busy, Some((Move::Preflight | Move::Fetch | Move::Start | Move::Wake, _)));
        (known.under_way, known.last_for) = (Some((what, swap)), Some(swap));
        known.launched |= what == Move::Start;
        let lost = known.lost;
        self.require(busy.is_none() || cancels, || {
            format!("{what:?} of {instance} for {swap} during {busy:?}")
        });
        self.require(!lost || what == Move::Stop, || {
            format!("{what:?} of {instance}, whose runtime is lost")
        });
        let ended = self.ended.contains(&swap) && what != Move::Stop;
        self.require(!ended, || format!("{what:?} of {instance} for {swap}, which has ended"));
        // What was never launched, or is gone, holds nothing.
        let known = &self.insts[&instance];
        let launched = known.launched;
        if what != Move::Stop || (launched && known.told != Told::Gone) {
            self.profiling_is_alone(what, instance);
        }
    }

    /// While a vLLM instance profiles its memory nothing else moves on its GPUs.
    fn profiling_is_alone(&mut self, what: Move, instance: InstanceId) {
        if matches!(what, Move::Preflight | Move::Fetch) || self.shutting_down {
            return;
        }
        let me = &self.insts[&instance];
        let starts_vllm = what == Move::Start && me.spec.engine == EngineKind::Vllm;
        let clash = self.live.iter().filter(|&&other| other != instance).find(|other| {
            let other = &self.insts[*other];
            let shares = other.gpus.iter().any(|gpu| me.gpus.contains(gpu));
            let moves = matches!(
                other.under_way,
                Some((Move::Start | Move::Stop | Move::Sleep | Move::Wake, _))
            );
            shares && (other.profiling || (starts_vllm && moves && other.launched))
        });
        if let Some(&other) = clash {
            let other_move = self.insts[&other].under_way;
            self.fail(format!(
                "{what:?} of {instance} while {other} ({other_move:?}) is on the same GPU and one \
                 of them is vLLM profiling its memory"
            ));
        }
    }

    pub(super) fn start(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        (model, gpus, footprint): (&ModelName, &[GpuId], Option<Bytes>),
        machine: &Machine,
    ) {
        self.second_try(swap, instance, model);
        let Some(known) = self.existing(instance, "StartInstance") else { return };
        let ready = known.preflight && known.fetched && known.model == *model;
        known.gpus = gpus.to_vec();
        self.require(ready, || format!("{instance} starts without preflight and fetch"));
        self.begin_move(Move::Start, swap, instance);
        self.start_is_wanted(instance, model);
        self.starts_apart(instance);
        self.start_fits(instance, gpus, footprint, machine);
        self.start_fits_host(instance, machine);
        self.live.insert(instance);
        if let Some(known) = self.insts.get_mut(&instance) {
            known.footprint = footprint;
            known.told = Told::Starting;
            known.profiling = known.spec.engine == EngineKind::Vllm && !known.gpus.is_empty();
        }
    }

    /// The one retry inside a swap is a new instance; what was checked and fetched still counts,
    /// also when a sleeper was to be woken (so it began with its drain) and never could be.
    fn second_try(&mut self, swap: SwapId, instance: InstanceId, model: &ModelName) {
        let recorded = self.swaps.get(&swap).is_some_and(|record| {
            let mut phases = record.phases.iter().map(|(phase, _)| *phase);
            let wakes = phases.clone().next() == Some(Phase::Drain);
            record.model == *model && (wakes || phases.any(|phase| phase == Phase::Start))
        });
        let tried = self.insts.values().any(|known| known.launched && known.model == *model);
        let spec = self.catalog.model(model).filter(|_| recorded && tried).cloned();
        if let (None, Some(spec)) = (self.insts.get(&instance), spec) {
            let known = Known { preflight: true, fetched: true, ..Known::new(model, spec, &[]) };
            self.insts.insert(instance, known);
        }
    }

    fn start_is_wanted(&mut self, instance: InstanceId, model: &ModelName) {
        self.require(!self.shutting_down, || format!("{model} starts during shutdown"));
        let up = |id: &&InstanceId| {
            let other = &self.insts[*id];
            let up = !matches!(other.told, Told::Preparing | Told::Asleep);
            **id != instance && up && other.launched && other.wants_gpu()
        };
        let on_gpu = self.insts[&instance].wants_gpu();
        let others = self.live.iter().filter(up).count();
        let twin = self.live.iter().find(|&&id| {
            let other = &self.insts[&id];
            id != instance && other.model == *model && other.told == Told::Ready
        });
        let twin = twin.copied();
        self.require(twin.is_none(), || format!("{model} starts beside its ready {twin:?}"));
        if let Some(most) = self.models_max()
            && on_gpu
        {
            self.require(others < most, || {
                format!("{model} starts beside {others} others, {most} may be up at once")
            });
        }
    }

    pub(super) fn sleep(&mut self, swap: SwapId, instance: InstanceId, machine: &Machine) {
        self.counts.sleeps += 1;
        let Some(known) = self.existing(instance, "Sleep") else { return };
        let fine = known.told == Told::Ready && known.spec.sleep.is_some();
        known.told = Told::FallingAsleep;
        self.require(fine, || format!("{instance} is put to sleep, but is not ready to"));
        self.begin_move(Move::Sleep, swap, instance);
        self.idle(instance, machine, "put to sleep");
        self.leaving.push((swap, instance));
    }

    pub(super) fn wake(&mut self, swap: SwapId, instance: InstanceId, machine: &Machine) {
        self.counts.wakes += 1;
        let Some(known) = self.existing(instance, "Wake") else { return };
        let fine = known.told == Told::Asleep;
        known.told = Told::Waking;
        let gpus = known.gpus.clone();
        self.require(fine, || format!("{instance} is woken, but does not sleep"));
        self.begin_move(Move::Wake, swap, instance);
        self.starts_apart(instance);
        self.wake_fits(instance, &gpus, machine);
    }

    pub(super) fn stop(&mut self, swap: SwapId, instance: InstanceId, machine: &Machine) {
        self.counts.stops += 1;
        let Some(known) = self.existing(instance, "StopInstance") else { return };
        let was_up = !matches!(known.told, Told::Gone | Told::Preparing);
        if known.told != Told::Gone {
            known.told = Told::Stopping;
        }
        known.profiling = false;
        // Also of one that died: something may be left of it.
        self.begin_move(Move::Stop, swap, instance);
        if was_up {
            self.idle(instance, machine, "stopped");
            self.leaving.push((swap, instance));
        }
    }

    /// Without leases, unless they were cancelled with good reason; and behind a closed gate.
    fn idle(&mut self, instance: InstanceId, machine: &Machine, what: &str) {
        let known = &self.insts[&instance];
        let (cancelled, open) = (known.cancelled, known.open);
        let leases = machine.in_flight(instance);
        let dead = machine.insts.get(&instance).is_none_or(|inst| inst.real == Real::Gone);
        self.require(leases == 0 || cancelled || dead, || {
            format!("{instance} is {what} with {leases} leases")
        });
        self.require(!open, || format!("{instance} is {what} behind an open gate"));
    }

    /// How many instances may be up at once.
    fn models_max(&self) -> Option<usize> {
        let swap = &self.catalog.settings.swap;
        match (swap.mode, swap.max_concurrent_models) {
            (SwapMode::SingleActive, _) => Some(1),
            (SwapMode::MultiActive, _) if self.gpus.is_empty() => Some(1),
            (SwapMode::MultiActive, 0) => None,
            (SwapMode::MultiActive, n) => Some(n as usize),
        }
    }
}
