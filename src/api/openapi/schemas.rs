//! The shapes of answers and bodies: the fields that clients may rely on. More may come beside them.

use serde_json::{Map, Value, json};

use super::models::timeout;
use super::op::{Fields, object};

const RESIDENCY: &str = "stopped|starting|ready|draining|stopping|falling_asleep|sleeping|waking|failed|lost";
const POOL_STATE: &str = "COLD|WARMING|HOT|COOLING|UNLOADING";

type Named = (&'static str, &'static Fields);

pub fn all() -> Map<String, Value> {
    let named = [COMMON, MODELS, STATE, LLAMA_SWAP, INFERENCE].concat();
    let mut all: Map<String, Value> =
        named.into_iter().map(|(name, fields)| (name.to_owned(), object(fields))).collect();
    for body in ["EnsureBody", "WaitBody"] {
        all[body]["properties"]["timeout"] = timeout();
    }
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

const MODELS: &[Named] = &[
    ("EnsureBody", &[("model", "name", ""), ("timeout?", "any", ""), ("wait?", "boolean?", WAIT)]),
    ("WaitBody", &[("timeout?", "any", ""), ("wait?", "boolean?", WAIT)]),
    ("UnloadBody", &[("force?", "boolean", "cut what is in flight")]),
    (
        "Ready",
        &[
            ("status", "string", "`ready`, or `success` for load"),
            ("model", "string", "its configured name"),
            ("state", "string", ""),
            ("swapped", "boolean", "false: it was ready already"),
            ("from", "string?", "who gave way first"),
            ("evicted", "[#Evicted]", ""),
            ("swap_id", "string?", ""),
            ("seconds", "number", "of the swap"),
            ("phases", "{number}", "seconds"),
            ("waited_seconds", "number", "of this call"),
            ("message?", "string", ""),
        ],
    ),
    ("Evicted", &[("model", "string", ""), ("instance", "string", ""), ("why", "string", "")]),
    (
        "Accepted",
        &[
            ("status", "string", ""),
            ("model", "string", ""),
            ("state", "string", ""),
            ("swap_id", "string?", "none while it is queued"),
            ("message", "string", ""),
        ],
    ),
    (
        "Unloaded",
        &[
            ("status", "string", ""),
            ("model", "string", ""),
            ("message", "string", ""),
            ("was_loaded", "boolean", ""),
        ],
    ),
    ("Models", &[("models", "[#Model]", "")]),
    (
        "Model",
        &[
            ("name", "string", "swapper"),
            ("ollama_name", "string", "swapper: what the engine calls it"),
            ("type", "string", "swapper"),
            ("size_gb", "number?", "swapper"),
            ("priority", "low|normal|high", "swapper"),
            ("status", "loaded|unloaded", "swapper"),
            ("loaded_at", "time?", "swapper"),
            ("unloaded_at", "time?", "swapper"),
            ("total_uptime_seconds", "number", "swapper"),
            ("model_id", "string", "pool manager"),
            ("display_name", "string", "pool manager"),
            ("model_type", "string", "pool manager"),
            ("port", "integer", "pool manager"),
            ("state", "string", "pool manager"),
            ("ttl_remaining_minutes", "number", "pool manager; 0: no ttl runs"),
            ("warmup", "boolean", "pool manager"),
            ("endpoint", "string", "pool manager: where clients reach it"),
            ("tags", "[string]", "pool manager"),
            ("aliases", "[string]", ""),
            ("description", "string?", ""),
            ("engine", "string", ""),
            ("engine_endpoint", "string?", ""),
            ("runtime", "string", ""),
            ("pinned", "boolean", ""),
            ("unlisted", "boolean", ""),
            ("registered", "boolean", "by POST /models/register, and not by the file"),
            ("concurrency", "integer?", ""),
            ("ttl_seconds", "number?", ""),
            ("gpus_wanted", "any", "how many, or which"),
            ("request_count", "integer", ""),
            ("in_flight", "integer", ""),
            ("starts", "integer", ""),
            ("restarts", "integer", ""),
            ("last_fault", "#Fault?", ""),
            ("residency", "string", "where it is, in Wharf's words"),
            ("since", "time?", ""),
            ("instance", "string?", ""),
            ("gpus", "[integer]?", ""),
            ("vram_bytes_per_gpu", "integer?", ""),
            ("queued", "integer", ""),
            ("ready_in_seconds", "number?", ""),
            ("waiting_for", "string?", ""),
            ("swap_id", "string?", ""),
        ],
    ),
    (
        "ModelHealth",
        &[
            ("model", "string", ""),
            ("status", "string", ""),
            ("state", "string", ""),
            ("uptime_seconds", "number", ""),
            ("requests_served", "integer", ""),
            ("port", "integer", ""),
            ("in_flight", "integer", ""),
            ("queued", "integer", ""),
            ("ttl_remaining_minutes", "number", ""),
            ("last_fault", "#Fault?", ""),
        ],
    ),
];

const WAIT: &str = "false: 202 at once";

const STATE: &[Named] = &[
    (
        "Health",
        &[
            ("status", "healthy|unhealthy", ""),
            ("service", "string", ""),
            ("version", "string", ""),
            ("active_model", "string?", "swapper"),
            ("mode", "multi-active|single-active", "swapper"),
            ("active_models", "integer", "pool manager"),
            ("total_models", "integer", "pool manager"),
            ("total_memory_mb", "integer", "pool manager: of the active models"),
            ("available_ports", "integer", "pool manager"),
            ("gateway", "#Part", ""),
            ("orchestrator", "#Part", ""),
            ("docker", "#Part", ""),
            ("gpu", "#Part", ""),
            ("store", "#Part", ""),
        ],
    ),
    ("Part", &[("status", "ok|degraded|unused|failed", ""), ("detail", "string", "")]),
    (
        "Status",
        &[
            ("status", "healthy|unhealthy", "swapper"),
            ("active_model", "string?", "swapper: the one used last"),
            ("available_models", "[string]", "swapper"),
            ("loaded_models", "[string]", "swapper"),
            ("mode", "multi-active|single-active", "swapper"),
            ("total_models", "integer", "swapper"),
            ("current_model", "string?", "orchestrator"),
            ("current_models", "[string]", "orchestrator"),
            ("in_flight", "integer", "orchestrator"),
            ("queued", "integer", "orchestrator"),
            ("last_swap", "#Swap?", "orchestrator"),
            ("models", "{#ModelStatus}", "by name"),
            ("swaps", "[#Swap]", "under way"),
            ("no_proof", "string?", "why GPU memory cannot be read"),
            ("leftovers", "[object]", "instances of an earlier run that do not go"),
            ("time", "time", ""),
        ],
    ),
    (
        "ModelStatus",
        &[
            ("state", "string", "where it is, in Wharf's words"),
            ("since", "time?", ""),
            ("in_flight", "integer", ""),
            ("queued", "integer", ""),
            ("request_count", "integer", ""),
            ("gpus", "[integer]?", ""),
            ("ready_in_seconds", "number?", ""),
            ("waiting_for", "string?", ""),
            ("swap_id", "string?", ""),
            ("progress?", "object?", "of a load under way"),
        ],
    ),
    (
        "ModelMetrics",
        &[
            ("model_name", "string", ""),
            ("status", "loaded|unloaded", ""),
            ("loaded_at", "time?", ""),
            ("unloaded_at", "time?", ""),
            ("uptime_hours", "number", ""),
            ("request_count", "integer", ""),
            ("total_uptime_seconds", "number", ""),
            ("in_flight", "integer", ""),
            ("queued", "integer", ""),
        ],
    ),
    ("Swaps", &[("swaps", "[#Swap]", "")]),
    (
        "Swap",
        &[
            ("id", "string", ""),
            ("model", "string", ""),
            ("kind", "string", "load, unload, …"),
            ("cause", "string", "request, ensure, load, warmup, ttl, evict, …"),
            ("decision", "string", "why it was done so"),
            ("from", "string?", "who gave way first"),
            ("evicted", "[#Evicted]", ""),
            ("instance", "string?", ""),
            ("gpus", "[integer]", ""),
            ("began", "time", ""),
            ("ended", "time?", "null: under way"),
            ("seconds", "number", ""),
            ("phases", "{number}", "those that ended, in their order: seconds"),
            ("result", "string?", "null: under way"),
            ("message?", "string", "of what failed"),
            ("fault?", "string", "of what failed; stable: for programs"),
            ("log?", "[string]", "the engine's last lines: in GET /swaps/{id}"),
            ("phase?", "string?", "under way"),
            ("phase_seconds?", "number?", "under way"),
            ("progress?", "object?", "under way"),
            ("estimate_seconds?", "number?", "under way"),
            ("waiting_for?", "string?", "under way"),
        ],
    ),
    (
        "Gpus",
        &[
            ("provider", "string", ""),
            ("ok", "boolean", ""),
            ("no_proof", "string?", ""),
            ("reserve_bytes", "integer", "of each"),
            ("gpus", "[#Gpu]", ""),
            ("host_memory", "#HostMemory", ""),
            ("foreign", "[any]", "what is not Wharf's, and holds memory"),
        ],
    ),
    (
        "Gpu",
        &[
            ("gpu", "integer", ""),
            ("uuid", "string?", ""),
            ("name", "string", ""),
            ("total_bytes", "integer?", ""),
            ("free_bytes", "integer?", ""),
            ("used_bytes", "integer?", ""),
            ("promised_bytes", "integer?", ""),
            ("promised_to", "[string]", "models"),
            ("utilization", "number?", "0 to 1"),
            ("holders", "[#Holder]", "processes"),
        ],
    ),
    (
        "Holder",
        &[
            ("pid", "integer?", ""),
            ("label", "string", ""),
            ("mib", "integer", ""),
            ("bytes", "integer", ""),
            ("instance", "string?", ""),
            ("model", "string?", ""),
        ],
    ),
    (
        "HostMemory",
        &[
            ("total_bytes", "integer?", ""),
            ("available_bytes", "integer?", ""),
            ("reserve_bytes", "integer", ""),
            ("promised_bytes", "integer", ""),
            ("promised_to", "[string]", "models"),
        ],
    ),
    (
        "Queue",
        &[
            ("queued", "integer", ""),
            ("limit", "integer", ""),
            ("per_model_limit", "integer", ""),
            ("models", "[#QueuedModel]", ""),
        ],
    ),
    (
        "QueuedModel",
        &[
            ("model", "string", ""),
            ("queued", "integer", ""),
            ("requests", "[string]", "their ids"),
            ("oldest_seconds", "number?", ""),
            ("ready_in_seconds", "number?", ""),
            ("residency", "string", ""),
            ("waiting_for", "string", ""),
            ("swap_id", "string?", ""),
        ],
    ),
];

const LLAMA_SWAP: &[Named] = &[
    ("Running", &[("running", "[#RunningModel]", "")]),
    (
        "RunningModel",
        &[
            ("model", "string", ""),
            ("state", "starting|ready|stopping|unknown", ""),
            ("cmd", "string", "as configured, secrets masked"),
            ("proxy", "string", "where the engine listens"),
            ("ttl", "integer", "seconds; 0: never"),
            ("name", "string", ""),
            ("description", "string", ""),
        ],
    ),
    (
        "Activity",
        &[
            ("id", "integer", ""),
            ("timestamp", "time", "of the request's end"),
            ("model", "string", ""),
            ("req_path", "string", ""),
            ("resp_content_type", "string", ""),
            ("resp_status_code", "integer", ""),
            ("tokens", "#Tokens", ""),
            ("duration_ms", "integer", ""),
            ("has_capture", "boolean", ""),
        ],
    ),
    (
        "Tokens",
        &[
            ("cache_tokens", "integer", "-1: not told, here and below"),
            ("input_tokens", "integer", ""),
            ("output_tokens", "integer", ""),
            ("prompt_per_second", "number", ""),
            ("tokens_per_second", "number", ""),
        ],
    ),
    (
        "Performance",
        &[("enabled", "boolean", ""), ("sys_stats", "[object]", ""), ("gpu_stats", "[object]", "")],
    ),
    ("Version", &[("version", "string", ""), ("commit", "string", ""), ("build_date", "string", "")]),
    ("InFlight", &[("total", "integer", ""), ("requests", "[#Request]", "")]),
    (
        "Request",
        &[
            ("id", "integer", "for /api/inflight/{id}/cancel"),
            ("request_id", "string", "its X-Request-Id"),
            ("model", "string", ""),
            ("requested", "string", "the name that the client used"),
            ("key", "string?", "the key's name"),
            ("path", "string", ""),
            ("arrived", "time", ""),
            ("seconds", "number", ""),
            ("stage", "queued|forwarded", ""),
            ("bytes", "integer", "of the answer, so far"),
        ],
    ),
    (
        "Cancelled",
        &[("status", "string", ""), ("id", "integer", ""), ("msg", "string", "llama-swap's")],
    ),
    (
        "Capture",
        &[
            ("id", "integer", ""),
            ("req_path", "string", ""),
            ("req_headers", "{string}", "redacted"),
            ("req_body", "string", "base64"),
            ("req_bytes", "integer", "before it was cut"),
            ("resp_headers", "{string}", "redacted"),
            ("resp_body", "string", "base64"),
            ("resp_bytes", "integer", "before it was cut"),
        ],
    ),
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
