//! The containers whose end somebody waits for: one exit report each, given exactly once.
//!
//! Whether a container ended is always read from the daemon (inspect), never from the event that
//! made us look: events may be late, repeated or lost. Silence of the daemon proves nothing.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bollard::models::ContainerState;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::client::{Client, PROMPT};
use super::{errors, logs};
use crate::orchestrator::view::Health;
use crate::runtime::redact::Secrets;
use crate::runtime::{ExitReport, LogTail};

/// The last lines of a container arrive just after it ended, on a busy machine later; the exit of
/// one that was starting waits at most this long for them, as they say why. Whoever follows a log
/// ends with it.
const LAST_LINES: Duration = Duration::from_secs(5);
/// Requests wait for the exit of one that served.
const LAST_LINES_SERVING: Duration = Duration::from_millis(250);

/// Before the first attempt to connect has ended.
pub const NOT_CONNECTED: &str = "not connected yet";

pub type Exit = watch::Receiver<Option<ExitReport>>;

#[derive(Debug)]
pub struct Watched {
    by_id: Mutex<BTreeMap<String, Entry>>,
    health: watch::Sender<Health>,
}

#[derive(Debug)]
struct Entry {
    exit: watch::Sender<Option<ExitReport>>,
    log: LogTail,
    log_follower: AbortOnDropHandle<()>,
}

impl Watched {
    pub fn new() -> Watched {
        let detail = NOT_CONNECTED.to_owned();
        let (health, _) = watch::channel(Health { ok: false, detail });
        Watched { by_id: Mutex::default(), health }
    }

    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    pub fn set_health(&self, ok: bool, detail: String) {
        let next = Health { ok, detail };
        self.health.send_if_modified(|now| {
            let changed = *now != next;
            *now = next;
            changed
        });
    }

    /// Begins to watch a running container and to follow its log, or joins who does already.
    /// `log_after`: leave out lines up to this time (they belong to an earlier run).
    /// `secrets`: what its log must not show.
    pub fn watch(
        &self,
        client: &Client,
        id: &str,
        log_after: Option<&str>,
        secrets: Secrets,
    ) -> (LogTail, Exit) {
        let mut by_id = self.lock();
        let entry = by_id.entry(id.to_owned()).or_insert_with(|| {
            let log = LogTail::hiding(secrets);
            let follow = logs::follow(
                client.clone(),
                id.to_owned(),
                log.clone(),
                log_after.map(str::to_owned),
            );
            Entry {
                exit: watch::channel(None).0,
                log,
                log_follower: AbortOnDropHandle::new(tokio::spawn(follow)),
            }
        });
        (entry.log.clone(), entry.exit.subscribe())
    }

    pub fn ids(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    pub fn is_watched(&self, id: &str) -> bool {
        self.lock().contains_key(id)
    }

    /// Looks whether a watched container still runs, and reports its end if not.
    /// `code`: what the event said, should the container already be removed.
    pub async fn look(&self, client: &Client, id: &str, code: Option<i32>) {
        if !self.is_watched(id) {
            return;
        }
        let Ok(docker) = client.docker().await else { return };
        let report = match tokio::time::timeout(PROMPT, docker.inspect_container(id, None)).await {
            Ok(Ok(inspected)) => inspected.state.as_ref().and_then(ended),
            Ok(Err(error)) if errors::is_missing(&error) => Some(report(code, false)),
            // No answer is no proof; the next look (or the next session) decides.
            Ok(Err(_)) | Err(_) => None,
        };
        if let Some(report) = report {
            self.ended(id, report).await;
        }
    }

    /// Reports the end of a container, once.
    pub async fn ended(&self, id: &str, report: ExitReport) {
        let Some(entry) = self.lock().remove(id) else { return };
        // Told also where nobody waits for it any more.
        let told = tokio::spawn(async move {
            let serves = entry.log.does_engine_serve();
            let wait = if serves { LAST_LINES_SERVING } else { LAST_LINES };
            let _ = tokio::time::timeout(wait, entry.log_follower).await;
            entry.exit.send_replace(Some(report));
        });
        let _ = told.await;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.by_id.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub fn is_running(state: &ContainerState) -> bool {
    [state.running, state.paused, state.restarting].contains(&Some(true))
}

/// How the container ended; `None` while it runs.
pub fn ended(state: &ContainerState) -> Option<ExitReport> {
    if is_running(state) {
        return None;
    }
    let code = state.exit_code.and_then(|code| i32::try_from(code).ok());
    Some(report(code, state.oom_killed == Some(true)))
}

/// Docker reports the end by signal N as code 128 + N.
pub fn report(code: Option<i32>, oom_killed: bool) -> ExitReport {
    let signal = code.filter(|code| (129..160).contains(code)).map(|code| code - 128);
    ExitReport { code, signal, oom_killed }
}
