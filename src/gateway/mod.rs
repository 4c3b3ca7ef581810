//! The way of a request: [`routes`] → [`receive`] its body → [`parse`] what decides its way →
//! [`admit`] it → [`infer`] takes a lease, and [`wait`]s if there is none → [`forward`] →
//! [`relay`] the answer. Whatever goes wrong becomes HTTP in [`reject`].
//!
//! The gateway never sees Docker or NVML. It knows the orchestrator's handle, and nothing else.

mod account;
pub mod admit;
pub mod auth;
pub mod browser;
mod forward;
mod infer;
mod limits;
mod multipart;
pub mod nearest;
mod notes;
mod pages;
mod parse;
mod receive;
pub mod reject;
mod relay;
pub mod routes;
mod server;
mod timing;
mod usage;
mod wait;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;

use crate::orchestrator::Handle;
use crate::telemetry::metrics::Metrics;
use limits::Limiter;
use receive::BodyBudget;

pub use reject::{Reject, Viewer};
pub use server::{serve, serve_until};

/// The gateway's paths, to be served by [`serve`].
pub fn router(handle: Handle, metrics: Arc<Metrics>) -> Router {
    router_with(handle, metrics, Limits::default())
}

pub fn router_with(handle: Handle, metrics: Arc<Metrics>, limits: Limits) -> Router {
    routes::router(Arc::new(Gateway {
        handle,
        metrics,
        limits,
        bodies: Arc::default(),
        limiter: Limiter::default(),
        id_seed: RandomState::new().hash_one(std::process::id()),
        id_next: AtomicU64::new(0),
    }))
}

/// Bounds that are no one's policy: every wait on a peer has one.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Between two parts of a request body, and for the whole of it.
    pub body_idle: Duration,
    pub body_total: Duration,
    /// For the engine's first byte and between two of them.
    pub upstream_silence: Duration,
    /// A client that reads nothing while its model is to leave is dropped after this.
    pub reader_stall: Duration,
    /// A waiting stream is told something at least this often.
    pub keep_alive: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_idle: Duration::from_secs(30),
            body_total: Duration::from_secs(300),
            upstream_silence: Duration::from_secs(600),
            reader_stall: Duration::from_secs(30),
            keep_alive: Duration::from_secs(5),
        }
    }
}

/// What every request shares.
#[derive(Debug)]
pub struct Gateway {
    handle: Handle,
    metrics: Arc<Metrics>,
    limits: Limits,
    bodies: Arc<BodyBudget>,
    limiter: Limiter,
    id_seed: u64,
    id_next: AtomicU64,
}

impl Gateway {
    /// Unique in this process and hard to confuse with another's.
    fn fresh_id(&self) -> String {
        let next = self.id_next.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}-{next}", self.id_seed)
    }
}
