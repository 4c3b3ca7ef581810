//! The gateway between a real client, a scripted engine and a scripted owner.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

#[path = "../support/gateway.rs"]
mod support;

mod admission;
mod forwarding;
mod keys;
mod relaying;
mod waiting;
