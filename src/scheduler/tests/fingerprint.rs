//! What the digest of the state tells apart, and what it does not.

use std::time::Duration;

use super::config::*;
use super::world::*;

const GRAIN: Duration = Duration::from_millis(1);

fn two_models() -> Sim {
    Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24])
}

/// `a` is ready and in use, `b` waits: begun `after` a pause in which so many came in vain.
fn later(after: Duration, in_vain: u32) -> u64 {
    let mut sim = two_models();
    for _ in 0..in_vain {
        let request = sim.request_with("b", |r| r.never_start = true);
        assert!(sim.is_over(request));
    }
    sim.run_for(after);
    sim.request("a");
    sim.run_secs(6);
    sim.request("b");
    sim.run_secs(1);
    sim.scheduler.fingerprint(GRAIN)
}

#[test]
fn neither_the_hour_nor_ids_count() {
    assert_eq!(later(Duration::from_secs(1), 0), later(Duration::from_secs(3600), 3));
}

#[test]
fn who_waits_runs_or_ran_counts() {
    let mut sim = two_models();
    let mut seen = vec![sim.scheduler.fingerprint(GRAIN)];
    let mut note = |sim: &Sim, what: &str| {
        let now = sim.scheduler.fingerprint(GRAIN);
        assert!(!seen.contains(&now), "{what}");
        seen.push(now);
    };
    let request = sim.request("a");
    note(&sim, "a waits");
    sim.run_secs(5);
    note(&sim, "a is served");
    let other = sim.request("b");
    note(&sim, "b waits");
    sim.end(other);
    sim.end(request);
    note(&sim, "a is idle");
    sim.run_secs(1);
    note(&sim, "a is idle for longer");
}

#[test]
fn what_lies_below_the_grain_does_not_count() {
    let at = |ms| later(Duration::from_millis(ms), 0);
    assert_eq!(at(1000), at(1000));
    let mut sim = two_models();
    sim.request("a");
    sim.run_secs(6);
    let (fine, coarse) = (GRAIN, Duration::from_secs(60));
    let before = (sim.scheduler.fingerprint(fine), sim.scheduler.fingerprint(coarse));
    sim.run_secs(1);
    assert_ne!(sim.scheduler.fingerprint(fine), before.0);
    assert_eq!(sim.scheduler.fingerprint(coarse), before.1);
}
