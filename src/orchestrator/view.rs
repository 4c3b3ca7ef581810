//! What the orchestrator publishes for everyone to read: one immutable snapshot at a time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::runtime::{Foreign, ProgressNow};
use crate::scheduler::event::{Fault, GpuMemory};
use crate::scheduler::record::{ModelView, SchedulerView, SwapRecord};
use crate::store::Totals;
use crate::units::{GpuId, InstanceId, ModelName, RequestId, SwapId, Time};

/// Swaps of this run that the view holds, and rows of one page of `/swaps`.
pub const LEDGER_ROWS_MAX: usize = 1000;

#[derive(Clone, Debug, Default)]
pub struct View {
    pub at: Time,
    pub scheduler: SchedulerView,
    /// What only the orchestrator knows of each model; every configured model has an entry.
    pub models: BTreeMap<ModelName, ModelFacts>,
    /// How far a starting (or pulling) instance is.
    pub progress: BTreeMap<InstanceId, ProgressNow>,
    /// Static facts and the last memory reading, per GPU; empty where there is no GPU.
    pub gpus: Vec<GpuFacts>,
    pub gpu_health: Health,
    /// `None`: no model runs in Docker.
    pub docker_health: Option<Health>,
    pub foreign: Vec<Foreign>,
    /// Files of the state folder that cannot be written, and what that costs.
    pub outages: Vec<String>,
    /// Instances of an earlier run that could not be stopped yet.
    pub leftovers: Vec<Leftover>,
    /// Ended swaps of this run, oldest first; the store has those of all runs.
    pub ledger: Arc<VecDeque<Arc<SwapRecord>>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    pub loaded_at: Option<Time>,
    pub unloaded_at: Option<Time>,
    /// Summed over finished residencies; add the current one.
    pub uptime_before: Duration,
    /// Requests granted before the current instance; add the gate's count.
    pub requests_before: u64,
    /// Starts that ended ready; adoptions and wake-ups are none.
    pub starts: u64,
    /// Those of them that came after an instance died by itself.
    pub restarts: u64,
    pub last_fault: Option<Fault>,
    /// `http://127.0.0.1:18051` while an instance exists.
    pub endpoint: Option<String>,
    /// As the last run left them; its sums are in the figures above.
    pub earlier: Totals,
}

impl ModelFacts {
    /// What earlier runs left of the model.
    pub fn after(earlier: Totals) -> ModelFacts {
        ModelFacts {
            uptime_before: Duration::from_millis(earlier.uptime_ms),
            requests_before: earlier.requests,
            starts: earlier.starts,
            restarts: earlier.restarts,
            earlier,
            ..ModelFacts::default()
        }
    }

    pub fn totals(&self, wall_ms: impl Fn(Time) -> u64) -> Totals {
        Totals {
            loaded_unix_ms: self.loaded_at.map(&wall_ms).or(self.earlier.loaded_unix_ms),
            unloaded_unix_ms: self.unloaded_at.map(&wall_ms).or(self.earlier.unloaded_unix_ms),
            uptime_ms: u64::try_from(self.uptime_before.as_millis()).unwrap_or(u64::MAX),
            requests: self.requests_before,
            starts: self.starts,
            restarts: self.restarts,
        }
    }

    /// Time loaded, summed over all residencies.
    pub fn uptime(&self, now: Time) -> Duration {
        let current = match (self.loaded_at, self.unloaded_at) {
            (Some(loaded), None) => now.since(loaded),
            (Some(loaded), Some(unloaded)) if unloaded < loaded => now.since(loaded),
            _ => Duration::ZERO,
        };
        self.uptime_before + current
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuFacts {
    pub id: GpuId,
    pub uuid: String,
    pub name: String,
    pub memory: Option<GpuMemory>,
    /// 0.0..=1.0
    pub utilization: Option<f32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    pub ok: bool,
    /// `nvml`, `simulated`, `none`, `Docker Engine 26.1.5 (API 1.45)`, or what is wrong and the fix.
    pub detail: String,
}

/// Something that Wharf started, that shall go and that does not.
#[derive(Clone, Debug, PartialEq)]
pub struct Leftover {
    pub instance: InstanceId,
    pub model: ModelName,
    /// `container wharf-ada-7`, `process 4711`
    pub what: String,
    /// Why the last attempt to stop it failed.
    pub fault: Fault,
    pub since: Time,
    pub next_attempt: Time,
}

impl View {
    pub fn model(&self, name: &ModelName) -> Option<&ModelView> {
        self.scheduler.models.iter().find(|model| model.name == *name)
    }

    /// Place in the model's queue, from 1.
    pub fn place(&self, model: &ModelName, request: RequestId) -> Option<usize> {
        let place = self.model(model)?.queue.iter().position(|&waiting| waiting == request)?;
        Some(place + 1)
    }

    /// A swap under way or ended.
    pub fn swap(&self, id: SwapId) -> Option<&SwapRecord> {
        self.scheduler
            .swaps
            .iter()
            .find(|swap| swap.id == id)
            .or_else(|| self.ledger.iter().rev().find(|swap| swap.id == id).map(|swap| &**swap))
    }

    /// Progress of the swap that makes `model` ready, if one is under way.
    pub fn progress_of(&self, model: &ModelName) -> Option<&ProgressNow> {
        self.progress.get(&self.model(model)?.instance?)
    }
}
