//! Random days on small machines: whatever happens, the invariants hold after every event (the
//! scheduler itself asserts them), nobody is forgotten, and once the faults stop everything that
//! can be served is served.

use std::sync::Arc;
use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::*;
use crate::scheduler::action::Refusal;
use crate::scheduler::event::{EnsureKind, Event, FaultKind};
use crate::units::*;

/// xorshift64*: the same day for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }

    fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }
}

fn random_catalog(dice: &mut Dice, gpus: usize) -> Catalog {
    let count = 2 + dice.roll(4);
    let models = (0..count).map(|n| {
        let mut model = spec(&format!("m{n}"), 4 + dice.roll(20));
        if dice.one_in(3) {
            model.engine = EngineKind::Vllm;
            model.sleep = dice.one_in(2).then_some(1);
        }
        if dice.one_in(6) {
            model.vram = if dice.one_in(2) { Vram::Unknown } else { Vram::Rest };
        }
        if gpus > 1 && dice.one_in(5) {
            model.gpus = GpuRequest::Count(2);
        } else if gpus > 0 && dice.one_in(8) {
            model.gpus = GpuRequest::Explicit(vec![dice.roll(gpus as u64).to_string()]);
        } else if dice.one_in(10) {
            model.gpus = GpuRequest::None;
        }
        model.concurrency = dice.one_in(3).then(|| 1 + dice.roll(3) as u32);
        model.ttl = dice.one_in(5).then(|| Duration::from_secs(5 + dice.roll(30)));
        model.warmup = dice.one_in(8);
        model.pinned = n == 0 && dice.one_in(5);
        model.priority = [Priority::Low, Priority::Normal, Priority::High][dice.roll(3) as usize];
        if model.pinned {
            model.vram = Vram::Declared(Bytes::gib(4));
        }
        model
    });
    let mut catalog = catalog(models.collect());
    catalog.settings.swap.max_concurrent_models = if dice.one_in(5) { 2 } else { 0 };
    if dice.one_in(8) {
        catalog.settings.swap.mode = SwapMode::SingleActive;
    }
    catalog.settings.swap.drain_timeout = Duration::from_secs(5 + dice.roll(60));
    catalog
}

fn mishap(sim: &mut Sim, dice: &mut Dice, model: &str, base: &Catalog) {
    let kinds = [FaultKind::PortTaken, FaultKind::OutOfMemory, FaultKind::NeverHealthy];
    match dice.roll(12) {
        0 => {
            let kind = kinds[dice.roll(3) as usize];
            sim.faults.start.entry(model.into()).or_default().push_back(kind);
        }
        1 => {
            let kind = kinds[dice.roll(3) as usize];
            sim.faults.preflight.entry(model.into()).or_default().push_back(kind);
        }
        2 => sim.faults.stop.entry(model.into()).or_default().push_back(FaultKind::StopFailed),
        3 => sim.kill_if_running(model),
        4 => sim.faults.no_proof = !sim.faults.no_proof,
        5 => {
            sim.strangers.insert(GpuId(0), Bytes::gib(dice.roll(12)));
            // Nobody can know of memory taken since the last reading.
            sim.sample();
        }
        6 => {
            sim.unload(model, dice.one_in(2));
        }
        7 => {
            let instances: Vec<InstanceId> = sim.running.keys().copied().collect();
            sim.send(Event::RuntimeLost { instances: instances.clone(), why: "away".to_owned() });
            sim.run_for(Duration::from_millis(dice.roll(5000)));
            let alive = instances.into_iter().filter(|i| sim.running.contains_key(i)).collect();
            sim.send(Event::RuntimeBack { alive, dead: Vec::new() });
        }
        8 => {
            let mut changed = base.clone();
            let name = ModelName::new(model);
            if dice.one_in(3) {
                changed.models.remove(&name);
            } else if let Some(spec) = changed.models.get_mut(&name) {
                Arc::make_mut(spec).description = Some(format!("{}", dice.roll(99)));
            }
            sim.send(Event::CatalogChanged(Arc::new(changed)));
        }
        9 if dice.one_in(2) => sim.sneaks += 3,
        9 => sim.lag = Duration::from_millis(dice.roll(3000)),
        10 => {
            let kinds = [EnsureKind::Ensure, EnsureKind::Load, EnsureKind::Warmup];
            let timeout = Duration::from_secs(dice.roll(60));
            sim.ensure(model, kinds[dice.roll(3) as usize], timeout);
        }
        _ => {
            sim.faults.keeps_memory.insert(model.into());
        }
    }
}

fn random_day(seed: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let machine: &[u64] = [&[24][..], &[24, 24], &[80], &[], &[24, 48, 24]][dice.roll(5) as usize];
    let base = random_catalog(&mut dice, machine.len());
    let proof = !machine.is_empty() && !dice.one_in(5);
    let mut sim = Sim::in_world(base.clone(), machine, proof);
    sim.sample_every = Duration::from_millis(1000);
    sim.hide_pids = dice.one_in(5);
    let mut requests = Vec::new();
    for _ in 0..60 {
        let model = format!("m{}", dice.roll(base.models.len() as u64));
        match dice.roll(10) {
            0..5 => {
                let never = dice.one_in(12);
                requests.push(sim.request_with(&model, |r| r.never_start = never));
            }
            5..7 if !requests.is_empty() => {
                let request = requests[dice.roll(requests.len() as u64) as usize];
                sim.end(request);
            }
            7 => mishap(&mut sim, &mut dice, &model, &base),
            _ => sim.run_for(Duration::from_millis(dice.roll(8000))),
        }
    }
    // The faults stop; what runs ends within a minute; everybody gets their answer.
    sim.faults = Faults::default();
    sim.sneaks = 0;
    sim.strangers.clear();
    sim.heal();
    sim.send(Event::CatalogChanged(Arc::new(base.clone())));
    for _ in 0..60 {
        sim.run_secs(30);
        let idle = sim.granted.is_empty() && sim.scheduler.view(sim.now).swaps.is_empty();
        if idle && requests.iter().all(|r| sim.is_over(*r)) {
            break;
        }
        for request in sim.granted.keys().copied().collect::<Vec<_>>() {
            sim.end(request);
        }
    }
    for request in &requests {
        assert!(sim.is_over(*request), "seed {seed}: {request} was forgotten");
    }
    let view = sim.scheduler.view(sim.now);
    assert_eq!(view.queued, 0, "seed {seed}");
    if !view.swaps.is_empty() {
        sim.print_log();
    }
    assert!(view.swaps.is_empty(), "seed {seed}: {:#?}", view.swaps);
    for model in base.models.keys() {
        assert_served(&mut sim, model.as_str(), seed);
    }
}

/// Within ten minutes (a back-off may have to pass) the model is served, or can never fit.
fn assert_served(sim: &mut Sim, model: &str, seed: u64) {
    let mut request = sim.request(model);
    for _ in 0..65 {
        if sim.granted.contains_key(&request) {
            return sim.end(request);
        }
        match sim.refused.get(&request) {
            Some(Refusal::CannotFit { .. }) => return,
            Some(_) => request = sim.request(model),
            None => {}
        }
        sim.run_secs(10);
    }
    let refusal = sim.refused.get(&request);
    sim.print_log();
    panic!("seed {seed}: {model} is not served: {:#?} {refusal:?}", sim.model(model));
}

#[test]
fn random_days_end_well() {
    let days = std::env::var("WHARF_DAYS").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    let first = std::env::var("WHARF_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for seed in first..first + days {
        let run = std::panic::catch_unwind(|| random_day(seed));
        if let Err(panic) = run {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
