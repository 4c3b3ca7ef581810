//! The modelled world around the real scheduler: a virtual clock, engines that take as long as
//! they are said to, and the owner's protocol as it is written on `Event` and `Action`.
//!
//! Gates are read before any other event, at once after a `CloseGate`, and at each release where
//! the scheduler watches; every effect ends with its `MoveDone`; `Woke` comes exactly when due.
//! Preflight and fetch take no time. The memory of an engine is free when its stop (or its falling
//! asleep) is complete: the end of the process is the proof.

mod engines;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use super::sessions::Agent;
use super::setup::Setup;
use super::{Arrival, Run, Stay, Visit};
use crate::scheduler::action::{Action, Refusal};
use crate::scheduler::event::{Done, EnsureKind, Event, GateCount, Request};
use crate::scheduler::{NextIds, Policy, Scheduler, World as Told};
use crate::units::{AskId, GpuId, InstanceId, ModelName, Priority, RequestId, SwapId, Time};

/// More wake-ups than this in a row without anything happening: the scheduler spins.
const WAKES_MAX: u32 = 10_000;

/// The scheduler did what its protocol forbids.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WorldFault {
    #[error(
        "{policy}, at {at_s:.3} s: the scheduler asks to be woken again and again, for {cause}"
    )]
    Spins { policy: &'static str, at_s: f64, cause: String },
    #[error("{policy}, at {at_s:.3} s: {what}")]
    Protocol { policy: &'static str, at_s: f64, what: String },
}

/// What is going to happen. At one instant what ends comes before what arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    ServiceEnds { visit: usize },
    GatesRead,
    EffectEnds { instance: InstanceId, effect: u64 },
    Arrives { visit: usize },
}

#[derive(Clone, Debug)]
struct Effect {
    id: u64,
    swap: SwapId,
    done: Done,
}

#[derive(Clone, Debug)]
struct Engine {
    model: ModelName,
    gpus: Vec<GpuId>,
    effect: Option<Effect>,
    /// Its start was asked for.
    launched: bool,
    /// Where `Run::stays` tells of it now; `None` before its start and while it sleeps.
    stay: Option<usize>,
    open: bool,
    permits: u32,
    every_release: bool,
    count: GateCount,
    serving: BTreeSet<usize>,
}

/// One policy's world, from its beginning to the end of the last request.
#[derive(Debug)]
pub(super) struct World<'a> {
    setup: &'a Setup,
    policy: Policy,
    scheduler: Scheduler,
    now: Time,
    agenda: BinaryHeap<Reverse<(Time, Next, u64)>>,
    sequence: u64,
    engines: BTreeMap<InstanceId, Engine>,
    /// The gate through which a model's requests go by themselves.
    open: BTreeMap<ModelName, InstanceId>,
    dirty: BTreeSet<InstanceId>,
    closed: VecDeque<InstanceId>,
    /// As they came; a `RequestId` is a place in it.
    arrivals: Vec<Arrival>,
    visits: Vec<Visit>,
    stays: Vec<Stay>,
    agents: Vec<Agent>,
    /// Visit → the agent that waits for its answer.
    asked_by: BTreeMap<usize, usize>,
    /// Arrivals to come and requests that have not ended.
    open_ends: usize,
    wake: Option<Time>,
    fault: Option<WorldFault>,
}

impl<'a> World<'a> {
    pub fn new(setup: &'a Setup, policy: Policy) -> World<'a> {
        let told = Told { gpus: setup.gpus.clone(), proof: false };
        let ids = NextIds { instance: 1, swap: 1 };
        let catalog = std::sync::Arc::clone(&setup.catalog);
        let mut world = World {
            setup,
            policy,
            scheduler: Scheduler::new(catalog, told, ids).with_policy(policy),
            now: Time::ZERO,
            agenda: BinaryHeap::new(),
            sequence: 0,
            engines: BTreeMap::new(),
            open: BTreeMap::new(),
            dirty: BTreeSet::new(),
            closed: VecDeque::new(),
            arrivals: Vec::new(),
            visits: Vec::new(),
            stays: Vec::new(),
            agents: Vec::new(),
            asked_by: BTreeMap::new(),
            open_ends: 0,
            wake: None,
            fault: None,
        };
        for (model, costs) in &setup.costs {
            let learned = costs.learned(setup.footprint(model));
            world.tell(Event::Remembered { model: model.clone(), learned });
        }
        let specs = setup.catalog.models.values().filter(|spec| spec.warmup);
        for (ask, spec) in (0..).map(AskId).zip(specs) {
            let (model, kind) = (spec.name.clone(), EnsureKind::Warmup);
            world.tell(Event::EnsureAsked { ask, model, kind, deadline: Time::MAX });
        }
        world
    }

    /// Requests at times of their own.
    pub fn with_trace(mut self, arrivals: &[Arrival]) -> World<'a> {
        for arrival in arrivals {
            self.expect(arrival.clone());
        }
        self
    }

    /// Callers that ask again when they were answered.
    pub fn with_agents(mut self, agents: Vec<Agent>) -> World<'a> {
        self.agents = agents;
        for agent in 0..self.agents.len() {
            self.next_turn(agent);
        }
        self
    }

    pub fn run(mut self) -> Result<Run, WorldFault> {
        let mut wakes = 0;
        while self.open_ends > 0 && self.fault.is_none() {
            let first = self.agenda.peek().map(|Reverse((at, _, _))| *at);
            match (first, self.wake) {
                (first, Some(wake)) if first.is_none_or(|first| wake < first) => {
                    self.now = wake;
                    wakes += 1;
                    if wakes > WAKES_MAX {
                        return Err(self.spins());
                    }
                    self.tell(Event::Woke);
                }
                (Some(_), _) => {
                    wakes = 0;
                    if let Some(Reverse((at, next, _))) = self.agenda.pop() {
                        self.now = at;
                        self.happen(next);
                    }
                }
                // Nothing will happen any more, and somebody waits: they were never served.
                (None, _) => break,
            }
        }
        match self.fault.take() {
            Some(fault) => Err(fault),
            None => Ok(self.finished()),
        }
    }

    fn finished(mut self) -> Run {
        for stay in self.engines.values().filter_map(|engine| engine.stay) {
            self.stays[stay].ended = self.now;
        }
        Run {
            policy: self.policy.as_str().to_owned(),
            visits: self.visits,
            stays: self.stays,
            ended: self.now,
        }
    }

    fn spins(&self) -> WorldFault {
        let cause = self.scheduler.next_wake().map(|(_, cause)| format!("{cause:?}"));
        WorldFault::Spins {
            policy: self.policy.as_str(),
            at_s: self.now.0 as f64 / 1000.0,
            cause: cause.unwrap_or_default(),
        }
    }

    fn forbid(&mut self, what: String) {
        let at_s = self.now.0 as f64 / 1000.0;
        let policy = self.policy.as_str();
        self.fault.get_or_insert(WorldFault::Protocol { policy, at_s, what });
    }

    fn at(&mut self, at: Time, next: Next) {
        self.sequence += 1;
        self.agenda.push(Reverse((at, next, self.sequence)));
    }

    fn expect(&mut self, arrival: Arrival) -> usize {
        let visit = self.arrivals.len();
        self.at(arrival.at, Next::Arrives { visit });
        self.visits.push(Visit {
            model: arrival.model.clone(),
            arrived: arrival.at,
            began: None,
            ended: None,
            refused: None,
        });
        self.arrivals.push(arrival);
        self.open_ends += 1;
        visit
    }

    fn next_turn(&mut self, agent: usize) {
        if let Some(arrival) = self.agents[agent].next(self.now) {
            let visit = self.expect(arrival);
            self.asked_by.insert(visit, agent);
        }
    }

    fn happen(&mut self, next: Next) {
        match next {
            Next::Arrives { visit } => self.arrive(visit),
            Next::ServiceEnds { visit } => self.serve_ended(visit),
            Next::GatesRead => self.read_gates(),
            Next::EffectEnds { instance, effect } => self.effect_ends(instance, effect),
        }
    }

    // ── requests ──

    fn arrive(&mut self, visit: usize) {
        let model = self.arrivals[visit].model.clone();
        let open = self.open.get(&model).copied();
        let has_place = |engine: &&mut Engine| engine.count.in_flight < engine.permits;
        if let Some(instance) = open
            && let Some(engine) = self.engines.get_mut(&instance).filter(has_place)
        {
            engine.count.in_flight += 1;
            engine.count.granted += 1;
            engine.count.last_used = self.now;
            self.dirty.insert(instance);
            return self.begin_service(visit, instance);
        }
        self.tell(Event::RequestArrived(Request {
            id: RequestId(visit as u64),
            model,
            priority: Priority::Normal,
            max_wait: None,
            may_hurry: false,
            never_start: false,
            attempt: 1,
            arrived: self.now,
        }));
    }

    fn begin_service(&mut self, visit: usize, instance: InstanceId) {
        if let Some(engine) = self.engines.get_mut(&instance) {
            engine.serving.insert(visit);
        }
        self.visits[visit].began = Some(self.now);
        self.at(self.now + self.arrivals[visit].service, Next::ServiceEnds { visit });
    }

    fn serve_ended(&mut self, visit: usize) {
        let found = self.open.get(&self.visits[visit].model).copied().filter(|id| {
            self.engines.get(id).is_some_and(|engine| engine.serving.contains(&visit))
        });
        let instance = found.or_else(|| {
            let serves = |(_, engine): &(&InstanceId, &Engine)| engine.serving.contains(&visit);
            self.engines.iter().find(serves).map(|(&id, _)| id)
        });
        // Cut short meanwhile.
        let Some(instance) = instance else { return };
        self.visit_ended(visit);
        let Some(engine) = self.engines.get_mut(&instance) else { return };
        engine.serving.remove(&visit);
        engine.count.in_flight -= 1;
        engine.count.last_used = self.now;
        self.dirty.insert(instance);
        if engine.every_release || (!engine.open && engine.count.in_flight == 0) {
            self.read_gates();
        }
    }

    fn visit_ended(&mut self, visit: usize) {
        self.visits[visit].ended = Some(self.now);
        self.open_ends -= 1;
        if let Some(agent) = self.asked_by.remove(&visit) {
            self.next_turn(agent);
        }
    }

    // ── the owner's side of the protocol ──

    /// One event, after fresh counters of every gate that changed.
    fn tell(&mut self, event: Event) {
        while let Some(instance) = self.dirty.pop_first() {
            self.read_gate(instance);
        }
        self.handle(event);
        self.wake = self.scheduler.next_wake().map(|(at, _)| at.max(self.now));
    }

    fn read_gates(&mut self) {
        if self.dirty.is_empty() {
            return;
        }
        while let Some(instance) = self.dirty.pop_first() {
            self.read_gate(instance);
        }
        self.wake = self.scheduler.next_wake().map(|(at, _)| at.max(self.now));
    }

    fn read_gate(&mut self, instance: InstanceId) {
        if let Some(gate) = self.engines.get(&instance).map(|engine| engine.count) {
            self.handle(Event::GateSeen { instance, gate });
        }
    }

    fn handle(&mut self, event: Event) {
        let mut out = Vec::new();
        self.scheduler.handle(self.now, event, &mut out);
        loop {
            for action in out.drain(..) {
                self.perform(action);
            }
            let Some(instance) = self.closed.pop_front() else { return };
            self.dirty.remove(&instance);
            let gate = self.engines.get(&instance).map(|engine| engine.count);
            let gate = gate.unwrap_or_default();
            self.scheduler.handle(self.now, Event::GateSeen { instance, gate }, &mut out);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Grant { request, instance } => self.grant(request, instance),
            Action::Refuse { request, refusal } => self.refuse(request, &refusal),
            Action::OpenGate { instance, permits } => self.open_gate(instance, permits),
            Action::CloseGate { instance } => {
                if let Some(engine) = self.engines.get_mut(&instance) {
                    engine.open = false;
                    self.open.remove(&engine.model);
                }
                self.closed.push_back(instance);
            }
            Action::WatchGate { instance, every_release } => {
                if let Some(engine) = self.engines.get_mut(&instance) {
                    engine.every_release = every_release;
                }
            }
            Action::CancelLeases { instance, why } => self.cut(instance, &why),
            Action::Preflight { swap, instance, model, gpus } => {
                self.engines.insert(instance, Engine::new(model, gpus));
                self.begin(swap, instance, Duration::ZERO, Done::Preflight(Ok(())));
            }
            Action::Fetch { swap, instance, .. } => {
                self.begin(swap, instance, Duration::ZERO, Done::Fetch(Ok(())));
            }
            Action::StartInstance { swap, instance, model, gpus, footprint, .. } => {
                let real = self.setup.footprint(&model);
                let engine = Engine { launched: true, ..Engine::new(model.clone(), gpus) };
                self.engines.insert(instance, engine);
                self.stay_begins(instance, footprint.unwrap_or(real));
                let took = self.setup.costs(&model).start;
                self.begin(swap, instance, took, Done::Start(Ok(Some(real))));
            }
            Action::Wake { swap, instance, .. } => {
                let Some(model) = self.engines.get(&instance).map(|e| e.model.clone()) else {
                    return self.forbid(format!("{instance} shall wake and does not exist"));
                };
                self.stay_begins(instance, self.setup.footprint(&model));
                let took = self.setup.costs(&model).wake.unwrap_or_default();
                self.begin(swap, instance, took, Done::Wake(Ok(None)));
            }
            Action::StopInstance { swap, instance } => self.leave(swap, instance, false),
            Action::Sleep { swap, instance } => self.leave(swap, instance, true),
            Action::WatchMemory { .. }
            | Action::Prepare { .. }
            | Action::UnwatchMemory { .. }
            | Action::TtlExtended { .. }
            | Action::Answer { .. }
            | Action::Record(_)
            | Action::Remember { .. }
            | Action::Notice { .. } => {}
        }
    }

    fn grant(&mut self, request: RequestId, instance: InstanceId) {
        let visit = request.0 as usize;
        let Some(engine) = self.engines.get_mut(&instance) else {
            return self.forbid(format!("{request} is granted {instance}, which does not exist"));
        };
        engine.count.in_flight += 1;
        engine.count.granted += 1;
        engine.count.last_used = self.now;
        let over = engine.count.in_flight > engine.permits;
        if over || engine.model != self.visits[visit].model || self.visits[visit].began.is_some() {
            return self.forbid(format!("{request} is granted {instance}, which has no place"));
        }
        self.begin_service(visit, instance);
    }

    fn refuse(&mut self, request: RequestId, refusal: &Refusal) {
        let visit = request.0 as usize;
        self.visits[visit].refused = Some(refusal_text(refusal));
        self.visit_ended(visit);
    }

    fn open_gate(&mut self, instance: InstanceId, permits: u32) {
        let Some(engine) = self.engines.get_mut(&instance) else {
            return self.forbid(format!("the gate of {instance} opens, which does not exist"));
        };
        (engine.open, engine.permits) = (true, permits);
        self.open.insert(engine.model.clone(), instance);
    }

    /// What still runs ends now, as under a drain deadline.
    fn cut(&mut self, instance: InstanceId, why: &str) {
        let Some(engine) = self.engines.get_mut(&instance) else { return };
        engine.count.in_flight = 0;
        for visit in std::mem::take(&mut engine.serving) {
            self.visits[visit].refused = Some(format!("cut short: {why}"));
            self.visit_ended(visit);
        }
        self.dirty.insert(instance);
        self.at(self.now, Next::GatesRead);
    }
}

/// The refusal's name, and what it says where that matters here.
fn refusal_text(refusal: &Refusal) -> String {
    match refusal {
        Refusal::QueueTimeout { waiting_for, .. } => format!("queue timeout: {waiting_for}"),
        Refusal::QueueFull { limit, .. } => format!("queue full ({limit})"),
        Refusal::CannotFit { need, available, .. } => {
            format!("cannot fit: needs {need}, {available} could be free")
        }
        Refusal::StartFailed { fault, .. } | Refusal::VramNeverFreed { fault, .. } => {
            fault.message.clone()
        }
        other => format!("{other:?}"),
    }
}
