//! Host RAM is promised like GPU memory: models that fit on the GPUs may still not fit together.

use super::config::*;
use super::world::*;
use crate::config::catalog::{Catalog, EngineKind, GpuRequest, ModelSpec};
use crate::scheduler::action::{Action, Refusal};
use crate::scheduler::event::HostMemory;
use crate::scheduler::record::RamView;
use crate::units::*;

fn with_ram(name: &str, gib: u64, ram: u64) -> ModelSpec {
    ModelSpec { ram: Some(Bytes::gib(ram)), ..spec(name, gib) }
}

fn sleeper(name: &str, gib: u64, level: u8) -> ModelSpec {
    ModelSpec { engine: EngineKind::Vllm, sleep: Some(level), ..spec(name, gib) }
}

/// A declared total, 2 GiB of it in reserve.
fn host(total: u64, models: Vec<ModelSpec>) -> Catalog {
    let mut catalog = catalog(models);
    catalog.settings.ram.total = Some(Bytes::gib(total));
    catalog
}

fn ram(sim: &Sim) -> RamView {
    sim.scheduler.view(sim.now).ram
}

#[test]
fn what_the_host_can_never_hold_is_refused_at_once() {
    let mut pinned = with_ram("pinned", 1, 6);
    pinned.pinned = true;
    let models = vec![with_ram("huge", 1, 31), with_ram("beside", 1, 25), pinned];
    let mut sim = Sim::new(host(32, models), &[80]);
    for (model, need) in [("huge", 31), ("beside", 25)] {
        let request = sim.request(model);
        let available = Bytes::gib(24);
        let refusal = Refusal::CannotFit {
            need: Bytes::gib(need),
            available,
            gpus: 0,
            host: true,
            pinned: vec!["pinned".into()],
        };
        assert_eq!(sim.refused.get(&request), Some(&refusal), "{model}");
    }
    assert_eq!(sim.count(|a| matches!(a, Action::Preflight { .. })), 0);
}

#[test]
fn a_model_leaves_for_host_ram_though_the_gpus_have_room() {
    let models = vec![with_ram("a", 4, 8), with_ram("b", 4, 8), with_ram("c", 4, 4), spec("d", 4)];
    let mut sim = Sim::new(host(16, models), &[80, 80]);
    for model in ["c", "a", "d"] {
        let request = sim.request(model);
        sim.run_secs(10);
        sim.finish(request);
    }
    assert_eq!(ram(&sim).promised, Bytes::gib(12));
    let request = sim.request("b");
    sim.run_secs(10);
    assert_eq!(sim.served_by(request), Some("b"));
    assert_eq!((sim.state("a"), sim.state("c")), ("stopped", "ready"), "no more than needed");
    assert_eq!(sim.state("d"), "ready", "it holds no host RAM that could be had");
    assert_eq!(ram(&sim).promised, Bytes::gib(12));
}

#[test]
fn a_start_waits_for_the_end_of_the_process_not_for_gpu_bytes() {
    let cpu = |name: &str| ModelSpec {
        gpus: GpuRequest::None,
        vram: crate::config::catalog::Vram::Unknown,
        ..with_ram(name, 0, 8)
    };
    let mut sim = Sim::new(host(12, vec![cpu("a"), cpu("b")]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.finish(first);
    let second = sim.request("b");
    sim.run_secs(5);
    assert_eq!(sim.served_by(second), Some("b"));
    let at = |wanted: &dyn Fn(&Action) -> bool| {
        sim.log.iter().rfind(|(_, a)| wanted(a)).map(|(at, _)| *at).expect("it happened")
    };
    let stop = at(&|a| matches!(a, Action::StopInstance { .. }));
    let start = at(&|a| matches!(a, Action::StartInstance { .. }));
    // The stop takes 200 ms in this world, and its memory on a GPU 700 ms more.
    assert_eq!(start.since(stop).as_millis(), 200);
}

#[test]
fn weights_asleep_at_level_1_are_promised() {
    let mut sim = Sim::new(host(64, vec![sleeper("a", 20, 1), sleeper("b", 20, 1)]), &[24]);
    for model in ["a", "b"] {
        let request = sim.request(model);
        sim.run_secs(20);
        sim.finish(request);
    }
    assert_eq!(sim.state("a"), "sleeping");
    assert_eq!((ram(&sim).promised, ram(&sim).promised_to.len()), (Bytes::gib(20), 1));
    let request = sim.request("a");
    sim.run_secs(20);
    assert_eq!(sim.served_by(request), Some("a"), "and given back when it wakes");
    assert_eq!(ram(&sim).promised, Bytes::gib(20), "b sleeps now");
}

#[test]
fn who_would_not_fit_asleep_is_stopped() {
    let swapped = |a: ModelSpec| {
        let mut sim = Sim::new(host(16, vec![a, spec("b", 20)]), &[24]);
        for model in ["a", "b"] {
            let request = sim.request(model);
            sim.run_secs(20);
            assert_eq!(sim.served_by(request), Some(model));
            sim.finish(request);
        }
        sim.state("a")
    };
    assert_eq!(swapped(sleeper("a", 20, 1)), "stopped", "20 GiB of weights, 14 to give");
    assert_eq!(swapped(sleeper("a", 20, 2)), "sleeping", "level 2 keeps nothing");
    let small = ModelSpec { size_gb: Some(8.0), ..sleeper("a", 20, 1) };
    assert_eq!(swapped(small), "sleeping", "the weights are smaller than the footprint");
}

#[test]
fn a_sleeper_leaves_when_its_host_ram_is_wanted() {
    let models = vec![sleeper("a", 20, 1), spec("b", 20), with_ram("c", 2, 20)];
    let mut sim = Sim::new(host(32, models), &[24]);
    for model in ["a", "b"] {
        let request = sim.request(model);
        sim.run_secs(20);
        sim.finish(request);
    }
    assert_eq!(sim.state("a"), "sleeping");
    let request = sim.request("c");
    sim.run_secs(20);
    assert_eq!(sim.served_by(request), Some("c"));
    assert_eq!((sim.state("a"), sim.state("b")), ("stopped", "ready"));
}

#[test]
fn others_who_hold_host_ram_are_seen() {
    let mut sim = Sim::new(catalog(vec![with_ram("a", 4, 8)]), &[24]);
    let free = |gib: u64| HostMemory { total: Bytes::gib(32), available: Bytes::gib(gib) };
    sim.host = Some(free(9));
    sim.run_secs(1);
    let request = sim.request("a");
    sim.run_secs(10);
    assert_eq!(sim.starts("a"), 0, "9 GiB are available and 2 in reserve");
    let why = sim.model("a").waiting_for;
    assert!(why.contains("8.0 GiB of host RAM are needed, 9.0 GiB of 32.0 GiB"), "{why}");
    sim.host = Some(free(12));
    sim.run_secs(10);
    assert_eq!(sim.served_by(request), Some("a"));
}

#[test]
fn host_ram_that_others_keep_is_named_when_the_time_is_up() {
    let mut sim = Sim::new(catalog(vec![with_ram("a", 4, 8)]), &[24]);
    sim.host = Some(HostMemory { total: Bytes::gib(32), available: Bytes::gib(9) });
    sim.run_secs(1);
    let request = sim.request("a");
    sim.run_secs(40);
    let Some(Refusal::VramNeverFreed { fault, .. }) = sim.refused.get(&request) else {
        panic!("{:?}", sim.refused.get(&request));
    };
    assert!(fault.message.contains("host RAM"), "{}", fault.message);
}

#[test]
fn without_a_known_total_there_is_no_limit() {
    let mut sim = Sim::new(catalog(vec![with_ram("a", 4, 500), sleeper("b", 4, 1)]), &[24]);
    let request = sim.request("a");
    sim.run_secs(10);
    assert_eq!(sim.served_by(request), Some("a"));
    assert_eq!((ram(&sim).total, ram(&sim).promised), (None, Bytes::gib(500)));
}
