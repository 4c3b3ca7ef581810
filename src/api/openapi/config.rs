//! What is in force, and changing it: patches, registered models, reloading.

use serde_json::json;

use super::op::{Op, get, post, schema, tagged};

const CHANGE: &[&str] = &["400", "408", "409", "413", "503"];

pub fn ops() -> Vec<Op> {
    let ops = vec![
        get(
            "/config",
            "The configuration in force, where each key is from, and what can be patched",
        )
        .ok("#Config", "secrets masked"),
        Op::new(
            "PATCH",
            "/config",
            "Changes policy, all or nothing, checked as a whole, and keeps it",
        )
        .body_as("application/json", patch_body(), false)
        .ok("#Patched", "what is in force now")
        .errors(CHANGE),
        post("/config/reload", "Reads models.yaml again: a diff, and nothing if it is wrong")
            .ok("#Changed", "what changed")
            .errors(CHANGE),
        post("/models/register", "Registers a model made from an allowed template")
            .body("#Registration")
            .answer("200", &[registered()], "its registration was replaced")
            .answer("201", &[registered()], "it is registered")
            .errors(CHANGE),
        Op::new(
            "DELETE",
            "/models/{name}",
            "Removes a registered model; those of the file stay (409)",
        )
        .at("/models/{*name}")
        .ok("#Deleted", "it is removed")
        .errors(CHANGE)
        .errors(&["404"]),
    ];
    tagged("configuration", ops)
}

fn registered() -> (&'static str, serde_json::Value) {
    ("application/json", schema("#Registered"))
}

/// Nested or by path; `GET /config` lists the paths under `patchable`.
fn patch_body() -> serde_json::Value {
    json!({
        "type": "object",
        "examples": [
            { "swap": { "max_wait": "60s" }, "defaults": { "ttl": "30m" } },
            { "default_ttl_minutes": 20, "swap.max_wait": null },
        ],
    })
}
