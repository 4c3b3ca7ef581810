//! The dynamic model orchestrator's words.

use serde_json::{Map, Value, json};

use super::{Snapshot, object};
use crate::api::ledger;

/// Its part of `GET /status`.
pub fn status(at: &Snapshot<'_>) -> Map<String, Value> {
    let loaded = at.loaded();
    let in_flight: u64 = at.catalog.models.keys().map(|name| u64::from(at.in_flight(name))).sum();
    object(json!({
        "current_model": loaded.first(),
        "current_models": loaded,
        "in_flight": in_flight,
        "queued": at.view.scheduler.queued,
        "last_swap": at.handle.store().swaps(1).first().map(|swap| ledger::ended(at, swap)),
    }))
}
