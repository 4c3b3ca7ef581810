//! When the gateway may take leases by itself: a gate is open while its instance is ready, has
//! no notice and nobody waits for it.

use super::Scheduler;
use super::action::Action;
use super::event::GateCount;
use super::quiet::Touched;
use super::residency::{Instance, Residency};
use crate::units::InstanceId;

impl Scheduler {
    pub(super) fn gate_seen(&mut self, id: InstanceId, count: GateCount) {
        let Some(instance) = self.instances.get(&id) else { return };
        let (served, idle) = (self.only_serves(instance), self.is_idle(instance));
        let ended = count.granted.saturating_sub(u64::from(count.in_flight));
        self.count_service(id, ended.saturating_sub(instance.ended()));
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let before = std::mem::replace(&mut instance.gate.count, count);
        instance.gate.unconfirmed = false;
        let (model, was_idle) = (instance.model.clone(), before.in_flight == 0);
        let is_idle = self.instances.get(&id).is_some_and(|i| self.is_idle(i));
        if served && !idle && !is_idle {
            self.touched = Touched { instance: Some(id), model: None };
            self.progressed();
        } else {
            self.changed();
        }
        if count.granted > before.granted {
            self.last_demand = self.now;
            if was_idle && before.granted > 0 {
                let gap = count.last_used.since(before.last_used);
                self.learn_gap(&model, gap);
            }
        }
    }

    pub(super) fn sync_gates(&mut self) {
        // Somebody waits for a model that has no room yet.
        let watch_victims = !self.standing.candidates.is_empty();
        let ids: Vec<InstanceId> = self.instances.keys().copied().collect();
        for id in ids {
            self.sync_gate(id, watch_victims);
        }
    }

    pub(super) fn sync_gate(&mut self, id: InstanceId, watch_victims: bool) {
        let Some(instance) = self.instances.get(&id) else { return };
        let queued = self.queue_len(&instance.model) > 0 || self.all_gates_wait();
        let open = instance.is_ready() && !queued && !self.shutting_down;
        let watched = self.is_watched(instance, queued, watch_victims);
        let (was_open, was_watched) = (instance.gate.open, instance.gate.watched);
        let permits = instance.permits();
        let is_as_wide = instance.gate.permits == permits;
        if watched != was_watched {
            if let Some(instance) = self.instances.get_mut(&id) {
                instance.gate.watched = watched;
            }
            self.emit(Action::WatchGate { instance: id, every_release: watched });
        }
        if open && !(was_open && is_as_wide) {
            if let Some(instance) = self.instances.get_mut(&id) {
                (instance.gate.open, instance.gate.permits) = (true, permits);
                instance.gate.unconfirmed = false;
            }
            self.emit(Action::OpenGate { instance: id, permits });
        } else if !open && was_open {
            self.close_gate(id);
        }
    }

    /// Somebody waits for a place here, or for the room of whoever is idle first.
    fn is_watched(&self, instance: &Instance, queued: bool, watch_victims: bool) -> bool {
        match instance.residency {
            Residency::Ready => {
                let victim = watch_victims && !self.is_pinned(instance);
                (queued && instance.spec.concurrency.is_some()) || victim || instance.hold.is_some()
            }
            Residency::Draining => queued,
            Residency::Starting { .. }
            | Residency::Stopping
            | Residency::FallingAsleep
            | Residency::Sleeping { .. }
            | Residency::Waking
            | Residency::Lost { .. } => false,
        }
    }
}
