//! The way of a swap: preflight → fetch → drain → vacate → prove → start → vouch.
//!
//! Each file holds one phase: what begins it, what it waits for, and how it ends. Nothing is
//! drained before preflight and fetch passed. Until its first stop is emitted a swap can be
//! called off without a trace; once its start is emitted it runs to its end (a start costs most
//! of what it will ever cost in its first seconds, and whoever left tends to come back), unless
//! an operator or a reload wants the model gone.

mod drain;
mod fetch;
mod preflight;
mod prove;
mod start;
mod unload;
mod vacate;
mod vouch;

use std::time::Duration;

pub(super) use drain::CANCEL_GRACE;
pub(super) use prove::StartBlock;

use super::Scheduler;
use super::action::Action;
use super::event::{Done, Fault};
use super::placement::{Plan, Victim};
use super::policy::{Candidate, Urgency};
use super::record::{Eviction, Phase, SwapCause, SwapKind, SwapOutcome, SwapRecord};
use super::residency::{Instance, Move, MoveKind, Residency};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, SwapId, Time};

/// A fetch that takes longer gives its GPUs free for others meanwhile.
pub(in crate::scheduler) const FETCH_CLAIM: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub(in crate::scheduler) struct Swap {
    pub id: SwapId,
    pub model: ModelName,
    pub kind: SwapKind,
    pub cause: SwapCause,
    pub decision: String,
    /// Load: the instance that becomes ready. Unload: the one that leaves.
    pub instance: InstanceId,
    pub gpus: Vec<GpuId>,
    pub victims: Vec<Victim>,
    /// Who leaves by the present plan, and who left by earlier ones.
    pub evicted: Vec<Eviction>,
    pub evicted_before: Vec<Eviction>,
    pub began: Time,
    pub phases: Vec<(Phase, Duration)>,
    pub phase: Phase,
    pub since: Time,
    /// Has a plan; before `placed` it only keeps others out for a moment.
    pub planned: bool,
    /// Preflight and fetch passed and the plan is being carried out.
    pub placed: bool,
    /// For an overdue waiter or an ensure: nobody else begins on its GPUs.
    pub urgent: bool,
    /// The start (or wake) was emitted.
    pub started: bool,
    /// A stop or sleep was emitted: no way back.
    pub vacated: bool,
    /// The one retry was used.
    pub retried: bool,
    /// A sample showed less than was planned with: it chose again, once.
    pub rethought: bool,
    /// Since when only memory is missing.
    pub memory_wait: Option<Time>,
    pub watching: bool,
    /// Whose start was called off for this one, in words.
    pub instead_of: Option<String>,
    /// Unload: the instance had ended by itself, and why.
    pub death: Option<Fault>,
}

impl Swap {
    pub fn is_load(&self) -> bool {
        self.kind == SwapKind::Load
    }

    /// Whether it keeps its GPUs from others.
    pub fn claims(&self, now: Time) -> bool {
        let slow = self.phase == Phase::Fetch && now.since(self.since) >= FETCH_CLAIM;
        self.placed || (self.planned && self.phase < Phase::Drain && !slow)
    }

    pub fn has_victim(&self, id: InstanceId) -> bool {
        self.victims.iter().any(|v| v.instance == id)
    }

    pub fn record(&self, now: Time, outcome: Option<SwapOutcome>) -> SwapRecord {
        let ended = outcome.is_some();
        let making_room = matches!(self.phase, Phase::Drain | Phase::Vacate) && !ended;
        let before = self.evicted_before.iter().filter(|_| !making_room);
        let mut phases = self.phases.clone();
        if ended {
            phases.push((self.phase, now.since(self.since)));
        }
        SwapRecord {
            id: self.id,
            model: self.model.clone(),
            kind: self.kind,
            cause: self.cause,
            decision: self.decision.clone(),
            instance: Some(self.instance),
            gpus: self.gpus.iter().copied().filter(|&g| g != super::memory::UNSEEN).collect(),
            evicted: before.chain(&self.evicted).cloned().collect(),
            began: self.began,
            ended: ended.then_some(now),
            phases,
            phase: (!ended).then_some((self.phase, self.since)),
            outcome,
        }
    }
}

impl Scheduler {
    /// The swap that makes a model ready, if one is under way.
    pub(in crate::scheduler) fn load_of(&self, model: &ModelName) -> Option<&Swap> {
        self.swaps.of(model).next()
    }

    /// A candidate got room (or needs none, or waits for memory that nobody accounts for): its
    /// swap begins. That of a sleeper has nothing to check or fetch and can be placed at once.
    pub(in crate::scheduler) fn begin_load(
        &mut self,
        candidate: &Candidate,
        plan: &Plan,
    ) -> SwapId {
        let name = candidate.spec.name.clone();
        let id = self.take_swap_id();
        let sleeper = self.current(&name).filter(|i| i.is_sleeping()).map(|i| i.id);
        let instance = match sleeper {
            Some(sleeper) => sleeper,
            None => {
                let new = self.take_instance_id();
                let residency = Residency::Starting { phase: Phase::Preflight };
                let mut instance = Instance::new(new, &candidate.spec, residency, self.now);
                instance.gpus.clone_from(&plan.gpus);
                self.instances.insert(new, instance);
                new
            }
        };
        let swap = Swap {
            id,
            model: name,
            kind: SwapKind::Load,
            cause: candidate.cause,
            decision: self.decision(candidate, plan),
            instance,
            gpus: plan.gpus.clone(),
            victims: plan.victims.clone(),
            evicted: Vec::new(),
            evicted_before: Vec::new(),
            began: self.now,
            phases: Vec::new(),
            phase: if sleeper.is_some() { Phase::Drain } else { Phase::Preflight },
            since: self.now,
            planned: true,
            placed: false,
            urgent: candidate.urgency < Urgency::Normal,
            started: false,
            vacated: false,
            retried: false,
            rethought: false,
            memory_wait: None,
            watching: false,
            instead_of: candidate.instead_of.clone(),
            death: None,
        };
        self.swaps.insert(id, swap);
        self.changed();
        self.record(id);
        if sleeper.is_none() {
            self.emit_preflight(id);
        }
        id
    }

    /// Why now and why these, in words.
    fn decision(&self, candidate: &Candidate, plan: &Plan) -> String {
        let waiting = self.queue_len(&candidate.spec.name);
        let age = super::policy::seconds(self.now.since(candidate.oldest));
        let why = match candidate.urgency {
            Urgency::Ensure(_) => format!("asked for ({})", candidate.cause.as_str()),
            Urgency::Overdue(_) => format!("{waiting} waiting, the oldest {age}: overdue"),
            Urgency::Normal if waiting > 0 => format!("{waiting} waiting, the oldest {age}"),
            Urgency::Normal => "its caller left; what it began goes on".to_owned(),
            Urgency::Preload => "its keep window is open, nobody waits".to_owned(),
            Urgency::Company => "another of its group is up".to_owned(),
            Urgency::Spare => "fits into free memory, nobody waits".to_owned(),
        };
        let names: Vec<String> = plan
            .victims
            .iter()
            .filter_map(|v| Some(format!("{} ({})", self.instances.get(&v.instance)?.model, v.why)))
            .collect();
        let why = match &candidate.instead_of {
            Some(other) => format!("{why}; instead of {other}"),
            None => why,
        };
        if names.is_empty() {
            format!("{why}; nobody has to leave")
        } else {
            format!("{why}; leaves: {}", names.join(", "))
        }
    }

    pub(in crate::scheduler) fn record(&mut self, id: SwapId) {
        if let Some(swap) = self.swaps.get(&id) {
            let record = swap.record(self.now, None);
            self.emit(Action::Record(record));
        }
    }

    fn enter_phase(&mut self, id: SwapId, phase: Phase) {
        let now = self.now;
        let Some(swap) = self.swaps.get_mut(&id) else { return };
        let previous = (swap.phase, now.since(swap.since));
        swap.phases.push(previous);
        (swap.phase, swap.since) = (phase, now);
        if let Some(instance) = self.instances.get_mut(&swap.instance)
            && swap.kind == SwapKind::Load
            && matches!(instance.residency, Residency::Starting { .. })
        {
            instance.enter(Residency::Starting { phase }, now);
        }
        self.changed();
        self.record(id);
    }

    /// Carries every swap as far as it can go now.
    pub(in crate::scheduler) fn advance_swaps(&mut self) {
        let ids: Vec<SwapId> = self.swaps.keys().copied().collect();
        for id in ids {
            if self.is_pointless(id) {
                self.cancel_swap(id, "nobody waits for it any more");
                continue;
            }
            match self.swaps.get(&id).map(|s| (s.phase, s.placed)) {
                Some((Phase::Drain, true)) => self.advance_drain(id),
                Some((Phase::Vacate, _)) => self.advance_vacate(id),
                Some((Phase::Prove, _)) => self.advance_prove(id),
                Some((
                    Phase::Preflight | Phase::Fetch | Phase::Drain | Phase::Start | Phase::Vouch,
                    _,
                ))
                | None => {}
            }
        }
    }

    /// Nobody wants the model (or its instance) any more, and calling the swap off costs nothing.
    fn is_pointless(&self, id: SwapId) -> bool {
        let Some(swap) = self.swaps.get(&id) else { return false };
        if !swap.is_load() || swap.started || swap.vacated {
            return false;
        }
        // It would never be placed: its sleeper is to be unloaded first.
        let sleeper = self.instances.get(&swap.instance).filter(|i| i.is_sleeping());
        if !swap.placed && sleeper.is_some_and(|i| self.unload_due(i).is_some()) {
            return true;
        }
        let wanted = self.queue_len(&swap.model) > 0;
        let asked = self
            .asks
            .values()
            .any(|a| a.model == swap.model && matches!(a.kind, super::ask::AskKind::Ready(_)));
        match swap.cause {
            SwapCause::Request => !wanted && !asked,
            SwapCause::Warmup | SwapCause::Restore => !wanted && self.somebody_waits(),
            SwapCause::Keep => {
                !wanted && !asked && (self.somebody_waits() || !self.is_kept(&swap.model))
            }
            SwapCause::Group => !wanted && !asked && !self.company_due(&swap.model),
            SwapCause::Ensure
            | SwapCause::Load
            | SwapCause::Unload
            | SwapCause::Ttl
            | SwapCause::Sleep
            | SwapCause::Reload
            | SwapCause::Evict
            | SwapCause::Died
            | SwapCause::Cleanup => false,
        }
    }

    /// Ends a swap; whoever was to leave and has not been stopped stays.
    pub(in crate::scheduler) fn end_swap(&mut self, id: SwapId, outcome: SwapOutcome) {
        self.unwatch(id);
        self.rescue_victims(id);
        let Some(swap) = self.swaps.remove(&id) else { return };
        self.emit(Action::Record(swap.record(self.now, Some(outcome))));
        self.changed();
    }

    /// Calls off a swap whose start was not emitted.
    pub(in crate::scheduler) fn cancel_swap(&mut self, id: SwapId, why: &str) {
        let Some(swap) = self.swaps.get(&id) else { return };
        let (instance, is_load) = (swap.instance, swap.is_load());
        self.end_swap(id, SwapOutcome::Cancelled { why: why.to_owned() });
        if is_load {
            self.drop_unstarted(id, instance);
        }
    }

    /// Takes back an instance that was never started. An effect under way is cancelled first.
    fn drop_unstarted(&mut self, swap: SwapId, id: InstanceId) {
        let Some(instance) = self.instances.get(&id) else { return };
        if !matches!(instance.residency, Residency::Starting { .. }) {
            return;
        }
        let model = instance.model.clone();
        if instance.moving.is_some() {
            self.emit_stop(swap, id);
        } else {
            self.instances.remove(&id);
            self.answer_unloaded(id);
            self.forget_removed(&model);
        }
        self.changed();
    }

    /// An effect ended. What fits nothing under way is dropped.
    pub(in crate::scheduler) fn move_done(&mut self, swap: SwapId, id: InstanceId, done: Done) {
        let Some(instance) = self.instances.get(&id) else { return };
        let kind = match &done {
            Done::Preflight(_) => MoveKind::Preflight,
            Done::Fetch(_) => MoveKind::Fetch,
            Done::Start(_) => MoveKind::Start,
            Done::Stop(_) => MoveKind::Stop,
            Done::Sleep(_) => MoveKind::Sleep,
            Done::Wake(_) => MoveKind::Wake,
        };
        let Some(under_way) = instance.moving.filter(|m| m.swap == swap && m.kind == kind) else {
            return;
        };
        self.changed();
        if let Some(instance) = self.instances.get_mut(&id) {
            instance.moving = None;
        }
        match done {
            Done::Preflight(result) => self.preflight_done(swap, result),
            Done::Fetch(result) => self.fetch_done(swap, result),
            Done::Start(result) => self.start_done(swap, id, under_way, result),
            Done::Wake(result) => self.wake_done(swap, id, under_way, result),
            Done::Stop(result) => self.stop_done(id, under_way, result),
            Done::Sleep(result) => self.sleep_done(id, under_way, result),
        }
    }

    fn set_moving(&mut self, id: InstanceId, kind: MoveKind, swap: SwapId, deadline: Time) {
        let since = self.now;
        if let Some(instance) = self.instances.get_mut(&id) {
            instance.moving = Some(Move { kind, swap, since, deadline });
        }
    }

    /// Effects that did not report by their deadline count as failed.
    pub(in crate::scheduler) fn expire_moves(&mut self) {
        let late: Vec<(InstanceId, Move)> = self
            .instances
            .values()
            .filter_map(|i| Some((i.id, i.moving?)))
            .filter(|(_, m)| m.deadline <= self.now)
            .collect();
        for (id, late) in late {
            self.move_late(id, late);
        }
    }

    fn move_late(&mut self, id: InstanceId, late: Move) {
        use super::event::FaultKind as Kind;
        let name = self.instances.get(&id).map(|i| i.model.to_string()).unwrap_or_default();
        let waited = super::policy::seconds(self.now.since(late.since));
        let fault = |kind: Kind, what: &str| {
            Fault::new(kind, format!("{name}: no word from its {what} after {waited}"))
        };
        let done = match late.kind {
            MoveKind::Preflight => Done::Preflight(Err(fault(Kind::TimedOut, "preflight"))),
            MoveKind::Fetch => Done::Fetch(Err(fault(Kind::TimedOut, "fetch"))),
            MoveKind::Start => Done::Start(Err(fault(Kind::TimedOut, "start"))),
            MoveKind::Wake => Done::Wake(Err(fault(Kind::WakeFailed, "wake-up"))),
            MoveKind::Sleep => Done::Sleep(Err(fault(Kind::SleepFailed, "sleep"))),
            MoveKind::Stop => Done::Stop(Err(fault(Kind::StopFailed, "stop"))),
        };
        self.move_done(late.swap, id, done);
    }

    /// A load failed: its model backs off, its waiters hear why.
    pub(in crate::scheduler) fn fail_load(&mut self, id: SwapId, fault: Fault) {
        let Some(swap) = self.swaps.get(&id) else { return };
        let (model, instance, started) = (swap.model.clone(), swap.instance, swap.started);
        let cost = self.eviction_cost(id);
        self.end_swap(id, SwapOutcome::Failed(fault.clone()));
        if !started {
            self.drop_unstarted(id, instance);
        }
        self.fail_model(&model, Some(id), fault, cost);
    }

    /// What the swap cost those who had to leave for it.
    fn eviction_cost(&self, id: SwapId) -> Duration {
        let Some(swap) = self.swaps.get(&id) else { return Duration::ZERO };
        let model_cost = |e: &Eviction| {
            let learned = self.models.get(&e.model).map(|m| &m.learned);
            learned
                .map(|l| l.stop.unwrap_or_default() + l.start.unwrap_or_default())
                .unwrap_or_default()
        };
        swap.evicted.iter().chain(&swap.evicted_before).map(model_cost).sum()
    }

    pub(super) fn watch(&mut self, id: SwapId) {
        let proof = self.world.proof;
        let Some(swap) = self.swaps.get(&id) else { return };
        let ram = self.is_ram_sampled()
            && self.catalog.model(&swap.model).is_some_and(|spec| self.ram_of(spec) > Bytes::ZERO);
        let Some(swap) = self.swaps.get_mut(&id).filter(|s| (proof || ram) && !s.watching) else {
            return;
        };
        let gpus: Vec<GpuId> =
            swap.gpus.iter().copied().filter(|&g| g != super::memory::UNSEEN).collect();
        if gpus.is_empty() && !ram {
            return;
        }
        swap.watching = true;
        self.emit(Action::WatchMemory { swap: id, gpus });
    }

    pub(super) fn unwatch(&mut self, id: SwapId) {
        if let Some(swap) = self.swaps.get_mut(&id).filter(|s| s.watching) {
            swap.watching = false;
            self.emit(Action::UnwatchMemory { swap: id });
        }
    }
}
