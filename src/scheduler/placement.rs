//! Where a model could go, and who would have to leave: the least valuable set that makes room.

use std::collections::BTreeSet;

use super::Scheduler;
use super::action::Refusal;
use super::attempt::Attempt;
use super::memory::{UNSEEN, uses_gpu};
use super::policy::Candidate;
use super::ram::HOST;
use super::record::Phase;
use super::residency::Instance;
use crate::config::catalog::{GpuRequest, ModelSpec, SwapMode, Vram};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, SwapId};

/// Beyond this many sets of GPUs only the cheapest GPUs are combined.
const SETS_MAX: usize = 70;
/// An elastic model starts with what strangers leave, if that is at least this share.
pub(super) const ELASTIC_SHARE: u64 = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub gpus: Vec<GpuId>,
    pub victims: Vec<Victim>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Victim {
    pub instance: InstanceId,
    pub asleep: bool,
    /// It is busy and gets notice.
    pub busy: bool,
    pub why: String,
}

#[derive(Clone, Debug)]
pub(super) enum Planned {
    Room(Plan),
    /// Not now: somebody there may not leave yet, or another swap has the GPUs.
    Blocked {
        /// And [`HOST`](super::ram::HOST), if its RAM is short.
        gpus: Vec<GpuId>,
        why: String,
    },
    /// Promises would allow it; memory that nobody accounts for does not.
    Held {
        gpus: Vec<GpuId>,
    },
}

/// What one possible set disturbs: fewer busy victims first, then what it costs to bring them
/// back, then how many they are.
pub(super) type Price = (usize, u128, usize);

impl Scheduler {
    /// Sets of GPUs that the model may use.
    pub(super) fn placements(&self, spec: &ModelSpec) -> Vec<Vec<GpuId>> {
        if !uses_gpu(spec) {
            return vec![Vec::new()];
        }
        if self.world.gpus.is_empty() {
            return vec![vec![UNSEEN]];
        }
        if let GpuRequest::Explicit(names) = &spec.gpus {
            let gpus = self.explicit(spec).unwrap_or_default();
            return if gpus.len() == names.len() { vec![gpus] } else { Vec::new() };
        }
        let GpuRequest::Count(count) = spec.gpus else { return Vec::new() };
        let mut gpus: Vec<GpuId> = self.world.gpus.iter().map(|g| g.id).collect();
        let count = usize::from(count);
        if sets_of(gpus.len(), count) > SETS_MAX {
            // Neighbours only, in the machine's order and by the room they have already.
            let mut sets: Vec<Vec<GpuId>> = gpus.windows(count).map(<[GpuId]>::to_vec).collect();
            gpus.sort_by_key(|&g| (self.promised(g), g));
            for window in gpus.windows(count) {
                let mut set = window.to_vec();
                set.sort();
                sets.push(set);
            }
            return sets;
        }
        combinations(&gpus, count)
    }

    /// Asked once, as long as what it depends on stays (see `renew_fits`).
    pub(super) fn is_known_to_fit(&mut self, spec: &ModelSpec) -> bool {
        let known = self.standing.fit.contains(&spec.name);
        let fits = known || self.cannot_fit(spec).is_none();
        if fits && !known {
            self.standing.fit.insert(spec.name.clone());
        }
        fits
    }

    /// Set if no set of GPUs, or not the host, could ever hold the model beside the pinned ones.
    pub(super) fn cannot_fit(&self, spec: &ModelSpec) -> Option<Refusal> {
        if let Some(refusal) = self.kept_away(spec) {
            return Some(refusal);
        }
        if let Some(refusal) = self.ram_cannot_fit(spec) {
            return Some(refusal);
        }
        let pinned_take_places = self.pinned_take_every_place(spec);
        if !uses_gpu(spec) && !pinned_take_places {
            return None;
        }
        let sets = self.placements(spec);
        let room = |gpu: GpuId| {
            let pinned: Bytes = self
                .instances
                .values()
                .filter(|i| i.model != spec.name && self.stays_for_good(&spec.name, i))
                .filter(|i| !i.is_stopping())
                .map(|i| self.promise_on(i, gpu))
                .sum();
            self.capacity(gpu) - pinned.max(self.pinned_declared(spec, gpu))
        };
        // What nobody has measured yet may turn out to be small.
        let unmeasured = spec.vram == Vram::Unknown;
        let need = |gpu: GpuId| match self.need(spec, gpu) {
            Some(need) if need.elastic && unmeasured => Bytes(1),
            Some(need) => need.bytes.max(Bytes(1)),
            None => Bytes::ZERO,
        };
        if !pinned_take_places
            && sets.iter().any(|set| set.iter().all(|&gpu| need(gpu) <= room(gpu)))
        {
            return None;
        }
        let best = sets.iter().filter_map(|set| set.iter().map(|&g| room(g)).min()).max();
        let gpus = match &spec.gpus {
            GpuRequest::None => 0,
            GpuRequest::Count(n) => *n,
            GpuRequest::Explicit(names) => u16::try_from(names.len()).unwrap_or(u16::MAX),
        };
        let asked = sets.iter().flatten().map(|&g| need(g)).max().unwrap_or_default();
        let available = best.unwrap_or_default();
        let pinned = self.pinned_beside(&spec.name);
        Some(Refusal::CannotFit { need: asked, available, gpus, host: false, pinned })
    }

    /// Pinned models are up in every place that `max_concurrent_models` or single-active leaves.
    fn pinned_take_every_place(&self, spec: &ModelSpec) -> bool {
        let pinned = || {
            let up = |i: &&Instance| {
                self.stays_for_good(&spec.name, i) && i.is_ready() && !i.spec.is_external()
            };
            self.instances.values().filter(up).filter(|i| i.model != spec.name)
        };
        let cap = self.catalog.settings.swap.max_concurrent_models as usize;
        let capped = cap > 0 && !spec.is_external() && pinned().count() >= cap;
        let single = || self.single_gpu_model() && pinned().any(|i| uses_gpu(&i.spec));
        capped || (uses_gpu(spec) && single())
    }

    /// What pinned models take that can only be on this GPU, as far as it is declared.
    fn pinned_declared(&self, spec: &ModelSpec, gpu: GpuId) -> Bytes {
        let bound = |other: &ModelSpec| match self.explicit(other) {
            Some(gpus) => gpus.contains(&gpu),
            None => uses_gpu(other) && self.world.gpus.len() == 1,
        };
        self.catalog
            .models
            .values()
            .filter(|other| self.pins(other) && other.name != spec.name && bound(other))
            .map(|other| self.declared_need(other, gpu).unwrap_or_default())
            .sum()
    }

    /// Only one model may use the GPUs: asked for, or because their memory is unknown.
    pub(super) fn single_gpu_model(&self) -> bool {
        self.catalog.settings.swap.mode == SwapMode::SingleActive || self.world.gpus.is_empty()
    }

    /// Room for a candidate: on which GPUs, and who leaves. `wanted`: GPUs that a more urgent
    /// candidate waits for.
    pub(super) fn plan(&self, candidate: &Candidate, wanted: &BTreeSet<GpuId>) -> Planned {
        let asleep = self.current(&candidate.spec.name).filter(|i| i.is_sleeping());
        let sets =
            asleep.map_or_else(|| self.placements(&candidate.spec), |i| vec![i.gpus.clone()]);
        self.plan_on(sets, candidate, wanted)
    }

    /// A sleeper that cannot wake where it lies had better start anew: there is room elsewhere
    /// now, or pinned models have taken its place for good.
    pub(super) fn is_better_off_cold(
        &self,
        candidate: &Candidate,
        wanted: &BTreeSet<GpuId>,
    ) -> Option<InstanceId> {
        let sleeper = self.current(&candidate.spec.name)?;
        if !sleeper.is_sleeping() || sleeper.release.is_some() || candidate.swap.is_some() {
            return None;
        }
        let displaced = sleeper.gpus.iter().any(|&gpu| {
            let need = self.need(&candidate.spec, gpu).map_or(Bytes::ZERO, |n| n.bytes);
            self.staying_promise(&candidate.spec, gpu) + need > self.capacity(gpu)
        });
        let mut sets = self.placements(&candidate.spec);
        sets.retain(|set| set.iter().all(|gpu| !sleeper.gpus.contains(gpu)));
        let elsewhere = || matches!(self.plan_on(sets, candidate, wanted), Planned::Room(plan) if plan.victims.is_empty());
        (displaced || elsewhere()).then_some(sleeper.id)
    }

    pub(super) fn elastic_sleeper(&self, candidate: &Candidate) -> Option<InstanceId> {
        let elastic = match candidate.spec.vram {
            Vram::Declared(_) => false,
            Vram::Unknown | Vram::Rest => true,
        };
        let sleeper = self.current(&candidate.spec.name).filter(|i| i.is_sleeping() && elastic)?;
        candidate.swap.is_none().then_some(sleeper.id)
    }

    pub(super) fn plan_on(
        &self,
        sets: Vec<Vec<GpuId>>,
        candidate: &Candidate,
        wanted: &BTreeSet<GpuId>,
    ) -> Planned {
        let careful = Attempt { scheduler: self, candidate, gpus: &[], daring: false };
        match self.plan_as(&sets, candidate, wanted, false) {
            Planned::Room(plan) => Planned::Room(plan),
            _ if careful.has_to_dare() => self.plan_as(&sets, candidate, wanted, true),
            planned @ (Planned::Blocked { .. } | Planned::Held { .. }) => planned,
        }
    }

    fn plan_as(
        &self,
        sets: &[Vec<GpuId>],
        candidate: &Candidate,
        wanted: &BTreeSet<GpuId>,
        daring: bool,
    ) -> Planned {
        let mut best: Option<Price> = None;
        let mut plans: Vec<Plan> = Vec::new();
        let mut blocked: Option<(usize, Planned)> = None;
        for gpus in sets {
            let attempt = Attempt { scheduler: self, candidate, gpus, daring };
            match attempt.run(wanted) {
                Ok((price, plan)) => {
                    if best.is_none_or(|known| price < known) {
                        (best, plans) = (Some(price), vec![plan]);
                    } else if best == Some(price) {
                        plans.push(plan);
                    }
                }
                Err((rank, planned)) => {
                    if blocked.as_ref().is_none_or(|(known, _)| rank < *known) {
                        blocked = Some((rank, planned));
                    }
                }
            }
        }
        match (self.best_footing(candidate, plans), blocked) {
            (Some(plan), _) => Planned::Room(plan),
            (None, Some((_, planned))) => planned,
            (None, None) => Planned::Blocked {
                gpus: Vec::new(),
                why: "the GPUs it names do not exist here".to_owned(),
            },
        }
    }

    /// Needs of swaps that chose these GPUs and have not started yet.
    pub(super) fn spoken(&self, gpu: GpuId, except: Option<SwapId>) -> Bytes {
        self.swaps
            .values()
            .filter(|s| Some(s.id) != except && s.claims(self.now) && !s.started && s.is_load())
            .filter(|s| s.gpus.contains(&gpu))
            .filter_map(|s| self.need(self.catalog.model(&s.model)?, gpu))
            .map(|need| need.bytes)
            .sum()
    }

    /// Another swap that is making room on any of these GPUs.
    pub(super) fn vacating(
        &self,
        gpus: &BTreeSet<GpuId>,
        except: Option<SwapId>,
    ) -> Option<&ModelName> {
        self.swaps
            .values()
            .filter(|s| Some(s.id) != except && s.claims(self.now) && !s.started)
            .filter(|s| s.is_load() || s.phase > Phase::Drain)
            .find(|s| !s.victims.is_empty() && self.claimed(s).iter().any(|g| gpus.contains(g)))
            .map(|s| &s.model)
    }

    /// GPUs that a swap has to itself while it makes room: its own and its victims'; and the
    /// host, if some of its RAM comes free.
    pub(super) fn claimed(&self, swap: &super::swap::Swap) -> BTreeSet<GpuId> {
        let victims = swap.victims.iter().filter_map(|v| self.instances.get(&v.instance));
        let host = victims.clone().any(|i| i.ram() > Bytes::ZERO).then_some(HOST);
        let on = victims.flat_map(|i| i.gpus.iter().copied());
        swap.gpus.iter().copied().chain(on).chain(host).collect()
    }
}

impl Scheduler {
    /// Counts as a running model.
    pub(super) fn takes_slot(&self, instance: &Instance) -> bool {
        !instance.spec.is_external()
            && instance.launched
            && !instance.is_sleeping()
            && !(instance.is_stopping()
                && (instance.release.is_some() || instance.trouble.is_none()))
    }
}

fn sets_of(n: usize, k: usize) -> usize {
    (0..k)
        .try_fold(1_usize, |acc, i| Some(acc.checked_mul(n.checked_sub(i)?)? / (i + 1)))
        .unwrap_or(0)
}

fn combinations(gpus: &[GpuId], count: usize) -> Vec<Vec<GpuId>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut sets = Vec::new();
    for (at, &first) in gpus.iter().enumerate() {
        for mut rest in combinations(&gpus[at + 1..], count - 1) {
            rest.insert(0, first);
            sets.push(rest);
        }
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_gpus_are_complete_and_ordered() {
        let gpus = [GpuId(0), GpuId(1), GpuId(2)];
        assert_eq!(combinations(&gpus, 2).len(), sets_of(3, 2));
        assert_eq!(combinations(&gpus, 2)[1], vec![GpuId(0), GpuId(2)]);
        assert!(combinations(&gpus, 4).is_empty());
        assert_eq!(sets_of(8, 4), 70);
    }
}
