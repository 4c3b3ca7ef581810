//! A model's entry as the configuration would make it, with defaults.

use std::collections::BTreeMap;
use std::time::Duration;

use wharf::config::catalog::{
    DockerSpec, EngineKind, ExternalSpec, GpuRequest, Health, ModelSpec, ProcessSpec, RuntimeSpec,
    StopSpec, Vram,
};
use wharf::units::{ModelName, Priority};

pub fn model(engine: EngineKind, runtime: RuntimeSpec) -> ModelSpec {
    ModelSpec {
        name: ModelName::new("coder"),
        aliases: Vec::new(),
        display_name: None,
        description: None,
        model_type: "llm".to_owned(),
        tags: Vec::new(),
        unlisted: false,
        engine,
        runtime,
        gpus: GpuRequest::Count(1),
        vram: Vram::Unknown,
        ram: None,
        size_gb: None,
        priority: Priority::Normal,
        pinned: false,
        warmup: false,
        ttl: None,
        concurrency: None,
        health: Health { path: Some("/health".to_owned()), stall: Duration::from_secs(60) },
        start_timeout: None,
        stop: StopSpec { signal: "SIGTERM".to_owned(), grace: Duration::from_secs(10) },
        canary: false,
        upstream_name: None,
        port: None,
        waiting: None,
        sleep: None,
        line: 1,
    }
}

pub fn docker(image: &str, args: &str) -> RuntimeSpec {
    RuntimeSpec::Docker(DockerSpec {
        image: Some(image.to_owned()),
        args: shell_words::split(args).expect("words"),
        ..DockerSpec::default()
    })
}

pub fn process(command: &str) -> RuntimeSpec {
    RuntimeSpec::Process(ProcessSpec {
        argv: shell_words::split(command).expect("words"),
        env: BTreeMap::new(),
        cwd: None,
    })
}

pub fn external(url: &str) -> RuntimeSpec {
    RuntimeSpec::External(ExternalSpec { url: url.to_owned(), api_key: None, ca: None })
}
