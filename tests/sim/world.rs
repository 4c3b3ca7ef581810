//! The world around one scheduler: a virtual clock, the owner's inbox, and what happens in it.
//!
//! It follows the protocol written on `Event` and `Action` and nothing else of the scheduler:
//! gates are read before any other event, every effect ends with a completion, `Woke` comes
//! exactly when it is due. All randomness comes from the seed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use wharf::config::catalog::Catalog;
use wharf::scheduler::action::Action;
use wharf::scheduler::event::{EnsureKind, Event};
use wharf::scheduler::{GpuInfo, NextIds, Scheduler, World as Told};
use wharf::units::{AskId, Bytes, GpuId, InstanceId, ModelName, RequestId, SwapId, Time};

use crate::checker::Checker;
use crate::clients::{Client, Lease, LeaseEnd};
use crate::effects::Effect;
use crate::machine::{Gpu, Machine, uuid};
use crate::rng::Rng;
use crate::scenario::{Faults, Loop, Plan, Scenario, Step, Truth};

/// More events than this at one instant: the scheduler spins.
const EVENTS_AT_ONCE_MAX: u32 = 20_000;
/// More than this from one event: it goes in circles. (Every waiter may be refused at once.)
const ACTIONS_AT_ONCE_MAX: usize = 3000;
const WAKES_AT_ONCE_MAX: u32 = 30;
pub const FIRST_ID: u64 = 100;

/// What is going to happen.
#[derive(Clone, Debug)]
pub enum Next {
    Tell(Event),
    Step(Step),
    EffectEnd(u64),
    Vouch(u64),
    Allocate { effect: u64, whole: bool },
    Exit(InstanceId),
    Release(InstanceId),
    Watch { swap: SwapId, generation: u64, step_ms: u64 },
    Background,
    LeaseEnd { lease: u64, how: LeaseEnd },
    LeavesQueue(usize),
    Retry(usize),
    Ping(InstanceId),
    Turn(usize),
    ForeignGone { gpu: GpuId, pid: u32 },
    HostForeignGone(Bytes),
    ProofBack,
    RuntimeUp,
    Probe(usize),
}

/// One event and its actions, as the orchestrator's journal has them.
#[derive(Clone, Debug)]
pub struct Entry {
    pub at: u64,
    pub event: Event,
    pub actions: Vec<Action>,
}

pub struct World {
    pub now: u64,
    next: BTreeMap<(u64, u64), Next>,
    sequence: u64,
    pub rng: Rng,
    pub scenario: Scenario,
    pub scheduler: Scheduler,
    pub checker: Checker,
    pub machine: Machine,
    pub catalog: Arc<Catalog>,
    pub truth: BTreeMap<ModelName, Truth>,
    pub faults: Faults,
    pub clients: Vec<Client>,
    /// Undecided requests, as the clients see it.
    pub waiting: BTreeMap<RequestId, usize>,
    pub leases: BTreeMap<u64, Lease>,
    pub loops: Vec<Loop>,
    pub effects: BTreeMap<u64, Effect>,
    pub watches: BTreeMap<SwapId, u64>,
    pub dirty: BTreeSet<InstanceId>,
    closed: VecDeque<InstanceId>,
    pub runtime_down: bool,
    pub lost: Vec<InstanceId>,
    pub no_proof: bool,
    pub quiet: bool,
    ids: u64,
    events: u64,
    at_once: (u64, u32, u32),
    /// Every event and action, as text, where somebody wants to read it.
    pub trace: Option<Vec<String>>,
    /// What was told and what came of it, where a test wants to look at it.
    pub journal: Option<Vec<Entry>>,
}

/// A fresh scheduler for this machine.
pub fn scheduler(scenario: &Scenario) -> Scheduler {
    let gpu = |(n, gpu): (usize, &Gpu)| {
        let id = GpuId(n as u16);
        GpuInfo { id, uuid: uuid(id), total: gpu.total }
    };
    let gpus = scenario.told_gpus().iter().enumerate().map(gpu).collect();
    let told = Told { gpus, proof: scenario.proof };
    Scheduler::new(Arc::clone(&scenario.catalog), told, NextIds { instance: FIRST_ID, swap: 1 })
}

impl World {
    pub fn new(scenario: Scenario) -> World {
        let machine = Machine::new(scenario.gpus.clone(), scenario.host);
        let mut world = World {
            now: 0,
            next: BTreeMap::new(),
            sequence: 0,
            rng: Rng::new(scenario.seed ^ 0x5EED),
            scheduler: scheduler(&scenario),
            checker: Checker::new(&scenario),
            machine,
            catalog: Arc::clone(&scenario.catalog),
            truth: scenario.truth.clone(),
            faults: scenario.faults.clone(),
            clients: Vec::new(),
            waiting: BTreeMap::new(),
            leases: BTreeMap::new(),
            loops: Vec::new(),
            effects: BTreeMap::new(),
            watches: BTreeMap::new(),
            dirty: BTreeSet::new(),
            closed: VecDeque::new(),
            runtime_down: false,
            lost: Vec::new(),
            no_proof: false,
            quiet: false,
            ids: 0,
            events: 0,
            at_once: (0, 0, 0),
            trace: None,
            journal: None,
            scenario,
        };
        world.prepare();
        world
    }

    fn prepare(&mut self) {
        for (model, gpus) in self.scenario.adopted.clone() {
            self.adopt(model, gpus);
        }
        for (model, learned) in self.scenario.remembered.clone() {
            self.after(0, Next::Tell(Event::Remembered { model, learned }));
        }
        if self.is_sampled() {
            let sample = self.machine.sample(0, self.scenario.proof);
            self.after(0, Next::Tell(Event::MemorySeen(Ok(sample))));
            self.after(self.scenario.sample_every, Next::Background);
        }
        for spec in Arc::clone(&self.catalog).models.values().filter(|spec| spec.warmup) {
            let step = Step::Ensure {
                model: spec.name.clone(),
                kind: EnsureKind::Warmup,
                timeout_ms: 600_000,
                gone_after: None,
            };
            self.after(0, Next::Step(step));
        }
        for (at, step) in std::mem::take(&mut self.scenario.steps) {
            self.after(at, Next::Step(step));
        }
    }

    /// Runs until `end` or the first thing that is wrong.
    pub fn run_until(&mut self, end: u64) {
        while self.checker.failure.is_none() {
            let first = self.next.keys().next().map(|key| key.0);
            let wake = self.scheduler.next_wake().map(|(at, _)| at.0.max(self.now));
            let wake_first = match (first, wake) {
                (Some(first), Some(wake)) => {
                    wake < first || (wake == first && self.rng.chance(500))
                }
                (None, Some(_)) => true,
                (_, None) => false,
            };
            let Some(at) = (if wake_first { wake } else { first }) else { break };
            if at > end {
                break;
            }
            self.now = at;
            self.count(wake_first);
            if wake_first {
                self.deliver(Event::Woke);
            } else if let Some((_, next)) = self.next.pop_first() {
                self.happen(next);
            }
        }
        self.now = self.now.max(end);
    }

    /// The whole life of a random scenario: noise, quiet, probes, rest.
    pub fn run(&mut self) {
        let settled = self.scenario.quiet_from + crate::random::SETTLE_MS;
        self.run_until(settled);
        self.check_rest();
        for probe in 0..self.scenario.probes.len() {
            self.after(0, Next::Probe(probe));
            let end = self.now + 300_000;
            self.run_until(end);
            self.check_rest();
        }
    }

    fn check_rest(&mut self) {
        if self.checker.failure.is_none() {
            let view = self.scheduler.view(Time(self.now));
            self.checker.at_rest(self.now, &view);
        }
        if self.checker.failure.is_none() && !(self.leases.is_empty() && self.waiting.is_empty()) {
            self.checker.fail(format!(
                "at rest, but {} leases and {} waiting requests are left",
                self.leases.len(),
                self.waiting.len()
            ));
        }
    }

    pub fn events(&self) -> u64 {
        self.events
    }

    pub fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub fn ask_id(&mut self) -> AskId {
        AskId(self.id())
    }

    pub fn after(&mut self, ms: u64, next: Next) {
        self.sequence += 1;
        self.next.insert((self.now + ms, self.sequence), next);
    }

    /// Something for the inbox; it takes a moment, so that messages cross.
    pub fn tell(&mut self, event: Event) {
        let delay = if self.rng.chance(700) { 0 } else { self.rng.below(4) };
        self.after(delay, Next::Tell(event));
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:>9}   {}", text()));
        }
    }

    fn count(&mut self, wake: bool) {
        let (at, events, wakes) = &mut self.at_once;
        if *at != self.now {
            (*at, *events, *wakes) = (self.now, 0, 0);
        }
        *events += 1;
        *wakes = if wake { *wakes + 1 } else { 0 };
        if *events > EVENTS_AT_ONCE_MAX || *wakes > WAKES_AT_ONCE_MAX {
            let cause = self.scheduler.next_wake();
            self.checker.fail(format!("the scheduler spins: next_wake stays at {cause:?}"));
        }
    }

    fn happen(&mut self, next: Next) {
        match next {
            Next::Tell(event) => self.deliver(event),
            Next::Step(step) => self.step(step),
            Next::EffectEnd(effect) => self.effect_end(effect),
            Next::Vouch(effect) => self.vouch(effect),
            Next::Allocate { effect, whole } => self.allocate(effect, whole),
            Next::Exit(instance) => self.exit_late(instance),
            Next::Release(instance) => self.release_memory(instance),
            Next::Watch { swap, generation, step_ms } => self.watch(swap, generation, step_ms),
            Next::Background => self.background(),
            Next::LeaseEnd { lease, how } => self.lease_end(lease, how),
            Next::LeavesQueue(client) => self.leaves_queue(client),
            Next::Retry(client) => self.ask_for_lease(client),
            Next::Ping(instance) => {
                if self.machine.gates.get(&instance).is_some_and(|gate| gate.pinged) {
                    self.deliver_gate(instance);
                }
            }
            Next::Turn(index) => self.turn(index),
            Next::ForeignGone { gpu, pid } => {
                self.machine.gpus[usize::from(gpu.0)].foreign.remove(&pid);
            }
            Next::HostForeignGone(bytes) => self.host_foreign_gone(bytes),
            Next::ProofBack => self.no_proof = false,
            Next::RuntimeUp => self.runtime_up(),
            Next::Probe(index) => {
                let model = self.scenario.probes[index].clone();
                let mut plan = Plan::new(&model, 200);
                plan.must_be_served = true;
                self.arrive(plan, None);
            }
        }
    }

    /// One event for the scheduler, after fresh counters of every gate that changed.
    pub fn deliver(&mut self, event: Event) {
        for instance in std::mem::take(&mut self.dirty) {
            self.gate_seen(instance);
        }
        if let Event::RequestGone { request } = event {
            self.gone(request);
        }
        self.handle(event);
        self.drain_closed();
    }

    fn deliver_gate(&mut self, instance: InstanceId) {
        self.dirty.insert(instance);
        for instance in std::mem::take(&mut self.dirty) {
            self.gate_seen(instance);
        }
        self.drain_closed();
    }

    fn drain_closed(&mut self) {
        while let Some(instance) = self.closed.pop_front() {
            self.gate_seen(instance);
        }
        // A gate that was closed has been read again: only now has the scheduler done its part.
        if self.checker.failure.is_none() {
            self.checker.after_event(self.now);
        }
    }

    fn gate_seen(&mut self, instance: InstanceId) {
        let Some(gate) = self.machine.gates.get_mut(&instance) else { return };
        gate.pinged = false;
        let gate = gate.count;
        self.handle(Event::GateSeen { instance, gate });
    }

    pub fn gate_closed(&mut self, instance: InstanceId) {
        self.closed.push_back(instance);
    }

    fn handle(&mut self, event: Event) {
        if self.checker.failure.is_some() {
            return;
        }
        self.events += 1;
        self.note(|| format!("< {}", crate::trace::event(&event)));
        self.checker.on_event(self.now, &event);
        let mut out = Vec::new();
        let entry = self.journal.is_some().then(|| event.clone());
        self.scheduler.handle(Time(self.now), event, &mut out);
        if let (Some(journal), Some(event)) = (&mut self.journal, entry) {
            journal.push(Entry { at: self.now, event, actions: out.clone() });
        }
        if out.len() > ACTIONS_AT_ONCE_MAX {
            self.checker.fail(format!("{} actions came of one event", out.len()));
        }
        for action in out {
            self.note(|| format!("    > {}", crate::trace::action(&action)));
            self.checker.on_action(self.now, &action, &self.machine);
            if self.checker.failure.is_some() {
                return;
            }
            self.perform(action);
        }
        self.checker.host_holds(&self.machine);
        if let Err(message) = crate::invariants(&self.scheduler) {
            self.checker.fail(format!("check_invariants: {message}"));
        }
    }
}
