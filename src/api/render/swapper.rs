//! The swapper service's words.

use serde_json::{Map, Value, json};

use super::{Snapshot, health_word, is_loaded, object, seconds};
use crate::config::catalog::{Catalog, ModelSpec, SwapMode};
use crate::scheduler::record::ResidencyView;
use crate::units::ModelName;

fn word(residency: &ResidencyView) -> &'static str {
    if is_loaded(residency) { "loaded" } else { "unloaded" }
}

fn mode(catalog: &Catalog) -> &'static str {
    match catalog.settings.swap.mode {
        SwapMode::MultiActive => "multi-active",
        SwapMode::SingleActive => "single-active",
    }
}

/// Its part of a row of `GET /models`.
pub fn model(at: &Snapshot<'_>, spec: &ModelSpec) -> Map<String, Value> {
    let facts = at.view.models.get(&spec.name).cloned().unwrap_or_default();
    let residency = at.residency(&spec.name);
    object(json!({
        "name": spec.name,
        "ollama_name": spec.served_name(),
        "type": spec.model_type,
        "size_gb": spec.size_gb,
        "priority": spec.priority,
        "status": word(residency),
        "loaded_at": at.loaded_at(&facts),
        "unloaded_at": at.unloaded_at(&facts, residency),
        "total_uptime_seconds": seconds(at.uptime(&spec.name)),
    }))
}

/// Its part of `GET /status`.
pub fn status(at: &Snapshot<'_>, healthy: bool) -> Map<String, Value> {
    let loaded = at.loaded();
    let names: Vec<&ModelName> = at.catalog.models.keys().collect();
    object(json!({
        "status": health_word(healthy),
        "active_model": loaded.first(),
        "available_models": names,
        "loaded_models": loaded,
        "mode": mode(&at.catalog),
        "total_models": names.len(),
    }))
}

/// Its part of `GET /health`.
pub fn health(at: &Snapshot<'_>, healthy: bool) -> Map<String, Value> {
    object(json!({
        "status": health_word(healthy),
        "service": "wharf",
        "version": env!("CARGO_PKG_VERSION"),
        "active_model": at.loaded().first(),
        "mode": mode(&at.catalog),
    }))
}

/// A row of the swapper's `GET /metrics`.
pub fn metrics(at: &Snapshot<'_>, name: &ModelName) -> Value {
    let facts = at.view.models.get(name).cloned().unwrap_or_default();
    let uptime = seconds(at.uptime(name));
    json!({
        "model_name": name,
        "status": word(at.residency(name)),
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
