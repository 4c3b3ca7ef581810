//! What happens to instances from outside: adoption, a runtime that goes away and comes back,
//! a new configuration, the end of the orchestrator.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Scheduler;
use super::action::{Action, Refusal};
use super::event::{Fault, FaultKind};
use super::memory::{UNSEEN, uses_gpu};
use super::overload::Service;
use super::record::{Phase, SwapCause};
use super::residency::{Instance, Residency};
use crate::config::catalog::Catalog;
use crate::units::{Bytes, GpuId, InstanceId, ModelName};

impl Scheduler {
    /// A healthy instance found at start-up is ready at once.
    pub(super) fn adopted(
        &mut self,
        id: InstanceId,
        model: &ModelName,
        gpus: Vec<GpuId>,
        footprint: Bytes,
    ) {
        let Some(spec) = self.catalog.model(model).cloned() else { return };
        if self.instances.contains_key(&id) {
            return;
        }
        let mut instance = Instance::new(id, &spec, Residency::Ready, self.now);
        instance.gpus = gpus;
        instance.ram_own = self.ram_of(&spec);
        instance.adopted = true;
        instance.launched = true;
        instance.served = true;
        if uses_gpu(&spec) {
            if instance.gpus.is_empty() && self.world.gpus.is_empty() {
                instance.gpus = vec![UNSEEN];
            }
            let need = instance.gpus.first().and_then(|&gpu| self.need(&spec, gpu));
            let known = Some(footprint).filter(|&f| f > Bytes::ZERO);
            instance.promise = known.or(need.map(|n| n.bytes));
        }
        let twin = self.current(model).is_some();
        self.next_ids.instance = self.next_ids.instance.max(id.0 + 1);
        self.instances.insert(id, instance);
        if twin {
            let decision = "a second instance of this model".to_owned();
            let swap = self.begin_unload(id, SwapCause::Cleanup, decision, Phase::Vacate);
            self.emit_stop(swap, id);
        }
    }

    /// As [`Scheduler::adopted`], and stopped at once: its memory is promised until it is proven
    /// free, and its model is not started beside it.
    pub(super) fn stray(
        &mut self,
        id: InstanceId,
        model: &ModelName,
        gpus: Vec<GpuId>,
        footprint: Bytes,
        why: String,
    ) {
        self.adopted(id, model, gpus, footprint);
        if self.instances.get(&id).is_some_and(Instance::is_ready) {
            let swap = self.begin_unload(id, SwapCause::Cleanup, why, Phase::Vacate);
            self.emit_stop(swap, id);
        }
    }

    /// Its bytes stay promised; nobody new is sent there until the runtime answers again.
    pub(super) fn runtime_lost(&mut self, instances: &[InstanceId], why: String) {
        let now = self.now;
        self.runtime_fault = why;
        for &id in instances {
            let Some(instance) = self.instances.get_mut(&id) else { continue };
            let asleep = match instance.residency {
                Residency::Ready | Residency::Draining => false,
                // What it has not given back yet stays promised.
                Residency::Sleeping { .. } => true,
                // Moves under way report by themselves.
                Residency::Starting { .. }
                | Residency::Stopping
                | Residency::FallingAsleep
                | Residency::Waking
                | Residency::Lost { .. } => continue,
            };
            (instance.drain, instance.release) = (None, None);
            instance.enter(Residency::Lost { asleep }, now);
            self.close_gate(id);
            let waking = self.swaps.values().find(|s| s.is_load() && s.instance == id);
            if let Some(swap) = waking.map(|s| s.id) {
                self.cancel_swap(swap, "its runtime does not answer");
            }
            self.changed();
        }
    }

    pub(super) fn runtime_back(&mut self, alive: &[InstanceId], dead: &[InstanceId]) {
        let lost: Vec<(InstanceId, bool)> = self
            .instances
            .values()
            .filter_map(|i| match i.residency {
                Residency::Lost { asleep } => Some((i.id, asleep)),
                Residency::Starting { .. }
                | Residency::Ready
                | Residency::Draining
                | Residency::Stopping
                | Residency::FallingAsleep
                | Residency::Sleeping { .. }
                | Residency::Waking => None,
            })
            .collect();
        let now = self.now;
        // Some became ready meanwhile by an answer that was under way.
        let unknown = lost.iter().map(|(id, _)| id).filter(|id| !alive.contains(id));
        let gone: BTreeSet<InstanceId> = unknown.chain(dead).copied().collect();
        for &id in &gone {
            let message = "it was gone when its runtime answered again";
            self.died(id, Fault::new(FaultKind::RuntimeUnreachable, message));
        }
        for (id, asleep) in lost {
            if gone.contains(&id) {
                continue;
            }
            if let Some(instance) = self.instances.get_mut(&id) {
                let level = instance.can_sleep().unwrap_or(1);
                let next = if asleep { Residency::Sleeping { level } } else { Residency::Ready };
                instance.enter(next, now);
                self.changed();
            }
        }
        // What could not be stopped while the runtime was away is tried again now.
        for instance in self.instances.values_mut().filter(|i| i.stop_retry.is_some()) {
            instance.stop_retry = Some(now);
        }
    }

    /// A reload: only what changed is touched.
    pub(super) fn catalog_changed(&mut self, catalog: Arc<Catalog>) {
        let before = std::mem::replace(&mut self.catalog, Arc::clone(&catalog));
        for name in before.models.keys().filter(|name| !catalog.models.contains_key(*name)) {
            self.refuse_model(name, &Refusal::Removed);
            self.abandon_starts(name, "removed from the configuration");
            self.forget_removed(name);
        }
        for (name, spec) in &catalog.models {
            let state = self.models.entry(name.clone()).or_default();
            let Some(old) = before.models.get(name).filter(|old| !old.is_same(spec)) else {
                continue;
            };
            (state.failure, state.failures, state.deaths) = (None, 0, 0);
            if !spec.runs_like(old) {
                state.service = Service::default();
                state.learned.forget_bytes();
            }
            if !spec.starts_like(old) {
                self.abandon_starts(name, "its configuration changed");
            }
        }
        self.apply_policy();
        self.changed();
    }

    /// What runs as it would be started now goes on, under the new entry from here on.
    fn apply_policy(&mut self) {
        let (mut resized, mut reckoned) = (Vec::new(), Vec::new());
        for instance in self.instances.values_mut() {
            let spec = self.catalog.model(&instance.model);
            let Some(spec) = spec.filter(|spec| spec.runs_like(&instance.spec)) else { continue };
            if spec.vram != instance.spec.vram {
                resized.push(instance.id);
            }
            if spec.ram != instance.spec.ram && instance.launched {
                reckoned.push(instance.id);
            }
            instance.spec = Arc::clone(spec);
        }
        for id in reckoned {
            self.ram_anew(id);
        }
        // Twice: those that shrink make room for those that grow.
        for id in resized.repeat(2) {
            self.promise_anew(id);
        }
        self.spare_pinned();
    }

    /// It runs as it is configured now: `apply_policy` gave it the very entry.
    pub(super) fn is_current(&self, instance: &Instance) -> bool {
        self.catalog.model(&instance.model).is_some_and(|spec| Arc::ptr_eq(spec, &instance.spec))
    }

    /// The footprint of a running engine is another than it was promised (declared anew, or
    /// learned), which it knows nothing of: more is promised as far as there is room, less only
    /// down to what it was seen to hold.
    pub(super) fn promise_anew(&mut self, id: InstanceId) {
        let Some(instance) = self.instances.get(&id) else { return };
        let runs = match instance.residency {
            Residency::Ready | Residency::Draining | Residency::Lost { asleep: false } => true,
            Residency::Starting { .. }
            | Residency::Stopping
            | Residency::FallingAsleep
            | Residency::Sleeping { .. }
            | Residency::Waking
            | Residency::Lost { asleep: true } => false,
        };
        let (true, Some(promise), Some(&gpu)) = (runs, instance.promise, instance.gpus.first())
        else {
            return;
        };
        let Some(need) = self.need(&instance.spec, gpu).filter(|need| !need.elastic) else {
            return;
        };
        let learned = self.models.get(&instance.model).and_then(|m| m.learned.footprint);
        let least = instance.measured.max(learned).unwrap_or(promise);
        let others = |gpu: &GpuId| self.promised(*gpu) - self.promise_on(instance, *gpu);
        let room = instance.gpus.iter().map(|gpu| self.capacity(*gpu) - others(gpu)).min();
        let most = room.unwrap_or_default().max(promise);
        let bytes = need.bytes.max(least).min(most);
        if let Some(instance) = self.instances.get_mut(&id) {
            instance.promise = Some(bytes);
        }
    }

    fn abandon_starts(&mut self, name: &ModelName, why: &str) {
        let starting: Vec<InstanceId> = self
            .instances
            .values()
            .filter(|i| i.model == *name)
            .filter(|i| matches!(i.residency, Residency::Starting { .. } | Residency::Waking))
            .map(|i| i.id)
            .collect();
        for id in starting {
            self.cancel_start(id, why, SwapCause::Reload);
        }
        // A swap that would wake a sleeper.
        let waking = self.load_of(name).filter(|s| !s.started).map(|s| s.id);
        if let Some(swap) = waking {
            self.cancel_swap(swap, why);
        }
    }

    /// Drops the state of a model that is configured no more and has no instance left.
    pub(super) fn forget_removed(&mut self, name: &ModelName) {
        let in_use = self.catalog.models.contains_key(name)
            || self.instances.values().any(|i| i.model == *name);
        if !in_use {
            self.models.remove(name);
            self.blocked.remove(name);
        } else if self.current(name).is_none()
            && let Some(state) = self.models.get_mut(name)
        {
            state.since = self.now;
        }
    }

    /// Refuses everything that waits; starts nothing more. Instances are the owner's to keep or
    /// stop.
    pub(super) fn shut_down(&mut self) {
        self.shutting_down = true;
        let names: Vec<ModelName> = self.models.keys().cloned().collect();
        for name in names {
            self.refuse_model(&name, &Refusal::ShuttingDown);
        }
        for ask in self.asks.keys().copied().collect::<Vec<_>>() {
            self.emit(Action::Answer {
                ask,
                answer: super::action::Answer::Refused(Refusal::ShuttingDown),
            });
        }
        self.asks.clear();
        let unstarted: Vec<_> = self
            .swaps
            .values()
            .filter(|s| s.is_load() && !s.started && !s.vacated)
            .map(|s| s.id)
            .collect();
        for swap in unstarted {
            self.cancel_swap(swap, "Wharf is shutting down");
        }
    }
}
