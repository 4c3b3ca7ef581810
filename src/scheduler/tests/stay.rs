//! How long a model stays: grace, extension, pins, sleep and wake by hand, keep windows.

use std::sync::Arc;
use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::*;
use crate::scheduler::action::{Action, Answer, Refusal};
use crate::scheduler::event::{EnsureKind, Event};
use crate::scheduler::record::{SwapCause, SwapOutcome};
use crate::units::*;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn brief(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { ttl: Some(SECOND * 20), grace: SECOND * 10, ..spec(name, gib) }
}

fn vllm(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { engine: EngineKind::Vllm, sleep: Some(1), ..spec(name, gib) }
}

/// Ready, and idle from now on.
fn used(sim: &mut Sim, model: &str) {
    let request = sim.request(model);
    sim.run_secs(10);
    assert_eq!(sim.served_by(request), Some(model));
    sim.end(request);
}

fn ready(models: Vec<ModelSpec>, model: &str) -> Sim {
    let mut sim = Sim::new(catalog(models), &[24]);
    used(&mut sim, model);
    sim
}

fn why(answer: Option<&Answer>) -> &str {
    match answer {
        Some(Answer::Declined { why } | Answer::WithoutTtl { why }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_in_the_grace_rescues_the_model_and_its_ttl_begins_anew() {
    let mut sim = ready(vec![brief("a", 20)], "a");
    sim.run_secs(25);
    assert_eq!(sim.state("a"), "ready", "its ttl is over, its grace is not");
    used(&mut sim, "a");
    sim.run_secs(29);
    assert_eq!((sim.state("a"), sim.starts("a")), ("ready", 1), "20 s and 10 s from the last use");
    sim.run_secs(3);
    assert_eq!(sim.state("a"), "stopped");
    let row = sim.ledger().pop().expect("a row");
    assert_eq!(row.cause, SwapCause::Ttl);
    assert!(row.decision.contains("grace"), "{}", row.decision);
}

#[test]
fn an_extension_is_added_to_what_is_left_and_ends_with_its_instance() {
    let mut sim = ready(vec![brief("a", 20)], "a");
    sim.run_secs(5);
    let ask = sim.extend("a", Some(MINUTE));
    let Some(Answer::Extended { left, bounded: false, .. }) = sim.answers.get(&ask) else {
        panic!("{:?}", sim.answers.get(&ask));
    };
    assert_eq!(*left, Duration::from_secs(75), "15 s were left");
    assert_eq!(sim.model("a").ttl_until, Some(sim.now + *left));
    sim.run_secs(84);
    assert_eq!(sim.state("a"), "ready");
    sim.run_secs(3);
    assert_eq!(sim.state("a"), "stopped");
    let told = sim.log.iter().filter_map(|(_, action)| {
        let Action::TtlExtended { until, .. } = action else { return None };
        Some(until.is_some())
    });
    assert_eq!(told.collect::<Vec<_>>(), [true, false]);
}

#[test]
fn an_extension_in_the_grace_rescues_and_bounds_are_kept() {
    let mut model = brief("a", 20);
    model.ttl_bounds = TtlBounds { min: Some(SECOND * 30), max: Some(SECOND * 40) };
    let mut sim = ready(vec![model], "a");
    sim.run_secs(25);
    let left = |sim: &mut Sim, by: u64| {
        let ask = sim.extend("a", Some(SECOND * u32::try_from(by).unwrap()));
        match sim.answers.get(&ask) {
            Some(Answer::Extended { left, bounded, .. }) => (left.as_secs(), *bounded),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(left(&mut sim, 5), (30, true), "at least ttl_bounds.min");
    assert_eq!(left(&mut sim, 5), (35, false));
    assert_eq!(left(&mut sim, 3600), (40, true), "at most ttl_bounds.max");
    assert_eq!(left(&mut sim, 1), (40, true), "and nothing is taken away");
}

#[test]
fn what_has_no_ttl_stays_in_any_case_and_what_is_not_loaded_cannot_be_extended() {
    let warm = ModelSpec { warmup: true, ..brief("warm", 2) };
    let mut sim = Sim::new(catalog(vec![brief("a", 4), spec("never", 4), warm]), &[24]);
    for model in ["never", "warm"] {
        used(&mut sim, model);
    }
    let ask = sim.extend("a", None);
    assert!(why(sim.answers.get(&ask)).contains("is not loaded"));
    for (model, words) in [("never", "has no ttl"), ("warm", "is a warm-up model")] {
        let ask = sim.extend(model, None);
        let Some(Answer::WithoutTtl { why }) = sim.answers.get(&ask) else {
            panic!("{model}: {:?}", sim.answers.get(&ask))
        };
        assert!(why.contains(words), "{model}: {why}");
    }
    let ask = sim.extend("nobody", None);
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Refused(Refusal::UnknownModel)));
}

#[test]
fn an_extension_of_an_earlier_run_holds_for_what_was_adopted() {
    let mut sim = Sim::new(catalog(vec![brief("a", 20)]), &[24]);
    sim.adopt(InstanceId(0), "a", Bytes::gib(20));
    let until = sim.now + MINUTE;
    sim.send(Event::TtlUntil { model: "a".into(), until });
    sim.run_secs(65);
    assert_eq!(sim.state("a"), "ready");
    sim.run_secs(10);
    assert_eq!(sim.state("a"), "stopped");
}

#[test]
fn a_pinned_model_is_not_evicted_and_its_waiters_hear_whose_pin_it_is() {
    let models = || vec![spec("a", 20), spec("b", 20)];
    let mut sim = ready(models(), "a");
    let ask = sim.pin("a", true);
    let shut_out = vec![ModelName::new("b")];
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Pinned { pinned: true, shut_out }));
    assert!(sim.model("a").pinned);
    sim.send(Event::CatalogChanged(Arc::new(catalog(models()))));
    let refused = sim.request("b");
    let Some(Refusal::CannotFit { pinned, .. }) = sim.refused.get(&refused) else {
        panic!("the pin outlives a reload: {:?}", sim.refused.get(&refused));
    };
    assert_eq!(pinned, &[ModelName::new("a")]);
    let ask = sim.pin("a", false);
    let none = Vec::new();
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Pinned { pinned: false, shut_out: none }));
    used(&mut sim, "b");
    assert_eq!(sim.state("a"), "stopped");
}

#[test]
fn who_waits_already_is_refused_when_a_pin_leaves_no_room() {
    let mut sim = ready(vec![spec("a", 20), spec("b", 20)], "a");
    let stream = sim.request("a");
    let waits = sim.ensure("b", EnsureKind::Load, MINUTE);
    sim.run_secs(1);
    assert_eq!(sim.state("a"), "draining");
    sim.pin("a", true);
    assert_eq!(sim.state("a"), "ready", "nothing had been stopped yet");
    let answer = sim.answers.get(&waits);
    assert!(matches!(answer, Some(Answer::Refused(Refusal::CannotFit { .. }))), "{answer:?}");
    sim.end(stream);
}

#[test]
fn a_pin_ends_the_ttl_and_an_unpinned_model_of_the_file_leaves() {
    let pinned = ModelSpec { pinned: true, ..brief("p", 4) };
    let mut sim = Sim::new(catalog(vec![brief("a", 4), pinned]), &[24]);
    used(&mut sim, "a");
    used(&mut sim, "p");
    sim.pin("a", true);
    sim.pin("p", false);
    sim.run_secs(40);
    assert_eq!((sim.state("a"), sim.state("p")), ("ready", "stopped"));
}

#[test]
fn sleep_drains_first_and_a_wake_brings_the_model_back() {
    let mut sim = ready(vec![vllm("a", 20)], "a");
    let stream = sim.request("a");
    let ask = sim.sleep("a");
    sim.run_secs(2);
    assert_eq!((sim.state("a"), sim.answers.get(&ask)), ("draining", None));
    sim.end(stream);
    sim.run_secs(3);
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Asleep { level: 1 }));
    assert_eq!(sim.state("a"), "sleeping");
    let row = sim.ledger().pop().expect("a row");
    assert_eq!((row.cause, row.outcome), (SwapCause::Sleep, Some(SwapOutcome::Asleep)));
    let again = sim.sleep("a");
    assert_eq!(sim.answers.get(&again), Some(&Answer::Asleep { level: 1 }));
    let wake = sim.ensure("a", EnsureKind::Wake, MINUTE);
    sim.run_secs(3);
    assert!(matches!(sim.answers.get(&wake), Some(Answer::Ready { swapped: true, .. })));
    assert_eq!((sim.state("a"), sim.starts("a")), ("ready", 1));
}

#[test]
fn a_request_wakes_what_an_operator_put_to_sleep() {
    let warm = ModelSpec { warmup: true, ..vllm("a", 20) };
    let mut sim = ready(vec![warm], "a");
    sim.sleep("a");
    sim.run_secs(60);
    assert_eq!(sim.state("a"), "sleeping", "a warm-up model too stays asleep until it is wanted");
    let request = sim.request("a");
    sim.run_secs(3);
    assert_eq!((sim.served_by(request), sim.starts("a")), (Some("a"), 1));
}

#[test]
fn sleep_and_wake_say_why_they_cannot_be_had() {
    let mut sim = Sim::new(catalog(vec![spec("a", 4), vllm("v", 4)]), &[24]);
    used(&mut sim, "a");
    let ask = sim.sleep("a");
    assert!(why(sim.answers.get(&ask)).contains("does not sleep"));
    let ask = sim.sleep("v");
    assert!(why(sim.answers.get(&ask)).contains("v is not loaded"));
    let ask = sim.ensure("v", EnsureKind::Wake, MINUTE);
    assert!(why(sim.answers.get(&ask)).contains("/models/v/load"));
    assert_eq!(sim.state("a"), "ready");
    let ask = sim.ensure("a", EnsureKind::Wake, MINUTE);
    assert!(matches!(sim.answers.get(&ask), Some(Answer::Ready { swapped: false, .. })));
    let mut blind = Sim::in_world(catalog(vec![vllm("v", 4)]), &[24], false);
    used(&mut blind, "v");
    let ask = blind.sleep("v");
    assert!(why(blind.answers.get(&ask)).contains("cannot be read"));
}

#[test]
fn an_open_window_loads_its_model_before_anybody_asks_and_keeps_it_from_its_ttl() {
    let mut sim = Sim::new(catalog(vec![brief("a", 20)]), &[24]);
    sim.keep("a", true);
    sim.run_secs(6);
    assert_eq!(sim.state("a"), "ready");
    let row = sim.ledger().pop().expect("a row");
    assert_eq!(row.cause, SwapCause::Keep);
    sim.run_secs(600);
    assert_eq!(sim.state("a"), "ready");
    let ask = sim.extend("a", None);
    assert!(why(sim.answers.get(&ask)).contains("kept by its schedule"));
    sim.keep("a", false);
    sim.run_secs(2);
    assert_eq!(sim.state("a"), "stopped", "unused since the morning, longer than its ttl");
}

#[test]
fn a_window_replaces_what_is_long_idle_and_nobody_else() {
    let mut sim = ready(vec![spec("a", 20), spec("b", 20)], "b");
    let stream = sim.request("b");
    sim.keep("a", true);
    sim.run_secs(60);
    assert_eq!(sim.state("b"), "ready", "it serves");
    sim.end(stream);
    sim.run_secs(15);
    assert_eq!(sim.state("b"), "ready", "it was used a moment ago");
    sim.run_secs(12);
    assert_eq!((sim.state("a"), sim.state("b")), ("ready", "stopped"));

    for spared in ["kept", "pinned"] {
        let mut sim = ready(vec![spec("a", 20), spec("b", 20)], "b");
        match spared {
            "kept" => sim.keep("b", true),
            _ => drop(sim.pin("b", true)),
        }
        sim.keep("a", true);
        sim.run_secs(120);
        assert_eq!((sim.state("a"), sim.state("b")), ("stopped", "ready"), "b is {spared}");
    }
}

#[test]
fn a_kept_model_makes_room_for_demand_and_comes_back() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    sim.keep("a", true);
    sim.run_secs(6);
    used(&mut sim, "b");
    assert_eq!(sim.state("a"), "stopped", "demand comes first");
    sim.run_secs(30);
    assert_eq!(sim.state("a"), "ready");
    sim.unload("a", false);
    sim.run_secs(120);
    assert_eq!(sim.state("a"), "stopped", "an operator's word counts until it is wanted again");
    sim.keep("a", false);
    sim.keep("a", true);
    sim.run_secs(6);
    assert_eq!(sim.state("a"), "ready", "the next window");
}

#[test]
fn a_window_that_closes_calls_its_preload_off() {
    let mut sim = ready(vec![spec("a", 20), spec("b", 20)], "b");
    sim.run_secs(30);
    sim.keep("a", true);
    sim.keep("a", false);
    sim.run_secs(10);
    assert_eq!((sim.state("a"), sim.state("b")), ("stopped", "ready"));
    assert_eq!(sim.starts("a"), 0);
}
