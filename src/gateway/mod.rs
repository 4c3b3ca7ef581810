//! The way of a request: [`routes`] → [`receive`] its body → [`parse`] what decides its way →
//! [`admit`] it → [`infer`] takes a lease, and [`wait`]s if there is none → [`forward`] →
//! [`relay`] the answer. Whatever goes wrong becomes HTTP in [`reject`].
//!
//! A name may lead to several models: [`choose`] says which one is asked, and who is asked next.
//!
//! [`pass`] is the other way in: the path names the model ([`path`]), the body goes on as it came,
//! and the connection may become a [`websocket`]. Of `engine: http`, work may outlast its request:
//! [`underway`] holds a lease for it.
//!
//! The gateway never sees Docker or NVML. It knows the orchestrator's handle, and nothing else.

mod account;
pub mod admit;
mod answer;
pub mod auth;
pub mod browser;
mod captures;
pub mod choose;
mod door;
mod figures;
mod filter;
mod fit;
mod forward;
mod in_flight;
mod infer;
mod limits;
mod multipart;
pub mod nearest;
mod not_loaded;
mod notes;
mod ollama;
mod pages;
mod parse;
mod pass;
mod path;
mod places;
mod receive;
pub mod reject;
mod relay;
pub mod routes;
mod server;
mod short_way;
mod site;
mod threads;
mod timing;
mod tls;
mod traffic;
mod underway;
mod usage;
mod wait;
mod websocket;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;

use crate::orchestrator::Handle;
use crate::telemetry::metrics::Metrics;
use limits::Limiter;
use receive::BodyBudget;
use underway::Watched;
use websocket::Sockets;

pub use captures::Capture;
pub use door::door;
pub use in_flight::Entry;
pub use places::{Places, usual as usual_places};
pub use reject::{Reject, Viewer};
pub use server::{Bounds, serve, serve_until};
pub use site::{Content, Site};
pub use threads::Threads;
pub use tls::{Certificate, Tls};
pub use traffic::Traffic;

/// The gateway's paths, to be served by [`serve`].
pub fn router(handle: Handle, metrics: Arc<Metrics>, traffic: Traffic) -> Router {
    routes::router(shared(handle, metrics, Limits::default(), traffic))
}

/// As [`router`], with the ways past it.
pub fn content(handle: Handle, metrics: Arc<Metrics>, limits: Limits) -> Content {
    Content::from(shared(handle, metrics, limits, Traffic::default()))
}

/// What all listeners of one gateway have in common.
pub fn shared(
    handle: Handle,
    metrics: Arc<Metrics>,
    limits: Limits,
    traffic: Traffic,
) -> Arc<Gateway> {
    Arc::new(Gateway {
        handle,
        metrics,
        limits,
        traffic,
        bodies: Arc::default(),
        limiter: Limiter::default(),
        watched: Arc::default(),
        sockets: Sockets::default(),
        id_seed: format!("{:016x}", RandomState::new().hash_one(std::process::id())),
        id_next: AtomicU64::new(0),
    })
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
    /// A WebSocket on which nothing was sent for so long is closed: one that holds a lease, and one
    /// that does not.
    pub socket_idle: Duration,
    pub visit_idle: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            body_idle: Duration::from_secs(30),
            body_total: Duration::from_secs(300),
            upstream_silence: Duration::from_secs(600),
            reader_stall: Duration::from_secs(30),
            keep_alive: Duration::from_secs(5),
            socket_idle: Duration::from_secs(600),
            visit_idle: Duration::from_secs(3600),
        }
    }
}

/// What every request shares.
#[derive(Debug)]
pub struct Gateway {
    handle: Handle,
    metrics: Arc<Metrics>,
    limits: Limits,
    traffic: Traffic,
    bodies: Arc<BodyBudget>,
    limiter: Limiter,
    /// Queues of `engine: http` that are being looked at.
    watched: Arc<Watched>,
    sockets: Sockets,
    id_seed: String,
    id_next: AtomicU64,
}

impl Gateway {
    /// Unique in this process and hard to confuse with another's.
    fn fresh_id(&self) -> String {
        let next = self.id_next.fetch_add(1, Ordering::Relaxed);
        [&*self.id_seed, "-", itoa::Buffer::new().format(next)].concat()
    }
}
