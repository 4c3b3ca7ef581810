//! The thread that writes the small files of the state folder, so that the owner never waits for a
//! disk. Of each file only the newest content is kept; what fails is tried again.
//!
//! Ids are reserved ahead: the file holds a number that no used id has passed, so that an id is
//! never used twice, whatever a crash cuts off.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::outage::Outage;
use super::state_dir::{DOCKER, LAST_INSTANCE, LAST_SWAP, LastIds};

/// Reserved at once; a crash skips what is left of them.
const IDS_AHEAD: u64 = 100;
/// With fewer left, more are reserved: far more than are used while a disk writes.
const IDS_LEFT_MIN: u64 = 50;
/// From a failed write to the next attempt.
const AGAIN: Duration = Duration::from_secs(10);
/// At the end, a disk that hangs is not waited for.
const LAST_WRITE_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct StateWriter {
    work: Arc<Work>,
    reserved: LastIds,
    ended: oneshot::Receiver<()>,
}

#[derive(Debug, Default)]
struct Work {
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    last_ids: Option<LastIds>,
    docker: bool,
    closing: bool,
}

impl LastIds {
    fn ahead(self) -> LastIds {
        LastIds { instance: self.instance + IDS_AHEAD, swap: self.swap + IDS_AHEAD }
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.last_ids.is_none() && !self.docker
    }

    /// What could not be written, unless something newer came meanwhile.
    fn put_back(&mut self, failed: Pending) {
        self.last_ids = self.last_ids.or(failed.last_ids);
        self.docker |= failed.docker;
    }
}

impl StateWriter {
    /// `last`: the largest that were ever used. More are reserved before this returns, and it is
    /// noted that containers may be started.
    pub fn open(dir: &Path, last: LastIds, docker: bool, outage: Outage) -> StateWriter {
        StateWriter::with(dir, last, docker, outage, AGAIN)
    }

    fn with(
        dir: &Path,
        last: LastIds,
        docker: bool,
        mut outage: Outage,
        again: Duration,
    ) -> StateWriter {
        let (work, reserved) = (Arc::new(Work::default()), last.ahead());
        let first = Pending { last_ids: Some(reserved), docker, closing: false };
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
            tracing::warn!(%error, "ids may come twice after a restart: the thread that reserves them did not start");
        }
        StateWriter { work, reserved, ended }
    }

    /// These are used now.
    pub fn use_ids(&mut self, used: LastIds) {
        let (instance, swap) = (used.instance + IDS_LEFT_MIN, used.swap + IDS_LEFT_MIN);
        if instance > self.reserved.instance || swap > self.reserved.swap {
            let reserved = used.ahead();
            self.reserved = reserved;
            self.work.put(|pending| pending.last_ids = Some(reserved));
        }
    }

    /// A reload brought the first model in Docker.
    pub fn note_docker(&self) {
        self.work.put(|pending| pending.docker = true);
    }

    /// Writes what is left, and gives back the ids that were not used.
    pub async fn close(self, last: LastIds) {
        self.work.put(|pending| {
            pending.last_ids = Some(last);
            pending.closing = true;
        });
        if tokio::time::timeout(LAST_WRITE_WITHIN, self.ended).await.is_err() {
            tracing::warn!("the state folder does not take the last ids: its disk hangs");
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
    if let Some(last) = pending.last_ids {
        write(dir, LAST_INSTANCE, last.instance.to_string().as_bytes())?;
        write(dir, LAST_SWAP, last.swap.to_string().as_bytes())?;
    }
    if pending.docker {
        write(dir, DOCKER, b"containers were started by this installation\n")?;
    }
    Ok(())
}

/// Whole or not at all.
fn write(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let (target, temporary): (PathBuf, PathBuf) = (dir.join(name), dir.join(format!("{name}.new")));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    // A rename may reach the disk before what it names.
    file.sync_all()?;
    fs::rename(&temporary, &target)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::orchestrator::handle::{Inbox, Message};

    fn last(dir: &Path) -> LastIds {
        let number = |name| fs::read_to_string(dir.join(name)).unwrap().trim().parse().unwrap();
        LastIds { instance: number(LAST_INSTANCE), swap: number(LAST_SWAP) }
    }

    /// The two files are written one after the other.
    async fn until_last(dir: &Path, wanted: LastIds) {
        let until = Instant::now() + Duration::from_secs(60);
        while last(dir) != wanted {
            assert!(Instant::now() < until, "{:?} instead of {wanted:?}", last(dir));
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn ids(instance: u64, swap: u64) -> LastIds {
        LastIds { instance, swap }
    }

    fn outage() -> (Outage, tokio::sync::mpsc::UnboundedReceiver<Message>) {
        let (inbox, news) = Inbox::new();
        (Outage::new("state", "-", inbox), news)
    }

    #[tokio::test]
    async fn an_id_is_on_disk_before_it_is_used_and_given_back_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = StateWriter::open(dir.path(), ids(41, 7), true, outage().0);
        assert_eq!(last(dir.path()), ids(41, 7).ahead(), "before the first is used");
        assert!(dir.path().join(DOCKER).exists(), "before the first container is started");
        writer.use_ids(ids(42, 8));
        for used in [ids(42, 8 + IDS_LEFT_MIN), ids(42 + 3 * IDS_LEFT_MIN, 9)] {
            writer.use_ids(used);
            until_last(dir.path(), used.ahead()).await;
        }
        writer.close(ids(600, 70)).await;
        // `close` does not wait for a slow disk; what it handed over is written all the same.
        until_last(dir.path(), ids(600, 70)).await;
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_told_once_and_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (outage, mut news) = outage();
        let writer = StateWriter::with(&path, ids(1, 1), false, outage, Duration::from_millis(1));
        writer.note_docker();
        let Some(Message::Outage(told)) = news.recv().await else { panic!("the outage") };
        assert!(told.why.unwrap().contains("No such file"));
        fs::create_dir(&path).unwrap();
        let Some(Message::Outage(told)) = news.recv().await else { panic!("its end") };
        assert!(told.why.is_none(), "told once: {told:?}");
        writer.close(ids(7, 3)).await;
        until_last(&path, ids(7, 3)).await;
        assert!(path.join(DOCKER).exists());
    }
}
