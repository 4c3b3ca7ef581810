//! Seeing a process end without being its parent.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::procfs;

/// Used only where the kernel (before 5.3) or a seccomp filter refuses pidfds.
const POLL: Duration = Duration::from_millis(100);

/// Watches one process, ours or adopted, until it has ended (it may be an unreaped zombie then).
#[derive(Debug)]
pub struct ExitWatch {
    pid: u32,
    start_ticks: u64,
    /// `None`: no pidfd to be had.
    pidfd: Option<AsyncFd<OwnedFd>>,
}

impl ExitWatch {
    pub fn open(pid: u32, start_ticks: u64) -> ExitWatch {
        let pidfd = open_pidfd(pid)
            .and_then(register)
            .inspect_err(|error| tracing::debug!(pid, %error, "no pidfd: polling /proc"))
            .ok();
        ExitWatch { pid, start_ticks, pidfd }
    }

    /// Cancel-safe.
    pub async fn exited(&self) {
        // Checked after the pidfd was opened: from here on the pidfd means this very process.
        if !self.runs() {
            return;
        }
        if let Some(pidfd) = &self.pidfd
            && pidfd.readable().await.is_ok()
        {
            return;
        }
        while self.runs() {
            tokio::time::sleep(POLL).await;
        }
    }

    fn runs(&self) -> bool {
        procfs::stat(self.pid)
            .is_some_and(|stat| stat.start_ticks == self.start_ticks && !stat.is_gone())
    }
}

pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
    // SAFETY: an `OwnedFd` gives the same open descriptor until it is dropped, and `AsyncFd`,
    // which owns it from here, deregisters it before that.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    Ok(fd?)
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "neither std nor nix wraps pidfd_open")]
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "takes ownership of the descriptor just made")]
    // SAFETY: the kernel has just returned this descriptor (close-on-exec) and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_process_is_seen_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("sleep");
        let stat = procfs::stat(child.id()).expect("stat");
        let watch = ExitWatch::open(stat.pid, stat.start_ticks);
        tokio::select! {
            () = watch.exited() => panic!("it runs"),
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        child.kill().expect("kill");
        tokio::time::timeout(Duration::from_secs(10), watch.exited()).await.expect("seen");
        assert!(procfs::stat(stat.pid).is_some_and(|stat| stat.is_gone()), "still a zombie");
        child.wait().expect("reaped");
    }

    #[tokio::test]
    async fn a_reused_pid_counts_as_ended() {
        let stat = procfs::stat(std::process::id()).expect("stat");
        let watch = ExitWatch::open(stat.pid, stat.start_ticks + 1);
        tokio::time::timeout(Duration::from_secs(10), watch.exited()).await.expect("ended");
    }
}
