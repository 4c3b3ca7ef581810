//! Deterministic simulation of the scheduler on a virtual clock.
//!
//! `cargo test --test sim` runs 200 random scenarios (and as many with groups), `cargo test --release --test sim` the full
//! 10,000; `WHARF_SIM_SEEDS` and `WHARF_SIM_FROM` choose others. `WHARF_SIM_SEED=123` replays one
//! and prints the end of its trace (`WHARF_SIM_TRACE=all`: the whole). Seeds that once found
//! something stand in `regressions.txt` and run first.
//!
//! `world` is the machine and the orchestrator as the scheduler's events and actions describe
//! them; `checker` is the reference: what callers must see, and what really happens to memory.
//! `traps` and `contention` are scripted situations in which other swappers starve, thrash or hang.

mod checker;
mod clients;
mod contention;
mod disturb;
mod effects;
mod groups;
mod host;
mod machine;
mod random;
mod rng;
mod runner;
mod scenario;
mod stay;
mod trace;
mod traps;
mod world;

use wharf::scheduler::Scheduler;

/// The scheduler's own assertions.
fn invariants(scheduler: &Scheduler) -> Result<(), String> {
    scheduler.check_invariants()
}
