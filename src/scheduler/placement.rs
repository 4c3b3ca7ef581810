//! Where a model could go, and who would have to leave: the least valuable set that makes room.

use std::collections::BTreeSet;

use super::Scheduler;
use super::action::Refusal;
use super::memory::{Need, UNSEEN, uses_gpu};
use super::policy::{Candidate, Leaves, Urgency};
use super::record::Phase;
use super::residency::Instance;
use crate::config::catalog::{GpuRequest, ModelSpec, SwapMode};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, SwapId};

/// Beyond this many sets of GPUs only the cheapest GPUs are combined.
const SETS_MAX: usize = 70;
/// An elastic model starts with what strangers leave, if that is at least this share.
const ELASTIC_SHARE: u64 = 4;

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
        gpus: Vec<GpuId>,
        why: String,
    },
    /// Promises would allow it; memory that nobody accounts for does not.
    Held {
        gpus: Vec<GpuId>,
    },
}

/// Value of one possible set: fewer busy victims first, then what it costs to bring them back.
type Price = (usize, u128, usize, Bytes);

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

    /// Set if no set of GPUs could ever hold the model beside the pinned ones.
    pub(super) fn cannot_fit(&self, spec: &ModelSpec) -> Option<Refusal> {
        if !uses_gpu(spec) {
            return None;
        }
        let sets = self.placements(spec);
        let room = |gpu: GpuId| {
            let pinned: Bytes = self
                .instances
                .values()
                .filter(|i| i.model != spec.name && self.is_pinned(i) && !i.is_stopping())
                .map(|i| self.promise_on(i, gpu))
                .sum();
            self.capacity(gpu) - pinned.max(self.pinned_declared(spec, gpu))
        };
        let need = |gpu: GpuId| self.need(spec, gpu).map_or(Bytes::ZERO, |n| n.bytes.max(Bytes(1)));
        let pinned_holds_slot = self.single_gpu_model()
            && self.instances.values().any(|i| {
                i.model != spec.name && self.is_pinned(i) && i.is_ready() && uses_gpu(&i.spec)
            });
        if !pinned_holds_slot
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
        Some(Refusal::CannotFit { need: asked, available: best.unwrap_or_default(), gpus })
    }

    /// Declared bytes of pinned models that can only be on this GPU.
    fn pinned_declared(&self, spec: &ModelSpec, gpu: GpuId) -> Bytes {
        use crate::config::catalog::Vram;
        let bound = |other: &ModelSpec| match self.explicit(other) {
            Some(gpus) => gpus.contains(&gpu),
            None => uses_gpu(other) && self.world.gpus.len() == 1,
        };
        self.catalog
            .models
            .values()
            .filter(|other| other.pinned && other.name != spec.name && bound(other))
            .map(|other| match other.vram {
                Vram::Declared(bytes) => bytes,
                Vram::Unknown | Vram::Rest => Bytes::ZERO,
            })
            .sum()
    }

    /// Only one model may use the GPUs: asked for, or because their memory is unknown.
    pub(super) fn single_gpu_model(&self) -> bool {
        self.catalog.settings.swap.mode == SwapMode::SingleActive || self.world.gpus.is_empty()
    }

    /// Room for a candidate: on which GPUs, and who leaves. `wanted`: GPUs that a more urgent
    /// candidate waits for.
    pub(super) fn plan(&self, candidate: &Candidate, wanted: &BTreeSet<GpuId>) -> Planned {
        let spec = &candidate.spec;
        let asleep = self.current(&spec.name).filter(|i| i.is_sleeping());
        let sets = asleep.map_or_else(|| self.placements(spec), |i| vec![i.gpus.clone()]);
        let mut best: Option<(Price, Plan)> = None;
        let mut blocked: Option<(usize, Planned)> = None;
        for gpus in sets {
            let attempt = Attempt { scheduler: self, candidate, gpus: &gpus };
            match attempt.run(wanted) {
                Ok((price, plan)) => {
                    if best.as_ref().is_none_or(|(known, _)| price < *known) {
                        best = Some((price, plan));
                    }
                }
                Err((rank, planned)) => {
                    if blocked.as_ref().is_none_or(|(known, _)| rank < *known) {
                        blocked = Some((rank, planned));
                    }
                }
            }
        }
        match (best, blocked) {
            (Some((_, plan)), _) => Planned::Room(plan),
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
    fn vacating(&self, gpus: &BTreeSet<GpuId>, except: Option<SwapId>) -> Option<&ModelName> {
        self.swaps
            .values()
            .filter(|s| Some(s.id) != except && s.claims(self.now) && !s.started)
            .filter(|s| s.is_load() || s.phase > Phase::Drain)
            .find(|s| !s.victims.is_empty() && self.claimed(s).iter().any(|g| gpus.contains(g)))
            .map(|s| &s.model)
    }

    /// GPUs that a swap has to itself while it makes room: its own and its victims'.
    pub(super) fn claimed(&self, swap: &super::swap::Swap) -> BTreeSet<GpuId> {
        let victims = swap.victims.iter().filter_map(|v| self.instances.get(&v.instance));
        swap.gpus.iter().copied().chain(victims.flat_map(|i| i.gpus.iter().copied())).collect()
    }
}

/// One set of GPUs for one candidate.
struct Attempt<'a> {
    scheduler: &'a Scheduler,
    candidate: &'a Candidate,
    gpus: &'a [GpuId],
}

type Choice<'a> = Vec<(&'a Instance, Leaves, bool)>;

impl Attempt<'_> {
    fn run(&self, wanted: &BTreeSet<GpuId>) -> Result<(Price, Plan), (usize, Planned)> {
        let blocked = |rank: usize, why: String| {
            Err((rank, Planned::Blocked { gpus: self.gpus.to_vec(), why }))
        };
        if self.gpus.iter().any(|g| wanted.contains(g)) {
            return blocked(9, "a request that waits longer has these GPUs next".to_owned());
        }
        if let Some(model) = self.exclusive_claim() {
            return blocked(8, format!("{model} has these GPUs next"));
        }
        for asleep in [true, false] {
            let Some(choice) = self.choose(asleep, &|i| self.may_leave(i)) else { continue };
            let touched: BTreeSet<GpuId> = self
                .gpus
                .iter()
                .copied()
                .chain(choice.iter().flat_map(|(i, _, _)| i.gpus.iter().copied()))
                .collect();
            if !choice.is_empty()
                && let Some(model) = self.scheduler.vacating(&touched, self.candidate.swap)
            {
                return blocked(5, format!("{model} is making room there first"));
            }
            if !choice.is_empty() && touched.iter().any(|g| wanted.contains(g)) {
                return blocked(9, "a request that waits longer has these GPUs next".to_owned());
            }
            return Ok(self.priced(&choice));
        }
        if self.needs_bytes_nobody_promised() {
            return Err((1, Planned::Held { gpus: self.gpus.to_vec() }));
        }
        let (rank, why) = self.why_blocked();
        blocked(rank, why)
    }

    /// An overdue swap (or an ensure) on these GPUs lets nobody in beside it.
    fn exclusive_claim(&self) -> Option<&ModelName> {
        let s = self.scheduler;
        s.swaps
            .values()
            .filter(|other| Some(other.id) != self.candidate.swap && other.claims(s.now))
            .filter(|other| other.urgent && !other.started)
            .find(|other| s.claimed(other).iter().any(|g| self.gpus.contains(g)))
            .map(|other| &other.model)
    }

    fn may_leave(&self, instance: &Instance) -> Option<Leaves> {
        self.scheduler.may_leave(self.candidate, instance).ok()
    }

    /// Greedy from the least valuable, then without those that turn out not to be needed.
    fn choose(
        &self,
        asleep: bool,
        may_leave: &dyn Fn(&Instance) -> Option<Leaves>,
    ) -> Option<Choice<'_>> {
        let s = self.scheduler;
        let mut pool: Choice = s
            .instances
            .values()
            .filter(|i| i.model != self.candidate.spec.name)
            .filter_map(|i| may_leave(i).map(|leaves| (i, leaves)))
            .map(|(i, leaves)| {
                let sleeps = asleep && i.is_ready() && i.can_sleep().is_some();
                (i, leaves, sleeps)
            })
            .collect();
        pool.sort_by_key(|(i, leaves, _)| s.value(i, *leaves));
        let mut chosen: Choice = Vec::new();
        for entry in pool {
            if self.is_enough(&chosen) {
                break;
            }
            if self.helps(&entry, &chosen) {
                chosen.push(entry);
            }
        }
        for at in (0..chosen.len()).rev() {
            let mut fewer = chosen.clone();
            fewer.remove(at);
            if self.is_enough(&fewer) {
                chosen = fewer;
            }
        }
        self.is_enough(&chosen).then_some(chosen)
    }

    fn helps(&self, (instance, _, sleeps): &(&Instance, Leaves, bool), chosen: &Choice) -> bool {
        if *sleeps && self.scheduler.residue_expected(instance) >= instance.held() {
            return false;
        }
        let frees = instance.gpus.iter().any(|&g| self.gpus.contains(&g) && !self.fits(g, chosen));
        frees || (!self.slots_fit(chosen) && self.takes_slot(instance))
    }

    fn is_enough(&self, chosen: &Choice) -> bool {
        self.slots_fit(chosen) && self.gpus.iter().all(|&gpu| self.fits(gpu, chosen))
    }

    fn need(&self, gpu: GpuId) -> Need {
        self.scheduler
            .need(&self.candidate.spec, gpu)
            .unwrap_or(Need { bytes: Bytes::ZERO, elastic: false })
    }

    /// What the model itself keeps there while it sleeps.
    fn own_residue(&self, gpu: GpuId) -> Bytes {
        let s = self.scheduler;
        s.current(&self.candidate.spec.name)
            .filter(|i| i.is_sleeping())
            .map_or(Bytes::ZERO, |i| s.promise_on(i, gpu))
    }

    fn fits(&self, gpu: GpuId, chosen: &Choice) -> bool {
        self.fits_by_promise(gpu, chosen) && self.fits_by_sample(gpu, chosen)
    }

    fn fits_by_promise(&self, gpu: GpuId, chosen: &Choice) -> bool {
        let s = self.scheduler;
        let freed: Bytes = chosen
            .iter()
            .map(|(i, _, sleeps)| {
                let keep = if *sleeps { s.residue_expected(i) } else { Bytes::ZERO };
                s.promise_on(i, gpu) - keep
            })
            .sum();
        let taken = (s.promised(gpu) - self.own_residue(gpu) - s.leaving(gpu) - freed)
            + s.spoken(gpu, self.candidate.swap);
        let need = self.need(gpu);
        if need.elastic {
            // Alone beside the pinned ones: every other promise has to go.
            return taken <= s.pinned_promise(gpu) && need.bytes > Bytes::ZERO;
        }
        taken + need.bytes <= s.capacity(gpu)
    }

    fn fits_by_sample(&self, gpu: GpuId, chosen: &Choice) -> bool {
        let s = self.scheduler;
        if !s.world.proof || s.is_blind(gpu) {
            return true;
        }
        // Without a fresh sample, or while a start takes its bytes, decide later.
        let (Some(free), true) = (s.fresh_free(gpu), s.unvouched(gpu) == Bytes::ZERO) else {
            return true;
        };
        let here = |i: &Instance| i.gpus.contains(&gpu) && i.promise.is_some();
        let leaving: Bytes = s
            .instances
            .values()
            .filter(|i| i.is_stopping() && i.trouble.is_none() && here(i))
            .map(|i| i.held())
            .sum();
        let freed: Bytes = chosen
            .iter()
            .filter(|(i, _, _)| here(i))
            .map(|(i, _, sleeps)| {
                let keep = if *sleeps { s.residue_expected(i) } else { Bytes::ZERO };
                i.held() - keep
            })
            .sum();
        let need = self.need(gpu);
        let least = if need.elastic { Bytes(need.bytes.0 / ELASTIC_SHARE) } else { need.bytes };
        free + leaving + freed + self.own_residue(gpu)
            >= least + s.spoken(gpu, self.candidate.swap) + s.catalog.settings.gpu.reserve
    }

    /// Whether `max_concurrent_models` and single-active leave a place.
    fn slots_fit(&self, chosen: &Choice) -> bool {
        let s = self.scheduler;
        let spec = &self.candidate.spec;
        if spec.is_external() {
            return true;
        }
        let swap = self.candidate.swap;
        let stays = |i: &&Instance| {
            i.model != spec.name && s.takes_slot(i) && !chosen.iter().any(|(c, _, _)| c.id == i.id)
        };
        let coming = |gpu_only: bool| {
            s.swaps
                .values()
                .filter(|o| Some(o.id) != swap && o.claims(s.now) && !o.started && o.is_load())
                .filter(|o| {
                    s.catalog
                        .model(&o.model)
                        .is_some_and(|m| if gpu_only { uses_gpu(m) } else { !m.is_external() })
                })
                .count()
        };
        let cap = s.catalog.settings.swap.max_concurrent_models as usize;
        let all = s.instances.values().filter(stays).count() + coming(false);
        let on_gpus =
            s.instances.values().filter(stays).filter(|i| uses_gpu(&i.spec)).count() + coming(true);
        (cap == 0 || all < cap) && (!uses_gpu(spec) || !s.single_gpu_model() || on_gpus == 0)
    }

    fn takes_slot(&self, instance: &Instance) -> bool {
        let s = self.scheduler;
        let capped = s.catalog.settings.swap.max_concurrent_models > 0;
        s.takes_slot(instance) && (capped || uses_gpu(&instance.spec))
    }

    fn priced(&self, choice: &Choice) -> (Price, Plan) {
        let s = self.scheduler;
        let busy = choice.iter().filter(|(_, leaves, _)| *leaves == Leaves::Busy).count();
        let cost = choice.iter().map(|(i, _, _)| s.bring_back(i).as_millis()).sum();
        let left: Bytes = self
            .gpus
            .iter()
            .map(|&g| s.capacity(g) - (s.promised(g) - s.leaving(g)) - s.spoken(g, None))
            .sum();
        let victims = choice
            .iter()
            .map(|(i, leaves, sleeps)| Victim {
                instance: i.id,
                asleep: *sleeps,
                busy: *leaves == Leaves::Busy,
                why: s.why_evicted(i, *leaves, *sleeps),
            })
            .collect();
        ((busy, cost, choice.len(), left), Plan { gpus: self.gpus.to_vec(), victims })
    }

    /// Everyone who may be asked leaves, and it is still not enough by the sample alone.
    fn needs_bytes_nobody_promised(&self) -> bool {
        let s = self.scheduler;
        if self.candidate.urgency == Urgency::Spare {
            return false;
        }
        let everyone: Choice = s
            .instances
            .values()
            .filter(|i| i.model != self.candidate.spec.name)
            .filter_map(|i| self.may_leave(i).map(|leaves| (i, leaves, false)))
            .collect();
        let stuck = s.instances.values().any(|i| {
            i.is_stopping() && i.trouble.is_some() && i.gpus.iter().any(|g| self.gpus.contains(g))
        });
        let by_promise = self.gpus.iter().all(|&g| self.fits_by_promise(g, &everyone));
        let by_sample = self.gpus.iter().all(|&g| self.fits_by_sample(g, &everyone));
        self.slots_fit(&everyone)
            && ((by_promise && !by_sample) || (stuck && !by_promise && self.fits_but_for_stuck()))
    }

    /// It would fit, were it not for memory that never came back.
    fn fits_but_for_stuck(&self) -> bool {
        let s = self.scheduler;
        self.gpus.iter().all(|&gpu| {
            let others: Bytes = s
                .instances
                .values()
                .filter(|i| i.model != self.candidate.spec.name && !i.is_stopping())
                .filter(|i| self.may_leave(i).is_none())
                .map(|i| s.promise_on(i, gpu))
                .sum();
            let need = self.need(gpu);
            let need = if need.elastic { Bytes::ZERO } else { need.bytes };
            others + need + s.spoken(gpu, self.candidate.swap) <= s.capacity(gpu)
        })
    }

    /// How far this set is from being usable, and who is in the way.
    fn why_blocked(&self) -> (usize, String) {
        let s = self.scheduler;
        let anyone = |i: &Instance| {
            let ready = i.is_ready() || i.is_sleeping();
            (ready && !s.is_pinned(i)).then_some(Leaves::Busy)
        };
        let Some(choice) = self.choose(false, &anyone) else {
            return (7, "what holds the GPUs cannot be moved now".to_owned());
        };
        let reasons: Vec<String> =
            choice.iter().filter_map(|(i, _, _)| s.may_leave(self.candidate, i).err()).collect();
        if reasons.is_empty() {
            return (6, "another swap to end there".to_owned());
        }
        (2 + reasons.len().min(3), reasons.join(", "))
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
