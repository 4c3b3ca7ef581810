//! The journal: every event that the scheduler was given, in order, for diagnosis and replay.
//!
//! Written by a thread of its own through a bounded channel, rotated, never fsynced. When the
//! disk is slower than the events, events are dropped and the gap is written down: serving
//! comes first.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::config::catalog::{Catalog, RuntimeSpec};
use crate::scheduler::event::Event;
use crate::units::Time;

const FILE_BYTES_MAX: u64 = 16 << 20;
const FILES_MAX: u32 = 4;
const PENDING_LINES_MAX: usize = 8192;

#[derive(Debug)]
pub struct Journal {
    lines: SyncSender<Vec<u8>>,
    dropped: u64,
}

impl Journal {
    pub fn open(dir: PathBuf) -> Journal {
        let (lines, pending) = sync_channel(PENDING_LINES_MAX);
        let spawned = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || write_all(&dir, &pending));
        if let Err(error) = spawned {
            tracing::warn!(%error, "no journal: its thread did not start");
        }
        Journal { lines, dropped: 0 }
    }

    pub fn append(&mut self, now: Time, event: &Event) {
        let masked = without_commands(event);
        let Ok(mut line) = serde_json::to_vec(&(now, masked.as_ref().unwrap_or(event))) else {
            return;
        };
        line.push(b'\n');
        if self.dropped > 0 {
            let gap = format!("{{\"dropped\":{}}}\n", self.dropped).into_bytes();
            if self.lines.try_send(gap).is_err() {
                self.dropped += 1;
                return;
            }
            self.dropped = 0;
        }
        match self.lines.try_send(line) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => self.dropped += 1,
        }
    }
}

/// Environments and arguments hold tokens; the scheduler never reads them.
fn without_commands(event: &Event) -> Option<Event> {
    let Event::CatalogChanged(catalog) = event else { return None };
    let mut catalog = Catalog::clone(catalog);
    for spec in catalog.models.values_mut() {
        let spec = Arc::make_mut(spec);
        match &mut spec.runtime {
            RuntimeSpec::Docker(docker) => {
                docker.env.clear();
                docker.args.clear();
                docker.entrypoint = None;
            }
            RuntimeSpec::Process(process) => {
                process.env.clear();
                process.argv.truncate(1);
            }
            RuntimeSpec::External(_) => {}
        }
    }
    Some(Event::CatalogChanged(Arc::new(catalog)))
}

fn write_all(dir: &Path, pending: &Receiver<Vec<u8>>) {
    let Some((mut file, mut bytes)) = next_file(dir) else { return };
    while let Ok(line) = pending.recv() {
        bytes += line.len() as u64;
        let mut written = file.write_all(&line);
        // Flush when nothing more waits, so that a crash loses little.
        let mut batch = 0;
        while let (true, Ok(line)) = (written.is_ok() && batch < 1024, pending.try_recv()) {
            bytes += line.len() as u64;
            written = file.write_all(&line);
            batch += 1;
        }
        if let Err(error) = written.and_then(|()| file.flush()) {
            tracing::warn!(%error, "the journal stopped: its file cannot be written");
            return;
        }
        if bytes > FILE_BYTES_MAX {
            let Some(next) = next_file(dir) else { return };
            (file, bytes) = next;
        }
    }
}

/// Shifts `events.N.jsonl` by one and opens a new `events.0.jsonl`.
fn next_file(dir: &Path) -> Option<(BufWriter<File>, u64)> {
    let name = |n: u32| dir.join(format!("events.{n}.jsonl"));
    for n in (0..FILES_MAX - 1).rev() {
        // A missing older file is the normal case.
        let _ = fs::rename(name(n), name(n + 1));
    }
    match OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(name(0)) {
        Ok(file) => Some((BufWriter::new(file), 0)),
        Err(error) => {
            tracing::warn!(folder = %dir.display(), %error, "no journal: its file cannot be opened");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_back_in_order_and_old_files_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..6 {
            let (lines, pending) = sync_channel(16);
            let mut journal = Journal { lines, dropped: 0 };
            journal.append(Time(7), &Event::Woke);
            journal.append(Time(8), &Event::ShuttingDown);
            drop(journal);
            write_all(dir.path(), &pending);
        }
        let text = fs::read_to_string(dir.path().join("events.0.jsonl")).unwrap();
        let events: Vec<(Time, Event)> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events, [(Time(7), Event::Woke), (Time(8), Event::ShuttingDown)]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), FILES_MAX as usize);
    }

    #[test]
    fn a_full_channel_is_written_down_as_a_gap() {
        let (lines, pending) = sync_channel(2);
        let mut journal = Journal { lines, dropped: 0 };
        for _ in 0..5 {
            journal.append(Time(1), &Event::Woke);
        }
        let _ = (pending.recv(), pending.recv());
        journal.append(Time(2), &Event::Woke);
        let gap = String::from_utf8(pending.recv().unwrap()).unwrap();
        assert_eq!(gap.trim(), r#"{"dropped":3}"#);
    }
}
