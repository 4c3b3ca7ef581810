//! Every path of the control API, in one table.

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodRouter, get, post};

use super::extract::BODY_BYTES_MAX;
use super::guard::{Guard, Needs, guard};
use super::{Api, change, error, plan, read};
use crate::gateway::browser;

/// One row: path, who may call it, and the handler.
type Route = (&'static str, Needs, MethodRouter<Api>);

fn table() -> [Route; 13] {
    [
        ("/health", Needs::Nothing, get(read::health)),
        ("/status", Needs::Read, get(read::status)),
        ("/models", Needs::Read, get(read::models)),
        ("/models/{*name}", Needs::Read, get(read::model)),
        ("/metrics", Needs::Read, get(read::metrics)),
        ("/metrics/{*name}", Needs::Read, get(read::model_metrics)),
        ("/swaps", Needs::Read, get(read::swaps)),
        ("/swaps/{id}", Needs::Read, get(read::swap)),
        ("/gpus", Needs::Read, get(read::gpus)),
        ("/queue", Needs::Read, get(read::queue)),
        ("/ensure_model", Needs::Admin, post(change::ensure_model)),
        ("/plan", Needs::Read, post(plan::plan)),
        // `{name}/load`, `/unload`, `/extend-ttl`, `/pin`, `/sleep`, `/wake`
        ("/models/{*name}", Needs::Admin, post(change::verb)),
    ]
}

/// Whether a path belongs to this API, to be told to who asks the gateway for it.
pub fn is_control(path: &str) -> bool {
    let first = |path: &str| path.split('/').nth(1).map(str::to_owned);
    table().iter().any(|(known, ..)| first(known) == first(path))
}

pub fn router(api: Api) -> Router {
    let mut router = Router::new();
    for (path, needs, handler) in table() {
        let guarded = Guard { api: api.clone(), needs };
        router = router.route(path, handler.route_layer(from_fn_with_state(guarded, guard)));
    }
    router
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(from_fn_with_state(api.handle.clone(), browser::guard))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api)
}
