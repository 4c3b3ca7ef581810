//! Memory is never promised twice: measured against what the machine really holds.

use wharf::scheduler::event::MemorySample;
use wharf::units::{Bytes, GpuId, InstanceId};

use super::{Checker, Told};
use crate::machine::{Machine, Real};

impl Checker {
    pub(super) fn sampled(&mut self, sample: &MemorySample) {
        let taken_at = sample.taken_at.0;
        self.no_proof = false;
        if taken_at < self.sampled_at {
            return;
        }
        self.sampled_at = taken_at;
        self.host_seen = sample.host.or(self.host_seen);
        for gpu in &sample.gpus {
            let strangers = gpu.holders.iter().filter(|holder| holder.instance.is_none());
            self.foreign_seen[usize::from(gpu.gpu.0)] = strangers.map(|holder| holder.bytes).sum();
        }
    }

    pub(super) fn start_fits(
        &mut self,
        instance: InstanceId,
        gpus: &[GpuId],
        footprint: Option<Bytes>,
        machine: &Machine,
    ) {
        let Some(inst) = machine.insts.get(&instance) else { return };
        if self.proof && !gpus.is_empty() {
            let blind = self.no_proof;
            self.require(!blind, || format!("{instance} starts though no memory can be read"));
        }
        let Some(footprint) = footprint else { return self.is_alone(instance, gpus, machine) };
        if inst.spec.vram == wharf::config::catalog::Vram::Rest {
            return self.room(instance, gpus, footprint, machine);
        }
        // Where the declaration is wrong nobody can be blamed.
        if inst.need <= footprint {
            self.room(instance, gpus, inst.need, machine);
        }
    }

    pub(super) fn wake_fits(&mut self, instance: InstanceId, gpus: &[GpuId], machine: &Machine) {
        let Some(inst) = machine.insts.get(&instance) else { return };
        let footprint = self.insts[&instance].footprint.unwrap_or(inst.need);
        // What it keeps asleep is a guess at times: the reserve may go into that.
        let reserve = self.catalog.settings.gpu.reserve;
        if inst.need <= footprint {
            self.room(instance, gpus, inst.need - reserve, machine);
        }
    }

    fn room(&mut self, instance: InstanceId, gpus: &[GpuId], need: Bytes, machine: &Machine) {
        let reserve = self.catalog.settings.gpu.reserve;
        for &gpu in gpus {
            let card = &machine.gpus[usize::from(gpu.0)];
            let others = machine.on(gpu).filter(|(id, inst)| {
                let seen = self.proof && inst.real != Real::Launching;
                **id != instance && (seen || !self.insts.get(id).is_some_and(|known| known.gamble))
            });
            let claimed: Bytes = others.map(|(_, inst)| inst.claim()).sum();
            let strange = if self.proof {
                card.base + self.foreign_seen[usize::from(gpu.0)]
            } else {
                Bytes::ZERO
            };
            let room = card.total - reserve - strange - claimed;
            self.require(need <= room, || {
                format!(
                    "{instance} gets {need} on GPU {gpu}, but beside {claimed} of ours, {strange} \
                     of others and the reserve only {room} are left"
                )
            });
        }
    }

    /// An instance of unknown size has its GPUs to itself, but for pinned ones (and for what the
    /// dead have not given back: samples show that).
    fn is_alone(&mut self, instance: InstanceId, gpus: &[GpuId], machine: &Machine) {
        let me = self.insts[&instance].model.clone();
        let pinned = |id: &InstanceId| self.stays_beside(&self.insts[id].model, &me);
        let gamble = self.live.iter().any(|id| {
            *id != instance && pinned(id) && self.insts[id].gpus.iter().any(|g| gpus.contains(g))
        });
        if let Some(known) = self.insts.get_mut(&instance) {
            known.gamble = gamble;
        }
        for &gpu in gpus {
            let beside = machine.on(gpu).find(|(id, inst)| {
                let told = self.insts.get(id).map_or(Told::Gone, |known| known.told);
                let there = !matches!(inst.real, Real::Gone | Real::Preparing);
                **id != instance
                    && !self.stays_beside(&inst.model, &me)
                    && there
                    && told != Told::Preparing
            });
            let beside = beside.map(|(id, _)| *id);
            self.require(beside.is_none(), || {
                format!("{instance} has no known size, but starts beside {beside:?} on GPU {gpu}")
            });
        }
    }
}
