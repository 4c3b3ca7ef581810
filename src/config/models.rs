//! `models:`, with `defaults:` and `templates:` applied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::adapters;
use super::catalog::{
    EngineKind, GpuProvider, GpuRequest, Health, ModelSpec, OllamaSpec, RuntimeSpec, StopSpec, Vram,
};
use super::decode::{At, Sink, Spot};
use super::fields::{self, Fields, Reading, Switch};
use super::problem::nearest;
use super::settings::ReadSettings;
use super::subst::{Env, Macros};
use super::tree::{Key, Kind, Node};
use crate::units::ModelName;

const STALL: Duration = Duration::from_secs(120);
const GRACE: Duration = Duration::from_secs(30);
const SGLANG_PORT: u16 = 30_000;

/// A model with what the checks need to point at its parts.
pub(super) struct ReadModel {
    pub spec: Arc<ModelSpec>,
    pub aliases: Vec<(String, Spot)>,
    /// The key in `models:`.
    pub spot: Spot,
    pub spots: BTreeMap<&'static str, Spot>,
    /// The entry with defaults, template and macros applied.
    pub node: Node,
    /// Keys that the entry itself has.
    own: Vec<String>,
}

impl ReadModel {
    /// Where `key` stands, else the model itself.
    pub(super) fn spot_of(&self, key: &str) -> &Spot {
        self.spots.get(key).unwrap_or(&self.spot)
    }

    /// Whether the entry itself has the key, not only a template or the defaults.
    pub(super) fn says(&self, key: &str) -> bool {
        self.own.iter().any(|own| own == key)
    }
}

/// What the file says of models: those that are right, and the names of all.
#[derive(Default)]
pub(super) struct Read {
    pub models: Vec<ReadModel>,
    pub names: Vec<String>,
}

impl Read {
    pub(super) fn get(&self, name: &str) -> Option<&ReadModel> {
        self.models.iter().find(|model| model.spec.name.as_str() == name)
    }
}

/// The three parts of the file that make models.
pub(super) struct Sources<'n> {
    pub models: Option<At<'n>>,
    pub templates: Option<At<'n>>,
    pub defaults: Option<At<'n>>,
}

struct Reader<'r> {
    macros: &'r Macros<'r>,
    env: Env<'r>,
    settings: &'r ReadSettings,
    templates: BTreeMap<&'r str, &'r Node>,
    defaults: Option<&'r Node>,
}

pub(super) fn read(
    sources: &Sources<'_>,
    settings: &ReadSettings,
    macros: &Macros<'_>,
    env: Env<'_>,
    sink: &mut Sink,
) -> Read {
    let map = |at: &Option<At<'_>>, what: &str, sink: &mut Sink| {
        at.as_ref().is_some_and(|at| at.table(sink, what).is_some())
    };
    let mut reader = Reader { macros, env, settings, templates: BTreeMap::new(), defaults: None };
    if let Some(at) = &sources.defaults
        && map(&sources.defaults, "keys that every model shall have", sink)
    {
        reader.entry_alone(at, sink);
        reader.defaults = Some(at.node);
    }
    if let Some(at) = &sources.templates
        && map(&sources.templates, "one template per name", sink)
    {
        for (key, node) in at.node.entries() {
            let at = at.entry(key, node);
            reader.entry_alone(&at, sink);
            reader.templates.insert(&key.text, node);
        }
    }
    let mut read = Read::default();
    let Some(at) = &sources.models else { return read };
    if !map(&sources.models, "one model per name", sink) {
        return read;
    }
    for (key, node) in at.node.entries() {
        read.models.extend(reader.model(key, &at.entry(key, node), sink));
        read.names.push(key.text.clone());
    }
    adapters::attach(&mut read, sink);
    read
}

impl Reader<'_> {
    fn reading(&self, whole: bool) -> Reading<'_> {
        Reading { env: self.env, waiting: self.settings.settings.waiting, whole, ollama: false }
    }

    /// Checks a template (or `defaults`) by itself, so that its errors are told once and at
    /// their own path, used or not.
    fn entry_alone(&self, at: &At<'_>, sink: &mut Sink) {
        let mut node = at.node.clone();
        self.macros.apply(&mut node, &at.spot.path, Some("model"), sink);
        let own = At { node: &node, ..at.clone() };
        if !own.is_map() {
            own.table(sink, "keys of a model");
            return;
        }
        for key in ["aliases", "name", "template", "port", "adapter_of", "adapter"] {
            let Some((key, _)) = node.entries().iter().find(|(k, _)| k.text == key) else {
                continue;
            };
            let spot = Spot { place: key.place, path: super::tree::join(&at.spot.path, &key.text) };
            let message = format!("`{}` belongs to one model, not to several", key.text);
            sink.error(&spot, message, "move it into the model");
        }
        fields::read(&own, self.reading(false), sink);
    }

    fn model(&self, key: &Key, at: &At<'_>, sink: &mut Sink) -> Option<ReadModel> {
        let name = key.text.as_str();
        let spot = Spot { place: key.place, path: at.spot.path.clone() };
        check_name(name, "model", &spot, sink);
        let mut node = self.layered(at, sink);
        self.macros.apply(&mut node, &spot.path, Some(name), sink);
        let own = At { node: &node, ..at.clone() };
        let mut fields = fields::read(&own, self.reading(true), sink)?;
        let template = at.node.get("template").map(|name| name.text().unwrap_or_default());
        fields.is_incomplete |= template.is_some_and(|name| !self.templates.contains_key(name));
        for (alias, spot) in &fields.aliases {
            check_name(alias, "alias", spot, sink);
        }
        let aliases = fields.aliases.clone();
        let spots = fields.spots.clone();
        let spec = Arc::new(self.build(name, &spot, fields, sink)?);
        let own = at.node.entries().iter().map(|(key, _)| key.text.clone()).collect();
        Some(ReadModel { spec, aliases, spot, spots, node, own })
    }

    /// The entry over its template over the defaults; mappings are merged, lists replaced.
    fn layered(&self, at: &At<'_>, sink: &mut Sink) -> Node {
        let mut node = at.node.clone();
        if let Some(template) = at.node.get("template") {
            let spot =
                Spot { place: template.place, path: super::tree::join(&at.spot.path, "template") };
            let name = template.text().unwrap_or_default();
            match self.templates.get(name) {
                Some(template) => node = over(template, &node),
                None => {
                    let expected = match nearest(name, self.templates.keys().copied()) {
                        Some(known) => format!("did you mean `{known}`?"),
                        None if self.templates.is_empty() => "none is defined".to_owned(),
                        None => "expected a name from `templates:`".to_owned(),
                    };
                    let message = format!("no template is called `{}`", name.escape_debug());
                    sink.error(&spot, message, expected);
                }
            }
        }
        let Some(defaults) = self.defaults else { return node };
        let entries =
            defaults.entries().iter().filter(|(key, _)| concerns(&key.text, &node, defaults));
        let base = Node { place: node.place, kind: Kind::Map(entries.cloned().collect()) };
        over(&base, &node)
    }

    /// vLLM drains by itself when told to stop, for as long as `shutdown_timeout` lets it.
    fn grace(&self, engine: EngineKind) -> Duration {
        let given = self.settings.spots.contains_key("swap.shutdown_timeout");
        if given || engine == EngineKind::Vllm {
            return self.settings.settings.swap.shutdown_timeout;
        }
        GRACE
    }

    fn build(
        &self,
        name: &str,
        spot: &Spot,
        mut fields: Fields,
        sink: &mut Sink,
    ) -> Option<ModelSpec> {
        let adapter = adapters::of(name, spot, &mut fields, sink)?;
        if fields.engine.is_none() && !fields.engine_is_wrong && !fields.is_incomplete {
            sink.error(spot, format!("model `{name}` names no engine"), "expected `engine: …`")
                .help(
                    "engines are `vllm`, `sglang`, `llamacpp`, `ollama`, `openai` (whatever speaks \
                     that API) and `http` (no LLM server)",
                );
        }
        let runtime = runtime(name, spot, &mut fields, sink);
        let engine = fields.engine?;
        let runtime = runtime?;
        if let (Some(at), true) = (fields.spot("http"), engine != EngineKind::Http) {
            let message = "`http` is for servers that are no LLM's";
            sink.error(at, message, "remove it, or set `engine: http`");
        }
        // An Ollama's models take this machine's VRAM only if the file says so.
        let external = match runtime {
            RuntimeSpec::External(_) => true,
            RuntimeSpec::Ollama(_) => fields.vram.is_none(),
            RuntimeSpec::Docker(_) | RuntimeSpec::Process(_) => false,
        };
        let gpu = &self.settings.settings.gpu;
        let no_gpus = gpu.provider == GpuProvider::None && gpu.memory.is_empty();
        let none = external || no_gpus || adapter.is_some();
        let gpus = if none { GpuRequest::None } else { GpuRequest::Count(1) };
        let usual_health = match engine {
            _ if fields.is_sglang => "/health",
            EngineKind::Openai => "/v1/models",
            EngineKind::Ollama | EngineKind::Http => "/",
            EngineKind::Vllm | EngineKind::Llamacpp => "/health",
        };
        Some(ModelSpec {
            name: ModelName::new(name),
            aliases: fields.aliases.into_iter().map(|(alias, _)| alias).collect(),
            display_name: fields.display_name,
            description: fields.description,
            model_type: fields.model_type.unwrap_or_else(|| "llm".to_owned()),
            tags: fields.tags,
            unlisted: fields.unlisted,
            engine,
            runtime,
            gpus: fields.gpus.unwrap_or(gpus),
            vram: fields.vram.unwrap_or(Vram::Unknown),
            ram: fields.ram,
            size_gb: fields.size_gb,
            priority: fields.priority.unwrap_or_default(),
            pinned: fields.pinned,
            warmup: fields.warmup,
            ttl: fields.ttl.and_then(Switch::on),
            ttl_bounds: fields.ttl_bounds,
            grace: fields.grace.unwrap_or_default(),
            keep: fields.keep,
            concurrency: fields.concurrency,
            health: health(usual_health, fields.health_path, fields.stall),
            start_timeout: fields.start_timeout,
            stop: StopSpec {
                signal: fields.signal.unwrap_or_else(|| "SIGTERM".to_owned()),
                grace: fields.stop_grace.unwrap_or_else(|| self.grace(engine)),
            },
            canary: fields.canary,
            warmup_request: fields.warmup_request,
            read_ahead: fields.read_ahead,
            include_usage: fields.include_usage.unwrap_or(true),
            upstream_name: fields.upstream_name,
            port: fields.port,
            waiting: fields.waiting,
            sleep: fields.sleep.and_then(Switch::on),
            adapter,
            lora: false,
            filters: fields.filters,
            metadata: fields.metadata,
            answer_timeout: fields.answer_timeout,
            http: fields.http.map(Arc::new),
            registered: false,
            peer: None,
            line: spot.place.line,
        })
    }
}

fn health(usual: &str, path: Option<Switch<String>>, stall: Option<Duration>) -> Health {
    let path = path.unwrap_or_else(|| Switch::On(usual.to_owned()));
    Health { path: path.on(), stall: stall.unwrap_or(STALL) }
}

/// Exactly one of `docker`, `process`, `external`, with the model's own `env` and `pull` in it.
fn runtime(name: &str, spot: &Spot, fields: &mut Fields, sink: &mut Sink) -> Option<RuntimeSpec> {
    let given: Vec<(&str, Spot)> = ["docker", "process", "external"]
        .into_iter()
        .filter_map(|key| Some((key, fields.spot(key)?.clone())))
        .collect();
    let is_ollama = fields.engine == Some(EngineKind::Ollama);
    if is_ollama {
        for (key, at) in given.iter().filter(|(key, _)| *key != "external") {
            let message = format!("an Ollama loads its models itself: `{key}` cannot");
            sink.error(at, message, "expected `external: { url: … }`, the Ollama's address")
                .help("without `external` it is OLLAMA_BASE_URL, else http://localhost:11434");
        }
    } else if given.is_empty() {
        if fields.is_incomplete {
            return None;
        }
        let message = format!("model `{name}` does not say how it is run");
        sink.error(spot, message, "expected one of `docker`, `process` and `external`");
        return None;
    }
    if let [(first, _), (second, at), ..] = given.as_slice() {
        sink.error(at, format!("model `{name}` has both `{first}` and `{second}`"), "keep one");
        return None;
    }
    let env = std::mem::take(&mut fields.env);
    if let (Some(docker), Some(at)) = (&fields.docker, fields.spot("env"))
        && let Some(container) = &docker.container
    {
        let message = format!("`env` has no effect on the existing container `{container}`");
        sink.error(at, message, "remove it");
    }
    if let Some(mut docker) = fields.docker.take() {
        for (key, value) in env {
            docker.env.entry(key).or_insert(value);
        }
        docker.pull = fields.pull.unwrap_or(docker.pull);
        let says_port = |word: &String| word == "--port" || word.starts_with("--port=");
        if fields.is_sglang && docker.container.is_none() && !docker.args.iter().any(says_port) {
            docker.port = docker.port.or(Some(SGLANG_PORT));
        }
        return Some(RuntimeSpec::Docker(docker));
    }
    if let Some(at) = fields.spot("pull").filter(|_| !is_ollama) {
        sink.error(at, "`pull` is for models that run in Docker or in Ollama", "remove it");
    }
    if let Some(mut process) = fields.process.take() {
        for (key, value) in env {
            process.env.entry(key).or_insert(value);
        }
        return Some(RuntimeSpec::Process(process));
    }
    // A part that is no mapping leaves nothing here; that was told.
    let external = fields.external.take()?;
    for key in ["gpus", "vram", "env", "port", "stop", "sleep"] {
        if is_ollama && matches!(key, "gpus" | "vram") {
            continue;
        }
        let Some(at) = fields.spot(key) else { continue };
        let message = format!("`{key}` has no effect on a model that runs elsewhere");
        sink.error(at, message, "remove it, or use `docker` or `process`");
    }
    if is_ollama {
        let pull = fields.pull.unwrap_or_default();
        return Some(RuntimeSpec::Ollama(OllamaSpec { at: external, pull }));
    }
    Some(RuntimeSpec::External(external))
}

/// Whether a default has a meaning for this model. What a model says of itself is checked
/// strictly; a default for all is meant for those that it suits.
fn concerns(key: &str, model: &Node, defaults: &Node) -> bool {
    let engine = model.get("engine").or_else(|| defaults.get("engine")).and_then(Node::text);
    let is_ollama = engine == Some("ollama");
    let external = model.get("external").is_some() || is_ollama;
    if model.get("adapter_of").is_some() && adapters::OF_THE_BASE.contains(&key) {
        return false;
    }
    let existing = model.get("docker").is_some_and(|docker| docker.get("container").is_some());
    let says = |key: &str, text: &str| model.get(key).and_then(Node::text) == Some(text);
    match key {
        "external" if is_ollama => true,
        "docker" | "process" | "external" => model.get(key).is_some() && !existing,
        "env" => !external && !existing,
        "pull" => model.get("docker").is_some() && !existing,
        "gpus" | "stop" => !external,
        "vram" => !external && !says("gpus", "0"),
        "sleep" => !external && engine == Some("vllm"),
        "http" => engine == Some("http"),
        "ttl" | "grace" => !says("pinned", "true") && !says("warmup", "true"),
        "waiting" => model.get("send_loading_state").is_none(),
        "send_loading_state" => model.get("waiting").is_none(),
        _ => true,
    }
}

/// `own` laid over `base`.
fn over(base: &Node, own: &Node) -> Node {
    let (Kind::Map(base), Kind::Map(entries)) = (&base.kind, &own.kind) else {
        return own.clone();
    };
    let mut merged = entries.clone();
    for (key, value) in base {
        match merged.iter_mut().find(|(k, _)| k.text == key.text) {
            Some((_, mine)) => *mine = over(value, mine),
            None => merged.push((key.clone(), value.clone())),
        }
    }
    Node { place: own.place, kind: Kind::Map(merged) }
}

/// Last parts of control paths: `POST /models/{name}/load`. A name that ends in one of them
/// could not be told from the verb.
const VERBS: [&str; 8] =
    ["load", "unload", "pin", "sleep", "wake", "health", "extend-ttl", "register"];

pub(super) fn check_name(name: &str, what: &str, spot: &Spot, sink: &mut Sink) {
    let Some((message, expected)) = unfit(name, what) else { return };
    let problem = sink.error(spot, message, expected);
    let last = name.rsplit('/').next().unwrap_or_default();
    if VERBS.contains(&last) {
        problem.help(format!("`POST /models/{name}` could not be told from a control call"));
    }
}

/// What is wrong with a name, and what is expected.
pub(super) fn unfit(name: &str, what: &str) -> Option<(String, String)> {
    let last = name.rsplit('/').next().unwrap_or_default();
    let unfit = |c: char| c.is_control() || c.is_whitespace() || "?#%\\\"'<>`{}|^".contains(c);
    Some(if name.is_empty() {
        (format!("this {what} has an empty name"), "expected a name such as `mistral`".to_owned())
    } else if let Some(c) = name.chars().find(|c| unfit(*c)) {
        let shown = c.escape_debug();
        let message = format!("the name `{}` contains `{shown}`", name.escape_debug());
        (message, "expected letters, digits and . _ - : / @ +".to_owned())
    } else if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        let message = format!("the name `{name}` does not survive in a URL");
        (message, "expected no empty, `.` or `..` part between slashes".to_owned())
    } else if VERBS.contains(&last) {
        let message = format!("the name `{name}` ends in `{last}`, a verb of the API");
        (message, format!("did you mean `{name}-model`?"))
    } else if name.len() > 200 {
        (format!("this {what}'s name is longer than 200 bytes"), "expected less".to_owned())
    } else {
        return None;
    })
}
