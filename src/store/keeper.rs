//! The one thread that has the file open: it writes what is not on disk yet, a transaction for
//! everything that came meanwhile, and tries again while the file cannot be used.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::disk::{Disk, unix_ms};
use super::rows::{Batch, Job, Place, Rows};
use super::trouble::Trouble;
use crate::config::catalog::Retention;

/// From one transaction of history to the next: what comes meanwhile shares it. A crash loses at
/// most this much of it.
const PACE: Duration = Duration::from_millis(200);
/// After a full one: a flood of requests must not keep the disk and a core busy. What comes faster
/// than the transactions take it is in memory (and in the metrics) only.
const PACE_OF_FLOOD: Duration = Duration::from_secs(1);
/// From a fault to the next attempt.
const AGAIN: Duration = Duration::from_secs(2);
const PRUNE_FIRST: Duration = Duration::from_secs(10);
const PRUNE_EVERY: Duration = Duration::from_secs(60);
/// While there is more to delete.
const PRUNE_MORE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct Shared {
    rows: Mutex<Rows>,
    changed: Condvar,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Rows> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wake(&self) {
        self.changed.notify_one();
    }

    /// Until `ready`, at most until `until`.
    fn wait(&self, until: Instant, ready: impl Fn(&Rows) -> bool) -> MutexGuard<'_, Rows> {
        let time = until.saturating_duration_since(Instant::now());
        let wait = self.changed.wait_timeout_while(self.lock(), time, |rows| !ready(rows));
        wait.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Which file lay there: inode, length, time of its last change.
type Seen = Option<(u64, u64, i64)>;

#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    retention: Retention,
    shared: Arc<Shared>,
    disk: Option<Disk>,
    /// The file whose content cannot be used.
    refused: Option<Seen>,
    /// Read the file through before it is used: it was not yet, or was found damaged.
    check: bool,
    /// A file was read, be it only once and only to read.
    ever_read: bool,
    is_out: bool,
    prune_at: Instant,
    open_at: Instant,
}

impl Keeper {
    pub fn new(path: PathBuf, retention: Retention, shared: Arc<Shared>) -> Keeper {
        let now = Instant::now();
        let prune_at = now + PRUNE_FIRST;
        Keeper {
            path,
            retention,
            shared,
            disk: None,
            refused: None,
            check: true,
            ever_read: false,
            is_out: false,
            prune_at,
            open_at: now,
        }
    }

    /// `first`: hears of the end of the first attempt to open. Returns when the store is closed.
    pub fn run(mut self, first: &SyncSender<()>, ended: oneshot::Sender<()>) {
        self.open();
        // It may have stopped waiting.
        let _ = first.send(());
        loop {
            let is_open = self.disk.is_some();
            let until = if is_open { self.prune_at } else { self.open_at };
            let ready = |rows: &Rows| rows.closing || is_open && rows.has_work();
            let closing = self.shared.wait(until, ready).closing;
            if !is_open && (closing || Instant::now() >= self.open_at) {
                self.open();
            }
            let pace = self.write_down(closing);
            if closing {
                break;
            }
            self.prune();
            if self.disk.is_some() {
                let ready = |rows: &Rows| rows.closing || rows.is_urgent();
                drop(self.shared.wait(Instant::now() + pace, ready));
            }
        }
        if let Some(Err(trouble)) = self.disk.take().map(Disk::close) {
            tracing::warn!("{}", trouble.text(&self.path));
        }
        self.shared.lock().out("Wharf ends");
        // Whoever closed it may not wait.
        let _ = ended.send(());
    }

    fn open(&mut self) {
        let seen = self.seen();
        if self.refused == Some(seen) {
            self.open_at = Instant::now() + AGAIN;
            return;
        }
        self.refused = None;
        let opened = Disk::open(&self.path, self.check);
        match opened.and_then(|disk| disk.load().map(|loaded| (disk, loaded))) {
            Ok((disk, loaded)) => {
                self.shared.lock().merge(loaded);
                (self.disk, self.ever_read, self.check) = (Some(disk), true, false);
            }
            Err(trouble) => {
                self.read_at_least(&trouble);
                self.begins(&trouble);
            }
        }
    }

    /// Registered models and patches are good to know also when nothing can be written.
    fn read_at_least(&mut self, trouble: &Trouble) {
        if self.ever_read {
            return;
        }
        let mut rows = self.shared.lock();
        if !trouble.is_of_the_file()
            && let Ok(loaded) = Disk::read_only(&self.path)
        {
            rows.merge(loaded);
            self.ever_read = true;
        }
        rows.skip_ids_to(unix_ms());
    }

    /// Writes what is there now; `closing`: also what comes meanwhile. Answers how long the disk may
    /// rest then.
    fn write_down(&mut self, closing: bool) -> Duration {
        while self.disk.is_some() {
            let batch = {
                let mut rows = self.shared.lock();
                // Without work it is still to be seen whether the file can be written again.
                if !rows.has_work() && rows.place == Place::Disk {
                    return PACE;
                }
                rows.busy_since = Some(Instant::now());
                rows.take_batch()
            };
            let is_all = batch.is_all;
            self.write(batch);
            let mut rows = self.shared.lock();
            rows.busy_since = None;
            let more = if closing { rows.has_work() } else { rows.is_urgent() };
            if !more {
                return if is_all { PACE } else { PACE_OF_FLOOD };
            }
        }
        PACE
    }

    fn write(&mut self, mut batch: Batch) {
        let Some(disk) = &mut self.disk else { return };
        let reads = std::mem::take(&mut batch.reads);
        let is_all = batch.is_all;
        match disk.write(&batch) {
            Ok(()) => {
                self.shared.lock().committed(batch);
                if is_all {
                    self.ends();
                }
                self.read(reads);
            }
            Err(trouble) => {
                let why = trouble.text(&self.path);
                self.shared.lock().failed(batch, &why);
                self.begins(&trouble);
            }
        }
    }

    fn read(&mut self, reads: Vec<Job>) {
        let Some(disk) = &mut self.disk else { return };
        for job in reads {
            let failed = match job {
                Job::SwapsBelow { below, model, limit, reply } => {
                    disk.swaps_below(below, model.as_ref(), limit).map(|rows| {
                        drop(reply.send(rows.into_iter().map(|(_, row)| row).collect()));
                    })
                }
                Job::Swap { id, reply } => disk.swap(id).map(|row| drop(reply.send(row))),
                Job::Change(..) => Ok(()),
            };
            if let Err(trouble) = failed {
                return self.begins(&trouble);
            }
        }
    }

    fn prune(&mut self) {
        if Instant::now() < self.prune_at {
            return;
        }
        let Some(disk) = &mut self.disk else { return };
        self.shared.lock().busy_since = Some(Instant::now());
        let pruned = disk.prune(&self.retention);
        self.shared.lock().busy_since = None;
        match pruned {
            Ok(more) => {
                self.prune_at = Instant::now() + if more { PRUNE_MORE } else { PRUNE_EVERY };
            }
            Err(trouble) => self.begins(&trouble),
        }
    }

    fn begins(&mut self, trouble: &Trouble) {
        self.disk = None;
        self.open_at = Instant::now() + AGAIN;
        if trouble.is_of_the_file() {
            self.refused = Some(self.seen());
            self.check = true;
        }
        let why = format!(
            "{}; Wharf goes on, with the newest rows in memory only and without taking \
             registrations and patches",
            trouble.text(&self.path)
        );
        if !std::mem::replace(&mut self.is_out, true) {
            tracing::error!("{why}");
        }
        self.shared.lock().out(&why);
    }

    fn ends(&mut self) {
        let mut rows = self.shared.lock();
        rows.place = Place::Disk;
        if std::mem::replace(&mut self.is_out, false) {
            let lost = rows.activity.dropped + rows.swaps.dropped;
            tracing::info!(
                lost_rows = lost,
                "the store {} works again; it has what was in memory",
                self.path.display()
            );
        }
    }

    fn seen(&self) -> Seen {
        let found = std::fs::metadata(&self.path).ok()?;
        Some((found.ino(), found.len(), found.mtime()))
    }
}
