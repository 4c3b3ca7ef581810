//! A stand-in for Ollama, written after its public API documentation: one server, many models,
//! loaded and unloaded on request, each with the time at which it leaves by itself.
//!
//! It models what an orchestrator has to live with: loads that take their time, requests that load
//! a model by themselves, and a `keep_alive` that every request sets anew.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{StatusCode, header};
use serde_json::{Value, json};

use super::engine::{Engine, say};
use super::reply::{Asked, Kind, Reply, unix_seconds};
use super::server::Server;

/// "For ever", as Ollama itself writes it: a date that nobody reaches.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// How often models are looked through for those that leave.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const SIZE_WITHOUT_VRAM: u64 = 500 << 20;

struct Ollama {
    engine: Arc<Engine>,
    /// Models that can be loaded; a pull adds to them.
    known: Mutex<Vec<String>>,
    loaded: Mutex<BTreeMap<String, Loaded>>,
    /// One load at a time.
    loading: tokio::sync::Mutex<()>,
}

#[derive(Clone, Debug)]
struct Loaded {
    keep: Duration,
    leaves_at: Instant,
    busy: u32,
}

pub async fn open(engine: &Arc<Engine>) -> io::Result<Server> {
    let ollama = Arc::new(Ollama {
        engine: Arc::clone(engine),
        known: Mutex::new(engine.options.names.clone()),
        loaded: Mutex::default(),
        loading: tokio::sync::Mutex::default(),
    });
    let weak = Arc::downgrade(&ollama);
    tokio::spawn(async move {
        while let Some(ollama) = weak.upgrade() {
            ollama.expire();
            drop(ollama);
            tokio::time::sleep(LOOK_EVERY).await;
        }
    });
    let router = Router::new()
        .route("/", get(|| async { "Ollama is running" }))
        .route("/api/version", get(|| async { axum::Json(json!({"version": "0.0.0-standin"})) }))
        .route("/api/tags", get(tags))
        .route("/api/ps", get(ps))
        .route("/api/show", post(show))
        .route("/api/pull", post(pull))
        .route("/api/generate", post(generate))
        .route("/api/chat", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/chat/completions", post(openai_chat))
        .route("/v1/completions", post(openai_completion))
        .layer(DefaultBodyLimit::max(64 << 20))
        .with_state(ollama);
    let options = &engine.options;
    Server::open(SocketAddr::new(options.host, options.port), router).await
}

/// Ollama's names end in a tag; without one `latest` is meant.
fn tagged(name: &str) -> String {
    if name.contains(':') { name.to_owned() } else { format!("{name}:latest") }
}

fn failed(status: StatusCode, message: &str) -> Response {
    (status, axum::Json(json!({ "error": message }))).into_response()
}

fn timestamp(after: Duration) -> String {
    humantime::format_rfc3339_nanos(SystemTime::now() + after).to_string()
}

impl Ollama {
    fn loaded(&self) -> MutexGuard<'_, BTreeMap<String, Loaded>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, Vec<String>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name as it is listed; `None`: not pulled.
    fn find(&self, asked: &str) -> Option<String> {
        let asked = tagged(asked);
        self.known().iter().map(|name| tagged(name)).find(|name| *name == asked)
    }

    fn expire(&self) {
        let mut loaded = self.loaded();
        let before = loaded.len();
        let now = Instant::now();
        loaded.retain(|name, model| {
            let stays = model.busy > 0 || model.leaves_at > now;
            if !stays {
                say(&format!("unloading {name}"));
            }
            stays
        });
        if loaded.len() != before {
            self.hold(loaded.len());
        }
    }

    fn hold(&self, models: usize) {
        let bytes = crate::units::Bytes(self.engine.vram().0 * models as u64);
        if self.engine.hold(bytes).is_err() {
            say("more models than memory, as asked for");
        }
    }

    /// Makes the model ready and counts one request on it until the guard is dropped.
    async fn enter(self: &Arc<Self>, name: &str, keep: Option<Duration>) -> Busy {
        let options = &self.engine.options;
        let keep = keep.unwrap_or(options.ollama.keep_alive);
        let loading = self.loading.lock().await;
        if !self.loaded().contains_key(name) {
            say(&format!("loading {name}"));
            tokio::time::sleep(options.load.load_time).await;
        }
        {
            let mut loaded = self.loaded();
            if !loaded.contains_key(name) {
                self.make_room(&mut loaded);
            }
            let fresh = Loaded { keep, leaves_at: Instant::now() + keep, busy: 0 };
            let model = loaded.entry(name.to_owned()).or_insert(fresh);
            model.keep = keep;
            model.busy += 1;
            self.hold(loaded.len());
        }
        drop(loading);
        Busy { ollama: Arc::clone(self), name: name.to_owned() }
    }

    /// Ollama has a bound of its own: the idle model that leaves first goes.
    fn make_room(&self, loaded: &mut BTreeMap<String, Loaded>) {
        let most = self.engine.options.ollama.max_loaded as usize;
        while most > 0 && loaded.len() >= most {
            let idle = loaded.iter().filter(|(_, model)| model.busy == 0);
            let first = idle.min_by_key(|(_, model)| model.leaves_at).map(|(name, _)| name.clone());
            match first {
                Some(name) => loaded.remove(&name),
                None => break,
            };
        }
    }
}

struct Busy {
    ollama: Arc<Ollama>,
    name: String,
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(model) = self.ollama.loaded().get_mut(&self.name) {
            model.busy -= 1;
            model.leaves_at = Instant::now() + model.keep;
        }
    }
}

/// Seconds or a duration; below zero: for ever. `None`: the server's own.
fn keep_alive(body: &Value) -> Result<Option<Duration>, String> {
    let seconds = |n: f64| if n < 0.0 { FOREVER } else { Duration::from_secs_f64(n) };
    match body.get("keep_alive") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(number)) => Ok(number.as_f64().map(seconds)),
        Some(Value::String(text)) => match text.parse::<f64>() {
            Ok(number) => Ok(Some(seconds(number))),
            Err(_) if text.starts_with('-') => Ok(Some(FOREVER)),
            Err(_) => humantime::parse_duration(text)
                .map(Some)
                .map_err(|_| format!("time: invalid duration \"{text}\"")),
        },
        Some(_) => Err("keep_alive must be a number or a duration".to_owned()),
    }
}

/// The body, the listed name, and how long the model shall stay.
#[expect(clippy::result_large_err, reason = "answered at once")]
fn read(ollama: &Ollama, body: &[u8]) -> Result<(Value, String, Option<Duration>), Response> {
    let body: Value = serde_json::from_slice(body)
        .map_err(|problem| failed(StatusCode::BAD_REQUEST, &problem.to_string()))?;
    let asked = body.get("model").or(body.get("name")).and_then(Value::as_str).unwrap_or_default();
    let Some(name) = ollama.find(asked) else {
        return Err(failed(StatusCode::NOT_FOUND, &format!("model '{asked}' not found")));
    };
    let keep = keep_alive(&body).map_err(|why| failed(StatusCode::BAD_REQUEST, &why))?;
    Ok((body, name, keep))
}

async fn tags(State(ollama): State<Arc<Ollama>>) -> Response {
    let rows: Vec<Value> = ollama
        .known()
        .iter()
        .map(|name| json!({"name": tagged(name), "model": tagged(name), "size": SIZE_WITHOUT_VRAM}))
        .collect();
    axum::Json(json!({ "models": rows })).into_response()
}

async fn ps(State(ollama): State<Arc<Ollama>>) -> Response {
    ollama.expire();
    let vram = ollama.engine.vram().0;
    let now = Instant::now();
    let rows: Vec<Value> = ollama
        .loaded()
        .iter()
        .map(|(name, model)| {
            let left = model.leaves_at.saturating_duration_since(now);
            json!({
                "name": name, "model": name, "size": vram.max(SIZE_WITHOUT_VRAM),
                "size_vram": vram, "expires_at": timestamp(left),
            })
        })
        .collect();
    axum::Json(json!({ "models": rows })).into_response()
}

async fn show(State(ollama): State<Arc<Ollama>>, body: Bytes) -> Response {
    match read(&ollama, &body) {
        Ok((_, name, _)) => {
            axum::Json(json!({"details": {"family": "standin"}, "model_info": {"name": name}}))
                .into_response()
        }
        Err(refused) => refused,
    }
}

async fn pull(State(ollama): State<Arc<Ollama>>, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let asked = body.get("model").or(body.get("name")).and_then(Value::as_str).unwrap_or_default();
    let refuses = asked.is_empty() || asked.starts_with("missing");
    let mut lines = vec![json!({"status": "pulling manifest"})];
    if refuses {
        lines.push(json!({"error": "pull model manifest: file does not exist"}));
    } else {
        for completed in [0_u64, 250, 500] {
            lines.push(json!({
                "status": "pulling 0123", "digest": "sha256:0123", "total": 500, "completed": completed,
            }));
        }
        lines.push(json!({"status": "success"}));
        ollama.known().push(asked.to_owned());
    }
    ndjson(lines)
}

fn ndjson(lines: Vec<Value>) -> Response {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from(text)).into_response()
}

async fn generate(State(ollama): State<Arc<Ollama>>, body: Bytes) -> Response {
    let (body, name, keep) = match read(&ollama, &body) {
        Ok(read) => read,
        Err(refused) => return refused,
    };
    let prompt = body.get("prompt").and_then(Value::as_str).unwrap_or_default();
    let done = |reason: &str| {
        json!({
            "model": name, "created_at": timestamp(Duration::ZERO), "response": "", "done": true,
            "done_reason": reason,
        })
    };
    if prompt.is_empty() && keep == Some(Duration::ZERO) {
        if let Some(model) = ollama.loaded().get_mut(&name) {
            (model.keep, model.leaves_at) = (Duration::ZERO, Instant::now());
        }
        ollama.expire();
        return axum::Json(done("unload")).into_response();
    }
    let busy = ollama.enter(&name, keep).await;
    if prompt.is_empty() {
        drop(busy);
        return axum::Json(done("load")).into_response();
    }
    spoken(&ollama, &body, &name, |text| json!({ "response": text }))
}

async fn chat(State(ollama): State<Arc<Ollama>>, body: Bytes) -> Response {
    let (body, name, keep) = match read(&ollama, &body) {
        Ok(read) => read,
        Err(refused) => return refused,
    };
    let _busy = ollama.enter(&name, keep).await;
    spoken(&ollama, &body, &name, |text| json!({"message": {"role": "assistant", "content": text}}))
}

/// The answer in Ollama's own shape: a line per token, or one object.
fn spoken(ollama: &Ollama, body: &Value, name: &str, part: impl Fn(&str) -> Value) -> Response {
    let wanted = body.pointer("/options/num_predict").and_then(Value::as_u64);
    let tokens = wanted.unwrap_or(u64::from(ollama.engine.options.speed.reply_tokens));
    let words: Vec<String> = (1..=tokens).map(|n| format!("{name}-{n}")).collect();
    let with = |text: &str, done: bool| {
        let mut line = part(text);
        line["model"] = json!(name);
        line["created_at"] = json!(timestamp(Duration::ZERO));
        line["done"] = json!(done);
        if done {
            line["done_reason"] = json!("stop");
            line["eval_count"] = json!(tokens);
            line["prompt_eval_count"] = json!(1);
        }
        line
    };
    if body.get("stream").and_then(Value::as_bool) == Some(false) {
        return axum::Json(with(&words.join(" "), true)).into_response();
    }
    let mut lines: Vec<Value> = words.iter().map(|word| with(&format!("{word} "), false)).collect();
    lines.push(with("", true));
    ndjson(lines)
}

async fn models(State(ollama): State<Arc<Ollama>>) -> Response {
    let row =
        |name: &String| json!({"id": tagged(name), "object": "model", "created": unix_seconds()});
    let rows: Vec<Value> = ollama.known().iter().map(row).collect();
    axum::Json(json!({"object": "list", "data": rows})).into_response()
}

async fn openai_chat(ollama: State<Arc<Ollama>>, body: Bytes) -> Response {
    openai(ollama, Kind::Chat, &body).await
}

async fn openai_completion(ollama: State<Arc<Ollama>>, body: Bytes) -> Response {
    openai(ollama, Kind::Completion, &body).await
}

/// Loads the model by itself, and sets its `keep_alive` back to the server's own.
async fn openai(State(ollama): State<Arc<Ollama>>, kind: Kind, body: &[u8]) -> Response {
    let (body, name, _) = match read(&ollama, body) {
        Ok(read) => read,
        Err(refused) => return refused,
    };
    let busy = ollama.enter(&name, None).await;
    let engine = Arc::clone(&ollama.engine);
    let flag = |pointer: &str| body.pointer(pointer).and_then(Value::as_bool) == Some(true);
    let asked = Asked {
        kind,
        id: engine.requests.fetch_add(1, Ordering::SeqCst) + 1,
        name,
        prompt_tokens: 1,
        max_tokens: body.get("max_tokens").and_then(Value::as_u64).map(|n| n as u32),
    };
    let reply = Reply::begin(engine, asked).await;
    if !flag("/stream") {
        let whole = reply.whole().await;
        drop(busy);
        return axum::Json(whole).into_response();
    }
    let stream = reply.stream(flag("/stream_options/include_usage"));
    let held = futures_util::StreamExt::map(stream.into_data_stream(), move |frame| {
        let _until_the_end = &busy;
        frame
    });
    let headers = [(header::CONTENT_TYPE, "text/event-stream")];
    (headers, Body::from_stream(held)).into_response()
}
