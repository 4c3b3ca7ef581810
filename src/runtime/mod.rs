//! How an engine is run: as a Docker container, as a process, inside a running Ollama, or
//! elsewhere (external).
//!
//! A runtime decides nothing. It does what it is told about one instance and reports what
//! happened. Every instance carries an [`Identity`] by which it is found again after a crash.

mod circuit;
pub mod docker;
pub mod external;
mod host_use;
mod key;
pub mod log;
pub mod ollama;
pub mod process;
pub mod read_ahead;
pub mod redact;
pub(crate) mod tls;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::catalog::{ModelSpec, RuntimeSpec, StopSpec};
use crate::scheduler::event::{Fault, HostUse};
use crate::units::{GpuId, InstanceId, ModelName};

pub use circuit::Circuit;
pub use docker::Made;
pub use key::{EngineKey, LaunchKey};
pub use log::LogTail;
pub use tls::{Tls, tls_error, trouble as tls_trouble};

/// What makes an instance ours: in container labels (`wharf.*`) or in the environment of the
/// process (`WHARF_*`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub installation: String,
    pub instance: InstanceId,
    pub model: ModelName,
    /// Hash of everything that shapes the running engine; a difference means "changed".
    pub spec_hash: String,
    pub gpus: Vec<GpuId>,
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuDevice {
    pub id: GpuId,
    pub uuid: String,
}

/// Everything a runtime needs to start one instance.
#[derive(Clone, Debug)]
pub struct LaunchSpec {
    pub identity: Identity,
    pub model: Arc<ModelSpec>,
    pub gpus: Vec<GpuDevice>,
    /// Loopback port on the host under which the engine shall be reached.
    pub port: u16,
    /// Port on which the engine listens inside a container.
    pub container_port: u16,
    /// Arguments that Wharf derives, appended to the configured ones.
    pub args: Vec<String>,
    /// Environment that Wharf derives; configured values win.
    pub env: BTreeMap<String, String>,
    pub api_key: LaunchKey,
    /// Folder for the capped log files of processes.
    pub log_dir: PathBuf,
}

/// A started instance.
#[derive(Clone, Debug)]
pub struct Running {
    pub identity: Identity,
    pub endpoint: Endpoint,
    pub handle: RuntimeHandle,
    pub log: LogTail,
    /// `Some` once the instance ended, by itself or stopped.
    pub exit: watch::Receiver<Option<ExitReport>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RuntimeHandle {
    Process {
        /// Leader of the process group.
        pid: u32,
        /// Field 22 of /proc/PID/stat: tells a reused pid from ours.
        start_ticks: u64,
    },
    Docker {
        id: String,
        name: String,
        /// Named in the configuration, made by somebody else: stopped, never removed.
        named: bool,
    },
    External,
    /// A model inside a running Ollama, by the name that it has there.
    Ollama {
        model: String,
    },
}

/// Where an instance is reached. `base` has no trailing slash; a path in it precedes every
/// request's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `http://127.0.0.1:18051`
    pub base: String,
    /// Sent as `Authorization: Bearer`, where the engine wants one.
    pub api_key: Option<EngineKey>,
    /// For `https://`.
    pub tls: Option<Tls>,
    /// Of servers elsewhere: told whether requests reach them.
    pub circuit: Option<Circuit>,
}

impl Endpoint {
    pub fn new(base: impl Into<String>, api_key: Option<EngineKey>) -> Endpoint {
        Endpoint { base: base.into(), api_key, tls: None, circuit: None }
    }
}

/// What a running engine was given, as the system shows it. No `Debug`: it holds secrets.
#[derive(Default)]
pub struct Given {
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub oom_killed: bool,
}

impl std::fmt::Display for ExitReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.oom_killed, self.code, self.signal) {
            (true, _, _) => write!(f, "killed by the kernel: out of memory (host RAM)"),
            (_, _, Some(signal)) => write!(f, "ended by signal {signal}"),
            (_, Some(code), _) => write!(f, "exited with code {code}"),
            _ => write!(f, "ended"),
        }
    }
}

/// An instance of ours met at start-up (or when a runtime came back).
#[derive(Clone, Debug)]
pub struct Found {
    pub running: Running,
    /// Containers can be there without running.
    pub alive: bool,
}

/// A container or process that holds a GPU and is none of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    pub name: String,
    pub image: String,
    pub pids: Vec<u32>,
}

/// Where long work (pull, load) reports how far it is.
#[derive(Clone, Debug)]
pub struct Progress(Arc<watch::Sender<ProgressNow>>);

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProgressNow {
    /// `load_weights`, `pull`, `capture_graphs`, …: the engine's or runtime's own phase.
    pub stage: String,
    /// 0.0..=1.0 of that stage, where it can be told.
    pub fraction: Option<f32>,
    /// More for people: `1.2 GiB of 9.1 GiB, 85 MiB/s`.
    pub detail: String,
}

impl Progress {
    pub fn new() -> (Progress, watch::Receiver<ProgressNow>) {
        let (tx, rx) = watch::channel(ProgressNow::default());
        (Progress(Arc::new(tx)), rx)
    }

    pub fn stage(&self) -> String {
        self.0.borrow().stage.clone()
    }

    /// Goes from one stage to the next, unless another has followed meanwhile.
    pub fn follow(&self, before: &str, stage: &str) {
        if self.0.borrow().stage == before {
            self.set(stage, None, "");
        }
    }

    /// More of a stage that was set before, as long as no other has followed.
    pub fn go_on(&self, stage: &str, fraction: Option<f32>, detail: impl Into<String>) {
        if self.0.borrow().stage == stage {
            self.set(stage, fraction, detail);
        }
    }

    pub fn set(&self, stage: &str, fraction: Option<f32>, detail: impl Into<String>) {
        let next = ProgressNow { stage: stage.to_owned(), fraction, detail: detail.into() };
        self.0.send_if_modified(|now| {
            let changed = *now != next;
            if changed {
                *now = next;
            }
            changed
        });
    }
}

/// The runtimes of one installation; each model's own is chosen by its spec.
#[derive(Clone, Debug)]
pub struct Runtimes {
    pub process: process::ProcessRuntime,
    pub docker: docker::DockerRuntime,
    pub external: external::ExternalRuntime,
    pub ollama: ollama::OllamaRuntime,
}

impl Runtimes {
    /// Checks what can be checked without touching anything: command or image named correctly,
    /// daemon reachable, ports free. Fast.
    pub async fn preflight(&self, spec: &LaunchSpec) -> Result<(), Fault> {
        match &spec.model.runtime {
            RuntimeSpec::Process(_) => self.process.preflight(spec).await,
            RuntimeSpec::Docker(_) => self.docker.preflight(spec).await,
            RuntimeSpec::External(_) => self.external.preflight(spec).await,
            RuntimeSpec::Ollama(_) => self.ollama.preflight(spec).await,
        }
    }

    /// Brings the image (and weights) here. Cancel by dropping the future.
    pub async fn fetch(&self, spec: &LaunchSpec, progress: &Progress) -> Result<(), Fault> {
        match &spec.model.runtime {
            RuntimeSpec::Docker(_) => self.docker.fetch(spec, progress).await,
            RuntimeSpec::Ollama(_) => self.ollama.fetch(spec, progress).await,
            RuntimeSpec::Process(_) | RuntimeSpec::External(_) => Ok(()),
        }
    }

    /// What of a start can be done before there is room for it: the container is created.
    pub async fn make(&self, spec: &LaunchSpec) -> Result<Option<Made>, Fault> {
        match &spec.model.runtime {
            RuntimeSpec::Docker(_) => self.docker.make(spec).await,
            RuntimeSpec::Process(_) | RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => Ok(None),
        }
    }

    /// Returns once the process or container runs; readiness is the engine's affair.
    /// If it fails, or the future is dropped, nothing of the instance is left behind.
    /// `ahead`: what `make` made for it.
    pub async fn start(&self, spec: &LaunchSpec, ahead: Option<Made>) -> Result<Running, Fault> {
        match &spec.model.runtime {
            RuntimeSpec::Process(_) => self.process.start(spec).await,
            RuntimeSpec::Docker(_) => self.docker.start_made(spec, ahead).await,
            RuntimeSpec::External(_) => self.external.start(spec).await,
            RuntimeSpec::Ollama(_) => self.ollama.start(spec).await,
        }
    }

    /// While an engine loads: has its log told of lines that grow before they end, where that does
    /// not come by itself. For as long as it is polled.
    pub async fn follow_unfinished(&self, running: &Running) -> Infallible {
        match &running.handle {
            RuntimeHandle::Docker { id, .. } => {
                self.docker.follow_unfinished(id, &running.log).await
            }
            RuntimeHandle::Process { .. }
            | RuntimeHandle::External
            | RuntimeHandle::Ollama { .. } => pending().await,
        }
    }

    /// Signal, grace, kill, remove. `Ok` means: it is gone, whole process group or container.
    pub async fn stop(&self, running: &Running, stop: &StopSpec) -> Result<(), Fault> {
        match &running.handle {
            RuntimeHandle::Process { .. } => self.process.stop(running, stop).await,
            RuntimeHandle::Docker { .. } => self.docker.stop(running, stop).await,
            RuntimeHandle::External => {
                self.external.stop(running);
                Ok(())
            }
            RuntimeHandle::Ollama { model } => self.ollama.stop(running, model).await,
        }
    }

    /// Arguments and environment of a running engine; empty where they cannot be seen.
    pub async fn given(&self, running: &Running) -> Given {
        match &running.handle {
            RuntimeHandle::Process { pid, .. } => process::given(*pid),
            RuntimeHandle::Docker { id, .. } => self.docker.given(id).await,
            RuntimeHandle::External | RuntimeHandle::Ollama { .. } => Given::default(),
        }
    }

    /// Host pids of the instance, as far as they can be seen from here.
    pub async fn pids(&self, running: &Running) -> Vec<u32> {
        match &running.handle {
            RuntimeHandle::Process { pid, .. } => self.process.group_pids(*pid),
            RuntimeHandle::Docker { id, .. } => self.docker.pids(id).await,
            RuntimeHandle::External | RuntimeHandle::Ollama { .. } => Vec::new(),
        }
    }

    /// Host RAM of the instance: of all its processes, or of its container. `None` where it cannot
    /// be told.
    pub async fn host_use(&self, handle: &RuntimeHandle) -> Option<HostUse> {
        match handle {
            RuntimeHandle::Process { pid, .. } => {
                let leader = *pid;
                tokio::task::spawn_blocking(move || process::host_use(leader)).await.ok()?
            }
            RuntimeHandle::Docker { id, .. } => match host_use::of_container(id) {
                Some(used) => Some(used),
                None => self.docker.host_use(id).await,
            },
            RuntimeHandle::External | RuntimeHandle::Ollama { .. } => None,
        }
    }
}

/// Grace below which an engine's own drain would be cut off.
pub const MIN_STOP_GRACE: Duration = Duration::from_secs(2);
