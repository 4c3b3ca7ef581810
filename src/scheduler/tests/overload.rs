//! Who is refused at arrival, because those ahead take longer than it may wait.

use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::scheduler::action::Refusal;
use crate::units::*;

/// One place; requests of 2 s each; 20 s of patience.
struct Line {
    sim: Sim,
    waiting: Vec<RequestId>,
}

impl Line {
    fn new() -> Line {
        let mut one = spec("a", 20);
        one.concurrency = Some(1);
        let mut config = catalog(vec![one, spec("b", 20)]);
        config.settings.queue.timeout = Duration::from_secs(20);
        Line { sim: Sim::new(config, &[24]), waiting: Vec::new() }
    }

    fn ask(&mut self, priority: Priority) -> Option<&Refusal> {
        let request = self.sim.request_with("a", |r| r.priority = priority);
        self.waiting.push(request);
        self.sim.refused.get(&request)
    }

    /// Whoever holds the place has it for 2 s.
    fn serve_one(&mut self) -> RequestId {
        let served = *self.sim.granted.keys().next().expect("somebody is served");
        self.sim.run_secs(2);
        self.sim.end(served);
        served
    }

    /// Ten served, with always somebody else waiting.
    fn taught() -> Line {
        let mut line = Line::new();
        line.ask(Priority::Normal);
        line.sim.run_secs(5);
        for _ in 0..10 {
            line.ask(Priority::Normal);
            line.serve_one();
        }
        line
    }
}

#[test]
fn nobody_is_refused_before_something_was_learned() {
    let mut line = Line::new();
    for _ in 0..60 {
        assert_eq!(line.ask(Priority::Normal), None);
    }
    line.sim.run_secs(5);
    for _ in 0..3 {
        line.serve_one();
        assert_eq!(line.ask(Priority::Normal), None, "three are too few");
    }
}

#[test]
fn who_would_wait_in_vain_is_told_at_once_and_when_to_come_back() {
    let mut line = Line::taught();
    let mut admitted = 0;
    let refusal = loop {
        match line.ask(Priority::Normal).cloned() {
            None => admitted += 1,
            Some(refusal) => break refusal,
        }
        assert!(admitted < 50, "nobody is refused");
    };
    // 15 times 2 s are 1.5 times what it may wait.
    let Refusal::Overloaded { expected_ms, timeout_ms } = refusal else { panic!("{refusal:?}") };
    assert_eq!((expected_ms, timeout_ms, admitted), (30_000, 20_000, 15));
    assert_eq!(line.ask(Priority::High), None, "it goes ahead of those");
    line.serve_one();
    line.serve_one();
    assert_eq!(line.ask(Priority::Normal), None, "there is room in the line again");
}

#[test]
fn whoever_can_be_served_in_time_is_not_refused() {
    let mut line = Line::taught();
    let queue: Vec<RequestId> = (0..9)
        .map(|_| {
            assert_eq!(line.ask(Priority::Normal), None);
            *line.waiting.last().expect("just asked")
        })
        .collect();
    let mut served: Vec<RequestId> = (0..10).map(|_| line.serve_one()).collect();
    served.remove(0);
    assert_eq!(served, queue);
}

/// What runs for long while nobody waits is no sign of long requests.
#[test]
fn only_time_while_others_wait_is_counted() {
    let mut line = Line::taught();
    let served = *line.sim.granted.keys().next().expect("somebody is served");
    line.sim.end(served);
    line.ask(Priority::Normal);
    line.sim.run_secs(3600);
    for _ in 0..14 {
        assert_eq!(line.ask(Priority::Normal), None);
    }
}

/// Not by the model that another one keeps out, which nobody can tell the end of.
#[test]
fn an_unlimited_model_refuses_nobody_early() {
    let mut line = Line::taught();
    for _ in 0..100 {
        let request = line.sim.request("b");
        assert_eq!(line.sim.refused.get(&request), None);
    }
}
