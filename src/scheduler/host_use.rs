//! What a model takes of the host's RAM: as declared, then as its processes or its container were
//! seen to take.
//!
//! Two peaks count. What cannot give way (anonymous and shared memory) is promised at least,
//! declared or not: it is taken in any case. A larger declaration is replaced by all that was
//! resident, mapped weights included, once the peak is seasoned (see `footprint`). Measured is
//! while a model serves and before it first slept: weights of sleepers are promised on top.

use super::Scheduler;
use super::event::HostUse;
use super::footprint::margin;
use super::residency::Instance;
use crate::config::catalog::ModelSpec;
use crate::units::{Bytes, InstanceId};

impl Scheduler {
    /// Host bytes that a model takes while it runs. What runs elsewhere takes nothing here.
    pub(super) fn ram_of(&self, spec: &ModelSpec) -> Bytes {
        if spec.is_external() || spec.adapter.is_some() {
            return Bytes::ZERO;
        }
        let learned = self.models.get(&spec.name).map(|m| &m.learned);
        let pins = self.pins(spec);
        let with_margin = |peak: Bytes| if pins { peak } else { peak + margin(peak) };
        let peak = learned.and_then(|l| l.ram_held).unwrap_or_default();
        // The margin must not keep it from where it ran: beside the pinned ones.
        let pinned = self
            .instances
            .values()
            .filter(|i| i.model != spec.name && self.is_pinned(i) && !i.is_stopping());
        let beside: Bytes = pinned.map(Instance::ram).sum();
        let room = self.ram_capacity().map(|capacity| (capacity - beside).max(peak));
        let held = with_margin(peak).min(room.unwrap_or(with_margin(peak)));
        let seasoned = learned.filter(|l| l.seasoned).and_then(|l| l.ram_resident);
        let declared = spec.ram.unwrap_or_default();
        let most = seasoned.map_or(declared, |peak| with_margin(peak).min(declared));
        // It ran: what was learned must not keep it out of an empty machine.
        let capacity = self.ram_capacity().unwrap_or(held);
        most.max(held.min(capacity.max(declared)))
    }

    /// A sample told what our instances hold.
    pub(super) fn note_host_use(&mut self) {
        let Some(sample) = &self.memory.sample else { return };
        for (id, used) in sample.ram.clone() {
            self.host_use_seen(id, used);
        }
    }

    fn host_use_seen(&mut self, id: InstanceId, used: HostUse) {
        let Some(instance) = self.instances.get(&id).filter(|i| self.is_current(i)) else { return };
        if !instance.is_ready() || instance.slept || instance.spec.is_external() {
            return;
        }
        let model = instance.model.clone();
        let Some(state) = self.models.get_mut(&model) else { return };
        let learned = &mut state.learned;
        let grew = learned.ram_held.is_none_or(|known| used.held > known)
            || learned.ram_resident.is_none_or(|known| used.resident > known);
        if grew {
            learned.ram_held = learned.ram_held.max(Some(used.held));
            learned.ram_resident = learned.ram_resident.max(Some(used.resident));
            self.remember(&model);
        }
        // (It makes the promise anew, too.)
        if !self.season(id) && grew {
            self.ram_anew(id);
        }
    }

    /// What a running instance takes is another than it was promised: more as far as there is
    /// room, less at once.
    pub(super) fn ram_anew(&mut self, id: InstanceId) {
        let Some(instance) = self.instances.get(&id).filter(|i| i.launched && i.may_run()) else {
            return;
        };
        let (wanted, had) = (self.ram_of(&instance.spec), instance.ram_own);
        let room = self.ram_capacity().map(|most| most - (self.ram_promised() - had));
        let granted = wanted.min(room.unwrap_or(wanted).max(had));
        if let Some(instance) = self.instances.get_mut(&id) {
            instance.ram_own = granted;
        }
    }
}
