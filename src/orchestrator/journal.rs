//! The journal: every event that the scheduler was given, in order, for diagnosis and replay.
//!
//! One JSON line each: `{"begin":…}` at every start, with all that a replay needs beside the
//! events; then `[time, event]`; `{"dropped":n}` where n events are missing. Written by a thread of
//! its own through a bounded channel, rotated by size alone (a crash loop must not throw away what
//! led to it), never fsynced. When the disk is slower than the events, or full, events are dropped
//! and the gap is written down: serving comes first.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::outage::Outage;
use crate::config::catalog::{Catalog, RuntimeSpec};
use crate::scheduler::event::Event;
use crate::scheduler::{NextIds, World};
use crate::units::Time;

const FILE_BYTES_MAX: u64 = 16 << 20;
const FILES_MAX: u32 = 4;
const PENDING_LINES_MAX: usize = 8192;
/// From a failed write to the next attempt.
const AGAIN: Duration = Duration::from_secs(10);

/// What the scheduler was made from: with it, the events that follow can be replayed.
#[derive(Debug, Serialize, Deserialize)]
pub struct Begin {
    pub wharf: String,
    /// RFC 3339; the events' times count from here.
    pub at: String,
    pub next_ids: NextIds,
    pub world: World,
    pub catalog: Arc<Catalog>,
}

#[derive(Debug)]
pub struct Journal {
    lines: SyncSender<Vec<u8>>,
    dropped: u64,
}

impl Journal {
    pub fn open(dir: PathBuf, begin: Begin, outage: Outage) -> Journal {
        let (lines, pending) = sync_channel(PENDING_LINES_MAX);
        let files = Files::new(dir, outage, AGAIN);
        let spawned = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || write_all(files, &pending));
        if let Err(error) = spawned {
            tracing::warn!(%error, "no journal: its thread did not start");
        }
        let mut journal = Journal { lines, dropped: 0 };
        let begin = Begin { catalog: Arc::new(without_commands(&begin.catalog)), ..begin };
        journal.line(&serde_json::json!({ "begin": begin }));
        journal
    }

    pub fn append(&mut self, now: Time, event: &Event) {
        match event {
            Event::CatalogChanged(catalog) => {
                let masked = Event::CatalogChanged(Arc::new(without_commands(catalog)));
                self.line(&(now, masked));
            }
            event => self.line(&(now, event)),
        }
    }

    fn line(&mut self, content: &impl Serialize) {
        let Ok(mut line) = serde_json::to_vec(content) else { return };
        line.push(b'\n');
        if self.dropped > 0 {
            if self.lines.try_send(gap(self.dropped)).is_err() {
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

fn gap(dropped: u64) -> Vec<u8> {
    format!("{{\"dropped\":{dropped}}}\n").into_bytes()
}

/// Environments and arguments hold tokens; the scheduler never reads them.
fn without_commands(catalog: &Catalog) -> Catalog {
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
            RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => {}
        }
    }
    catalog
}

fn write_all(mut files: Files, pending: &Receiver<Vec<u8>>) {
    while let Ok(line) = pending.recv() {
        files.write(&line);
        // Flush when nothing more waits, so that a crash loses little.
        let mut batch = 0;
        while let (true, Ok(line)) = (batch < 1024, pending.try_recv()) {
            files.write(&line);
            batch += 1;
        }
        files.flush();
    }
}

/// `events.0.jsonl`, which is written, and older ones.
struct Files {
    dir: PathBuf,
    outage: Outage,
    again: Duration,
    open: Option<(BufWriter<File>, u64)>,
    /// Lines since the last flush, and lines that are lost.
    unflushed: u64,
    lost: u64,
    not_before: Option<Instant>,
}

impl Files {
    fn new(dir: PathBuf, outage: Outage, again: Duration) -> Files {
        Files { dir, outage, again, open: None, unflushed: 0, lost: 0, not_before: None }
    }

    fn write(&mut self, line: &[u8]) {
        self.unflushed += 1;
        let written = self.file().and_then(|file| file.write_all(line));
        match (&mut self.open, written) {
            (Some((_, bytes)), Ok(())) => *bytes += line.len() as u64,
            (_, written) => self.failed(written),
        }
    }

    fn flush(&mut self) {
        let Some((file, bytes)) = &mut self.open else { return };
        let (flushed, is_full) = (file.flush(), *bytes > FILE_BYTES_MAX);
        if flushed.is_err() {
            return self.failed(flushed);
        }
        (self.unflushed, self.lost) = (0, 0);
        self.outage.ends();
        if is_full {
            self.open = None;
            self.rotate();
        }
    }

    fn failed(&mut self, result: io::Result<()>) {
        self.lost += std::mem::take(&mut self.unflushed);
        if let Some((file, _)) = self.open.take() {
            // What it still holds cannot be written; dropped as it is, it would be tried again.
            let _ = file.into_parts();
        }
        if let Err(error) = result
            && error.kind() != io::ErrorKind::WouldBlock
        {
            self.outage.begins(&error);
            self.not_before = Some(Instant::now() + self.again);
        }
    }

    /// The open file; after a failure not again for a while (`WouldBlock`).
    fn file(&mut self) -> io::Result<&mut BufWriter<File>> {
        if self.open.is_none() {
            if self.not_before.is_some_and(|at| Instant::now() < at) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let (mut file, mut bytes) = self.open_current()?;
            if self.lost > 0 {
                let gap = gap(self.lost);
                file.write_all(&gap)?;
                bytes += gap.len() as u64;
            }
            self.open = Some((file, bytes));
        }
        match &mut self.open {
            Some((file, _)) => Ok(file),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn open_current(&mut self) -> io::Result<(BufWriter<File>, u64)> {
        let open =
            |path| OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path);
        let mut file = open(self.name(0))?;
        let mut bytes = file.metadata()?.len();
        if bytes > FILE_BYTES_MAX {
            self.rotate();
            file = open(self.name(0))?;
            bytes = file.metadata()?.len();
        }
        let mut last = [b'\n'];
        if bytes > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        if last != *b"\n" {
            // Cut off by a crash or a full disk: the next line must not be lost with it.
            file.write_all(b"\n")?;
            bytes += 1;
        }
        Ok((BufWriter::new(file), bytes))
    }

    fn rotate(&self) {
        for n in (0..FILES_MAX - 1).rev() {
            // A missing older file is the normal case.
            let _ = fs::rename(self.name(n), self.name(n + 1));
        }
    }

    fn name(&self, n: u32) -> PathBuf {
        self.dir.join(format!("events.{n}.jsonl"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config;
    use crate::orchestrator::handle::{Inbox, Message};
    use crate::scheduler::Scheduler;

    fn files(dir: &Path) -> (Files, tokio::sync::mpsc::UnboundedReceiver<Message>) {
        let (inbox, news) = Inbox::new();
        (Files::new(dir.to_owned(), Outage::new("journal", "-", inbox), Duration::ZERO), news)
    }

    fn text(dir: &Path, n: u32) -> String {
        fs::read_to_string(dir.join(format!("events.{n}.jsonl"))).unwrap_or_default()
    }

    /// One run of Wharf that writes these events.
    fn run(dir: &Path, events: &[Event]) {
        let (lines, pending) = sync_channel(16);
        let mut journal = Journal { lines, dropped: 0 };
        for event in events {
            journal.append(Time(7), event);
        }
        drop(journal);
        write_all(files(dir).0, &pending);
    }

    #[test]
    fn starts_append_and_only_size_rotates() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..6 {
            run(dir.path(), &[Event::Woke, Event::ShuttingDown]);
        }
        let events: Vec<(Time, Event)> =
            text(dir.path(), 0).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events.len(), 12, "a crash loop keeps what led to it");
        assert_eq!(events[11], (Time(7), Event::ShuttingDown));
        for _ in 0..6 {
            let current = OpenOptions::new().write(true).open(dir.path().join("events.0.jsonl"));
            current.unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
            run(dir.path(), &[Event::Woke]);
        }
        assert_eq!(text(dir.path(), 0).lines().count(), 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), FILES_MAX as usize);
    }

    #[test]
    fn a_line_cut_off_by_a_crash_takes_no_other_with_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("events.0.jsonl"), "[7,\"Wo").unwrap();
        run(dir.path(), &[Event::Woke]);
        assert_eq!(text(dir.path(), 0).lines().collect::<Vec<_>>(), ["[7,\"Wo", "[7,\"Woke\"]"]);
    }

    #[test]
    fn a_full_disk_is_told_once_and_the_journal_goes_on_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let current = dir.path().join("events.0.jsonl");
        std::os::unix::fs::symlink("/dev/full", &current).unwrap();
        let (mut files, mut news) = files(dir.path());
        for _ in 0..3 {
            files.write(b"lost\n");
            files.flush();
        }
        let Ok(Message::Outage(told)) = news.try_recv() else { panic!("the outage") };
        assert!(told.why.unwrap().contains("No space left"));
        assert!(news.try_recv().is_err(), "once");
        fs::remove_file(&current).unwrap();
        files.write(b"kept\n");
        files.flush();
        assert_eq!(text(dir.path(), 0), "{\"dropped\":3}\nkept\n");
        assert!(matches!(news.try_recv(), Ok(Message::Outage(told)) if told.why.is_none()));
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

    #[test]
    fn what_a_replay_needs_is_in_the_journal_and_no_secret_is() {
        let yaml = "models: { ada: { engine: openai, gpus: 0, port: 9001, \
                    process: { cmd: serve --token s3cret, env: { KEY: s3cret } } } }";
        let catalog = Arc::new(config::parse(yaml, "models.yaml", &|_| None).unwrap().catalog);
        let dir = tempfile::tempdir().unwrap();
        let begin = Begin {
            wharf: "1".into(),
            at: "now".into(),
            next_ids: NextIds { instance: 41, swap: 7 },
            world: World { gpus: Vec::new(), proof: false },
            catalog,
        };
        let (inbox, _news) = Inbox::new();
        let outage = Outage::new("journal", "-", inbox);
        let mut journal = Journal::open(dir.path().to_owned(), begin, outage);
        let ask = crate::units::AskId(1);
        let kind = crate::scheduler::event::EnsureKind::Load;
        let deadline = Time(60_000);
        journal.append(Time(7), &Event::EnsureAsked { ask, model: "ada".into(), kind, deadline });
        drop(journal);
        let until = Instant::now() + Duration::from_secs(20);
        while text(dir.path(), 0).lines().count() < 2 {
            assert!(Instant::now() < until, "the journal was not written");
            std::thread::sleep(Duration::from_millis(5));
        }
        let text = text(dir.path(), 0);
        assert!(!text.contains("s3cret"), "{text}");
        let mut lines = text.lines();
        let mut first: serde_json::Value = serde_json::from_str(lines.next().unwrap()).unwrap();
        let begin: Begin = serde_json::from_value(first["begin"].take()).unwrap();
        let mut scheduler = Scheduler::new(begin.catalog, begin.world, begin.next_ids);
        let (now, event): (Time, Event) = serde_json::from_str(lines.next().unwrap()).unwrap();
        let mut actions = Vec::new();
        scheduler.handle(now, event, &mut actions);
        let told = format!("{actions:?}");
        assert!(told.contains("SwapId(7)") && told.contains("InstanceId(41)"), "{told}");
    }
}
