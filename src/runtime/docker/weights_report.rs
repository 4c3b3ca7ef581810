//! What the script that fetches weights says, as progress and faults.

use std::time::{Duration, Instant};

use serde::Deserialize;

use super::pace::Pace;
use crate::runtime::{ExitReport, LogTail, Progress};
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::Bytes;

const MARK: &str = "WHARF ";
const LOG_LINES: usize = 20;
/// A line of the script's own is far shorter; anything longer is cut.
const LINE_BYTES_MAX: usize = 64 * 1024;
const HUB: &str = "https://huggingface.co";

/// How the fetch ended.
#[derive(Debug)]
pub enum Step {
    Present,
    Skip(String),
    Fault(Fault),
}

#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Word {
    Plan { total: u64, need: u64, free: u64, path: String },
    Bytes { done: u64, total: u64 },
    Present { note: String },
    Skip { why: String },
    Fault { kind: Trouble, text: String, hub: Option<String> },
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Trouble {
    Denied,
    Missing,
    Disk,
    Readonly,
    Network,
    Stalled,
    Failed,
}

/// Reads the output of one fetch.
pub struct Report<'a> {
    repo: &'a str,
    /// Never shown, should a library print it.
    token: Option<&'a str>,
    rest: Vec<u8>,
    log: LogTail,
    pace: Pace,
    disk: Option<Disk>,
}

#[derive(Debug)]
struct Disk {
    need: Bytes,
    free: Bytes,
    path: String,
}

impl<'a> Report<'a> {
    pub fn new(repo: &'a str, token: Option<&'a str>) -> Report<'a> {
        let (log, pace) = (LogTail::new(), Pace::default());
        Report { repo, token, rest: Vec::new(), log, pace, disk: None }
    }

    /// Takes a piece of the output, which need not end with a line.
    pub fn read(&mut self, piece: &[u8], progress: &Progress) -> Option<Step> {
        self.rest.extend_from_slice(piece);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let mut line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if let Some(token) = self.token.filter(|token| !token.is_empty()) {
                line = line.replace(token, "***");
            }
            if let Some(step) = self.line(&line, progress) {
                return Some(step);
            }
        }
        if self.rest.len() > LINE_BYTES_MAX {
            self.rest.clear();
        }
        None
    }

    fn line(&mut self, line: &str, progress: &Progress) -> Option<Step> {
        let word = line.strip_prefix(MARK).and_then(|word| serde_json::from_str(word).ok());
        match word {
            None => self.log.push(line),
            Some(Word::Plan { total, need, free, path }) => {
                let (need, free) = (Bytes(need), Bytes(free));
                let done = Bytes(total) - need;
                progress.set(
                    "weights",
                    fraction(done.0, total),
                    self.pace.detail(done, Bytes(total)),
                );
                self.disk = Some(Disk { need, free, path });
            }
            Some(Word::Bytes { done, total }) => {
                self.pace.note(done, Instant::now());
                let detail = self.pace.detail(Bytes(done), Bytes(total));
                progress.set("weights", fraction(done, total), detail);
            }
            Some(Word::Present { note }) => {
                if !note.is_empty() {
                    tracing::info!(repo = self.repo, "weights: {note}");
                }
                progress.set("weights", Some(1.0), "present");
                return Some(Step::Present);
            }
            Some(Word::Skip { why }) => return Some(Step::Skip(why)),
            Some(Word::Fault { kind, text, hub }) => {
                let hub = hub.as_deref().unwrap_or(HUB);
                return Some(Step::Fault(self.fault(kind, &text, hub)));
            }
        }
        None
    }

    fn fault(&self, trouble: Trouble, text: &str, hub: &str) -> Fault {
        let repo = self.repo;
        let (kind, message) = match trouble {
            Trouble::Denied => (FaultKind::FetchDenied, self.denied(text, hub)),
            Trouble::Missing => (
                FaultKind::FetchFailed,
                format!("{hub} has no {repo}, or not the revision asked for: {text}"),
            ),
            Trouble::Disk => (FaultKind::DiskFull, self.disk_full(text)),
            Trouble::Readonly => (
                FaultKind::FetchFailed,
                format!(
                    "the weights of {repo} are not all here, and their cache cannot be written \
                     ({text}): mount its volume without `:ro`, for the `user` of the container"
                ),
            ),
            Trouble::Network => (
                FaultKind::FetchFailed,
                format!(
                    "the weights of {repo} are not all here, and its container cannot reach {hub}: \
                     {text}"
                ),
            ),
            Trouble::Stalled => (
                FaultKind::FetchFailed,
                format!("the fetch of the weights of {repo} from {hub} stalled: {text}"),
            ),
            Trouble::Failed => (
                FaultKind::FetchFailed,
                format!("fetching the weights of {repo} from {hub} failed: {text}"),
            ),
        };
        Fault::new(kind, message).with_log(self.log.last(LOG_LINES))
    }

    fn denied(&self, text: &str, hub: &str) -> String {
        let repo = self.repo;
        let token = match self.token {
            Some(_) => {
                "the token in HF_TOKEN may not read it: use one of the account that accepted"
            }
            None => {
                "give Wharf a token of the account that accepted in HF_TOKEN (or HF_TOKEN_FILE)"
            }
        };
        format!(
            "{hub} does not give out {repo}: it is gated or private, or there is no such \
             repository. Accept its licence at {hub}/{repo}; {token} ({text})"
        )
    }

    fn disk_full(&self, text: &str) -> String {
        let repo = self.repo;
        match &self.disk {
            Some(Disk { need, free, path }) => format!(
                "no room for the weights of {repo}: {need} more are needed, {free} were free in \
                 its cache ({path} in the container); delete models there that are not used"
            ),
            None => format!("no room for the weights of {repo}: {text}"),
        }
    }

    /// The container ended, or its output did, and no verdict was heard.
    pub fn broken_off(&self, exit: Option<ExitReport>) -> Fault {
        let how = exit.map_or_else(|| "ended".to_owned(), |exit| exit.to_string());
        let message =
            format!("the container that fetches the weights of {} {how} half-way", self.repo);
        Fault::new(FaultKind::FetchFailed, message).with_log(self.log.last(LOG_LINES))
    }

    pub fn silent(&self, limit: Duration) -> Fault {
        let message = format!(
            "the container that fetches the weights of {} said nothing for {} s",
            self.repo,
            limit.as_secs()
        );
        Fault::new(FaultKind::FetchFailed, message).with_log(self.log.last(LOG_LINES))
    }
}

fn fraction(done: u64, total: u64) -> Option<f32> {
    (total > 0).then(|| (done as f64 / total as f64).min(1.0) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(report: &mut Report<'_>, text: &str) -> Fault {
        match report.read(text.as_bytes(), &Progress::new().0) {
            Some(Step::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lines_may_come_in_pieces_and_between_others() {
        let (progress, now) = Progress::new();
        let mut report = Report::new("org/a", None);
        let gib = 1_u64 << 30;
        let plan = format!(
            "a warning\nWHARF {{\"event\":\"plan\",\"total\":{},\"need\":{gib},\"free\":{gib},\"pa",
            4 * gib
        );
        assert!(report.read(plan.as_bytes(), &progress).is_none());
        assert_eq!(now.borrow().stage, "");
        assert!(report.read(b"th\":\"/c\"}\n", &progress).is_none());
        assert_eq!(now.borrow().fraction, Some(0.75));
        assert_eq!(now.borrow().detail, "3.0 GiB of 4.0 GiB");
        let end = report.read(b"WHARF {\"event\":\"present\",\"note\":\"\"}\n", &progress);
        assert!(matches!(end, Some(Step::Present)), "{end:?}");
    }

    #[test]
    fn a_refusal_names_repository_page_and_token_but_never_shows_it() {
        let text = "token hf_secret\nWHARF {\"event\":\"fault\",\"kind\":\"denied\",\"text\":\"403 \
                    for hf_secret\"}\n";
        let said = fault(&mut Report::new("org/a", Some("hf_secret")), text);
        assert_eq!(said.kind, FaultKind::FetchDenied);
        for part in ["org/a", "https://huggingface.co/org/a", "HF_TOKEN", "***"] {
            assert!(said.message.contains(part), "{part}: {}", said.message);
        }
        assert!(!format!("{said:?}").contains("hf_secret"), "{said:?}");
    }

    #[test]
    fn a_small_disk_is_named_with_both_sizes() {
        let text = "WHARF {\"event\":\"plan\",\"total\":4194304,\"need\":3145728,\"free\":1048576,\
                    \"path\":\"/cache\"}\nWHARF {\"event\":\"fault\",\"kind\":\"disk\",\"text\":\"\"}\n";
        let said = fault(&mut Report::new("org/a", None), text);
        assert_eq!(said.kind, FaultKind::DiskFull);
        for part in ["3.0 MiB", "1.0 MiB", "/cache"] {
            assert!(said.message.contains(part), "{part}: {}", said.message);
        }
    }

    #[test]
    fn output_without_an_end_of_line_stays_bounded() {
        let mut report = Report::new("org/a", None);
        for _ in 0..100 {
            report.read(&[b'x'; 4096], &Progress::new().0);
        }
        assert!(report.rest.len() <= LINE_BYTES_MAX + 4096);
    }
}
