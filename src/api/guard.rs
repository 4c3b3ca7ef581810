//! Who may call a route: the key's scope, before every handler. (The browser rules come first, as
//! one layer around all routes.)

use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;

use super::endpoint::Endpoint;
use crate::config::catalog::Scope;
use crate::gateway::auth::authorize;
use crate::orchestrator::Handle;

/// What a route asks of its caller. Without configured keys every scope is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Probes of load balancers and containers carry no key.
    Nothing,
    Read,
    Admin,
    /// Checked by the handler: it counts who it turns away, reads their bodies to the end, and needs
    /// the key itself for its models and limits.
    Inference,
    /// As [`Needs::Inference`]; which of the two an engine's own path takes is in `engine::paths`.
    InferenceOrAdmin,
}

impl Needs {
    pub fn as_str(self) -> &'static str {
        match self {
            Needs::Nothing => "none",
            Needs::Read => "read",
            Needs::Admin => "admin",
            Needs::Inference => "inference",
            Needs::InferenceOrAdmin => "inference or admin",
        }
    }
}

impl Needs {
    /// What the guard asks; `None`: nobody does, or the handler.
    fn scope(self) -> Option<Scope> {
        match self {
            Needs::Nothing | Needs::Inference | Needs::InferenceOrAdmin => None,
            Needs::Read => Some(Scope::Read),
            Needs::Admin => Some(Scope::Admin),
        }
    }
}

#[derive(Clone, Debug)]
struct Guard {
    handle: Handle,
    scope: Scope,
}

/// A row's handler behind its guard.
pub fn guarded<S>(endpoint: Endpoint<S>, needs: Needs, handle: &Handle) -> MethodRouter<S>
where
    S: Clone + Send + Sync + 'static,
{
    let Some(scope) = needs.scope() else { return endpoint.handler };
    let guard = from_fn_with_state(Guard { handle: handle.clone(), scope }, guard);
    match endpoint.methods.is_empty() {
        // axum takes a handler of every method for a fallback.
        true => endpoint.handler.layer(guard),
        false => endpoint.handler.route_layer(guard),
    }
}

async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let catalog = guard.handle.catalog();
    match authorize(&catalog.settings, request.headers(), guard.scope) {
        Ok(_) => next.run(request).await,
        Err(reject) => reject.into_response(),
    }
}
