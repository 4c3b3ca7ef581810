//! The thread that writes the small files of the state folder, so that the owner never waits for a
//! disk. Of each file only the newest content is kept; what fails is tried again.
//!
//! Ids are reserved ahead: the file holds a number that no used id has passed, so that an id is
//! never used twice, whatever a crash cuts off.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::outage::Outage;
use crate::scheduler::event::Learned;
use crate::units::ModelName;

/// Reserved at once; a crash skips what is left of them.
const IDS_AHEAD: u64 = 1000;
/// With fewer left, more are reserved: far more than are used while a disk writes.
const IDS_LEFT_MIN: u64 = 500;
/// From a failed write to the next attempt.
const AGAIN: Duration = Duration::from_secs(10);
/// At the end, a disk that hangs is not waited for.
const LAST_WRITE_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct StateWriter {
    work: Arc<Work>,
    reserved: u64,
    ended: oneshot::Receiver<()>,
}

#[derive(Debug, Default)]
struct Work {
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    last_id: Option<u64>,
    learned: Option<BTreeMap<ModelName, Learned>>,
    docker: bool,
    closing: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.last_id.is_none() && self.learned.is_none() && !self.docker
    }

    /// What could not be written, unless something newer came meanwhile.
    fn put_back(&mut self, failed: Pending) {
        self.last_id = self.last_id.or(failed.last_id);
        self.learned = self.learned.take().or(failed.learned);
        self.docker |= failed.docker;
    }
}

impl StateWriter {
    /// `last_id`: the largest that was ever used. More are reserved before this returns.
    pub fn open(dir: &Path, last_id: u64, outage: Outage) -> StateWriter {
        StateWriter::with(dir, last_id, outage, AGAIN)
    }

    fn with(dir: &Path, last_id: u64, mut outage: Outage, again: Duration) -> StateWriter {
        let (work, reserved) = (Arc::new(Work::default()), last_id + IDS_AHEAD);
        let first = Pending { last_id: Some(reserved), ..Pending::default() };
        if let Err(error) = write_pending(dir, &first) {
            outage.begins(&error);
            work.lock().put_back(first);
        }
        let (end, ended) = oneshot::channel();
        let (thread_work, dir) = (Arc::clone(&work), dir.to_owned());
        let spawned = std::thread::Builder::new().name("state".into()).spawn(move || {
            write_all(&dir, &thread_work, outage, again);
            // Nobody may wait for it.
            let _ = end.send(());
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "nothing is remembered over restarts: the thread for it did not start");
        }
        StateWriter { work, reserved, ended }
    }

    /// This id is used now.
    pub fn use_id(&mut self, id: u64) {
        if id + IDS_LEFT_MIN > self.reserved {
            self.reserved = id + IDS_AHEAD;
            self.work.put(|pending| pending.last_id = Some(id + IDS_AHEAD));
        }
    }

    pub fn learned(&self, learned: &BTreeMap<ModelName, Learned>) {
        let learned = learned.clone();
        self.work.put(|pending| pending.learned = Some(learned));
    }

    /// Containers may be started from now on.
    pub fn note_docker(&self) {
        self.work.put(|pending| pending.docker = true);
    }

    /// Writes what is left, and gives back the ids that were not used.
    pub async fn close(self, last_id: u64) {
        self.work.put(|pending| {
            pending.last_id = Some(last_id);
            pending.closing = true;
        });
        if tokio::time::timeout(LAST_WRITE_WITHIN, self.ended).await.is_err() {
            tracing::warn!("the state folder does not take the last figures: its disk hangs");
        }
    }
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, change: impl FnOnce(&mut Pending)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    /// The next work, and whether it is the last.
    fn take(&self) -> (Pending, bool) {
        let mut pending = self.lock();
        while pending.is_empty() && !pending.closing {
            pending = self.changed.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        let closing = pending.closing;
        (std::mem::take(&mut *pending), closing)
    }

    /// Returns early only for the end.
    fn pause(&self, time: Duration) {
        let until_closing = |pending: &mut Pending| !pending.closing;
        let _ = self.changed.wait_timeout_while(self.lock(), time, until_closing);
    }
}

fn write_all(dir: &Path, work: &Work, mut outage: Outage, again: Duration) {
    loop {
        if outage.is_out() {
            work.pause(again);
        }
        let (pending, is_last) = work.take();
        match write_pending(dir, &pending) {
            Ok(()) => outage.ends(),
            Err(error) => {
                outage.begins(&error);
                work.lock().put_back(pending);
            }
        }
        if is_last {
            return;
        }
    }
}

fn write_pending(dir: &Path, pending: &Pending) -> io::Result<()> {
    if let Some(last_id) = pending.last_id {
        write(dir, "last_id", last_id.to_string().as_bytes())?;
    }
    if let Some(learned) = &pending.learned {
        write(dir, "learned.json", &serde_json::to_vec_pretty(learned)?)?;
    }
    if pending.docker {
        write(dir, super::state_dir::DOCKER, b"containers were started by this installation\n")?;
    }
    Ok(())
}

/// Whole or not at all.
fn write(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let (target, temporary): (PathBuf, PathBuf) = (dir.join(name), dir.join(format!("{name}.new")));
    fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &target))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::orchestrator::handle::{Inbox, Message};

    fn last_id(dir: &Path) -> u64 {
        fs::read_to_string(dir.join("last_id")).unwrap().trim().parse().unwrap()
    }

    fn outage() -> (Outage, tokio::sync::mpsc::UnboundedReceiver<Message>) {
        let (inbox, news) = Inbox::new();
        (Outage::new("state", "-", inbox), news)
    }

    #[tokio::test]
    async fn an_id_is_on_disk_before_it_is_used_and_given_back_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = StateWriter::open(dir.path(), 41, outage().0);
        assert_eq!(last_id(dir.path()), 41 + IDS_AHEAD, "before the first is used");
        writer.use_id(42);
        writer.use_id(42 + IDS_LEFT_MIN);
        let until = Instant::now() + Duration::from_secs(20);
        while last_id(dir.path()) != 42 + IDS_LEFT_MIN + IDS_AHEAD {
            assert!(Instant::now() < until, "no more were reserved");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        writer.close(600).await;
        assert_eq!(last_id(dir.path()), 600);
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_told_once_and_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (outage, mut news) = outage();
        let writer = StateWriter::with(&path, 1, outage, Duration::from_millis(1));
        let footprint = Some(crate::units::Bytes::gib(3));
        let learned = Learned { footprint, ..Learned::default() };
        writer.learned(&BTreeMap::from([("ada".into(), learned)]));
        let Some(Message::Outage(told)) = news.recv().await else { panic!("the outage") };
        assert!(told.why.unwrap().contains("No such file"));
        fs::create_dir(&path).unwrap();
        let Some(Message::Outage(told)) = news.recv().await else { panic!("its end") };
        assert!(told.why.is_none(), "told once: {told:?}");
        writer.close(7).await;
        assert_eq!(last_id(&path), 7);
        assert!(fs::read_to_string(path.join("learned.json")).unwrap().contains("ada"));
    }
}
