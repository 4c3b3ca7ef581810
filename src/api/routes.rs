//! Every path of the control API, in one table.

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;

use super::endpoint::{self, Route, Row, delete, get, patch, post};
use super::extract::BODY_BYTES_MAX;
use super::guard::{self, Needs};
use super::{
    Api, change, config, error, events, llama_swap, logs, openapi, plan, read, register, traffic,
};
use crate::gateway::browser;

fn table() -> Vec<Row<Api>> {
    let mut table = own();
    table.extend(llama_swap());
    table
}

fn own() -> Vec<Row<Api>> {
    vec![
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
        ("/models/register", Needs::Admin, post(register::register)),
        ("/models/{*name}", Needs::Admin, delete(register::delete)),
        ("/config", Needs::Read, get(config::show)),
        ("/config", Needs::Admin, patch(config::patch)),
        ("/config/reload", Needs::Admin, post(config::reload)),
        ("/events", Needs::Read, get(events::events)),
        ("/openapi.json", Needs::Nothing, get(openapi::document)),
    ]
}

/// llama-swap's control paths; served by the gateway too, so that its users need one address.
fn llama_swap() -> Vec<Row<Api>> {
    vec![
        ("/api/models/unload", Needs::Admin, post(llama_swap::unload_all)),
        ("/api/models/unload/{*model}", Needs::Admin, post(llama_swap::unload_one)),
        ("/api/events", Needs::Read, get(events::llama_swap)),
        ("/api/metrics", Needs::Read, get(llama_swap::metrics)),
        ("/api/performance", Needs::Read, get(llama_swap::performance)),
        ("/api/version", Needs::Read, get(llama_swap::version)),
        ("/api/inflight", Needs::Read, get(traffic::in_flight)),
        ("/api/inflight/{id}/cancel", Needs::Admin, post(traffic::cancel)),
        // They hold prompts.
        ("/api/captures/{id}", Needs::Admin, get(traffic::capture)),
        ("/running", Needs::Read, get(llama_swap::running)),
        ("/unload", Needs::Admin, get(llama_swap::unload)),
        ("/log", Needs::Read, get(logs::all)),
        ("/logs", Needs::Read, get(logs::all)),
        ("/logs/stream", Needs::Read, get(logs::stream_all)),
        ("/logs/stream/{*source}", Needs::Read, get(logs::stream)),
        ("/logs/streamSSE", Needs::Read, get(logs::stream_sse_all)),
        ("/logs/streamSSE/{*source}", Needs::Read, get(logs::stream_sse)),
    ]
}

/// The rows of the orchestrator's listener.
pub fn routes() -> Vec<Route> {
    endpoint::listed(&table())
}

/// Those of them that the gateway serves too.
pub fn routes_on_gateway() -> Vec<Route> {
    endpoint::listed(&llama_swap())
}

/// Whether a path belongs to this API, to be told to who asks the gateway for it.
pub fn is_control(path: &str) -> bool {
    let first = |path: &str| path.split('/').nth(1).map(str::to_owned);
    table().iter().any(|(known, ..)| first(known) == first(path))
}

pub fn router(api: Api) -> Router {
    let browsers = from_fn_with_state(api.handle.clone(), browser::guard);
    guarded(table(), api).layer(browsers)
}

/// The control paths that the gateway serves too, to be merged into its own; without the browser
/// rules, which stand before everything there.
pub fn on_gateway(api: Api) -> Router {
    guarded(llama_swap(), api)
}

fn guarded(table: Vec<Row<Api>>, api: Api) -> Router {
    let mut router = Router::new();
    for (path, needs, endpoint) in table {
        router = router.route(path, guard::guarded(endpoint, needs, &api.handle));
    }
    router
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(api)
}
