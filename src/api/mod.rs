//! The control API: what operators and the older tools' clients call.
//!
//! [`routes`] is the table of every path. [`change`] asks the orchestrator to do something, [`stay`]
//! for how long a model stays;
//! [`read`] renders its view: in the older tools' words in [`render`], swaps in [`ledger`], GPUs
//! and queue in [`machine`]. [`llama_swap`] and [`logs`] are that tool's control paths, [`events`]
//! what is told of changes, [`traffic`] the gateway's requests. [`config`] and [`register`] ask the
//! owner of the configuration. [`openapi`] describes all of it.

mod change;
mod config;
mod effective;
pub mod endpoint;
mod error;
mod events;
mod extract;
mod group;
pub mod guard;
mod health;
mod ledger;
mod llama_swap;
mod logs;
mod machine;
mod name;
pub mod openapi;
mod plan;
mod read;
mod register;
mod render;
mod routes;
mod stay;
mod traffic;

use std::sync::Arc;

use axum::Router;

use crate::gateway::Traffic;
use crate::orchestrator::Handle;
use crate::telemetry::metrics::Metrics;

pub use extract::{PathText, QueryText};
pub use health::{answer as health_answer, reachable};
pub use read::status_of as status_answer;
pub use routes::{is_control, routes, routes_on_gateway};

/// State of every handler.
#[derive(Clone, Debug)]
pub struct Api {
    handle: Handle,
    metrics: Arc<Metrics>,
    traffic: Traffic,
}

/// llama-swap's control paths, for the gateway.
pub fn on_gateway(handle: Handle, metrics: Arc<Metrics>, traffic: Traffic) -> Router {
    routes::on_gateway(Api { handle, metrics, traffic })
}

/// The control API; every other path is a JSON 404. For one address that serves the gateway too,
/// make the gateway its `fallback_service`: paths that both have answer this API's superset.
pub fn router(handle: Handle, metrics: Arc<Metrics>) -> Router {
    router_with(handle, metrics, Traffic::default())
}

/// As [`router`], with what the gateway knows of its requests.
pub fn router_with(handle: Handle, metrics: Arc<Metrics>, traffic: Traffic) -> Router {
    routes::router(Api { handle, metrics, traffic }).fallback(error::no_such_path)
}
