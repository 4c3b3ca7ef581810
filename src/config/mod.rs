//! models.yaml → a validated [`catalog::Catalog`], or every error at once with line and column.
//!
//! The way of the file: `tree` (YAML with places) → `subst` (`${…}`) → `settings`, `models` →
//! `fields`, `launch` (typed keys) → `rules` (what must hold between them).

mod access;
mod adapters;
mod capacity;
pub mod catalog;
mod decode;
mod defaults;
pub mod diff;
mod fields;
mod fit;
mod groups;
pub mod import;
mod keep;
mod launch;
mod lora;
mod models;
mod overlay;
mod overrides;
pub mod patch;
pub mod peers;
mod problem;
mod routing;
mod rules;
pub mod schema;
mod secrets;
mod settings;
mod shape;
mod subst;
mod traffic;
mod tree;
pub(crate) mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use catalog::Catalog;
use decode::{At, Sink, Unread};
pub use overlay::{LeftOut, Overlay, PATCHES_MAX, REGISTERED_MAX};
pub use problem::{ConfigErrors, Place, Problem, Report, Severity, nearest};
pub(crate) use secrets::is_secret_name;
use tree::{Kind, Node};

/// The largest models.yaml that is read.
const MAX_FILE: u64 = 4 << 20;

#[derive(Clone, Debug)]
pub struct Loaded {
    pub catalog: Catalog,
    pub warnings: Vec<Problem>,
    /// What came from the environment instead of the file.
    pub overrides: Vec<Override>,
    /// What of the overlay does not fit the file.
    pub left_out: Vec<LeftOut>,
    /// Of the keys that can be patched: those that the file sets, and the effective `defaults`.
    pub in_file: BTreeSet<String>,
    pub defaults: BTreeMap<String, String>,
}

/// An environment variable of the swapper service that outranks the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Override {
    pub variable: &'static str,
    /// The key that it stands for.
    pub key: &'static str,
    pub value: String,
}

/// Where the configuration is: the flag, else SWAPPER_CONFIG_PATH, else `models.yaml`.
pub fn path(flag: Option<PathBuf>) -> PathBuf {
    flag.or_else(|| {
        std::env::var_os("SWAPPER_CONFIG_PATH").filter(|v| !v.is_empty()).map(Into::into)
    })
    .unwrap_or_else(|| PathBuf::from("models.yaml"))
}

/// Reads and checks a file, with Wharf's own environment.
///
/// # Errors
/// The file cannot be read, or everything that is wrong with it.
pub fn load(path: &Path) -> Result<Loaded, ConfigErrors> {
    parse(&read_file(path)?, &path.display().to_string(), &own_env)
}

/// Wharf's own environment.
pub fn own_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The text of a configuration.
///
/// # Errors
/// It cannot be read, is too large or no text.
pub fn read_file(path: &Path) -> Result<String, ConfigErrors> {
    let file = path.display().to_string();
    let unreadable = |reason: String| ConfigErrors::Unreadable { file: file.clone(), reason };
    let size = std::fs::metadata(path).map_err(|e| unreadable(e.to_string()))?.len();
    if size > MAX_FILE {
        return Err(unreadable(format!("it has {size} bytes, more than {MAX_FILE}")));
    }
    let bytes = std::fs::read(path).map_err(|e| unreadable(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| {
        unreadable(format!("it is not UTF-8 text (byte {})", e.utf8_error().valid_up_to()))
    })
}

/// `listen.orchestrator` of a file that need not be right otherwise (a client may lack the
/// server's environment). `None`: it is not set, or cannot be read.
pub fn listening_of(path: &Path) -> Option<Listening> {
    if std::fs::metadata(path).ok()?.len() > MAX_FILE {
        return None;
    }
    let text = std::fs::read_to_string(path).ok()?;
    let (root, _flaws) = tree::parse(text.strip_prefix('\u{feff}').unwrap_or(&text));
    let listen = root.get("listen")?;
    let orchestrator = listen.get("orchestrator").and_then(Node::text);
    let cert_file = listen.get("tls").and_then(|tls| tls.get("cert_file")).and_then(Node::text);
    Some(Listening {
        orchestrator: orchestrator.and_then(|text| values::address(text).ok()),
        cert_file: cert_file.map(PathBuf::from),
    })
}

/// What a client has to know of `listen`.
#[derive(Debug, Default)]
pub struct Listening {
    pub orchestrator: Option<SocketAddr>,
    /// Of `listen.tls`.
    pub cert_file: Option<PathBuf>,
}

/// Checks the text of a configuration. `env` gives environment variables.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse(
    text: &str,
    file: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Loaded, ConfigErrors> {
    parse_over(text, file, &Overlay::default(), env)
}

/// As [`parse`], with patches and registered models laid over the file.
///
/// # Errors
/// Everything that is wrong with either.
pub fn parse_over(
    text: &str,
    file: &str,
    overlay: &Overlay,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Loaded, ConfigErrors> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut sink = Sink::default();
    let (mut root, flaws) = tree::parse(text);
    collect_secrets(&root, &mut sink.secrets);
    let broken = !flaws.is_empty() && matches!(root.kind, Kind::Null);
    for flaw in flaws {
        sink.flaw(flaw);
    }
    let in_file = patchable_in(&root);
    if !matches!(root.kind, Kind::Null) {
        sink.problems.extend(overlay::apply(&mut root, overlay));
    }
    let defaults = defaults_of(&root);
    let read = if broken { None } else { read(root, env, &mut sink) };
    let mut problems = finished(sink, text);
    overlay::name(&mut problems, overlay);
    let failed = problems.iter().any(|p| p.severity == Severity::Error);
    match read {
        Some((mut catalog, overrides)) if !failed => {
            for registration in &overlay.registered {
                if let Some(spec) = catalog.models.get_mut(registration.model_id.as_str()) {
                    Arc::make_mut(spec).registered = true;
                }
            }
            let left_out = Vec::new();
            Ok(Loaded { catalog, warnings: problems, overrides, left_out, in_file, defaults })
        }
        _ => Err(ConfigErrors::Invalid { file: file.to_owned(), problems }),
    }
}

/// As [`parse_over`], but what of the overlay does not fit the file is left out and told: a stored
/// patch must not keep Wharf from starting.
///
/// # Errors
/// Everything that is wrong with the file.
pub fn parse_around(
    text: &str,
    file: &str,
    overlay: &Overlay,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Loaded, ConfigErrors> {
    let items = overlay.items();
    let mut kept: Vec<usize> = (0..items.len()).collect();
    let mut reasons = BTreeMap::new();
    let mut loaded = loop {
        let tried = overlay.keep_only(&kept);
        let errors = match parse_over(text, file, &tried, env) {
            Ok(loaded) => break loaded,
            Err(errors) if kept.is_empty() => return Err(errors),
            Err(errors) => errors,
        };
        let problems = errors.problems();
        let mut blamed = overlay::blamed(&tried, problems);
        if blamed.is_empty() {
            // Told of a place in the file: if the file alone is right, it is because of one of
            // these. The last ones go first: patches before the models that they may be for.
            let alone = parse(text, file, env)?;
            let error = problems.iter().find(|problem| problem.severity == Severity::Error);
            match error {
                Some(error) => drop(blamed.insert(kept.len() - 1, error)),
                None => break alone,
            }
        }
        for (at, error) in blamed.into_iter().rev() {
            reasons.insert(kept.remove(at), error.in_a_line());
        }
    };
    for (at, why) in reasons {
        let what = items[at].label();
        let message = format!("{what} is left out: {why}");
        let help = "it is kept in the store and tried again at the next reload";
        loaded.warnings.push(Problem::outside(Severity::Warning, &what, message, help));
        loaded.left_out.push(LeftOut { what, why });
    }
    Ok(loaded)
}

/// Paths below `swap`, `queue`, `defaults` and `models` that the file sets.
fn patchable_in(root: &Node) -> BTreeSet<String> {
    let at = |node: &Node, path: &str| {
        path.split('.').try_fold(node.clone(), |node, part| node.get(part).cloned()).is_some()
    };
    let global = patch::GLOBAL.iter().filter(|path| at(root, path));
    let mut found: BTreeSet<String> = global.map(|path| (*path).to_owned()).collect();
    for (name, model) in root.get("models").map(Node::entries).unwrap_or_default() {
        let keys = patch::OF_A_MODEL.iter().filter(|key| at(model, key));
        found.extend(keys.map(|key| format!("models.{}.{key}", name.text)));
    }
    found
}

/// The scalars among `defaults:`, by path below it.
fn defaults_of(root: &Node) -> BTreeMap<String, String> {
    let defaults = root.get("defaults");
    let keys = ["ttl", "grace", "ttl_bounds.min", "ttl_bounds.max"];
    let text = |key: &str| {
        let node = key.split('.').try_fold(defaults?, |node, part| node.get(part))?;
        node.text().map(str::to_owned)
    };
    keys.iter().filter_map(|key| Some(((*key).to_owned(), text(key)?))).collect()
}

fn read(
    mut root: Node,
    env: &dyn Fn(&str) -> Option<String>,
    sink: &mut Sink,
) -> Option<(Catalog, Vec<Override>)> {
    if matches!(root.kind, Kind::Null) {
        sink.error(&At::root(&root).spot, "the file is empty", "expected `models:`").help(EXAMPLE);
        return None;
    }
    let macros_node = root.get("macros").cloned();
    let macros_at = macros_node.as_ref().map(|node| At {
        spot: decode::Spot { place: node.place, path: "macros".to_owned() },
        ..At::root(node)
    });
    let macros = subst::Macros::read(macros_at.as_ref(), env, sink);
    if let Kind::Map(entries) = &mut root.kind {
        // Models and what they are made of are expanded one by one: `${model}` differs.
        let later = ["macros", "models", "templates", "defaults"];
        for (key, node) in entries.iter_mut().filter(|(k, _)| !later.contains(&&*k.text)) {
            macros.apply(node, &key.text, None, sink);
        }
    }
    let at = At::root(&root);
    let mut top = at.table(sink, "`models:` and other keys")?;
    let mut settings = settings::read(&mut top, env, sink);
    let mut overrides = overrides::apply(&mut settings, env, sink);
    let models_at = top.take("models");
    if models_at.as_ref().is_none_or(|at| at.is_map() && at.node.entries().is_empty()) {
        let spot = models_at.as_ref().map_or(&at.spot, |at| &at.spot);
        sink.error(spot, "no models are configured", "expected `models:`").help(EXAMPLE);
    }
    let sources = models::Sources {
        models: models_at,
        templates: top.take("templates"),
        defaults: top.take("defaults"),
    };
    let read = models::read(&sources, &settings, &macros, env, sink);
    let aliases = rules::aliases(&read.models, sink);
    let templates = sources.templates.as_ref().map(|at| at.node);
    let routing = routing::read(&mut top, &read, &aliases, templates, &settings, sink);
    rules::check(&read.models, &routing.groups, &mut settings, sink);
    groups::check(&routing.groups_at, &read, &settings, sink);
    overrides.extend(overrides::ollama(&read.models, env, sink));
    top.take("macros");
    top.finish(sink, UNREAD);
    let models = read.models.into_iter().map(|m| (m.spec.name.clone(), m.spec));
    let of_peers = routing.peers.values().flat_map(|peer| peer.listed_specs());
    let models = models.chain(of_peers).collect();
    let routing::Routing { groups, routes, peers, registrable, .. } = routing;
    let settings = settings.settings;
    let mut catalog = Catalog { models, aliases, groups, routes, peers, registrable, settings };
    catalog.link_adapters();
    Some((catalog, overrides))
}

const EXAMPLE: &str = "the least that works:\n\
    \n  models:\n    mistral:\n      engine: vllm\n      docker: \
    { image: \"vllm/vllm-openai:v0.31.0\", args: [--model, mistralai/Mistral-7B-Instruct-v0.3] }\n";

const IMPORT: Unread = Unread::Hint("a key of another tool: `wharf import` converts its file");

const UNREAD: &[(&str, Unread)] = &[
    ("profiles", Unread::Hint("did you mean `groups`?")),
    ("keys", Unread::Hint("write `auth: { keys: … }`")),
    ("mode", Unread::Hint("write `swap: { mode: … }`")),
    ("swapper", IMPORT),
    ("healthCheckTimeout", IMPORT),
    ("logLevel", IMPORT),
    ("startPort", IMPORT),
    ("hooks", IMPORT),
    ("matrix", IMPORT),
    ("apiKeys", IMPORT),
    ("port_range", IMPORT),
    ("default_ttl_minutes", IMPORT),
    ("warmup_models", IMPORT),
];

/// In the order of the file, each told once, with its source line, without secrets.
fn finished(sink: Sink, text: &str) -> Vec<Problem> {
    let Sink { mut problems, secrets, .. } = sink;
    let lines: Vec<&str> = text.lines().collect();
    for problem in &mut problems {
        problem.finish(&lines, &secrets);
    }
    // Stable: problems of one place stay in the order in which they were found.
    problems.sort_by_key(|p| (p.place.line == 0, p.place.line, p.place.column));
    let mut told = std::collections::BTreeSet::new();
    // A template's error shows up once for every model that uses it.
    problems.retain(|p| p.place.line == 0 || told.insert((p.place, p.message.clone())));
    problems
}

fn texts(node: &Node, keep: &mut dyn FnMut(&str)) {
    match &node.kind {
        Kind::Null => {}
        Kind::Scalar(scalar) => keep(&scalar.text),
        Kind::List(items) => items.iter().for_each(|item| texts(item, keep)),
        Kind::Map(entries) => entries.iter().for_each(|(_, value)| texts(value, keep)),
    }
}

/// Literal secrets in the file: values under secret names, after secret flags, in URLs.
fn collect_secrets(node: &Node, secrets: &mut Vec<String>) {
    let mut keep = |text: &str| {
        if !text.contains("${") {
            secrets.extend(text.lines().map(|line| line.trim().to_owned()));
        }
    };
    match &node.kind {
        Kind::Null => {}
        Kind::Scalar(scalar) => {
            if let Some((_, rest)) = scalar.text.split_once("://")
                && let Some((user, _)) = rest.split_once('@')
            {
                keep(user);
            }
            if let Some((name, value)) = scalar.text.split_once('=')
                && secrets::is_secret_name(name)
            {
                keep(value);
            }
        }
        Kind::List(items) => {
            for pair in items.windows(2) {
                let flag = pair[0].text().filter(|t| t.starts_with('-'));
                if let (true, Some(value)) =
                    (flag.is_some_and(secrets::is_secret_name), pair[1].text())
                {
                    keep(value);
                }
            }
            items.iter().for_each(|item| collect_secrets(item, secrets));
        }
        Kind::Map(entries) => {
            for (key, value) in entries {
                if secrets::is_secret_name(&key.text) {
                    texts(value, &mut keep);
                }
            }
            entries.iter().for_each(|(_, value)| collect_secrets(value, secrets));
        }
    }
}
