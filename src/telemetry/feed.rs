//! What happens, as typed news in one order: the source of `GET /events` and `GET /api/events`.
//!
//! The latest entries are kept, so that a reader who was cut off goes on where it was; whoever was
//! away for longer is told that it missed something. Nobody waits for a reader.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::scheduler::record::{Phase, SwapCause, SwapKind};
use crate::units::ModelName;

/// Entries kept for readers who come back.
pub const ENTRIES_MAX: usize = 2048;
/// Entries that a reader may fall behind.
const LIVE_MAX: usize = 1024;

/// One thing that happened. Serialises to the fields of its SSE data.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum News {
    ModelState {
        model: ModelName,
        state: &'static str,
        before: &'static str,
        instance: Option<String>,
        swap_id: Option<String>,
        /// Of a failure.
        cause: Option<&'static str>,
        message: Option<String>,
    },
    SwapBegan {
        swap_id: String,
        model: ModelName,
        kind: SwapKind,
        cause: SwapCause,
        decision: String,
        evicted: Vec<ModelName>,
    },
    SwapPhase {
        swap_id: String,
        model: ModelName,
        phase: Phase,
    },
    SwapEnded {
        swap_id: String,
        model: ModelName,
        result: &'static str,
        seconds: f64,
        /// Why it failed or was called off.
        message: Option<String>,
    },
    Reloaded {
        changes: String,
    },
    Health {
        part: &'static str,
        ok: bool,
        detail: String,
    },
    /// A request ended; its row is in the store.
    Activity {
        id: u64,
    },
}

impl News {
    /// The SSE event's name.
    pub const fn kind(&self) -> &'static str {
        match self {
            News::ModelState { .. } => "model_state",
            News::SwapBegan { .. } => "swap_began",
            News::SwapPhase { .. } => "swap_phase",
            News::SwapEnded { .. } => "swap_ended",
            News::Reloaded { .. } => "reloaded",
            News::Health { .. } => "health",
            News::Activity { .. } => "activity",
        }
    }
}

#[derive(Debug)]
pub struct Entry {
    seq: u64,
    at: SystemTime,
    pub news: News,
}

impl Entry {
    /// The news with the time at which it came.
    pub fn data(&self) -> Value {
        let time = humantime::format_rfc3339_millis(self.at).to_string();
        let mut fields = Map::from_iter([("time".to_owned(), Value::String(time))]);
        if let Ok(Value::Object(news)) = serde_json::to_value(&self.news) {
            fields.extend(news);
        }
        Value::Object(fields)
    }
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Feed(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Tells entries of this run from those of another: milliseconds since 1970 at its begin.
    run: u64,
    kept: Mutex<Kept>,
    live: broadcast::Sender<Arc<Entry>>,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    entries: VecDeque<Arc<Entry>>,
}

/// What a reader gets first.
#[derive(Debug)]
pub struct Followed {
    /// Entries between the reader's last one and these are gone (or were another run's).
    pub missed: bool,
    pub entries: Vec<Arc<Entry>>,
    pub live: broadcast::Receiver<Arc<Entry>>,
}

impl Default for Feed {
    fn default() -> Feed {
        let run = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let (live, _) = broadcast::channel(LIVE_MAX);
        Feed(Arc::new(Shared {
            run: u64::try_from(run).unwrap_or(u64::MAX),
            kept: Mutex::default(),
            live,
            closed: CancellationToken::new(),
        }))
    }
}

impl Feed {
    pub fn publish(&self, news: News) {
        let mut kept = self.kept();
        kept.last += 1;
        let entry = Arc::new(Entry { seq: kept.last, at: SystemTime::now(), news });
        kept.entries.push_back(Arc::clone(&entry));
        if kept.entries.len() > ENTRIES_MAX {
            kept.entries.pop_front();
        }
        // Sent under the lock, so that `follow` misses and repeats nothing. No receiver is fine.
        let _ = self.0.live.send(entry);
    }

    /// The SSE id of an entry.
    pub fn id(&self, entry: &Entry) -> String {
        format!("{:x}-{}", self.0.run, entry.seq)
    }

    /// From now on, or from behind the entry whose id a reader saw last.
    pub fn follow(&self, last_id: Option<&str>) -> Followed {
        let kept = self.kept();
        let live = self.0.live.subscribe();
        let Some(last_id) = last_id else {
            return Followed { missed: false, entries: Vec::new(), live };
        };
        let seen = self.seq_of(last_id).filter(|seq| *seq <= kept.last);
        let first = kept.entries.front().map_or(kept.last + 1, |entry| entry.seq);
        let missed = seen.is_none_or(|seen| seen + 1 < first);
        let after = seen.unwrap_or(0);
        let entries = kept.entries.iter().filter(|entry| entry.seq > after).cloned().collect();
        Followed { missed, entries, live }
    }

    /// `None`: another run's, or none of ours.
    fn seq_of(&self, id: &str) -> Option<u64> {
        let (run, seq) = id.trim().split_once('-')?;
        let run = u64::from_str_radix(run, 16).ok()?;
        seq.parse().ok().filter(|_| run == self.0.run)
    }

    /// Ends every stream: Wharf is about to go.
    pub fn close(&self) {
        self.0.closed.cancel();
    }

    pub fn closed(&self) -> CancellationToken {
        self.0.closed.clone()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(followed: &Followed) -> Vec<u64> {
        let ids = followed.entries.iter().map(|entry| match entry.news {
            News::Activity { id } => id,
            _ => 0,
        });
        ids.collect()
    }

    #[tokio::test]
    async fn a_reader_goes_on_where_it_was_cut_off() {
        let feed = Feed::default();
        let mut first = feed.follow(None);
        for id in 1..=5 {
            feed.publish(News::Activity { id });
        }
        first.live.recv().await.expect("the first");
        let second = first.live.recv().await.expect("the second");
        let again = feed.follow(Some(&feed.id(&second)));
        assert_eq!((ids(&again), again.missed), (vec![3, 4, 5], false));
        let all = feed.follow(Some(&format!("{:x}-0", feed.0.run)));
        assert_eq!((ids(&all), all.missed), (vec![1, 2, 3, 4, 5], false));
        assert!(ids(&feed.follow(None)).is_empty());
    }

    #[test]
    fn what_is_gone_and_what_another_run_said_counts_as_missed() {
        let feed = Feed::default();
        for id in 1..=(ENTRIES_MAX as u64 + 10) {
            feed.publish(News::Activity { id });
        }
        let late = feed.follow(Some(&format!("{:x}-3", feed.0.run)));
        assert_eq!((ids(&late).len(), late.missed), (ENTRIES_MAX, true));
        for other in ["1-3", "nonsense", "-", &format!("{:x}-999999", feed.0.run)] {
            let followed = feed.follow(Some(other));
            assert!(followed.missed, "{other}");
            assert_eq!(followed.entries.len(), ENTRIES_MAX, "{other}");
        }
    }

    #[test]
    fn data_is_flat_and_has_its_time() {
        let feed = Feed::default();
        feed.publish(News::Health { part: "gpu", ok: false, detail: "gone".to_owned() });
        let entry = feed.follow(Some("x")).entries.remove(0);
        assert_eq!(entry.news.kind(), "health");
        let data = entry.data();
        assert_eq!((&data["part"], &data["ok"]), (&"gpu".into(), &false.into()));
        assert!(data["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{data}");
    }
}
