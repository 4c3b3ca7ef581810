//! Models that come together, take turns, are alone, or stay.

use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::{Catalog, Group};
use crate::scheduler::action::{Action, Answer, Refusal};
use crate::scheduler::event::{EnsureKind, Event};
use crate::scheduler::record::SwapCause;

fn group(models: &[&str]) -> Group {
    let models = models.iter().map(|&name| name.into()).collect();
    Group { models, together: false, exclusive: false, persistent: false }
}

fn together(models: &[&str]) -> Group {
    Group { together: true, ..group(models) }
}

fn with(mut catalog: Catalog, groups: &[(&str, Group)]) -> Catalog {
    catalog.groups = groups.iter().map(|(name, g)| ((*name).to_owned(), g.clone())).collect();
    catalog
}

fn company(sim: &mut Sim, group: &str) {
    sim.send(Event::CompanyAsked { group: group.to_owned() });
}

#[test]
fn one_of_a_group_brings_the_others_along() {
    let models = vec![spec("a", 8), spec("b", 8), spec("c", 8)];
    let mut sim = Sim::new(with(catalog(models), &[("g", together(&["a", "b"]))]), &[24]);
    let first = sim.request("a");
    sim.run_secs(10);
    assert_eq!(sim.served_by(first), Some("a"));
    assert_eq!((sim.state("b"), sim.state("c")), ("ready", "stopped"));
    let by_group = sim.count(|a| matches!(a, Action::Record(r) if r.cause == SwapCause::Group));
    assert!(by_group > 0, "the ledger tells why");
}

#[test]
fn company_takes_the_room_of_the_idle_only() {
    let models = vec![spec("a", 8), spec("b", 8), spec("busy", 6), spec("idle", 6)];
    let mut sim = Sim::new(with(catalog(models), &[("g", together(&["a", "b"]))]), &[24]);
    let stream = sim.request("busy");
    let other = sim.request("idle");
    sim.run_secs(10);
    sim.end(other);
    sim.run_secs(60);
    sim.request("a");
    sim.run_secs(20);
    assert_eq!((sim.state("a"), sim.state("b")), ("ready", "ready"));
    assert_eq!((sim.state("idle"), sim.state("busy")), ("stopped", "ready"));
    sim.end(stream);
}

#[test]
fn members_that_do_not_fit_do_not_evict_one_another() {
    let models = vec![spec("a", 14), spec("b", 14)];
    let mut sim = Sim::new(with(catalog(models), &[("g", together(&["a", "b"]))]), &[24]);
    let first = sim.request("a");
    sim.run_secs(10);
    sim.end(first);
    sim.run_secs(300);
    assert_eq!((sim.state("a"), sim.state("b")), ("ready", "stopped"));
    let second = sim.request("b");
    sim.run_secs(60);
    assert_eq!(sim.served_by(second), Some("b"), "who is asked for gets in all the same");
}

#[test]
fn with_several_groups_the_named_one_comes() {
    let models = vec![spec("a", 6), spec("b", 6), spec("c", 6)];
    let groups = [("one", together(&["a", "b"])), ("two", together(&["a", "c"]))];
    let mut sim = Sim::new(with(catalog(models), &groups), &[24]);
    sim.request("a");
    sim.run_secs(10);
    assert_eq!((sim.state("b"), sim.state("c")), ("stopped", "stopped"));
    company(&mut sim, "two");
    sim.run_secs(10);
    assert_eq!((sim.state("b"), sim.state("c")), ("stopped", "ready"));
}

#[test]
fn company_for_nobody_is_not_loaded() {
    let groups = [("g", together(&["a", "b"]))];
    let mut sim = Sim::new(with(catalog(vec![spec("a", 6), spec("b", 6)]), &groups), &[24]);
    company(&mut sim, "g");
    sim.run_secs(60);
    assert_eq!((sim.state("a"), sim.state("b")), ("stopped", "stopped"));
}

#[test]
fn company_that_cannot_start_is_not_tried_again() {
    let groups = [("g", together(&["a", "b"]))];
    let mut sim = Sim::new(with(catalog(vec![spec("a", 6), spec("b", 6)]), &groups), &[24]);
    let faults = vec![crate::scheduler::event::FaultKind::Exited; 9];
    sim.faults.start.insert("b".into(), faults.into());
    sim.request("a");
    sim.run_secs(3600);
    let starts =
        sim.count(|a| matches!(a, Action::StartInstance { model, .. } if model.as_str() == "b"));
    assert_eq!((starts, sim.state("a")), (1, "ready"));
}

#[test]
fn an_unload_takes_along_the_members_that_nobody_uses() {
    let models = vec![spec("a", 6), spec("b", 6), spec("c", 6)];
    let mut sim = Sim::new(with(catalog(models), &[("g", together(&["a", "b", "c"]))]), &[24]);
    let first = sim.request("a");
    sim.run_secs(20);
    sim.end(first);
    let used = sim.request("b");
    let ask = sim.unload("a", false);
    sim.run_secs(20);
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Unloaded { was_loaded: true }));
    assert_eq!((sim.state("a"), sim.state("b"), sim.state("c")), ("stopped", "ready", "stopped"));
    sim.end(used);
    sim.run_secs(300);
    assert_eq!(sim.state("a"), "stopped", "nobody asks: it stays away");
}

#[test]
fn the_ttl_of_a_group_counts_from_the_last_use_of_any() {
    let short = |name: &str| {
        let mut spec = spec(name, 6);
        spec.ttl = Some(Duration::from_secs(30));
        spec
    };
    let groups = [("g", together(&["a", "b"]))];
    let mut sim = Sim::new(with(catalog(vec![short("a"), short("b")]), &groups), &[24]);
    let first = sim.request("a");
    sim.run_secs(10);
    sim.end(first);
    for _ in 0..6 {
        let again = sim.request("b");
        sim.run_secs(15);
        sim.end(again);
    }
    assert_eq!(sim.state("a"), "ready", "unused for 90 s, but its group is not");
    sim.run_secs(40);
    assert_eq!((sim.state("a"), sim.state("b")), ("stopped", "stopped"));
}

#[test]
fn members_of_other_groups_take_turns() {
    let mut sim = Sim::new(
        with(catalog(vec![spec("a", 4), spec("b", 4)]), &[("g", group(&["a", "b"]))]),
        &[24, 24],
    );
    let stream = sim.request("a");
    sim.run_secs(10);
    let waiting = sim.request("b");
    sim.run_secs(10);
    assert_eq!(sim.state("b"), "stopped", "there is room, but it is not its turn");
    assert!(sim.model("b").waiting_for.contains('a'), "{}", sim.model("b").waiting_for);
    sim.run_secs(40);
    sim.end(stream);
    sim.run_secs(10);
    assert_eq!((sim.served_by(waiting), sim.state("a")), (Some("b"), "stopped"));
}

#[test]
fn an_exclusive_group_gets_its_turn_while_others_keep_coming() {
    let models = vec![spec("big", 4), spec("x", 4), spec("y", 4)];
    let alone = Group { exclusive: true, ..group(&["big"]) };
    let mut sim = Sim::new(with(catalog(models), &[("alone", alone)]), &[24, 24]);
    let mut x = sim.request("x");
    let mut y = sim.request("y");
    sim.run_secs(10);
    let waiting = sim.request("big");
    // Neither is ever idle, and whoever left would come back at once.
    for _ in 0..60 {
        let (next_x, next_y) = (sim.request("x"), sim.request("y"));
        sim.run_secs(1);
        sim.end(std::mem::replace(&mut x, next_x));
        sim.end(std::mem::replace(&mut y, next_y));
    }
    assert_eq!(sim.served_by(waiting), Some("big"));
    let beside = sim.running.values().filter(|r| r.model.as_str() != "big").count();
    assert_eq!(beside, 0, "alone");
    sim.end(waiting);
    sim.run_secs(60);
    assert!(sim.granted.contains_key(&x) && sim.granted.contains_key(&y), "and then they return");
}

#[test]
fn a_persistent_group_stays_for_others_but_not_for_the_operator() {
    let models = vec![spec("keeps", 16), spec("big", 16)];
    let lasting = Group { persistent: true, ..group(&["keeps"]) };
    let mut sim = Sim::new(with(catalog(models), &[("lasting", lasting)]), &[24]);
    let first = sim.request("keeps");
    sim.run_secs(10);
    sim.end(first);
    sim.run_secs(60);
    let refused = sim.request("big");
    assert!(matches!(sim.refused.get(&refused), Some(Refusal::CannotFit { .. })));
    sim.unload("keeps", false);
    sim.run_secs(10);
    let served = sim.request("big");
    sim.run_secs(10);
    assert_eq!(sim.served_by(served), Some("big"));
}

#[test]
fn what_a_pinned_member_keeps_away_is_refused_by_name() {
    let mut pinned = spec("pinned", 4);
    pinned.pinned = true;
    let turns = group(&["pinned", "other"]);
    let mut sim = Sim::new(with(catalog(vec![pinned, spec("other", 4)]), &[("g", turns)]), &[24]);
    sim.request("pinned");
    sim.run_secs(10);
    let refused = sim.request("other");
    let expected = Refusal::KeptApart { group: "g".to_owned(), by: "pinned".into() };
    assert_eq!(sim.refused.get(&refused), Some(&expected));
}

#[test]
fn ensures_of_a_whole_group_are_all_answered() {
    let models = vec![spec("a", 10), spec("b", 10), spec("c", 20)];
    let mut sim = Sim::new(with(catalog(models), &[("g", together(&["a", "b"]))]), &[24]);
    let idle = sim.request("c");
    sim.run_secs(10);
    sim.end(idle);
    let asks = ["a", "b"].map(|name| sim.ensure(name, EnsureKind::Ensure, Duration::from_secs(60)));
    sim.run_secs(30);
    for ask in asks {
        assert!(matches!(sim.answers.get(&ask), Some(Answer::Ready { .. })));
    }
    assert_eq!((sim.state("a"), sim.state("b"), sim.state("c")), ("ready", "ready", "stopped"));
}
