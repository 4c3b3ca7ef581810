//! Engines, clients and the owner's protocol, without chance: everything that can happen next is
//! a [`Step`], and a world can be copied before each of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use wharf::scheduler::event::{Event, Request};
use wharf::scheduler::{GpuInfo, NextIds, Scheduler, World as Machine};
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, Priority, RequestId, SwapId, Time};

use crate::GRAIN;
use crate::models::{GPU, Setup};
use crate::reference::Reference;

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
    pub count: Counters,
}

/// As `GateCount`, with a digest.
#[derive(Clone, Copy, Debug, Default, Hash)]
pub struct Counters {
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
    pub unread: BTreeSet<InstanceId>,
    pub inbox: VecDeque<Event>,
    pub trace: Option<Vec<String>>,
}

pub type Check = Result<(), String>;

impl World {
    pub fn new(setup: Rc<Setup>) -> Result<World, String> {
        let gpu = |n: u16| GpuInfo { id: GpuId(n), uuid: format!("GPU-{n}"), total: GPU };
        let told = Machine { gpus: vec![gpu(0), gpu(1)], proof: true };
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
                self.read_gates()?;
                let mut waiting = self.reference.waiting.iter().rev();
                let last = waiting.find(|(_, (_, waits_for))| waits_for == model);
                // (What the gates told may have served it just before: then it stays.)
                if let Some((&request, _)) = last {
                    self.reference.waiting.remove(&request);
                    self.deliver(Event::RequestGone { request })?;
                }
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
        let free = |e: &Engine| e.gate.open && e.gate.count.in_flight < e.gate.permits;
        let mut engines = self.engines.iter_mut();
        if let Some((&at, engine)) = engines.find(|(_, e)| e.model == *model && free(e)) {
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
                Counters { last_used: ago(engine.gate.count.last_used), ..engine.gate.count };
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

pub fn take(engine: &mut Engine, request: RequestId, now: u64) {
    engine.leases.push_back(request);
    engine.gate.count.in_flight += 1;
    engine.gate.count.granted += 1;
    engine.gate.count.last_used = now;
}

impl Engine {
    pub fn new(model: ModelName, gpus: Vec<GpuId>) -> Engine {
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
