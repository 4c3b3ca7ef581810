//! What is loaded, and changing it.

use serde_json::json;

use super::op::{Op, get, post, schema, tagged};

const LOAD: &[&str] = &["400", "404", "408", "409", "413", "429", "503", "504", "507"];
const CHANGE: &[&str] = &["400", "404", "408", "409", "413", "503", "504"];

pub fn ops() -> Vec<Op> {
    let ops = vec![
        loads(post("/ensure_model", "Makes a model ready, and answers when it is"))
            .body("#EnsureBody"),
        get("/models", "Every model, in the words of all the older tools").ok("#Models", "all"),
        get("/models/{name}", "One model")
            .at("/models/{*name}")
            .ok("#Model", "its row")
            .errors(&["400", "404"]),
        get("/models/{name}/health", "A probe of one model")
            .at("/models/{*name}")
            .ok("#ModelHealth", "it is ready")
            .answer("503", &[("application/json", schema("#ModelHealth"))], "it is not ready")
            .errors(&["400", "404"]),
        loads(verb("/models/{name}/load", "Loads a model")).body_optional("#WaitBody"),
        loads(verb("/models/{name}/wake", "Wakes a sleeping model")).body_optional("#WaitBody"),
        verb("/models/{name}/sleep", "Puts a model to sleep, after what is in flight")
            .body_optional("object")
            .ok("#Asleep", "it sleeps")
            .errors(CHANGE),
        verb("/models/{name}/pin", "Keeps a model, or does so no more")
            .body_optional("#PinBody")
            .ok("#Pinned", "done")
            .errors(CHANGE),
        verb("/models/{name}/extend-ttl", "Lets a model stay longer")
            .body_optional("#ExtendBody")
            .ok("#Extended", "done")
            .errors(CHANGE),
        post("/plan", "A dry run: what a request for a model would bring about now")
            .body("#PlanBody")
            .ok("#Plan", "verdict, and who would give way")
            .errors(&["400", "404", "408", "413", "503"]),
        verb("/models/{name}/unload", "Unloads a model, after what is in flight unless forced")
            .body_optional("#UnloadBody")
            .ok("#Unloaded", "it is gone")
            .errors(CHANGE),
    ];
    tagged("models", ops)
}

/// One route, because names may hold slashes.
fn verb(path: &'static str, summary: &'static str) -> Op {
    post(path, summary).at("/models/{*name}")
}

fn loads(op: Op) -> Op {
    op.ok("#Ready", "it is ready")
        .answer(
            "202",
            &[("application/json", schema("#Accepted"))],
            "for `wait: false`: it is under way, or queued",
        )
        .errors(LOAD)
}

/// Seconds, or `"90s"`.
pub fn timeout() -> serde_json::Value {
    json!({
        "description": "seconds, or a text like \"90s\"; one hour at most",
        "anyOf": [
            { "type": "number", "minimum": 0, "maximum": 3600 },
            { "type": "string", "examples": ["90s"] },
            { "type": "null" },
        ],
    })
}
