//! What Wharf adds to an engine's command, so that `models.yaml` says everything once.

use super::Derived;
use super::command_line::CommandLine;
use crate::config::catalog::{DockerSpec, EngineKind, ModelSpec, RuntimeSpec};
use crate::units::Bytes;

pub const VLLM_PORT: u16 = 8000;
pub const LLAMACPP_PORT: u16 = 8080;
pub const OPENAI_PORT: u16 = 8000;

/// Wharf ends every stream before it stops an engine, so this bounds what nobody waits for any
/// more: vLLM with a stream left open would otherwise not end at all. It waits the whole time even
/// when idle, so a longer one would make every swap longer.
const VLLM_SHUTDOWN_TIMEOUT_SECS: u8 = 1;
/// The first release that knows `--shutdown-timeout`.
const VLLM_SHUTDOWN_TIMEOUT_SINCE: (u32, u32) = (0, 18);
/// Longer than pooled connections live; its default of 5 s closes them under a request.
const VLLM_KEEP_ALIVE_SECS: u8 = 120;

pub const PORT: &[&str] = &["--port"];
pub const HOST: &[&str] = &["--host"];
pub const SERVED_NAME: &[&str] = &["--served-model-name"];
pub const MEMORY_SHARE: &[&str] = &["--gpu-memory-utilization"];
pub const TENSOR_PARALLEL: &[&str] = &["--tensor-parallel-size", "-tp"];
pub const PIPELINE_PARALLEL: &[&str] = &["--pipeline-parallel-size", "-pp"];
pub const DATA_PARALLEL: &[&str] = &["--data-parallel-size", "-dp"];
pub const SLEEP_MODE: &[&str] = &["--enable-sleep-mode"];
const LORA: &[&str] = &["--enable-lora"];
const LORA_UPDATES: &str = "VLLM_ALLOW_RUNTIME_LORA_UPDATING";
const SHUTDOWN_TIMEOUT: &[&str] = &["--shutdown-timeout"];
const ALIAS: &[&str] = &["--alias", "-a"];

/// `memory`: promised bytes and total, on each GPU.
pub fn derive(spec: &ModelSpec, port: u16, gpus: usize, memory: Option<(Bytes, Bytes)>) -> Derived {
    let line = CommandLine::of(spec);
    let mut derived = Derived { container_port: container_port(spec, &line), ..Derived::default() };
    if !spec.takes_a_port() {
        return derived;
    }
    let address = address(spec, &line, port, derived.container_port);
    match spec.engine {
        EngineKind::Vllm => {
            derived.args = vllm_args(spec, &line, gpus, memory);
            derived.args.extend(address);
            derived.env = vllm_env(spec);
        }
        EngineKind::Llamacpp => {
            derived.args = address;
            if !line.has(ALIAS) {
                add(&mut derived.args, ALIAS, spec.served_name());
            }
            // With a stream open it otherwise ends on a stop signal only after its next ping, up
            // to 30 s later. By environment, as versions that lack it would refuse the flag.
            derived.env.insert("LLAMA_ARG_SSE_PING_INTERVAL".to_owned(), "1".to_owned());
        }
        EngineKind::Openai | EngineKind::Ollama | EngineKind::Http => {}
    }
    if !line.can_append {
        derived.args.clear();
    }
    derived
}

/// Where the engine listens in its container: as declared, as its own arguments say, or as usual.
fn container_port(spec: &ModelSpec, line: &CommandLine) -> u16 {
    let usual = match spec.engine {
        EngineKind::Vllm => VLLM_PORT,
        EngineKind::Llamacpp => LLAMACPP_PORT,
        EngineKind::Openai | EngineKind::Ollama | EngineKind::Http => OPENAI_PORT,
    };
    let RuntimeSpec::Docker(docker) = &spec.runtime else { return usual };
    let in_args = || line.value(PORT).and_then(|port| port.parse().ok());
    docker.port.or_else(in_args).unwrap_or(usual)
}

/// `--host` and `--port`, where the command does not say them.
fn address(spec: &ModelSpec, line: &CommandLine, port: u16, container_port: u16) -> Vec<String> {
    let (host, port) = match &spec.runtime {
        RuntimeSpec::Docker(_) => ("0.0.0.0", container_port),
        RuntimeSpec::Process(_) | RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => {
            ("127.0.0.1", port)
        }
    };
    let mut args = Vec::new();
    if !line.has(HOST) {
        add(&mut args, HOST, host);
    }
    if !line.has(PORT) && !line.mentions("${PORT}") {
        add(&mut args, PORT, &port.to_string());
    }
    args
}

fn vllm_args(
    spec: &ModelSpec,
    line: &CommandLine,
    gpus: usize,
    memory: Option<(Bytes, Bytes)>,
) -> Vec<String> {
    let mut args = Vec::new();
    if !line.has(SERVED_NAME) {
        add(&mut args, SERVED_NAME, spec.served_name());
    }
    if gpus > 0
        && !line.has(MEMORY_SHARE)
        && let Some((footprint, total)) = memory
        && let Some(share) = memory_share(footprint, total)
    {
        add(&mut args, MEMORY_SHARE, &share);
    }
    let parallel = [TENSOR_PARALLEL, PIPELINE_PARALLEL, DATA_PARALLEL];
    if gpus > 1 && !parallel.iter().any(|flags| line.has(flags)) {
        add(&mut args, TENSOR_PARALLEL, &gpus.to_string());
    }
    if spec.sleep.is_some() && !line.has(SLEEP_MODE) {
        args.push(SLEEP_MODE[0].to_owned());
    }
    if spec.lora && !line.has(LORA) {
        args.push(LORA[0].to_owned());
    }
    if !line.has(SHUTDOWN_TIMEOUT) && knows_shutdown_timeout(spec) {
        add(&mut args, SHUTDOWN_TIMEOUT, &VLLM_SHUTDOWN_TIMEOUT_SECS.to_string());
    }
    args
}

/// Rounded down, so that the engine takes no more than it was promised.
fn memory_share(footprint: Bytes, total: Bytes) -> Option<String> {
    let thousandths = u128::from(footprint.0) * 1000 / u128::from(total.0.max(1));
    let thousandths = thousandths.clamp(1, 1000);
    (total > Bytes::ZERO).then(|| format!("{}.{:03}", thousandths / 1000, thousandths % 1000))
}

fn knows_shutdown_timeout(spec: &ModelSpec) -> bool {
    let RuntimeSpec::Docker(DockerSpec { image: Some(image), .. }) = &spec.runtime else {
        return true;
    };
    image_version(image).is_none_or(|version| version >= VLLM_SHUTDOWN_TIMEOUT_SINCE)
}

/// `vllm/vllm-openai:v0.31.0` → (0, 31)
fn image_version(image: &str) -> Option<(u32, u32)> {
    let (_, tag) = image.rsplit('/').next()?.split_once(':')?;
    let mut parts = tag.trim_start_matches('v').split(['.', '-', '@']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn vllm_env(spec: &ModelSpec) -> std::collections::BTreeMap<String, String> {
    let mut env = vec![
        ("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", VLLM_KEEP_ALIVE_SECS.to_string()),
        ("VLLM_NO_USAGE_STATS", "1".to_owned()),
    ];
    if spec.sleep.is_some() {
        // /sleep and /wake_up are development endpoints.
        env.push(("VLLM_SERVER_DEV_MODE", "1".to_owned()));
    }
    if spec.lora {
        env.push((LORA_UPDATES, "1".to_owned()));
    }
    env.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The model's own command takes adapters as it stands.
pub fn says_lora(spec: &ModelSpec) -> bool {
    let env = match &spec.runtime {
        RuntimeSpec::Docker(docker) => &docker.env,
        RuntimeSpec::Process(process) => &process.env,
        RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => return true,
    };
    CommandLine::of(spec).has(LORA) && env.contains_key(LORA_UPDATES)
}

fn add(args: &mut Vec<String>, flag: &[&str], value: &str) {
    args.extend([flag[0].to_owned(), value.to_owned()]);
}
