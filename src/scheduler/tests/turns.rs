//! Whose turn it is: many before one, but nobody for ever, however much is asked of the rest.

use std::collections::BTreeMap;
use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::units::*;

fn three() -> Sim {
    three_started(Duration::from_secs(5), ["c", "b", "a"])
}

struct Open {
    request: RequestId,
    since: Time,
    /// Since when it runs.
    began: Option<Time>,
}

/// Clients that ask for their models faster than these can be served.
struct Crowd {
    sim: Sim,
    open: BTreeMap<&'static str, Vec<Open>>,
    longest: BTreeMap<&'static str, Duration>,
    served: u32,
}

/// How long a request of the crowd runs.
const SERVICE: Duration = Duration::from_secs(4);

impl Crowd {
    fn new() -> Crowd {
        let (open, longest) = (BTreeMap::new(), BTreeMap::new());
        Crowd { sim: three(), open, longest, served: 0 }
    }

    fn ask(&mut self, model: &'static str) -> RequestId {
        let request = self.sim.request(model);
        self.open.entry(model).or_default().push(Open {
            request,
            since: self.sim.now,
            began: None,
        });
        request
    }

    /// A second passes. Who was served for long enough ends.
    fn second(&mut self) {
        self.sim.run_secs(1);
        let now = self.sim.now;
        for (model, open) in &mut self.open {
            for one in open.iter_mut() {
                let serves = self.sim.granted.contains_key(&one.request);
                if serves || self.sim.is_over(one.request) {
                    one.began.get_or_insert(now);
                }
                let waited = one.began.unwrap_or(now).since(one.since);
                let longest = self.longest.entry(model).or_default();
                *longest = (*longest).max(waited);
            }
            let over = |one: &mut Open| one.began.is_some_and(|at| now.since(at) >= SERVICE);
            for one in open.extract_if(.., over) {
                self.sim.end(one.request);
                self.served += 1;
            }
        }
    }

    fn starts(&self) -> usize {
        ["a", "b", "c"].iter().map(|model| self.sim.starts(model)).sum()
    }
}

/// Half an hour in which each of three models is wanted all the time.
#[test]
fn under_overload_every_model_gets_its_turn_and_turns_stay_long() {
    let mut crowd = Crowd::new();
    let before = crowd.starts();
    for second in 0..1800 {
        for (model, every) in [("a", 1), ("b", 2), ("c", 15)] {
            if second % every == 0 {
                crowd.ask(model);
            }
        }
        crowd.second();
    }
    // max_wait, then everybody else's turn: a tenure of two starts, a drain, a move.
    let bound = Duration::from_secs(30 + 2 * (8 + 4 + 6));
    assert!(crowd.longest.values().all(|&waited| waited <= bound), "{:?}", crowd.longest);
    let starts = crowd.starts() - before;
    assert!(starts <= 1800 / 15, "{starts} starts in half an hour: nothing else is done");
    assert!(crowd.served >= 2700, "{} of {} were served", crowd.served, 1800 + 900 + 120);
}

#[test]
fn many_go_before_one_who_came_first() {
    let mut sim = three();
    let busy = sim.request("a");
    let one = sim.request("c");
    sim.run_secs(1);
    let many: Vec<RequestId> = (0..8).map(|_| sim.request("b")).collect();
    sim.run_secs(4);
    sim.end(busy);
    sim.run_secs(8);
    assert_eq!(sim.served_by(many[0]), Some("b"));
    for request in many {
        sim.end(request);
    }
    sim.run_secs(8);
    assert_eq!(sim.served_by(one), Some("c"));
}

/// Each of two models is always wanted by more, and would have the larger score for ever.
#[test]
fn one_among_many_is_served_once_its_claim_falls_due() {
    let mut crowd = Crowd::new();
    for _ in 0..60 {
        crowd.ask("a");
        crowd.ask("b");
        crowd.second();
    }
    let lonely = crowd.ask("c");
    for waited in 0.. {
        // Its max_wait; one turn of each, as both may be overdue before it; its own move.
        assert!(waited <= 30 + 2 * (8 + 4 + 6) + 6, "{:?}", crowd.longest);
        if crowd.sim.served_by(lonely).is_some() {
            assert!(waited >= 10, "the others had more to say: {waited} s");
            break;
        }
        for _ in 0..4 {
            crowd.ask("a");
            crowd.ask("b");
        }
        crowd.second();
    }
}

/// What was due once is paid: the next who waits begins anew.
#[test]
fn a_claim_ends_when_its_model_serves() {
    let mut sim = three();
    let wait = |sim: &mut Sim, seconds: u32| {
        let keeps = sim.request("a");
        sim.run_secs(15);
        let more: Vec<RequestId> = (0..9).map(|_| sim.request("a")).collect();
        let waits = sim.request("b");
        for _ in 0..seconds {
            assert_eq!(sim.state("a"), "ready", "no notice before it is due");
            sim.run_secs(1);
        }
        sim.run_secs(3);
        assert_eq!(sim.state("a"), "draining");
        sim.end(keeps);
        more.into_iter().for_each(|request| sim.end(request));
        sim.run_secs(10);
        assert_eq!(sim.served_by(waits), Some("b"));
        sim.end(waits);
    };
    wait(&mut sim, 29);
    wait(&mut sim, 29);
}

#[test]
fn a_model_under_notice_stays_when_another_became_idle() {
    let mut sim = Sim::new(catalog(vec![spec("a", 11), spec("b", 11), spec("c", 11)]), &[24]);
    let busy = ["a", "b"].map(|model| sim.request(model));
    sim.run_secs(10);
    let waits = sim.request("c");
    sim.run_secs(31);
    let leaves = ["a", "b"].iter().position(|model| sim.state(model) == "draining");
    let leaves = leaves.expect("notice is due after 30 s");
    sim.end(busy[1 - leaves]);
    sim.run_secs(1);
    assert_eq!(sim.state(["a", "b"][leaves]), "ready");
    sim.run_secs(6);
    assert_eq!(sim.served_by(waits), Some("c"));
    assert_eq!(sim.served_by(busy[leaves]), Some(["a", "b"][leaves]), "undisturbed");
}
