//! What holds where models.yaml says nothing, and a model with nothing special about it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::catalog::{
    AuthSettings, CaptureSettings, EngineKind, Filters, GpuProvider, GpuRequest, GpuSettings,
    Health, ModelSpec, OnExit, ProcessSpec, QueueSettings, RamSettings, RateLimits, Retention,
    RuntimeSpec, Settings, StopSpec, SwapMode, SwapSettings, TtlBounds, Vram, WaitingSettings,
    WaitingStyle,
};
use crate::units::{Bytes, ModelName, Priority};

impl Default for Settings {
    /// The documented defaults.
    fn default() -> Settings {
        Settings {
            gateway: SocketAddr::from(([127, 0, 0, 1], 8080)),
            orchestrator: SocketAddr::from(([127, 0, 0, 1], 8888)),
            connections: None,
            tls: None,
            swap: SwapSettings {
                mode: SwapMode::MultiActive,
                max_concurrent_models: 0,
                max_wait: None,
                min_residency: Duration::from_secs(3),
                drain_timeout: Duration::from_secs(300),
                vram_timeout: Duration::from_secs(30),
                start_timeout: Duration::from_secs(600),
                shutdown_timeout: Duration::from_secs(60),
                on_exit: OnExit::Keep,
                read_ahead: Bytes::MAX,
            },
            queue: QueueSettings {
                limit: 1024,
                per_model: 256,
                timeout: Duration::from_secs(540),
                body_limit: Bytes::mib(64),
                total_bodies: Bytes::gib(1),
            },
            gpu: GpuSettings {
                provider: GpuProvider::Auto,
                reserve: Bytes::mib(512),
                memory: Vec::new(),
                release_lag: Duration::ZERO,
                foreign: Vec::new(),
            },
            ram: RamSettings::default(),
            engine_ports: (18051, 18999),
            store: PathBuf::from("wharf.db"),
            auth: AuthSettings::default(),
            docker_host: None,
            cors: Vec::new(),
            hosts: Vec::new(),
            waiting: WaitingSettings {
                style: WaitingStyle::Comment,
                after: Duration::from_secs(10),
            },
            front_doors: None,
            rate_limits: RateLimits::default(),
            captures: CaptureSettings::default(),
            retention: Retention::default(),
            announce: Vec::new(),
            watch: false,
            check_interval: Duration::from_secs(30),
        }
    }
}

impl ModelSpec {
    /// A process on one GPU that says nothing of its memory: for catalogs that are built by hand.
    pub fn plain(name: &str) -> ModelSpec {
        ModelSpec {
            name: ModelName::new(name),
            aliases: Vec::new(),
            display_name: None,
            description: None,
            model_type: "llm".to_owned(),
            tags: Vec::new(),
            unlisted: false,
            engine: EngineKind::Openai,
            runtime: RuntimeSpec::Process(ProcessSpec::default()),
            gpus: GpuRequest::Count(1),
            vram: Vram::Unknown,
            ram: None,
            size_gb: None,
            priority: Priority::Normal,
            pinned: false,
            warmup: false,
            ttl: None,
            ttl_bounds: TtlBounds::default(),
            grace: Duration::ZERO,
            keep: Vec::new(),
            concurrency: None,
            health: Health { path: None, stall: Duration::from_secs(60) },
            start_timeout: None,
            stop: StopSpec { signal: "SIGTERM".to_owned(), grace: Duration::from_secs(10) },
            canary: false,
            warmup_request: false,
            read_ahead: None,
            include_usage: true,
            upstream_name: None,
            port: None,
            waiting: None,
            sleep: None,
            adapter: None,
            lora: false,
            filters: Filters::default(),
            metadata: serde_json::Map::new(),
            answer_timeout: None,
            http: None,
            registered: false,
            peer: None,
            line: 1,
        }
    }
}
