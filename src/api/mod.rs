//! The control API: what operators and the older tools' clients call.
//!
//! [`routes`] is the table of every path. [`change`] asks the orchestrator to do something;
//! [`read`] renders its view: in the older tools' words in [`render`], swaps in [`ledger`], GPUs
//! and queue in [`machine`].

mod change;
mod error;
mod extract;
mod group;
mod guard;
mod health;
mod ledger;
mod machine;
mod name;
mod read;
mod render;
mod routes;

use std::sync::Arc;

use axum::Router;

use crate::orchestrator::Handle;
use crate::telemetry::metrics::Metrics;

pub use extract::{PathText, QueryText};
pub use health::{answer as health_answer, reachable};
pub use read::status_of as status_answer;
pub use routes::is_control;

/// State of every handler.
#[derive(Clone, Debug)]
pub struct Api {
    handle: Handle,
    metrics: Arc<Metrics>,
}

/// The control API; every other path is a JSON 404. For one address that serves the gateway too,
/// make the gateway its `fallback_service`: paths that both have answer this API's superset.
pub fn router(handle: Handle, metrics: Arc<Metrics>) -> Router {
    routes::router(Api { handle, metrics }).fallback(error::no_such_path)
}
