//! When a log was written to, from the kernel: a line is seen when it is there, and a silent engine
//! costs nothing.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::read;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};

use super::pidfd::register;

/// Used only where the kernel has no watch left for this user.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub struct Written(Option<AsyncFd<OwnedFd>>);

impl Written {
    pub fn watch(path: &Path) -> Written {
        Written(
            open(path)
                .inspect_err(|error| {
                    tracing::debug!(path = %path.display(), %error, "no inotify: polling");
                })
                .ok(),
        )
    }

    /// Returns soon after the file was written to, at the latest after `limit`. Cancel-safe.
    pub async fn changed(&mut self, limit: Duration) {
        let Some(inotify) = &self.0 else { return sleep(POLL.min(limit)).await };
        match timeout(limit, inotify.readable()).await {
            Ok(Ok(mut ready)) => {
                // All of them: only that there was one counts.
                let mut events = [0; 4096];
                let all_read = loop {
                    match read(ready.get_inner(), &mut events) {
                        Ok(1..) => {}
                        Err(Errno::EAGAIN) => break true,
                        Ok(0) | Err(_) => break false,
                    }
                };
                ready.clear_ready();
                if !all_read {
                    sleep(POLL.min(limit)).await;
                }
            }
            Ok(Err(_)) => sleep(POLL.min(limit)).await,
            Err(_) => {}
        }
    }
}

/// The kernel closes an inotify only once nobody can be using its marks any more, which takes 5 to
/// 20 ms. On an async thread, whoever waits for the end of this engine would lose that time.
impl Drop for Written {
    fn drop(&mut self) {
        let Some(inotify) = self.0.take().map(AsyncFd::into_inner) else { return };
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn_blocking(move || drop(inotify)));
        }
    }
}

fn open(path: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
    register(inotify.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_line_is_told_of_and_silence_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("log");
        let mut file = std::fs::File::create(&path).expect("a file");
        let mut written = Written::watch(&path);
        assert!(written.0.is_some(), "this kernel has inotify");
        assert!(timeout(Duration::from_millis(30), written.changed(LONG)).await.is_err());
        file.write_all(b"loading").expect("written");
        file.write_all(b" 10%\n").expect("written");
        timeout(LONG / 2, written.changed(LONG)).await.expect("told");
        assert!(timeout(Duration::from_millis(30), written.changed(LONG)).await.is_err(), "once");
        file.write_all(b"ready\n").expect("written");
        timeout(LONG / 2, written.changed(LONG)).await.expect("told again");
    }
}
