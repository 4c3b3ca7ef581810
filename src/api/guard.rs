//! Who may call a route: the key's scope, before every handler. (The browser rules come first, as
//! one layer around all routes.)

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

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

#[derive(Clone, Debug)]
pub struct Guard {
    pub handle: Handle,
    pub needs: Needs,
}

pub async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let scope = match guard.needs {
        Needs::Nothing | Needs::Inference | Needs::InferenceOrAdmin => {
            return next.run(request).await;
        }
        Needs::Read => Scope::Read,
        Needs::Admin => Scope::Admin,
    };
    let catalog = guard.handle.catalog();
    if let Err(reject) = authorize(&catalog.settings, request.headers(), scope) {
        return reject.into_response();
    }
    next.run(request).await
}
