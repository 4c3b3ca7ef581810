//! Engines, clients and the owner's protocol, without chance: everything that can happen next is
//! a [`Step`], and a world can be copied before each of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use wharf::scheduler::action::Action;
use wharf::scheduler::event::{
    Done, Event, Fault, FaultKind, GateCount, GpuMemory, Holder, MemorySample, Request,
};
use wharf::scheduler::{GpuInfo, NextIds, Scheduler, World as Told0};
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, Priority, RequestId, SwapId, Time};

use crate::GRAIN;
use crate::models::{GPU, RESIDUE, Setup, bytes};
use crate::reference::{Reference, Told};

/// More wakes than this at one instant: the scheduler spins.
const WAKES_MAX: usize = 50;
/// Every deadline of a move is later than this, and the next thing to wait for after it, too.
const SILENT_MS: u64 = 62_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Move {
    Fetch,
    Start,
    Stop,
    Sleep,
    Wake,
    /// Its process is gone; its memory comes back when this completes.
    Release,
}

#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct Gate {
    pub open: bool,
    pub permits: u32,
    pub every_release: bool,
    pub count: GateCount0,
}

/// As `GateCount`, for the digest.
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct GateCount0 {
    pub in_flight: u32,
    pub granted: u64,
    pub last_used: u64,
}

#[derive(Clone, Debug)]
pub struct Engine {
    pub model: ModelName,
    pub gpus: Vec<GpuId>,
    pub held: Bytes,
    /// Its process is there.
    pub runs: bool,
    pub moving: Option<(Move, SwapId)>,
    pub moving_since: u64,
    /// A move that was called off or given up: its completion may still come.
    pub stale: Option<(Move, SwapId)>,
    pub gate: Gate,
    /// Requests that hold a lease.
    pub leases: VecDeque<RequestId>,
}

/// What can happen next.
#[derive(Clone, Debug)]
pub enum Step {
    Arrives(ModelName),
    Ends(InstanceId, ModelName),
    Leaves(ModelName),
    Completes(InstanceId, ModelName, Move),
    Fails(InstanceId, ModelName, Move),
    Clock,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Arrives(model) => write!(f, "a request for {model} arrives"),
            Step::Ends(_, model) => write!(f, "the oldest request on {model} ends"),
            Step::Leaves(model) => write!(f, "the last who waits for {model} leaves"),
            Step::Completes(id, model, what) => write!(f, "{what:?} of {model} ({id}) completes"),
            Step::Fails(id, model, what) => write!(f, "{what:?} of {model} ({id}) fails"),
            Step::Clock => write!(f, "time passes until the scheduler wants to be woken"),
        }
    }
}

#[derive(Clone)]
pub struct World {
    pub setup: Rc<Setup>,
    pub scheduler: Scheduler,
    pub now: u64,
    pub engines: BTreeMap<InstanceId, Engine>,
    pub reference: Reference,
    pub arrivals: [u8; 3],
    pub failures: u8,
    pub leaves: u8,
    pub ticks: u8,
    next_request: u64,
    /// Gates that the owner has not read since they changed.
    unread: BTreeSet<InstanceId>,
    inbox: VecDeque<Event>,
    pub trace: Option<Vec<String>>,
}

type Check = Result<(), String>;

impl World {
    pub fn new(setup: Rc<Setup>) -> Result<World, String> {
        let gpu = |n: u16| GpuInfo { id: GpuId(n), uuid: format!("GPU-{n}"), total: GPU };
        let told = Told0 { gpus: vec![gpu(0), gpu(1)], proof: true };
        let ids = NextIds { instance: 1, swap: 1 };
        let mut world = World {
            scheduler: Scheduler::new(Arc::clone(&setup.catalog), told, ids),
            now: 1,
            engines: BTreeMap::new(),
            reference: Reference::default(),
            arrivals: [u8::MAX; 3],
            failures: 0,
            leaves: 0,
            ticks: 0,
            next_request: 1,
            unread: BTreeSet::new(),
            inbox: VecDeque::new(),
            trace: None,
            setup: Rc::clone(&setup),
        };
        world.sample()?;
        for model in &setup.loaded {
            world.step(&Step::Arrives(model.clone()))?;
            world.come_to_rest()?;
        }
        // Their tenure is over, and nothing is left to wait for.
        world.advance(world.now + 30_000)?;
        (world.arrivals, world.failures, world.leaves) =
            (setup.arrivals, setup.failures, setup.leaves);
        world.ticks = setup.ticks;
        Ok(world)
    }

    /// Moves complete and requests end, until neither is left.
    fn come_to_rest(&mut self) -> Check {
        while let Some(step) = self
            .steps()
            .into_iter()
            .find(|step| matches!(step, Step::Completes(..) | Step::Ends(..)))
        {
            self.step(&step)?;
        }
        Ok(())
    }

    /// Everything that can happen next, always in the same order.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        for (model, left) in self.setup.catalog.models.keys().zip(self.arrivals) {
            if left > 0 {
                steps.push(Step::Arrives(model.clone()));
            }
            let waits = self.reference.waiting.values().any(|(_, waits_for)| waits_for == model);
            if waits && self.leaves > 0 {
                steps.push(Step::Leaves(model.clone()));
            }
        }
        for (&id, engine) in &self.engines {
            let model = || engine.model.clone();
            if !engine.leases.is_empty() {
                steps.push(Step::Ends(id, model()));
            }
            if let Some((what, _)) = engine.moving {
                steps.push(Step::Completes(id, model(), what));
                if self.failures > 0 && what != Move::Release {
                    steps.push(Step::Fails(id, model(), what));
                }
            }
        }
        if self.ticks > 0
            && let Some((at, _)) = self.scheduler.next_wake()
            && (self.failures > 0 || self.silent_at(at.0).is_empty())
        {
            steps.push(Step::Clock);
        }
        steps
    }

    /// Moves that have not reported for so long by then that they count as failed.
    fn silent_at(&self, at: u64) -> Vec<InstanceId> {
        let silent = |e: &Engine| {
            let reports = matches!(e.moving, None | Some((Move::Release | Move::Fetch, _)));
            !reports && e.moving_since + SILENT_MS <= at
        };
        self.engines.iter().filter(|(_, e)| silent(e)).map(|(&id, _)| id).collect()
    }

    pub fn step(&mut self, step: &Step) -> Check {
        match step {
            Step::Arrives(model) => self.arrives(model)?,
            Step::Ends(id, _) => self.ends(*id)?,
            Step::Leaves(model) => {
                self.leaves -= 1;
                let mut waiting = self.reference.waiting.iter().rev();
                let last = waiting.find(|(_, (_, waits_for))| waits_for == model);
                let request = *last.ok_or("nobody waits")?.0;
                self.reference.waiting.remove(&request);
                self.deliver(Event::RequestGone { request })?;
            }
            Step::Completes(id, _, _) => self.completes(*id, true)?,
            Step::Fails(id, _, _) => {
                self.failures -= 1;
                self.completes(*id, false)?;
            }
            Step::Clock => {
                self.ticks = self.ticks.saturating_sub(1);
                let (at, cause) = self.scheduler.next_wake().ok_or("nothing to wait for")?;
                if at.0 <= self.now {
                    return Err(format!("{cause:?} was due at {} and it is {}", at.0, self.now));
                }
                for id in self.silent_at(at.0) {
                    self.falls_silent(id)?;
                }
                self.advance(at.0)?;
            }
        }
        self.at_rest()
    }

    /// Its effect is never heard of again, or only when it is too late.
    fn falls_silent(&mut self, id: InstanceId) -> Check {
        self.failures = self.failures.saturating_sub(1);
        let engine = self.engine(id)?;
        engine.stale = engine.moving.take();
        let (model, stops) =
            (engine.model.clone(), engine.stale.is_some_and(|m| m.0 == Move::Stop));
        self.reference.failed.insert(model);
        self.reference.stuck |= stops;
        Ok(())
    }

    /// After everything that follows from one step.
    fn at_rest(&self) -> Check {
        for engine in self.engines.values().filter(|engine| engine.gate.open) {
            let waits = |(_, model): &(u64, ModelName)| *model == engine.model;
            if self.reference.waiting.values().any(waits) {
                return Err(format!("somebody waits at the open gate of {}", engine.model));
            }
        }
        Ok(())
    }

    fn arrives(&mut self, model: &ModelName) -> Check {
        let names: Vec<&ModelName> = self.setup.catalog.models.keys().collect();
        let at = names.iter().position(|name| *name == model).ok_or("no such model")?;
        self.arrivals[at] -= 1;
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let now = self.now;
        let free = |e: &&mut Engine| e.gate.open && e.gate.count.in_flight < e.gate.permits;
        let mut engines = self.engines.iter_mut();
        if let Some((&at, engine)) = engines.find(|(_, e)| e.model == *model && free(&e)) {
            take(engine, id, now);
            self.unread.insert(at);
            return Ok(());
        }
        self.reference.waiting.insert(id, (now, model.clone()));
        let request = Request {
            id,
            model: model.clone(),
            priority: Priority::Normal,
            max_wait: None,
            may_hurry: false,
            never_start: false,
            attempt: 1,
            arrived: Time(now),
        };
        self.deliver(Event::RequestArrived(request))
    }

    fn ends(&mut self, id: InstanceId) -> Check {
        let now = self.now;
        let engine = self.engines.get_mut(&id).ok_or("no such engine")?;
        engine.leases.pop_front();
        engine.gate.count.in_flight -= 1;
        engine.gate.count.last_used = now;
        self.unread.insert(id);
        let pings =
            engine.gate.every_release || (!engine.gate.open && engine.gate.count.in_flight == 0);
        if pings { self.read_gates() } else { Ok(()) }
    }

    /// A move ends. Its completion is delivered twice, and late ones of what was called off with
    /// it: nothing may come of those. Then memory is read.
    fn completes(&mut self, id: InstanceId, well: bool) -> Check {
        self.advance(self.now + 1)?;
        let engine = self.engines.get_mut(&id).ok_or("no such engine")?;
        let (what, swap) = engine.moving.take().ok_or("nothing moves")?;
        let stale = engine.stale.take();
        let model = engine.model.clone();
        if what == Move::Release {
            engine.held = Bytes::ZERO;
            return self.sample();
        }
        if let Some((what, swap)) = stale {
            let done = self.done(id, what, true)?;
            self.nothing_comes_of(Event::MoveDone { swap, instance: id, done })?;
        }
        if !well {
            self.reference.failed.insert(model);
            self.reference.stuck |= what == Move::Stop;
        }
        let done = self.done(id, what, well)?;
        self.told_of(id, what, well)?;
        let event = Event::MoveDone { swap, instance: id, done };
        self.deliver(event.clone())?;
        // (Not where the same was begun once more.)
        if self.engines.get(&id).is_none_or(|e| e.moving.is_none_or(|m| m.1 != swap)) {
            self.nothing_comes_of(event)?;
        }
        self.sample()
    }

    fn done(&mut self, id: InstanceId, what: Move, well: bool) -> Result<Done, String> {
        let engine = self.engines.get(&id).ok_or("no such engine")?;
        let fault = |kind: FaultKind| Fault::new(kind, "it was its turn to fail");
        let held = Some(engine.held);
        Ok(match (what, well) {
            (Move::Fetch, true) => Done::Fetch(Ok(())),
            (Move::Fetch, false) => Done::Fetch(Err(fault(FaultKind::FetchFailed))),
            (Move::Start, true) => Done::Start(Ok(held)),
            (Move::Start, false) => Done::Start(Err(fault(self.setup.fault))),
            (Move::Stop | Move::Release, true) => Done::Stop(Ok(())),
            (Move::Stop | Move::Release, false) => Done::Stop(Err(fault(FaultKind::StopFailed))),
            (Move::Sleep, true) => Done::Sleep(Ok(Some(RESIDUE))),
            (Move::Sleep, false) => Done::Sleep(Err(fault(FaultKind::SleepFailed))),
            (Move::Wake, true) => Done::Wake(Ok(held)),
            (Move::Wake, false) => Done::Wake(Err(fault(FaultKind::WakeFailed))),
        })
    }

    /// What really happened, and what the scheduler is about to hear of it.
    fn told_of(&mut self, id: InstanceId, what: Move, well: bool) -> Check {
        let late = self.setup.late_release;
        let swap = SwapId(0);
        let engine = self.engines.get_mut(&id).ok_or("no such engine")?;
        match (what, well) {
            (Move::Start | Move::Wake, true) => self.tell(id, Told::Ready),
            (Move::Sleep, true) => {
                engine.held = RESIDUE;
                self.tell(id, Told::Asleep)
            }
            (Move::Stop, true) => {
                engine.runs = false;
                if late && engine.held > Bytes::ZERO {
                    engine.moving = Some((Move::Release, swap));
                    self.reference.stuck = true;
                } else {
                    engine.held = Bytes::ZERO;
                }
                Ok(())
            }
            (Move::Sleep, false) => self.tell(id, Told::Ready),
            (Move::Wake, false) => self.tell(id, Told::Asleep),
            (Move::Fetch | Move::Release, _) | (Move::Start | Move::Stop, false) => Ok(()),
        }
    }

    /// Lets time pass, with every wake in its time.
    fn advance(&mut self, until: u64) -> Check {
        for _ in 0..WAKES_MAX {
            match self.scheduler.next_wake() {
                Some((at, _)) if at.0 <= until => {
                    self.now = self.now.max(at.0);
                    self.deliver(Event::Woke)?;
                }
                Some(_) | None => {
                    self.now = self.now.max(until);
                    return Ok(());
                }
            }
        }
        Err(format!("the scheduler spins: {:?}", self.scheduler.next_wake()))
    }

    /// A reading of the memory, a moment later.
    fn sample(&mut self) -> Check {
        self.advance(self.now + 1)?;
        let gpus = [0, 1].map(|n| self.memory_of(GpuId(n))).to_vec();
        let sample = MemorySample { taken_at: Time(self.now), gpus, host: None };
        self.seen();
        self.deliver(Event::MemorySeen(Ok(sample)))
    }

    fn memory_of(&self, gpu: GpuId) -> GpuMemory {
        let here = self.engines.iter().filter(|(_, e)| e.gpus.contains(&gpu));
        let holders: Vec<Holder> = here
            .filter(|(_, e)| e.held > Bytes::ZERO)
            .map(|(&id, e)| Holder {
                pid: 1000 + id.0 as u32,
                bytes: e.held,
                label: e.model.to_string(),
                instance: Some(id),
            })
            .collect();
        let held: Bytes = holders.iter().map(|holder| holder.bytes).sum();
        GpuMemory { gpu, uuid: format!("GPU-{}", gpu.0), total: GPU, free: GPU - held, holders }
    }

    /// One event for the scheduler, after every gate that changed, and all that follows at once.
    fn deliver(&mut self, event: Event) -> Check {
        self.read_gates()?;
        self.handle(event)?;
        self.follow()
    }

    fn follow(&mut self) -> Check {
        while let Some(event) = self.inbox.pop_front() {
            self.handle(event)?;
        }
        Ok(())
    }

    fn read_gates(&mut self) -> Check {
        for id in std::mem::take(&mut self.unread) {
            self.read_gate(id);
        }
        self.follow()
    }

    fn read_gate(&mut self, id: InstanceId) {
        if let Some(engine) = self.engines.get(&id) {
            let GateCount0 { in_flight, granted, last_used } = engine.gate.count;
            let gate = GateCount { in_flight, granted, last_used: Time(last_used) };
            self.inbox.push_back(Event::GateSeen { instance: id, gate });
        }
    }

    fn nothing_comes_of(&mut self, event: Event) -> Check {
        self.read_gates()?;
        let mut out = Vec::new();
        let text = format!("{event:?}");
        self.scheduler.handle(Time(self.now), event, &mut out);
        if out.is_empty() { Ok(()) } else { Err(format!("{text} is stale, and yet: {out:?}")) }
    }

    fn handle(&mut self, event: Event) -> Check {
        self.note(|| format!("    < {event:?}"));
        let mut out = Vec::new();
        self.scheduler.handle(Time(self.now), event, &mut out);
        for action in out {
            if !matches!(action, Action::Record(_)) {
                self.note(|| format!("      > {action:?}"));
            }
            self.judge(&action)?;
            self.perform(action)?;
        }
        self.scheduler.check_invariants()
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let mut text = text();
            text.truncate(text.char_indices().nth(230).map_or(text.len(), |(at, _)| at));
            trace.push(text);
        }
    }

    fn perform(&mut self, action: Action) -> Check {
        let now = self.now;
        match action {
            Action::Grant { request, instance } => {
                take(self.engine(instance)?, request, now);
            }
            Action::OpenGate { instance, permits } => {
                let gate = &mut self.engine(instance)?.gate;
                (gate.open, gate.permits) = (true, permits);
                self.book_mut(instance)?.closed_at = None;
            }
            Action::CloseGate { instance } => {
                self.engine(instance)?.gate.open = false;
                self.read_gate(instance);
            }
            Action::WatchGate { instance, every_release } => {
                self.engine(instance)?.gate.every_release = every_release;
            }
            Action::CancelLeases { instance, .. } => {
                let engine = self.engine(instance)?;
                engine.leases.clear();
                engine.gate.count.in_flight = 0;
                self.read_gate(instance);
            }
            Action::Preflight { swap, instance, model, gpus } => {
                self.engines.insert(instance, Engine::new(model, gpus));
                let done = Done::Preflight(Ok(()));
                self.inbox.push_back(Event::MoveDone { swap, instance, done });
            }
            Action::Fetch { swap, instance, .. } if self.setup.fetched => {
                let done = Done::Fetch(Ok(()));
                self.inbox.push_back(Event::MoveDone { swap, instance, done });
            }
            Action::Fetch { swap, instance, .. } => self.begin(instance, Move::Fetch, swap)?,
            Action::StartInstance { swap, instance, model, gpus, .. } => {
                let need = bytes(&self.spec(&model));
                let new = || Engine::new(model.clone(), gpus.clone());
                let engine = self.engines.entry(instance).or_insert_with(new);
                (engine.gpus, engine.held, engine.runs) = (gpus, need, true);
                self.begin(instance, Move::Start, swap)?;
            }
            Action::StopInstance { swap, instance } => {
                // One that was called off before anything was done for it.
                if !self.engines.contains_key(&instance) {
                    let done = Done::Stop(Ok(()));
                    self.inbox.push_back(Event::MoveDone { swap, instance, done });
                    return Ok(());
                }
                let engine = self.engine(instance)?;
                engine.stale = engine.moving.take().or(engine.stale);
                self.begin(instance, Move::Stop, swap)?;
            }
            Action::Sleep { swap, instance } => self.begin(instance, Move::Sleep, swap)?,
            Action::Wake { swap, instance, .. } => {
                let model = self.engine(instance)?.model.clone();
                self.engine(instance)?.held = bytes(&self.spec(&model));
                self.begin(instance, Move::Wake, swap)?;
            }
            Action::Refuse { .. }
            | Action::WatchMemory { .. }
            | Action::UnwatchMemory { .. }
            | Action::TtlExtended { .. }
            | Action::Answer { .. }
            | Action::Record(_)
            | Action::Remember { .. }
            | Action::Notice { .. } => {}
        }
        Ok(())
    }

    fn begin(&mut self, instance: InstanceId, what: Move, swap: SwapId) -> Check {
        let now = self.now;
        let engine = self.engine(instance)?;
        (engine.moving, engine.moving_since) = (Some((what, swap)), now);
        Ok(())
    }

    fn engine(&mut self, instance: InstanceId) -> Result<&mut Engine, String> {
        self.engines.get_mut(&instance).ok_or_else(|| format!("{instance} is no engine"))
    }

    /// Of everything that decides what can happen from here.
    pub fn digest(&self) -> u64 {
        let grain = GRAIN.as_millis() as u64;
        let ago = |at: u64| (self.now - at + grain / 2) / grain;
        let mut hasher = DefaultHasher::new();
        let to = &mut hasher;
        self.scheduler.fingerprint(GRAIN).hash(to);
        (self.arrivals, self.failures, self.leaves, self.ticks).hash(to);
        for (id, engine) in &self.engines {
            (&engine.model, &engine.gpus, engine.held, engine.runs).hash(to);
            let moving = engine.moving.map(|m| (m.0, ago(engine.moving_since)));
            (moving, engine.stale.map(|m| m.0)).hash(to);
            let count =
                GateCount0 { last_used: ago(engine.gate.count.last_used), ..engine.gate.count };
            (Gate { count, ..engine.gate }, self.unread.contains(id)).hash(to);
            if let Some(book) = self.reference.books.get(id) {
                (book.told, book.promised, ago(book.ready_at), book.closed_at.map(ago)).hash(to);
            }
        }
        for (since, model) in self.reference.waiting.values() {
            (ago(*since), model).hash(to);
        }
        (&self.reference.failed, self.reference.stuck).hash(to);
        hasher.finish()
    }
}

fn take(engine: &mut Engine, request: RequestId, now: u64) {
    engine.leases.push_back(request);
    engine.gate.count.in_flight += 1;
    engine.gate.count.granted += 1;
    engine.gate.count.last_used = now;
}

impl Engine {
    fn new(model: ModelName, gpus: Vec<GpuId>) -> Engine {
        Engine {
            model,
            gpus,
            held: Bytes::ZERO,
            runs: false,
            moving: None,
            moving_since: 0,
            stale: None,
            gate: Gate::default(),
            leases: VecDeque::new(),
        }
    }
}
