//! The HTTP surface: inference, and what an orchestrator looks at.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, OriginalUri, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};

use super::engine::{Engine, say};
use super::options::Style;
use super::reply::{Asked, Kind, Reply, unix_seconds};
use super::server::ResetSwitch;
use super::{adapters, comfy};
use super::{messages, sleep};

const BODY_BYTES_MAX: usize = 256 << 20;
const CONTEXT_LENGTH: u32 = 4096;
const EMBEDDING_DIMENSIONS: usize = 8;
const EVENT_STREAM: [(header::HeaderName, &str); 2] = [
    (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
    (header::CACHE_CONTROL, "no-cache"),
];

pub fn router(engine: Arc<Engine>) -> Router {
    if engine.options.style == Style::Http {
        return comfy::router(engine).fallback(unknown);
    }
    let inference = Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/messages", post(messages))
        .route("/v1/messages/count_tokens", post(count_tokens))
        .route("/v1/embeddings", post(embeddings))
        .layer(from_fn_with_state(Arc::clone(&engine), faults))
        .route("/v1/models", get(models))
        .layer(from_fn_with_state(Arc::clone(&engine), authorize))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX));
    let mut router =
        inference.route("/health", get(health)).route("/metrics", get(metrics)).fallback(unknown);
    router = match engine.options.style {
        Style::Llamacpp => router.route("/props", get(props)),
        Style::Vllm | Style::Plain => router.merge(sleep::routes()),
        Style::Ollama | Style::Http => router,
    };
    if let Some(path) = engine.options.health_path.as_deref().filter(|path| *path != "/health") {
        router = router.route(path, get(health));
    }
    if adapters::are_possible(&engine.options) {
        router = router.merge(adapters::routes());
    }
    router.with_state(engine)
}

pub(super) fn error(
    status: StatusCode,
    kind: &str,
    param: Option<&str>,
    message: &str,
) -> Response {
    let error = json!({"message": message, "type": kind, "param": param, "code": status.as_u16()});
    (status, axum::Json(json!({ "error": error }))).into_response()
}

async fn unknown(OriginalUri(uri): OriginalUri) -> Response {
    let message = format!("{} does not exist", uri.path());
    error(StatusCode::NOT_FOUND, "NotFoundError", None, &message)
}

async fn authorize(State(engine): State<Arc<Engine>>, request: Request, next: Next) -> Response {
    let is_public = engine.options.style == Style::Llamacpp && request.uri().path() == "/v1/models";
    if let Some(key) = engine.options.api_key.as_ref().filter(|_| !is_public) {
        let given = request.headers().get(header::AUTHORIZATION);
        let given = given.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        if given != Some(key) {
            return error(StatusCode::UNAUTHORIZED, "AuthenticationError", None, "Unauthorized");
        }
    }
    next.run(request).await
}

/// Every fault that strikes a request before it is looked at.
async fn faults(
    State(engine): State<Arc<Engine>>,
    Extension(reset): Extension<ResetSwitch>,
    request: Request,
    next: Next,
) -> Response {
    if !engine.is_ready() {
        return loading();
    }
    let faults = &engine.options.faults;
    let number = engine.requests.fetch_add(1, Ordering::SeqCst) + 1;
    if faults.crash_on_request == Some(number) {
        crash(&engine, "crash on request, as asked for");
    }
    if faults.reset_connection_every.is_some_and(|every| every > 0 && number % every == 0) {
        reset.pull();
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(faults.slow_head).await;
    if let Some(status) = faults.fail_with.and_then(|status| StatusCode::from_u16(status).ok()) {
        return error(status, "InternalServerError", None, "failed, as asked for");
    }
    next.run(request).await
}

/// Ends the process as a bug would: nothing is tidied up, workers stay behind.
pub fn crash(engine: &Engine, why: &str) -> ! {
    say(&format!("Fatal Python error: Aborted: {why}"));
    std::process::exit(i32::from(engine.options.faults.exit_code))
}

fn loading() -> Response {
    error(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", None, "Loading model")
}

#[derive(Deserialize)]
struct Inference {
    model: Option<String>,
    #[serde(default)]
    stream: bool,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    messages: Value,
    #[serde(default)]
    prompt: Value,
    #[serde(default)]
    input: Value,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// The request, and the name under which it is answered.
fn read(engine: &Engine, body: &[u8]) -> Result<(Inference, String), Box<Response>> {
    let request: Inference = serde_json::from_slice(body).map_err(|problem| {
        Box::new(error(StatusCode::BAD_REQUEST, "BadRequestError", None, &problem.to_string()))
    })?;
    let first = engine.options.names.first().map_or("standin", String::as_str);
    let asked = request.model.as_deref().unwrap_or(first);
    let adapter = || adapters::source(engine, asked).map(|_| asked);
    let Some(name) = engine.options.served_as(asked).or_else(adapter) else {
        let message = format!("The model `{asked}` does not exist.");
        let refused = error(StatusCode::NOT_FOUND, "NotFoundError", Some("model"), &message);
        return Err(Box::new(refused));
    };
    let name = name.to_owned();
    Ok((request, name))
}

async fn chat(engine: State<Arc<Engine>>, body: Bytes) -> Response {
    generate(engine, Kind::Chat, &body).await
}

async fn completion(engine: State<Arc<Engine>>, body: Bytes) -> Response {
    generate(engine, Kind::Completion, &body).await
}

async fn messages(State(engine): State<Arc<Engine>>, body: Bytes) -> Response {
    let (request, name) = match read(&engine, &body) {
        Ok(read) => read,
        Err(refused) => return *refused,
    };
    let streamed = request.stream;
    let reply = begin(engine, Kind::Chat, request, name).await;
    match streamed {
        true => (EVENT_STREAM, messages::stream(reply)).into_response(),
        false => axum::Json(messages::whole(reply).await).into_response(),
    }
}

async fn generate(State(engine): State<Arc<Engine>>, kind: Kind, body: &[u8]) -> Response {
    let (request, name) = match read(&engine, body) {
        Ok(read) => read,
        Err(refused) => return *refused,
    };
    let streamed = request.stream;
    let include_usage =
        request.stream_options.as_ref().is_some_and(|options| options.include_usage);
    let reply = begin(engine, kind, request, name).await;
    match streamed {
        true => (EVENT_STREAM, reply.stream(include_usage)).into_response(),
        false => axum::Json(reply.whole().await).into_response(),
    }
}

async fn begin(engine: Arc<Engine>, kind: Kind, request: Inference, name: String) -> Reply {
    let prompt = if kind == Kind::Chat { &request.messages } else { &request.prompt };
    let prompt_tokens = engine.options.speed.prompt_tokens.unwrap_or_else(|| words(prompt));
    let asked = Asked {
        kind,
        id: engine.requests.load(Ordering::SeqCst),
        name,
        prompt_tokens,
        max_tokens: request.max_completion_tokens.or(request.max_tokens),
    };
    Reply::begin(engine, asked).await
}

async fn count_tokens(State(engine): State<Arc<Engine>>, body: Bytes) -> Response {
    match read(&engine, &body) {
        Ok((request, _)) => {
            axum::Json(json!({ "input_tokens": words(&request.messages) })).into_response()
        }
        Err(refused) => *refused,
    }
}

async fn embeddings(State(engine): State<Arc<Engine>>, body: Bytes) -> Response {
    let (request, name) = match read(&engine, &body) {
        Ok(read) => read,
        Err(refused) => return *refused,
    };
    let place = engine.enter().await;
    tokio::time::sleep(engine.options.speed.ttft).await;
    let inputs = match &request.input {
        Value::Array(inputs) if inputs.iter().all(|input| !input.is_number()) => inputs.clone(),
        one => vec![one.clone()],
    };
    let tokens = engine.options.speed.prompt_tokens.unwrap_or_else(|| words(&request.input));
    let data: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(index, input)| {
            let embedding = embedding(&name, &input.to_string());
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    drop(place);
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    let answer = json!({"object": "list", "model": name, "data": data, "usage": usage});
    axum::Json(answer).into_response()
}

/// Numbers in -1..1 that follow from model and text alone.
fn embedding(name: &str, text: &str) -> [f64; EMBEDDING_DIMENSIONS] {
    // FNV-1a, then a linear congruential step per dimension.
    let mut state = name
        .bytes()
        .chain([0])
        .chain(text.bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    [(); EMBEDDING_DIMENSIONS].map(|()| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    })
}

/// Words in every text of a prompt: near enough to tokens for a stand-in.
fn words(value: &Value) -> u32 {
    match value {
        Value::String(text) => text.split_whitespace().count() as u32,
        Value::Array(items) => items.iter().map(words).sum(),
        Value::Object(fields) => {
            ["content", "text"].iter().filter_map(|field| fields.get(*field)).map(words).sum()
        }
        Value::Null | Value::Bool(_) => 0,
        Value::Number(_) => 1,
    }
}

async fn models(State(engine): State<Arc<Engine>>) -> Response {
    if !engine.is_ready() {
        return loading();
    }
    let mut models: Vec<Value> = engine
        .options
        .names
        .iter()
        .map(|name| {
            json!({
                "id": name, "object": "model", "created": unix_seconds(), "owned_by": "wharf",
                "root": name, "parent": null, "max_model_len": CONTEXT_LENGTH,
            })
        })
        .collect();
    models.extend(adapters::rows(&engine));
    axum::Json(json!({"object": "list", "data": models})).into_response()
}

/// llama.cpp's word for its slots and their context.
async fn props(State(engine): State<Arc<Engine>>) -> Response {
    if !engine.is_ready() {
        return loading();
    }
    let slots = engine.options.speed.slots;
    let settings = json!({"n_ctx": CONTEXT_LENGTH});
    axum::Json(json!({"default_generation_settings": settings, "total_slots": slots}))
        .into_response()
}

/// Answers 200 asleep too, as vLLM does.
async fn health(State(engine): State<Arc<Engine>>) -> Response {
    if !engine.is_ready() {
        return loading();
    }
    if engine.options.faults.wrong_health {
        return error(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", None, "unhealthy");
    }
    match engine.options.style {
        Style::Llamacpp => axum::Json(json!({"status": "ok"})).into_response(),
        Style::Vllm | Style::Plain | Style::Ollama | Style::Http => StatusCode::OK.into_response(),
    }
}

async fn metrics(State(engine): State<Arc<Engine>>) -> Response {
    let running = engine.running.load(Ordering::SeqCst);
    let waiting = engine.waiting.load(Ordering::SeqCst);
    let cache = (f64::from(running) / f64::from(engine.options.speed.slots.max(1))).min(1.0);
    let mut text = String::new();
    let mut gauge = |name: &str, labels: &str, value: f64| {
        text += &format!("# TYPE {name} gauge\n{name}{labels} {value}\n");
    };
    if engine.options.style == Style::Llamacpp {
        gauge("llamacpp:requests_processing", "", running.into());
        gauge("llamacpp:requests_deferred", "", waiting.into());
    } else {
        let name = engine.options.names.first().map_or("", String::as_str);
        let name = name.replace('\\', "\\\\").replace('"', "\\\"");
        let labels = format!("{{engine=\"0\",model_name=\"{name}\"}}");
        gauge("vllm:num_requests_running", &labels, running.into());
        gauge("vllm:num_requests_waiting", &labels, waiting.into());
        gauge("vllm:kv_cache_usage_perc", &labels, cache);
        text += "# TYPE vllm:engine_sleep_state gauge\n";
        let now = *engine.wakefulness.borrow();
        let states = [
            ("awake", now.is_awake()),
            ("weights_offloaded", now.level == 1),
            ("discard_all", now.level == 2),
        ];
        for (state, holds) in states {
            let labels = format!("engine=\"0\",model_name=\"{name}\",sleep_state=\"{state}\"");
            text += &format!("vllm:engine_sleep_state{{{labels}}} {}\n", u8::from(holds));
        }
    }
    let mut headers = HeaderMap::new();
    let format = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, format);
    (headers, text).into_response()
}
