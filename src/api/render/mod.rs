//! What clients read: the older tools' words, one file each, and everything of ours beside them.
//!
//! | file | words |
//! |---|---|
//! | `swapper` | `status` loaded/unloaded, `ollama_name`, `uptime_hours`, `request_count` |
//! | `pool` | `state` COLD/WARMING/HOT/COOLING/UNLOADING, `ttl_remaining_minutes`, `endpoint` |
//! | `orchestrator` | `current_model`, `in_flight`, `queued`, `last_swap` |
//! | `llama_swap` | `state` stopped/starting/ready/stopping, rows of `/running` and `/api/metrics` |
//! | `own` | `residency` and everything that no older tool has |
//!
//! Where two tools have one path, one answer holds the fields of both.

pub mod llama_swap;
pub mod orchestrator;
pub mod own;
pub mod pool;
pub mod supplied;
pub mod swapper;

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Map, Value};

use crate::config::catalog::{Catalog, ModelSpec};
use crate::orchestrator::view::ModelFacts;
use crate::orchestrator::{Handle, View};
use crate::scheduler::record::ResidencyView;
use crate::units::{ModelName, Time};

pub use swapper::{done, metrics};

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
    pub fn requests(&self, name: &ModelName) -> u64 {
        if let Some(adapter) = self.handle.adapter_use(name) {
            return adapter.granted();
        }
        let before = self.view.models.get(name).map_or(0, |facts| facts.requests_before);
        before + self.handle.gates().get(name).map_or(0, |gate| gate.granted())
    }

    pub fn uptime(&self, name: &ModelName) -> Duration {
        self.view.models.get(name).map_or(Duration::ZERO, |facts| facts.uptime(self.now))
    }

    /// `None` where no ttl runs. By the gate: it knows of the last activity before the owner does.
    pub fn ttl(&self, spec: &ModelSpec) -> Option<Ttl> {
        let view = self.view.model(&spec.name).filter(|view| view.ttl_runs)?;
        let gates = self.handle.gates();
        let gate = gates.get(&spec.name)?;
        let since = if gate.in_flight() == 0 { gate.last_used() } else { self.now };
        let ends = (since + spec.ttl?).max(view.ttl_until.unwrap_or_default());
        Some(Ttl { ends, leaves_at: ends + spec.grace, left: ends.since(self.now) })
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
}

/// When an idle model leaves by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ttl {
    pub ends: Time,
    /// The end of the grace, in which a request still rescues it.
    pub leaves_at: Time,
    /// Zero in the grace.
    pub left: Duration,
}

/// The pool manager's minutes: one decimal.
pub fn minutes(left: Duration) -> f64 {
    (left.as_secs_f64() / 6.0).round() / 10.0
}

/// The model answers, if only its last requests.
pub fn is_loaded(residency: &ResidencyView) -> bool {
    matches!(residency, ResidencyView::Ready | ResidencyView::Draining)
}

/// A row of `GET /models`, and `GET /models/{name}`.
pub fn model(at: &Snapshot<'_>, spec: &ModelSpec) -> Value {
    let mut row = swapper::model(at, spec);
    row.extend(pool::model(at, spec));
    row.extend(own::model(at, spec));
    Value::Object(row)
}

/// `GET /status`.
pub fn status(at: &Snapshot<'_>, healthy: bool) -> Value {
    let mut body = swapper::status(at, healthy);
    body.extend(orchestrator::status(at));
    body.extend(own::status(at));
    Value::Object(body)
}

/// Fields of `GET /health`; the components are beside.
pub fn health(at: &Snapshot<'_>, healthy: bool) -> Map<String, Value> {
    let mut body = swapper::health(at, healthy);
    body.extend(pool::health(at));
    body
}

pub const fn health_word(healthy: bool) -> &'static str {
    if healthy { "healthy" } else { "unhealthy" }
}

pub fn seconds(duration: Duration) -> f64 {
    duration.as_millis() as f64 / 1000.0
}

pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => Map::from_iter([("value".to_owned(), other)]),
    }
}
