//! The gateway: inference, its list of models, the pass-through.

use serde_json::{Value, json};

use super::op::{Op, get, meaning, object, post, schema, tagged};
use crate::gateway::routes::{BodyKind, INFERENCE, Inference};

/// What Wharf itself may answer; engines have their own words for what they do not take.
const REFUSALS: &[&str] = &["429", "502", "503", "504", "507"];

pub fn ops() -> Vec<Op> {
    let mut ops = vec![
        get("/v1/models", "The models that the key may use, in OpenAI's shape")
            .query("aliases", "boolean", "also a row for every alias")
            .ok("#ModelList", "rows")
            .errors(&["400"]),
        get("/v1/models/{name}", "One of them")
            .at("/v1/models/{*id}")
            .ok("#ListedModel", "its row")
            .errors(&["400", "404"]),
        get("/upstream", "Which models can be reached by pass-through").ok("#Upstreams", "rows"),
        get("/upstream/", "The same").ok("#Upstreams", "rows"),
    ];
    ops.extend(INFERENCE.iter().map(inference));
    for (method, summary) in [
        ("GET", "An engine's own path, WebSockets included; makes the model ready"),
        ("POST", "The same; the body goes on as it came"),
        ("PUT", "The same"),
        ("PATCH", "The same"),
        ("DELETE", "The same"),
    ] {
        let op = |path, route| passed(Op::new(method, path, summary).at(route));
        ops.push(op("/upstream/{model}/{path}", "/upstream/{*path}"));
    }
    for new in [get, post] {
        ops.push(passed(new("/comfyui", "The model that is ComfyUI: a redirect")));
        ops.push(passed(new("/comfyui/", "Its page")));
        ops.push(passed(new("/comfyui/{path}", "Its paths")).at("/comfyui/{*path}"));
        let sdapi = new("/sdapi/v1/{path}", "The Stable Diffusion web UI's paths");
        ops.push(passed(named(sdapi)).at("/sdapi/v1/{*path}"));
        ops.push(passed(named(new("/v1/audio/voices", "Voices of a speech model"))));
    }
    tagged("inference", ops)
}

/// The model stands in the query or in the body.
fn named(op: Op) -> Op {
    op.query("model", "name", "the model; it may stand in the body instead")
}

fn inference(known: &Inference) -> Op {
    let op = post(known.path, "Inference: the body names the model")
        .header("X-Wharf-Start", "string", "`never`: 503 at once where the model is not ready")
        .header("X-Wharf-Max-Wait", "string", "seconds, or a text like \"30s\"; bounded by the key")
        .header("X-Wharf-Priority", "string", "low, normal or high; bounded by the key");
    let op = match known.body {
        BodyKind::Json => op.body("#InferenceBody"),
        BodyKind::Form => op.body_as("multipart/form-data", form(), true),
    };
    passed(op)
}

fn form() -> Value {
    object(&[
        ("model", "name", "may follow the file"),
        ("file?", "string", "the engine's parts go on as they came"),
    ])
}

fn passed(op: Op) -> Op {
    let any = [("*/*", json!({}))];
    let refused = [("application/json", schema("#EngineError")), ("*/*", json!({}))];
    let op = op
        .answer("2XX", &any, "the engine's answer; with `stream: true` its server-sent events")
        .answer("3XX", &[], "the engine's redirect, or to the path with a slash")
        .answer("4XX", &refused, "what was sent cannot be used, says Wharf or the engine")
        .answer("500", &any, "the engine's own failure");
    REFUSALS.iter().fold(op, |op, status| op.answer(status, &refused, meaning(status)))
}
