//! What is promised on each GPU, what samples say, and when a release counts as proven.
//!
//! A promise runs from the start or wake to the proof of release. Samples guard against what
//! nobody promised: strangers, and engines that take more than they said. A release is proven
//! when the instance's own processes hold nothing any more and the bytes are back, by a sample
//! taken after the stop or sleep completed.

use std::collections::BTreeMap;

use super::Scheduler;
use super::action::Action;
use super::event::{GpuMemory, Holder, MemorySample, NoProof};
use super::proof::own_bytes;
use super::residency::{Instance, MoveKind};
use crate::config::catalog::{EngineKind, GpuRequest, ModelSpec, Vram};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, Time};

/// Stands for the GPUs of a machine that shows none: room for one model.
pub(super) const UNSEEN: GpuId = GpuId(u16::MAX);

/// Smallest difference in used bytes that can mean anything (driver bookkeeping moves that much).
pub(super) const SLACK_MIN: Bytes = Bytes::mib(64);

#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    pub sample: Option<MemorySample>,
    pub no_proof: Option<NoProof>,
    /// When a move last changed what a GPU holds: older samples do not count.
    pub changed_at: BTreeMap<GpuId, Time>,
    /// When a move last changed what any GPU or the host holds.
    pub changed_last: Option<Time>,
    /// The host's RAM, as last told.
    pub host_total: Option<Bytes>,
    /// Host bytes that came free since the last sample, and do not show in it.
    pub host_freed: Bytes,
    /// Host bytes that others hold, as far as samples prove it.
    pub host_others: Bytes,
    /// Used bytes that no listed process holds, learned while nothing moved.
    pub unlisted: BTreeMap<GpuId, Bytes>,
}

/// Bytes a model needs on one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Need {
    pub bytes: Bytes,
    /// Takes whatever pinned models (and strangers) leave: no other model beside it.
    pub elastic: bool,
}

impl Scheduler {
    pub(super) fn is_blind(&self, gpu: GpuId) -> bool {
        self.total(gpu) == Bytes::ZERO
    }

    pub(super) fn total(&self, gpu: GpuId) -> Bytes {
        self.world.gpus.iter().find(|g| g.id == gpu).map_or(Bytes::ZERO, |g| g.total)
    }

    /// What may be promised on a GPU. One of unknown size has room for one token: one model.
    pub(super) fn capacity(&self, gpu: GpuId) -> Bytes {
        if self.is_blind(gpu) {
            return Bytes(1);
        }
        self.total(gpu) - self.catalog.settings.gpu.reserve
    }

    /// Capacity less what the driver keeps, as far as known.
    pub(super) fn usable(&self, gpu: GpuId) -> Bytes {
        self.capacity(gpu) - self.memory.unlisted.get(&gpu).copied().unwrap_or_default()
    }

    /// Bytes promised to one instance on one GPU.
    pub(super) fn promise_on(&self, instance: &Instance, gpu: GpuId) -> Bytes {
        match instance.promise {
            Some(bytes) if instance.gpus.contains(&gpu) => {
                if self.is_blind(gpu) {
                    Bytes(1)
                } else {
                    bytes
                }
            }
            Some(_) | None => Bytes::ZERO,
        }
    }

    /// Bytes a sleeper holds on one GPU by the newest sample: its promise may rest on a guess.
    pub(super) fn shown_on(&self, sleeper: &Instance, gpu: GpuId) -> Bytes {
        let listed = self.sampled(gpu).map(|m| own_bytes(sleeper, m)).unwrap_or_default();
        if listed > Bytes::ZERO { listed } else { self.promise_on(sleeper, gpu) }
    }

    /// Footprints of all instances on a GPU, until their release is proven.
    pub(super) fn promised(&self, gpu: GpuId) -> Bytes {
        self.instances.values().map(|i| self.promise_on(i, gpu)).sum()
    }

    /// Promised to instances that are certain to leave and not yet late.
    pub(super) fn leaving(&self, gpu: GpuId) -> Bytes {
        self.instances
            .values()
            .filter(|i| i.is_stopping() && i.trouble.is_none())
            .map(|i| self.promise_on(i, gpu))
            .sum()
    }

    /// What those who are certain to leave still hold, as far as known.
    pub(super) fn leaving_held(&self, gpu: GpuId) -> Bytes {
        self.instances
            .values()
            .filter(|i| i.is_stopping() && i.trouble.is_none())
            .filter(|i| i.gpus.contains(&gpu) && i.promise.is_some())
            .map(Instance::held)
            .sum()
    }

    /// Starts and wakes that are not vouched for: their bytes may not show in samples.
    pub(super) fn unvouched(&self, gpu: GpuId) -> Bytes {
        self.instances
            .values()
            .filter(|i| i.unvouched)
            .map(|i| self.promise_on(i, gpu) - i.residue)
            .sum()
    }

    /// Promised to those who do not leave for this model.
    pub(super) fn staying_promise(&self, spec: &ModelSpec, gpu: GpuId) -> Bytes {
        let stays = |i: &&Instance| self.stays_for(&spec.name, i) && !i.is_stopping();
        self.instances.values().filter(stays).map(|i| self.promise_on(i, gpu)).sum()
    }

    pub(super) fn is_pinned(&self, instance: &Instance) -> bool {
        self.catalog.model(&instance.model).is_some_and(|spec| self.pins(spec))
    }

    /// What a model needs on a GPU; `None` for one that uses none.
    pub(super) fn need(&self, spec: &ModelSpec, gpu: GpuId) -> Option<Need> {
        if !uses_gpu(spec) {
            return None;
        }
        if self.is_blind(gpu) {
            return Some(Need { bytes: Bytes(1), elastic: false });
        }
        // (One of an older entry does not wake any more.)
        let sleeper = self.current(&spec.name).filter(|i| i.awake > Bytes::ZERO);
        if let Some(sleeper) = sleeper.filter(|i| spec.is_same(&i.spec)) {
            return Some(Need { bytes: sleeper.awake, elastic: false });
        }
        let learned = self.models.get(&spec.name).map(|m| &m.learned);
        Some(match (spec.vram, learned.and_then(|l| l.footprint)) {
            (Vram::Declared(declared), _) => {
                let bytes = self.declared_or_learned(spec, gpu, declared, learned);
                Need { bytes, elastic: false }
            }
            (Vram::Unknown, Some(peak)) => {
                Need { bytes: self.with_margin(spec, gpu, peak), elastic: false }
            }
            // It may take anything: nobody else gets in until it is measured.
            (Vram::Unknown, None) => {
                Need { bytes: self.capacity(gpu) - self.staying_promise(spec, gpu), elastic: true }
            }
            (Vram::Rest, _) => Need { bytes: self.rest(spec, gpu), elastic: true },
        })
    }

    /// What pinned models leave on a GPU, those that are bound to it but not loaded included.
    fn rest(&self, spec: &ModelSpec, gpu: GpuId) -> Bytes {
        let mut taken = Bytes::ZERO;
        for other in self.catalog.models.values().filter(|m| self.pins(m) && m.name != spec.name) {
            let placed =
                self.current(&other.name).filter(|i| i.promise.is_some()).map(|i| i.gpus.clone());
            let here = placed.or_else(|| self.explicit(other)).map_or_else(
                || uses_gpu(other) && self.world.gpus.len() == 1,
                |gpus| gpus.contains(&gpu),
            );
            if here && let Some(bytes) = self.declared_need(other, gpu) {
                taken += bytes;
            } else if here && let Some(instance) = self.current(&other.name) {
                taken += self.promise_on(instance, gpu);
            }
        }
        let persists = |i: &&Instance| {
            !self.is_pinned(i)
                && !i.is_stopping()
                && self.catalog.persists_for(&i.model, &spec.name).is_some()
        };
        taken += self.instances.values().filter(persists).map(|i| self.promise_on(i, gpu)).sum();
        self.capacity(gpu) - taken
    }

    /// Free bytes of the last sample, if it was taken after the last change on this GPU.
    pub(super) fn fresh_free(&self, gpu: GpuId) -> Option<Bytes> {
        let sample = self.memory.sample.as_ref()?;
        let changed = self.memory.changed_at.get(&gpu);
        if changed.is_some_and(|&changed| sample.taken_at <= changed) {
            return None;
        }
        sample.gpus.iter().find(|m| m.gpu == gpu).map(|m| m.free)
    }

    pub(super) fn sampled(&self, gpu: GpuId) -> Option<&GpuMemory> {
        self.memory.sample.as_ref()?.gpus.iter().find(|m| m.gpu == gpu)
    }

    /// Something changed what these GPUs hold: wait for a newer sample.
    pub(super) fn memory_changed(&mut self, gpus: &[GpuId]) {
        self.memory.changed_last = Some(self.now);
        for &gpu in gpus {
            self.memory.changed_at.insert(gpu, self.now);
        }
    }

    pub(super) fn memory_seen(&mut self, result: Result<MemorySample, NoProof>) {
        match result {
            Err(no_proof) => {
                self.changed();
                if self.memory.no_proof.is_none() {
                    let text = format!("nothing starts until memory is read: {}", no_proof.message);
                    self.emit(Action::Notice { model: None, text });
                }
                self.memory.no_proof = Some(no_proof);
            }
            Ok(sample) => {
                if self.memory.no_proof.take().is_some() {
                    self.changed();
                    let text = "GPU memory can be read again: starts resume".to_owned();
                    self.emit(Action::Notice { model: None, text });
                    // The time without samples was nobody's fault.
                    for swap in self.swaps.values_mut() {
                        swap.memory_wait = None;
                    }
                }
                if self.memory.sample.as_ref().is_some_and(|old| old.taken_at > sample.taken_at) {
                    return;
                }
                if let Some(host) = sample.host.filter(|h| self.memory.host_total != Some(h.total))
                {
                    self.memory.host_total = Some(host.total);
                    self.note_capacity_cut();
                }
                self.memory.sample = Some(sample);
                self.ram_seen();
                self.note_host_use();
                self.note_holders();
                self.prove_releases();
                self.note_unlisted();
                self.advance_swaps();
            }
        }
    }

    /// Remembers which processes are whose, and the peaks.
    fn note_holders(&mut self) {
        let Some(sample) = &self.memory.sample else { return };
        let mut peaks: BTreeMap<InstanceId, Bytes> = BTreeMap::new();
        for gpu in &sample.gpus {
            let mut sums: BTreeMap<InstanceId, Bytes> = BTreeMap::new();
            for holder in &gpu.holders {
                if let Some(instance) = holder.instance.and_then(|id| self.instances.get_mut(&id)) {
                    if instance.pids.len() < 1024 {
                        instance.pids.insert(holder.pid);
                    }
                    *sums.entry(instance.id).or_default() += holder.bytes;
                }
            }
            for (id, bytes) in sums {
                let peak = peaks.entry(id).or_default();
                *peak = (*peak).max(bytes);
            }
        }
        for (id, bytes) in peaks {
            let serves = |i: &Instance| i.is_ready() || i.drain.is_some();
            if self.instances.get(&id).is_some_and(serves) {
                self.measured(id, bytes);
            }
        }
    }

    /// Learns what is used without a listed holder, on GPUs where nothing moves and the books
    /// agree: who died unheard of still has a promise, and would make it seem too small for ever.
    fn note_unlisted(&mut self) {
        let Some(sample) = &self.memory.sample else { return };
        let mut quiet = Vec::new();
        for gpu in &sample.gpus {
            let moves = |i: &Instance| {
                let vanished = !i.pids.is_empty() && own_bytes(i, gpu) == Bytes::ZERO;
                i.gpus.contains(&gpu.gpu)
                    && (i.moving.is_some_and(|m| m.kind.touches_memory())
                        || i.release.is_some()
                        || i.is_stopping()
                        || i.is_lost()
                        || vanished)
            };
            if self.instances.values().any(moves) || self.fresh_free(gpu.gpu).is_none() {
                continue;
            }
            let listed: Bytes = gpu.holders.iter().map(|h| h.bytes).sum();
            let ours: Bytes = self
                .instances
                .values()
                .filter(|i| own_bytes(i, gpu) == Bytes::ZERO)
                .map(|i| self.promise_on(i, gpu.gpu))
                .sum();
            let used = gpu.total - gpu.free;
            if used >= listed + ours {
                quiet.push((gpu.gpu, used - listed - ours));
            }
        }
        self.memory.unlisted.extend(quiet);
    }

    /// What a start of this model waits for, or who holds it.
    pub(super) fn memory_text(
        &self,
        model: &ModelName,
        gpus: &[GpuId],
        of: Option<InstanceId>,
    ) -> String {
        let ram = self.catalog.model(model).and_then(|spec| self.ram_text(spec));
        ram.unwrap_or_else(|| self.holder_text(gpus, of))
    }

    /// Who holds the memory: the instance's own processes if they are listed, else the largest
    /// holders that are none of ours.
    pub(super) fn holder_text(&self, gpus: &[GpuId], of: Option<InstanceId>) -> String {
        let own = of.and_then(|id| self.instances.get(&id));
        let listed = |ours: bool| {
            let mut holders: Vec<(GpuId, &Holder)> = gpus
                .iter()
                .filter_map(|&gpu| self.sampled(gpu))
                .flat_map(|m| m.holders.iter().map(move |h| (m.gpu, h)))
                .filter(|(_, h)| match (ours, own) {
                    (true, Some(own)) => h.instance == Some(own.id) || own.pids.contains(&h.pid),
                    (true, None) => false,
                    (false, _) => h.instance.is_none_or(|id| !self.instances.contains_key(&id)),
                })
                .collect();
            holders.sort_by_key(|(gpu, h)| (std::cmp::Reverse(h.bytes), *gpu, h.pid));
            name_holders(&holders, "held", |(gpu, h)| {
                format!("{} MiB on GPU {gpu}", h.bytes.as_mib())
            })
        };
        match listed(true).or_else(|| listed(false)) {
            Some(text) => text,
            None => match gpus.first().and_then(|&gpu| self.sampled(gpu)) {
                Some(m) => format!(
                    "{} MiB in use on GPU {} and no process listed as the holder",
                    (m.total - m.free).as_mib(),
                    m.gpu
                ),
                None => "no reading of the memory".to_owned(),
            },
        }
    }

    /// A vLLM instance measures free memory while it starts: nothing else may touch its GPUs.
    pub(super) fn profiling_on(&self, gpus: &[GpuId], except: InstanceId) -> Option<&Instance> {
        self.instances.values().find(|i| {
            i.id != except
                && i.spec.engine == EngineKind::Vllm
                && i.is_moving(MoveKind::Start)
                && i.gpus.iter().any(|gpu| gpus.contains(gpu))
        })
    }

    /// Any move that changes memory on these GPUs.
    pub(super) fn moving_on(&self, gpus: &[GpuId], except: InstanceId) -> Option<&Instance> {
        self.instances.values().find(|i| {
            i.id != except
                && i.promise.is_some()
                && i.gpus.iter().any(|gpu| gpus.contains(gpu))
                && (i.moving.is_some_and(|m| m.kind.touches_memory())
                    || (i.release.is_some() && i.trouble.is_none()))
        })
    }

    /// GPUs that the configuration names, in its order; `None` unless it names any.
    pub(super) fn explicit(&self, spec: &ModelSpec) -> Option<Vec<GpuId>> {
        let GpuRequest::Explicit(names) = &spec.gpus else { return None };
        let find = |name: &String| {
            let by_index = name.parse().ok().map(GpuId);
            let known =
                self.world.gpus.iter().find(|g| g.uuid == *name || Some(g.id) == by_index)?;
            Some(known.id)
        };
        Some(names.iter().filter_map(find).collect())
    }
}

pub(super) fn uses_gpu(spec: &ModelSpec) -> bool {
    !spec.is_external()
        && match &spec.gpus {
            GpuRequest::None => false,
            GpuRequest::Count(n) => *n > 0,
            GpuRequest::Explicit(names) => !names.is_empty(),
        }
}

/// "9.1 GiB still held by pid 4711 (vllm), 2.0 GiB by pid 12 (x) and 2 more"; `None`: nobody.
pub(super) fn name_holders(
    holders: &[(GpuId, &Holder)],
    held: &str,
    bytes: impl Fn(&(GpuId, &Holder)) -> String,
) -> Option<String> {
    const NAMED_MAX: usize = 3;
    let named = holders.iter().take(NAMED_MAX).enumerate().map(|(at, of)| {
        let verb = if at == 0 { format!(" {held}") } else { String::new() };
        format!("{}{verb} by pid {} ({})", bytes(of), of.1.pid, of.1.label)
    });
    let text = named.collect::<Vec<_>>().join(", ");
    match holders.len() {
        0 => None,
        n if n > NAMED_MAX => Some(format!("{text} and {} more", n - NAMED_MAX)),
        _ => Some(text),
    }
}
