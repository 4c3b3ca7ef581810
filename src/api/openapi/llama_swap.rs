//! llama-swap's control paths, in that tool's shapes.

use serde_json::{Value, json};

use super::op::{Op, get, post, schema, tagged};

const UNLOAD: &[&str] = &["503", "504"];

pub fn ops() -> Vec<Op> {
    let plain = json!({ "type": "string" });
    let ops = vec![
        get("/running", "Every model that is not stopped").ok("#Running", "rows"),
        get("/unload", "Unloads everything at once").text("`OK`").errors(UNLOAD),
        post("/api/models/unload", "Unloads everything at once").ok("#Done", "`ok`").errors(UNLOAD),
        post("/api/models/unload/{model}", "Unloads one model at once")
            .at("/api/models/unload/{*model}")
            .text("`OK`")
            .answer(
                "404",
                &[("text/plain", plain.clone()), ("application/json", schema("#Error"))],
                "`Model not found`; JSON for who accepts it",
            )
            .errors(&["400", "503", "504"]),
        get(
            "/api/events",
            "modelStatus, logData, metrics, activity, inflight; data is JSON in a string",
        )
        .stream("text/event-stream", "`{\"type\",\"data\"}`"),
        get("/api/metrics", "The last requests, the oldest first").ok("[#Activity]", "rows"),
        get("/api/performance", "Load of the machine and its GPUs, every 5 s for an hour")
            .query("after", "string", "RFC 3339: only samples after it")
            .ok("#Performance", "samples")
            .errors(&["400"]),
        get("/api/version", "What runs here").ok("#Version", "version"),
        get("/api/inflight", "Requests being served or waiting, the oldest first")
            .ok("#InFlight", "rows"),
        post("/api/inflight/{id}/cancel", "Ends one request")
            .ok("#Cancelled", "it ends")
            .errors(&["400", "404"]),
        get("/api/captures/{id}", "A kept request and its answer; bodies in base64")
            .ok("#Capture", "what was kept")
            .answer("400", &[json_of(short_error())], "no number")
            .answer("404", &[json_of(short_error())], "not kept, or not any more"),
        logs("/log", "As /logs"),
        logs("/logs", "The last 100 KiB of Wharf's log and of all engines'"),
        follows("/logs/stream", "Every line as it comes", "text/plain"),
        follows("/logs/streamSSE", "As server-sent events", "text/event-stream"),
        follows("/logs/stream/{source}", "Of one source", "text/plain")
            .at("/logs/stream/{*source}")
            .answer("400", &[("text/plain", plain.clone())], "no such source"),
        follows("/logs/streamSSE/{source}", "Of one source", "text/event-stream")
            .at("/logs/streamSSE/{*source}")
            .answer("400", &[("text/plain", plain)], "no such source"),
    ];
    tagged("llama-swap", ops)
}

fn logs(path: &'static str, summary: &'static str) -> Op {
    get(path, summary).text("lines")
}

fn follows(path: &'static str, summary: &'static str, media: &str) -> Op {
    get(path, summary)
        .query("no-history", "string", "without the last 100 KiB")
        .stream(media, "lines, until the client leaves")
}

/// That tool's own, on one path.
fn short_error() -> Value {
    json!({ "type": "object", "required": ["error"], "properties": { "error": { "type": "string" } } })
}

fn json_of(schema: Value) -> (&'static str, Value) {
    ("application/json", schema)
}
