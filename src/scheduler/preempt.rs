//! What a higher class may take back: a start that is less than half done.
//!
//! The class of a model that waits is that of its most urgent request (what the request asks for
//! within the bounds of its key, else its model's own), or its own where an ensure wants it. A
//! start that nobody asked for has none, and gives way to every request.
//!
//! A start is called off for requests that came after it was decided (whoever waited then was
//! weighed against it), only if nothing else makes room for them now, and never
//! 1. if it is overdue, or an ensure or load began it, or its model is pinned or stays;
//! 2. if starts of its model were never timed, or half of the usual time has passed;
//! 3. while a vLLM instance measures its memory there, as its stop would have to wait for that;
//! 4. twice before its model was ready: urgent requests delay a model, they cannot starve it.
//!
//! Those who wait for it keep their age, and who was evicted for it stays evicted. The room is
//! the higher class's own from then on: no other takes it by a larger score.

use std::collections::BTreeSet;

use super::Scheduler;
use super::placement::{Plan, Planned};
use super::policy::{Candidate, Urgency};
use super::record::{Phase, SwapCause};
use super::residency::{Instance, MoveKind};
use super::swap::Swap;
use super::waiters::Waiter;
use crate::units::{GpuId, InstanceId, ModelName, Priority, SwapId, Time};

impl Scheduler {
    /// Room for a candidate that found none, where a start gives way to it.
    pub(super) fn or_call_off(
        &mut self,
        planned: Planned,
        candidate: &mut Candidate,
        wanted: &BTreeSet<GpuId>,
    ) -> Planned {
        let blocked = matches!(planned, Planned::Blocked { .. });
        if !blocked || candidate.urgency.is_unasked() {
            return planned;
        }
        let giving_way = self.giving_way(candidate, wanted);
        if giving_way.is_empty() {
            return planned;
        }
        let named: Vec<String> =
            giving_way.into_iter().filter_map(|swap| self.call_off(swap, candidate)).collect();
        candidate.instead_of = Some(named.join(", "));
        self.plan(candidate, wanted)
    }

    /// The class of those who came after `since` (an ensure always did); `None`: nobody.
    pub(super) fn class_since(
        &self,
        candidate: &Candidate,
        since: Option<Time>,
    ) -> Option<Priority> {
        let ensure = matches!(candidate.urgency, Urgency::Ensure(_));
        let queue = self.models.get(&candidate.spec.name).map(|m| &m.queue);
        let came = |w: &&Waiter| since.is_none_or(|since| w.enqueued > since);
        let came = queue.into_iter().flat_map(|queue| queue.iter()).filter(came);
        let waiting = came.map(|w| w.request.priority).max();
        waiting.max(ensure.then_some(candidate.spec.priority))
    }

    /// `None`: nobody asked for it.
    fn class_of(&self, candidate: &Candidate) -> Option<Priority> {
        let anybody = self.class_since(candidate, None);
        let asked = !candidate.urgency.is_unasked();
        anybody.or(asked.then_some(candidate.spec.priority))
    }

    /// The swaps without which there is room; empty: it would not help.
    fn giving_way(&self, candidate: &Candidate, wanted: &BTreeSet<GpuId>) -> Vec<SwapId> {
        let may: Vec<&Swap> =
            self.swaps.values().filter(|s| self.may_call_off(s, candidate)).collect();
        let started: Vec<InstanceId> =
            may.iter().filter(|s| s.started).map(|s| s.instance).collect();
        if !started.is_empty() {
            let without = Candidate { calls_off: started, ..candidate.clone() };
            // Where somebody else had to leave, too, the room would not be there at once.
            let alone =
                |plan: &Plan| plan.victims.iter().all(|v| without.calls_off.contains(&v.instance));
            if let Planned::Room(plan) = self.plan(&without, wanted)
                && alone(&plan)
            {
                let leaves = |s: &&&Swap| plan.victims.iter().any(|v| v.instance == s.instance);
                return may.iter().filter(leaves).map(|s| s.id).collect();
            }
        }
        // Room that was made for another and is not taken yet: planned with as if it were its own.
        let instead = |s: &&&Swap| {
            let without = Candidate { swap: Some(s.id), ..candidate.clone() };
            matches!(self.plan(&without, wanted), Planned::Room(_))
        };
        let vacated = may.iter().filter(|s| !s.started && candidate.swap.is_none());
        vacated.take(4).find(instead).map(|s| s.id).into_iter().collect()
    }

    fn may_call_off(&self, swap: &Swap, candidate: &Candidate) -> bool {
        let stays = |i: &Instance| self.stays_for(&candidate.spec.name, i);
        let class = self.class_since(candidate, Some(swap.began));
        self.is_young_start(swap)
            && !self.instances.get(&swap.instance).is_some_and(stays)
            && class.is_some_and(|class| self.is_of_lower_class(&swap.model, class))
    }

    /// It may be called off for somebody: not asked for, not half done, and not a second time.
    pub(super) fn is_young_start(&self, swap: &Swap) -> bool {
        let (Some(state), Some(instance)) =
            (self.models.get(&swap.model), self.instances.get(&swap.instance))
        else {
            return false;
        };
        let asked = matches!(swap.cause, SwapCause::Ensure | SwapCause::Load);
        if !swap.is_load() || asked || state.called_off {
            return false;
        }
        match swap.phase {
            Phase::Start => {
                instance.is_moving(MoveKind::Start)
                    && self.start_done_percent(swap).is_some_and(|percent| percent < 50)
                    && self.profiling_on(&instance.gpus, instance.id).is_none()
            }
            Phase::Vacate | Phase::Prove => !swap.started,
            Phase::Preflight | Phase::Fetch | Phase::Drain | Phase::Vouch => false,
        }
    }

    fn is_of_lower_class(&self, model: &ModelName, class: Priority) -> bool {
        let Some(other) = self.candidate_of(model) else {
            // Its callers left: they tend to come back.
            return self.catalog.model(model).is_some_and(|spec| spec.priority < class);
        };
        let outranks = other.urgency < Urgency::Normal;
        !outranks && self.class_of(&other) < Some(class)
    }

    /// How much of its start has passed, by what earlier ones took.
    fn start_done_percent(&self, swap: &Swap) -> Option<u128> {
        let began = self.instances.get(&swap.instance)?.moving?.since;
        let usual = self.models.get(&swap.model)?.learned.start?.as_millis();
        (self.now.since(began).as_millis() * 100).checked_div(usual)
    }

    /// What was called off, in words.
    fn call_off(&mut self, id: SwapId, candidate: &Candidate) -> Option<String> {
        let swap = self.swaps.get(&id)?;
        let (model, instance, started) = (swap.model.clone(), swap.instance, swap.started);
        let done = match self.start_done_percent(swap).filter(|_| started) {
            Some(percent) => format!("start was {percent} % done"),
            None => "start had not begun".to_owned(),
        };
        let class = self.class_since(candidate, Some(swap.began))?.as_str();
        let why = format!("{} ({class}) waits, and this {done}", candidate.spec.name);
        self.models.get_mut(&model)?.called_off = true;
        self.cancel_start(instance, &why, SwapCause::Evict);
        Some(format!("{model}, whose {done}"))
    }
}
