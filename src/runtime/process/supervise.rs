//! One task per instance: feeds its log, sees its end, leaves nothing of it behind.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Live;
use super::group::Group;
use super::logfile::Tail;
use super::pidfd::ExitWatch;
use super::procfs;
use super::written::Written;
use crate::runtime::{ExitReport, LogTail};

/// A log that is written to all the time is read in pieces of so long.
const LOG_PAUSE: Duration = Duration::from_millis(5);
/// The counter of memory kills is read, and the log looked at in any case, after this time.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// What workers get to follow a leader that ended by itself.
const STRAGGLER_GRACE: Duration = Duration::from_millis(250);
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// An out-of-memory kill counts as the cause of an end if it came within about this time.
const OOM_LOOK: Duration = Duration::from_secs(2);
const SIGKILL: i32 = 9;

pub struct Supervised {
    pub watch: ExitWatch,
    pub group: Group,
    /// `None`: adopted, so that its exit code goes to another parent.
    pub child: Option<Child>,
    pub tail: Option<Tail>,
    pub written: Option<Written>,
    pub log: LogTail,
    pub live: Arc<Live>,
    pub exit: watch::Sender<Option<ExitReport>>,
}

impl Supervised {
    pub async fn run(mut self) {
        let oom_kills_before = self.until_exit().await;
        // The leader is a zombie now and still holds its pid, by which its group is known.
        self.clear_stragglers().await;
        if let Some(mut tail) = self.tail.take() {
            let _ = tokio::task::spawn_blocking(move || tail.finish()).await;
        }
        let status = match &mut self.child {
            Some(child) => child.wait().await.ok(),
            None => None,
        };
        let report = ExitReport {
            code: status.and_then(|status| status.code()),
            signal: status.and_then(|status| status.signal()),
            oom_killed: false,
        };
        let report = self.with_cause(report, oom_kills_before);
        tracing::debug!(instance = %self.live.instance, %report, "process ended");
        self.exit.send_replace(Some(report));
    }

    /// Feeds the log until the leader ended. Returns the kernel's count of memory kills shortly
    /// before.
    async fn until_exit(&mut self) -> Option<u64> {
        let mut counted = (Instant::now(), procfs::oom_kills());
        let mut counted_before = counted.1;
        loop {
            let written = async {
                match &mut self.written {
                    Some(written) => written.changed(LOOK_EVERY).await,
                    None => tokio::time::sleep(LOOK_EVERY).await,
                }
                tokio::time::sleep(LOG_PAUSE).await;
            };
            tokio::select! {
                () = self.watch.exited() => return counted_before,
                () = written => {}
            }
            self.read_log().await;
            if counted.0.elapsed() >= OOM_LOOK {
                counted_before = counted.1;
                counted = (Instant::now(), procfs::oom_kills());
            }
        }
    }

    async fn read_log(&mut self) {
        let Some(mut tail) = self.tail.take() else { return };
        // Off the async threads: the state folder may lie on a slow disk.
        let read = tokio::task::spawn_blocking(move || {
            let read = tail.read_all();
            (tail, read)
        });
        match read.await {
            Ok((tail, Ok(()))) => self.tail = Some(tail),
            Ok((_, Err(error))) => {
                self.log.push(&format!("[wharf] this log cannot be read any more: {error}"));
            }
            Err(_) => {}
        }
    }

    async fn clear_stragglers(&self) {
        let mut deadline = Instant::now() + STRAGGLER_GRACE;
        while !self.group.gone_by(Vec::new(), deadline).await {
            if self.live.is_stopping() {
                // `stop` signalled them too; its grace is theirs, and it kills them afterwards.
                deadline = Instant::now() + STRAGGLER_GRACE;
                continue;
            }
            if let Err(left) = self.group.kill(KILL_LIMIT).await {
                self.log.push(&format!("[wharf] SIGKILL has not ended {left}"));
            }
            return;
        }
    }

    fn with_cause(&self, report: ExitReport, oom_kills_before: Option<u64>) -> ExitReport {
        if self.live.was_stopped() || report.code == Some(0) {
            return report;
        }
        let oom_kill = match (oom_kills_before, procfs::oom_kills()) {
            (Some(before), Some(now)) => now > before,
            _ => false,
        };
        let killed = report.signal == Some(SIGKILL);
        if killed && !oom_kill {
            self.log.push("[wharf] ended by a SIGKILL that Wharf did not send");
        } else if oom_kill && !killed {
            self.log.push(
                "[wharf] the kernel killed a process for want of host memory just before this end \
                 (see dmesg)",
            );
        }
        ExitReport { oom_killed: killed && oom_kill, ..report }
    }
}
