//! Start: the engine loads. It ends when the instance was vouched for, or failed.

use std::time::Duration;

use super::super::Scheduler;
use super::super::action::{Action, Refusal};
use super::super::event::Fault;
use super::super::footprint::told;
use super::super::memory::{UNSEEN, uses_gpu};
use super::super::record::{Phase, SwapCause, SwapOutcome};
use super::super::residency::{Instance, Move, MoveKind, Residency};
use crate::config::catalog::Vram;
use crate::units::{Bytes, GpuId, InstanceId, SwapId};

/// The effect reports its own timeout; this much later we stop believing that it will.
const REPORT_GRACE: Duration = Duration::from_secs(15);

impl Scheduler {
    /// Ahead of the decision, for what takes a while and needs no room. A sleeper has it all.
    pub(super) fn emit_prepare(&mut self, id: SwapId) {
        let Some(swap) = self.swaps.get(&id) else { return };
        let Some(target) = self.instances.get(&swap.instance) else { return };
        if target.is_sleeping() {
            return;
        }
        let gpus: Vec<GpuId> = swap.gpus.iter().copied().filter(|&g| g != UNSEEN).collect();
        let least = gpus.iter().filter_map(|&gpu| self.need(&target.spec, gpu)).map(|n| n.bytes);
        let least = least.min().unwrap_or_default();
        let footprint = self.told_footprint(target, least);
        let instance = target.id;
        self.emit(Action::Prepare { swap: id, instance, gpus, footprint });
    }

    /// `None`: unknown, it has the GPUs alone.
    fn told_footprint(&self, target: &Instance, footprint: Bytes) -> Option<Bytes> {
        let alone = target.spec.vram == Vram::Unknown
            && self.models.get(&target.model).is_none_or(|m| m.learned.footprint.is_none());
        let known = uses_gpu(&target.spec) && !alone && footprint > Bytes(1);
        known.then(|| told(&target.spec, footprint))
    }

    /// The decision: from here the bytes are promised.
    pub(super) fn emit_start(&mut self, id: SwapId, footprint: Bytes) {
        let now = self.now;
        let Some(swap) = self.swaps.get_mut(&id) else { return };
        (swap.started, swap.memory_wait) = (true, None);
        let (instance, model, gpus) = (swap.instance, swap.model.clone(), swap.gpus.clone());
        let for_somebody =
            matches!(swap.cause, SwapCause::Request | SwapCause::Ensure | SwapCause::Load);
        self.enter_phase(id, Phase::Start);
        if for_somebody {
            self.call_company(&model);
        }
        let ram = self.catalog.model(&model).map_or(Bytes::ZERO, |spec| self.ram_of(spec));
        let told = self.instances.get(&instance).and_then(|i| self.told_footprint(i, footprint));
        let Some(target) = self.instances.get_mut(&instance) else { return };
        let ceiling = target.spec.start_timeout;
        let deadline = now + ceiling.unwrap_or(self.catalog.settings.swap.start_timeout);
        let wakes = target.is_sleeping();
        (target.launched, target.unvouched) = (true, true);
        if !wakes {
            target.ram_own = ram;
        }
        target.gpus.clone_from(&gpus);
        if uses_gpu(&target.spec) {
            target.promise = Some(footprint);
        }
        if wakes {
            target.enter(Residency::Waking, now);
            self.set_moving(instance, MoveKind::Wake, id, deadline + REPORT_GRACE);
            self.emit(Action::Wake { swap: id, instance, deadline });
            return;
        }
        self.set_moving(instance, MoveKind::Start, id, deadline + REPORT_GRACE);
        self.emit(Action::StartInstance {
            swap: id,
            instance,
            model,
            gpus: gpus.into_iter().filter(|&g| g != UNSEEN).collect(),
            footprint: told,
            deadline,
        });
    }

    pub(super) fn start_done(
        &mut self,
        id: SwapId,
        instance: InstanceId,
        under_way: Move,
        result: Result<Option<Bytes>, Fault>,
    ) {
        match result {
            Ok(measured) => self.vouched(id, instance, under_way, measured),
            Err(fault) => self.try_again(id, instance, fault),
        }
    }

    pub(super) fn wake_done(
        &mut self,
        id: SwapId,
        instance: InstanceId,
        under_way: Move,
        result: Result<Option<Bytes>, Fault>,
    ) {
        match result {
            Ok(measured) => self.vouched(id, instance, under_way, measured),
            // A sleeper that does not wake is replaced by a fresh start, once.
            Err(_) if self.use_retry(id) => self.start_again(id, instance),
            Err(fault) => self.start_failed(id, instance, fault),
        }
    }

    /// A taken port or a runtime that was briefly away is worth the one retry.
    fn try_again(&mut self, id: SwapId, instance: InstanceId, fault: Fault) {
        if fault.kind.is_transient() && self.use_retry(id) {
            self.start_again(id, instance);
        } else {
            self.start_failed(id, instance, fault);
        }
    }

    /// Whatever is left of the failed start is taken away; waiters hear the cause at once.
    pub(in crate::scheduler) fn start_failed(
        &mut self,
        id: SwapId,
        instance: InstanceId,
        fault: Fault,
    ) {
        self.emit_stop(id, instance);
        self.fail_load(id, fault);
    }

    /// The one retry: a new instance (so a new port) on the same GPUs, once the old one is gone.
    pub(super) fn start_again(&mut self, id: SwapId, old: InstanceId) {
        self.emit_stop(id, old);
        let new = self.take_instance_id();
        let Some(swap) = self.swaps.get_mut(&id) else { return };
        let Some(spec) = self.catalog.model(&swap.model) else { return };
        let residency = Residency::Starting { phase: Phase::Prove };
        let mut instance = Instance::new(new, spec, residency, self.now);
        instance.gpus.clone_from(&swap.gpus);
        swap.instance = new;
        swap.started = false;
        swap.victims.clear();
        self.instances.insert(new, instance);
        self.enter_phase(id, Phase::Prove);
    }

    /// A start (or wake) is called off by an operator or a reload. Its waiters were dealt with.
    pub(in crate::scheduler) fn cancel_start(
        &mut self,
        instance: InstanceId,
        why: &str,
        cause: SwapCause,
    ) {
        let Some(swap) = self.swaps.values().find(|s| s.is_load() && s.instance == instance) else {
            return;
        };
        let (id, started) = (swap.id, swap.started);
        if !started {
            return self.cancel_swap(id, why);
        }
        self.end_swap(id, SwapOutcome::Cancelled { why: why.to_owned() });
        let stop = self.begin_unload(instance, cause, why.to_owned(), Phase::Vacate);
        self.emit_stop(stop, instance);
    }

    /// An instance ended by itself.
    pub(in crate::scheduler) fn died(&mut self, id: InstanceId, fault: Fault) {
        self.changed();
        let Some(instance) = self.instances.get(&id) else { return };
        let model = instance.model.clone();
        let text = format!("{model} ended by itself: {}", fault.message);
        match instance.residency {
            Residency::Starting { .. } | Residency::Waking => {
                let swap = self.swaps.values().find(|s| s.instance == id).map(|s| s.id);
                match swap {
                    Some(swap) if instance.launched => self.try_again(swap, id, fault),
                    Some(_) | None => {}
                }
            }
            Residency::Ready | Residency::Draining | Residency::Lost { asleep: false } => {
                self.served_and_died(id, &fault);
            }
            Residency::Sleeping { .. }
            | Residency::FallingAsleep
            | Residency::Lost { asleep: true } => {
                let swap = self.swaps.values().find(|s| s.instance == id && s.is_load());
                if let Some(swap) = swap.map(|s| s.id) {
                    self.cancel_swap(swap, "it died in its sleep");
                }
                self.bury(id, &fault, "died in its sleep");
            }
            Residency::Stopping => {}
        }
        self.emit(Action::Notice { model: Some(model), text });
    }

    /// The first death is answered by a restart for whoever waits; a second in a row backs off.
    fn served_and_died(&mut self, id: InstanceId, fault: &Fault) {
        const SETTLED: Duration = Duration::from_secs(60);
        let Some(instance) = self.instances.get(&id) else { return };
        let (model, served) = (instance.model.clone(), self.now.since(instance.ready_at));
        let unload = self.swaps.values().find(|s| !s.is_load() && s.instance == id).map(|s| s.id);
        self.cancel_running(id, fault);
        if let Some(swap) = unload {
            self.end_swap(swap, SwapOutcome::Unloaded);
        }
        self.bury(id, fault, "died");
        let Some(state) = self.models.get_mut(&model) else { return };
        if served >= SETTLED {
            state.deaths = 0;
        }
        state.deaths = state.deaths.saturating_add(1);
        if state.deaths > 1 {
            self.fail_model(&model, None, fault.clone(), Duration::ZERO);
        }
    }

    fn cancel_running(&mut self, id: InstanceId, fault: &Fault) {
        self.close_gate(id);
        if let Some(instance) = self.instances.get(&id)
            && (instance.in_flight() > 0 || instance.gate.unconfirmed)
        {
            let why = format!("{} died: {}", instance.model, fault.message);
            self.emit(Action::CancelLeases { instance: id, why });
        }
    }

    /// A dead instance may have left children, a container, or memory behind: a stop takes those
    /// away, and the proof of release follows.
    fn bury(&mut self, id: InstanceId, fault: &Fault, what: &str) {
        let decision = format!("{what}: {}", fault.message);
        let swap = self.begin_unload(id, SwapCause::Died, decision, Phase::Vacate);
        if let Some(swap) = self.swaps.get_mut(&swap) {
            swap.death = Some(fault.clone());
        }
        self.emit_stop(swap, id);
    }

    pub(in crate::scheduler) fn refuse_model(
        &mut self,
        model: &crate::units::ModelName,
        refusal: &Refusal,
    ) {
        self.refuse_queue(model, refusal);
        self.refuse_asks(model, refusal);
    }
}
