//! Which model's turn it is, and who may be asked to leave for it.
//!
//! 1. Callers of ensure and load, in the order they came.
//! 2. Models with an overdue waiter, the longest overdue first; the GPUs they wait for begin no
//!    other swap.
//! 3. Models by what their waiters have suffered: summed age and the age of the oldest, weighted
//!    by priority, per second of learned move.
//! 4. Company: members of a group that is loaded together. Then models whose keep window opened: in
//!    place of models that have been idle for long and that no pin and no window keeps, while nobody
//!    waits.
//! 5. Warm-up and restore: into free memory only, while nobody waits.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::Scheduler;
use super::ask::AskKind;
use super::event::EnsureKind;
use super::placement::Planned;
use super::record::{Phase, SwapCause};
use super::residency::{Instance, Residency};
use crate::config::catalog::ModelSpec;
use crate::units::{AskId, GpuId, InstanceId, ModelName, SwapId, Time};

/// In order of rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    Ensure(AskId),
    /// Since when its claim has been due.
    Overdue(Time),
    Normal,
    /// Another member of its group is up.
    Company,
    /// Wanted by the time of day: takes free memory, and the place of those long idle.
    Preload,
    /// Takes free memory only.
    Spare,
}

impl Urgency {
    /// Nobody has asked for it.
    pub fn is_unasked(self) -> bool {
        self > Urgency::Normal
    }
}

/// How an instance may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Leaves {
    Idle,
    Busy,
}

/// A model that should become ready.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub spec: Arc<ModelSpec>,
    /// Its swap, if one has begun but has no room yet.
    pub swap: Option<SwapId>,
    pub urgency: Urgency,
    pub cause: SwapCause,
    pub score: u128,
    /// What weighs against those who are there (see `turn`).
    pub pressure: u128,
    pub oldest: Time,
    /// Instances whose start it would call off (see `preempt`).
    pub calls_off: Vec<InstanceId>,
    /// Whose start was called off for it, in words: the room is its own.
    pub instead_of: Option<String>,
}

impl Scheduler {
    /// Gives room to those who may have it, in order of rank.
    pub(super) fn choose(&mut self) {
        let candidates = self.candidates();
        if !self.shutting_down && self.memory.no_proof.is_none() {
            self.give_room(&candidates);
        }
        self.looked_at(candidates);
    }

    fn give_room(&mut self, candidates: &[Candidate]) {
        let mut wanted: BTreeSet<GpuId> = BTreeSet::new();
        let mut longer: Vec<ModelName> = Vec::new();
        self.renew_fits();
        let mut bound = self.bound(candidates);
        for candidate in candidates {
            // Somebody of higher rank may just have been given its place.
            let name = &candidate.spec.name;
            if self.is_process_left(name) || self.is_leaving(name) {
                continue;
            }
            if bound.as_mut().is_some_and(|bound| self.is_out_of_reach(bound, candidate))
                && self.is_known_to_fit(&candidate.spec)
            {
                if !self.blocked.contains_key(name) {
                    let why = "room: whoever is there is in use, or others waited longer";
                    self.blocked.insert(name.clone(), why.to_owned());
                }
                continue;
            }
            let mut candidate = candidate.clone();
            if let Some(refusal) = self.cannot_fit(&candidate.spec) {
                let name = candidate.spec.name.clone();
                self.refuse_queue(&name, &refusal);
                self.refuse_asks(&name, &refusal);
                if let Some(swap) = candidate.swap {
                    self.cancel_swap(swap, "pinned models leave no room for it any more");
                }
                continue;
            }
            let urgent = candidate.urgency < Urgency::Normal;
            let planned = match self.rival_waiting(&candidate, &longer) {
                Some(why) => Planned::Blocked { gpus: Vec::new(), why },
                None => match self.sets_within(bound.as_ref(), &candidate) {
                    Some(sets) => self.plan_on(sets, &candidate, &wanted),
                    None => self.plan(&candidate, &wanted),
                },
            };
            let planned = self.or_call_off(planned, &mut candidate, &wanted);
            match (planned, candidate.swap) {
                (Planned::Room(plan), None) => {
                    let swap = self.begin_load(&candidate, &plan);
                    if self.wakes(swap) {
                        self.place(swap, &candidate, plan);
                    }
                }
                (Planned::Room(plan), Some(swap)) => self.place(swap, &candidate, plan),
                (Planned::Held { gpus }, swap) => {
                    // Awake it would take all it had; started anew it takes what is left.
                    if let Some(sleeper) = self.elastic_sleeper(&candidate) {
                        self.stop_sleeper(sleeper);
                        continue;
                    }
                    let why = self.memory_text(&candidate.spec.name, &gpus, None);
                    self.blocked.insert(candidate.spec.name.clone(), why);
                    self.held(&candidate, swap, gpus);
                    continue;
                }
                (Planned::Blocked { gpus, why }, swap) => {
                    if let Some(sleeper) = self.is_better_off_cold(&candidate, &wanted) {
                        self.stop_sleeper(sleeper);
                        continue;
                    }
                    if urgent {
                        wanted.extend(gpus);
                        longer.push(candidate.spec.name.clone());
                    }
                    if let Some(swap) = swap.filter(|_| candidate.urgency.is_unasked()) {
                        self.cancel_swap(swap, "the free memory was taken");
                        continue;
                    }
                    match swap {
                        // It keeps others from what a sleeper holds, and has done nothing yet.
                        Some(swap) if self.wakes(swap) => self.cancel_swap(swap, &why),
                        Some(swap) => self.forget_memory_wait(swap),
                        None => {}
                    }
                    self.blocked.insert(candidate.spec.name.clone(), why);
                    continue;
                }
            }
            self.blocked.remove(&candidate.spec.name);
            bound = self.bound(candidates);
        }
        self.standing.wanted = wanted;
    }

    /// Everything that should become ready and has no room yet, by rank.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let longest = self.longest_wait();
        let mut list: Vec<Candidate> =
            self.catalog.models.values().filter_map(|spec| self.candidate(spec, longest)).collect();
        self.keep_first_in_line(&mut list);
        list.sort_by(|a, b| {
            (a.urgency, std::cmp::Reverse(a.score), a.oldest, &a.spec.name).cmp(&(
                b.urgency,
                std::cmp::Reverse(b.score),
                b.oldest,
                &b.spec.name,
            ))
        });
        list
    }

    fn candidate(&self, spec: &Arc<ModelSpec>, longest: u128) -> Option<Candidate> {
        // An adapter is served by its base, and never placed itself.
        let state = self.models.get(&spec.name).filter(|_| spec.adapter.is_none())?;
        let swap = self.load_of(&spec.name);
        if swap.is_some_and(|s| s.placed || s.phase < Phase::Drain) || state.failure.is_some() {
            return None;
        }
        let current = self.current(&spec.name);
        if current.is_some_and(|i| i.release.is_some()) {
            return None;
        }
        if self.is_leaving(&spec.name) {
            return None;
        }
        match current.map(|i| i.residency) {
            None | Some(Residency::Starting { .. } | Residency::Sleeping { .. }) => {}
            Some(
                Residency::Ready
                | Residency::Draining
                | Residency::Stopping
                | Residency::FallingAsleep
                | Residency::Waking
                | Residency::Lost { .. },
            ) => return None,
        }
        self.describe(spec, longest)
    }

    /// A swap that has not started yet takes its instance away, or put it to sleep to make room;
    /// or it sleeps and is due to be unloaded.
    fn is_leaving(&self, model: &ModelName) -> bool {
        let leaves = |i: &Instance| self.swaps.values().any(|s| !s.started && s.has_victim(i.id));
        let outdated = |i: &Instance| i.is_sleeping() && self.unload_due(i).is_some();
        self.current(model).is_some_and(|i| leaves(i) || outdated(i))
    }

    /// The candidate behind a model, also while its swap is under way.
    pub(super) fn candidate_of(&self, model: &ModelName) -> Option<Candidate> {
        self.describe(self.catalog.model(model)?, self.longest_wait())
    }

    /// `longest`: the age of who waits longest for any model.
    fn describe(&self, spec: &Arc<ModelSpec>, longest: u128) -> Option<Candidate> {
        let state = self.models.get(&spec.name)?;
        let swap = self.load_of(&spec.name);
        let (urgency, cause) = self.urgency(spec, swap.map(|s| s.cause))?;
        let instead_of = swap.and_then(|s| s.instead_of.clone());
        let (score, pressure) = self.score(spec, state, longest);
        let score = self.baseline_score(state).unwrap_or(score);
        Some(Candidate {
            spec: Arc::clone(spec),
            swap: swap.map(|s| s.id),
            urgency,
            cause,
            score: if instead_of.is_some() { u128::MAX } else { score },
            pressure,
            oldest: state.queue.oldest().unwrap_or(self.now),
            calls_off: Vec::new(),
            instead_of,
        })
    }

    fn urgency(&self, spec: &ModelSpec, begun: Option<SwapCause>) -> Option<(Urgency, SwapCause)> {
        let mut asks = self.asks.iter().filter(|(_, ask)| ask.model == spec.name);
        let ensure = asks.clone().find_map(|(&id, ask)| match ask.kind {
            AskKind::Ready(EnsureKind::Ensure) => Some((id, SwapCause::Ensure)),
            AskKind::Ready(EnsureKind::Load | EnsureKind::Wake) => Some((id, SwapCause::Load)),
            AskKind::Ready(EnsureKind::Warmup) | AskKind::Gone { .. } | AskKind::Asleep { .. } => {
                None
            }
        });
        if let Some((id, cause)) = ensure {
            return Some((Urgency::Ensure(id), cause));
        }
        let state = self.models.get(&spec.name)?;
        if let Some(due) = state.claim.map(|claim| claim.due).filter(|&due| due <= self.now) {
            return Some((Urgency::Overdue(due), SwapCause::Request));
        }
        if !state.queue.is_empty() {
            return Some((Urgency::Normal, SwapCause::Request));
        }
        match begun {
            // Its caller went away or ran out of time; what it began goes on.
            Some(cause @ (SwapCause::Ensure | SwapCause::Load)) => {
                return Some((Urgency::Normal, cause));
            }
            Some(SwapCause::Group) => return Some((Urgency::Company, SwapCause::Group)),
            Some(cause @ (SwapCause::Warmup | SwapCause::Restore)) => {
                return Some((Urgency::Spare, cause));
            }
            Some(cause @ SwapCause::Keep) => return Some((Urgency::Preload, cause)),
            Some(
                SwapCause::Request
                | SwapCause::Unload
                | SwapCause::Ttl
                | SwapCause::Sleep
                | SwapCause::Reload
                | SwapCause::Evict
                | SwapCause::Died
                | SwapCause::Cleanup,
            )
            | None => {}
        }
        if self.company_due(&spec.name) {
            return Some((Urgency::Company, SwapCause::Group));
        }
        let spare = !self.somebody_waits();
        if spare && self.keep_due(spec).is_some_and(|due| due <= self.now) {
            return Some((Urgency::Preload, SwapCause::Keep));
        }
        let warmup = |kind: AskKind| kind == AskKind::Ready(EnsureKind::Warmup);
        if spare && asks.any(|(_, ask)| warmup(ask.kind)) {
            return Some((Urgency::Spare, SwapCause::Warmup));
        }
        (spare && self.restore_due(spec).is_some_and(|due| due <= self.now))
            .then_some((Urgency::Spare, SwapCause::Restore))
    }

    /// A model waits for room, or is being given some.
    pub(super) fn somebody_waits(&self) -> bool {
        self.models.iter().any(|(name, m)| {
            !m.queue.is_empty() && self.current(name).is_none_or(|i| !i.is_ready())
        })
    }

    /// When a warm-up model that had to leave may come back: after quiet of twice its move.
    pub(super) fn restore_due(&self, spec: &ModelSpec) -> Option<Time> {
        let state = self.models.get(&spec.name)?;
        let away = self.current(&spec.name).is_none_or(Instance::is_sleeping);
        let left = spec.warmup && !state.unloaded && state.failure.is_none() && away;
        // Only what was up before: the first load is asked for by the owner.
        (left && state.learned.start.is_some())
            .then(|| self.last_demand.max(state.since) + self.move_cost(&spec.name) * 2)
    }

    /// When the first waiter of a model became (or becomes) overdue.
    pub(super) fn overdue_since(&self, model: &ModelName) -> Option<Time> {
        let queue = &self.models.get(model).filter(|_| self.is_fair())?.queue;
        queue.overdue_since(self.max_wait(model))
    }

    /// Whether `instance` may be asked to leave for this candidate; else why not, in words.
    pub(super) fn may_leave(
        &self,
        candidate: &Candidate,
        instance: &Instance,
    ) -> Result<Leaves, String> {
        let name = &instance.model;
        if self.is_pinned(instance) {
            return Err(format!("{name} is pinned"));
        }
        if let Some(group) = self.catalog.persists_for(name, &candidate.spec.name) {
            return Err(format!("{name} belongs to {group}, which stays"));
        }
        if let Some(why) = self.stays_for_company(candidate, instance) {
            return Err(why);
        }
        if self.swaps.values().any(|s| s.instance == instance.id) {
            return Err(format!("{name} is being moved"));
        }
        if candidate.urgency == Urgency::Preload
            && let Some(why) = self.outlasts_preload(&candidate.spec.name, instance)
        {
            return Err(why);
        }
        match instance.residency {
            Residency::Sleeping { .. } if candidate.urgency != Urgency::Spare => {
                return if instance.release.is_some() {
                    Err(format!("{name} is falling asleep"))
                } else {
                    Ok(Leaves::Idle)
                };
            }
            Residency::Ready if candidate.urgency != Urgency::Spare => {}
            Residency::Starting { .. } | Residency::Waking => {
                return Err(format!("{name} is starting"));
            }
            Residency::Lost { .. } => return Err(format!("{name} is out of reach")),
            Residency::Ready
            | Residency::Sleeping { .. }
            | Residency::Draining
            | Residency::Stopping
            | Residency::FallingAsleep => return Err(format!("{name} is there")),
        }
        if instance.spec.is_external() {
            return Err(format!("{name} runs elsewhere"));
        }
        if let Some(hold) = instance.hold {
            let left = hold.until.since(self.now).as_secs();
            return Err(format!("{name} is held for its caller ({left} s)"));
        }
        self.may_leave_ready(candidate, instance)
    }

    /// A victim that seemed idle is busy: is notice due to it all the same?
    pub(super) fn may_give_notice(&self, candidate: &Candidate, instance: &Instance) -> bool {
        instance.hold.is_none() && self.may_leave_ready(candidate, instance) == Ok(Leaves::Busy)
    }

    fn may_leave_ready(
        &self,
        candidate: &Candidate,
        instance: &Instance,
    ) -> Result<Leaves, String> {
        if let Some(verdict) = self.baseline_may_leave(instance) {
            return verdict;
        }
        let name = &instance.model;
        let idle = self.is_idle(instance);
        let tenure_ends = instance.ready_at + self.tenure(instance);
        match candidate.urgency {
            Urgency::Ensure(_) => return Ok(if idle { Leaves::Idle } else { Leaves::Busy }),
            Urgency::Overdue(_) if idle => return Ok(Leaves::Idle),
            Urgency::Preload if idle => return Ok(Leaves::Idle),
            Urgency::Normal | Urgency::Company | Urgency::Spare if idle => {
                let lingers = instance.last_used() + self.linger(instance);
                // An instance that nobody has used yet was started for somebody.
                return if lingers > self.now {
                    Err(format!("{name} was used a moment ago"))
                } else {
                    Ok(Leaves::Idle)
                };
            }
            Urgency::Company => return Err(format!("{name} is in use")),
            Urgency::Preload => {
                return Err(format!("{name} serves {} requests", instance.in_flight()));
            }
            Urgency::Overdue(_) | Urgency::Normal | Urgency::Spare => {}
        }
        if tenure_ends > self.now {
            let left = tenure_ends.since(self.now).as_secs();
            return Err(format!("{name} is busy and may stay {left} s more"));
        }
        let overdue = matches!(candidate.urgency, Urgency::Overdue(_));
        if overdue || self.outweighs(candidate, instance) {
            return Ok(Leaves::Busy);
        }
        Err(format!("{name} serves {} requests", instance.in_flight()))
    }

    /// Eviction order, least valuable first.
    pub(super) fn value(&self, instance: &Instance, leaves: Leaves) -> impl Ord + use<> {
        let spec = &instance.spec;
        let wanted = spec.warmup || self.is_kept(&instance.model);
        let work = self.work(instance);
        // The baselines: the least recently used, whatever it costs to bring back.
        let price = if self.is_fair() { self.price(instance) } else { 0 };
        (leaves, wanted, work, price, instance.last_used(), instance.id)
    }

    pub(super) fn why_evicted(&self, instance: &Instance, leaves: Leaves, sleeps: bool) -> String {
        let state = if instance.is_sleeping() {
            "asleep".to_owned()
        } else if leaves == Leaves::Busy {
            format!("given notice with {} requests running", instance.in_flight())
        } else {
            format!("idle {}", seconds(instance.idle_for(self.now)))
        };
        let keep = if sleeps { self.residue_expected(instance) } else { crate::units::Bytes::ZERO };
        let frees = instance.promise.unwrap_or_default() - keep;
        let back = seconds(self.bring_back(instance));
        let how = if sleeps { ", goes to sleep" } else { "" };
        let room = match instance.gpus.as_slice() {
            [] => "frees a place".to_owned(),
            gpus if gpus.iter().any(|&g| self.is_blind(g)) => "frees the GPU".to_owned(),
            [_] => format!("frees {frees}"),
            _ => format!("frees {frees} on each of {} GPUs", instance.gpus.len()),
        };
        let host = if sleeps { String::new() } else { instance.ram_text() };
        format!("{state}, cheapest to bring back ({back}), {room}{host}{how}")
    }

    /// Old instances of a model whose process may still be there: a new one would meet its name,
    /// port and memory.
    pub(super) fn is_process_left(&self, model: &ModelName) -> bool {
        self.instances.of(model).any(|i| i.is_stopping() && i.may_run())
    }
}

/// "41 s", "1.5 s", "4 min": as a person would say it.
pub(super) fn seconds(duration: Duration) -> String {
    let ms = duration.as_millis();
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..10_000 => format!("{:.1} s", duration.as_secs_f64()),
        10_000..180_000 => format!("{} s", ms / 1000),
        _ => format!("{} min", ms / 60_000),
    }
}
