//! Proof of release: when the bytes of an instance that stopped or fell asleep count as free.
//!
//! Its own processes, where they are listed, must hold nothing any more; then the bytes must be
//! back, by a sample taken after the stop or sleep completed. What is late stays promised, and
//! its holder is named.

use std::time::Duration;

use super::Scheduler;
use super::action::Action;
use super::event::{Fault, FaultKind, GpuMemory};
use super::memory::SLACK_MIN;
use super::residency::{Instance, MoveKind, Release};
use crate::units::{Bytes, InstanceId, Time};

/// After this long a sleeper has given back what it will.
const SETTLED: Duration = Duration::from_millis(500);

impl Scheduler {
    pub(super) fn prove_releases(&mut self) {
        let ids: Vec<InstanceId> =
            self.instances.values().filter(|i| i.release.is_some()).map(|i| i.id).collect();
        for id in ids {
            self.measure_residue(id);
            if self.is_release_proven(id) {
                self.released(id);
            }
        }
    }

    /// What a sleeper keeps is not known in advance: what it is listed with once it has settled
    /// is its residue.
    fn measure_residue(&mut self, id: InstanceId) {
        let Some(instance) = self.instances.get(&id).filter(|i| i.is_sleeping()) else { return };
        let settled = |r: &Release| r.keep_guessed && self.now.since(r.since) >= SETTLED;
        if !instance.release.as_ref().is_some_and(settled) {
            return;
        }
        let listed = |gpu| self.sampled(gpu).map(|m| own_bytes(instance, m));
        let residue = instance.gpus.iter().filter_map(|&gpu| listed(gpu)).max();
        let Some(residue) = residue.filter(|&r| r > Bytes::ZERO) else { return };
        if let Some(release) = self.instances.get_mut(&id).and_then(|i| i.release.as_mut()) {
            (release.keep, release.keep_guessed) = (residue, false);
        }
        self.learn_residue(id, residue);
    }

    fn is_release_proven(&self, id: InstanceId) -> bool {
        let Some(instance) = self.instances.get(&id) else { return false };
        let (Some(release), Some(sample)) = (&instance.release, &self.memory.sample) else {
            return false;
        };
        if !self.must_prove(instance) {
            return true;
        }
        sample.taken_at > release.since
            && instance.gpus.iter().all(|&gpu| {
                self.is_blind(gpu)
                    || self.sampled(gpu).is_some_and(|m| self.is_released_on(instance, release, m))
            })
    }

    fn is_released_on(&self, instance: &Instance, release: &Release, gpu: &GpuMemory) -> bool {
        let held = instance.held();
        // Driver bookkeeping drifts: after a while most of the bytes are enough.
        let patience = self.catalog.settings.swap.vram_timeout / 2;
        let share = if self.now.since(release.since) < patience { 20 } else { 4 };
        let slack = SLACK_MIN.max(Bytes(held.0 / share));
        let own = own_bytes(instance, gpu);
        if own > release.keep + if release.keep > Bytes::ZERO { slack } else { Bytes::ZERO } {
            return false;
        }
        if own > Bytes::ZERO {
            return true;
        }
        let used = gpu.total - gpu.free;
        let strangers: Bytes = self.stranger_bytes(gpu);
        let unlisted = self.memory.unlisted.get(&gpu.gpu).copied().unwrap_or_default();
        let others: Bytes = self
            .instances
            .values()
            .filter(|i| i.id != instance.id)
            .map(|i| {
                let listed = own_bytes(i, gpu);
                let settled = i.release.is_none() || i.trouble.is_some();
                if listed > Bytes::ZERO || i.unvouched || !settled {
                    listed
                } else {
                    self.promise_on(i, gpu.gpu)
                }
            })
            .sum();
        let back_to = |before: &Bytes| gpu.free + slack >= *before + (held - release.keep);
        used <= others + strangers + unlisted + release.keep + slack
            || release.free_before.get(&gpu.gpu).is_some_and(back_to)
    }

    /// Listed bytes of processes that are none of ours.
    pub(super) fn stranger_bytes(&self, gpu: &GpuMemory) -> Bytes {
        let ours = |pid: u32| self.instances.values().any(|i| i.pids.contains(&pid));
        gpu.holders.iter().filter(|h| h.instance.is_none() && !ours(h.pid)).map(|h| h.bytes).sum()
    }

    /// Where memory cannot be read, the end of the process is the proof.
    pub(super) fn must_prove(&self, instance: &Instance) -> bool {
        self.world.proof
            && instance.promise.is_some()
            && instance.gpus.iter().any(|&gpu| !self.is_blind(gpu))
    }

    /// Starts to wait for the bytes of an instance that stopped or fell asleep.
    /// `residue`: what a sleeper said it keeps.
    pub(super) fn expect_release(&mut self, id: InstanceId, residue: Option<Bytes>, began: Time) {
        let Some(instance) = self.instances.get(&id) else { return };
        let keep = match instance.is_sleeping() {
            true => residue.unwrap_or_else(|| self.residue_expected(instance)),
            false => Bytes::ZERO,
        };
        let keep = keep.min(instance.promise.unwrap_or_default());
        let gpus = instance.gpus.clone();
        if instance.is_stopping() {
            self.memory.host_freed += instance.ram();
        }
        let free_before = gpus
            .iter()
            .filter_map(|&gpu| Some((gpu, self.sampled(gpu)?.free)))
            .filter(|_| self.memory.sample.as_ref().is_some_and(|s| s.taken_at <= began))
            .collect();
        let now = self.now;
        if let Some(instance) = self.instances.get_mut(&id) {
            let keep_guessed = instance.is_sleeping() && residue.is_none();
            instance.unvouched = false;
            instance.release = Some(Release { since: now, keep, keep_guessed, free_before, began });
        }
        self.memory_changed(&gpus);
        let proven = self.instances.get(&id).is_some_and(|i| !self.must_prove(i));
        if proven {
            self.released(id);
        }
    }

    /// The release is proven: the promise ends (or shrinks to the residue).
    fn released(&mut self, id: InstanceId) {
        self.changed();
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let Some(release) = instance.release.take() else { return };
        let (model, took) = (instance.model.clone(), self.now.since(release.began));
        if instance.is_sleeping() {
            instance.promise = Some(release.keep);
            instance.residue = release.keep;
            instance.trouble = None;
            self.learn_move(&model, MoveKind::Sleep, took);
            return;
        }
        let was_up = instance.served;
        if instance.trouble.is_some() {
            let text = format!("memory of {model} came back after {} s", took.as_secs());
            self.emit(Action::Notice { model: Some(model.clone()), text });
        } else if was_up {
            self.learn_move(&model, MoveKind::Stop, took);
        }
        self.instances.remove(&id);
        self.answer_unloaded(id);
        self.forget_removed(&model);
    }

    /// Releases that are late: their bytes stay promised and the holder is named.
    pub(super) fn expire_releases(&mut self) {
        let timeout = self.catalog.settings.swap.vram_timeout;
        let late: Vec<InstanceId> = self
            .instances
            .values()
            .filter(|i| i.trouble.is_none() && self.memory.no_proof.is_none())
            .filter(|i| i.release.as_ref().is_some_and(|r| r.since + timeout <= self.now))
            .map(|i| i.id)
            .collect();
        for id in late {
            let fault = self.never_freed(id, timeout);
            let Some(instance) = self.instances.get_mut(&id) else { continue };
            let (model, text) = (instance.model.clone(), fault.message.clone());
            if instance.is_sleeping() {
                // It sleeps and keeps more than it should: take it away whole.
                instance.release = None;
                self.stop_sleeper(id);
            } else {
                instance.trouble = Some(fault);
            }
            self.changed();
            self.emit(Action::Notice { model: Some(model), text });
        }
    }

    fn never_freed(&self, id: InstanceId, waited: Duration) -> Fault {
        let (model, gpus) = self
            .instances
            .get(&id)
            .map_or((String::new(), Vec::new()), |i| (i.model.to_string(), i.gpus.clone()));
        let message = format!(
            "GPU memory of {model} was not freed within {} s of its end: {}",
            waited.as_secs(),
            self.holder_text(&gpus, Some(id))
        );
        Fault::new(FaultKind::VramNeverFreed, message)
    }
}

/// Bytes that processes of this instance are listed with.
pub(super) fn own_bytes(instance: &Instance, gpu: &GpuMemory) -> Bytes {
    gpu.holders
        .iter()
        .filter(|h| match h.instance {
            Some(id) => id == instance.id,
            None => instance.pids.contains(&h.pid),
        })
        .map(|h| h.bytes)
        .sum()
}
