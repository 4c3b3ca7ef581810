//! One set of GPUs, tried for one candidate: who would have to leave, or what is in the way.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Scheduler;
use super::memory::{Need, uses_gpu};
use super::placement::{ELASTIC_SHARE, Plan, Planned, Price, Victim};
use super::policy::{Candidate, Leaves};
use super::ram::HOST;
use super::residency::Instance;
use crate::units::{Bytes, GpuId, ModelName};

/// One set of GPUs for one candidate.
pub(super) struct Attempt<'a> {
    pub scheduler: &'a Scheduler,
    pub candidate: &'a Candidate,
    pub gpus: &'a [GpuId],
    /// Nothing else will do: who leaves may give back as much host RAM as it is promised.
    pub daring: bool,
}

/// Ranks of what is in the way. A set that only has to be waited for comes before one whose
/// memory a stranger holds, and that before one that nobody may leave.
const HELD: usize = 20;
const NEVER: usize = 30;

type Choice<'a> = Vec<(&'a Instance, Leaves, bool)>;

impl Attempt<'_> {
    pub fn run(&self, wanted: &BTreeSet<GpuId>) -> Result<(Price, Plan), (usize, Planned)> {
        let short_of_ram = !self.ram_fits(&Vec::new());
        let places = || self.gpus.iter().copied().chain(short_of_ram.then_some(HOST));
        let blocked = |rank: usize, why: String| {
            Err((rank, Planned::Blocked { gpus: places().collect(), why }))
        };
        let takes_ram = self.ram_need() > Bytes::ZERO;
        if places().chain(takes_ram.then_some(HOST)).any(|g| wanted.contains(&g)) {
            return blocked(9, "a request that waits longer has these GPUs next".to_owned());
        }
        if let Some(why) = self.scheduler.rival_coming(self.candidate) {
            return blocked(8, why);
        }
        if let Some(model) = self.exclusive_claim() {
            return blocked(8, format!("{model} has these GPUs next"));
        }
        for asleep in [true, false] {
            let Some(choice) = self.choose(asleep, &|i| self.may_leave(i)) else { continue };
            let touched: BTreeSet<GpuId> = places()
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
            return Err((HELD, Planned::Held { gpus: self.gpus.to_vec() }));
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
        if self.candidate.calls_off.contains(&instance.id) {
            return Some(Leaves::Idle);
        }
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
                let sleeps = sleeps && s.residue_can_be_known(i);
                (i, leaves, sleeps)
            })
            .collect();
        pool.sort_by_key(|(i, leaves, _)| s.value(i, *leaves));
        let mut chosen: Choice = Vec::new();
        for &(instance, leaves, sleeps) in &pool {
            if self.is_enough(&chosen) {
                break;
            }
            let sleeps = sleeps && self.has_ram_to_sleep(instance, &chosen);
            let entry = (instance, leaves, sleeps);
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
        let chosen = self.is_enough(&chosen).then_some(chosen)?;
        Some(self.one_instead(&pool, &chosen).unwrap_or(chosen))
    }

    /// Several were chosen, each of little value; one that is worth less than all of them together,
    /// and of no higher class than the dearest of them, may do as well.
    fn one_instead<'a>(&self, pool: &Choice<'a>, chosen: &Choice<'a>) -> Option<Choice<'a>> {
        if chosen.len() < 2 {
            return None;
        }
        let s = self.scheduler;
        let class = |(i, leaves, _): &(&Instance, Leaves, bool)| {
            (*leaves, i.spec.warmup || s.is_kept(&i.model), i.spec.priority)
        };
        let together: Duration = chosen.iter().map(|(i, _, _)| s.bring_back(i)).sum();
        let dearest = chosen.iter().map(class).max()?;
        let cheaper = pool.iter().filter(|one| s.bring_back(one.0) < together);
        let mut ones: Vec<_> = cheaper.filter(|one| class(one) <= dearest).copied().collect();
        ones.sort_by_key(|(i, leaves, _)| (*leaves, s.bring_back(i), i.last_used(), i.id));
        let alone = |(i, leaves, sleeps): (&'a Instance, Leaves, bool)| {
            vec![(i, leaves, sleeps && self.has_ram_to_sleep(i, &Vec::new()))]
        };
        ones.into_iter().map(alone).find(|one| self.is_enough(one))
    }

    fn helps(&self, (instance, _, sleeps): &(&Instance, Leaves, bool), chosen: &Choice) -> bool {
        if *sleeps && self.scheduler.residue_expected(instance) >= instance.held() {
            return false;
        }
        let frees = instance.gpus.iter().any(|&g| self.gpus.contains(&g) && !self.fits(g, chosen));
        frees
            || (!self.slots_fit(chosen) && self.takes_slot(instance))
            || self.scheduler.kept_apart(&self.candidate.spec, instance).is_some()
            || (!*sleeps && instance.ram() > Bytes::ZERO && !self.ram_fits(chosen))
    }

    fn is_enough(&self, chosen: &Choice) -> bool {
        self.slots_fit(chosen)
            && self.groups_fit(chosen)
            && self.ram_fits(chosen)
            && self.gpus.iter().all(|&gpu| self.fits(gpu, chosen))
    }

    fn is_rethought(&self) -> bool {
        let swap = self.candidate.swap.and_then(|id| self.scheduler.swaps.get(&id));
        swap.is_some_and(|swap| swap.rethought)
    }

    fn ram_need(&self) -> Bytes {
        self.scheduler.ram_need(&self.candidate.spec)
    }

    fn ram_fits(&self, chosen: &Choice) -> bool {
        self.ram_fits_by_promise(chosen) && self.ram_fits_by_sample(chosen)
    }

    /// What the candidate and those who fall asleep for it take of the host's RAM, and what
    /// those who stop give back.
    fn ram_moved(&self, chosen: &Choice) -> (Bytes, Bytes) {
        let (sleepers, stopped): (Vec<_>, Vec<_>) =
            chosen.iter().partition(|(_, _, sleeps)| *sleeps);
        let asleep: Bytes = sleepers.iter().map(|(i, _, _)| self.scheduler.ram_to_sleep(i)).sum();
        (self.ram_need() + asleep, stopped.iter().map(|(i, _, _)| i.ram()).sum())
    }

    fn ram_fits_by_promise(&self, chosen: &Choice) -> bool {
        let s = self.scheduler;
        let (taken, freed) = self.ram_moved(chosen);
        let stays = s.ram_promised() - s.ram_leaving() - freed;
        let others = s.ram_spoken(self.candidate.swap);
        taken == Bytes::ZERO
            || s.ram_capacity().is_none_or(|capacity| stays + others + taken <= capacity)
    }

    fn ram_fits_by_sample(&self, chosen: &Choice) -> bool {
        let s = self.scheduler;
        let (taken, freed) = self.ram_moved(chosen);
        let others = s.ram_spoken(self.candidate.swap);
        taken == Bytes::ZERO
            || s.ram_expected(s.ram_leaving() + freed).is_none_or(|left| {
                // Once in vain, then only if nobody is left whose real share is not known.
                let dares = self.daring && (!self.is_rethought() || left.stays == Bytes::ZERO);
                let left = if dares { left.possible } else { left.likely };
                left >= others + taken
            })
    }

    /// Sleepers take host RAM before those who stop have given theirs back.
    fn has_ram_to_sleep(&self, instance: &Instance, chosen: &Choice) -> bool {
        let s = self.scheduler;
        let before = chosen.iter().filter(|(_, _, sleeps)| *sleeps);
        let asleep: Bytes = before.map(|(i, _, _)| s.ram_to_sleep(i)).sum();
        let with: Vec<_> = chosen.iter().copied().chain([(instance, Leaves::Idle, true)]).collect();
        let weights = s.ram_to_sleep(instance);
        weights == Bytes::ZERO || (s.has_ram(asleep + weights) && self.ram_fits(&with))
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
        self.fits_into(self.scheduler.capacity(gpu), gpu, chosen)
    }

    fn fits_into(&self, capacity: Bytes, gpu: GpuId, chosen: &Choice) -> bool {
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
            return taken <= s.staying_promise(&self.candidate.spec, gpu)
                && need.bytes > Bytes::ZERO;
        }
        taken + need.bytes <= capacity
    }

    fn fits_by_sample(&self, gpu: GpuId, chosen: &Choice) -> bool {
        let s = self.scheduler;
        if !s.world.proof || s.is_blind(gpu) {
            return true;
        }
        // Without a fresh sample, or while a start takes its bytes: by the books, and by what the
        // driver is known to keep.
        let fresh = s.fresh_free(gpu);
        if (fresh.is_none() || s.unvouched(gpu) > Bytes::ZERO)
            && !self.fits_into(s.usable(gpu), gpu, chosen)
        {
            return false;
        }
        let Some(free) = fresh else { return true };
        let here = |i: &Instance| i.gpus.contains(&gpu) && i.promise.is_some();
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
        let own = s.current(&self.candidate.spec.name).filter(|i| i.is_sleeping());
        let own = own.map_or(Bytes::ZERO, |i| s.shown_on(i, gpu));
        free + s.leaving_held(gpu) + freed + own
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

    /// Whether everyone who may not be up beside the model leaves.
    fn groups_fit(&self, chosen: &Choice) -> bool {
        let (s, spec) = (self.scheduler, &self.candidate.spec);
        let stays = |i: &&Instance| !chosen.iter().any(|(c, _, _)| c.id == i.id);
        !s.instances.values().filter(stays).any(|i| s.kept_apart(spec, i).is_some())
    }

    fn takes_slot(&self, instance: &Instance) -> bool {
        let s = self.scheduler;
        let capped = s.catalog.settings.swap.max_concurrent_models > 0;
        s.takes_slot(instance) && (capped || uses_gpu(&instance.spec))
    }

    fn priced(&self, choice: &Choice) -> (Price, Plan) {
        let s = self.scheduler;
        let busy = choice.iter().filter(|(_, leaves, _)| *leaves == Leaves::Busy).count();
        let cost = choice.iter().map(|(i, _, _)| s.price(i)).sum();
        let victims = choice
            .iter()
            .map(|(i, leaves, sleeps)| Victim {
                instance: i.id,
                asleep: *sleeps,
                busy: *leaves == Leaves::Busy,
                why: s.why_evicted(i, *leaves, *sleeps),
            })
            .collect();
        ((busy, cost, choice.len()), Plan { gpus: self.gpus.to_vec(), victims })
    }

    /// Everyone who may be asked leaves, and it is still not enough by the sample alone.
    fn needs_bytes_nobody_promised(&self) -> bool {
        let s = self.scheduler;
        if self.candidate.urgency.is_unasked() {
            return false;
        }
        let everyone: Choice = s
            .instances
            .values()
            .filter(|i| i.model != self.candidate.spec.name)
            .filter_map(|i| self.may_leave(i).map(|leaves| (i, leaves, false)))
            .collect();
        let stuck = s.instances.values().any(|i| {
            let here = i.gpus.iter().any(|g| self.gpus.contains(g))
                || (i.ram() > Bytes::ZERO && self.ram_need() > Bytes::ZERO);
            i.is_stopping() && i.trouble.is_some() && here
        });
        let by_promise = self.ram_fits_by_promise(&everyone)
            && self.gpus.iter().all(|&g| self.fits_by_promise(g, &everyone));
        let by_sample = |choice: &Choice| {
            self.ram_fits_by_sample(choice)
                && self.gpus.iter().all(|&g| self.fits_by_sample(g, choice))
        };
        // Somebody who may not leave yet is waited for, as long as that would do.
        let hopeless = !by_sample(&self.eventually());
        self.slots_fit(&everyone)
            && self.groups_fit(&everyone)
            && ((by_promise && !by_sample(&everyone) && hopeless)
                || (stuck && !by_promise && self.fits_but_for_stuck()))
    }

    /// Everyone who will leave one day.
    fn eventually(&self) -> Choice<'_> {
        let s = self.scheduler;
        s.instances
            .values()
            .filter(|i| i.model != self.candidate.spec.name)
            .filter(|i| !s.stays_for(&self.candidate.spec.name, i) && !i.is_stopping())
            .map(|i| (i, Leaves::Busy, false))
            .collect()
    }

    /// Whoever leaves, so much host RAM is not likely to be there.
    pub fn has_to_dare(&self) -> bool {
        !self.ram_fits_by_sample(&self.eventually())
    }

    /// It would fit, were it not for memory that never came back.
    fn fits_but_for_stuck(&self) -> bool {
        let s = self.scheduler;
        let staying = || {
            s.instances
                .values()
                .filter(|i| i.model != self.candidate.spec.name && !i.is_stopping())
                .filter(|i| self.may_leave(i).is_none())
        };
        let ram: Bytes = staying().map(Instance::ram).sum();
        let need = ram + self.ram_need() + s.ram_spoken(self.candidate.swap);
        let ram_fits = s.ram_capacity().is_none_or(|capacity| need <= capacity);
        let on_gpus = self.gpus.iter().all(|&gpu| {
            let others: Bytes = staying().map(|i| s.promise_on(i, gpu)).sum();
            let need = self.need(gpu);
            let need = if need.elastic { Bytes::ZERO } else { need.bytes };
            others + need + s.spoken(gpu, self.candidate.swap) <= s.capacity(gpu)
        });
        (ram_fits || self.ram_need() == Bytes::ZERO) && on_gpus
    }

    /// How far this set is from being usable, and who is in the way.
    fn why_blocked(&self) -> (usize, String) {
        let s = self.scheduler;
        let name = &self.candidate.spec.name;
        let anyone = |i: &Instance| (!s.stays_for(name, i)).then_some(Leaves::Busy);
        let Some(choice) = self.choose(false, &anyone) else {
            return (NEVER, "what holds the memory cannot be moved".to_owned());
        };
        let reasons: Vec<String> =
            choice.iter().filter_map(|(i, _, _)| s.may_leave(self.candidate, i).err()).collect();
        if reasons.is_empty() {
            return (6, "another swap to end there".to_owned());
        }
        (2 + reasons.len().min(3), reasons.join(", "))
    }
}
