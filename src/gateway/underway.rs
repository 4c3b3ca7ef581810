//! Work that outlasts its request: a server such as ComfyUI answers at once and queues the work.
//! While its queue says that something is under way, one lease is held for it: so the model counts
//! as busy, its TTL begins when the queue is empty, and a drain waits for it up to its deadline.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::auth;
use super::forward::{self, Outgoing};
use crate::config::catalog::{EngineKind, ModelSpec};
use crate::http1::Lines;
use crate::orchestrator::Lease;
use crate::units::InstanceId;

/// Between two looks, growing from the first to the second.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
const LOOK_MAX: Duration = Duration::from_secs(5);
/// Twice in a row, as work may be on its way from one list to the next.
const EMPTY_LOOKS: u32 = 2;
/// A server that does not tell its queue any more is not held for it.
const FAILED_LOOKS_MAX: u32 = 10;
/// A queue that never empties is a fault of that server, no reason to keep the model for ever.
const WORK_MAX: Duration = Duration::from_secs(6 * 3600);
/// ComfyUI lists whole workflows.
const BODY_BYTES_MAX: usize = 16 << 20;
const DEPTH_MAX: u8 = 4;

/// One watcher per instance, however many requests bring it work.
#[derive(Debug, Default)]
pub struct Watched(Mutex<BTreeMap<InstanceId, Entry>>);

#[derive(Clone, Debug)]
struct Entry {
    /// Of the watcher's lease: cut, that watcher is as good as gone.
    cut: CancellationToken,
    /// Requests that may still bring work.
    open: u32,
    /// Requests that did: a watcher that saw an empty queue before the last of them looks again.
    ended: u64,
}

impl Watched {
    fn entries(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self, instance: InstanceId) -> u64 {
        self.entries().get(&instance).map_or(0, |entry| entry.ended)
    }

    /// Whether somebody has to begin watching.
    fn enter(&self, instance: InstanceId, cut: &CancellationToken) -> bool {
        let mut entries = self.entries();
        let known = entries.get_mut(&instance).filter(|entry| !entry.cut.is_cancelled());
        if let Some(entry) = known {
            entry.open += 1;
            return false;
        }
        entries.insert(instance, Entry { cut: cut.clone(), open: 1, ended: 0 });
        true
    }

    fn request_ended(&self, instance: InstanceId) {
        if let Some(entry) = self.entries().get_mut(&instance) {
            entry.open = entry.open.saturating_sub(1);
            entry.ended += 1;
        }
    }

    /// The watcher leaves, unless a request came or ended since `seen`.
    fn leave(&self, instance: InstanceId, seen: u64) -> bool {
        let mut entries = self.entries();
        match entries.get(&instance) {
            Some(entry) if entry.open > 0 || entry.ended != seen => false,
            _ => {
                entries.remove(&instance);
                true
            }
        }
    }

    /// The watcher is at its end whatever there is; an entry made after its cut is another's.
    fn give_up(&self, instance: InstanceId, was_cut: bool) {
        let mut entries = self.entries();
        let is_mine = |entry: &Entry| entry.cut.is_cancelled() == was_cut;
        if entries.get(&instance).is_some_and(is_mine) {
            entries.remove(&instance);
        }
    }
}

/// Where a server tells its queue.
#[derive(Clone, Debug)]
pub struct Queue {
    pub watched: Arc<Watched>,
    pub path: String,
}

/// Of `engine: http`: whether a request is work, and where to see when that is done. Of all other
/// engines every request is.
pub fn work_of(
    watched: &Arc<Watched>,
    spec: &ModelSpec,
    method: &Method,
    path: &str,
) -> (bool, Option<Queue>) {
    if spec.engine != EngineKind::Http {
        return (true, None);
    }
    let Some(service) = &spec.http else { return (false, None) };
    let is_work = service.activity.iter().any(|rule| {
        rule.method.as_ref().is_none_or(|asked| asked == method) && auth::matches(&rule.path, path)
    });
    let queue = service.queue.as_ref().filter(|_| is_work);
    let queue = queue.map(|path| Queue { watched: Arc::clone(watched), path: path.clone() });
    (is_work, queue)
}

/// A request that may bring work: until the head of its answer, or until its client leaves.
#[derive(Debug)]
pub struct Following {
    watched: Arc<Watched>,
    instance: InstanceId,
}

impl Queue {
    /// Has the instance of `lease` watched from now on.
    pub fn follow(&self, lease: &Lease) -> Following {
        let instance = lease.gate().instance;
        if self.watched.enter(instance, lease.cut()) {
            tokio::spawn(watch(Arc::clone(&self.watched), lease.another(), self.path.clone()));
        }
        Following { watched: Arc::clone(&self.watched), instance }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.watched.request_ended(self.instance);
    }
}

async fn watch(watched: Arc<Watched>, lease: Lease, path: String) {
    let (cut, instance) = (lease.cut().clone(), lease.gate().instance);
    tokio::select! {
        () = cut.cancelled() => watched.give_up(instance, true),
        has_left = until_empty(&watched, &lease, &path) => if !has_left {
            watched.give_up(instance, false);
        },
    }
}

/// Whether it left as one does whose queue is empty.
async fn until_empty(watched: &Watched, lease: &Lease, path: &str) -> bool {
    let (instance, model) = (lease.gate().instance, lease.gate().model.clone());
    let until = Instant::now() + WORK_MAX;
    let (mut every, mut empty, mut failed) = (LOOK_EVERY.0, 0, 0);
    loop {
        sleep(every).await;
        every = (every * 3 / 2).min(LOOK_EVERY.1);
        let seen = watched.ended(instance);
        match look(lease, path).await {
            Ok(true) => (empty, failed) = (0, 0),
            Ok(false) => (empty, failed) = (empty + 1, 0),
            Err(why) => {
                (empty, failed) = (0, failed + 1);
                if failed >= FAILED_LOOKS_MAX {
                    tracing::warn!(%model, path, "its queue cannot be read: {why}");
                    return false;
                }
            }
        }
        if empty > 0 {
            every = LOOK_EVERY.0;
        }
        if empty >= EMPTY_LOOKS && watched.leave(instance, seen) {
            return true;
        }
        if Instant::now() >= until {
            tracing::warn!(%model, path, "its queue was never empty in {WORK_MAX:?}: let go");
            return false;
        }
    }
}

/// Whether work is under way.
async fn look(lease: &Lease, path: &str) -> Result<bool, String> {
    let question = Outgoing {
        method: Method::GET,
        path_and_query: path.to_owned().into(),
        headers: Lines::default(),
        body: Bytes::new(),
        hops: 0,
    };
    let answer = forward::send(lease, &question, Instant::now(), LOOK_MAX).await;
    let answer = answer.map_err(|failure| format!("{failure:?}"))?;
    if !answer.status.is_success() {
        return Err(format!("it answered {}", answer.status));
    }
    let body = timeout(LOOK_MAX, Limited::new(answer.body, BODY_BYTES_MAX).collect()).await;
    let body = match body {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => return Ok(true),
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => return Err(format!("its answer took longer than {LOOK_MAX:?}")),
    };
    let value: Value = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
    Ok(is_busy(&value, 0))
}

/// Something under `running`, `pending` or `queue…`: ComfyUI's `queue_running` and
/// `queue_pending`, and what others call alike.
fn is_busy(value: &Value, depth: u8) -> bool {
    let Value::Object(fields) = value else { return false };
    fields.iter().any(|(key, value)| {
        let tells = matches!(key.as_str(), "running" | "pending") || key.starts_with("queue");
        let says = match value {
            Value::Array(items) => !items.is_empty(),
            Value::Number(number) => number.as_f64().is_some_and(|number| number > 0.0),
            Value::Bool(is_so) => *is_so,
            Value::Null | Value::String(_) | Value::Object(_) => false,
        };
        (tells && says) || (depth < DEPTH_MAX && is_busy(value, depth + 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_counts_as_work_under_way() {
        for (value, busy) in [
            (json!({"queue_running": [], "queue_pending": []}), false),
            (json!({"queue_running": [[1, "id"]], "queue_pending": []}), true),
            (json!({"queue_running": [], "queue_pending": [1]}), true),
            (json!({"exec_info": {"queue_remaining": 2}}), true),
            (json!({"exec_info": {"queue_remaining": 0}}), false),
            (json!({"running": 1}), true),
            (json!({"pending": false, "running": true}), true),
            (json!({"done": [1], "total": 3, "queue": "idle"}), false),
            (json!([{"queue_running": [1]}]), false),
        ] {
            assert_eq!(is_busy(&value, 0), busy, "{value}");
        }
    }

    #[test]
    fn a_watcher_does_not_leave_behind_what_came_meanwhile() {
        let (watched, one) = (Arc::new(Watched::default()), InstanceId(1));
        let cut = CancellationToken::new();
        assert!(watched.enter(one, &cut));
        assert!(!watched.enter(one, &cut), "it is watched already");
        watched.request_ended(one);
        let seen = watched.ended(one);
        assert!(!watched.leave(one, seen), "a request is open");
        watched.request_ended(one);
        assert!(!watched.leave(one, seen), "it ended after the look");
        assert!(watched.leave(one, watched.ended(one)));
        assert!(watched.entries().is_empty());
    }

    #[test]
    fn after_a_cut_the_next_request_is_watched_anew() {
        let (watched, one) = (Watched::default(), InstanceId(1));
        let (before, after) = (CancellationToken::new(), CancellationToken::new());
        assert!(watched.enter(one, &before));
        before.cancel();
        assert!(watched.enter(one, &after));
        watched.give_up(one, true);
        assert_eq!(watched.entries().len(), 1, "the entry is the new watcher's");
        watched.give_up(one, false);
        assert!(watched.entries().is_empty());
    }
}
