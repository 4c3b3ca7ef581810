//! The last part of an instance's log: bounded history plus a live feed of lines.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{broadcast, watch};

use super::redact::Secrets;

/// History kept per instance, in bytes.
const HISTORY_BYTES_MAX: usize = 100 * 1024;
/// A longer line is cut.
const LINE_BYTES_MAX: usize = 8 * 1024;
/// Lines a slow reader may fall behind before it skips some.
const LIVE_LINES_MAX: usize = 1024;

/// Holds no secrets: every line is redacted before it is kept or passed on.
#[derive(Clone, Debug)]
pub struct LogTail {
    shared: Arc<Shared>,
}

struct Shared {
    secrets: Secrets,
    history: Mutex<History>,
    live: broadcast::Sender<Arc<str>>,
    unfinished: watch::Sender<Arc<str>>,
    serves: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("history", &self.history).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct History {
    lines: VecDeque<Arc<str>>,
    bytes: usize,
}

impl Default for LogTail {
    fn default() -> Self {
        LogTail::new()
    }
}

impl LogTail {
    pub fn new() -> LogTail {
        LogTail::hiding(Secrets::default())
    }

    /// Of an engine whose secrets are known.
    pub fn hiding(secrets: Secrets) -> LogTail {
        let (live, _) = broadcast::channel(LIVE_LINES_MAX);
        let (unfinished, _) = watch::channel(Arc::from(""));
        let history = Mutex::default();
        let serves = AtomicBool::new(false);
        LogTail { shared: Arc::new(Shared { secrets, history, live, unfinished, serves }) }
    }

    /// Its engine is ready: requests wait for the news of its end, which is then not held back for
    /// the lines that explain it.
    pub fn engine_serves(&self) {
        self.shared.serves.store(true, Ordering::Relaxed);
    }

    pub fn does_engine_serve(&self) -> bool {
        self.shared.serves.load(Ordering::Relaxed)
    }

    /// Adds one line (without its newline).
    pub fn push(&self, line: &str) {
        // Before the cut, which might leave a part of a secret.
        let line = self.shared.secrets.redact(line);
        let cut = (0..=LINE_BYTES_MAX.min(line.len()))
            .rev()
            .find(|&at| line.is_char_boundary(at))
            .unwrap_or(0);
        let line: Arc<str> = Arc::from(line[..cut].trim_end_matches(['\r', '\n']));
        let mut history = self.shared.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.bytes += line.len() + 1;
        history.lines.push_back(Arc::clone(&line));
        while history.bytes > HISTORY_BYTES_MAX {
            let Some(old) = history.lines.pop_front() else { break };
            history.bytes -= old.len() + 1;
        }
        // Sent under the lock, so that `follow` misses and repeats nothing. No receiver is fine.
        let _ = self.shared.live.send(line);
    }

    /// The line that is being written, so far. It may hold a secret of which half is written: it
    /// is for reading progress from, not for showing.
    pub fn grow(&self, unfinished: &str) {
        let unfinished = self.shared.secrets.redact(unfinished);
        self.shared.unfinished.send_replace(Arc::from(&*unfinished));
    }

    /// Changes each time that a line without an end has grown.
    pub fn unfinished(&self) -> watch::Receiver<Arc<str>> {
        self.shared.unfinished.subscribe()
    }

    /// The last `n` lines, oldest first.
    pub fn last(&self, n: usize) -> Vec<String> {
        let history = self.shared.history.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = history.lines.len().saturating_sub(n);
        history.lines.iter().skip(skip).map(|line| line.to_string()).collect()
    }

    /// Everything kept so far, and every line from now on.
    pub fn follow(&self) -> (Vec<Arc<str>>, broadcast::Receiver<Arc<str>>) {
        let history = self.shared.history.lock().unwrap_or_else(PoisonError::into_inner);
        (history.lines.iter().cloned().collect(), self.shared.live.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_bounded_and_keeps_the_newest() {
        let log = LogTail::new();
        for n in 0..50_000 {
            log.push(&format!("line {n}"));
        }
        assert_eq!(log.last(1), ["line 49999"]);
        let bytes: usize = log.last(usize::MAX).iter().map(|line| line.len() + 1).sum();
        assert!(bytes <= HISTORY_BYTES_MAX, "{bytes}");
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let log = LogTail::new();
        log.push(&"é".repeat(LINE_BYTES_MAX));
        assert!(log.last(1)[0].len() <= LINE_BYTES_MAX);
    }

    #[tokio::test]
    async fn neither_history_nor_followers_see_a_secret() {
        let log = LogTail::hiding(Secrets::of_env([("DB_PASSWORD", "s3cret")]));
        let (_, mut live) = log.follow();
        log.push("with s3cret and --api-key abc");
        assert_eq!(&*live.recv().await.expect("a line"), "with *** and --api-key ***");
        assert_eq!(log.last(1), ["with *** and --api-key ***"]);
    }

    #[tokio::test]
    async fn follow_repeats_and_misses_nothing() {
        let log = LogTail::new();
        log.push("before");
        let (history, mut live) = log.follow();
        log.push("after");
        assert_eq!(history.len(), 1);
        assert_eq!(&*live.recv().await.expect("a line"), "after");
    }
}
