//! Deterministic simulation of the scheduler on a virtual clock.
//!
//! `cargo test --test sim` runs `WHARF_SIM_SEEDS` random scenarios (default: fewer in debug builds);
//! `cargo test --release --test sim` the full 10,000. `WHARF_SIM_SEED=123` replays one and prints
//! its trace.

mod checker;
mod clients;
mod disturb;
mod effects;
mod machine;
mod random;
mod rng;
mod runner;
mod scenario;
mod trace;
mod traps;
mod world;

use wharf::scheduler::Scheduler;

/// The scheduler's own assertions.
fn invariants(scheduler: &Scheduler) -> Result<(), String> {
    scheduler.check_invariants()
}
