//! Operators: ensure, load, unload, ttl, reload, adoption, the end.

use std::sync::Arc;
use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::scheduler::action::{Action, Answer, Refusal};
use crate::scheduler::event::{EnsureKind, Event};
use crate::scheduler::record::{SwapCause, SwapOutcome};
use crate::units::*;

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn ensure_evicts_the_busy_and_holds_its_model() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(5);
    let ask = sim.ensure("b", EnsureKind::Ensure, MINUTE);
    sim.run_secs(1);
    assert_eq!(sim.state("a"), "draining", "an ensure waits for no tenure");
    sim.end(stream);
    sim.run_secs(6);
    assert!(matches!(sim.answers.get(&ask), Some(Answer::Ready { swapped: true, .. })));
    let waiting = sim.request("a");
    sim.run_secs(20);
    assert_eq!(sim.state("b"), "ready", "held for its caller");
    let used = sim.request("b");
    sim.end(used);
    sim.run_secs(8);
    assert_eq!(sim.served_by(waiting), Some("a"), "the first request ended, so the hold did");
    let again = sim.ensure("a", EnsureKind::Load, MINUTE);
    assert!(matches!(sim.answers.get(&again), Some(Answer::Ready { swapped: false, .. })));
}

#[test]
fn an_ensure_that_runs_out_of_time_is_told_so_and_goes_on() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let ask = sim.ensure("a", EnsureKind::Ensure, Duration::from_secs(1));
    sim.run_secs(2);
    assert!(matches!(sim.answers.get(&ask), Some(Answer::TimedOut { swap: Some(_) })));
    sim.run_secs(4);
    assert_eq!(sim.state("a"), "ready");
}

#[test]
fn warmup_takes_free_memory_only_and_comes_back_after_quiet() {
    let mut warm = spec("warm", 10);
    warm.warmup = true;
    let mut sim = Sim::new(catalog(vec![warm, spec("b", 20)]), &[24]);
    sim.ensure("warm", EnsureKind::Warmup, MINUTE);
    sim.run_secs(5);
    assert_eq!(sim.state("warm"), "ready");
    let request = sim.request("b");
    sim.run_secs(8);
    assert_eq!(sim.served_by(request), Some("b"), "demand evicts a warm-up model");
    sim.end(request);
    sim.run_secs(60);
    assert_eq!((sim.state("b"), sim.state("warm")), ("ready", "stopped"), "it evicts nobody");
    sim.unload("b", false);
    sim.run_secs(20);
    assert_eq!(sim.state("warm"), "ready");
    let row = sim.ledger().pop().expect("a row");
    assert_eq!(row.cause, SwapCause::Restore);
}

#[test]
fn unload_drains_and_refuses_the_queue() {
    let mut one = spec("a", 20);
    one.concurrency = Some(1);
    let mut sim = Sim::new(catalog(vec![one]), &[24]);
    let running = sim.request("a");
    sim.run_secs(5);
    let waiting = sim.request("a");
    let ask = sim.unload("a", false);
    assert_eq!(sim.refused.get(&waiting), Some(&Refusal::Unloaded));
    sim.run_secs(10);
    assert_eq!(sim.state("a"), "draining");
    sim.end(running);
    sim.run_secs(2);
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Unloaded { was_loaded: true }));
    let again = sim.unload("a", false);
    assert_eq!(sim.answers.get(&again), Some(&Answer::Unloaded { was_loaded: false }));
}

#[test]
fn a_forced_unload_cancels_leases() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    sim.request("a");
    sim.run_secs(5);
    let ask = sim.unload("a", true);
    sim.run_secs(3);
    assert_eq!(sim.count(|a| matches!(a, Action::CancelLeases { .. })), 1);
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Unloaded { was_loaded: true }));
}

#[test]
fn a_start_is_cancelled_by_an_unload() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let request = sim.request("a");
    sim.run_secs(1);
    let ask = sim.unload("a", false);
    assert_eq!(sim.refused.get(&request), Some(&Refusal::Unloaded));
    sim.run_secs(3);
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Unloaded { was_loaded: true }));
    assert_eq!(sim.state("a"), "stopped");
}

#[test]
fn an_idle_model_leaves_after_its_ttl() {
    let mut brief = spec("a", 20);
    brief.ttl = Some(Duration::from_secs(20));
    let mut sim = Sim::new(catalog(vec![brief]), &[24]);
    let request = sim.request("a");
    sim.run_secs(40);
    assert_eq!(sim.state("a"), "ready", "in use");
    sim.end(request);
    sim.run_secs(19);
    assert_eq!(sim.state("a"), "ready");
    sim.run_secs(3);
    assert_eq!(sim.state("a"), "stopped");
    let row = sim.ledger().pop().expect("a row");
    assert_eq!((row.cause, row.outcome), (SwapCause::Ttl, Some(SwapOutcome::Unloaded)));
}

#[test]
fn a_reload_touches_only_what_changed() {
    let before = catalog(vec![spec("same", 4), spec("changed", 4), spec("removed", 4)]);
    let mut sim = Sim::new(before, &[24]);
    let requests = ["same", "changed", "removed"].map(|model| sim.request(model));
    sim.run_secs(5);
    let mut same = spec("same", 4);
    same.line = 99;
    let mut changed = spec("changed", 4);
    changed.upstream_name = Some("other".to_owned());
    let mut sim_config = catalog(vec![same, changed]);
    sim_config.settings.queue.limit = 7;
    sim.send(Event::CatalogChanged(Arc::new(sim_config)));
    assert_eq!(sim.state("same"), "ready");
    assert_eq!((sim.state("changed"), sim.state("removed")), ("draining", "draining"));
    let waits = sim.request("changed");
    for request in requests {
        sim.end(request);
    }
    sim.run_secs(8);
    assert_eq!(sim.served_by(waits), Some("changed"), "restarted for its waiter");
    let view = sim.scheduler.view(sim.now);
    assert!(view.models.iter().all(|m| m.name.as_str() != "removed"));
    assert_eq!(sim.starts("same"), 1);
}

#[test]
fn what_was_adopted_is_ready_at_once() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    sim.adopt(InstanceId(0), "a", Bytes::gib(20));
    assert_eq!(sim.state("a"), "ready");
    let request = sim.request("a");
    assert_eq!(sim.served_by(request), Some("a"));
    assert_eq!(sim.starts("a"), 0);
}

#[test]
fn shutting_down_refuses_everyone_and_starts_nothing() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(5);
    let waiting = sim.request("b");
    let ask = sim.ensure("b", EnsureKind::Load, MINUTE);
    sim.send(Event::ShuttingDown);
    assert_eq!(sim.refused.get(&waiting), Some(&Refusal::ShuttingDown));
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Refused(Refusal::ShuttingDown)));
    let late = sim.request("a");
    assert_eq!(sim.refused.get(&late), Some(&Refusal::ShuttingDown));
    sim.end(stream);
    sim.run_secs(60);
    assert_eq!(sim.starts("b"), 0);
}
