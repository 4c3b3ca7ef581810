//! A model's entry as the configuration would make it, with defaults.

use std::collections::BTreeMap;
use std::time::Duration;

use wharf::config::catalog::{
    DockerSpec, EngineKind, ExternalSpec, Health, ModelSpec, ProcessSpec, RuntimeSpec,
};

pub fn model(engine: EngineKind, runtime: RuntimeSpec) -> ModelSpec {
    ModelSpec {
        engine,
        runtime,
        health: Health { path: Some("/health".to_owned()), stall: Duration::from_secs(60) },
        ..ModelSpec::plain("coder")
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
