//! Who waits, for how long, and who is refused.

use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::scheduler::action::{Action, Refusal};
use crate::scheduler::event::{Event, Request};
use crate::scheduler::record::SwapOutcome;
use crate::units::*;

#[test]
fn a_busy_model_gets_notice_when_a_waiter_is_overdue() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(5);
    let waiting = sim.request("b");
    // A stream of requests to `a`, never idle: without a bound `b` would wait for ever.
    let mut open = vec![stream];
    for _ in 0..29 {
        open.push(sim.request("a"));
        sim.run_secs(1);
        sim.end(open.remove(0));
    }
    assert_eq!(sim.state("a"), "ready", "notice is due after 30 s, not before");
    sim.run_secs(2);
    assert_eq!(sim.state("a"), "draining");
    let late = sim.request("a");
    assert!(!sim.granted.contains_key(&late), "after notice it takes nobody new");
    for request in open {
        sim.end(request);
    }
    sim.run_secs(6);
    assert_eq!(sim.served_by(waiting), Some("b"));
    sim.end(waiting);
    sim.run_secs(10);
    assert_eq!(sim.served_by(late), Some("a"), "those left behind lead the next tenure");
}

#[test]
fn a_drain_that_takes_too_long_cancels_leases() {
    let mut config = catalog(vec![spec("a", 20), spec("b", 20)]);
    config.settings.swap.drain_timeout = Duration::from_secs(20);
    let mut sim = Sim::new(config, &[24]);
    sim.request("a");
    sim.run_secs(5);
    let waiting = sim.request("b");
    sim.run_secs(49);
    assert_eq!(sim.count(|a| matches!(a, Action::CancelLeases { .. })), 0);
    sim.run_secs(10);
    assert_eq!(sim.count(|a| matches!(a, Action::CancelLeases { .. })), 1);
    assert_eq!(sim.served_by(waiting), Some("b"));
}

#[test]
fn a_victim_that_is_used_while_its_gate_closes_stays() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.finish(first);
    let waiting = sim.request("b");
    // The scheduler has not heard of this lease when it closes the gate.
    sim.sneaks = 1;
    sim.run_secs(2);
    assert_eq!((sim.sneaks, sim.state("a")), (0, "ready"), "let go again");
    assert_eq!(sim.count(|a| matches!(a, Action::StopInstance { .. })), 0);
    let unheard = *sim.granted.keys().next_back().expect("the lease that sneaked in");
    sim.end(unheard);
    sim.run_secs(8);
    assert_eq!(sim.served_by(waiting), Some("b"));
}

#[test]
fn places_are_limited_and_the_rest_queue() {
    let mut small = spec("a", 20);
    small.concurrency = Some(2);
    let mut sim = Sim::new(catalog(vec![small]), &[24]);
    let requests: Vec<RequestId> = (0..5).map(|_| sim.request("a")).collect();
    sim.run_secs(5);
    assert_eq!(sim.granted.len(), 2);
    assert_eq!(sim.model("a").waiting_for, "a place: 2 of 2 in use");
    for request in requests {
        assert!(sim.granted.len() <= 2);
        sim.end(request);
    }
    assert_eq!(sim.scheduler.view(sim.now).queued, 0);
    assert_eq!(sim.running.values().filter(|r| r.open).count(), 1, "nobody waits: gate open");
}

#[test]
fn urgent_requests_go_first_but_starve_nobody() {
    let mut one = spec("a", 20);
    one.concurrency = Some(1);
    let mut sim = Sim::new(catalog(vec![one]), &[24]);
    let running = sim.request("a");
    sim.run_secs(5);
    let normal = sim.request("a");
    sim.run_secs(31);
    let urgent_too_late = sim.request_with("a", |r| r.priority = Priority::High);
    let patient = sim.request("a");
    assert_eq!(sim.model("a").queue, vec![normal, urgent_too_late, patient]);
    sim.end(running);
    assert!(sim.granted.contains_key(&normal));
}

#[test]
fn the_queue_is_bounded_and_time_limited() {
    let mut config = catalog(vec![spec("a", 20)]);
    config.settings.queue.per_model = 2;
    config.settings.queue.timeout = Duration::from_secs(3);
    let mut sim = Sim::new(config, &[24]);
    let (first, _second, third) = (sim.request("a"), sim.request("a"), sim.request("a"));
    assert_eq!(sim.refused.get(&third), Some(&Refusal::QueueFull { limit: 2, per_model: true }));
    sim.run_for(Duration::from_millis(3100));
    match sim.refused.get(&first) {
        Some(Refusal::QueueTimeout { waited_ms, waiting_for }) => {
            assert_eq!((*waited_ms, waiting_for.as_str()), (3000, "start"));
        }
        other => panic!("{other:?}"),
    }
    sim.run_secs(3);
    assert_eq!(sim.state("a"), "ready", "a start past its decision completes");
}

#[test]
fn who_waits_behind_one_that_gave_up_is_served() {
    let mut config = catalog(vec![spec("a", 20)]);
    config.settings.queue.timeout = Duration::from_secs(3);
    let mut sim = Sim::new(config, &[24]);
    let first = sim.request("a");
    sim.run_secs(2);
    let second = sim.request("a");
    sim.run_for(Duration::from_millis(1500));
    assert!(matches!(sim.refused.get(&first), Some(Refusal::QueueTimeout { .. })));
    assert_eq!(sim.model("a").queue, vec![second]);
    sim.run_secs(1);
    assert_eq!(sim.served_by(second), Some("a"));
}

/// Nothing happens on the machine, no memory is read: the scheduler asked to be woken.
#[test]
fn a_drain_deadline_wakes_the_scheduler_by_itself() {
    let mut config = catalog(vec![spec("a", 20), spec("b", 20)]);
    config.settings.swap.drain_timeout = Duration::from_secs(20);
    let mut sim = Sim::new(config, &[24]);
    sim.request("a");
    sim.run_secs(5);
    sim.request("b");
    sim.run_secs(31);
    assert_eq!(sim.state("a"), "draining");
    sim.sample_every = Duration::from_secs(3600);
    sim.run_secs(25);
    assert_eq!(sim.count(|a| matches!(a, Action::CancelLeases { .. })), 1);
}

#[test]
fn a_swap_that_nobody_waits_for_is_called_off_before_it_stops_anyone() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let stream = sim.request("a");
    sim.run_secs(5);
    let waiting = sim.request("b");
    sim.run_secs(32);
    assert_eq!(sim.state("a"), "draining");
    assert!(sim.model("b").waiting_for.starts_with("draining a (1 request), then start"));
    sim.end(waiting);
    sim.run_secs(1);
    assert_eq!((sim.state("a"), sim.state("b")), ("ready", "stopped"));
    assert_eq!(sim.served_by(stream), Some("a"));
    let row = sim.ledger().pop().expect("a row");
    assert!(matches!(row.outcome, Some(SwapOutcome::Cancelled { .. })));
}

#[test]
fn never_start_serves_if_ready_and_changes_nothing() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let probe = sim.request_with("a", |r| r.never_start = true);
    assert_eq!(sim.refused.get(&probe), Some(&Refusal::NotLoaded));
    assert_eq!(sim.state("a"), "stopped");
    let unknown = sim.request("zzz");
    assert_eq!(sim.refused.get(&unknown), Some(&Refusal::UnknownModel));
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut pinned = spec("speech", 4);
    pinned.pinned = true;
    let mut sim = Sim::new(catalog(vec![pinned, spec("big", 40), spec("tight", 22)]), &[24]);
    for model in ["big", "tight"] {
        let request = sim.request(model);
        assert!(matches!(sim.refused.get(&request), Some(Refusal::CannotFit { .. })), "{model}");
    }
    let speech = sim.request("speech");
    sim.run_secs(5);
    assert_eq!(sim.served_by(speech), Some("speech"));
}

#[test]
fn pinned_models_are_never_evicted() {
    let mut pinned = spec("speech", 4);
    pinned.pinned = true;
    let mut sim = Sim::new(catalog(vec![pinned, spec("a", 18), spec("b", 18)]), &[24]);
    for model in ["speech", "a", "b", "a"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
    assert_eq!((sim.starts("speech"), sim.starts("a")), (1, 2));
}

#[test]
fn the_cheapest_idle_model_leaves() {
    let mut precious = spec("precious", 10);
    precious.priority = Priority::High;
    let models = vec![precious, spec("plain", 10), spec("new", 10)];
    let mut sim = Sim::new(catalog(models), &[24]);
    for model in ["precious", "plain"] {
        let request = sim.request(model);
        sim.run_secs(5);
        sim.end(request);
    }
    sim.request("new");
    sim.run_secs(10);
    assert_eq!((sim.state("precious"), sim.state("plain")), ("ready", "stopped"));
    let row = sim.ledger().pop().expect("a row");
    assert!(row.evicted[0].why.contains("cheapest to bring back"), "{}", row.evicted[0].why);
    assert!(row.evicted[0].why.contains("frees 10.0 GiB"), "{}", row.evicted[0].why);
}

#[test]
fn a_place_is_given_away_only_once_the_gate_is_closed_and_read() {
    let mut single = spec("a", 20);
    single.concurrency = Some(1);
    let mut sim = Sim::new(catalog(vec![single]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.end(first);
    // It found no place; meanwhile one came free, which another takes at the gate itself.
    let late = RequestId(1_000_000);
    sim.sneaks = 1;
    sim.send(Event::RequestArrived(Request {
        id: late,
        model: "a".into(),
        priority: Priority::Normal,
        max_wait: None,
        may_hurry: false,
        never_start: false,
        attempt: 1,
        arrived: sim.now,
    }));
    assert_eq!((sim.sneaks, sim.granted.contains_key(&late)), (0, false));
    let unheard = *sim.granted.keys().next().expect("the lease that sneaked in");
    sim.end(unheard);
    assert!(sim.granted.contains_key(&late));
}

#[test]
fn nothing_begins_where_an_overdue_request_waits() {
    let mut config = catalog(vec![spec("a", 10), spec("big", 20), spec("small", 8)]);
    config.settings.swap.min_residency = Duration::from_secs(60);
    config.settings.swap.max_wait = Some(Duration::from_secs(20));
    let mut sim = Sim::new(config, &[24]);
    let busy = sim.request("a");
    sim.run_secs(5);
    let big = sim.request("big");
    sim.run_secs(25);
    // It would fit beside `a`, and its tenure would be one more that `big` has to wait for.
    let small = sim.request("small");
    sim.run_secs(20);
    assert_eq!((sim.state("a"), sim.starts("small")), ("ready", 0));
    sim.run_secs(20);
    sim.end(busy);
    sim.run_secs(8);
    assert_eq!(sim.served_by(big), Some("big"));
    sim.end(big);
    sim.run_secs(80);
    assert_eq!(sim.served_by(small), Some("small"));
}

#[test]
fn who_comes_later_does_not_make_the_first_less_overdue() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    for _ in 0..20 {
        sim.request("a");
    }
    sim.run_secs(5);
    sim.request("b");
    for _ in 0..3 {
        sim.run_secs(9);
        sim.request("b");
    }
    assert_eq!(sim.state("a"), "ready", "four waiting do not outweigh twenty running");
    sim.run_secs(4);
    assert_eq!(sim.state("a"), "draining", "the first has waited for 31 s");
}

#[test]
fn a_pinned_model_stays_though_it_would_be_the_cheapest_to_bring_back() {
    let mut pinned = spec("pinned", 10);
    (pinned.pinned, pinned.priority) = (true, Priority::Low);
    let mut sim = Sim::new(catalog(vec![pinned, spec("plain", 10), spec("new", 10)]), &[24]);
    for model in ["pinned", "plain", "new"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
    assert_eq!((sim.state("pinned"), sim.state("plain")), ("ready", "stopped"));
}
