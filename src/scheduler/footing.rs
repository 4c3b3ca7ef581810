//! Of several places where a model would disturb nobody more: the one that leaves most for others.
//!
//! In this order: no GPU that strangers use, too; models that can go to few places only (they name
//! their GPUs, or need several, or a large one) keep finding room; GPUs of one size; least room
//! left over, so that what is large and free stays so; neighbours.

use super::Scheduler;
use super::memory::uses_gpu;
use super::placement::Plan;
use super::policy::Candidate;
use super::residency::Instance;
use crate::config::catalog::{GpuRequest, ModelSpec, Vram};
use crate::units::{Bytes, GpuId, SwapId};

/// A stranger that holds less than this share of a GPU (a desktop, say) keeps nobody away.
const STRANGER_SHARE: u64 = 16;

/// Larger than any GPU.
const LARGEST: Bytes = Bytes::gib(1 << 20);

type Rooms = Vec<(GpuId, Bytes)>;

/// Less is better.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Footing {
    shared_with_strangers: usize,
    /// Models that find no free room any more.
    shut_out: usize,
    uneven: bool,
    left: Bytes,
    /// Blocks of neighbouring GPUs that it touches.
    blocks: usize,
}

impl Scheduler {
    /// The best of plans that disturb equally.
    pub(super) fn best_footing(&self, candidate: &Candidate, mut plans: Vec<Plan>) -> Option<Plan> {
        if plans.len() > 1 {
            // Of unknown size: it can be measured only where it fits, so it gets the largest once.
            let unmeasured = self.is_unmeasured(&candidate.spec);
            let picky = if unmeasured { Vec::new() } else { self.picky(candidate) };
            plans.sort_by_cached_key(|plan| self.footing(candidate, plan, &picky));
        }
        plans.into_iter().next()
    }

    fn footing(&self, candidate: &Candidate, plan: &Plan, picky: &[&ModelSpec]) -> Footing {
        let set = &plan.gpus;
        let totals = || set.iter().map(|&gpu| self.total(gpu));
        let rooms = self.rooms_after(candidate, plan);
        let left = || rooms.iter().filter(|(gpu, _)| set.contains(gpu)).map(|(_, room)| *room);
        let missing = |total: Bytes| LARGEST - total;
        let mut blocks: Vec<usize> =
            set.iter().map(|gpu| usize::from(gpu.0) / set.len().max(1)).collect();
        blocks.dedup();
        Footing {
            shared_with_strangers: set.iter().filter(|&&gpu| self.is_shared(gpu)).count(),
            shut_out: picky.iter().filter(|spec| !self.finds_room(spec, &rooms)).count(),
            uneven: totals().min() != totals().max(),
            left: if self.is_unmeasured(&candidate.spec) {
                totals().map(missing).sum()
            } else {
                left().sum()
            },
            blocks: blocks.len(),
        }
    }

    fn is_unmeasured(&self, spec: &ModelSpec) -> bool {
        let learned = || self.models.get(&spec.name).and_then(|m| m.learned.footprint);
        self.world.proof && spec.vram == Vram::Unknown && learned().is_none()
    }

    /// Bytes listed for processes that are none of ours.
    pub(super) fn strangers_on(&self, gpu: GpuId) -> Bytes {
        self.sampled(gpu).map(|m| self.stranger_bytes(m)).unwrap_or_default()
    }

    fn is_shared(&self, gpu: GpuId) -> bool {
        self.strangers_on(gpu) > Bytes(self.total(gpu).0 / STRANGER_SHARE)
    }

    /// What nobody is promised or holds on a GPU.
    pub(super) fn room_on(&self, gpu: GpuId, spec: &ModelSpec, swap: Option<SwapId>) -> Bytes {
        let own = self.current(&spec.name).filter(|i| i.is_sleeping());
        let own = own.map_or(Bytes::ZERO, |i| self.promise_on(i, gpu));
        let promised = self.promised(gpu) - own - self.leaving(gpu);
        self.usable(gpu) - self.strangers_on(gpu) - promised - self.spoken(gpu, swap)
    }

    /// Free room on every GPU once the plan was carried out.
    fn rooms_after(&self, candidate: &Candidate, plan: &Plan) -> Rooms {
        let room = |gpu: GpuId| {
            let freed: Bytes = plan
                .victims
                .iter()
                .filter_map(|victim| Some((victim, self.instances.get(&victim.instance)?)))
                .map(|(victim, i)| {
                    let keep = if victim.asleep { self.residue_expected(i) } else { Bytes::ZERO };
                    self.promise_on(i, gpu) - keep
                })
                .sum();
            let room = self.room_on(gpu, &candidate.spec, candidate.swap) + freed;
            if !plan.gpus.contains(&gpu) {
                return room;
            }
            room - self.need(&candidate.spec, gpu).map_or(Bytes::ZERO, |need| need.bytes)
        };
        self.world.gpus.iter().map(|g| (g.id, room(g.id))).collect()
    }

    /// Models that are not up and cannot go just anywhere. (Whoever needs one GPU, and fits on
    /// each, finds room as long as the largest is kept.)
    fn picky(&self, candidate: &Candidate) -> Vec<&ModelSpec> {
        let smallest = self.world.gpus.iter().min_by_key(|gpu| gpu.total).map(|gpu| gpu.id);
        let fits = |spec: &ModelSpec, gpu: GpuId| {
            self.need(spec, gpu).is_none_or(|need| need.elastic || need.bytes <= self.capacity(gpu))
        };
        let is_picky = |spec: &ModelSpec| match &spec.gpus {
            GpuRequest::Explicit(_) => true,
            GpuRequest::Count(1) => smallest.is_some_and(|gpu| !fits(spec, gpu)),
            GpuRequest::Count(_) => true,
            GpuRequest::None => false,
        };
        let away = |spec: &ModelSpec| {
            self.current(&spec.name).is_none_or(|i: &Instance| i.promise.is_none())
        };
        let others = self.catalog.models.values().filter(|m| is_picky(m) && uses_gpu(m));
        others.filter(|m| m.name != candidate.spec.name && away(m)).map(|m| &**m).collect()
    }

    fn finds_room(&self, spec: &ModelSpec, rooms: &Rooms) -> bool {
        let fits = |&(gpu, room): &(GpuId, Bytes)| {
            self.need(spec, gpu).is_some_and(|need| need.elastic || need.bytes <= room)
        };
        match &spec.gpus {
            GpuRequest::None => true,
            GpuRequest::Count(count) => {
                rooms.iter().filter(|room| fits(room)).count() >= usize::from(*count)
            }
            GpuRequest::Explicit(_) => {
                let named = self.explicit(spec).unwrap_or_default();
                rooms.iter().filter(|(gpu, _)| named.contains(gpu)).all(fits)
            }
        }
    }
}
