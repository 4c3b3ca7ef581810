//! What a priority class buys, and what it cannot take from the others.

use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::scheduler::event::EnsureKind;
use crate::scheduler::record::SwapOutcome;
use crate::units::*;

fn three() -> Sim {
    three_started(Duration::from_secs(1), ["a", "b", "c"])
}

fn ask(sim: &mut Sim, model: &str, priority: Priority) -> RequestId {
    sim.request_with(model, |r| r.priority = priority)
}

/// Why starts were called off, in order.
fn called_off(sim: &Sim) -> Vec<String> {
    let why = |row: crate::scheduler::record::SwapRecord| match row.outcome {
        Some(SwapOutcome::Cancelled { why }) => Some(format!("{}: {why}", row.model)),
        _ => None,
    };
    sim.ledger().into_iter().filter_map(why).collect()
}

/// Until the start of the model was emitted.
fn until_it_starts(sim: &mut Sim, model: &str) {
    let before = sim.starts(model);
    for _ in 0..1000 {
        if sim.starts(model) > before {
            return;
        }
        sim.run_for(Duration::from_millis(10));
    }
    panic!("{model} does not start");
}

#[test]
fn a_higher_class_calls_off_a_start_that_has_just_begun() {
    let mut sim = three();
    let low = ask(&mut sim, "a", Priority::Low);
    until_it_starts(&mut sim, "a");
    sim.run_for(Duration::from_millis(800));
    let high = ask(&mut sim, "b", Priority::High);
    assert_eq!(called_off(&sim), ["a: b (high) waits, and this start was 20 % done"]);
    sim.run_secs(6);
    assert_eq!(sim.served_by(high), Some("b"), "without waiting for the start of a");
    let row = sim.ledger().into_iter().rfind(|row| row.model.as_str() == "b").expect("a row");
    let instead = "instead of a, whose start was 20 % done";
    assert!(row.decision.contains(instead), "{}", row.decision);
    assert!(sim.model("a").queue.contains(&low), "who waited for it waits on");
    sim.end(high);
    sim.run_secs(10);
    assert_eq!(sim.served_by(low), Some("a"));
}

#[test]
fn a_start_that_is_half_done_goes_on() {
    let mut sim = three();
    let low = ask(&mut sim, "a", Priority::Low);
    until_it_starts(&mut sim, "a");
    sim.run_for(Duration::from_millis(2100));
    ask(&mut sim, "b", Priority::High);
    sim.run_secs(2);
    assert_eq!(called_off(&sim), Vec::<String>::new());
    assert_eq!(sim.served_by(low), Some("a"));
}

#[test]
fn an_equal_class_and_an_unknown_start_call_nothing_off() {
    let mut sim = three();
    ask(&mut sim, "a", Priority::High);
    until_it_starts(&mut sim, "a");
    ask(&mut sim, "b", Priority::High);
    sim.run_secs(1);
    assert_eq!(called_off(&sim), Vec::<String>::new());

    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    ask(&mut sim, "a", Priority::Low);
    until_it_starts(&mut sim, "a");
    ask(&mut sim, "b", Priority::High);
    sim.run_secs(1);
    assert_eq!(called_off(&sim), Vec::<String>::new(), "nobody knows how far it is");
}

#[test]
fn who_waited_when_a_start_was_decided_does_not_call_it_off() {
    let mut sim = three();
    let busy = sim.request("c");
    let wait = |r: &mut crate::scheduler::event::Request| {
        (r.priority, r.max_wait) = (Priority::Low, Some(Duration::from_secs(3600)));
    };
    let low: Vec<RequestId> = (0..40).map(|_| sim.request_with("a", wait)).collect();
    sim.run_secs(3);
    ask(&mut sim, "b", Priority::High);
    sim.end(busy);
    until_it_starts(&mut sim, "a");
    sim.run_secs(1);
    assert_eq!(called_off(&sim), Vec::<String>::new());
    sim.run_secs(4);
    assert_eq!(sim.served_by(low[0]), Some("a"));
}

#[test]
fn nothing_is_called_off_where_there_is_another_way() {
    let mut config = catalog(vec![spec("a", 10), spec("b", 10), spec("c", 10), spec("d", 10)]);
    config.settings.swap.min_residency = Duration::from_secs(1);
    let mut sim = Sim::new(config, &[24]);
    for model in ["a", "b", "c", "d"] {
        let request = sim.request(model);
        sim.run_secs(10);
        sim.end(request);
    }
    ask(&mut sim, "a", Priority::Low);
    until_it_starts(&mut sim, "a");
    let high = ask(&mut sim, "b", Priority::High);
    sim.run_secs(12);
    assert_eq!(called_off(&sim), Vec::<String>::new(), "one that is idle leaves");
    assert_eq!(sim.served_by(high), Some("b"));
}

#[test]
fn what_an_ensure_began_is_not_called_off() {
    let mut sim = three();
    sim.ensure("a", EnsureKind::Ensure, Duration::from_secs(60));
    until_it_starts(&mut sim, "a");
    ask(&mut sim, "b", Priority::High);
    sim.run_secs(1);
    assert_eq!(called_off(&sim), Vec::<String>::new());
}

#[test]
fn an_overdue_start_is_not_called_off() {
    let mut sim = three();
    let wait = |r: &mut crate::scheduler::event::Request| {
        (r.priority, r.max_wait) = (Priority::Low, Some(Duration::from_millis(500)));
    };
    let low = sim.request_with("a", wait);
    until_it_starts(&mut sim, "a");
    ask(&mut sim, "b", Priority::High);
    sim.run_secs(5);
    assert_eq!(called_off(&sim), Vec::<String>::new());
    assert_eq!(sim.served_by(low), Some("a"));
}

#[test]
fn room_that_was_made_goes_to_the_higher_class() {
    let mut sim = three();
    ask(&mut sim, "a", Priority::Low);
    sim.run_for(Duration::from_millis(300));
    assert_eq!(sim.state("c"), "stopping", "it leaves for a");
    let starts = sim.starts("a");
    let high = ask(&mut sim, "b", Priority::High);
    sim.run_secs(6);
    assert_eq!(sim.served_by(high), Some("b"));
    assert_eq!(sim.starts("a"), starts);
    assert_eq!(called_off(&sim), ["a: b (high) waits, and this start had not begun"]);
}

/// b and c are asked for in turns, each as soon as the other was served, and that for ever.
#[test]
fn a_stream_of_urgent_requests_calls_a_start_off_once_and_delays_it_within_its_bound() {
    let mut sim = three();
    let began = sim.now;
    let low = ask(&mut sim, "a", Priority::Low);
    until_it_starts(&mut sim, "a");
    let mut urgent = ask(&mut sim, "b", Priority::High);
    let mut turn = 0;
    // max_wait, what began before it fell due (a move, a tenure of two starts), drain and move.
    let bound = Duration::from_secs(30 + 6 + 9 + 6);
    while sim.served_by(low).is_none() {
        assert!(sim.now.since(began) <= bound, "{:?}", called_off(&sim));
        sim.run_for(Duration::from_millis(100));
        if sim.served_by(urgent).is_some() {
            turn += 1;
            let next = ask(&mut sim, ["c", "b"][turn % 2], Priority::High);
            sim.run_secs(1);
            sim.end(urgent);
            urgent = next;
        }
    }
    assert!(turn > 1, "others were served meanwhile");
    assert_eq!(called_off(&sim).len(), 1, "{:?}", called_off(&sim));
}

/// One place, always taken by a request of the highest class.
#[test]
fn the_lowest_class_of_a_queue_is_bounded_against_an_endless_stream_of_the_highest() {
    let mut one = spec("a", 20);
    one.concurrency = Some(1);
    let mut sim = Sim::new(catalog(vec![one]), &[24]);
    let mut running = ask(&mut sim, "a", Priority::High);
    sim.run_secs(5);
    let began = sim.now;
    let low = ask(&mut sim, "a", Priority::Low);
    // Two head starts of 30 s, and the queue of that time.
    while sim.served_by(low).is_none() {
        assert!(sim.now.since(began) <= Duration::from_secs(65));
        let next = ask(&mut sim, "a", Priority::High);
        sim.run_secs(1);
        sim.end(running);
        running = next;
    }
    assert!(sim.now.since(began) >= Duration::from_secs(60), "the head start is what it says");
}

/// Requests of the highest class keep another model busy for ever.
#[test]
fn the_lowest_class_gets_its_turn_while_the_highest_keeps_another_model_busy() {
    let mut sim = three();
    let mut open = vec![ask(&mut sim, "b", Priority::High)];
    sim.run_secs(12);
    let began = sim.now;
    let low = ask(&mut sim, "a", Priority::Low);
    while sim.served_by(low).is_none() {
        assert!(sim.now.since(began) <= Duration::from_secs(30 + 2 + 6), "max_wait, drain, move");
        open.push(ask(&mut sim, "b", Priority::High));
        sim.run_secs(1);
        if open.len() > 2 {
            sim.end(open.remove(0));
        }
        let drained = sim.state("b") == "draining";
        while drained && let Some(at) = open.iter().position(|r| sim.granted.contains_key(r)) {
            let request = open.remove(at);
            sim.end(request);
        }
    }
}
