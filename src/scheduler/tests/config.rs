//! Models and settings with ordinary values, to be changed by each test.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config::catalog::*;
use crate::units::*;

pub fn spec(name: &str, gib: u64) -> ModelSpec {
    ModelSpec {
        name: name.into(),
        aliases: Vec::new(),
        display_name: None,
        description: None,
        model_type: "llm".to_owned(),
        tags: Vec::new(),
        unlisted: false,
        engine: EngineKind::Llamacpp,
        runtime: RuntimeSpec::Process(ProcessSpec::default()),
        gpus: GpuRequest::Count(1),
        vram: Vram::Declared(Bytes::gib(gib)),
        ram: None,
        size_gb: None,
        priority: Priority::Normal,
        pinned: false,
        warmup: false,
        ttl: None,
        concurrency: None,
        health: Health { path: None, stall: Duration::from_secs(60) },
        start_timeout: None,
        stop: StopSpec { signal: "SIGTERM".to_owned(), grace: Duration::from_secs(5) },
        canary: false,
        upstream_name: None,
        port: None,
        waiting: None,
        sleep: None,
        line: 1,
    }
}

pub fn catalog(models: Vec<ModelSpec>) -> Catalog {
    let address = "127.0.0.1:0".parse().expect("a constant");
    Catalog {
        models: models.into_iter().map(|m| (m.name.clone(), Arc::new(m))).collect(),
        aliases: BTreeMap::new(),
        settings: Settings {
            gateway: address,
            orchestrator: address,
            swap: SwapSettings {
                mode: SwapMode::MultiActive,
                max_concurrent_models: 0,
                max_wait: None,
                min_residency: Duration::from_secs(3),
                drain_timeout: Duration::from_secs(300),
                vram_timeout: Duration::from_secs(30),
                start_timeout: Duration::from_secs(600),
                shutdown_timeout: Duration::from_secs(60),
                on_exit: OnExit::Stop,
            },
            queue: QueueSettings {
                limit: 1024,
                per_model: 256,
                timeout: Duration::from_secs(540),
                body_limit: Bytes::mib(64),
                total_bodies: Bytes::gib(1),
            },
            gpu: GpuSettings {
                provider: GpuProvider::Simulated,
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
        },
    }
}
