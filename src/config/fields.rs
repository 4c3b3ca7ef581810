//! The keys of one model (or template, or `defaults`), typed but not yet put together.

use std::collections::BTreeMap;
use std::time::Duration;

use super::catalog::{
    DockerSpec, EngineKind, ExternalSpec, Filters, GpuRequest, HttpService, KeepWindow,
    ProcessSpec, PullPolicy, TtlBounds, Vram, WaitingSettings, WaitingStyle,
};
use super::decode::{At, Sink, Spot, Table, Unread};
use super::subst::Env;
use super::{keep, launch, settings, traffic};
use crate::units::{Bytes, Priority};

/// What is said about a key that may also be switched off: `off`, `none`, `never`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Switch<T> {
    Off,
    On(T),
}

impl<T> Switch<T> {
    pub(super) fn on(self) -> Option<T> {
        match self {
            Switch::Off => None,
            Switch::On(value) => Some(value),
        }
    }
}

#[derive(Default)]
pub(super) struct Fields {
    pub display_name: Option<String>,
    pub description: Option<String>,
    pub model_type: Option<String>,
    pub tags: Vec<String>,
    pub aliases: Vec<(String, Spot)>,
    pub unlisted: bool,
    pub engine: Option<EngineKind>,
    /// `engine` is there, but names one that is wrong or not supported: told already.
    pub engine_is_wrong: bool,
    pub docker: Option<DockerSpec>,
    pub process: Option<ProcessSpec>,
    pub external: Option<ExternalSpec>,
    pub env: BTreeMap<String, String>,
    pub pull: Option<PullPolicy>,
    pub gpus: Option<GpuRequest>,
    pub vram: Option<Vram>,
    pub ram: Option<Bytes>,
    pub size_gb: Option<f64>,
    pub priority: Option<Priority>,
    pub pinned: bool,
    pub warmup: bool,
    pub ttl: Option<Switch<Duration>>,
    pub ttl_bounds: TtlBounds,
    pub grace: Option<Duration>,
    pub keep: Vec<KeepWindow>,
    pub concurrency: Option<u32>,
    pub health_path: Option<Switch<String>>,
    pub stall: Option<Duration>,
    pub start_timeout: Option<Duration>,
    pub answer_timeout: Option<Duration>,
    pub signal: Option<String>,
    pub stop_grace: Option<Duration>,
    pub canary: bool,
    pub warmup_request: bool,
    pub read_ahead: Option<Bytes>,
    pub include_usage: Option<bool>,
    pub upstream_name: Option<String>,
    pub port: Option<u16>,
    pub waiting: Option<WaitingSettings>,
    pub sleep: Option<Switch<u8>>,
    pub filters: Filters,
    pub metadata: serde_json::Map<String, serde_json::Value>,
    pub http: Option<HttpService>,
    /// The base model of an adapter, and where that is said.
    pub adapter_of: Option<(String, Spot)>,
    pub adapter: Option<String>,
    /// `engine: sglang`: speaks the OpenAI API, with a health path and a port of its own.
    pub is_sglang: bool,
    /// Where each key stands.
    pub spots: BTreeMap<&'static str, Spot>,
    /// A key that would have brought what is missing is wrong: told already.
    pub is_incomplete: bool,
}

impl Fields {
    pub(super) fn spot(&self, key: &str) -> Option<&Spot> {
        self.spots.get(key)
    }
}

/// What an entry is read with.
#[derive(Clone, Copy)]
pub(super) struct Reading<'e> {
    pub env: Env<'e>,
    /// The global `waiting`, which an entry may change in part.
    pub waiting: WaitingSettings,
    /// False for templates and `defaults`, which may lack what their models bring.
    pub whole: bool,
    /// Models of an Ollama have a usual address.
    pub ollama: bool,
}

pub(super) fn read(at: &At<'_>, reading: Reading<'_>, sink: &mut Sink) -> Option<Fields> {
    let mut table = at.table(sink, "`engine`, `docker` and other keys")?;
    let mut fields = Fields::default();
    about(&mut table, &mut fields, sink);
    run(&mut table, &mut fields, reading, sink);
    place(&mut table, &mut fields, sink);
    leave(&mut table, &mut fields, sink);
    serve(&mut table, &mut fields, reading.waiting, sink);
    traffic(&mut table, &mut fields, sink);
    // Followed by the reader of the whole file.
    table.take("template");
    let misplaced = ["cmd", "image", "container", "args", "url", "proxy"];
    let slips = ["docker", "process", "external", "engine", "template"];
    fields.is_incomplete = misplaced.iter().any(|key| table.key_spot(key).is_some())
        || slips.iter().any(|key| table.has_slip_of(key));
    for key in KEYS {
        if let Some(spot) = table.key_spot(key) {
            fields.spots.insert(key, spot);
        }
    }
    table.finish(sink, UNREAD);
    Some(fields)
}

/// Keys whose place later checks may want.
const KEYS: [&str; 23] = [
    "docker",
    "process",
    "external",
    "env",
    "pull",
    "gpus",
    "vram",
    "ram",
    "pinned",
    "warmup",
    "ttl",
    "ttl_bounds",
    "grace",
    "keep",
    "port",
    "stop",
    "sleep",
    "engine",
    "http",
    "health",
    "filters",
    "adapter_of",
    "adapter",
];

const UNREAD: &[(&str, Unread)] = &[
    ("captures", Unread::Hint("captures are switched for all models, at the top of the file")),
    ("announce", Unread::Hint("every model is announced: `announce` at the top of the file")),
    ("sendLoadingState", Unread::Hint("did you mean `send_loading_state`?")),
    ("strip_params", Unread::Hint("write `filters: { strip: … }`")),
    ("setParams", Unread::Hint("write `filters: { set: … }`")),
    ("cmd", Unread::Hint("write `process: { cmd: … }`")),
    ("cmdStop", Unread::Hint("did you mean `stop: { signal, grace }`?")),
    ("image", Unread::Hint("write `docker: { image: … }`")),
    ("container", Unread::Hint("write `docker: { container: … }`")),
    ("args", Unread::Hint("write `docker: { args: … }`")),
    ("volumes", Unread::Hint("write `docker: { volumes: … }`")),
    ("url", Unread::Hint("write `external: { url: … }`")),
    ("proxy", Unread::Hint("write `external: { url: … }`, or `port` for a fixed port")),
    ("api_key", Unread::Hint("write `external: { api_key: … }`")),
    ("checkEndpoint", Unread::Hint("did you mean `health: { path: … }`?")),
    ("concurrencyLimit", Unread::Hint("did you mean `concurrency`?")),
    ("useModelName", Unread::Hint("did you mean `upstream_name`?")),
    ("ttl_minutes", Unread::Hint("did you mean `ttl`, such as `ttl: 15m`?")),
    ("gpu", Unread::Hint("did you mean `gpus`?")),
    ("memory", Unread::Hint("did you mean `vram` (GPU) or `ram` (host)?")),
    ("path", Unread::Hint("what is loaded is said by the engine's arguments")),
    ("model", Unread::Hint("what is loaded is said by the engine's arguments")),
];

fn about(table: &mut Table<'_>, fields: &mut Fields, sink: &mut Sink) {
    fields.display_name = table.take("name").and_then(|at| at.string(sink, "a name to show"));
    fields.description = table.take("description").and_then(|at| at.free_text(sink, "a text"));
    fields.model_type =
        table.take("type").and_then(|at| at.string(sink, "a kind of model such as llm"));
    fields.tags = table
        .take("tags")
        .and_then(|at| at.strings(sink, "a list of tags such as [code, fast]"))
        .unwrap_or_default();
    if let Some(at) = table.take("aliases") {
        for item in at.list(sink, "a list of names such as [gpt-4o-mini]").unwrap_or_default() {
            if let Some(alias) = item.string(sink, "a name") {
                fields.aliases.push((alias, item.spot));
            }
        }
    }
    fields.unlisted = flag(table, "unlisted", sink);
    fields.size_gb = table.take("size_gb").and_then(|at| at.number(sink));
}

fn flag(table: &mut Table<'_>, key: &'static str, sink: &mut Sink) -> bool {
    table.take(key).and_then(|at| at.boolean(sink)).unwrap_or_default()
}

fn run(table: &mut Table<'_>, fields: &mut Fields, reading: Reading<'_>, sink: &mut Sink) {
    if let Some(at) = table.take("engine") {
        fields.engine = engine(&at, sink);
        fields.engine_is_wrong = fields.engine.is_none();
        fields.is_sglang = at.node.text() == Some("sglang");
    }
    let reading = Reading { ollama: fields.engine == Some(EngineKind::Ollama), ..reading };
    fields.docker = table.take("docker").and_then(|at| launch::docker(&at, reading, sink));
    fields.process = table.take("process").and_then(|at| launch::process(&at, reading, sink));
    let external = table.take("external");
    fields.external = match external {
        Some(at) => launch::external(&at, reading, sink),
        None if reading.ollama && reading.whole => {
            Some(launch::ollama(&table.at.key_spot(), reading, sink))
        }
        None => None,
    };
    fields.env =
        table.take("env").and_then(|at| at.pairs(sink, Some(reading.env))).unwrap_or_default();
    fields.pull = table.take("pull").and_then(|at| launch::pull(&at, sink));
    fields.port = table.take("port").and_then(|at| at.int(sink, 1..=u16::MAX));
    if let Some(mut stop) = table.take("stop").and_then(|at| at.table(sink, "`signal`, `grace`")) {
        fields.signal = stop.take("signal").and_then(|at| {
            at.parsed(sink, "a signal such as SIGTERM", |text| {
                let name = text.to_ascii_uppercase();
                let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
                match name.parse::<nix::sys::signal::Signal>() {
                    Ok(signal) => Ok(signal.as_str().to_owned()),
                    Err(_) => Err("expected SIGTERM, SIGINT, SIGQUIT, …".to_owned()),
                }
            })
        });
        fields.stop_grace = stop.take("grace").and_then(|at| at.duration(sink));
        stop.finish(sink, &[("timeout", Unread::Hint("did you mean `grace`?"))]);
    }
}

fn engine(at: &At<'_>, sink: &mut Sink) -> Option<EngineKind> {
    let text = at.node.text().unwrap_or_default();
    if matches!(text, "llama.cpp" | "llama-server" | "llama-cpp" | "llama") {
        let message = format!("`{text}` is no engine's name");
        sink.error(&at.spot, message, "did you mean `llamacpp`?");
        return None;
    }
    at.choice(sink, &ENGINES)
}

pub(super) const ENGINES: [(&str, EngineKind); 6] = [
    ("vllm", EngineKind::Vllm),
    ("llamacpp", EngineKind::Llamacpp),
    ("ollama", EngineKind::Ollama),
    ("openai", EngineKind::Openai),
    ("sglang", EngineKind::Openai),
    ("http", EngineKind::Http),
];

pub(super) const PRIORITIES: [(&str, Priority); 3] =
    [("high", Priority::High), ("normal", Priority::Normal), ("low", Priority::Low)];

fn place(table: &mut Table<'_>, fields: &mut Fields, sink: &mut Sink) {
    fields.gpus = table.take("gpus").and_then(|at| gpus(&at, sink));
    fields.vram = table.take("vram").and_then(|at| match at.node.text() {
        Some("rest") => Some(Vram::Rest),
        _ => {
            let size = at.parsed(sink, "a size such as 22GiB, or `rest`", super::values::size)?;
            if size == Bytes::ZERO {
                sink.error(&at.spot, "a model without VRAM", "expected `gpus: 0` instead");
                return None;
            }
            Some(Vram::Declared(size))
        }
    });
    fields.ram = table.take("ram").and_then(|at| at.size(sink));
    fields.priority = table.take("priority").and_then(|at| at.choice(sink, &PRIORITIES));
    fields.pinned = flag(table, "pinned", sink);
    fields.warmup = flag(table, "warmup", sink);
    fields.sleep = table.take("sleep").and_then(|at| {
        if !at.is_map() {
            return sleep_level(&at, sink);
        }
        let mut table = at.table(sink, "`level`")?;
        let level = table.take("level").and_then(|at| sleep_level(&at, sink));
        table.finish(sink, &[]);
        level
    });
}

/// When the model comes and goes by itself.
fn leave(table: &mut Table<'_>, fields: &mut Fields, sink: &mut Sink) {
    fields.ttl = table.take("ttl").and_then(|at| {
        let text = at.node.text();
        if text == Some("never") {
            return Some(Switch::Off);
        }
        let what = "`never` or a duration such as 15m";
        let ttl = at.parsed(sink, what, super::values::duration)?;
        Some(if ttl.is_zero() { Switch::Off } else { Switch::On(ttl) })
    });
    if let Some(at) = table.take("ttl_bounds") {
        fields.ttl_bounds = ttl_bounds(&at, sink);
    }
    fields.grace = table.take("grace").and_then(|at| at.duration(sink));
    fields.keep = table.take("keep").map(|at| keep::windows(&at, sink)).unwrap_or_default();
}

/// `{ min: 5m, max: 60m }`, or `[5m, 60m]`.
fn ttl_bounds(at: &At<'_>, sink: &mut Sink) -> TtlBounds {
    let bounds = if at.is_list() {
        let items = at.list(sink, "a list").unwrap_or_default();
        if items.len() != 2 {
            let expected = "expected two, such as [5m, 60m], or `{ min: 5m }`";
            sink.error(&at.spot, "bounds are a least and a longest time", expected);
            return TtlBounds::default();
        }
        let mut item = |at: usize| items.get(at).and_then(|item| item.some_duration(sink));
        TtlBounds { min: item(0), max: item(1) }
    } else {
        let Some(mut table) = at.table(sink, "`min` and `max`") else {
            return TtlBounds::default();
        };
        let mut bound = |key| table.take(key).and_then(|at| at.some_duration(sink));
        let bounds = TtlBounds { min: bound("min"), max: bound("max") };
        table.finish(sink, &[]);
        bounds
    };
    if let (Some(min), Some(max)) = (bounds.min, bounds.max)
        && min > max
    {
        sink.error(&at.spot, "the least is longer than the longest", "expected `min` up to `max`");
        return TtlBounds::default();
    }
    bounds
}

fn sleep_level(at: &At<'_>, sink: &mut Sink) -> Option<Switch<u8>> {
    match at.node.text() {
        Some("off" | "false") => Some(Switch::Off),
        _ => at.choice(sink, &[("off", Switch::Off), ("1", Switch::On(1)), ("2", Switch::On(2))]),
    }
}

fn gpus(at: &At<'_>, sink: &mut Sink) -> Option<GpuRequest> {
    if !at.is_list() {
        let what = "a number of GPUs, or a list such as [0, 1]";
        let count: u16 = at.parsed(sink, what, |text| match text.parse::<u16>() {
            Ok(count) if count <= 64 => Ok(count),
            _ if text == "all" => Err("expected the GPUs by number: [0, 1, …]".to_owned()),
            _ if text.contains(',') => Err(format!("did you mean the list [{text}]?")),
            _ if text.starts_with("GPU-") => Err(format!("did you mean the list [{text}]?")),
            _ => Err(String::new()),
        })?;
        return Some(if count == 0 { GpuRequest::None } else { GpuRequest::Count(count) });
    }
    let mut names: Vec<String> = Vec::new();
    for item in at.list(sink, "a list of GPUs")? {
        let Some(name) = item.parsed(sink, "a GPU such as 0 or GPU-8f1c…", |text| {
            if text.starts_with("MIG-") {
                return Err("MIG devices are not supported yet; expected whole GPUs".to_owned());
            }
            let index = text.parse::<u16>().is_ok();
            if index || text.starts_with("GPU-") { Ok(text.to_owned()) } else { Err(String::new()) }
        }) else {
            continue;
        };
        if names.contains(&name) {
            sink.error(&item.spot, format!("GPU {name} is listed twice"), "remove one");
        }
        names.push(name);
    }
    Some(if names.is_empty() { GpuRequest::None } else { GpuRequest::Explicit(names) })
}

fn serve(table: &mut Table<'_>, fields: &mut Fields, base: WaitingSettings, sink: &mut Sink) {
    fields.concurrency = table.take("concurrency").and_then(|at| {
        at.parsed(sink, "a number of requests such as 16", |text| match text.parse::<u32>() {
            Ok(0) => Err("0 would serve nothing; leave the key out for no limit".to_owned()),
            Ok(n) => Ok(n),
            Err(_) => Err(String::new()),
        })
    });
    if let Some(at) = table.take("health") {
        health(&at, fields, sink);
    }
    let start = table.take("start_timeout");
    if let Some(mut inner) =
        table.take("timeouts").and_then(|at| at.table(sink, "`start` and `answer`"))
    {
        let nested = inner.take("start");
        if let (Some(nested), true) = (&nested, start.is_some()) {
            sink.error(
                &nested.spot,
                "`timeouts.start` and `start_timeout` are the same",
                "keep one",
            );
        }
        fields.start_timeout = nested.and_then(|at| at.some_duration(sink));
        fields.answer_timeout = inner.take("answer").and_then(|at| at.some_duration(sink));
        inner.finish(sink, &[]);
    }
    if let Some(at) = start {
        fields.start_timeout = at.some_duration(sink);
    }
    fields.canary = flag(table, "canary", sink);
    fields.warmup_request = flag(table, "warmup_request", sink);
    fields.read_ahead = table.take("read_ahead").and_then(|at| settings::read_ahead(&at, sink));
    fields.include_usage = table.take("include_usage").and_then(|at| at.boolean(sink));
    fields.upstream_name = table.take("upstream_name").and_then(|at| at.string(sink, "a name"));
    let waiting = table.take("waiting");
    fields.waiting = waiting.as_ref().and_then(|at| settings::waiting(at, base, sink));
    if let Some(at) = table.take("send_loading_state") {
        let on = at.boolean(sink);
        if waiting.is_some() {
            let message = "`send_loading_state` and `waiting` say the same thing";
            sink.error(&at.spot, message, "keep `waiting: reasoning`");
        } else if on == Some(true) {
            fields.waiting = Some(WaitingSettings { style: WaitingStyle::Reasoning, ..base });
        } else if on == Some(false) && base.style == WaitingStyle::Reasoning {
            fields.waiting = Some(WaitingSettings { style: WaitingStyle::Comment, ..base });
        }
    }
}

fn traffic(table: &mut Table<'_>, fields: &mut Fields, sink: &mut Sink) {
    fields.filters =
        table.take("filters").map(|at| traffic::filters(&at, sink)).unwrap_or_default();
    fields.metadata =
        table.take("metadata").map(|at| traffic::metadata(&at, sink)).unwrap_or_default();
    fields.http = table.take("http").map(|at| traffic::http(&at, sink));
    fields.adapter_of = table.take("adapter_of").and_then(|at| {
        let base = at.string(sink, "the name of the model that it adapts")?;
        Some((base, at.spot))
    });
    fields.adapter = table.take("adapter").and_then(|at| at.string(sink, "a path or repository"));
}

fn health(at: &At<'_>, fields: &mut Fields, sink: &mut Sink) {
    let path = |at: &At<'_>, sink: &mut Sink| {
        at.parsed(sink, "a path such as /health, or `none`", |text| match text {
            "none" => Ok(Switch::Off),
            text if text.starts_with('/') && !text.contains(char::is_whitespace) => {
                Ok(Switch::On(text.to_owned()))
            }
            text if text.contains("://") => Err("only the path: `/health`".to_owned()),
            text => Err(format!("did you mean `/{}`?", text.trim())),
        })
    };
    if !at.is_map() {
        fields.health_path = path(at, sink);
        return;
    }
    let Some(mut table) = at.table(sink, "`path` and `stall`") else { return };
    fields.health_path = table.take("path").and_then(|at| path(&at, sink));
    fields.stall = table.take("stall").and_then(|at| at.some_duration(sink));
    let timeout = Unread::Hint("did you mean `start_timeout`, a key of the model itself?");
    table.finish(sink, &[("timeout", timeout)]);
}
