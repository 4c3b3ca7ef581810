//! The main job: one model makes room for another, in order and only on proof.

use super::config::*;
use super::world::*;
use crate::scheduler::action::Action;
use crate::scheduler::record::{Phase, SwapOutcome};

#[test]
fn a_first_request_starts_its_model() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let request = sim.request("a");
    assert_eq!(sim.state("a"), "starting");
    sim.run_secs(5);
    assert_eq!(sim.served_by(request), Some("a"));
    assert_eq!(sim.state("a"), "ready");
    let opened = sim.first(|a| matches!(a, Action::OpenGate { .. }));
    assert!(opened.is_some(), "the gateway serves by itself now");
}

#[test]
fn a_swap_drains_stops_proves_and_only_then_starts() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    let second = sim.request("b");
    sim.run_secs(1);
    assert_eq!(sim.state("a"), "ready", "busy: nobody drains it yet");
    sim.finish(first);
    sim.run_secs(10);
    assert_eq!(sim.served_by(second), Some("b"));
    assert_eq!(sim.state("a"), "stopped");
    let swap = sim.ledger().into_iter().find(|r| r.model.as_str() == "b").expect("a row");
    assert_eq!(swap.outcome, Some(SwapOutcome::Ready));
    assert_eq!(swap.evicted.len(), 1);
    let phases: Vec<Phase> = swap.phases.iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, Phase::ALL);
    let proof = swap.phases.iter().find(|(phase, _)| *phase == Phase::Prove).expect("proved").1;
    assert!(proof >= sim.lag, "the start waited for the memory: {proof:?}");
}

#[test]
fn back_and_forth() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    for model in ["a", "b", "a", "b"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.finish(request);
    }
    assert_eq!((sim.starts("a"), sim.starts("b")), (2, 2));
}

#[test]
fn models_that_fit_together_stay_together() {
    let mut sim = Sim::new(catalog(vec![spec("a", 10), spec("b", 10)]), &[24]);
    let (a, b) = (sim.request("a"), sim.request("b"));
    sim.run_secs(5);
    assert_eq!((sim.served_by(a), sim.served_by(b)), (Some("a"), Some("b")));
    assert_eq!(sim.count(|a| matches!(a, Action::StopInstance { .. })), 0);
}

#[test]
fn all_who_leave_are_stopped_at_once_and_the_next_is_prepared_meanwhile() {
    let models = vec![spec("a", 10), spec("b", 10), spec("c", 20)];
    let mut sim = Sim::new(catalog(models), &[24]);
    let first = [sim.request("a"), sim.request("b")];
    sim.run_secs(5);
    for request in first {
        sim.finish(request);
    }
    assert_eq!(sim.count(|a| matches!(a, Action::Prepare { .. })), 0, "nobody had to leave");
    sim.run_secs(60);
    let third = sim.request("c");
    sim.run_secs(10);
    assert_eq!(sim.served_by(third), Some("c"));
    let stops = sim.times(|a| matches!(a, Action::StopInstance { .. }));
    assert!(stops.len() == 2 && stops[0] == stops[1], "{stops:?}");
    let prepared = sim.times(|a| matches!(a, Action::Prepare { .. }));
    assert!(prepared.len() == 1 && prepared[0] <= stops[0], "{prepared:?}");
}
