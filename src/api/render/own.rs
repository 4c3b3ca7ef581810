//! Wharf's own words.

use serde_json::{Map, Value, json};

use super::{Snapshot, object, seconds};
use crate::api::ledger;
use crate::config::catalog::{GpuRequest, ModelSpec};
use crate::orchestrator::view::Leftover;
use crate::scheduler::record::{ModelView, ResidencyView};
use crate::units::ModelName;

/// What no older tool has in a row of `GET /models`.
pub fn model(at: &Snapshot<'_>, spec: &ModelSpec) -> Map<String, Value> {
    let facts = at.view.models.get(&spec.name).cloned().unwrap_or_default();
    let view = at.view.model(&spec.name);
    let mut row = object(json!({
        "aliases": spec.aliases,
        "description": spec.description,
        "engine": spec.engine,
        "engine_endpoint": facts.endpoint,
        "runtime": spec.runtime.as_str(),
        "adapter_of": spec.adapter.as_ref().map(|adapter| &adapter.of),
        "pinned": view.map_or(spec.pinned, |view| view.pinned),
        "kept": view.is_some_and(|view| view.kept),
        "unlisted": spec.unlisted,
        "registered": spec.registered,
        "concurrency": spec.concurrency,
        "ttl_seconds": spec.ttl.map(seconds),
        "grace_seconds": seconds(spec.grace),
        "leaves_at": at.ttl(spec).map(|ttl| at.wall(ttl.leaves_at)),
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
    row
}

/// What no older tool has in `GET /status`.
pub fn status(at: &Snapshot<'_>) -> Map<String, Value> {
    let models: Map<String, Value> = at
        .catalog
        .models
        .keys()
        .map(|name| {
            let mut fields = residency_fields(at, name);
            // `state` is our word here: this map is new, no older tool has it.
            fields.insert("state".to_owned(), json!(at.residency(name).as_str()));
            fields.insert("in_flight".to_owned(), json!(at.in_flight(name)));
            fields.insert("request_count".to_owned(), json!(at.requests(name)));
            (name.to_string(), Value::Object(fields))
        })
        .collect();
    let under_way = at.view.scheduler.swaps.iter().map(|swap| ledger::row(at, swap));
    object(json!({
        "models": models,
        "swaps": under_way.collect::<Vec<_>>(),
        "preload": preload(at),
        "no_proof": at.view.scheduler.no_proof,
        "leftovers": at.view.leftovers.iter().map(|left| leftover(at, left)).collect::<Vec<_>>(),
        "time": at.wall(at.now),
    }))
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

/// Models that are loaded before anybody asks: how many are, and who is not and why.
fn preload(at: &Snapshot<'_>) -> Value {
    let preload = at.view.preload(&at.catalog);
    json!({
        "done": preload.done.len(),
        "total": preload.total(),
        "loading": preload.loading,
        "waiting": preload.waiting,
        "failed": preload.failed,
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

fn gpus_wanted(request: &GpuRequest) -> Value {
    match request {
        GpuRequest::None => json!(0),
        GpuRequest::Count(count) => json!(count),
        GpuRequest::Explicit(which) => json!(which),
    }
}

fn non_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
