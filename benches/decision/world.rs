//! The machine, its engines and its callers, as far as events and actions show them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wharf::config::catalog::{
    Catalog, EngineKind, GpuRequest, ModelSpec, QueueSettings, Settings, Vram,
};
use wharf::scheduler::action::Action;
use wharf::scheduler::event::{Done, Event, GateCount, GpuMemory, Holder, MemorySample, Request};
use wharf::scheduler::{GpuInfo, NextIds, Scheduler, World as Told};
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, Priority, RequestId, SwapId, Time};

use super::{Cost, Costs};

const MODELS: u64 = 500;
const GPU_GIB: [u64; 16] = [24, 24, 24, 24, 32, 32, 40, 40, 48, 48, 48, 48, 64, 64, 80, 80];
const QUEUED: usize = 10_000;
/// Callers beside the queue: at so many requests a second new ones come.
const ARRIVALS_PER_S: u64 = 500;
const GONE_PER_S: u64 = 10;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n.max(1)
    }

    fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }
}

/// What is going to happen.
enum Next {
    Arrival,
    Gone,
    LeaseEnd(InstanceId),
    Done { swap: SwapId, instance: InstanceId, done: Done },
    Released(InstanceId),
    Watch { swap: SwapId, step_ms: u64 },
    Background,
}

/// One engine: from its start until its memory is back.
struct Engine {
    model: ModelName,
    gpus: Vec<GpuId>,
    held: Bytes,
    ready: bool,
    open: bool,
    permits: u32,
    every_release: bool,
    count: GateCount,
    told: GateCount,
}

pub struct World {
    now: u64,
    rng: Rng,
    next: BTreeMap<(u64, u64), Next>,
    sequence: u64,
    catalog: Arc<Catalog>,
    names: Vec<ModelName>,
    scheduler: Scheduler,
    engines: BTreeMap<InstanceId, Engine>,
    waiting: BTreeMap<RequestId, ModelName>,
    watches: BTreeSet<SwapId>,
    changed: BTreeSet<InstanceId>,
    requests: u64,
    starts: u64,
    stops: u64,
    grants: u64,
    refusals: u64,
}

fn spec(n: u64, rng: &mut Rng) -> ModelSpec {
    let (least, most, gpus) = match rng.below(100) {
        0..60 => (4, 16, 1),
        60..84 => (16, 23, 1),
        84..94 => (24, 70, 1),
        _ => (12, 38, 2),
    };
    let engine = if rng.below(3) == 0 { EngineKind::Vllm } else { EngineKind::Llamacpp };
    ModelSpec {
        engine,
        gpus: GpuRequest::Count(gpus),
        vram: Vram::Declared(Bytes::gib(rng.range(least, most))),
        priority: match rng.below(10) {
            0 => Priority::High,
            1 => Priority::Low,
            _ => Priority::Normal,
        },
        pinned: n < 3,
        ttl: (rng.below(4) == 0).then(|| Duration::from_secs(rng.range(60, 600))),
        sleep: (engine == EngineKind::Vllm && rng.below(3) == 0).then_some(1),
        concurrency: (rng.below(10) < 7).then(|| rng.range(4, 16) as u32),
        ..ModelSpec::plain(&format!("model-{n:03}"))
    }
}

impl World {
    pub fn new() -> World {
        let mut rng = Rng(42);
        let usual = Settings::default();
        let queue = QueueSettings {
            limit: 20_000,
            per_model: 20_000,
            timeout: Duration::from_secs(36_000),
            ..usual.queue
        };
        let models: Vec<ModelSpec> = (0..MODELS).map(|n| spec(n, &mut rng)).collect();
        let names = models.iter().map(|spec| spec.name.clone()).collect();
        let models = models.into_iter().map(|spec| (spec.name.clone(), Arc::new(spec))).collect();
        let settings = Settings { queue, ..usual };
        let catalog = Arc::new(Catalog { models, settings, ..Catalog::default() });
        let gpus = (0..).zip(GPU_GIB).map(|(n, gib)| GpuInfo {
            id: GpuId(n),
            uuid: format!("GPU-{n}"),
            total: Bytes::gib(gib),
        });
        let told = Told { gpus: gpus.collect(), proof: true };
        let ids = NextIds { instance: 1, swap: 1 };
        let mut world = World {
            now: 0,
            rng,
            next: BTreeMap::new(),
            sequence: 0,
            scheduler: Scheduler::new(Arc::clone(&catalog), told, ids),
            catalog,
            names,
            engines: BTreeMap::new(),
            waiting: BTreeMap::new(),
            watches: BTreeSet::new(),
            changed: BTreeSet::new(),
            requests: 0,
            starts: 0,
            stops: 0,
            grants: 0,
            refusals: 0,
        };
        world.after(1000, Next::Background);
        world.after(0, Next::Arrival);
        world.after(100, Next::Gone);
        world
    }

    /// Queues the requests before the memory was read: nothing starts yet.
    pub fn fill(&mut self) {
        let no_proof = wharf::scheduler::event::NoProof { message: "not read yet".to_owned() };
        let none = &mut Costs::default();
        self.tell("", Event::MemorySeen(Err(no_proof)), none);
        let mut out = Vec::new();
        while self.waiting.len() < QUEUED {
            let model = self.popular();
            let request = self.request(model);
            self.scheduler.handle(Time(self.now), Event::RequestArrived(request), &mut out);
        }
        self.sample(none);
    }

    pub fn summary(&self) -> String {
        let ready = self.engines.values().filter(|e| e.ready).count();
        format!(
            "{} s virtual, {} waiting, {ready} ready, {} starts, {} stops, {} queued grants, \
             {} refusals",
            self.now / 1000,
            self.waiting.len(),
            self.starts,
            self.stops,
            self.grants,
            self.refusals
        )
    }

    fn after(&mut self, ms: u64, next: Next) {
        self.sequence += 1;
        self.next.insert((self.now + ms, self.sequence), next);
    }

    /// At least so many events.
    pub fn run(&mut self, events: u64, costs: &mut Costs) {
        let until = costs.count() + events;
        while costs.count() < until {
            let (&(at, _), _) = self.next.first_key_value().expect("the background goes on");
            match self.scheduler.next_wake() {
                Some((due, _)) if due.0 < at => {
                    self.now = self.now.max(due.0);
                    self.step("wake", Event::Woke, costs);
                }
                Some(_) | None => {
                    self.now = at;
                    let (_, next) = self.next.pop_first().expect("as just seen");
                    self.happen(next, costs);
                }
            }
        }
    }

    fn happen(&mut self, next: Next, costs: &mut Costs) {
        match next {
            Next::Arrival => {
                let rate = if self.waiting.len() < QUEUED { 3 } else { 1 };
                let gap = 2000 / (ARRIVALS_PER_S * rate);
                let gap = self.rng.below(gap + 1);
                self.after(gap, Next::Arrival);
                self.arrive(costs);
            }
            Next::Gone => {
                let gap = self.rng.below(2000 / GONE_PER_S);
                self.after(gap, Next::Gone);
                let from = RequestId(self.rng.below(self.requests));
                let gone = self.waiting.range(from..).next().map(|(&id, _)| id);
                if let Some(request) = gone {
                    self.waiting.remove(&request);
                    self.step("gone", Event::RequestGone { request }, costs);
                }
            }
            Next::LeaseEnd(id) => {
                let now = self.now;
                let Some(engine) = self.engines.get_mut(&id) else { return };
                engine.count.in_flight = engine.count.in_flight.saturating_sub(1);
                engine.count.last_used = Time(now);
                let ping = engine.every_release;
                self.changed.insert(id);
                if ping {
                    self.tell_gate("release", id, costs);
                }
            }
            Next::Done { swap, instance, done } => self.done(swap, instance, done, costs),
            Next::Released(id) => {
                self.engines.remove(&id);
                self.changed.remove(&id);
            }
            Next::Watch { swap, step_ms } => {
                if self.watches.contains(&swap) {
                    self.after(step_ms, Next::Watch { swap, step_ms: (step_ms * 2).min(250) });
                    self.sample(costs);
                }
            }
            Next::Background => {
                self.after(1000, Next::Background);
                self.sample(costs);
            }
        }
    }

    fn done(&mut self, swap: SwapId, instance: InstanceId, done: Done, costs: &mut Costs) {
        let kind = match &done {
            Done::Preflight(_) => "move done: preflight",
            Done::Fetch(_) => "move done: fetch",
            Done::Start(_) | Done::Wake(_) => "move done: ready",
            Done::Stop(_) | Done::Sleep(_) => "move done: gone",
        };
        if let Some(engine) = self.engines.get_mut(&instance) {
            engine.ready = matches!(done, Done::Start(_) | Done::Wake(_));
            if matches!(done, Done::Start(_)) {
                (engine.count, engine.told) = (GateCount::default(), GateCount::default());
            }
            if let Done::Sleep(_) = done {
                engine.held = Bytes::gib(1);
            }
            if let Done::Stop(_) = done {
                let lag = self.rng.range(20, 400);
                self.after(lag, Next::Released(instance));
            }
        }
        self.step(kind, Event::MoveDone { swap, instance, done }, costs);
    }

    fn sample(&mut self, costs: &mut Costs) {
        let gpus = (0_u16..).zip(GPU_GIB).map(|(n, gib)| {
            let here = self.engines.iter().filter(|(_, e)| e.gpus.contains(&GpuId(n)));
            let holders: Vec<Holder> = here
                .filter(|(_, e)| e.held > Bytes::ZERO)
                .map(|(&id, e)| Holder {
                    pid: 1000 + id.0 as u32,
                    bytes: e.held,
                    label: e.model.to_string(),
                    instance: Some(id),
                })
                .collect();
            let used: Bytes = holders.iter().map(|h| h.bytes).sum();
            let total = Bytes::gib(gib);
            GpuMemory {
                gpu: GpuId(n),
                uuid: format!("GPU-{n}"),
                total,
                free: total - used,
                holders,
            }
        });
        let (gpus, ram) = (gpus.collect(), Default::default());
        let sample = MemorySample { taken_at: Time(self.now), gpus, host: None, ram };
        self.step("memory seen", Event::MemorySeen(Ok(sample)), costs);
    }

    /// A request: straight to an open gate, else to the scheduler.
    fn arrive(&mut self, costs: &mut Costs) {
        let model = self.popular();
        let engine = self.engines.iter_mut().find(|(_, e)| e.model == model && e.held > Bytes(0));
        let mut kind = "arrival: away";
        if let Some((&id, engine)) = engine {
            if engine.open && engine.count.in_flight < engine.permits {
                return self.lease(id);
            }
            kind = if engine.ready { "arrival: ready" } else { "arrival: moving" };
        }
        let request = self.request(model);
        self.step(kind, Event::RequestArrived(request), costs);
    }

    /// The popularity of models falls off like 1/n.
    fn popular(&mut self) -> ModelName {
        let exponent = self.rng.below(1_000_000) as f64 / 1_000_000.0;
        let place = (MODELS as f64).powf(exponent) as usize - 1;
        self.names[place.min(self.names.len() - 1)].clone()
    }

    fn request(&mut self, model: ModelName) -> Request {
        let id = RequestId(self.requests);
        self.requests += 1;
        self.waiting.insert(id, model.clone());
        let priority = match self.rng.below(10) {
            0 => Priority::High,
            1 => Priority::Low,
            _ => Priority::Normal,
        };
        let max_wait = (self.rng.below(20) == 0).then_some(Duration::from_secs(20));
        Request {
            id,
            model,
            priority,
            max_wait,
            may_hurry: max_wait.is_some(),
            never_start: false,
            attempt: 1,
            arrived: Time(self.now),
        }
    }

    /// The gateway takes a place by itself.
    fn lease(&mut self, id: InstanceId) {
        let now = self.now;
        if let Some(engine) = self.engines.get_mut(&id) {
            engine.count.in_flight += 1;
            engine.count.granted += 1;
            engine.count.last_used = Time(now);
        }
        self.changed.insert(id);
        let service = self.rng.range(300, 6000);
        self.after(service, Next::LeaseEnd(id));
    }

    /// One event, after the counters of every gate that changed.
    fn step(&mut self, kind: &'static str, event: Event, costs: &mut Costs) {
        for id in std::mem::take(&mut self.changed) {
            let told = self.engines.get(&id).map(|e| (e.told, e.count));
            if told.is_some_and(|(told, count)| told != count) {
                self.tell_gate("gate seen", id, costs);
            }
        }
        self.tell(kind, event, costs);
    }

    fn tell_gate(&mut self, kind: &'static str, id: InstanceId, costs: &mut Costs) {
        let Some(engine) = self.engines.get_mut(&id) else { return };
        engine.told = engine.count;
        let event = Event::GateSeen { instance: id, gate: engine.count };
        self.tell(kind, event, costs);
    }

    fn tell(&mut self, kind: &'static str, event: Event, costs: &mut Costs) {
        let mut out = Vec::new();
        let began = Instant::now();
        self.scheduler.handle(Time(self.now), event, &mut out);
        let handled = Instant::now();
        let wake = std::hint::black_box(self.scheduler.next_wake());
        let cost = Cost {
            handle: (handled - began).as_nanos() as u64,
            wake: handled.elapsed().as_nanos() as u64,
        };
        let _ = wake;
        costs.note(kind, cost);
        let mut closed = Vec::new();
        for action in out {
            self.perform(action, &mut closed);
        }
        for id in closed {
            self.tell_gate("gate closed", id, costs);
        }
    }

    fn perform(&mut self, action: Action, closed: &mut Vec<InstanceId>) {
        match action {
            Action::Grant { request, instance } => {
                self.waiting.remove(&request);
                self.grants += 1;
                self.lease(instance);
            }
            Action::Refuse { request, .. } => {
                self.waiting.remove(&request);
                self.refusals += 1;
            }
            Action::OpenGate { instance, permits } => {
                if let Some(engine) = self.engines.get_mut(&instance) {
                    (engine.open, engine.permits) = (true, permits);
                }
            }
            Action::CloseGate { instance } => {
                if let Some(engine) = self.engines.get_mut(&instance) {
                    engine.open = false;
                }
                closed.push(instance);
            }
            Action::WatchGate { instance, every_release } => {
                if let Some(engine) = self.engines.get_mut(&instance) {
                    engine.every_release = every_release;
                }
            }
            Action::Preflight { swap, instance, model, gpus } => {
                let engine = Engine {
                    model,
                    gpus,
                    held: Bytes::ZERO,
                    ready: false,
                    open: false,
                    permits: 0,
                    every_release: false,
                    count: GateCount::default(),
                    told: GateCount::default(),
                };
                self.engines.insert(instance, engine);
                self.ends(swap, instance, (5, 20), Done::Preflight(Ok(())));
            }
            Action::Fetch { swap, instance, .. } => {
                self.ends(swap, instance, (1, 10), Done::Fetch(Ok(())));
            }
            Action::StartInstance { swap, instance, gpus, footprint, .. } => {
                self.starts += 1;
                let held = footprint.unwrap_or_default();
                if let Some(engine) = self.engines.get_mut(&instance) {
                    (engine.held, engine.gpus) = (held, gpus);
                }
                let ms = 2000 + held.as_mib() / 2;
                self.ends(swap, instance, (ms, ms * 2), Done::Start(Ok(Some(held))));
            }
            Action::StopInstance { swap, instance } => {
                self.stops += 1;
                self.ends(swap, instance, (200, 1500), Done::Stop(Ok(())));
            }
            Action::Sleep { swap, instance } => {
                self.ends(swap, instance, (300, 1000), Done::Sleep(Ok(Some(Bytes::gib(1)))));
            }
            Action::Wake { swap, instance, .. } => {
                self.starts += 1;
                self.wake(instance);
                self.ends(swap, instance, (500, 2000), Done::Wake(Ok(None)));
            }
            Action::WatchMemory { swap, .. } => {
                self.watches.insert(swap);
                self.after(5, Next::Watch { swap, step_ms: 10 });
            }
            Action::UnwatchMemory { swap } => {
                self.watches.remove(&swap);
            }
            Action::CancelLeases { .. }
            | Action::Prepare { .. }
            | Action::TtlExtended { .. }
            | Action::Answer { .. }
            | Action::Record(_)
            | Action::Remember { .. }
            | Action::Notice { .. } => {}
        }
    }

    fn wake(&mut self, instance: InstanceId) {
        let Some(engine) = self.engines.get_mut(&instance) else { return };
        if let Some(Vram::Declared(bytes)) = self.catalog.model(&engine.model).map(|m| m.vram) {
            engine.held = bytes;
        }
    }

    fn ends(&mut self, swap: SwapId, instance: InstanceId, ms: (u64, u64), done: Done) {
        let ms = self.rng.range(ms.0, ms.1);
        self.after(ms, Next::Done { swap, instance, done });
    }
}
