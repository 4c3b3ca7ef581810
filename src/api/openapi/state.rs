//! Health, metrics, swaps, GPUs, queue, news.

use serde_json::json;

use super::op::{Op, get, schema, tagged};

pub fn ops() -> Vec<Op> {
    let ops = vec![
        get("/health", "Whether requests can be served; each part with its own state")
            .ok("#Health", "they can")
            .answer(
                "503",
                &[("application/json", schema("#Health"))],
                "a part that is needed fails",
            ),
        get("/status", "What is loaded, in flight, queued and under way").ok("#Status", "now"),
        get("/metrics", "Prometheus text; the swapper's JSON for who accepts that first").answer(
            "200",
            &[
                ("text/plain", json!({ "type": "string" })),
                ("application/json", schema("#Metrics")),
            ],
            "metrics",
        ),
        get("/metrics/{name}", "The swapper's figures of one model")
            .at("/metrics/{*name}")
            .ok("#ModelMetrics", "its figures")
            .errors(&["400", "404"]),
        get("/swaps", "The ledger, the newest first: those under way, then those that ended")
            .query("model", "name", "only of this one")
            .query("limit", "natural", "100 rows where it is not given, 1000 at most")
            .query("before", "string", "go on after this id, to older ones")
            .ok("#Swaps", "rows")
            .errors(&["400", "404"]),
        get("/swaps/{id}", "One swap, with the engine's last log lines if it failed")
            .ok("#Swap", "one row")
            .errors(&["400", "404"]),
        get("/gpus", "Memory of each GPU: read, promised, and who holds it").ok("#Gpus", "now"),
        get("/queue", "Models for which requests wait, the oldest waiter first")
            .ok("#Queue", "now"),
        get(
            "/events",
            "News: model_state, swap_began, swap_phase, swap_ended, reloaded, health, activity",
        )
        .header("Last-Event-ID", "string", "go on behind this one")
        .query("last_event_id", "string", "as the header, for who cannot set one")
        .stream("text/event-stream", "each with an id; `missed` where some are gone")
        .errors(&["400"]),
        get("/openapi.json", "This document").ok("object", "OpenAPI 3.1"),
    ];
    tagged("state", ops)
}
