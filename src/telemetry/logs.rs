//! What Wharf and its engines wrote last, by source, and every line as it comes.
//!
//! One place for all readers (`/logs`, `/logs/stream`, `/api/events`): lines of all sources share
//! one order. Nobody waits for a reader: whoever falls behind skips lines and is told how many.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::catalog::Catalog;
use crate::runtime::LogTail;
use crate::runtime::redact::Secrets;
use crate::units::ModelName;

/// History kept of each source.
const HISTORY_BYTES_MAX: usize = 100 * 1024;
/// Lines that a reader may fall behind before it skips some.
const LIVE_LINES_MAX: usize = 1024;
/// A longer line of Wharf's own log is cut; engines' lines are shorter already.
const LINE_BYTES_MAX: usize = 16 * 1024;

/// Who wrote a line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Wharf itself.
    Proxy,
    /// The engine of a model, over all its instances.
    Model(ModelName),
}

/// Which lines a reader wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    All,
    Proxy,
    /// Every engine.
    Upstream,
    Model(ModelName),
}

impl Wanted {
    pub fn takes(&self, source: &Source) -> bool {
        match (self, source) {
            (Wanted::All, _) | (Wanted::Proxy, Source::Proxy) => true,
            (Wanted::Upstream, Source::Model(_)) => true,
            (Wanted::Model(wanted), Source::Model(model)) => wanted == model,
            (Wanted::Proxy | Wanted::Upstream | Wanted::Model(_), _) => false,
        }
    }
}

/// One line, without its end.
#[derive(Debug)]
pub struct Line {
    seq: u64,
    pub source: Source,
    pub text: String,
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Logs(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    kept: Mutex<Kept>,
    live: broadcast::Sender<Arc<Line>>,
}

#[derive(Debug, Default)]
struct Kept {
    next: u64,
    sources: BTreeMap<Source, Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Arc<Line>>,
    bytes: usize,
}

impl Default for Logs {
    fn default() -> Logs {
        let (live, _) = broadcast::channel(LIVE_LINES_MAX);
        Logs(Arc::new(Shared { kept: Mutex::default(), live }))
    }
}

impl Logs {
    /// The one that this process's own log goes to: `tracing` has one subscriber per process.
    pub fn of_this_process() -> Logs {
        static LOGS: LazyLock<Logs> = LazyLock::new(Logs::default);
        LOGS.clone()
    }

    pub fn push(&self, source: Source, text: &str) {
        let most = LINE_BYTES_MAX.min(text.len());
        let cut = (0..=most).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        let text = text[..cut].trim_end_matches(['\r', '\n']).to_owned();
        let mut kept = self.kept();
        kept.next += 1;
        let line = Arc::new(Line { seq: kept.next, source: source.clone(), text });
        let ring = kept.sources.entry(source).or_default();
        ring.bytes += line.text.len() + 1;
        ring.lines.push_back(Arc::clone(&line));
        while ring.bytes > HISTORY_BYTES_MAX {
            let Some(old) = ring.lines.pop_front() else { break };
            ring.bytes -= old.text.len() + 1;
        }
        // Sent under the lock, so that `follow` misses and repeats nothing. No receiver is fine.
        let _ = self.0.live.send(line);
    }

    /// The last lines, oldest first: up to 100 KiB of each source. Engines together are one source.
    pub fn history(&self, wanted: &Wanted) -> Vec<Arc<Line>> {
        history(&self.kept(), wanted)
    }

    /// The history, and every line from now on (of all sources: see [`Wanted::takes`]).
    pub fn follow(&self, wanted: &Wanted) -> (Vec<Arc<Line>>, broadcast::Receiver<Arc<Line>>) {
        let kept = self.kept();
        (history(&kept, wanted), self.0.live.subscribe())
    }

    /// Copies an engine's lines here until its log ends.
    pub fn copy(&self, model: &ModelName, log: &LogTail) {
        let (history, mut live) = log.follow();
        let (logs, source) = (self.clone(), Source::Model(model.clone()));
        for line in history {
            logs.push(source.clone(), &line);
        }
        tokio::spawn(async move {
            loop {
                match live.recv().await {
                    Ok(line) => logs.push(source.clone(), &line),
                    Err(broadcast::error::RecvError::Lagged(lines)) => {
                        logs.push(source.clone(), &left_out(lines));
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
    }

    /// Forgets engines of models that are not configured any more.
    pub fn keep_only(&self, catalog: &Catalog) {
        self.kept().sources.retain(|source, _| match source {
            Source::Proxy => true,
            Source::Model(model) => catalog.models.contains_key(model),
        });
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Told to a reader that fell behind.
pub fn left_out(lines: u64) -> String {
    format!("({lines} lines left out: the reader is too slow)")
}

fn history(kept: &Kept, wanted: &Wanted) -> Vec<Arc<Line>> {
    let of = |engines: bool| {
        let rings = kept.sources.iter().filter(move |(source, _)| {
            wanted.takes(source) && matches!(source, Source::Model(_)) == engines
        });
        newest(rings.flat_map(|(_, ring)| ring.lines.iter().cloned()).collect())
    };
    let mut lines = of(false);
    lines.extend(of(true));
    lines.sort_by_key(|line| line.seq);
    lines
}

/// As many of the last lines as may be kept of one source.
fn newest(mut lines: Vec<Arc<Line>>) -> Vec<Arc<Line>> {
    lines.sort_by_key(|line| line.seq);
    let mut bytes = 0;
    let from = lines.iter().rposition(|line| {
        bytes += line.text.len() + 1;
        bytes > HISTORY_BYTES_MAX
    });
    lines.split_off(from.map_or(0, |at| at + 1))
}

/// A writer for `tracing_subscriber::fmt`: each event comes in one piece.
#[derive(Clone, Debug)]
pub struct OwnLog(pub Logs);

impl io::Write for OwnLog {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let lossy = String::from_utf8_lossy(text);
        let secrets = Secrets::default();
        for line in lossy.lines() {
            self.0.push(Source::Proxy, &secrets.redact(line));
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for OwnLog {
    type Writer = OwnLog;

    fn make_writer(&'a self) -> OwnLog {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn texts(lines: &[Arc<Line>]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    fn model(name: &str) -> Source {
        Source::Model(ModelName::new(name))
    }

    #[test]
    fn each_source_has_its_lines_and_all_share_one_order() {
        let logs = Logs::default();
        logs.push(Source::Proxy, "one");
        logs.push(model("a"), "two\n");
        logs.push(model("b"), "three");
        logs.push(Source::Proxy, "four");
        assert_eq!(texts(&logs.history(&Wanted::All)), ["one", "two", "three", "four"]);
        assert_eq!(texts(&logs.history(&Wanted::Proxy)), ["one", "four"]);
        assert_eq!(texts(&logs.history(&Wanted::Upstream)), ["two", "three"]);
        assert_eq!(texts(&logs.history(&Wanted::Model(ModelName::new("b")))), ["three"]);
    }

    #[test]
    fn a_talkative_engine_takes_no_room_from_others_and_all_engines_are_one_source() {
        let logs = Logs::default();
        logs.push(model("quiet"), "once");
        logs.push(Source::Proxy, "begun");
        for n in 0..30_000 {
            logs.push(model("loud"), &format!("line {n}"));
        }
        logs.push(model("quiet"), "twice");
        let bytes =
            |lines: Vec<Arc<Line>>| -> usize { lines.iter().map(|line| line.text.len() + 1).sum() };
        assert_eq!(
            texts(&logs.history(&Wanted::Model(ModelName::new("quiet")))),
            ["once", "twice"]
        );
        assert_eq!(texts(&logs.history(&Wanted::Proxy)), ["begun"]);
        let upstream = logs.history(&Wanted::Upstream);
        assert_eq!(upstream.last().expect("a line").text, "twice");
        assert!(bytes(upstream) <= HISTORY_BYTES_MAX);
        assert!(bytes(logs.history(&Wanted::All)) <= 2 * HISTORY_BYTES_MAX);
    }

    #[test]
    fn wharfs_own_lines_hold_no_secrets() {
        let logs = Logs::default();
        OwnLog(logs.clone())
            .write_all(b"INFO fetched with hf_AbCd0123456789\nnext\n")
            .expect("kept");
        assert_eq!(texts(&logs.history(&Wanted::Proxy)), ["INFO fetched with ***", "next"]);
    }

    #[tokio::test]
    async fn an_engines_lines_are_copied_from_its_first_on() {
        let (logs, tail) = (Logs::default(), LogTail::new());
        tail.push("before");
        logs.copy(&ModelName::new("a"), &tail);
        let (_, mut live) = logs.follow(&Wanted::All);
        tail.push("after");
        assert_eq!(live.recv().await.expect("a line").text, "after");
        assert_eq!(texts(&logs.history(&Wanted::Upstream)), ["before", "after"]);
    }
}
