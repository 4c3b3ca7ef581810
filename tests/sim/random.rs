//! Scenarios from a seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::{
    Catalog, DockerSpec, EngineKind, ExternalSpec, GpuRequest, ModelSpec, RuntimeSpec, Settings,
    SwapMode, Vram,
};
use wharf::scheduler::event::{EnsureKind, Learned};
use wharf::units::{Bytes, GpuId, ModelName, Priority};

use crate::groups::WITH_GROUPS;
use crate::machine::Gpu;
use crate::rng::Rng;
use crate::scenario::{Faults, Loop, Plan, Scenario, Step, Truth, catalog, fits, settings, spec};

/// Long enough for every back-off and deadline to have passed after the faults stopped.
pub const SETTLE_MS: u64 = 40 * 60_000;

pub fn scenario(seed: u64) -> Scenario {
    let mut scenario = ungrouped(seed & !WITH_GROUPS);
    if seed & WITH_GROUPS != 0 {
        scenario.seed = seed;
        crate::groups::add(&mut scenario);
    }
    scenario
}

fn ungrouped(seed: u64) -> Scenario {
    let mut rng = Rng::new(seed);
    let rng = &mut rng;
    let calm = rng.chance(300);
    let unseen = rng.chance(50);
    let proof = !unseen && rng.chance(850);
    let gpus = gpus(rng);
    let settings = random_settings(rng, &gpus, calm);
    let mut models = Models { rng, gpus: &gpus, settings: &settings, calm, proof };
    let count = models.rng.range(2, 8);
    let (specs, truth): (Vec<_>, Vec<_>) = (0..count).map(|n| models.one(n)).unzip();
    let truth: BTreeMap<_, _> = specs.iter().map(|spec| spec.name.clone()).zip(truth).collect();
    let catalog = Arc::new(catalog(settings.clone(), specs));
    let quiet_from = rng.range(40, 240) * 1000;
    let mut scenario = Scenario {
        seed,
        proof,
        unseen,
        host: None,
        truth,
        faults: if calm { Faults::default() } else { faults(rng) },
        sample_every: *rng.pick(&[1000, 2000, 5000]),
        steps: vec![(quiet_from, Step::FaultsOff)],
        adopted: Vec::new(),
        remembered: Vec::new(),
        quiet_from,
        probes: Vec::new(),
        calm,
        catalog,
        gpus,
    };
    load(rng, &mut scenario);
    remember(rng, &mut scenario);
    if !calm {
        disturb(rng, &mut scenario);
    }
    crate::host::limit(&mut scenario);
    crate::stay::add(&mut scenario);
    scenario.probes = probes(&scenario);
    scenario
}

fn gpus(rng: &mut Rng) -> Vec<Gpu> {
    let count = rng.range(1, 3);
    let same = rng.chance(400).then(|| *rng.pick(&[8, 16, 24]));
    let gpu = |rng: &mut Rng| Gpu {
        total: Bytes::gib(same.unwrap_or_else(|| *rng.pick(&[8, 12, 16, 24, 48]))),
        base: Bytes::mib(*rng.pick(&[0, 0, 100, 300])),
        foreign: BTreeMap::new(),
    };
    (0..count).map(|_| gpu(rng)).collect()
}

fn random_settings(rng: &mut Rng, gpus: &[Gpu], calm: bool) -> Settings {
    let seconds = |rng: &mut Rng, from: &[u64]| Duration::from_secs(*rng.pick(from));
    let mut settings = settings(gpus);
    settings.swap.max_wait = rng.chance(700).then(|| seconds(rng, &[2, 5, 10, 30]));
    settings.swap.min_residency = seconds(rng, &[0, 1, 3, 10]);
    settings.swap.drain_timeout = seconds(rng, &[1, 5, 20, 60]);
    settings.swap.vram_timeout = seconds(rng, &[2, 5, 10]);
    settings.swap.start_timeout = seconds(rng, &[60, 120]);
    if rng.chance(120) {
        settings.swap.mode = SwapMode::SingleActive;
    } else if rng.chance(120) {
        settings.swap.max_concurrent_models = rng.range(1, 3) as u32;
    }
    if calm {
        settings.queue.timeout = Duration::from_secs(3600);
    } else {
        settings.queue.timeout = seconds(rng, &[15, 40, 300, 300]);
        settings.queue.per_model = *rng.pick(&[4, 16, 256]);
        settings.queue.limit = *rng.pick(&[8, 64, 1024]);
    }
    settings
}

struct Models<'a> {
    rng: &'a mut Rng,
    gpus: &'a [Gpu],
    settings: &'a Settings,
    calm: bool,
    proof: bool,
}

impl Models<'_> {
    fn one(&mut self, n: u64) -> (ModelSpec, Truth) {
        let request = self.request();
        let (vram, awake) = self.vram(&request);
        let mut spec = spec(&format!("m{n}"), request, vram);
        self.runtime(&mut spec);
        let rng = &mut *self.rng;
        spec.priority =
            *rng.pick(&[Priority::Normal, Priority::Normal, Priority::High, Priority::Low]);
        spec.concurrency = rng.chance(500).then(|| *rng.pick(&[1, 2, 4, 8]));
        spec.ttl = rng.chance(250).then(|| Duration::from_secs(*rng.pick(&[2, 10, 60])));
        spec.sleep = (rng.chance(300) && spec.gpus != GpuRequest::None).then_some(1);
        spec.start_timeout = (!self.calm && rng.chance(150)).then(|| Duration::from_secs(20));
        if !self.calm {
            spec.pinned = rng.chance(70);
            spec.warmup = rng.chance(120);
        }
        let truth = self.truth(&spec, awake);
        (spec, truth)
    }

    fn request(&mut self) -> GpuRequest {
        let all = self.gpus.len() as u64;
        match self.rng.below(100) {
            0..8 => GpuRequest::None,
            8..65 => GpuRequest::Count(1),
            65..80 => GpuRequest::Count(self.rng.range(1, all) as u16),
            _ => {
                let first = self.rng.below(all);
                let mut names = vec![first.to_string()];
                if all > 1 && self.rng.chance(300) {
                    names.push(format!("GPU-sim-{}", (first + 1) % all));
                }
                GpuRequest::Explicit(names)
            }
        }
    }

    /// What is declared, and what it really takes: never more.
    fn vram(&mut self, request: &GpuRequest) -> (Vram, Bytes) {
        let room = self.room(request);
        let rng = &mut *self.rng;
        if *request == GpuRequest::None {
            return (Vram::Declared(Bytes::ZERO), Bytes::ZERO);
        }
        let share = rng.range(15, 100);
        let declared = Bytes::mib(room.as_mib() * share / 100);
        let real = Bytes::mib(declared.as_mib() * rng.range(70, 100) / 100);
        match rng.below(100) {
            // Nobody could know that it fits only the larger GPU.
            0..10 => (Vram::Unknown, real.min(self.smallest())),
            10..15 => (Vram::Rest, room),
            15..18 if !self.calm => (Vram::Declared(Bytes::gib(500)), Bytes::gib(500)),
            _ => (Vram::Declared(declared), real),
        }
    }

    fn smallest(&self) -> Bytes {
        let usable = |gpu: &Gpu| gpu.total - gpu.base - self.settings.gpu.reserve;
        self.gpus.iter().map(usable).min().unwrap_or_default()
    }

    /// Bytes a model may take on each GPU of the best set for `request`.
    fn room(&self, request: &GpuRequest) -> Bytes {
        // A sample must show the reserve free beside what the driver took already.
        let usable = |gpu: &Gpu| gpu.total - gpu.base - self.settings.gpu.reserve;
        let mut rooms: Vec<Bytes> = match request {
            GpuRequest::None => return Bytes::ZERO,
            GpuRequest::Count(_) => self.gpus.iter().map(usable).collect(),
            GpuRequest::Explicit(names) => names
                .iter()
                .filter_map(|name| name.trim_start_matches("GPU-sim-").parse::<usize>().ok())
                .map(|index| usable(&self.gpus[index]))
                .collect(),
        };
        rooms.sort_by(|a, b| b.cmp(a));
        let wanted = match request {
            GpuRequest::Count(n) => usize::from(*n),
            GpuRequest::None | GpuRequest::Explicit(_) => rooms.len(),
        };
        rooms[wanted - 1]
    }

    fn runtime(&mut self, spec: &mut ModelSpec) {
        let rng = &mut *self.rng;
        if spec.gpus == GpuRequest::None && rng.chance(400) {
            let url = "http://127.0.0.1:9000".to_owned();
            spec.runtime = RuntimeSpec::External(ExternalSpec { url, api_key: None, ca: None });
        } else if rng.chance(500) {
            spec.runtime = RuntimeSpec::Docker(DockerSpec::default());
        }
        if spec.gpus != GpuRequest::None && rng.chance(400) {
            spec.engine = EngineKind::Vllm;
        }
    }

    fn truth(&mut self, spec: &ModelSpec, awake: Bytes) -> Truth {
        let rng = &mut *self.rng;
        let least = if spec.is_external() { 5 } else { *rng.pick(&[50, 300, 1000, 5000, 12_000]) };
        let fetched = rng.chance(850);
        Truth {
            awake,
            residue: Bytes::mib(awake.as_mib() * rng.range(1, 15) / 100),
            fetch_ms: if fetched { (0, 20) } else { (0, 20_000) },
            start_ms: (least, least * 3 / 2),
            stop_ms: *rng.pick(&[(1, 5), (50, 300), (200, 3000)]),
            release_ms: if self.proof {
                *rng.pick(&[(0, 0), (0, 300), (100, 1500)])
            } else {
                (0, 0)
            },
            sleep_ms: (100, 1000),
            wake_ms: (100, 1500),
            broken: !self.calm && rng.chance(40),
            never_frees: false,
            ram: Bytes::ZERO,
        }
    }
}

/// Each kind of fault is off in half the runs, so that rare combinations stand out.
fn faults(rng: &mut Rng) -> Faults {
    let mut rate = |rates: &[u32]| if rng.chance(500) { 0 } else { *rng.pick(rates) };
    Faults {
        preflight: rate(&[20, 200]),
        fetch: rate(&[20, 200]),
        start_transient: rate(&[50, 400]),
        start_crash: rate(&[30, 150, 500]),
        start_hang: rate(&[20, 100]),
        stop_fail: rate(&[30, 200]),
        sleep_fail: rate(&[50, 300]),
        wake_fail: rate(&[50, 300]),
        late_release: rate(&[50, 300]),
        stuck_release: rate(&[10, 60]),
        duplicate: rate(&[50, 300]),
        stale: rate(&[50]),
        crash_serving: rate(&[5, 30]),
        late_gone: rate(&[200, 800]),
    }
}

fn plan(rng: &mut Rng, scenario: &Scenario, model: &ModelName) -> Plan {
    let service_ms = 20 + rng.skewed(*rng.clone().pick(&[500, 4000, 15_000]));
    let mut plan = Plan::new(model, service_ms);
    plan.head_ms = rng.range(0, service_ms);
    plan.priority = *rng.pick(&[Priority::Normal, Priority::Normal, Priority::High, Priority::Low]);
    plan.leaves_flight_after = rng.chance(80).then(|| rng.range(1, service_ms));
    plan.leaves_queue_after = rng.chance(100).then(|| rng.skewed(20_000));
    plan.never_start = rng.chance(40);
    plan.max_wait = rng.chance(60).then(|| Duration::from_millis(rng.skewed(20_000)));
    if scenario.calm {
        plan.leaves_queue_after = None;
    }
    plan
}

fn load(rng: &mut Rng, scenario: &mut Scenario) {
    let names: Vec<ModelName> = scenario.catalog.models.keys().cloned().collect();
    let until = scenario.quiet_from;
    let mut steps = Vec::new();
    for name in &names {
        match rng.below(10) {
            0..5 => {
                let gap = *rng.pick(&[500, 3000, 15_000, 60_000]);
                let mut at = rng.range(0, gap * 2);
                while at < until && steps.len() < 250 {
                    steps.push((at, Step::Arrive(plan(rng, scenario, name))));
                    at += rng.range(1, gap * 2);
                }
            }
            5..8 => {
                for _ in 0..rng.range(1, 4) {
                    let start = rng.below(until);
                    for _ in 0..rng.range(1, 25) {
                        let at = start + rng.below(300);
                        steps.push((at, Step::Arrive(plan(rng, scenario, name))));
                    }
                }
            }
            _ => {}
        }
    }
    for _ in 0..rng.range(0, 3) {
        let turns: Vec<Plan> = (0..rng.range(1, 3))
            .map(|_| {
                let name = rng.pick(&names).clone();
                plan(rng, scenario, &name)
            })
            .collect();
        let think_ms = *rng.pick(&[0, 50, 1000, 8000]);
        let step = Step::Loop(Loop { turns, think_ms, until, left: 60 });
        steps.push((rng.below(until / 2), step));
    }
    scenario.steps.append(&mut steps);
}

fn disturb(rng: &mut Rng, scenario: &mut Scenario) {
    let until = scenario.quiet_from;
    let names: Vec<ModelName> = scenario.catalog.models.keys().cloned().collect();
    let mut steps = Vec::new();
    let some = |rng: &mut Rng, most: u64| if rng.chance(500) { 0 } else { rng.range(1, most) };
    for _ in 0..some(rng, 4) {
        let gpu = rng.below(scenario.gpus.len() as u64);
        let total = scenario.gpus[gpu as usize].total.as_mib();
        let bytes = Bytes::mib(rng.range(total / 20, total * 9 / 10));
        let for_ms = rng.range(1000, 60_000);
        steps.push((rng.below(until), Step::Foreign { gpu: GpuId(gpu as u16), bytes, for_ms }));
    }
    if scenario.proof {
        for _ in 0..some(rng, 3) {
            steps.push((rng.below(until), Step::NoProof { for_ms: rng.range(100, 40_000) }));
        }
    }
    for _ in 0..some(rng, 2) {
        steps.push((rng.below(until), Step::RuntimeDown { for_ms: rng.range(100, 30_000) }));
    }
    for _ in 0..some(rng, 5) {
        steps.push((rng.below(until), Step::Crash { model: rng.pick(&names).clone() }));
    }
    for _ in 0..some(rng, 8) {
        let model = rng.pick(&names).clone();
        steps.push((rng.below(until), Step::Unload { model, force: rng.chance(400) }));
    }
    for _ in 0..some(rng, 10) {
        steps.push((rng.below(until), ensure(rng, &names)));
    }
    let mut catalog = scenario.catalog.clone();
    let mut truth = scenario.truth.clone();
    let mut reloads: Vec<u64> = (0..some(rng, 3)).map(|_| rng.below(until)).collect();
    reloads.sort_unstable();
    for at in reloads {
        (catalog, truth) = reload(rng, scenario, &catalog, truth);
        steps.push((at, Step::Reload(catalog.clone(), truth.clone())));
    }
    if rng.chance(60) {
        steps.push((rng.range(until / 2, until), Step::Shutdown));
    }
    scenario.steps.append(&mut steps);
    adopt(rng, scenario);
}

fn ensure(rng: &mut Rng, names: &[ModelName]) -> Step {
    let model = if rng.chance(50) { ModelName::new("nobody") } else { rng.pick(names).clone() };
    Step::Ensure {
        model,
        kind: *rng.pick(&[EnsureKind::Ensure, EnsureKind::Load, EnsureKind::Warmup]),
        timeout_ms: rng.skewed(60_000),
        gone_after: rng.chance(200).then(|| rng.skewed(10_000)),
    }
}

fn reload(
    rng: &mut Rng,
    scenario: &Scenario,
    old: &Arc<Catalog>,
    mut truth: BTreeMap<ModelName, Truth>,
) -> (Arc<Catalog>, BTreeMap<ModelName, Truth>) {
    let mut next = Catalog::clone(old);
    let names: Vec<ModelName> = next.models.keys().cloned().collect();
    let victim = rng.pick(&names).clone();
    let (gpus, settings) = (&scenario.gpus, next.settings.clone());
    let proof = scenario.proof;
    match rng.below(4) {
        0 if names.len() > 1 => {
            next.models.remove(&victim);
        }
        1 => {
            let mut models = Models { rng, gpus, settings: &settings, calm: false, proof };
            let number = models.rng.range(20, 30);
            let (spec, real) = models.one(number);
            truth.insert(spec.name.clone(), real);
            next.models.insert(spec.name.clone(), Arc::new(spec));
        }
        2 => {
            let mut models = Models { rng, gpus, settings: &settings, calm: false, proof };
            let (mut spec, real) = models.one(0);
            spec.name = victim.clone();
            // What takes other memory is run by another command.
            let size = format!("--size={}", real.awake.0);
            match &mut spec.runtime {
                RuntimeSpec::Process(process) => process.argv.push(size),
                RuntimeSpec::Docker(docker) => docker.args.push(size),
                RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => {}
            }
            truth.insert(victim.clone(), real);
            next.models.insert(victim, Arc::new(spec));
        }
        _ => {
            if let Some(spec) = next.models.get_mut(&victim) {
                let spec = Arc::make_mut(spec);
                spec.concurrency = rng.chance(500).then(|| *rng.pick(&[1, 3, 9]));
                spec.ttl = rng.chance(300).then(|| Duration::from_secs(5));
                spec.priority = Priority::High;
            }
        }
    }
    (Arc::new(next), truth)
}

fn adopt(rng: &mut Rng, scenario: &mut Scenario) {
    if scenario.unseen || !rng.chance(150) {
        return;
    }
    let names: Vec<ModelName> = scenario.catalog.models.keys().cloned().collect();
    let name = rng.pick(&names).clone();
    let spec = &scenario.catalog.models[&name];
    let gpus = match &spec.gpus {
        GpuRequest::None => Vec::new(),
        GpuRequest::Count(1) => vec![GpuId(0)],
        GpuRequest::Count(_) | GpuRequest::Explicit(_) => return,
    };
    let first = &scenario.gpus[0];
    let room = first.total - first.base - scenario.catalog.settings.gpu.reserve;
    if matches!(spec.vram, Vram::Declared(bytes) if bytes <= room) && !spec.is_external() {
        scenario.adopted.push((name, gpus));
    }
}

/// Models that nothing can keep from running once all is quiet.
fn probes(scenario: &Scenario) -> Vec<ModelName> {
    let shut = scenario.steps.iter().any(|(_, step)| matches!(step, Step::Shutdown));
    let reloads = scenario.steps.iter().filter_map(|(at, step)| match step {
        Step::Reload(catalog, _) => Some((at, catalog)),
        _ => None,
    });
    let last = reloads.max_by_key(|(at, _)| **at).map_or(&scenario.catalog, |(_, last)| last);
    let host = scenario.host.map(|host| host.total);
    let on_gpu = |spec: &ModelSpec| spec.gpus != GpuRequest::None;
    let swap = &last.settings.swap;
    let places = scenario.unseen
        || host.is_some()
        || swap.mode == SwapMode::SingleActive
        || swap.max_concurrent_models > 0;
    let pinned = last.models.values().any(|spec| spec.pinned && (places || on_gpu(spec)));
    let able = |spec: &&Arc<ModelSpec>| {
        !shut
            && last.settings.queue.timeout >= Duration::from_secs(300)
            && (!pinned || (!places && !on_gpu(spec)))
            && fits(last, scenario.told_gpus(), host, spec) == Some(true)
    };
    last.models.values().filter(able).map(|spec| spec.name.clone()).collect()
}

/// Some models were run before.
fn remember(rng: &mut Rng, scenario: &mut Scenario) {
    if !rng.chance(300) {
        return;
    }
    for spec in scenario.catalog.models.values() {
        let truth = &scenario.truth[&spec.name];
        let measured = match spec.vram {
            Vram::Unknown => rng.chance(500),
            Vram::Declared(_) => truth.awake > Bytes::ZERO && rng.chance(500),
            Vram::Rest => false,
        };
        let learned = Learned {
            footprint: measured.then_some(truth.awake),
            seasoned: measured && rng.chance(700),
            start: rng.chance(500).then(|| Duration::from_millis(truth.start_ms.1)),
            stop: rng.chance(500).then(|| Duration::from_millis(truth.stop_ms.1)),
            ..Learned::default()
        };
        scenario.remembered.push((spec.name.clone(), learned));
    }
}
