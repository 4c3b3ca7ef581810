//! Vacate: the drained instances are stopped or put to sleep. No way back from here.

use std::time::Duration;

use super::super::Scheduler;
use super::super::action::Action;
use super::super::event::{Fault, FaultKind};
use super::super::record::{Phase, SwapCause, SwapOutcome};
use super::super::residency::{Instance, Move, MoveKind, Residency};
use crate::units::{Bytes, InstanceId, SwapId};

const STOP_RETRY_FIRST: Duration = Duration::from_secs(10);
const STOP_RETRY_MAX: Duration = Duration::from_secs(600);

impl Scheduler {
    pub(super) fn advance_vacate(&mut self, id: SwapId) {
        self.watch(id);
        let Some(swap) = self.swaps.get(&id) else { return };
        let victims = swap.victims.clone();
        let mut waiting = false;
        for victim in victims {
            let Some(instance) = self.instances.get(&victim.instance) else { continue };
            match instance.residency {
                Residency::Draining | Residency::Sleeping { .. }
                    if instance.moving.is_none() && instance.release.is_none() =>
                {
                    if instance.is_sleeping() && victim.asleep {
                        continue;
                    }
                    waiting = true;
                    self.vacate_one(id, victim.instance, victim.asleep);
                }
                Residency::Sleeping { .. } => {}
                Residency::Lost { .. } => {
                    return self.vacate_failed(id, victim.instance);
                }
                Residency::Stopping if instance.trouble.is_some() => {
                    return self.vacate_failed(id, victim.instance);
                }
                Residency::Stopping => waiting |= instance.may_run(),
                Residency::FallingAsleep => waiting = true,
                Residency::Draining
                | Residency::Ready
                | Residency::Starting { .. }
                | Residency::Waking => waiting = true,
            }
        }
        if !waiting {
            self.enter_phase(id, Phase::Prove);
            self.advance_prove(id);
        }
    }

    /// Emits the stop or sleep, unless a vLLM instance is measuring its memory there.
    fn vacate_one(&mut self, swap: SwapId, id: InstanceId, asleep: bool) {
        let Some(instance) = self.instances.get(&id) else { return };
        let vacated_by_another = |i: &Instance| {
            i.id != id
                && i.moving.is_some_and(|m| {
                    m.swap != swap && matches!(m.kind, MoveKind::Stop | MoveKind::Sleep)
                })
                && i.promise.is_some()
                && i.gpus.iter().any(|g| instance.gpus.contains(g))
        };
        if self.profiling_on(&instance.gpus, id).is_some()
            || self.instances.values().any(vacated_by_another)
        {
            return;
        }
        let model = instance.model.clone();
        self.restart_overdue(&model);
        if let Some(swap) = self.swaps.get_mut(&swap) {
            swap.vacated = true;
        }
        // What had room when it was planned may have none any more.
        let has_room = self.instances.get(&id).is_some_and(|i| self.has_ram(self.ram_to_sleep(i)));
        if asleep && has_room {
            self.emit_sleep(swap, id);
        } else {
            self.emit_stop(swap, id);
        }
        self.changed();
    }

    fn vacate_failed(&mut self, id: SwapId, victim: InstanceId) {
        let fault =
            self.instances.get(&victim).and_then(|i| i.trouble.clone()).unwrap_or_else(|| {
                Fault::new(FaultKind::StopFailed, "a model that has to leave is out of reach")
            });
        if self.swaps.get(&id).is_some_and(super::Swap::is_load) {
            self.fail_load(id, fault);
        } else {
            self.end_swap(id, SwapOutcome::Failed(fault));
        }
    }

    fn emit_sleep(&mut self, swap: SwapId, id: InstanceId) {
        let now = self.now;
        let deadline = self.stop_deadline(id);
        let weights = self.instances.get(&id).map(|i| self.ram_to_sleep(i)).unwrap_or_default();
        if let Some(instance) = self.instances.get_mut(&id) {
            instance.weights = weights;
            instance.drain = None;
            instance.awake = instance.promise.unwrap_or_default();
            instance.slept = true;
            instance.enter(Residency::FallingAsleep, now);
        }
        self.set_moving(id, MoveKind::Sleep, swap, deadline);
        self.emit(Action::Sleep { swap, instance: id });
    }

    fn stop_deadline(&self, id: InstanceId) -> crate::units::Time {
        let grace = self.instances.get(&id).map(|i| i.spec.stop.grace).unwrap_or_default();
        self.now + grace + self.catalog.settings.swap.shutdown_timeout
    }

    /// Stops an instance (or cancels its start), now or as soon as its GPUs may be touched.
    pub(in crate::scheduler) fn emit_stop(&mut self, swap: SwapId, id: InstanceId) {
        self.close_gate(id);
        self.forget_extension(id);
        let deadline = self.stop_deadline(id);
        let now = self.now;
        let Some(instance) = self.instances.get_mut(&id) else { return };
        (instance.drain, instance.hold, instance.stop_retry) = (None, None, None);
        instance.stopped_by = Some(swap);
        if !instance.is_stopping() {
            instance.enter(Residency::Stopping, now);
        }
        let gpus = instance.gpus.clone();
        let holds = instance.promise.is_some();
        if holds && self.profiling_on(&gpus, id).is_some() {
            if let Some(instance) = self.instances.get_mut(&id) {
                instance.stop_wanted = Some(swap);
                instance.moving = None;
            }
            return;
        }
        if let Some(instance) = self.instances.get_mut(&id) {
            instance.stop_wanted = None;
        }
        self.set_moving(id, MoveKind::Stop, swap, deadline);
        self.emit(Action::StopInstance { swap, instance: id });
        self.changed();
    }

    /// Stops that waited for a vLLM instance to end its measuring.
    pub(in crate::scheduler) fn emit_wanted_stops(&mut self) {
        let wanted: Vec<(InstanceId, SwapId)> = self
            .instances
            .values()
            .filter_map(|i| Some((i.id, i.stop_wanted?)))
            .filter(|(id, _)| {
                let gpus = self.instances.get(id).map(|i| i.gpus.as_slice()).unwrap_or_default();
                self.profiling_on(gpus, *id).is_none()
            })
            .collect();
        for (id, swap) in wanted {
            self.emit_stop(swap, id);
        }
    }

    pub(super) fn stop_done(&mut self, id: InstanceId, under_way: Move, result: Result<(), Fault>) {
        match result {
            Ok(()) => {
                if let Some(instance) = self.instances.get_mut(&id) {
                    instance.trouble = None;
                    instance.stop_retry = None;
                }
                self.expect_release(id, None, under_way.since);
            }
            Err(fault) => self.stop_failed(id, fault),
        }
    }

    /// It may still run: its bytes stay promised, and it is tried again later.
    fn stop_failed(&mut self, id: InstanceId, fault: Fault) {
        let now = self.now;
        let Some(instance) = self.instances.get(&id) else { return };
        let (model, gpus) = (instance.model.clone(), instance.gpus.clone());
        let holders = self.holder_text(&gpus, Some(id));
        let told = |why: &str| format!("{model} could not be stopped: {why}; {holders}");
        let message = told(&fault.message);
        let public = fault.public.as_deref().map(told);
        let kind = FaultKind::StopFailed;
        let fault = Fault { kind, message: message.clone(), public, ..fault };
        if let Some(instance) = self.instances.get_mut(&id) {
            let wait = STOP_RETRY_FIRST * 2_u32.saturating_pow(instance.stop_tries.min(6));
            instance.stop_tries = instance.stop_tries.saturating_add(1);
            instance.stop_retry = Some(now + wait.min(STOP_RETRY_MAX));
            instance.trouble = Some(fault);
        }
        self.emit(Action::Notice { model: Some(model), text: message });
        self.changed();
    }

    /// Tries again to stop what could not be stopped.
    pub(in crate::scheduler) fn retry_stops(&mut self) {
        let due: Vec<InstanceId> = self
            .instances
            .values()
            .filter(|i| i.is_stopping() && i.stop_retry.is_some_and(|at| at <= self.now))
            .map(|i| i.id)
            .collect();
        for id in due {
            let decision = "its last stop failed".to_owned();
            let swap = self.begin_unload(id, SwapCause::Cleanup, decision, Phase::Vacate);
            if let Some(instance) = self.instances.get_mut(&id) {
                instance.trouble = None;
            }
            self.emit_stop(swap, id);
        }
    }

    pub(super) fn sleep_done(
        &mut self,
        id: InstanceId,
        under_way: Move,
        result: Result<Option<Bytes>, Fault>,
    ) {
        let now = self.now;
        match result {
            Ok(residue) => {
                if let Some(residue) = residue {
                    self.learn_residue(id, residue);
                }
                if let Some(instance) = self.instances.get_mut(&id) {
                    let level = instance.can_sleep().unwrap_or(1);
                    instance.sleep_wanted = false;
                    instance.enter(Residency::Sleeping { level }, now);
                }
                self.expect_release(id, residue, under_way.since);
            }
            Err(_) => self.emit_stop(under_way.swap, id),
        }
    }

    /// A sleeper that keeps too much, or whose residue is wanted.
    pub(in crate::scheduler) fn stop_sleeper(&mut self, id: InstanceId) {
        let decision = "asleep, its memory is wanted".to_owned();
        if self.instances.get(&id).is_some_and(Instance::is_sleeping) {
            let swap = self.begin_unload(id, SwapCause::Evict, decision, Phase::Vacate);
            self.emit_stop(swap, id);
            // Whoever waits for that memory gets the time that a stop takes.
            for swap in self.swaps.values_mut() {
                swap.memory_wait = None;
            }
        }
    }
}
