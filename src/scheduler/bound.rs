//! What anybody who waits could get on each GPU at best: where hundreds wait, most of them are
//! told from this alone that it is not their turn, and only the others are planned for.

use super::Scheduler;
use super::policy::{Candidate, Urgency};
use super::residency::{Instance, Residency};
use super::swap::Swap;
use super::turn::NOTICE_MOVES;
use crate::config::catalog::{GpuRequest, Vram};
use crate::units::{Bytes, GpuId, Priority, Time};

/// With fewer, each is planned for, and told exactly whom it waits for.
const MANY: usize = 24;
/// Each costs several plans.
const CALL_OFF_TRIES: u32 = 2;

/// Never less than what a plan could find, as long as nobody has been given room since.
#[derive(Debug)]
pub(super) struct Bound {
    gpus: Vec<(GpuId, Bytes)>,
    most: Bytes,
    /// The lowest class of a start that might be called off (`None`: nobody waits for it), and
    /// since when: it gives way to those who came later.
    young: Option<(Option<Priority>, Time)>,
    /// How many more may look whether a start gives way to them, in order of rank.
    tries: u32,
}

impl Scheduler {
    /// `None`: there is none that holds for all, or too few wait for it to be worth the while.
    pub(super) fn bound(&self, candidates: &[Candidate]) -> Option<Bound> {
        let swap = &self.catalog.settings.swap;
        let ruled = !self.catalog.groups.is_empty() || swap.max_concurrent_models > 0;
        let stuck = || self.instances.values().any(|i| i.trouble.is_some());
        if candidates.len() < MANY || ruled || self.single_gpu_model() || stuck() {
            return None;
        }
        let normal = candidates.iter().filter(|c| c.urgency == Urgency::Normal);
        let pressure = normal.map(|c| c.pressure).max().unwrap_or_default();
        let leaves: Vec<&Instance> =
            self.instances.values().filter(|i| self.might_leave(i, pressure)).collect();
        let room = |gpu: GpuId| {
            let leave: Bytes = leaves.iter().map(|i| self.promise_on(i, gpu)).sum();
            let stays = self.promised(gpu) - self.leaving(gpu) - leave;
            self.capacity(gpu) - stays - self.spoken(gpu, None)
        };
        let gpus: Vec<(GpuId, Bytes)> =
            self.world.gpus.iter().map(|g| (g.id, room(g.id))).collect();
        // Footprints are cut to what a whole GPU has.
        if gpus.iter().any(|&(gpu, room)| room >= self.capacity(gpu)) {
            return None;
        }
        let most = gpus.iter().map(|&(_, room)| room).max()?;
        Some(Bound { gpus, most, young: self.lowest_start(), tries: CALL_OFF_TRIES })
    }

    /// For somebody who waits and is not overdue, with the most that any of them has suffered.
    fn might_leave(&self, instance: &Instance, pressure: u128) -> bool {
        let moving = || self.swaps.values().any(|s| s.instance == instance.id);
        if self.is_pinned(instance) || instance.hold.is_some() || moving() {
            return false;
        }
        match instance.residency {
            Residency::Sleeping { .. } => true,
            Residency::Ready => {
                let over = instance.ready_at + self.tenure(instance) <= self.now;
                self.is_idle(instance)
                    || (over && pressure >= NOTICE_MOVES * self.stays_weight(instance))
            }
            Residency::Starting { .. }
            | Residency::Draining
            | Residency::Stopping
            | Residency::FallingAsleep
            | Residency::Waking
            | Residency::Lost { .. } => false,
        }
    }

    fn lowest_start(&self) -> Option<(Option<Priority>, Time)> {
        let young = self.swaps.values().filter(|s| self.is_young_start(s));
        let class = |s: &Swap| self.models.get(&s.model).and_then(|m| m.queue.top());
        young.map(|s| (class(s), s.began)).min()
    }

    /// What it needs on a GPU, if nothing but room decides where it goes.
    fn plain_need(&self, bound: &Bound, candidate: &Candidate) -> Option<Bytes> {
        let spec = &candidate.spec;
        let plain = candidate.urgency == Urgency::Normal
            && candidate.swap.is_none()
            && candidate.instead_of.is_none()
            && matches!(spec.vram, Vram::Declared(_))
            && self.current(&spec.name).is_none();
        if !plain {
            return None;
        }
        // The least anywhere: learned peaks are cut to what a GPU has.
        let learned = self.models.get(&spec.name).is_some_and(|m| m.learned.footprint.is_some());
        let gpus = if learned { bound.gpus.len() } else { 1 };
        let needs = bound
            .gpus
            .iter()
            .take(gpus)
            .map(|&(gpu, _)| self.need(spec, gpu).filter(|n| !n.elastic));
        let needs: Option<Vec<Bytes>> = needs.map(|need| Some(need?.bytes)).collect();
        needs?.into_iter().min()
    }

    /// The sets of GPUs that may have room for it.
    pub(super) fn sets_within(
        &self,
        bound: Option<&Bound>,
        candidate: &Candidate,
    ) -> Option<Vec<Vec<GpuId>>> {
        let bound = bound?;
        let need = self.plain_need(bound, candidate)?;
        let mut sets = self.placements(&candidate.spec);
        let room = |gpu: &GpuId| bound.gpus.iter().any(|(g, room)| g == gpu && *room >= need);
        sets.retain(|set| set.iter().all(room));
        (!sets.is_empty()).then_some(sets)
    }

    /// Whatever is planned for it, there is no room and nobody makes any.
    pub(super) fn is_out_of_reach(&self, bound: &mut Bound, candidate: &Candidate) -> bool {
        let spec = &candidate.spec;
        let Some(need) = self.plain_need(bound, candidate) else { return false };
        let has_none = match spec.gpus {
            GpuRequest::None => false,
            GpuRequest::Count(1) | GpuRequest::Explicit(_) => need > bound.most,
            GpuRequest::Count(count) => {
                let with_room = bound.gpus.iter().filter(|(_, room)| *room >= need);
                with_room.count() < usize::from(count)
            }
        };
        let calls_off = |(class, since): (Option<Priority>, Time)| {
            class < self.class_since(candidate, Some(since))
        };
        if has_none && bound.tries > 0 && bound.young.is_some_and(calls_off) {
            bound.tries -= 1;
            return false;
        }
        has_none
    }
}
