//! The shapes of answers and bodies: the fields that clients may rely on. More may come beside them.

mod config;
mod models;
mod state;

use serde_json::{Map, Value, json};

use super::models::timeout;
use super::op::{Fields, object};

const RESIDENCY: &str =
    "stopped|starting|ready|draining|stopping|falling_asleep|sleeping|waking|failed|lost";
const POOL_STATE: &str = "COLD|WARMING|HOT|COOLING|UNLOADING";

type Named = (&'static str, &'static Fields);

pub fn all() -> Map<String, Value> {
    let named = [
        COMMON,
        models::MODELS,
        models::STAY,
        config::CONFIGURATION,
        state::STATE,
        state::LLAMA_SWAP,
        INFERENCE,
    ]
    .concat();
    let mut all: Map<String, Value> =
        named.into_iter().map(|(name, fields)| (name.to_owned(), object(fields))).collect();
    for body in ["EnsureBody", "WaitBody"] {
        all[body]["properties"]["timeout"] = timeout();
    }
    all["ExtendBody"]["properties"]["minutes"] = json!({
        "description": "as long as the model's ttl where it is not given",
        "type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 527_040,
    });
    for (schema, field, words) in [
        ("Model", "residency", RESIDENCY),
        ("ModelHealth", "status", RESIDENCY),
        ("Model", "state", POOL_STATE),
        ("ModelHealth", "state", POOL_STATE),
    ] {
        all[schema]["properties"][field]["enum"] = words.split('|').collect();
    }
    all.insert("Metrics".to_owned(), object(&[("metrics", "[#ModelMetrics]", "")]));
    all.insert("Done".to_owned(), object(&[("msg", "string", "")]));
    all["Done"]["properties"]["msg"] = json!({ "const": "ok" });
    all
}

const COMMON: &[Named] = &[
    (
        "Error",
        &[
            ("error", "#ErrorBody", ""),
            ("model?", "string", "the model it is about"),
            ("swap_id?", "string", "the swap that failed: GET /swaps/{id}"),
            ("cause?", "#Cause", "why, where something failed"),
        ],
    ),
    (
        "ErrorBody",
        &[
            ("message", "string", "names the thing and the fix"),
            (
                "type",
                "authentication_error|permission_error|rate_limit_error|invalid_request_error|server_error",
                "",
            ),
            ("param", "string?", "which part of the request"),
            ("code", "string", "stable: for programs"),
        ],
    ),
    (
        "Cause",
        &[
            ("message", "string", ""),
            ("kind?", "string", "stable: for programs"),
            ("log?", "[string]", "the engine's last lines, for keys with `read` or `admin`"),
        ],
    ),
    ("Fault", &[("cause", "string", "stable: for programs"), ("message", "string", "")]),
];

const INFERENCE: &[Named] = &[
    (
        "InferenceBody",
        &[
            ("model", "name", "all other fields are the engine's"),
            ("stream?", "boolean?", ""),
            ("messages?", "any", ""),
            ("prompt?", "any", ""),
            ("input?", "any", ""),
        ],
    ),
    (
        "EngineError",
        &[("error?", "any", "as in `Error`, if Wharf says it; engines have words of their own")],
    ),
    ("ModelList", &[("object", "string", "`list`"), ("data", "[#ListedModel]", "")]),
    (
        "ListedModel",
        &[
            ("id", "string", ""),
            ("object", "string", "`model`"),
            ("created", "integer", ""),
            ("owned_by", "string", ""),
            ("meta", "#ModelMeta", ""),
        ],
    ),
    (
        "ModelMeta",
        &[
            ("model", "string", "its configured name"),
            ("state", "string", ""),
            ("type", "string", ""),
            ("tags", "[string]", ""),
            ("engine", "string", ""),
            ("aliases", "[string]", ""),
            ("name", "string?", ""),
            ("description", "string?", ""),
            ("metadata", "any", ""),
            ("context_length", "integer?", ""),
        ],
    ),
    ("Upstreams", &[("object", "string", "`list`"), ("data", "[#Upstream]", "")]),
    (
        "Upstream",
        &[
            ("id", "string", ""),
            ("engine", "string", ""),
            ("state", "string", ""),
            ("url", "string", "below the gateway"),
        ],
    ),
];
