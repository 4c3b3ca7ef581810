//! The control API: what operators and the older tools' clients call.
//!
//! [`routes`] is the table of every path. [`change`] asks the orchestrator to do something;
//! [`read`] renders its view: in the older tools' words in [`render`], swaps in [`ledger`], GPUs
//! and queue in [`machine`].

mod change;
mod error;
mod extract;
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

pub use health::answer as health_answer;

/// State of every handler.
#[derive(Clone, Debug)]
pub struct Api {
    handle: Handle,
    metrics: Arc<Metrics>,
}

/// The control API alone; every other path is a JSON 404.
pub fn router(handle: Handle, metrics: Arc<Metrics>) -> Router {
    routes::router(Api { handle, metrics }).fallback(error::no_such_path)
}

/// The control API in front of the gateway, for one address that serves both: paths that both
/// have (`/health`, `/status`, `/metrics`) answer the control API's superset.
pub fn router_before(handle: Handle, metrics: Arc<Metrics>, gateway: Router) -> Router {
    routes::router(Api { handle, metrics }).fallback_service(gateway)
}
