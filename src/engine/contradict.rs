//! Where a model's own arguments say something else than `models.yaml` does.

use super::command_line::CommandLine;
use super::derive::{
    DATA_PARALLEL, HOST, MEMORY_SHARE, PIPELINE_PARALLEL, PORT, SERVED_NAME, SLEEP_MODE,
    TENSOR_PARALLEL,
};
use super::key;
use crate::config::catalog::{EngineKind, GpuRequest, ModelSpec, RuntimeSpec, Vram};

/// Flags that put an engine where Wharf cannot reach it.
const UNREACHABLE: &[(&str, &str)] = &[
    ("--ssl-keyfile", TLS),
    ("--ssl-certfile", TLS),
    ("--ssl-key-file", TLS),
    ("--ssl-cert-file", TLS),
    ("--uds", "Wharf reaches engines by TCP: remove it"),
];
const KEY: &str = "only its shell knows this key: remove it (Wharf gives each engine a key of its \
    own), or write it as ${env.NAME}";
const TLS: &str = "Wharf speaks plain HTTP to engines on this machine: remove it";

pub fn contradictions(spec: &ModelSpec) -> Vec<(String, String)> {
    let line = CommandLine::of(spec);
    let mut found = Found::default();
    if !spec.takes_a_port() {
        return found.0;
    }
    match spec.engine {
        EngineKind::Vllm => {
            address(spec, &line, &mut found);
            reachable(&line, &mut found);
            vllm(spec, &line, &mut found);
        }
        EngineKind::Llamacpp => {
            address(spec, &line, &mut found);
            reachable(&line, &mut found);
        }
        // A generic engine's flags may mean anything.
        EngineKind::Openai | EngineKind::Ollama | EngineKind::Http => {}
    }
    found.0
}

#[derive(Default)]
struct Found(Vec<(String, String)>);

impl Found {
    fn add(&mut self, argument: &str, message: String) {
        self.0.push((argument.to_owned(), message));
    }
}

fn address(spec: &ModelSpec, line: &CommandLine, found: &mut Found) {
    let host = line.value(HOST);
    // A port that is itself a placeholder follows.
    let port = line.value(PORT).and_then(|port| port.parse::<u16>().ok());
    match &spec.runtime {
        RuntimeSpec::Docker(docker) => {
            if host.is_some_and(|host| ["127.0.0.1", "localhost", "::1"].contains(&host)) {
                found.add(
                    "--host",
                    "in a container the engine must listen on 0.0.0.0: remove `--host` (Wharf \
                     adds it; the port is published on loopback only)"
                        .to_owned(),
                );
            }
            if let (Some(declared), Some(port)) = (docker.port, port)
                && declared != port
            {
                found.add(
                    "--port",
                    format!("`--port {port}` but `docker.port: {declared}`: remove one of them"),
                );
            }
        }
        RuntimeSpec::Process(_) => {
            if let Some(host) = host
                && !["127.0.0.1", "localhost", "0.0.0.0"].contains(&host)
            {
                found.add(
                    "--host",
                    format!("Wharf reaches the engine at 127.0.0.1, not {host}: remove `--host`"),
                );
            }
            if let (Some(declared), Some(port)) = (spec.port, port)
                && declared != port
            {
                found.add(
                    "--port",
                    format!("`--port {port}` but `port: {declared}`: write `--port ${{PORT}}`"),
                );
            }
        }
        RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => {}
    }
}

fn reachable(line: &CommandLine, found: &mut Found) {
    for (flag, why) in UNREACHABLE {
        if line.has(&[flag]) {
            found.add(flag, (*why).to_owned());
        }
    }
    if key::is_unreadable(line) {
        found.add("--api-key", KEY.to_owned());
    }
}

fn vllm(spec: &ModelSpec, line: &CommandLine, found: &mut Found) {
    let wanted = spec.served_name();
    if let Some(names) = line.values(SERVED_NAME)
        && !names.iter().any(|name| *name == wanted || *name == "${MODEL}")
    {
        let names = names.join(" ");
        let (model, first) = (&spec.name, names.split(' ').next().unwrap_or_default());
        found.add(
            "--served-model-name",
            format!(
                "vLLM would serve `{names}` but not `{wanted}`: remove it (Wharf adds it), or set \
                 `upstream_name: {first}` for {model}"
            ),
        );
    }
    if let Some(share) = line.value(MEMORY_SHARE)
        && spec.vram != Vram::Unknown
    {
        found.add(
            "--gpu-memory-utilization",
            format!(
                "`--gpu-memory-utilization {share}`, but `vram:` sets the memory share too: remove one"
            ),
        );
    }
    if line.has(SLEEP_MODE) && spec.sleep.is_none() {
        let message = "without `sleep:` Wharf never puts it to sleep, and sleep mode costs \
                       memory: set `sleep: 1` or remove it";
        found.add("--enable-sleep-mode", message.to_owned());
    }
    parallel(spec, line, found);
}

fn parallel(spec: &ModelSpec, line: &CommandLine, found: &mut Found) {
    let sizes = [TENSOR_PARALLEL, PIPELINE_PARALLEL, DATA_PARALLEL].map(|flags| {
        let size = line.value(flags).and_then(|size| size.parse::<usize>().ok());
        (flags[0], size)
    });
    let Some((flag, _)) = sizes.iter().find(|(_, size)| size.is_some()) else { return };
    let needed: usize = sizes.iter().filter_map(|(_, size)| *size).product();
    let given = match &spec.gpus {
        GpuRequest::None => 0,
        GpuRequest::Count(count) => usize::from(*count),
        GpuRequest::Explicit(list) => list.len(),
    };
    // On the CPU these sizes count sockets.
    if given > 0 && needed != given {
        found.add(
            flag,
            format!("needs {needed} GPUs but `gpus:` gives {given}: set `gpus: {needed}`"),
        );
    }
}
