//! Who may call a route: the key's scope, before every handler. (The browser rules come first, as
//! one layer around all routes.)

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Api;
use crate::config::catalog::Scope;
use crate::gateway::auth::authorize;

/// What a route asks of its caller. Without configured keys every scope is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Probes of load balancers and containers carry no key.
    Nothing,
    Read,
    Admin,
}

#[derive(Clone, Debug)]
pub struct Guard {
    pub api: Api,
    pub needs: Needs,
}

pub async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let scope = match guard.needs {
        Needs::Nothing => return next.run(request).await,
        Needs::Read => Scope::Read,
        Needs::Admin => Scope::Admin,
    };
    let catalog = guard.api.handle.catalog();
    if let Err(reject) = authorize(&catalog.settings, request.headers(), scope) {
        return reject.into_response();
    }
    next.run(request).await
}
