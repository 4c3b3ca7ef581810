//! Reload when the file changes (`reload: { watch: true }`).
//!
//! Its folder is watched, not the file: editors replace a file by renaming a new one over it, and
//! mounted configuration changes through a link. Whatever happens there, the file itself is looked
//! at; only if it is another one, it is read.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use super::{Ask, What};

/// Silence after which a change counts as whole, and the longest time that is waited for it.
const QUIET: Duration = Duration::from_millis(200);
const QUIET_MAX: Duration = Duration::from_secs(2);

/// Watches until dropped.
#[derive(Debug)]
pub struct Watch {
    _watcher: notify::RecommendedWatcher,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// # Errors
/// The folder cannot be watched.
pub fn watch(path: &Path, asks: mpsc::Sender<Ask>) -> Result<Watch, String> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let (touched, mut touches) = watch::channel(());
    let on_event = move |event: notify::Result<notify::Event>| {
        // Reading is an event, too.
        if event.is_ok_and(
            |event| matches!(event.kind, notify::EventKind::Access(kind) if !is_write(kind)),
        ) {
            return;
        }
        touched.send_replace(());
    };
    let failed = |error: notify::Error| format!("{} cannot be watched: {error}", folder.display());
    let mut watcher = notify::recommended_watcher(on_event).map_err(failed)?;
    watcher.watch(&folder, RecursiveMode::NonRecursive).map_err(failed)?;
    let path = path.to_owned();
    let mut seen = identity(&path);
    let task = tokio::spawn(async move {
        while touches.changed().await.is_ok() {
            let latest = Instant::now() + QUIET_MAX;
            while timeout_at(latest.min(Instant::now() + QUIET), touches.changed())
                .await
                .is_ok_and(|changed| changed.is_ok())
            {
                if Instant::now() >= latest {
                    break;
                }
            }
            let now = identity(&path);
            // Between an editor's delete and its rename there is no file.
            if now.is_none() || now == seen {
                continue;
            }
            seen = now;
            let ask = Ask { what: What::Reload { why: "the file changed" }, reply: None };
            if asks.send(ask).await.is_err() {
                return;
            }
        }
    });
    Ok(Watch { _watcher: watcher, task })
}

fn is_write(kind: notify::event::AccessKind) -> bool {
    use notify::event::{AccessKind, AccessMode};
    matches!(kind, AccessKind::Close(AccessMode::Write))
}

pub(super) type Identity = (u64, u64, i64, i64);

/// What differs between two versions of a file.
pub(super) fn identity(path: &Path) -> Option<Identity> {
    let file = std::fs::metadata(path).ok()?;
    Some((file.ino(), file.size(), file.mtime(), file.mtime_nsec()))
}
