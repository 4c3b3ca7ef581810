//! The model pool manager's words.

use serde_json::{Map, Value, json};

use super::{Snapshot, is_loaded, minutes, object, seconds, supplied};
use crate::config::catalog::ModelSpec;
use crate::scheduler::record::ResidencyView;
use crate::units::Bytes;

/// COOLING is its word for the grace after a ttl, in which a request rescues the model: Ready with
/// us.
fn state(at: &Snapshot<'_>, spec: &ModelSpec) -> &'static str {
    match at.residency(&spec.name) {
        ResidencyView::Stopped
        | ResidencyView::Sleeping { .. }
        | ResidencyView::Failed { .. }
        | ResidencyView::Lost => "COLD",
        ResidencyView::Starting { .. } | ResidencyView::Waking => "WARMING",
        ResidencyView::Ready if at.ttl(spec).is_some_and(|ttl| ttl.left.is_zero()) => "COOLING",
        ResidencyView::Ready => "HOT",
        ResidencyView::Draining | ResidencyView::Stopping | ResidencyView::FallingAsleep => {
            "UNLOADING"
        }
    }
}

/// Its part of a row of `GET /models`. `endpoint` is where clients reach the model: its front door,
/// else the gateway.
pub fn model(at: &Snapshot<'_>, spec: &ModelSpec) -> Map<String, Value> {
    let address = supplied::address(at, spec);
    // Its 0: no ttl runs.
    let ttl = at.ttl(spec);
    object(json!({
        "model_id": spec.name,
        "display_name": spec.display_name.as_deref().unwrap_or(spec.name.as_str()),
        "model_type": spec.model_type,
        "port": address.port(),
        "state": state(at, spec),
        "ttl_remaining_minutes": ttl.map_or(0.0, |ttl| minutes(ttl.left)),
        "warmup": spec.warmup,
        "endpoint": format!("{}://{address}", at.catalog.settings.scheme()),
        "tags": spec.tags,
    }))
}

/// `GET /models/{id}/health`; for readers, as a fault's message may quote its log. The second: it is
/// ready.
pub fn model_health(at: &Snapshot<'_>, spec: &ModelSpec) -> (Value, bool) {
    let residency = at.residency(&spec.name);
    let facts = at.view.models.get(&spec.name).cloned().unwrap_or_default();
    let loaded = facts.loaded_at.filter(|_| is_loaded(residency));
    let body = json!({
        "model": spec.name,
        "status": residency.as_str(),
        "state": state(at, spec),
        "uptime_seconds": loaded.map_or(0.0, |since| seconds(at.now.since(since))),
        "requests_served": at.requests(&spec.name),
        "port": supplied::address(at, spec).port(),
        "in_flight": at.in_flight(&spec.name),
        "queued": at.queued(&spec.name),
        "ttl_remaining_minutes": at.ttl(spec).map_or(0.0, |ttl| minutes(ttl.left)),
        "last_fault": facts.last_fault.map(|fault| json!({
            "cause": fault.kind,
            "message": fault.message,
        })),
    });
    (body, matches!(residency, ResidencyView::Ready))
}

/// Its part of `GET /health`.
pub fn health(at: &Snapshot<'_>) -> Map<String, Value> {
    object(json!({
        "active_models": at.loaded().len(),
        "total_models": at.catalog.models.len(),
        "total_memory_mb": active_memory(at).as_mib(),
        "available_ports": supplied::available_ports(at),
    }))
}

/// GPU memory of the models that are loaded: the pool manager counts what its active models take,
/// not what the machine has. As promised; external models take none here.
fn active_memory(at: &Snapshot<'_>) -> Bytes {
    let models = at.view.scheduler.models.iter();
    let loaded = models.filter(|model| is_loaded(&model.residency));
    loaded.flat_map(|model| model.gpus.iter().map(|_| model.footprint.unwrap_or_default())).sum()
}
