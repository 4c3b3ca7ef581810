//! Every order of events in a small world: two GPUs, three models, a few requests.
//!
//! The real scheduler is led through all interleavings of six kinds of external events (a request
//! arrives, a request ends, a client leaves, a move completes, a move fails, the clock reaches
//! what the scheduler waits for), breadth first and each state once, to a depth. After every
//! event the scheduler's own invariants hold, and so does `reference`, which knows nothing of
//! them; from every 64th state, what is under way is let come to its end: everyone who waits
//! must be served or refused within a bound. What is found is printed as the shortest way there.
//!
//! A state is the scheduler's digest and the world's. Times that differ by less than [`GRAIN`]
//! count as one, so of two orders that differ by milliseconds alone only the first is followed.

mod models;
mod owner;
mod reference;
mod search;
mod world;

use std::time::Duration;

/// Every timer of these worlds is a multiple of a second; a move takes a millisecond.
const GRAIN: Duration = Duration::from_millis(100);

#[test]
fn models_on_single_gpus() {
    search::explore(models::singles());
}

#[test]
fn a_model_that_needs_both_gpus() {
    search::explore(models::both());
}

#[test]
fn a_model_with_one_place() {
    search::explore(models::one_place());
}

#[test]
fn a_vllm_that_sleeps_and_one_that_does_not() {
    search::explore(models::sleeper());
}
