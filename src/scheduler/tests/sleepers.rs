//! Sleepers: when nobody may be put to sleep, and which are never woken.

use std::sync::Arc;
use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::*;
use crate::scheduler::action::{Action, Refusal};
use crate::scheduler::event::Event;
use crate::units::*;

fn vllm(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { engine: EngineKind::Vllm, sleep: Some(1), ..spec(name, gib) }
}

/// `a` sleeps, `b` (18 GiB) is ready and idle where it was.
fn asleep(b: ModelSpec) -> Sim {
    let mut sim = Sim::new(catalog(vec![vllm("a", 20), b]), &[24]);
    for model in ["a", "b"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
    assert_eq!(sim.state("a"), "sleeping");
    sim
}

fn wakes(sim: &Sim) -> usize {
    sim.count(|a| matches!(a, Action::Wake { .. }))
}

#[test]
fn nobody_is_put_to_sleep_where_no_memory_can_be_read() {
    let config = catalog(vec![vllm("a", 20), spec("b", 18)]);
    let mut sim = Sim::in_world(config, &[24], false);
    for model in ["a", "b"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
    assert_eq!(sim.state("a"), "stopped", "what it would keep asleep is anybody's guess");
    assert_eq!(sim.count(|a| matches!(a, Action::Sleep { .. })), 0);
}

#[test]
fn what_a_sleeper_keeps_stays_promised() {
    let sim = asleep(spec("b", 18));
    let view = sim.scheduler.view(sim.now);
    assert_eq!(view.gpus[0].promised, Bytes::gib(18 + 1));
}

#[test]
fn a_sleeper_whose_unload_has_to_wait_is_not_woken_meanwhile() {
    let mut sim = Sim::new(catalog(vec![vllm("a", 20), vllm("b", 18)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(10);
    sim.end(first);
    let second = sim.request("b");
    sim.run_secs(3);
    assert_eq!((sim.state("a"), sim.state("b")), ("sleeping", "starting"));
    sim.unload("a", false);
    let third = sim.request("a");
    sim.run_secs(5);
    sim.end(second);
    sim.run_secs(10);
    assert_eq!(sim.served_by(third), Some("a"));
    assert_eq!((sim.starts("a"), wakes(&sim)), (2, 0));
}

#[test]
fn a_sleeper_of_an_older_entry_is_not_woken() {
    let mut sim = asleep(spec("b", 18));
    let changed = vec![vllm("a", 12), spec("b", 18)];
    let request = sim.request("b");
    sim.send(Event::CatalogChanged(Arc::new(catalog(changed))));
    let again = sim.request("a");
    sim.end(request);
    sim.run_secs(15);
    assert_eq!(sim.served_by(again), Some("a"));
    assert_eq!((sim.starts("a"), wakes(&sim)), (2, 0));
}

#[test]
fn a_sleeper_that_cannot_wake_beside_a_stranger_tries_a_fresh_start_and_names_it() {
    let mut sim = asleep(spec("b", 18));
    sim.strangers.insert(GpuId(0), Bytes::gib(4));
    sim.run_for(Duration::from_secs(1));
    let before = sim.log.len();
    let request = sim.request("a");
    sim.run_secs(5);
    assert!(sim.log.len() - before < 40, "it waits instead of choosing again and again");
    sim.run_secs(60);
    let Some(Refusal::VramNeverFreed { fault, .. }) = sim.refused.get(&request) else {
        panic!("{:?}", sim.refused.get(&request));
    };
    assert!(fault.message.contains("pid 4711 (blender)"), "{}", fault.message);
    assert_eq!((sim.state("b"), wakes(&sim)), ("ready", 0), "nobody is disturbed for it");
    sim.strangers.clear();
    sim.run_secs(400);
    let again = sim.request("a");
    sim.run_secs(10);
    assert_eq!(sim.served_by(again), Some("a"));
}
