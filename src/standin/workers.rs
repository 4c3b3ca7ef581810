//! Worker processes: they hold the memory and, like vLLM's EngineCore, outlive a parent that is
//! killed alone.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

/// A forgotten worker ends some day.
const WORKER_LIFE: Duration = Duration::from_secs(3600);

#[derive(Debug, Default)]
pub struct Workers(Vec<Child>);

impl Workers {
    pub fn start(count: u16) -> io::Result<Workers> {
        if count == 0 {
            // An image without /proc needs no workers.
            return Ok(Workers::default());
        }
        let program = std::env::current_exe()?;
        let start = || {
            let mut command = Command::new(&program);
            command.args(["engine", "--worker"]).stdin(Stdio::null()).spawn()
        };
        (0..count).map(|_| start()).collect::<io::Result<Vec<Child>>>().map(Workers)
    }

    /// The process that holds the memory: the first worker, or this process without any.
    pub fn memory_owner(&self) -> u32 {
        self.0.first().and_then(Child::id).unwrap_or_else(std::process::id)
    }

    pub async fn end(&mut self) {
        for worker in &mut self.0 {
            if let Some(pid) = worker.id().and_then(|pid| i32::try_from(pid).ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
            let _ = worker.wait().await;
        }
        self.0.clear();
    }
}

/// What a worker does: nothing, until it is told to end.
pub async fn work() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let _ = tokio::time::timeout(WORKER_LIFE, terminate.recv()).await;
    Ok(())
}
