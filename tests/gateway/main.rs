//! The gateway between a real client, a scripted engine and a scripted owner.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

#[path = "../support/gateway.rs"]
mod support;

mod activity;
mod admission;
mod filters;
mod forwarding;
mod keys;
mod passing;
mod paths;
mod relaying;
mod waiting;
mod websockets;
