//! Drain: those who leave take no new requests and finish what they have, until the deadline.
//!
//! An idle victim found busy when its gate closed is let go again, and another choice made,
//! unless notice is due to it anyway. Until the first stop everything here can be undone.

use std::time::Duration;

use super::super::Scheduler;
use super::super::action::Action;
use super::super::placement::{Plan, Planned, Victim};
use super::super::policy::{Candidate, Urgency};
use super::super::record::{Eviction, Phase, SwapCause};
use super::super::residency::{Drain, Instance, Residency};
use super::Swap;
use crate::units::{InstanceId, SwapId};

/// From cancelling the leases of an instance to stopping it whether they ended or not.
pub(in crate::scheduler) const CANCEL_GRACE: Duration = Duration::from_secs(10);

impl Scheduler {
    /// Room was found for a swap that passed its fetch: the victims begin to drain.
    pub(in crate::scheduler) fn place(&mut self, id: SwapId, candidate: &Candidate, plan: Plan) {
        let decision = self.decision(candidate, &plan);
        let evicted: Vec<Eviction> = plan
            .victims
            .iter()
            .filter_map(|v| {
                let model = self.instances.get(&v.instance)?.model.clone();
                Some(Eviction { model, instance: v.instance, why: v.why.clone() })
            })
            .collect();
        let Some(swap) = self.swaps.get_mut(&id) else { return };
        let instance = swap.instance;
        (swap.decision, swap.instead_of) = (decision, candidate.instead_of.clone());
        swap.gpus.clone_from(&plan.gpus);
        swap.victims.clone_from(&plan.victims);
        swap.evicted = evicted;
        (swap.planned, swap.placed, swap.memory_wait) = (true, true, None);
        swap.urgent = candidate.urgency < Urgency::Normal;
        // What began as a warm-up goes on for whoever waits now.
        if !candidate.urgency.is_unasked()
            && matches!(
                swap.cause,
                SwapCause::Warmup | SwapCause::Restore | SwapCause::Keep | SwapCause::Group
            )
        {
            swap.cause = candidate.cause;
        }
        if let Some(instance) = self.instances.get_mut(&instance) {
            instance.gpus = plan.gpus;
        }
        if !plan.victims.is_empty() {
            self.emit_prepare(id);
        }
        for victim in plan.victims {
            self.begin_drain(victim.instance, id, victim.busy);
        }
        self.changed();
        self.record(id);
    }

    pub(super) fn begin_drain(&mut self, id: InstanceId, swap: SwapId, notice: bool) {
        let deadline = self.now + self.catalog.settings.swap.drain_timeout;
        let now = self.now;
        let Some(instance) = self.instances.get_mut(&id) else { return };
        if !instance.is_ready() {
            return;
        }
        instance.drain = Some(Drain { swap, deadline, notice, cancelled_at: None });
        instance.enter(Residency::Draining, now);
        self.close_gate(id);
    }

    pub(in crate::scheduler) fn close_gate(&mut self, id: InstanceId) {
        if let Some(instance) = self.instances.get_mut(&id)
            && instance.gate.open
        {
            instance.gate.open = false;
            instance.gate.unconfirmed = true;
            self.emit(Action::CloseGate { instance: id });
        }
    }

    pub(super) fn advance_drain(&mut self, id: SwapId) {
        let Some(swap) = self.swaps.get(&id) else { return };
        let victims = swap.victims.clone();
        let is_load = swap.is_load();
        if is_load && self.is_notice_needless(swap) {
            return self.unplace(id, "another model became idle first");
        }
        let mut all_drained = true;
        for victim in &victims {
            let Some(instance) = self.instances.get(&victim.instance) else { continue };
            match instance.residency {
                Residency::Draining => {}
                Residency::Sleeping { .. } | Residency::Stopping => continue,
                // It was lost, or rescued by somebody: choose again.
                Residency::Ready
                | Residency::Lost { .. }
                | Residency::Starting { .. }
                | Residency::FallingAsleep
                | Residency::Waking => {
                    return self.redo(id, is_load, "a model that was to leave changed its state");
                }
            }
            if instance.gate.unconfirmed {
                all_drained = false;
                continue;
            }
            let notice = instance.drain.is_some_and(|d| d.notice);
            if !notice && instance.in_flight() > 0 && !self.give_notice(id, victim.instance) {
                return self.redo(id, is_load, "a model that seemed idle was in use");
            }
            all_drained &= self.drain_one(victim.instance);
        }
        if all_drained {
            self.enter_phase(id, Phase::Vacate);
            self.advance_vacate(id);
        }
    }

    /// Somebody else became idle whose room will do: who was given notice may stay.
    fn is_notice_needless(&self, swap: &Swap) -> bool {
        let busy = |victim: &Victim| {
            let instance = self.instances.get(&victim.instance);
            instance.filter(|i| i.in_flight() > 0).and_then(|i| i.drain).is_some_and(|drain| {
                drain.notice && drain.swap == swap.id && drain.cancelled_at.is_none()
            })
        };
        if swap.vacated || !swap.victims.iter().any(busy) {
            return false;
        }
        let Some(candidate) = self.candidate_of(&swap.model) else { return false };
        let planned = self.plan(&candidate, &self.standing.wanted);
        matches!(planned, Planned::Room(plan) if plan.victims.iter().all(|v| !v.busy))
    }

    /// True once nothing runs on the instance any more (or its time is up).
    fn drain_one(&mut self, id: InstanceId) -> bool {
        let Some(instance) = self.instances.get(&id) else { return true };
        let Some(drain) = instance.drain else { return true };
        if instance.is_drained() && !self.has_privileged(instance) {
            return true;
        }
        match drain.cancelled_at {
            Some(at) => at + CANCEL_GRACE <= self.now,
            None if drain.deadline <= self.now => {
                self.cancel_leases(id, "its drain deadline passed");
                false
            }
            None => false,
        }
    }

    pub(in crate::scheduler) fn cancel_leases(&mut self, id: InstanceId, why: &str) {
        let now = self.now;
        let Some(instance) = self.instances.get_mut(&id) else { return };
        if let Some(drain) = &mut instance.drain
            && drain.cancelled_at.is_none()
        {
            drain.cancelled_at = Some(now);
            let why = format!("{} has to leave: {why}", instance.model);
            self.emit(Action::CancelLeases { instance: id, why });
            self.changed();
        }
    }

    /// A victim chosen as idle is busy: may it be given notice all the same?
    fn give_notice(&mut self, swap: SwapId, id: InstanceId) -> bool {
        let Some(model) = self.swaps.get(&swap).filter(|s| s.is_load()).map(|s| s.model.clone())
        else {
            return false;
        };
        let due = self.candidate_of(&model).is_some_and(|candidate| {
            self.instances.get(&id).is_some_and(|i| self.may_give_notice(&candidate, i))
        });
        if due && let Some(drain) = self.instances.get_mut(&id).and_then(|i| i.drain.as_mut()) {
            drain.notice = true;
        }
        due
    }

    fn redo(&mut self, id: SwapId, is_load: bool, why: &str) {
        if is_load {
            self.unplace(id, why);
        } else {
            self.cancel_swap(id, why);
        }
    }

    /// It wakes a sleeper, which it has not done yet.
    pub(in crate::scheduler) fn wakes(&self, id: SwapId) -> bool {
        let sleeps = |s: &Swap| self.instances.get(&s.instance).is_some_and(Instance::is_sleeping);
        self.swaps.get(&id).is_some_and(|s| s.is_load() && sleeps(s))
    }

    /// Takes the plan of a swap back; `choose` makes another.
    pub(in crate::scheduler) fn unplace(&mut self, id: SwapId, why: &str) {
        self.rescue_victims(id);
        if self.wakes(id) {
            return self.cancel_swap(id, why);
        }
        if let Some(swap) = self.swaps.get_mut(&id) {
            (swap.planned, swap.placed, swap.vacated) = (false, false, false);
            swap.victims.clear();
            let left =
                |e: &Eviction| !self.instances.get(&e.instance).is_some_and(Instance::is_ready);
            swap.evicted_before.extend(std::mem::take(&mut swap.evicted).into_iter().filter(left));
            swap.decision = format!("chooses again: {why}");
        }
        self.changed();
        self.record(id);
    }

    /// Draining → Ready for everyone whom no stop has reached.
    pub(super) fn rescue_victims(&mut self, id: SwapId) {
        let now = self.now;
        let Some(swap) = self.swaps.get(&id) else { return };
        for victim in &swap.victims {
            if let Some(instance) = self.instances.get_mut(&victim.instance)
                && instance.residency == Residency::Draining
                && instance.drain.is_some_and(|d| d.swap == id)
            {
                instance.drain = None;
                instance.stop_wanted = None;
                instance.enter(Residency::Ready, now);
            }
        }
    }
}
