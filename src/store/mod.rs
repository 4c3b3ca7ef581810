//! What outlives a restart: the ledger of swaps, activity, learned figures, registered models,
//! patched configuration, extended TTLs.
//!
//! Writes are handed over and never waited for on the way of a request. What must not be lost
//! (registrations, patches, extended TTLs) is answered when it is on disk, or told not to be.

mod disk;
mod keeper;
mod rows;
mod trouble;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::oneshot;

use self::disk::{parsed, text, unix_ms};
use self::keeper::{Keeper, Shared};
use self::rows::{Change, Job, Kind, Place, Rows};
use crate::config::catalog::{ModelSpec, Retention};
use crate::scheduler::event::Learned;
use crate::scheduler::record::SwapRecord;
use crate::units::{ModelName, SwapId};

/// The path that keeps nothing over a restart.
pub const MEMORY: &str = ":memory:";

/// A disk that hangs is not waited for at the start.
const OPEN_WITHIN: Duration = Duration::from_secs(10);
/// Nor by who registers a model or reads old rows.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Nor at the end. Tests share their disk with whatever else runs.
const CLOSE_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 60 } else { 3 });
/// A transaction takes milliseconds.
const HANGS_AFTER: Duration = Duration::from_secs(30);

/// One finished inference request. Never holds prompts or answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Activity {
    /// Counts up from 1 over all runs; given by the store.
    pub id: u64,
    /// When it arrived, in milliseconds since 1970.
    pub arrived_unix_ms: u64,
    /// Of no name, if it never got to one.
    pub model: ModelName,
    /// The name that the client asked for.
    pub requested: String,
    /// Name of the API key.
    pub key: Option<String>,
    pub method: Cow<'static, str>,
    pub path: Cow<'static, str>,
    /// HTTP status of the answer.
    pub status: u16,
    pub content_type: Cow<'static, str>,
    pub request_id: String,
    pub outcome: Cow<'static, str>,
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

/// What earlier runs taught of a model, and of which engine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// [`ModelSpec::shape_hash`] of then; empty: not known.
    #[serde(default)]
    pub spec: String,
    #[serde(flatten)]
    pub learned: Learned,
}

impl Figures {
    /// What they say of the model as it is configured now: bytes are those of one engine only.
    pub fn for_spec(mut self, spec: &ModelSpec) -> Figures {
        let now = spec.shape_hash();
        if self.spec != now {
            self.spec = now;
            self.learned.forget_bytes();
        }
        self
    }
}

/// What a model did in all runs, its finished residencies only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    pub loaded_unix_ms: Option<u64>,
    pub unloaded_unix_ms: Option<u64>,
    pub uptime_ms: u64,
    pub requests: u64,
    pub starts: u64,
    pub restarts: u64,
}

/// How the store does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoreHealth {
    pub ok: bool,
    /// Where rows go, or why they do not, and what that costs.
    pub detail: String,
}

/// Why something could not be kept.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the store cannot keep it: {0}")]
pub struct StoreFault(pub String);

/// Cheap to clone. The file is closed with the last of them, or by [`Store::close`].
#[derive(Clone, Debug)]
pub struct Store(Arc<Handle>);

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    path: Option<PathBuf>,
    ended: Mutex<Option<oneshot::Receiver<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake();
    }
}

impl Default for Store {
    fn default() -> Store {
        Store::in_memory()
    }
}

impl Store {
    /// Keeps everything in memory only.
    pub fn in_memory() -> Store {
        Store(Arc::new(Handle { shared: Arc::default(), path: None, ended: Mutex::default() }))
    }

    /// The store at `path`; `:memory:` keeps nothing over a restart. Never fails: what cannot be
    /// used is said in the log and in [`Store::health`], rows stay in memory, and the file is tried
    /// again. Blocks while an existing file is read.
    pub fn open(path: &Path, retention: Retention) -> Store {
        if path == Path::new(MEMORY) {
            return Store::in_memory();
        }
        let shared = Arc::new(Shared::default());
        shared.lock().place = Place::Disk;
        let keeper = Keeper::new(path.to_owned(), retention, Arc::clone(&shared));
        let (first, opened) = sync_channel(1);
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name("store".into());
        let why = match thread.spawn(move || keeper.run(&first, end)) {
            Err(error) => Some(format!("the thread of the store did not start: {error}")),
            Ok(_) => opened.recv_timeout(OPEN_WITHIN).is_err().then(|| hangs(path, OPEN_WITHIN)),
        };
        if let Some(why) = why {
            tracing::error!("{why}; Wharf goes on without it, and nothing is kept over a restart");
            let mut rows = shared.lock();
            rows.out(&why);
            rows.skip_ids_to(unix_ms());
        }
        let (path, ended) = (Some(path.to_owned()), Mutex::new(Some(ended)));
        Store(Arc::new(Handle { shared, path, ended }))
    }

    /// Whether a file is used at all.
    pub fn is_durable(&self) -> bool {
        self.0.path.is_some()
    }

    pub fn health(&self) -> StoreHealth {
        let rows = self.rows();
        let lost = rows.activity.dropped + rows.swaps.dropped;
        let lost = match lost {
            0 => String::new(),
            _ => format!("; {lost} rows were lost before they could be written"),
        };
        let file = self.0.path.as_deref().unwrap_or(Path::new(MEMORY));
        let busy = rows.busy_since.map(|since| since.elapsed()).filter(|time| *time > HANGS_AFTER);
        match (&rows.place, busy) {
            (Place::Memory, _) => StoreHealth {
                ok: true,
                detail: "in memory only: nothing is kept over a restart".to_owned(),
            },
            (Place::Fault(why), _) => StoreHealth { ok: false, detail: format!("{why}{lost}") },
            (Place::Disk, Some(time)) => {
                StoreHealth { ok: false, detail: format!("{}{lost}", hangs(file, time)) }
            }
            (Place::Disk, None) => {
                StoreHealth { ok: true, detail: format!("{}{lost}", file.display()) }
            }
        }
    }

    /// Gives the row its id. Never blocks on the disk.
    pub fn record_activity(&self, row: Activity) -> u64 {
        self.change(|rows| rows.push_activity(row))
    }

    /// The newest rows with an id above `after`, oldest first. Those of the last few thousand
    /// requests are there.
    pub fn activity(&self, after: u64, limit: usize) -> Vec<Activity> {
        let rows = self.rows();
        let newest = rows.activity.newest().map(|(_, row)| row);
        let mut found: Vec<Activity> =
            newest.take_while(|row| row.id > after).take(limit).cloned().collect();
        found.reverse();
        found
    }

    /// One row, while it is in memory.
    pub fn activity_row(&self, id: u64) -> Option<Activity> {
        let rows = self.rows();
        let mut newest = rows.activity.newest().take_while(|(row, _)| *row >= id);
        newest.find(|(row, _)| *row == id).map(|(_, row)| row.clone())
    }

    /// Never blocks on the disk.
    pub fn record_swap(&self, row: SwapRow) {
        self.change(|rows| rows.push_swap(row));
    }

    /// Ended swaps of all runs, newest first; the last thousand at most.
    pub fn swaps(&self, limit: usize) -> Vec<SwapRow> {
        self.rows().swaps.newest().take(limit).map(|(_, row)| row.clone()).collect()
    }

    /// Ended swaps of all runs that came before `before`, newest first, each once. `None`: there is
    /// no swap `before`. Reads the file for those that are not in memory any more.
    pub async fn swap_page(
        &self,
        model: Option<&ModelName>,
        before: Option<SwapId>,
        limit: usize,
    ) -> Option<Vec<SwapRow>> {
        let below = match before {
            None => u64::MAX,
            Some(id) => self.find(id).await?.0,
        };
        let (mut page, first) = {
            let rows = self.rows();
            let fits = |row: &SwapRow| model.is_none_or(|model| row.record.model == *model);
            let newest = rows.swaps.newest().filter(|(id, row)| *id < below && fits(row));
            let page: Vec<SwapRow> = newest.take(limit).map(|(_, row)| row.clone()).collect();
            (page, rows.swaps.first())
        };
        if page.len() < limit {
            let (model, limit) = (model.cloned(), limit - page.len());
            let (reply, older) = oneshot::channel();
            let below = below.min(first);
            let older = self.read(Job::SwapsBelow { below, model, limit, reply }, older).await;
            page.extend(older.unwrap_or_default());
        }
        Some(page)
    }

    /// The newest ended swap of this id, of whichever run.
    pub async fn swap(&self, id: SwapId) -> Option<SwapRow> {
        self.find(id).await.map(|(_, row)| row)
    }

    /// As [`Store::swap`], of those in memory.
    pub fn recent_swap(&self, id: SwapId) -> Option<SwapRow> {
        self.find_recent(id).map(|(_, row)| row)
    }

    async fn find(&self, id: SwapId) -> Option<(u64, SwapRow)> {
        if let Some(found) = self.find_recent(id) {
            return Some(found);
        }
        let (reply, answer) = oneshot::channel();
        self.read(Job::Swap { id, reply }, answer).await.flatten()
    }

    fn find_recent(&self, id: SwapId) -> Option<(u64, SwapRow)> {
        self.rows().swaps.newest().find(|(_, row)| row.record.id == id).cloned()
    }

    pub fn registered(&self) -> Vec<Registration> {
        self.all(Kind::Registered, |_, body| parsed(body))
    }

    /// On disk when it answers.
    pub async fn put_registered(&self, registration: Registration) -> Result<(), StoreFault> {
        let key = (Kind::Registered, registration.model_id.clone());
        self.commit(Change::Put(key, text(&registration))).await
    }

    /// Also replaces the patches, as some may be of that model: both or neither. On disk when it
    /// answers.
    pub async fn delete_registered(
        &self,
        model_id: &str,
        patches: BTreeMap<String, Value>,
    ) -> Result<(), StoreFault> {
        let gone = Change::Delete((Kind::Registered, model_id.to_owned()));
        self.commit(Change::Both(Box::new(gone), Box::new(replace(patches)))).await
    }

    /// Configuration keys that were patched, by their path (`swap.max_wait`).
    pub fn patches(&self) -> BTreeMap<String, Value> {
        self.all(Kind::Patch, |name, body| Some((name.to_owned(), parsed(body)?)))
    }

    /// Replaces all of them. On disk when it answers.
    pub async fn put_patches(&self, patches: BTreeMap<String, Value>) -> Result<(), StoreFault> {
        self.commit(replace(patches)).await
    }

    /// Extended TTLs that are not over yet.
    pub fn ttl_until(&self) -> BTreeMap<ModelName, u64> {
        let now = unix_ms();
        self.all(Kind::TtlUntil, |name, body| {
            parsed(body).filter(|until| *until > now).map(|until| (ModelName::new(name), until))
        })
    }

    /// `None`: nothing is extended any more. Whoever answers for it waits for [`Store::flush`].
    pub fn put_ttl_until(&self, model: &ModelName, until_unix_ms: Option<u64>) {
        let body = until_unix_ms.map(|until| until.to_string());
        self.change(|rows| rows.set((Kind::TtlUntil, model.to_string()), body));
    }

    pub fn learned(&self) -> BTreeMap<ModelName, Figures> {
        self.all(Kind::Learned, |name, body| Some((ModelName::new(name), parsed(body)?)))
    }

    pub fn put_learned(&self, model: &ModelName, figures: &Figures) {
        let body = Some(text(figures));
        self.change(|rows| rows.set((Kind::Learned, model.to_string()), body));
    }

    pub fn totals(&self) -> BTreeMap<ModelName, Totals> {
        self.all(Kind::Totals, |name, body| Some((ModelName::new(name), parsed(body)?)))
    }

    pub fn put_totals(&self, model: &ModelName, totals: &Totals) {
        let body = Some(text(totals));
        self.change(|rows| rows.set((Kind::Totals, model.to_string()), body));
    }

    /// Ports of the front doors of registered models.
    pub fn doors(&self) -> BTreeMap<ModelName, u16> {
        self.all(Kind::Door, |name, body| Some((ModelName::new(name), parsed(body)?)))
    }

    pub fn put_door(&self, model: &ModelName, port: Option<u16>) {
        let body = port.map(|port| port.to_string());
        self.change(|rows| rows.set((Kind::Door, model.to_string()), body));
    }

    /// What earlier runs taught, from the file at `path`, which is only read. Nothing, if there is
    /// none yet.
    ///
    /// # Errors
    /// The file is no store, or cannot be read.
    pub fn learned_at(path: &Path) -> Result<BTreeMap<ModelName, Figures>, StoreFault> {
        if path == Path::new(MEMORY) || !path.exists() {
            return Ok(BTreeMap::new());
        }
        let loaded = disk::Disk::read_only(path).map_err(|t| StoreFault(t.text(path)))?;
        let learned = loaded.kept.iter().filter(|((kind, _), _)| *kind == Kind::Learned);
        Ok(learned
            .filter_map(|((_, name), body)| Some((ModelName::new(name), parsed(body)?)))
            .collect())
    }

    /// What [`Store::open`] would make of the file at `path`, which is only read.
    pub fn inspect(path: &Path) -> StoreHealth {
        if path == Path::new(MEMORY) {
            return Store::in_memory().health();
        }
        let file = path.display();
        match disk::Disk::read_only(path) {
            Ok(rows) => {
                let kept = rows.kept.len();
                StoreHealth { ok: true, detail: format!("{file} can be read, {kept} entries kept") }
            }
            Err(trouble) if !path.exists() => {
                drop(trouble);
                StoreHealth { ok: true, detail: format!("{file} is made at the first start") }
            }
            Err(trouble) => StoreHealth { ok: false, detail: trouble.text(path) },
        }
    }

    /// Everything that was handed over before is on disk when it answers.
    pub async fn flush(&self) -> Result<(), StoreFault> {
        let (ack, done) = oneshot::channel();
        self.change(|rows| rows.flush(ack));
        self.answer(done).await.unwrap_or_else(|| Err(self.unanswered()))
    }

    /// Writes what is left and closes the file; rows that come later stay in memory.
    /// False: it was given up.
    pub async fn close(&self) -> bool {
        self.change(|rows| rows.closing = true);
        let ended = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(ended) = ended else { return true };
        let in_time = tokio::time::timeout(CLOSE_WITHIN, ended).await.is_ok();
        if !in_time {
            tracing::warn!("the store does not take its last rows: its disk hangs");
        }
        in_time
    }

    async fn commit(&self, change: Change) -> Result<(), StoreFault> {
        let (ack, done) = oneshot::channel();
        self.change(|rows| rows.submit(Job::Change(change, ack)))?;
        self.answer(done).await.unwrap_or_else(|| Err(self.unanswered()))
    }

    /// `None`: the file cannot be read now.
    async fn read<T>(&self, job: Job, reply: oneshot::Receiver<T>) -> Option<T> {
        self.change(|rows| rows.submit(job)).ok()?;
        self.answer(reply).await
    }

    async fn answer<T>(&self, reply: oneshot::Receiver<T>) -> Option<T> {
        tokio::time::timeout(ANSWER_WITHIN, reply).await.ok()?.ok()
    }

    fn unanswered(&self) -> StoreFault {
        let file = self.0.path.as_deref().unwrap_or(Path::new(MEMORY));
        StoreFault(format!("{}; it may be kept later", hangs(file, ANSWER_WITHIN)))
    }

    fn all<T, C: FromIterator<T>>(&self, kind: Kind, read: impl Fn(&str, &str) -> Option<T>) -> C {
        let rows = self.rows();
        let of_kind = rows.kept.iter().filter(|((k, _), _)| *k == kind);
        of_kind.filter_map(|((_, name), body)| read(name, body)).collect()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Rows) -> T) -> T {
        let mut rows = self.rows();
        let had_work = rows.has_work();
        let result = change(&mut rows);
        // The keeper sleeps only while there is nothing to do, or between two transactions.
        let wake = rows.closing || rows.is_urgent() || (!had_work && rows.has_work());
        drop(rows);
        if wake {
            self.0.shared.wake();
        }
        result
    }

    fn rows(&self) -> std::sync::MutexGuard<'_, Rows> {
        self.0.shared.lock()
    }
}

fn replace(patches: BTreeMap<String, Value>) -> Change {
    let bodies = patches.into_iter().map(|(name, value)| (name, value.to_string()));
    Change::Replace(Kind::Patch, bodies.collect())
}

fn hangs(path: &Path, since: Duration) -> String {
    let (file, seconds) = (path.display(), since.as_secs());
    format!("the store {file} does not answer since {seconds} s: check its disk")
}

#[cfg(test)]
mod tests;
