//! What must hold between parts of the file that are each right by themselves.

use std::collections::BTreeMap;
use std::time::Duration;

use super::access::Allowed;
use super::capacity::{capacity, fits, ram_capacity, ram_fits};
use super::catalog::{
    EngineKind, GpuProvider, GpuRequest, Group, ModelSpec, RuntimeSpec, SwapMode, Vram,
};
use super::decode::Sink;
use super::launch::argument_spot;
use super::models::ReadModel;
use super::problem::nearest;
use super::settings::ReadSettings;
use crate::engine;
use crate::units::{Bytes, ModelName};

/// Checks everything that is not about names.
pub(super) fn check(
    models: &[ReadModel],
    groups: &BTreeMap<String, Group>,
    settings: &mut ReadSettings,
    sink: &mut Sink,
) {
    check_settings(settings, sink);
    ports(models, groups, settings, sink);
    containers(models, sink);
    for model in models {
        if model.spec.adapter.is_none() {
            check_model(model, settings, sink);
            vllm(model, settings, sink);
        }
        lifecycle(model, sink);
    }
    let pinned: Vec<&ReadModel> = models.iter().filter(|m| m.spec.pinned).collect();
    if let Some(last) = pinned.last().filter(|_| !fits(&pinned, settings)) {
        let names: Vec<&str> = pinned.iter().map(|m| m.spec.name.as_str()).collect();
        let message = format!("the pinned models do not fit together: {}", names.join(", "));
        sink.error(last.spot_of("pinned"), message, capacity(settings))
            .help("pinned models are never evicted, so all of them need room at once");
    }
    if let Some(last) = pinned.last().filter(|_| !ram_fits(&pinned, settings)) {
        let here = pinned.iter().filter(|m| m.spec.ram.is_some() && !m.spec.is_external());
        let names: Vec<&str> = here.map(|m| m.spec.name.as_str()).collect();
        let message =
            format!("the pinned models need more host RAM than there is: {}", names.join(", "));
        sink.error(last.spot_of("pinned"), message, ram_capacity(settings))
            .help("pinned models are never evicted, so all of them need room at once");
    }
}

fn check_settings(read: &mut ReadSettings, sink: &mut Sink) {
    let spot = |path| read.spot(path);
    let settings = &read.settings;
    let queue = &settings.queue;
    if queue.body_limit > queue.total_bodies {
        let message = format!("one body may be larger than all together ({})", queue.total_bodies);
        sink.error(&spot("queue.body_limit"), message, "expected at most `total_bodies`");
    }
    if queue.per_model > queue.limit {
        let message = format!("more requests per model than in all ({})", queue.limit);
        sink.warning(&spot("queue.per_model"), message, "`queue.limit` is reached first");
    }
    if settings.swap.max_wait.is_some_and(|wait| wait >= queue.timeout) {
        let timeout = humantime::format_duration(queue.timeout);
        let message = format!("requests are refused after {timeout}, before `max_wait` is over");
        sink.warning(&spot("swap.max_wait"), message, "expected less than `queue.timeout`");
    }
    let single = settings.swap.mode == SwapMode::SingleActive;
    if single && settings.swap.max_concurrent_models > 1 {
        let message = "`single-active` holds one model at a time";
        let spot = spot("swap.max_concurrent_models");
        sink.warning(&spot, message, "expected `mode: multi-active`, or no limit here");
    }
    let gpu = &settings.gpu;
    if gpu.provider == GpuProvider::Simulated && gpu.memory.is_empty() {
        let message = "simulated GPUs need a size";
        sink.error(&spot("gpu"), message, "expected `memory: [24GiB]`, one size per GPU");
    }
    for (i, memory) in gpu.memory.iter().enumerate().filter(|(_, m)| **m <= gpu.reserve) {
        let message = format!("GPU {i} has {memory}, of which {} are reserved", gpu.reserve);
        sink.error(&spot("gpu.memory"), message, "expected more memory, or less `reserve`");
    }
    let ram = &settings.ram;
    if let Some(total) = ram.total.filter(|&total| total <= ram.reserve) {
        let message = format!("the host has {total}, of which {} are reserved", ram.reserve);
        sink.error(&spot("ram.total"), message, "expected more, or less `reserve`");
    }
    if gpu.foreign.len() > gpu.memory.len() && gpu.provider == GpuProvider::Simulated {
        let message = format!("{} sizes for {} GPUs", gpu.foreign.len(), gpu.memory.len());
        sink.error(&spot("gpu.foreign"), message, "expected one size per GPU at most");
    }
    let open =
        [("listen.gateway", settings.gateway), ("listen.orchestrator", settings.orchestrator)];
    for (path, address) in open {
        let auth = &settings.auth;
        if !address.ip().is_loopback() && auth.keys.is_empty() && !auth.open {
            let message = format!("{address} can be reached from outside, and no key is required");
            sink.warning(&spot(path), message, "add `auth.keys`, or listen on 127.0.0.1")
                .help("`auth: { open: true }` says that this is meant");
        }
    }
    if gpu.provider == GpuProvider::None && gpu.memory.is_empty() && !single {
        if read.spots.contains_key("swap.mode") {
            let message = "without a view of GPU memory only one model runs at a time";
            sink.warning(&spot("swap.mode"), message, "`single-active` is used")
                .help("declare `gpu.memory` to run several");
        }
        read.settings.swap.mode = SwapMode::SingleActive;
    }
}

pub(super) fn aliases(models: &[ReadModel], sink: &mut Sink) -> BTreeMap<String, ModelName> {
    let mut owners: BTreeMap<String, ModelName> = BTreeMap::new();
    for model in models {
        let name = &model.spec.name;
        for (alias, spot) in &model.aliases {
            if let Some(other) = models.iter().find(|other| other.spec.name.as_str() == alias) {
                let message = if other.spec.name == *name {
                    format!("`{alias}` is the model's own name")
                } else {
                    format!("`{alias}` is the name of another model (line {})", other.spec.line)
                };
                sink.error(spot, message, "remove this alias");
                continue;
            }
            match owners.get(alias) {
                Some(owner) if owner == name => {
                    sink.error(spot, format!("`{alias}` is listed twice"), "remove one");
                }
                Some(owner) => {
                    let message = format!("`{alias}` is already an alias of `{owner}`");
                    sink.error(spot, message, "an alias leads to one model");
                }
                None => {
                    owners.insert(alias.clone(), name.clone());
                }
            }
        }
    }
    owners
}

/// Each would stop the other's.
fn containers(models: &[ReadModel], sink: &mut Sink) {
    let mut owners: BTreeMap<&str, &ModelName> = BTreeMap::new();
    for model in models {
        let RuntimeSpec::Docker(docker) = &model.spec.runtime else { continue };
        if model.spec.adapter.is_some() {
            continue;
        }
        let Some(container) = docker.container.as_deref() else { continue };
        let name = &model.spec.name;
        if let Some(other) = owners.insert(container, name) {
            let message = format!("`{name}` and `{other}` name the same container `{container}`");
            sink.error(model.spot_of("docker"), message, "expected one model per container")
                .help("other names for one model are its `aliases`");
        }
    }
}

fn ports(
    models: &[ReadModel],
    groups: &BTreeMap<String, Group>,
    read: &ReadSettings,
    sink: &mut Sink,
) {
    let settings = &read.settings;
    let (first, last) = settings.engine_ports;
    let engines = first..=last;
    for (path, address) in
        [("listen.gateway", settings.gateway), ("listen.orchestrator", settings.orchestrator)]
    {
        if engines.contains(&address.port()) {
            let message =
                format!("port {} lies in `engine_ports` ({first}-{last})", address.port());
            sink.error(&read.spot(path), message, "expected a port outside that range");
        }
    }
    if let Some((low, high)) =
        settings.front_doors.filter(|(low, high)| *low <= last && first <= *high)
    {
        let message = format!("{low}-{high} overlaps `engine_ports` ({first}-{last})");
        sink.error(&read.spot("ports"), message, "expected two separate ranges");
    }
    front_doors(models, read, sink);
    let one_at_a_time =
        settings.swap.mode == SwapMode::SingleActive || settings.swap.max_concurrent_models == 1;
    let take_turns = |a: &ModelName, b: &ModelName| {
        groups.values().any(|g| !g.together && g.models.contains(a) && g.models.contains(b))
    };
    let mut taken: BTreeMap<u16, &ModelName> = BTreeMap::new();
    for model in models {
        let Some(port) = model.spec.port else { continue };
        let spot = model.spot_of("port");
        if engines.contains(&port) {
            let message = format!("port {port} lies in `engine_ports` ({first}-{last})");
            sink.error(spot, message, "expected a port outside that range").help(
                "ports of that range are handed out to any model; without `port` it gets one",
            );
        }
        let listeners = [("gateway", settings.gateway), ("orchestrator", settings.orchestrator)];
        if let Some((who, _)) = listeners.iter().find(|(_, address)| address.port() == port) {
            let message = format!("port {port} is where the {who} listens");
            sink.error(spot, message, "expected another port, or none");
        }
        match taken.get(&port) {
            Some(other) if !one_at_a_time && !take_turns(&model.spec.name, other) => {
                let message =
                    format!("`{}` and `{other}` have the same fixed port {port}", model.spec.name);
                sink.error(spot, message, "expected another port, or none").help(
                    "models may share a port if they take turns: in a group without \
                         `together`, or with `swap.mode: single-active`",
                );
            }
            _ => {
                taken.insert(port, &model.spec.name);
            }
        }
    }
}

fn front_doors(models: &[ReadModel], read: &ReadSettings, sink: &mut Sink) {
    let Some((low, high)) = read.settings.front_doors else { return };
    let doors = usize::from(high - low) + 1;
    if models.len() > doors {
        let message = format!("{} models, and {doors} ports for front doors", models.len());
        sink.warning(&read.spot("ports"), message, "expected more ports: the last get none");
    }
    for model in models {
        if let Some(port) = model.spec.port.filter(|port| (low..=high).contains(port)) {
            let message = format!("port {port} lies in `ports` ({low}-{high}), the front doors");
            sink.error(model.spot_of("port"), message, "expected a port outside that range")
                .help("`port` is where the engine itself listens");
        }
    }
}

/// Patterns that match nothing are most often misspelt, and lock someone out.
pub(super) fn keys(
    names: &[&str],
    leads_on: impl Fn(&str) -> bool,
    read: &ReadSettings,
    sink: &mut Sink,
) {
    for Allowed { key, pattern, spot } in &read.allowed {
        if pattern.contains('*') || leads_on(pattern) || names.contains(&pattern.as_str()) {
            continue;
        }
        let expected = match nearest(pattern, names.iter().copied()) {
            Some(name) => format!("did you mean `{name}`?"),
            None => "expected a model's name, or a pattern with `*`".to_owned(),
        };
        let message = format!("key `{key}` allows the unknown model `{pattern}`");
        sink.warning(spot, message, expected);
    }
}

/// When it comes and goes by itself.
fn lifecycle(model: &ReadModel, sink: &mut Sink) {
    let spec = &model.spec;
    if let (true, Some(_)) = (spec.warmup || spec.pinned, spec.ttl) {
        let key = if spec.warmup { "warmup" } else { "pinned" };
        let message = format!("`ttl` has no effect on a model with `{key}: true`");
        sink.warning(model.spot_of("ttl"), message, "it is never unloaded by time");
    }
    if let Some(ttl) = spec.ttl {
        let bounds = spec.ttl_bounds;
        let text = |time: Option<Duration>| match time {
            Some(time) => humantime::format_duration(time).to_string(),
            None => "any time".to_owned(),
        };
        let is_outside =
            bounds.min.is_some_and(|min| ttl < min) || bounds.max.is_some_and(|max| ttl > max);
        if is_outside {
            let message = format!("`ttl` ({}) lies outside of its bounds", text(Some(ttl)));
            let expected = format!("expected {} to {}", text(bounds.min), text(bounds.max));
            sink.error(model.spot_of("ttl"), message, expected);
        }
    }
    if spec.ttl.is_none() && model.says("grace") {
        let message = "`grace` follows the `ttl`, and there is none";
        sink.warning(model.spot_of("grace"), message, "expected a `ttl` such as 15m");
    }
    if spec.warmup && !spec.keep.is_empty() {
        let message = "`keep` has no effect on a model with `warmup: true`";
        sink.warning(model.spot_of("keep"), message, "it is loaded at all times");
    }
}

fn check_model(model: &ReadModel, read: &ReadSettings, sink: &mut Sink) {
    let spec = &model.spec;
    let memory = &read.settings.gpu.memory;
    if let (GpuRequest::None, Vram::Declared(_) | Vram::Rest) = (&spec.gpus, spec.vram)
        && (!spec.is_external() || spec.engine == EngineKind::Ollama)
    {
        let message = format!("`{}` runs on the CPU, yet declares `vram`", spec.name);
        sink.error(model.spot_of("vram"), message, "remove `vram`, or give it `gpus: 1`");
    }
    if !memory.is_empty() {
        gpus_exist(model, read, sink);
    }
    if let Some(ram) = spec.ram.filter(|_| !ram_fits(&[model], read)) {
        let message = format!("`{}` needs {ram} of host RAM: it can never fit", spec.name);
        sink.error(model.spot_of("ram"), message, ram_capacity(read));
    }
    if let (Vram::Rest, true) = (spec.vram, spec.pinned) {
        let message = format!("`{}` is pinned and takes all that is left", spec.name);
        sink.warning(model.spot_of("vram"), message, "no other model fits beside it");
    }
    if spec.sleep.is_some() && spec.engine != EngineKind::Vllm && !spec.is_external() {
        sink.error(model.spot_of("sleep"), "only vLLM can sleep", "remove `sleep`");
    }
    if spec.engine == EngineKind::Http && spec.http.as_ref().is_none_or(|h| h.activity.is_empty()) {
        let message = format!("no request counts as work for `{}`: none starts it", spec.name);
        sink.warning(&model.spot, message, "expected `http: { activity: [\"POST /prompt\"] }`");
    }
    if spec.stop.grace < crate::runtime::MIN_STOP_GRACE && !spec.is_external() {
        let grace = humantime::format_duration(spec.stop.grace);
        let message = format!("a grace of {grace} cuts off the engine's own shutdown");
        let least = humantime::format_duration(crate::runtime::MIN_STOP_GRACE);
        sink.warning(model.spot_of("stop"), message, format!("expected {least} or more"));
    }
    if let RuntimeSpec::Process(process) = &spec.runtime {
        let told = process.argv.iter().any(|word| word.contains("${PORT}"));
        if !told && spec.port.is_none() && !process.argv.is_empty() {
            let message = format!("the command of `{}` does not say on which port", spec.name);
            let spot = argument_spot(&model.node, &model.spot.path, "").unwrap_or_default();
            sink.error(&spot, message, "expected `--port ${PORT}`, or as the engine calls it")
                .help("Wharf chooses the port; with a fixed one, say it: `port: 9001`");
        }
    }
    if let (Some(port), RuntimeSpec::Docker(docker)) = (spec.port, &spec.runtime)
        && let Some(container) = &docker.container
    {
        let message = format!("the existing container `{container}` publishes its own port");
        let expected = format!("did you mean `docker: {{ port: {port} }}`?");
        sink.error(model.spot_of("port"), message, expected);
    }
}

/// Declared GPUs: the model's are among them and large enough.
fn gpus_exist(model: &ReadModel, read: &ReadSettings, sink: &mut Sink) {
    let (spec, gpu) = (&model.spec, &read.settings.gpu);
    let count = gpu.memory.len();
    match &spec.gpus {
        GpuRequest::None => return,
        GpuRequest::Count(n) if usize::from(*n) > count => {
            let message = format!("`{}` wants {n} GPUs, and {count} are declared", spec.name);
            sink.error(model.spot_of("gpus"), message, format!("expected {count} at most"));
            return;
        }
        GpuRequest::Explicit(names) => {
            let missing =
                names.iter().find(|name| name.parse::<usize>().is_ok_and(|index| index >= count));
            if let Some(name) = missing {
                let message = format!("there is no GPU {name}: {count} are declared");
                let expected = format!("expected 0 to {}", count - 1);
                sink.error(model.spot_of("gpus"), message, expected);
                return;
            }
        }
        GpuRequest::Count(_) => {}
    }
    if let Vram::Declared(vram) = spec.vram
        && !fits(&[model], read)
    {
        let message = format!("`{}` needs {vram} on each GPU: it can never fit", spec.name);
        sink.error(model.spot_of("vram"), message, capacity(read));
    }
}

/// What Wharf derives for vLLM, against what the arguments say.
fn vllm(model: &ReadModel, read: &ReadSettings, sink: &mut Sink) {
    let spec = &model.spec;
    let mut shares_told = false;
    for (argument, message) in engine::contradictions(spec) {
        shares_told |= argument.starts_with("--gpu-memory-utilization");
        let spot = argument_spot(&model.node, &model.spot.path, &argument);
        sink.error(spot.as_ref().unwrap_or(&model.spot), message, "");
    }
    if spec.engine != EngineKind::Vllm || shares_told {
        return;
    }
    let (Vram::Declared(vram), Some(share)) = (spec.vram, share(spec)) else { return };
    let Some(total) = read.settings.gpu.memory.iter().min() else { return };
    let taken = Bytes((total.0 as f64 * share) as u64);
    // Rounding a share to two digits is no contradiction.
    if taken.0.abs_diff(vram.0) <= total.0 / 50 {
        return;
    }
    let flag = "--gpu-memory-utilization";
    let spot = argument_spot(&model.node, &model.spot.path, flag);
    let message = format!("{flag} {share} of {total} is {taken}, but `vram` says {vram}");
    sink.error(spot.as_ref().unwrap_or(&model.spot), message, "remove it, Wharf derives it");
}

fn share(spec: &ModelSpec) -> Option<f64> {
    let arguments = match &spec.runtime {
        RuntimeSpec::Docker(docker) => &docker.args,
        RuntimeSpec::Process(process) => &process.argv,
        RuntimeSpec::External(_) => return None,
    };
    let at = arguments.iter().position(|a| a.starts_with("--gpu-memory-utilization"))?;
    let value = match arguments[at].split_once('=') {
        Some((_, value)) => value,
        None => arguments.get(at + 1)?,
    };
    value.parse().ok().filter(|share: &f64| (0.0..=1.0).contains(share))
}
