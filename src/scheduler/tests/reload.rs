//! A reload touches what it must: what shapes an engine restarts it, everything else is in force at
//! once under it. And what runs without being fit to be adopted goes.

use std::sync::Arc;
use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::{ModelSpec, Vram};
use crate::scheduler::action::Action;
use crate::scheduler::event::Event;
use crate::scheduler::record::SwapCause;
use crate::units::*;

fn reload(sim: &mut Sim, models: Vec<ModelSpec>) {
    sim.send(Event::CatalogChanged(Arc::new(catalog(models))));
}

/// Started differently from [`spec`].
fn reshaped(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { upstream_name: Some("other".to_owned()), ..spec(name, gib) }
}

fn footprint(sim: &Sim, model: &str) -> Option<Bytes> {
    sim.model(model).footprint
}

/// With the margin on top of what was learned.
fn a_little_more(gib: u64) -> Bytes {
    Bytes(Bytes::gib(gib).0 + Bytes::gib(gib).0 / 100 * 5)
}

#[test]
fn words_and_policy_change_under_a_running_engine() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(5);
    let edited = ModelSpec {
        description: Some("new words".to_owned()),
        tags: vec!["new".to_owned()],
        aliases: vec!["alias".to_owned()],
        priority: Priority::High,
        ttl: Some(Duration::from_secs(20)),
        ..spec("a", 20)
    };
    reload(&mut sim, vec![edited]);
    assert_eq!(sim.state("a"), "ready");
    let another = sim.request("a");
    assert_eq!(sim.served_by(another), Some("a"), "its gate stayed open");
    sim.end(another);
    sim.end(stream);
    sim.run_secs(10);
    assert_eq!((sim.state("a"), sim.starts("a")), ("ready", 1));
    sim.run_secs(15);
    assert_eq!(sim.state("a"), "stopped", "the new ttl is in force");
    assert_eq!(sim.ledger().pop().expect("a row").cause, SwapCause::Ttl);
}

#[test]
fn a_new_limit_of_concurrency_is_in_force_at_once() {
    let limited = |most| ModelSpec { concurrency: most, ..spec("a", 20) };
    let mut sim = Sim::new(catalog(vec![limited(Some(1))]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    let [second, third] = [0; 2].map(|_| sim.request("a"));
    assert_eq!(sim.served_by(second), None, "one at a time");
    reload(&mut sim, vec![limited(Some(3))]);
    assert_eq!((sim.served_by(second), sim.served_by(third)), (Some("a"), Some("a")));
    for request in [second, third] {
        sim.end(request);
    }
    let many = [0; 2].map(|_| sim.request("a"));
    assert!(many.iter().all(|&request| sim.served_by(request) == Some("a")));
    reload(&mut sim, vec![limited(Some(1))]);
    let waits = sim.request("a");
    for request in many {
        sim.end(request);
    }
    assert_eq!(sim.served_by(waits), None, "the first is still there");
    sim.end(first);
    assert_eq!(sim.served_by(waits), Some("a"));
    assert_eq!(sim.starts("a"), 1);
}

#[test]
fn an_open_gate_lets_no_more_in_than_the_new_limit() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    reload(&mut sim, vec![ModelSpec { concurrency: Some(2), ..spec("a", 20) }]);
    let second = sim.request("a");
    let waits = sim.request("a");
    assert_eq!((sim.served_by(second), sim.served_by(waits)), (Some("a"), None));
    sim.end(first);
    assert_eq!(sim.served_by(waits), Some("a"));
}

#[test]
fn a_model_that_is_pinned_while_it_drains_stays() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(5);
    sim.ensure("b", crate::scheduler::event::EnsureKind::Ensure, Duration::from_secs(60));
    sim.run_secs(1);
    assert_eq!(sim.state("a"), "draining");
    reload(&mut sim, vec![ModelSpec { pinned: true, ..spec("a", 20) }, spec("b", 20)]);
    assert_eq!(sim.state("a"), "ready");
    sim.end(stream);
    sim.run_secs(20);
    assert_eq!((sim.state("a"), sim.starts("b")), ("ready", 0));
}

#[test]
fn a_new_footprint_is_promised_as_far_as_there_is_room() {
    let mut sim = Sim::new(catalog(vec![spec("a", 8), spec("b", 8)]), &[24]);
    for model in ["a", "b"] {
        let request = sim.request(model);
        sim.run_secs(6);
        sim.end(request);
    }
    let room = Bytes::gib(24) - catalog(vec![]).settings.gpu.reserve;
    reload(&mut sim, vec![spec("a", 20), spec("b", 8)]);
    assert_eq!(footprint(&sim, "a"), Some(room - Bytes::gib(8)), "what b was promised stays b's");
    reload(&mut sim, vec![spec("a", 12), spec("b", 8)]);
    assert_eq!(footprint(&sim, "a"), Some(Bytes::gib(12)));
    // It holds 8 GiB, whatever the file says, and may take a little more.
    reload(&mut sim, vec![spec("a", 3), spec("b", 9)]);
    let both = (footprint(&sim, "a"), footprint(&sim, "b"));
    assert_eq!(both, (Some(a_little_more(8)), Some(Bytes::gib(9))));
    assert_eq!((sim.starts("a"), sim.starts("b")), (1, 1));
    assert_eq!((sim.state("a"), sim.state("b")), ("ready", "ready"));
}

#[test]
fn what_shapes_the_engine_restarts_it() {
    let mut sim = Sim::new(catalog(vec![spec("a", 8)]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(5);
    reload(&mut sim, vec![reshaped("a", 8)]);
    assert_eq!(sim.state("a"), "draining");
    let waits = sim.request("a");
    sim.end(stream);
    sim.run_secs(8);
    assert_eq!((sim.served_by(waits), sim.starts("a")), (Some("a"), 2));
}

#[test]
fn a_start_under_way_goes_on_unless_it_would_be_another_start() {
    let mut sim = Sim::new(catalog(vec![spec("a", 8)]), &[24]);
    let request = sim.request("a");
    sim.run_secs(1);
    reload(&mut sim, vec![ModelSpec { priority: Priority::Low, ..spec("a", 8) }]);
    sim.run_secs(4);
    assert_eq!((sim.served_by(request), sim.starts("a")), (Some("a"), 1));
    let mut sim = Sim::new(catalog(vec![spec("a", 8)]), &[24]);
    let request = sim.request("a");
    sim.run_secs(1);
    reload(&mut sim, vec![spec("a", 16)]);
    sim.run_secs(8);
    assert_eq!((sim.served_by(request), sim.starts("a")), (Some("a"), 2));
    assert_eq!(footprint(&sim, "a"), Some(Bytes::gib(16)));
}

#[test]
fn an_engine_of_an_earlier_configuration_teaches_nothing() {
    let unknown = |spec: ModelSpec| ModelSpec { vram: Vram::Unknown, ..spec };
    let mut sim = Sim::new(catalog(vec![unknown(spec("a", 0))]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(6);
    reload(&mut sim, vec![unknown(reshaped("a", 0))]);
    sim.run_secs(2);
    sim.end(stream);
    sim.run_secs(3);
    sim.request("a");
    sim.run_secs(6);
    let starts = sim.log.iter().filter_map(|(_, action)| {
        if let Action::StartInstance { footprint, .. } = action { Some(*footprint) } else { None }
    });
    assert_eq!(starts.collect::<Vec<_>>(), [None, None], "the second is measured afresh");
}

#[test]
fn what_runs_and_is_not_fit_to_be_adopted_is_stopped_before_its_model_starts() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let (id, gpus, bytes) = (InstanceId(0), vec![GpuId(0)], Bytes::gib(20));
    sim.insert(id, "a".into(), gpus.clone(), bytes);
    let why = "it does not answer".to_owned();
    sim.send(Event::Stray { instance: id, model: "a".into(), gpus, footprint: bytes, why });
    assert_eq!(sim.state("a"), "stopping");
    let request = sim.request("a");
    assert_eq!(sim.starts("a"), 0);
    sim.run_secs(8);
    assert_eq!((sim.served_by(request), sim.starts("a")), (Some("a"), 1));
    let row = sim.ledger().remove(0);
    assert_eq!((row.cause, row.decision.as_str()), (SwapCause::Cleanup, "it does not answer"));
}
