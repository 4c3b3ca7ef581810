//! The validated configuration: immutable, shared, free of YAML.
//!
//! `config` builds it from `models.yaml`; everything else only reads it. A reload builds a new one
//! and replaces it whole.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::store::MEMORY;
use crate::units::{Bytes, ModelName, Priority};

mod access;
mod groups;
mod lifecycle;
mod serving;

pub use access::{ApiKey, AuthSettings, KeyDigest, RateLimits, Scope, StartRule};
pub use groups::Asked;
pub use lifecycle::{Group, KeepWindow, LocalTime, TtlBounds};
pub use serving::{
    Adapter, Announce, CaptureSettings, Filters, HttpService, PathRule, Peer, Retention, Route,
    RouteKind, TlsFiles,
};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Catalog {
    pub models: BTreeMap<ModelName, Arc<ModelSpec>>,
    /// alias → model
    pub aliases: BTreeMap<String, ModelName>,
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
    /// Names that lead to one of several models.
    #[serde(default)]
    pub routes: BTreeMap<String, Route>,
    /// Other servers whose models are used as `peer/model`.
    #[serde(default)]
    pub peers: BTreeMap<String, Arc<Peer>>,
    /// Templates that registrations may name, in the order of models.yaml.
    #[serde(default)]
    pub registrable: Vec<String>,
    pub settings: Settings,
}

impl Catalog {
    /// The model behind a name or an alias.
    pub fn resolve(&self, name: &str) -> Option<&Arc<ModelSpec>> {
        self.models.get(name).or_else(|| self.models.get(self.aliases.get(name)?))
    }

    pub fn model(&self, name: &ModelName) -> Option<&Arc<ModelSpec>> {
        self.models.get(name)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    pub gateway: SocketAddr,
    pub orchestrator: SocketAddr,
    /// `listen.connections`; `None`: as the limit of open files allows.
    #[serde(default)]
    pub connections: Option<u32>,
    /// `listen.tls`; `None`: plain HTTP.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    pub swap: SwapSettings,
    pub queue: QueueSettings,
    pub gpu: GpuSettings,
    #[serde(default)]
    pub ram: RamSettings,
    /// Host ports on which engines listen (loopback).
    pub engine_ports: (u16, u16),
    /// Path of the store, `:memory:` for none; the state folder lies beside it (extension `.d`).
    pub store: PathBuf,
    pub auth: AuthSettings,
    /// Docker daemon: `None` means DOCKER_HOST or the default socket.
    pub docker_host: Option<String>,
    /// Browser origins that may call the APIs.
    pub cors: Vec<String>,
    /// Host names beside loopback and the listen addresses that requests may carry in `Host`.
    pub hosts: Vec<String>,
    /// How waiting streaming clients are told what happens.
    pub waiting: WaitingSettings,
    /// Ports of front doors, one model each: `ports:`.
    #[serde(default)]
    pub front_doors: Option<(u16, u16)>,
    /// For callers whose key says nothing, and where no keys are configured.
    #[serde(default)]
    pub rate_limits: RateLimits,
    #[serde(default)]
    pub captures: CaptureSettings,
    #[serde(default)]
    pub retention: Retention,
    /// Where instances that become ready or go are told.
    #[serde(default)]
    pub announce: Vec<Announce>,
    /// Reload when the file changes: `reload: { watch: true }`.
    #[serde(default)]
    pub watch: bool,
    /// A key of the model pool manager, shown to its users. Deadlines are exact here.
    #[serde(default)]
    pub check_interval: Duration,
}

impl Settings {
    /// With which clients reach the listeners.
    pub const fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Folder of the lock, journal, engine logs and reserved ids; needed also without a store.
    pub fn state_dir(&self) -> PathBuf {
        if self.store == Path::new(MEMORY) {
            return PathBuf::from("wharf.d");
        }
        self.store.with_extension("d")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwapMode {
    MultiActive,
    SingleActive,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwapSettings {
    pub mode: SwapMode,
    /// 0: as many as proven memory holds.
    pub max_concurrent_models: u32,
    /// `None`: max(30 s, 3 × the learned move of the model).
    pub max_wait: Option<Duration>,
    pub min_residency: Duration,
    pub drain_timeout: Duration,
    pub vram_timeout: Duration,
    /// Ceiling of one start, fetching excluded.
    pub start_timeout: Duration,
    /// At the end of Wharf: for requests to end, then once more for engines to end.
    pub shutdown_timeout: Duration,
    pub on_exit: OnExit,
    /// At most so many bytes of the next model's files are read into the page cache while the one
    /// before it leaves; zero: none.
    #[serde(default)]
    pub read_ahead: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExit {
    /// Docker instances stay and are adopted at the next start. Processes stop.
    Keep,
    Stop,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueueSettings {
    pub limit: u32,
    pub per_model: u32,
    pub timeout: Duration,
    pub body_limit: Bytes,
    pub total_bodies: Bytes,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuSettings {
    pub provider: GpuProvider,
    /// Left free on every GPU.
    pub reserve: Bytes,
    /// Declared sizes: of the simulated GPUs, or of GPUs whose memory cannot be read.
    pub memory: Vec<Bytes>,
    /// Simulated only: how long memory stays taken after its process ended.
    pub release_lag: Duration,
    /// Simulated only: memory that a stranger holds, per GPU.
    pub foreign: Vec<Bytes>,
}

/// Host RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamSettings {
    /// `None`: what the kernel says.
    pub total: Option<Bytes>,
    /// Left to the system and to other programs.
    pub reserve: Bytes,
}

impl Default for RamSettings {
    fn default() -> RamSettings {
        RamSettings { total: None, reserve: Bytes::gib(2) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuProvider {
    Auto,
    Nvml,
    None,
    Simulated,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingSettings {
    pub style: WaitingStyle,
    /// How long the response head is held back before a waiting stream is opened.
    pub after: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WaitingStyle {
    Comment,
    Chunk,
    Reasoning,
    Off,
}

/// One entry of `models:` with templates, macros and defaults applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    pub name: ModelName,
    pub aliases: Vec<String>,
    pub display_name: Option<String>,
    pub description: Option<String>,
    /// `llm`, `embedding`, `code`, `vision`, …: free text, shown only.
    pub model_type: String,
    pub tags: Vec<String>,
    pub unlisted: bool,
    pub engine: EngineKind,
    pub runtime: RuntimeSpec,
    pub gpus: GpuRequest,
    pub vram: Vram,
    /// Host RAM that the engine takes, promised to it while it runs; `None`: nothing is.
    pub ram: Option<Bytes>,
    /// Size of the weights: what sleep level 1 moves to host RAM.
    pub size_gb: Option<f64>,
    pub priority: Priority,
    /// Never evicted.
    pub pinned: bool,
    /// Loaded at start, restored into free memory, never unloaded by ttl.
    pub warmup: bool,
    /// From the last activity; `None`: the model leaves only when room is wanted.
    pub ttl: Option<Duration>,
    /// What an extension or a patch may make of `ttl`.
    #[serde(default)]
    pub ttl_bounds: TtlBounds,
    /// After the TTL: still ready, and a request in this time rescues the model.
    #[serde(default)]
    pub grace: Duration,
    /// Times of day at which the model shall be loaded.
    #[serde(default)]
    pub keep: Vec<KeepWindow>,
    /// Requests served at once; `None`: unbounded (the engine queues).
    pub concurrency: Option<u32>,
    pub health: Health,
    pub start_timeout: Option<Duration>,
    pub stop: StopSpec,
    /// Ask one token before the model is called ready.
    pub canary: bool,
    /// Ask one token before the model is called ready, to warm the engine up; whatever comes of it.
    #[serde(default)]
    pub warmup_request: bool,
    /// Instead of `swap.read_ahead`.
    #[serde(default)]
    pub read_ahead: Option<Bytes>,
    /// Ask the engine for the usage of every stream, so that tokens are always counted.
    pub include_usage: bool,
    /// The name under which the engine knows the model; `None`: `name`.
    pub upstream_name: Option<String>,
    /// Fixed engine port instead of one from `engine_ports`.
    pub port: Option<u16>,
    pub waiting: Option<WaitingSettings>,
    /// vLLM's sleep level; `None`: the engine does not sleep.
    pub sleep: Option<u8>,
    /// A LoRA adapter: served by the instance of another model.
    #[serde(default)]
    pub adapter: Option<Adapter>,
    /// Adapters are served beside it, and its own command does not say so: Wharf adds what the
    /// engine needs. Set by [`Catalog::link_adapters`].
    #[serde(default)]
    pub lora: bool,
    /// What is done to request bodies before they are forwarded.
    #[serde(default)]
    pub filters: Filters,
    /// Free data, shown in `/v1/models`.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// From the request's dispatch to the engine's first byte; `None`: the gateway's own bound.
    #[serde(default)]
    pub answer_timeout: Option<Duration>,
    /// `engine: http` only: what of its traffic is work.
    #[serde(default)]
    pub http: Option<Arc<HttpService>>,
    /// Came by registration, not from models.yaml.
    #[serde(default)]
    pub registered: bool,
    /// One of another server's models: that peer's name. `upstream_name` is its name there.
    #[serde(default)]
    pub peer: Option<String>,
    /// Where this entry stands in models.yaml (1-based), for messages.
    pub line: u32,
}

impl ModelSpec {
    /// The name that requests to the engine must carry.
    pub fn served_name(&self) -> &str {
        self.upstream_name.as_deref().unwrap_or(self.name.as_str())
    }

    /// Whether two entries say the same. (For what runs: `runs_like`.)
    pub fn is_same(&self, other: &ModelSpec) -> bool {
        ModelSpec { line: other.line, ..self.clone() } == *other
    }

    pub fn is_external(&self) -> bool {
        matches!(self.runtime, RuntimeSpec::External(_))
    }

    /// Whether its engine gets a port of this machine from Wharf.
    pub fn takes_a_port(&self) -> bool {
        matches!(self.runtime, RuntimeSpec::Docker(_) | RuntimeSpec::Process(_))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    Vllm,
    Llamacpp,
    /// A model inside a running Ollama, loaded and unloaded by its API.
    Ollama,
    /// Anything that speaks the OpenAI API.
    Openai,
    /// Not an LLM server: only some of its traffic is work.
    Http,
}

impl EngineKind {
    /// As it is written in models.yaml.
    pub const fn as_str(self) -> &'static str {
        match self {
            EngineKind::Vllm => "vllm",
            EngineKind::Llamacpp => "llamacpp",
            EngineKind::Ollama => "ollama",
            EngineKind::Openai => "openai",
            EngineKind::Http => "http",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeSpec {
    Docker(DockerSpec),
    Process(ProcessSpec),
    External(ExternalSpec),
    Ollama(OllamaSpec),
}

impl RuntimeSpec {
    pub const fn as_str(&self) -> &'static str {
        match self {
            RuntimeSpec::Docker(_) => "docker",
            RuntimeSpec::Process(_) => "process",
            RuntimeSpec::External(_) => "external",
            RuntimeSpec::Ollama(_) => "ollama",
        }
    }
}

/// Its `Debug` leaves out what may hold secrets: arguments and environment.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DockerSpec {
    /// An existing container, managed by name. Excludes every other key but `port`.
    pub container: Option<String>,
    pub image: Option<String>,
    pub args: Vec<String>,
    pub entrypoint: Option<Vec<String>>,
    pub env: BTreeMap<String, String>,
    pub volumes: Vec<String>,
    pub ipc: Option<String>,
    pub shm_size: Option<Bytes>,
    /// name → (soft, hard); -1: unlimited
    pub ulimits: BTreeMap<String, (i64, i64)>,
    pub labels: BTreeMap<String, String>,
    pub network: Option<String>,
    /// Docker runtime, e.g. `nvidia`.
    pub runtime: Option<String>,
    /// Use CDI device names instead of device requests.
    pub cdi: bool,
    pub init: Option<bool>,
    pub user: Option<String>,
    pub pull: PullPolicy,
    /// Port on which the engine listens inside the container; `None`: the engine's usual one.
    pub port: Option<u16>,
    /// Container memory limit.
    pub memory: Option<Bytes>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullPolicy {
    Always,
    #[default]
    Missing,
    Never,
}

/// Its `Debug` leaves out what may hold secrets: arguments and environment.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSpec {
    /// Program and arguments; `${PORT}` and `${MODEL}` not yet replaced.
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub cwd: Option<PathBuf>,
}

impl std::fmt::Debug for DockerSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DockerSpec")
            .field("container", &self.container)
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ProcessSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessSpec").field("program", &self.argv.first()).finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct ExternalSpec {
    /// `http://host:port`, or https; a path precedes those of the requests.
    pub url: String,
    /// Authorities to trust instead of the machine's, in PEM.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    #[serde(skip_serializing, default)]
    pub api_key: Option<String>,
}

/// A model of a running Ollama, known there as the model's `upstream_name`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OllamaSpec {
    pub at: ExternalSpec,
    /// Whether Ollama shall pull what it does not have.
    #[serde(default)]
    pub pull: PullPolicy,
}

impl std::fmt::Debug for ExternalSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ExternalSpec({})", self.url)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuRequest {
    /// Runs on the CPU.
    None,
    Count(u16),
    /// Indexes or UUIDs.
    Explicit(Vec<String>),
}

/// Declared footprint on each GPU that the model uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vram {
    /// Alone once, measured, then packed.
    Unknown,
    Declared(Bytes),
    /// What pinned models leave.
    Rest,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// `None`: a listening port is enough.
    pub path: Option<String>,
    /// Silence (no log line, no change of readiness) after which a start counts as stalled.
    pub stall: Duration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StopSpec {
    /// Signal name, e.g. `SIGTERM`.
    pub signal: String,
    /// From the stop signal to SIGKILL.
    pub grace: Duration,
}
