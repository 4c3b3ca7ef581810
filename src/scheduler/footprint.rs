//! What a model takes of a GPU: as declared, then as measured while it served.
//!
//! A peak above the declaration counts at once: the engine takes it whatever was said. A peak
//! below it replaces the declaration only once it is *seasoned*: measured in a residency that
//! answered [`SEASONED_REQUESTS`] requests and lasted [`SEASONED_AFTER`], for an engine may grow
//! until it has seen its longest prompt. For vLLM a declaration is a command
//! (`--gpu-memory-utilization` follows from it), so it is never lowered, and what vLLM is told
//! stays what was declared, however much more it was seen to hold.

use std::time::Duration;

use super::Scheduler;
use super::event::Learned;
use crate::config::catalog::{EngineKind, ModelSpec, Vram};
use crate::units::{Bytes, GpuId, InstanceId};

/// On top of a learned footprint.
const LEARNED_MARGIN_PERCENT: u64 = 5;
/// Answered by one residency before its peaks may stand in for larger declarations.
pub(super) const SEASONED_REQUESTS: u64 = 10;
/// How long that residency lasted at least: samples come every second.
pub(super) const SEASONED_AFTER: Duration = Duration::from_secs(60);

pub(super) fn margin(peak: Bytes) -> Bytes {
    Bytes(peak.0 / 100 * LEARNED_MARGIN_PERCENT)
}

/// What the engine is told it may take, of what it is promised.
pub(super) fn told(spec: &ModelSpec, promised: Bytes) -> Bytes {
    match (spec.engine, spec.vram) {
        (EngineKind::Vllm, Vram::Declared(declared)) => promised.min(declared),
        _ => promised,
    }
}

impl Scheduler {
    /// What a model takes, if anything was declared.
    pub(super) fn declared_need(&self, spec: &ModelSpec, gpu: GpuId) -> Option<Bytes> {
        let Vram::Declared(declared) = spec.vram else { return None };
        let learned = self.models.get(&spec.name).map(|m| &m.learned);
        let bytes = self.declared_or_learned(spec, gpu, declared, learned);
        let promised = self.current(&spec.name).map(|i| self.promise_on(i, gpu));
        Some(bytes.max(promised.unwrap_or_default()))
    }

    pub(super) fn declared_or_learned(
        &self,
        spec: &ModelSpec,
        gpu: GpuId,
        declared: Bytes,
        learned: Option<&Learned>,
    ) -> Bytes {
        let Some((learned, peak)) = learned.and_then(|l| Some((l, l.footprint?))) else {
            return declared;
        };
        let may_lower = learned.seasoned && spec.engine != EngineKind::Vllm;
        if peak > declared {
            self.with_margin(spec, gpu, peak)
        } else if may_lower {
            self.with_margin(spec, gpu, peak).min(declared)
        } else {
            declared
        }
    }

    /// The margin must not keep a model from where it ran before: neither from a GPU that it fills,
    /// reserve and all, nor from beside pinned ones. On a GPU smaller than its peak it never ran.
    pub(super) fn with_margin(&self, spec: &ModelSpec, gpu: GpuId, peak: Bytes) -> Bytes {
        // What a pinned model is promised beyond need others can never have.
        if self.pins(spec) {
            return peak;
        }
        let bytes = peak + margin(peak);
        let usable = self.usable(gpu);
        let reserve = self.total(gpu) - self.capacity(gpu);
        if bytes + self.promised(gpu) <= usable || peak > usable + reserve {
            return bytes;
        }
        let pinned: Bytes = self
            .instances
            .values()
            .filter(|i| i.model != spec.name && self.stays_for(&spec.name, i) && !i.is_stopping())
            .map(|i| self.promise_on(i, gpu))
            .sum();
        bytes.min((usable - pinned).max(peak).min(self.capacity(gpu)))
    }

    /// A sample showed what a ready instance holds on one of its GPUs.
    pub(super) fn measured(&mut self, id: InstanceId, bytes: Bytes) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        instance.measured = Some(bytes);
        let outgrown = instance.promise.is_some_and(|promise| bytes > promise);
        self.learn_footprint(id, bytes);
        if !self.season(id) && outgrown {
            self.promise_anew(id);
        }
    }

    /// Whether this sample made the peaks of a model fit to stand in for what is declared. What it
    /// was promised is then known to be too much.
    pub(super) fn season(&mut self, id: InstanceId) -> bool {
        let Some(instance) = self.instances.get(&id).filter(|i| self.is_current(i)) else {
            return false;
        };
        let served = instance.is_ready()
            && instance.ended() >= SEASONED_REQUESTS
            && self.now.since(instance.ready_at) >= SEASONED_AFTER;
        let model = instance.model.clone();
        let Some(state) = self.models.get_mut(&model).filter(|_| served) else { return false };
        if state.learned.seasoned {
            return false;
        }
        state.learned.seasoned = true;
        self.remember(&model);
        self.promise_anew(id);
        self.ram_anew(id);
        self.changed();
        true
    }
}
