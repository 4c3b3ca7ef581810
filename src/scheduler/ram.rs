//! Host RAM: one more place whose bytes are promised.
//!
//! An instance is promised what its model takes (`host_use`: declared, then learned) from the
//! decision to start it until its end is proven, and on top of that its weights from falling asleep at level 1 until it is awake
//! again or gone. Its end is proof enough: the kernel frees a process's memory at its exit, and
//! what stays in the page cache gives way to whoever asks. So nothing here waits for bytes to
//! come back, as `proof` does for GPUs.
//!
//! Without a known total there is no limit; without a sample only promises count.

use super::Scheduler;
use super::action::Refusal;
use super::record::RamView;
use super::residency::{Instance, Residency};
use super::swap::StartBlock;
use crate::config::catalog::{ModelSpec, Vram};
use crate::units::{Bytes, GpuId, SwapId};

/// Stands for the host's RAM among the places that swaps claim and that the urgent wait for.
pub(super) const HOST: GpuId = GpuId(u16::MAX - 1);

/// Host bytes that may be available after somebody left.
pub(super) struct Expected {
    pub likely: Bytes,
    pub possible: Bytes,
    /// Still promised then.
    pub stays: Bytes,
}

impl Instance {
    /// Host bytes promised to it.
    pub(super) fn ram(&self) -> Bytes {
        if !self.launched || !self.may_run() {
            return Bytes::ZERO;
        }
        self.ram_own + self.weights
    }

    /// " and 8.0 GiB of host RAM": what it gives back beside its GPUs.
    pub(super) fn ram_text(&self) -> String {
        match self.ram() {
            Bytes::ZERO => String::new(),
            ram => format!(" and {ram} of host RAM"),
        }
    }
}

impl Scheduler {
    /// What may be promised; `None`: unknown, so no limit.
    pub(super) fn ram_capacity(&self) -> Option<Bytes> {
        let settings = &self.catalog.settings.ram;
        Some(settings.total.or(self.memory.host_total)? - settings.reserve)
    }

    pub(super) fn ram_promised(&self) -> Bytes {
        self.instances.values().map(Instance::ram).sum()
    }

    /// Promised to instances that are certain to end and not yet late.
    pub(super) fn ram_leaving(&self) -> Bytes {
        let leaving = |i: &&Instance| i.is_stopping() && i.trouble.is_none();
        self.instances.values().filter(leaving).map(Instance::ram).sum()
    }

    /// Needs of swaps that have chosen their place and have not started yet.
    pub(super) fn ram_spoken(&self, except: Option<SwapId>) -> Bytes {
        self.swaps
            .values()
            .filter(|s| Some(s.id) != except && s.claims(self.now) && !s.started && s.is_load())
            .filter_map(|s| self.catalog.model(&s.model))
            .map(|spec| self.ram_need(spec))
            .sum()
    }

    /// What becoming ready would take. A sleeper has it already.
    pub(super) fn ram_need(&self, spec: &ModelSpec) -> Bytes {
        let holds = self.current(&spec.name).is_some_and(|i| i.launched);
        if holds { Bytes::ZERO } else { self.ram_of(spec) }
    }

    /// What falling asleep would take: at level 1 the weights go to host RAM. Their size is what
    /// `size_gb` says, else all that would leave the GPUs.
    pub(super) fn ram_to_sleep(&self, instance: &Instance) -> Bytes {
        if instance.can_sleep() != Some(1) {
            return Bytes::ZERO;
        }
        let learned = self.models.get(&instance.model).map(|m| &m.learned);
        let promise = instance.promise.unwrap_or_default();
        let awake = match instance.spec.vram {
            Vram::Declared(_) => promise,
            Vram::Unknown | Vram::Rest => {
                learned.and_then(|l| l.footprint).map_or(promise, |seen| seen.min(promise))
            }
        };
        let leaves = awake - learned.and_then(|l| l.asleep).unwrap_or_default();
        let all: Bytes = instance.gpus.iter().map(|_| leaves).sum();
        let weights = instance.spec.size_gb.map(|gb| Bytes((gb * 1e9) as u64));
        weights.map_or(all, |weights| weights.min(all))
    }

    /// Starts and sleeps under way: their bytes may not show in samples.
    fn ram_loading(&self) -> Bytes {
        let loading = |i: &Instance| match i.residency {
            Residency::FallingAsleep => i.weights,
            // What it takes on the GPUs leaves the host.
            Residency::Waking => Bytes::ZERO,
            Residency::Starting { .. }
            | Residency::Ready
            | Residency::Draining
            | Residency::Stopping
            | Residency::Sleeping { .. }
            | Residency::Lost { .. } => {
                if i.unvouched {
                    i.ram()
                } else {
                    Bytes::ZERO
                }
            }
        };
        self.instances.values().map(loading).sum()
    }

    /// Available bytes less the reserve, if they were sampled after the last start, stop or sleep.
    fn ram_sampled(&self) -> Option<Bytes> {
        let sample = self.memory.sample.as_ref()?;
        let fresh = self.memory.changed_last.is_none_or(|changed| sample.taken_at > changed);
        let available = sample.host.filter(|_| fresh)?.available;
        Some(available - self.catalog.settings.ram.reserve)
    }

    /// What plans may count on once `leaving` of what is promised has ended: the last sample and
    /// what came free since, less the reserve. (A start is stricter: it waits for a sample that
    /// shows it.) Who leaves gives back what it really took, at most its promise: so much is
    /// possible; beside what others seem to hold, only what nobody is promised is likely.
    pub(super) fn ram_expected(&self, leaving: Bytes) -> Option<Expected> {
        let host = self.memory.sample.as_ref()?.host?;
        let reserve = self.catalog.settings.ram.reserve;
        let stays = self.ram_promised() - leaving;
        let loading = self.ram_loading().min(stays);
        let now = (host.available + self.memory.host_freed) - reserve - loading;
        let unpromised = host.total - reserve - self.memory.host_others - stays;
        let possible = now + leaving;
        Some(Expected { likely: now.max(unpromised.min(possible)), possible, stays })
    }

    /// A new sample: others hold at least what all our promises do not explain, and at most all
    /// that is in use.
    pub(super) fn ram_seen(&mut self) {
        let host = self.memory.sample.as_ref().and_then(|sample| sample.host);
        let (Some(host), Some(_)) = (host, self.ram_sampled()) else { return };
        self.memory.host_freed = Bytes::ZERO;
        let used = host.total - host.available;
        let least = used - self.ram_promised();
        self.memory.host_others = self.memory.host_others.max(least).min(used);
    }

    /// Whether so many bytes may be taken at this moment.
    pub(super) fn has_ram(&self, bytes: Bytes) -> bool {
        let promised = || self.ram_promised() + bytes;
        bytes == Bytes::ZERO
            || (self.ram_capacity().is_none_or(|capacity| promised() <= capacity)
                && self.ram_sampled().is_none_or(|left| left >= self.ram_loading() + bytes))
    }

    /// Whether a start has to wait for host RAM, and for what.
    pub(super) fn ram_block(&self, target: &Instance) -> Result<(), StartBlock> {
        let need = self.ram_of(&target.spec);
        if target.launched || need == Bytes::ZERO {
            return Ok(());
        }
        if self.ram_capacity().is_some_and(|capacity| self.ram_promised() + need > capacity) {
            return Err(self.ram_why_short());
        }
        if !self.is_ram_sampled() {
            return Ok(());
        }
        let left = self.ram_sampled().ok_or(StartBlock::NoSample)?;
        let loading = self.ram_loading();
        if left >= loading + need {
            Ok(())
        } else if left >= need {
            Err(StartBlock::Moving("another model takes its host RAM first".to_owned()))
        } else {
            let why = self.ram_why_short();
            Err(if why == StartBlock::Stale { StartBlock::Held } else { why })
        }
    }

    /// Somebody is about to end, cannot be made to, or has to be chosen (or waited for).
    fn ram_why_short(&self) -> StartBlock {
        let mut ending = self.instances.values().filter(|i| i.is_stopping());
        match ending.clone().find(|i| i.ram() > Bytes::ZERO && i.trouble.is_none()) {
            Some(leaves) => StartBlock::Process(format!("{} to stop", leaves.model)),
            None if ending.any(|i| i.ram() > Bytes::ZERO) => StartBlock::Unproven,
            None => StartBlock::Stale,
        }
    }

    pub(super) fn is_ram_sampled(&self) -> bool {
        self.memory.sample.as_ref().is_some_and(|sample| sample.host.is_some())
    }

    /// Set if the host could never hold the model beside the pinned ones.
    pub(super) fn ram_cannot_fit(&self, spec: &ModelSpec) -> Option<Refusal> {
        let (need, capacity) = (self.ram_need(spec), self.ram_capacity()?);
        let pinned = |i: &&Instance| {
            i.model != spec.name && self.stays_for_good(&spec.name, i) && !i.is_stopping()
        };
        let held: Bytes = self.instances.values().filter(pinned).map(Instance::ram).sum();
        let others = self.catalog.models.values().filter(|m| self.pins(m) && m.name != spec.name);
        let available = capacity - held.max(others.map(|other| self.ram_of(other)).sum());
        let pinned = self.pinned_beside(&spec.name);
        (need > available).then_some(Refusal::CannotFit {
            need,
            available,
            gpus: 0,
            host: true,
            pinned,
        })
    }

    /// "12.0 GiB of host RAM are needed, …", if that is what a start waits for.
    pub(super) fn ram_text(&self, spec: &ModelSpec) -> Option<String> {
        let need = self.ram_need(spec);
        let host = self.memory.sample.as_ref()?.host?;
        let reserve = self.catalog.settings.ram.reserve;
        (need > host.available - reserve).then(|| {
            format!(
                "{need} of host RAM are needed, {} of {} are available and {reserve} stay in \
                 reserve; other programs hold the rest",
                host.available, host.total
            )
        })
    }

    pub(super) fn ram_view(&self) -> RamView {
        let host = self.memory.sample.as_ref().and_then(|sample| sample.host);
        RamView {
            total: self.catalog.settings.ram.total.or(self.memory.host_total),
            available: host.map(|host| host.available),
            promised: self.ram_promised(),
            promised_to: self
                .instances
                .values()
                .filter(|i| i.ram() > Bytes::ZERO)
                .map(|i| i.model.clone())
                .collect(),
        }
    }
}
