//! Who is being served or waits: every inference request from its admission to its last byte, to be
//! listed, and to be cancelled by its id.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use futures_util::task::AtomicWaker;
use http::HeaderValue;

use crate::units::{ModelName, Time};

/// Requests come and go on all cores: each takes one of these locks twice, for a moment.
const SHARDS: usize = 16;

/// Cheap to clone; all clones are one registry.
#[derive(Clone, Debug, Default)]
pub struct InFlight(Arc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    last: AtomicU64,
    shards: [Mutex<BTreeMap<u64, Arc<Entry>>>; SHARDS],
}

impl Registry {
    fn shard(&self, id: u64) -> MutexGuard<'_, BTreeMap<u64, Arc<Entry>>> {
        let shard = usize::try_from(id).unwrap_or(0) % SHARDS;
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of a request at its admission.
#[derive(Clone, Debug)]
pub struct Who {
    /// As in `X-Request-Id`.
    pub request_id: HeaderValue,
    pub model: ModelName,
    pub requested: String,
    /// Name of the API key.
    pub key: Option<String>,
    pub path: Cow<'static, str>,
    pub arrived: Time,
}

/// One request.
#[derive(Debug)]
pub struct Entry {
    /// Counts up from 1 in this process.
    pub id: u64,
    pub who: Who,
    /// The model that is asked now: of a route, not always the first.
    model: Mutex<ModelName>,
    forwarded: AtomicBool,
    bytes: AtomicU64,
    cancelled: AtomicBool,
    waker: AtomicWaker,
}

impl Entry {
    pub fn model(&self) -> ModelName {
        self.model.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `queued` until a lease is held, then `forwarded`.
    pub fn stage(&self) -> &'static str {
        if self.forwarded.load(Ordering::Relaxed) { "forwarded" } else { "queued" }
    }

    /// Of the answer's body, so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl InFlight {
    pub fn enter(&self, who: Who) -> Ticket {
        let id = self.0.last.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::new(Entry {
            id,
            model: Mutex::new(who.model.clone()),
            who,
            forwarded: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        self.0.shard(id).insert(id, Arc::clone(&entry));
        Ticket { registry: Arc::clone(&self.0), entry }
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<Arc<Entry>> {
        let mut all = Vec::new();
        for shard in &self.0.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.values().cloned());
        }
        all.sort_unstable_by_key(|entry| entry.id);
        all
    }

    pub fn count(&self) -> usize {
        let shards = self.0.shards.iter();
        shards.map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    /// False: no such request, or it has ended.
    pub fn cancel(&self, id: u64) -> bool {
        let entry = self.0.shard(id).get(&id).cloned();
        let Some(entry) = entry else { return false };
        entry.cancelled.store(true, Ordering::Release);
        entry.waker.wake();
        true
    }
}

/// A request's place in the registry; it ends when dropped.
#[derive(Debug)]
pub struct Ticket {
    registry: Arc<Registry>,
    entry: Arc<Entry>,
}

impl Ticket {
    pub fn forwarded(&self) {
        self.entry.forwarded.store(true, Ordering::Relaxed);
    }

    /// Another model is asked.
    pub fn moved(&self, model: ModelName) {
        *self.entry.model.lock().unwrap_or_else(PoisonError::into_inner) = model;
        self.entry.forwarded.store(false, Ordering::Relaxed);
    }

    pub fn sent(&self, bytes: usize) {
        self.entry.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn cancel(&self) -> Cancel {
        Cancel(Some(Arc::clone(&self.entry)))
    }
}

/// An operator's wish that a request ends, as the request hears it. By default there is none.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Option<Arc<Entry>>);

impl Cancel {
    pub fn is_wished(&self) -> bool {
        self.0.as_ref().is_some_and(|entry| entry.cancelled.load(Ordering::Acquire))
    }

    /// One place waits for it at a time: who began last.
    pub async fn wished(&self) {
        std::future::poll_fn(|cx| {
            if let Some(entry) = &self.0 {
                entry.waker.register(cx.waker());
            }
            if self.is_wished() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.registry.shard(self.entry.id).remove(&self.entry.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(requested: &str) -> Who {
        Who {
            request_id: HeaderValue::from_static("r"),
            model: "mistral".into(),
            requested: requested.to_owned(),
            key: None,
            path: Cow::Borrowed("/v1/chat/completions"),
            arrived: Time::ZERO,
        }
    }

    #[test]
    fn requests_are_listed_until_they_end() {
        let in_flight = InFlight::default();
        let tickets: Vec<Ticket> = (0..40).map(|n| in_flight.enter(who(&n.to_string()))).collect();
        let ids: Vec<u64> = in_flight.list().iter().map(|entry| entry.id).collect();
        assert_eq!(ids, (1..=40).collect::<Vec<u64>>());
        tickets[2].forwarded();
        tickets[2].sent(7);
        let third = &in_flight.list()[2];
        assert_eq!((third.stage(), third.bytes()), ("forwarded", 7));
        assert_eq!(in_flight.list()[3].stage(), "queued");
        drop(tickets);
        assert_eq!((in_flight.list().len(), in_flight.count()), (0, 0));
    }

    #[test]
    fn only_the_one_that_is_meant_is_cancelled() {
        let in_flight = InFlight::default();
        let (first, second) = (in_flight.enter(who("a")), in_flight.enter(who("b")));
        assert!(in_flight.cancel(2));
        assert!(!first.cancel().is_wished() && second.cancel().is_wished());
        drop(second);
        assert!(!in_flight.cancel(2), "it has ended");
        assert!(!in_flight.cancel(u64::MAX));
    }
}
