//! Engines as processes of their own process group.
//!
//! An engine outlives Wharf (`kill -9` included): it writes its log to a file of its own and is
//! found again by the identity in its environment. Its end is seen through a pidfd, which works
//! for adopted processes too.

mod command;
mod find;
mod group;
mod logfile;
mod pidfd;
pub(crate) mod procfs;
mod supervise;
mod written;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::Stdio;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use self::group::Group;
use self::logfile::Tail;
use self::pidfd::ExitWatch;
pub(crate) use self::pidfd::register;
pub use self::procfs::Occupant;
use self::supervise::Supervised;
use self::written::Written;
use super::host_use;
use super::redact::Secrets;
use super::{Endpoint, Found, Given, Identity, LaunchSpec, LogTail, Running, RuntimeHandle};
use crate::config::catalog::StopSpec;
use crate::scheduler::event::{Fault, FaultKind, HostUse};
use crate::units::InstanceId;

/// From SIGKILL until what is left counts as stuck in the kernel.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Between the last process's end and its exit report.
const REPORT_LIMIT: Duration = Duration::from_secs(5);

/// Cheap to clone: clones share the list of what is supervised.
#[derive(Clone, Debug, Default)]
pub struct ProcessRuntime {
    live: Arc<Mutex<BTreeMap<InstanceId, Arc<Live>>>>,
}

/// What `stop` and the supervisor of an instance tell each other.
#[derive(Debug)]
struct Live {
    instance: InstanceId,
    stops: AtomicUsize,
    was_stopped: AtomicBool,
}

impl Live {
    fn is_stopping(&self) -> bool {
        self.stops.load(Ordering::SeqCst) > 0
    }

    fn was_stopped(&self) -> bool {
        self.was_stopped.load(Ordering::SeqCst)
    }
}

/// A stop under way; ends with the future that made it.
struct Stopping(Arc<Live>);

impl Stopping {
    fn begin(live: Arc<Live>) -> Stopping {
        live.stops.fetch_add(1, Ordering::SeqCst);
        live.was_stopped.store(true, Ordering::SeqCst);
        Stopping(live)
    }
}

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.stops.fetch_sub(1, Ordering::SeqCst);
    }
}

impl ProcessRuntime {
    /// Command, working directory and port, without touching anything.
    pub async fn preflight(&self, spec: &LaunchSpec) -> Result<(), Fault> {
        command::resolve(spec, &logfile::path(&spec.log_dir, spec.identity.instance))?;
        let (model, port) = (&spec.model.name, spec.port);
        let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) else { return Ok(()) };
        if error.kind() != io::ErrorKind::AddrInUse {
            let message = format!("model {model}: port {port} cannot be used: {error}");
            return Err(Fault::new(FaultKind::BadSpec, message));
        }
        let occupants = self.listeners(port).await;
        if spec.model.port.is_some() && occupants.iter().any(|by| self.is_mine(by, &spec.identity))
        {
            // Models that take turns on a port: the one that has it leaves before this one starts.
            return Ok(());
        }
        let by = match occupants.first() {
            Some(occupant) => occupant.to_string(),
            None => "a process that this user cannot see".to_owned(),
        };
        let message = |by: &str| {
            format!(
                "model {model}: port {port} is taken by {by}: end it, or change `port` or \
                 `engine_ports`"
            )
        };
        Err(Fault::new(FaultKind::PortTaken, message(&by)).or_publicly(message("another program")))
    }

    /// Whether it is an engine that this runtime looks after.
    fn is_mine(&self, occupant: &Occupant, own: &Identity) -> bool {
        command::identity_of(&procfs::wharf_environ(occupant.pid)).is_some_and(|theirs| {
            theirs.installation == own.installation && self.live().contains_key(&theirs.instance)
        })
    }

    /// Returns once the process runs. There is no await between its birth and its supervision, so
    /// that a dropped future leaves nothing behind.
    pub async fn start(&self, spec: &LaunchSpec) -> Result<Running, Fault> {
        let path = logfile::path(&spec.log_dir, spec.identity.instance);
        let command = command::resolve(spec, &path)?;
        let model = &spec.model.name;
        let log_failed = |error: io::Error| {
            let message = format!("model {model}: its log {}: {error}", path.display());
            Fault::new(FaultKind::Internal, message)
        };
        let file = logfile::create(&path).map_err(log_failed)?;
        // It also inherits what Wharf was given.
        let inherited: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let env = inherited.iter().map(|(name, value)| (name, value)).chain(&command.env);
        let secrets = Secrets::of_env(env.map(|(name, value)| (name.as_str(), value.as_str())));
        let log = LogTail::hiding(secrets.and(spec.api_key.key()));
        let tail = Tail::open(&path, log.clone()).map_err(log_failed)?;
        let mut child = spawn(&command, file).map_err(|error| {
            let message = format!("model {model}: {}: {error}", command.program.display());
            Fault::new(fault_of(&error), message)
        })?;
        let Some(stat) = child.id().and_then(procfs::stat) else {
            // Only without a readable /proc; then nothing of it could ever be found again.
            let _ = child.start_kill();
            return Err(Fault::new(FaultKind::Internal, "/proc cannot be read"));
        };
        let handle = (stat.pid, stat.start_ticks);
        let mut running =
            self.supervise(spec.identity.clone(), handle, Some(child), Some(tail), log);
        running.endpoint.api_key = spec.api_key.key();
        self.prune_logs(spec);
        Ok(running)
    }

    /// Signal to the group, grace, SIGKILL to the group and to whoever else carries its identity.
    /// `Ok` means: none of them is left.
    pub async fn stop(&self, running: &Running, stop: &StopSpec) -> Result<(), Fault> {
        let RuntimeHandle::Process { pid, start_ticks } = running.handle else {
            return Err(Fault::new(FaultKind::Internal, "not a process"));
        };
        let live = self.live().get(&running.identity.instance).cloned();
        let stopping = live.map(Stopping::begin);
        let group = Group::new(pid, start_ticks, &running.identity);
        let deadline = Instant::now() + stop.grace;
        let looked = group.signal(stop_signal(&stop.signal));
        let mut exit = running.exit.clone();
        let gone = match &stopping {
            // Its supervisor looks again after the leader's end, and reports when the last member
            // is gone and the leader is reaped; of workers that it found without their leader it
            // has reported already.
            Some(_) if exit.borrow().is_none() => {
                let reported = timeout_at(deadline, exit.wait_for(Option::is_some)).await;
                matches!(reported, Ok(Ok(_)))
            }
            _ => group.gone_by(looked.await.unwrap_or_default(), deadline).await,
        };
        if !gone {
            group.kill(KILL_LIMIT).await.map_err(|left| {
                let message = |left: &str| {
                    format!(
                        "model {}: SIGKILL has not ended {left}; a process that hangs in the \
                         kernel (state D) often needs its driver reset or a reboot",
                        running.identity.model
                    )
                };
                Fault::new(FaultKind::StopFailed, message(&left))
                    .or_publicly(message("every process of its engine"))
                    .with_log(running.log.last(20))
            })?;
        }
        if stopping.is_some() {
            // The report follows the reaping: no zombie is left either.
            let mut exit = running.exit.clone();
            let _ = tokio::time::timeout(REPORT_LIMIT, exit.wait_for(Option::is_some)).await;
        }
        Ok(())
    }

    /// Every instance of this installation, found by its environment in /proc, and supervised
    /// from now on. `alive` is false where only members of its group are left.
    pub async fn find(&self, installation: &str) -> Result<Vec<Found>, Fault> {
        let wanted = installation.to_owned();
        let seen = tokio::task::spawn_blocking(move || find::scan(&wanted))
            .await
            .map_err(|error| Fault::new(FaultKind::Internal, error.to_string()))?;
        Ok(seen.into_iter().map(|remains| self.adopt(remains)).collect())
    }

    fn adopt(&self, remains: find::Remains) -> Found {
        let env = procfs::environ(remains.leader.0);
        let env = env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let log = LogTail::hiding(Secrets::of_env(env));
        if !remains.alive {
            let (_, exit) = watch::channel(Some(super::ExitReport {
                code: None,
                signal: None,
                oom_killed: false,
            }));
            let running = running(remains.identity, remains.leader, log, exit);
            return Found { running, alive: false };
        }
        let tail = remains.log.and_then(|path: PathBuf| {
            Tail::reopen(&path, log.clone())
                .inspect_err(|error| log.push(&format!("[wharf] {}: {error}", path.display())))
                .ok()
        });
        let running = self.supervise(remains.identity, remains.leader, None, tail, log);
        Found { running, alive: true }
    }

    /// Every living process of the group that `leader` leads, and their descendants.
    pub fn group_pids(&self, leader: u32) -> Vec<u32> {
        group::pids_of(leader)
    }

    /// Whether this one process, and nobody beside it, listens on a TCP port of this host.
    pub async fn listens_alone(&self, pid: u32, port: u16) -> bool {
        let look = tokio::task::spawn_blocking(move || procfs::listens_alone(pid, port));
        look.await.unwrap_or_default()
    }

    /// Who listens on a TCP port of this host; empty where nobody does or it may not be seen.
    pub async fn listeners(&self, port: u16) -> Vec<Occupant> {
        tokio::task::spawn_blocking(move || procfs::listeners(port)).await.unwrap_or_default()
    }

    fn supervise(
        &self,
        identity: Identity,
        leader: (u32, u64),
        child: Option<Child>,
        tail: Option<Tail>,
        log: LogTail,
    ) -> Running {
        let instance = identity.instance;
        let live = Arc::new(Live {
            instance,
            stops: AtomicUsize::new(0),
            was_stopped: AtomicBool::new(false),
        });
        self.live().insert(instance, Arc::clone(&live));
        let (exit, exit_seen) = watch::channel(None);
        let supervised = Supervised {
            watch: ExitWatch::open(leader.0, leader.1),
            group: Group::new(leader.0, leader.1, &identity),
            child,
            written: tail.as_ref().map(|tail| Written::watch(tail.path())),
            tail,
            log: log.clone(),
            live,
            exit,
        };
        let all = Arc::clone(&self.live);
        tokio::spawn(async move {
            supervised.run().await;
            lock(&all).remove(&instance);
        });
        running(identity, leader, log, exit_seen)
    }

    fn prune_logs(&self, spec: &LaunchSpec) {
        let live: Vec<InstanceId> = self.live().keys().copied().collect();
        let dir = spec.log_dir.clone();
        // Beside the start, which waits for no disk.
        drop(tokio::task::spawn_blocking(move || logfile::prune(&dir, |id| live.contains(&id))));
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Arc<Live>>> {
        lock(&self.live)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn running(
    identity: Identity,
    (pid, start_ticks): (u32, u64),
    log: LogTail,
    exit: watch::Receiver<Option<super::ExitReport>>,
) -> Running {
    let endpoint = Endpoint::new(format!("http://127.0.0.1:{}", identity.port), None);
    let handle = RuntimeHandle::Process { pid, start_ticks };
    Running { identity, endpoint, handle, log, exit }
}

/// What a process was given when it began.
pub fn given(pid: u32) -> Given {
    Given { args: procfs::args(pid), env: procfs::environ(pid) }
}

/// Host RAM of a process group and of what descends from it.
pub fn host_use(leader: u32) -> Option<HostUse> {
    host_use::of_processes(group::pids_of(leader).into_iter())
}

fn spawn(command: &command::Command, log: std::fs::File) -> io::Result<Child> {
    let mut process = tokio::process::Command::new(&command.program);
    // Wharf's own settings (keys among them) are no business of an engine.
    for (key, _) in std::env::vars_os() {
        if key.to_str().is_some_and(|key| key.starts_with("WHARF_")) {
            process.env_remove(key);
        }
    }
    process
        .arg0(&command.arg0)
        .args(&command.args)
        .envs(&command.env)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // A group of its own: Ctrl-C in Wharf's terminal does not reach it.
        .process_group(0)
        .kill_on_drop(false);
    if let Some(cwd) = &command.cwd {
        process.current_dir(cwd);
    }
    process.spawn()
}

fn fault_of(error: &io::Error) -> FaultKind {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => FaultKind::CommandMissing,
        io::ErrorKind::OutOfMemory => FaultKind::OutOfMemory,
        io::ErrorKind::ArgumentListTooLong | io::ErrorKind::InvalidInput => FaultKind::BadSpec,
        _ => FaultKind::Internal,
    }
}

fn stop_signal(name: &str) -> Signal {
    let full = if name.starts_with("SIG") { name.to_owned() } else { format!("SIG{name}") };
    Signal::from_str(&full).unwrap_or_else(|_| {
        tracing::warn!(signal = name, "unknown stop signal: SIGTERM is sent");
        Signal::SIGTERM
    })
}
