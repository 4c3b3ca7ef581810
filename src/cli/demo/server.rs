//! The product under the demo: a real `wharf serve` as a child, on ports that are free.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::talk::Talk;

const STOP_WITHIN: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Server {
    child: Child,
    pub dir: PathBuf,
    pub talk: Talk,
    exe: PathBuf,
    env: Vec<(String, String)>,
}

impl Server {
    /// Writes `models.yaml` into `dir` and serves it. `yaml` is given the two ports.
    pub async fn start(
        exe: &Path,
        dir: &Path,
        usual: (u16, u16),
        env: &[(&str, &str)],
        yaml: impl FnOnce(u16, u16) -> String,
    ) -> anyhow::Result<Server> {
        let (gateway, orchestrator) = free_ports(usual)?;
        fs::write(dir.join("models.yaml"), yaml(gateway, orchestrator))?;
        let env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect::<Vec<_>>();
        let mut server = Server {
            child: spawn(exe, dir, &env)?,
            dir: dir.to_owned(),
            talk: Talk::new(gateway, orchestrator),
            exe: exe.to_owned(),
            env,
        };
        server.up().await?;
        Ok(server)
    }

    async fn up(&mut self) -> anyhow::Result<()> {
        let child = &mut self.child;
        let ended = async {
            loop {
                match child.try_wait() {
                    Ok(None) => tokio::time::sleep(Duration::from_millis(50)).await,
                    Ok(Some(status)) => break anyhow!("it ended at once: {status}"),
                    Err(error) => break error.into(),
                }
            }
        };
        let up = tokio::select! {
            up = self.talk.wait_until_up() => up,
            error = ended => Err(error),
        };
        if let Err(error) = up {
            let log = fs::read_to_string(self.dir.join("wharf.log")).unwrap_or_default();
            bail!("{error}; its log says:\n{}", tail(&log, 15));
        }
        Ok(())
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// As a crash would: no chance to clean up. Then the same again.
    pub async fn kill_and_restart(&mut self) -> anyhow::Result<()> {
        self.kill()?;
        self.restart().await
    }

    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.child = spawn(&self.exe, &self.dir, &self.env)?;
        self.up().await
    }

    /// SIGTERM, and the engines with it.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        let until = Instant::now() + STOP_WITHIN;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() >= until {
                self.child.kill()?;
                bail!("wharf did not stop within {STOP_WITHIN:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        if !status.success() {
            bail!("wharf did not stop in order: {status}");
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An interrupted demo leaves nothing behind: the engines are stopped by SIGTERM's drain.
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), i32::try_from(self.child.id())) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

fn spawn(exe: &Path, dir: &Path, env: &[(String, String)]) -> anyhow::Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join("wharf.log"))?;
    Command::new(exe)
        .args(["serve", "--config", "models.yaml"])
        .current_dir(dir)
        .env_remove("WHARF_KEY_FILE")
        .env_remove("WHARF_GATEWAY")
        .env_remove("WHARF_ORCHESTRATOR")
        .env_remove("WHARF_STORE")
        .envs(env.iter().map(|(name, value)| (name, value)))
        // Ctrl-C in the terminal is for the demo alone: the server would take the SIGTERM that
        // follows it for a second signal, and leave its engines behind.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("failed to start {}", exe.display()))
}

/// The usual ports, or any instead of one that somebody has. The first is held until both are drawn, or
/// it might be drawn again.
fn free_ports(usual: (u16, u16)) -> anyhow::Result<(u16, u16)> {
    let bind = |usual| {
        TcpListener::bind((Ipv4Addr::LOCALHOST, usual))
            .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
    };
    let held = bind(usual.0)?;
    let first = held.local_addr()?.port();
    // Both listeners may be wanted at one address.
    let second = if usual.1 == first { first } else { bind(usual.1)?.local_addr()?.port() };
    Ok((first, second))
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
