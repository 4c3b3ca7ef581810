//! What the older tools' clients read, in their words; everything of ours is added beside it.
//!
//! | tool | words |
//! |---|---|
//! | swapper service | `status` loaded/unloaded, `ollama_name`, `uptime_hours`, `request_count` |
//! | model pool manager | `state` COLD/WARMING/HOT/COOLING/UNLOADING, `ttl_remaining_minutes` |
//! | dynamic model orchestrator | `current_model`, `in_flight`, `queued`, `last_swap` |

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::config::catalog::{Catalog, EngineKind, GpuRequest, ModelSpec, RuntimeSpec, SwapMode};
use crate::orchestrator::view::{Leftover, ModelFacts};
use crate::orchestrator::{Handle, View};
use crate::scheduler::record::{ModelView, ResidencyView};
use crate::units::{Bytes, ModelName, Time};

/// One moment of everything that answers are made from.
pub struct Snapshot<'a> {
    pub handle: &'a Handle,
    pub catalog: Arc<Catalog>,
    pub view: Arc<View>,
    pub now: Time,
}

impl Snapshot<'_> {
    pub fn of(handle: &Handle) -> Snapshot<'_> {
        Snapshot { handle, catalog: handle.catalog(), view: handle.view(), now: handle.now() }
    }

    /// RFC 3339 of one of the owner's times.
    pub fn wall(&self, time: Time) -> String {
        humantime::format_rfc3339_millis(self.handle.wall(time)).to_string()
    }

    pub fn residency(&self, name: &ModelName) -> &ResidencyView {
        self.view.model(name).map_or(&ResidencyView::Stopped, |model| &model.residency)
    }

    pub fn in_flight(&self, name: &ModelName) -> u32 {
        match self.handle.adapter_use(name) {
            Some(adapter) => adapter.in_flight(),
            None => self.handle.gates().get(name).map_or(0, |gate| gate.in_flight()),
        }
    }

    pub fn queued(&self, name: &ModelName) -> usize {
        self.view.model(name).map_or(0, |model| model.queue.len())
    }

    /// Models that serve, the one used last first.
    pub fn loaded(&self) -> Vec<&ModelName> {
        let gates = self.handle.gates();
        let mut loaded: Vec<&ModelName> =
            self.catalog.models.keys().filter(|name| is_loaded(self.residency(name))).collect();
        loaded.sort_by_key(|name| {
            std::cmp::Reverse(gates.get(*name).map_or(Time::ZERO, |gate| gate.last_used()))
        });
        loaded
    }

    /// Requests given to the model since its first start.
    fn requests(&self, name: &ModelName) -> u64 {
        if let Some(adapter) = self.handle.adapter_use(name) {
            return adapter.granted();
        }
        let before = self.view.models.get(name).map_or(0, |facts| facts.requests_before);
        before + self.handle.gates().get(name).map_or(0, |gate| gate.granted())
    }

    fn uptime(&self, name: &ModelName) -> Duration {
        self.view.models.get(name).map_or(Duration::ZERO, |facts| facts.uptime(self.now))
    }

    /// When the model last became ready, in this run or an earlier one.
    fn loaded_at(&self, facts: &ModelFacts) -> Option<String> {
        self.wall_or_earlier(facts.loaded_at, facts.earlier.loaded_unix_ms)
    }

    /// When it last left; `None` while it is loaded.
    fn unloaded_at(&self, facts: &ModelFacts, residency: &ResidencyView) -> Option<String> {
        if is_loaded(residency) {
            return None;
        }
        self.wall_or_earlier(facts.unloaded_at, facts.earlier.unloaded_unix_ms)
    }

    fn wall_or_earlier(&self, time: Option<Time>, earlier: Option<u64>) -> Option<String> {
        let earlier = earlier.map(|ms| UNIX_EPOCH + Duration::from_millis(ms));
        let time = time.map(|time| self.handle.wall(time)).or(earlier)?;
        Some(humantime::format_rfc3339_millis(time).to_string())
    }

    /// Until an idle model leaves by its ttl; `None` where no ttl runs.
    fn ttl_remaining(&self, spec: &ModelSpec) -> Option<Duration> {
        let ttl = spec.ttl.filter(|_| !spec.warmup && !spec.pinned)?;
        let gates = self.handle.gates();
        let gate = gates.get(&spec.name)?;
        let idle = match gate.in_flight() {
            0 => self.now.since(gate.last_used()),
            _ => Duration::ZERO,
        };
        Some(ttl.saturating_sub(idle))
    }
}

/// The swapper's `loaded`: the model answers, if only its last requests.
pub fn is_loaded(residency: &ResidencyView) -> bool {
    matches!(residency, ResidencyView::Ready | ResidencyView::Draining)
}

fn swapper_status(residency: &ResidencyView) -> &'static str {
    if is_loaded(residency) { "loaded" } else { "unloaded" }
}

/// COOLING (the grace after a ttl) is a Ready of ours, so it never shows here.
fn pool_state(residency: &ResidencyView) -> &'static str {
    match residency {
        ResidencyView::Stopped
        | ResidencyView::Sleeping { .. }
        | ResidencyView::Failed { .. }
        | ResidencyView::Lost => "COLD",
        ResidencyView::Starting { .. } | ResidencyView::Waking => "WARMING",
        ResidencyView::Ready => "HOT",
        ResidencyView::Draining | ResidencyView::Stopping | ResidencyView::FallingAsleep => {
            "UNLOADING"
        }
    }
}

pub fn mode(catalog: &Catalog) -> &'static str {
    match catalog.settings.swap.mode {
        SwapMode::MultiActive => "multi-active",
        SwapMode::SingleActive => "single-active",
    }
}

/// A row of `GET /models`: the swapper's and the pool manager's fields, and ours.
pub fn model(at: &Snapshot<'_>, spec: &ModelSpec) -> Value {
    let facts = at.view.models.get(&spec.name).cloned().unwrap_or_default();
    let residency = at.residency(&spec.name);
    let mut row = object(json!({
        "name": spec.name,
        "ollama_name": spec.served_name(),
        "type": spec.model_type,
        "size_gb": spec.size_gb,
        "priority": spec.priority,
        "status": swapper_status(residency),
        "loaded_at": at.loaded_at(&facts),
        "unloaded_at": at.unloaded_at(&facts, residency),
        "total_uptime_seconds": seconds(at.uptime(&spec.name)),

        "model_id": spec.name,
        "display_name": spec.display_name.as_deref().unwrap_or(spec.name.as_str()),
        "model_type": spec.model_type,
        "port": facts.endpoint.as_deref().and_then(port_of),
        "state": pool_state(residency),
        // The pool manager's 0: no ttl runs.
        "ttl_remaining_minutes": at
            .ttl_remaining(spec)
            .map_or(0.0, |left| (left.as_secs_f64() / 6.0).round() / 10.0),
        "warmup": spec.warmup,
        "endpoint": facts.endpoint,
        "tags": spec.tags,

        "aliases": spec.aliases,
        "description": spec.description,
        "engine": engine(spec.engine),
        "runtime": runtime(&spec.runtime),
        "adapter_of": spec.adapter.as_ref().map(|adapter| &adapter.of),
        "pinned": spec.pinned,
        "unlisted": spec.unlisted,
        "concurrency": spec.concurrency,
        "ttl_seconds": spec.ttl.map(seconds),
        "gpus_wanted": gpus_wanted(&spec.gpus),
        "request_count": at.requests(&spec.name),
        "in_flight": at.in_flight(&spec.name),
        "starts": facts.starts,
        "restarts": facts.restarts,
        "last_fault": facts.last_fault.map(|fault| json!({
            "cause": fault.kind,
            "message": fault.message,
        })),
    }));
    row.append(&mut residency_fields(at, &spec.name));
    Value::Object(row)
}

/// Where one model is, in our own words.
fn residency_fields(at: &Snapshot<'_>, name: &ModelName) -> Map<String, Value> {
    let view = at.view.model(name);
    let of = |field: fn(&ModelView) -> Value| view.map_or(Value::Null, field);
    let mut fields = object(json!({
        "residency": at.residency(name).as_str(),
        "since": view.map(|model| at.wall(model.since)),
        "instance": of(|model| json!(model.instance.map(|id| id.to_string()))),
        "gpus": of(|model| json!(model.gpus)),
        "vram_bytes_per_gpu": of(|model| json!(model.footprint)),
        "queued": at.queued(name),
        "ready_in_seconds": of(|model| json!(model.ready_in.map(seconds))),
        "waiting_for": of(|model| json!(non_empty(&model.waiting_for))),
        "swap_id": of(|model| json!(model.swap.map(|id| id.to_string()))),
    }));
    let extra = match at.residency(name) {
        ResidencyView::Starting { phase } => json!({ "phase": phase }),
        ResidencyView::Sleeping { level } => json!({ "sleep_level": level }),
        ResidencyView::Failed { retry_at, fault } => json!({
            "retry_at": at.wall(*retry_at),
            "retry_in_seconds": seconds(retry_at.since(at.now)),
            "cause": fault.kind,
            "message": fault.message,
        }),
        ResidencyView::Stopped
        | ResidencyView::Ready
        | ResidencyView::Draining
        | ResidencyView::Stopping
        | ResidencyView::FallingAsleep
        | ResidencyView::Waking
        | ResidencyView::Lost => json!({}),
    };
    fields.append(&mut object(extra));
    if let Some(progress) = at.view.progress_of(name) {
        fields.insert("progress".to_owned(), json!(progress));
    }
    fields
}

/// `GET /status`: the dynamic orchestrator's and the swapper's, and what is under way.
pub fn status(at: &Snapshot<'_>, healthy: bool) -> Value {
    let loaded = at.loaded();
    let names: Vec<&ModelName> = at.catalog.models.keys().collect();
    let models: Map<String, Value> = names
        .iter()
        .map(|name| {
            let mut fields = residency_fields(at, name);
            // `state` is our word here: this map is new, no older tool has it.
            fields.insert("state".to_owned(), json!(at.residency(name).as_str()));
            fields.insert("in_flight".to_owned(), json!(at.in_flight(name)));
            fields.insert("request_count".to_owned(), json!(at.requests(name)));
            (name.to_string(), Value::Object(fields))
        })
        .collect();
    let in_flight: u64 = names.iter().map(|name| u64::from(at.in_flight(name))).sum();
    let under_way = at.view.scheduler.swaps.iter().map(|swap| super::ledger::row(at, swap));
    json!({
        "status": health_word(healthy),
        "active_model": loaded.first(),
        "available_models": names,
        "loaded_models": loaded,
        "mode": mode(&at.catalog),
        "total_models": names.len(),

        "current_model": loaded.first(),
        "current_models": loaded,
        "models": models,
        "in_flight": in_flight,
        "queued": at.view.scheduler.queued,
        "swaps": under_way.collect::<Vec<_>>(),
        "last_swap": at.handle.store().swaps(1).first().map(|swap| super::ledger::ended(at, swap)),
        "no_proof": at.view.scheduler.no_proof,
        "leftovers": at.view.leftovers.iter().map(|left| leftover(at, left)).collect::<Vec<_>>(),
        "time": at.wall(at.now),
    })
}

/// An instance of an earlier run that could not be stopped yet.
fn leftover(at: &Snapshot<'_>, left: &Leftover) -> Value {
    json!({
        "instance": left.instance.to_string(),
        "model": left.model,
        "what": left.what,
        "cause": left.fault.kind,
        "message": left.fault.message,
        "since": at.wall(left.since),
        "retry_in_seconds": seconds(left.next_attempt.since(at.now)),
    })
}

/// Fields of `GET /health` that the swapper and the pool manager have; the components are beside.
pub fn health(at: &Snapshot<'_>, healthy: bool) -> Map<String, Value> {
    let loaded = at.loaded();
    object(json!({
        "status": health_word(healthy),
        "service": "wharf",
        "version": env!("CARGO_PKG_VERSION"),
        "active_model": loaded.first(),
        "mode": mode(&at.catalog),
        "active_models": loaded.len(),
        "total_models": at.catalog.models.len(),
        "total_memory_mb": active_memory(at).as_mib(),
        "available_ports": available_ports(at),
    }))
}

/// GPU memory of the models that are loaded: the pool manager counts what its active models take,
/// not what the machine has. As promised; external models take none here.
fn active_memory(at: &Snapshot<'_>) -> Bytes {
    let models = at.view.scheduler.models.iter();
    let loaded = models.filter(|model| is_loaded(&model.residency));
    loaded.flat_map(|model| model.gpus.iter().map(|_| model.footprint.unwrap_or_default())).sum()
}

pub const fn health_word(healthy: bool) -> &'static str {
    if healthy { "healthy" } else { "unhealthy" }
}

fn available_ports(at: &Snapshot<'_>) -> usize {
    let (first, last) = at.catalog.settings.engine_ports;
    let ports = first..=last;
    let endpoints = at.view.models.values().filter_map(|facts| facts.endpoint.as_deref());
    let taken = endpoints.filter_map(port_of).filter(|port| ports.contains(port)).count();
    ports.len().saturating_sub(taken)
}

/// A row of the swapper's `GET /metrics`.
pub fn metrics(at: &Snapshot<'_>, name: &ModelName) -> Value {
    let facts = at.view.models.get(name).cloned().unwrap_or_default();
    let uptime = seconds(at.uptime(name));
    json!({
        "model_name": name,
        "status": swapper_status(at.residency(name)),
        "loaded_at": at.loaded_at(&facts),
        "unloaded_at": at.unloaded_at(&facts, at.residency(name)),
        "uptime_hours": uptime / 3600.0,
        "request_count": at.requests(name),
        "total_uptime_seconds": uptime,
        "in_flight": at.in_flight(name),
        "queued": at.queued(name),
    })
}

/// The swapper's answer to load and unload.
pub fn done(model: &ModelName, message: String) -> Value {
    json!({ "status": "success", "model": model, "message": message })
}

pub fn seconds(duration: Duration) -> f64 {
    duration.as_millis() as f64 / 1000.0
}

fn engine(kind: EngineKind) -> Value {
    json!(kind)
}

fn runtime(spec: &RuntimeSpec) -> &'static str {
    match spec {
        RuntimeSpec::Docker(_) => "docker",
        RuntimeSpec::Process(_) => "process",
        RuntimeSpec::External(_) => "external",
    }
}

fn gpus_wanted(request: &GpuRequest) -> Value {
    match request {
        GpuRequest::None => json!(0),
        GpuRequest::Count(count) => json!(count),
        GpuRequest::Explicit(which) => json!(which),
    }
}

/// `http://127.0.0.1:18051` → 18051
fn port_of(endpoint: &str) -> Option<u16> {
    endpoint.parse::<http::Uri>().ok()?.port_u16()
}

fn non_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => Map::from_iter([("value".to_owned(), other)]),
    }
}
