//! A small scripted machine: it answers every action the way a healthy owner would, in virtual
//! time, and can be told to misbehave. It keeps the gate protocol: a `GateSeen` follows each
//! `CloseGate` at once, and precedes any other event for a gate that changed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::config::{catalog, spec};
use crate::config::catalog::Catalog;
use crate::scheduler::action::{Action, Answer, Refusal};
use crate::scheduler::event::*;
use crate::scheduler::{GpuInfo, NextIds, Scheduler, World};
use crate::units::*;

#[derive(Clone, Debug)]
pub struct Running {
    pub model: ModelName,
    pub gpus: Vec<GpuId>,
    pub bytes: Bytes,
    pub awake: Bytes,
    pub in_flight: u32,
    pub granted: u64,
    pub last_used: Time,
    pub open: bool,
    pub permits: u32,
    pub every_release: bool,
    pub changed: bool,
}

/// What to do differently, by model.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    pub preflight: BTreeMap<ModelName, VecDeque<FaultKind>>,
    pub start: BTreeMap<ModelName, VecDeque<FaultKind>>,
    pub stop: BTreeMap<ModelName, VecDeque<FaultKind>>,
    /// Memory of these never comes back.
    pub keeps_memory: BTreeSet<ModelName>,
    pub no_proof: bool,
}

pub struct Sim {
    pub scheduler: Scheduler,
    pub now: Time,
    pub gpus: Vec<GpuInfo>,
    pub proof: bool,
    pub running: BTreeMap<InstanceId, Running>,
    /// Memory still held after the end of its process, and until when.
    pub ghosts: Vec<(InstanceId, Vec<GpuId>, Bytes, Time)>,
    pub strangers: BTreeMap<GpuId, Bytes>,
    /// What samples say of host RAM.
    pub host: Option<HostMemory>,
    pub faults: Faults,
    /// What samples say these take of the host's RAM.
    pub host_use: BTreeMap<ModelName, HostUse>,
    /// What these really take of each GPU; others what they were promised.
    pub real: BTreeMap<ModelName, Bytes>,
    pub start_takes: Duration,
    pub lag: Duration,
    pub log: Vec<(Time, Action)>,
    pub granted: BTreeMap<RequestId, InstanceId>,
    pub refused: BTreeMap<RequestId, Refusal>,
    pub answers: BTreeMap<AskId, Answer>,
    /// No process is listed as a holder (WSL, containers without host pids).
    pub hide_pids: bool,
    pub sample_every: Duration,
    /// So many times the gateway takes a lease in the very moment its gate is closed.
    pub sneaks: u32,
    over: BTreeSet<RequestId>,
    pending: BTreeMap<(Time, u64), Event>,
    next_sample: Time,
    next_id: u64,
}

impl Sim {
    pub fn new(catalog: Catalog, gpus: &[u64]) -> Sim {
        Sim::in_world(catalog, gpus, true)
    }

    pub fn in_world(catalog: Catalog, gpus: &[u64], proof: bool) -> Sim {
        let gpus: Vec<GpuInfo> = gpus
            .iter()
            .zip(0..)
            .map(|(&gib, id)| GpuInfo {
                id: GpuId(id),
                uuid: format!("GPU-{id}"),
                total: Bytes::gib(gib),
            })
            .collect();
        let world = World { gpus: gpus.clone(), proof };
        let mut sim = Sim {
            scheduler: Scheduler::new(Arc::new(catalog), world, NextIds { instance: 1, swap: 1 }),
            now: Time::ZERO,
            gpus,
            proof,
            running: BTreeMap::new(),
            ghosts: Vec::new(),
            strangers: BTreeMap::new(),
            host: None,
            faults: Faults::default(),
            host_use: BTreeMap::new(),
            real: BTreeMap::new(),
            start_takes: Duration::from_secs(4),
            lag: Duration::from_millis(700),
            log: Vec::new(),
            granted: BTreeMap::new(),
            refused: BTreeMap::new(),
            answers: BTreeMap::new(),
            hide_pids: false,
            sample_every: Duration::from_millis(100),
            sneaks: 0,
            over: BTreeSet::new(),
            pending: BTreeMap::new(),
            next_sample: Time::ZERO,
            next_id: 1,
        };
        sim.run_for(Duration::from_millis(10));
        sim
    }

    pub fn request(&mut self, model: &str) -> RequestId {
        self.request_with(model, |_| {})
    }

    pub fn request_with(&mut self, model: &str, edit: impl FnOnce(&mut Request)) -> RequestId {
        let id = RequestId(self.next());
        let mut request = Request {
            id,
            model: model.into(),
            priority: Priority::Normal,
            max_wait: None,
            may_hurry: true,
            never_start: false,
            attempt: 1,
            arrived: self.now,
        };
        edit(&mut request);
        // The gateway's own attempt comes first.
        let ready = self
            .running
            .iter_mut()
            .find(|(_, r)| r.model == request.model && r.open && r.in_flight < r.permits);
        if let Some((&instance, running)) = ready {
            running.in_flight += 1;
            running.granted += 1;
            running.last_used = self.now;
            running.changed = true;
            self.granted.insert(id, instance);
        } else {
            self.send(Event::RequestArrived(request));
        }
        id
    }

    pub fn ensure(&mut self, model: &str, kind: EnsureKind, timeout: Duration) -> AskId {
        let ask = AskId(self.next());
        let deadline = self.now + timeout;
        self.send(Event::EnsureAsked { ask, model: model.into(), kind, deadline });
        ask
    }

    pub fn unload(&mut self, model: &str, force: bool) -> AskId {
        let ask = AskId(self.next());
        self.send(Event::UnloadAsked { ask, model: model.into(), force });
        ask
    }

    pub fn sleep(&mut self, model: &str) -> AskId {
        let ask = AskId(self.next());
        self.send(Event::SleepAsked { ask, model: model.into() });
        ask
    }

    pub fn extend(&mut self, model: &str, by: Option<Duration>) -> AskId {
        let ask = AskId(self.next());
        self.send(Event::ExtendAsked { ask, model: model.into(), by });
        ask
    }

    pub fn pin(&mut self, model: &str, pinned: bool) -> AskId {
        let ask = AskId(self.next());
        self.send(Event::PinAsked { ask, model: model.into(), pinned });
        ask
    }

    pub fn keep(&mut self, model: &str, kept: bool) {
        self.send(Event::KeepChanged { model: model.into(), kept });
    }

    /// The request's response ended.
    pub fn finish(&mut self, request: RequestId) {
        let instance = self.granted.remove(&request).expect("it holds a lease");
        let Some(running) = self.running.get_mut(&instance) else { return };
        running.in_flight -= 1;
        running.last_used = self.now;
        running.changed = true;
        if running.every_release || (!running.open && running.in_flight == 0) {
            self.see_gates();
        }
    }

    fn next(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn see_gates(&mut self) {
        let changed: Vec<(InstanceId, GateCount)> = self
            .running
            .iter_mut()
            .filter(|(_, r)| r.changed)
            .map(|(&id, r)| {
                r.changed = false;
                let (in_flight, granted) = (r.in_flight, r.granted);
                (id, GateCount { in_flight, granted, last_used: r.last_used })
            })
            .collect();
        for (instance, gate) in changed {
            self.deliver(Event::GateSeen { instance, gate });
        }
    }

    pub fn send(&mut self, event: Event) {
        self.see_gates();
        self.deliver(event);
    }

    fn deliver(&mut self, event: Event) {
        let mut out = Vec::new();
        self.scheduler.handle(self.now, event, &mut out);
        let mut closed = Vec::new();
        for action in out {
            self.log.push((self.now, action.clone()));
            if let Action::CloseGate { instance } = action {
                closed.push(instance);
            }
            self.perform(action);
        }
        for instance in closed {
            let gate = self.running.get_mut(&instance).map_or(GateCount::default(), |r| {
                r.changed = false;
                GateCount { in_flight: r.in_flight, granted: r.granted, last_used: r.last_used }
            });
            self.deliver(Event::GateSeen { instance, gate });
        }
    }

    fn later(&mut self, after: Duration, event: Event) {
        let at = self.now + after;
        let sequence = self.next();
        self.pending.insert((at, sequence), event);
    }

    fn done(&mut self, after: Duration, swap: SwapId, instance: InstanceId, done: Done) {
        self.later(after, Event::MoveDone { swap, instance, done });
    }

    fn perform(&mut self, action: Action) {
        let ms = Duration::from_millis;
        match action {
            Action::Grant { request, instance } => {
                let running = self.running.get_mut(&instance).expect("grants go to the living");
                running.in_flight += 1;
                running.granted += 1;
                running.last_used = self.now;
                self.granted.insert(request, instance);
            }
            Action::Refuse { request, refusal } => {
                assert!(self.refused.insert(request, refusal).is_none(), "refused twice");
            }
            Action::OpenGate { instance, permits } => {
                let running = self.running.get_mut(&instance).expect("a gate of the living");
                (running.open, running.permits) = (true, permits);
            }
            Action::CloseGate { instance } => {
                let sneaked = RequestId(self.next());
                let sneaks = self.sneaks > 0;
                if let Some(running) = self.running.get_mut(&instance) {
                    if sneaks && running.open && running.in_flight < running.permits {
                        self.sneaks -= 1;
                        running.in_flight += 1;
                        running.granted += 1;
                        running.last_used = self.now;
                        self.granted.insert(sneaked, instance);
                    }
                    running.open = false;
                }
            }
            Action::WatchGate { instance, every_release } => {
                if let Some(running) = self.running.get_mut(&instance) {
                    running.every_release = every_release;
                }
            }
            Action::CancelLeases { instance, .. } => {
                self.cut(instance);
                if let Some(running) = self.running.get_mut(&instance) {
                    running.in_flight = 0;
                    running.changed = true;
                }
            }
            Action::Preflight { swap, instance, model, .. } => {
                let fault = self.faults.preflight.get_mut(&model).and_then(VecDeque::pop_front);
                let result = fault.map_or(Ok(()), |kind| Err(Fault::new(kind, "as told")));
                self.done(ms(1), swap, instance, Done::Preflight(result));
            }
            Action::Fetch { swap, instance, .. } => {
                self.done(ms(1), swap, instance, Done::Fetch(Ok(())));
            }
            Action::StartInstance { swap, instance, model, gpus, footprint, .. } => {
                self.start(swap, instance, model, gpus, footprint);
            }
            Action::StopInstance { swap, instance } => self.stop(swap, instance),
            Action::Sleep { swap, instance } => {
                let running = self.running.get_mut(&instance).expect("sleepers live");
                assert_eq!(running.in_flight, 0, "put to sleep with leases");
                running.awake = std::mem::replace(&mut running.bytes, Bytes::gib(1));
                self.done(ms(300), swap, instance, Done::Sleep(Ok(Some(Bytes::gib(1)))));
            }
            Action::Wake { swap, instance, .. } => {
                let running = self.running.get_mut(&instance).expect("sleepers live");
                running.bytes = running.awake;
                self.done(ms(400), swap, instance, Done::Wake(Ok(None)));
            }
            Action::Answer { ask, answer } => {
                assert!(self.answers.insert(ask, answer).is_none(), "answered twice");
            }
            Action::WatchMemory { .. }
            | Action::Prepare { .. }
            | Action::UnwatchMemory { .. }
            | Action::Record(_)
            | Action::Remember { .. }
            | Action::TtlExtended { .. }
            | Action::Notice { .. } => {}
        }
    }

    fn start(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        model: ModelName,
        gpus: Vec<GpuId>,
        footprint: Option<Bytes>,
    ) {
        let bytes = self.real.get(&model).copied().or(footprint).unwrap_or(Bytes::gib(6));
        for &gpu in &gpus {
            let free = self.free(gpu);
            assert!(
                !self.proof || free >= bytes,
                "{model} on GPU {gpu}: {bytes} wanted, {free} free"
            );
        }
        let fault = self.faults.start.get_mut(&model).and_then(VecDeque::pop_front);
        self.insert(instance, model, gpus, bytes);
        let result = fault.map_or(Ok(Some(bytes)), |kind| Err(Fault::new(kind, "as told")));
        if result.is_ok() {
            let vouching = self.start_takes - Duration::from_millis(50);
            self.later(vouching, Event::Vouching { swap, instance });
        }
        self.done(self.start_takes, swap, instance, Done::Start(result));
    }

    fn stop(&mut self, swap: SwapId, instance: InstanceId) {
        let took = Duration::from_millis(200);
        if let Some(running) = self.running.get(&instance) {
            assert_eq!(running.in_flight, 0, "{} stopped with leases", running.model);
            let model = running.model.clone();
            if let Some(kind) = self.faults.stop.get_mut(&model).and_then(VecDeque::pop_front) {
                let fault = Fault::new(kind, "it does not die");
                return self.done(took, swap, instance, Done::Stop(Err(fault)));
            }
        }
        if let Some(running) = self.running.remove(&instance) {
            let forever = self.faults.keeps_memory.contains(&running.model);
            let until = if forever { Time::MAX } else { self.now + took + self.lag };
            self.ghosts.push((instance, running.gpus, running.bytes, until));
        }
        self.done(took, swap, instance, Done::Stop(Ok(())));
    }

    fn cut(&mut self, instance: InstanceId) {
        let cut = self.granted.extract_if(.., |_, on| *on == instance);
        self.over.extend(cut.map(|(request, _)| request));
    }

    /// The client is done, or leaves.
    pub fn end(&mut self, request: RequestId) {
        if self.granted.contains_key(&request) {
            self.finish(request);
        } else if !self.is_over(request) {
            self.send(Event::RequestGone { request });
        }
        self.over.insert(request);
    }

    pub fn is_over(&self, request: RequestId) -> bool {
        self.over.contains(&request) || self.refused.contains_key(&request)
    }

    pub fn kill_if_running(&mut self, model: &str) {
        if self.running.values().any(|r| r.model.as_str() == model) {
            self.kill(model);
        }
    }

    /// Memory that would never come back does.
    pub fn heal(&mut self) {
        for ghost in &mut self.ghosts {
            ghost.3 = ghost.3.min(self.now + Duration::from_secs(1));
        }
    }

    /// The process ends by itself.
    pub fn kill(&mut self, model: &str) {
        let (&id, _) =
            self.running.iter().find(|(_, r)| r.model.as_str() == model).expect("it runs");
        let running = self.running.remove(&id).expect("just found");
        self.cut(id);
        self.ghosts.push((id, running.gpus, running.bytes, self.now + self.lag));
        let fault = Fault::new(FaultKind::Exited, "exited with code 1");
        self.send(Event::InstanceDied { instance: id, fault });
    }

    /// Lets time pass: effects, samples every 100 ms, wakes.
    pub fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        for _ in 0..1_000_000 {
            let effect = self.pending.keys().next().map(|(at, _)| *at);
            let wake = self.scheduler.next_wake().map(|(at, _)| at.max(self.now));
            let next = [effect, wake, Some(self.next_sample)].into_iter().flatten().min();
            let Some(next) = next.filter(|&at| at <= end) else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            if effect.is_some_and(|at| at <= self.now) {
                let (_, event) = self.pending.pop_first().expect("just seen");
                self.send(event);
            } else if self.next_sample <= self.now {
                self.next_sample = self.now + self.sample_every;
                self.sample();
            } else {
                self.send(Event::Woke);
            }
        }
        panic!("time does not pass: {:?}", self.scheduler.next_wake());
    }

    pub fn run_secs(&mut self, seconds: u64) {
        self.run_for(Duration::from_secs(seconds));
    }
}

/// Three models of which one fits at a time, each of them started once, in this order: 4 s.
pub fn three_started(min_residency: Duration, order: [&str; 3]) -> Sim {
    let mut config = catalog(vec![spec("a", 20), spec("b", 20), spec("c", 20)]);
    config.settings.swap.min_residency = min_residency;
    let mut sim = Sim::new(config, &[24]);
    for model in order {
        let request = sim.request(model);
        sim.run_secs(10);
        sim.end(request);
    }
    sim.run_secs(20);
    sim
}
