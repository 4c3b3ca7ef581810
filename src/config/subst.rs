//! `${…}` in values: user macros, `${env.NAME}`, `${model}`.
//!
//! Works on the tree, after parsing, so that no value can inject YAML. `${PORT}` and `${MODEL}`
//! in a process's command stay: they are known only when it starts.

use std::collections::BTreeMap;

use super::decode::{At, Sink, Spot};
use super::problem::nearest;
use super::secrets::is_secret_name;
use super::tree::{Kind, Node, join};

pub(super) type Env<'e> = &'e dyn Fn(&str) -> Option<String>;

/// Names with a meaning of their own; no user macro may take them.
const RESERVED: [&str; 4] = ["PORT", "MODEL", "model", "env"];

pub(super) struct Macros<'e> {
    values: BTreeMap<String, String>,
    env: Env<'e>,
}

#[derive(Clone, Copy)]
struct Scope<'m> {
    /// The name of the model whose entry is read.
    model: Option<&'m str>,
    /// Whether `${PORT}` and `${MODEL}` are left for the start.
    command: bool,
    /// Inside `macros:`, where `${model}` is left for the use.
    definition: bool,
}

impl<'e> Macros<'e> {
    /// Reads `macros:`; a macro may use those defined above it.
    pub(super) fn read(at: Option<&At<'_>>, env: Env<'e>, sink: &mut Sink) -> Macros<'e> {
        let mut macros = Macros { values: BTreeMap::new(), env };
        let Some(at) = at else { return macros };
        if !at.is_map() {
            at.table(sink, "one `name: value` per line");
            return macros;
        }
        for (key, node) in at.node.entries() {
            let spot = Spot { place: key.place, path: join(&at.spot.path, &key.text) };
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
            if RESERVED.contains(&key.text.as_str()) {
                sink.error(&spot, format!("`{}` is reserved", key.text), "choose another name");
            } else if key.text.is_empty() || !key.text.chars().all(plain) {
                sink.error(
                    &spot,
                    "a macro's name has other characters than letters, digits, `_` and `-`",
                    "choose another name",
                );
            }
            let value = at.entry(key, node);
            let Some(text) = value.free_text(sink, "a text") else { continue };
            let scope = Scope { model: None, command: true, definition: true };
            let text = macros.expand(&text, &value.spot, scope, sink);
            macros.values.insert(key.text.clone(), text);
        }
        macros
    }

    /// Replaces every `${…}` under `node`, the value at `path`.
    pub(super) fn apply(&self, node: &mut Node, path: &str, model: Option<&str>, sink: &mut Sink) {
        self.walk(node, path, Scope { model, command: false, definition: false }, sink);
    }

    fn walk(&self, node: &mut Node, path: &str, scope: Scope<'_>, sink: &mut Sink) {
        let place = node.place;
        match &mut node.kind {
            Kind::Null => {}
            Kind::Scalar(scalar) => {
                if scalar.text.contains("${") {
                    let spot = Spot { place, path: path.to_owned() };
                    let text = self.expand(&scalar.text, &spot, scope, sink);
                    scalar.written = Some(std::mem::replace(&mut scalar.text, text));
                }
            }
            Kind::List(items) => {
                for (i, item) in items.iter_mut().enumerate() {
                    self.walk(item, &join(path, &format!("[{i}]")), scope, sink);
                }
            }
            Kind::Map(entries) => {
                for (key, value) in entries {
                    let path = join(path, &key.text);
                    let command = scope.command || path.ends_with(".cmd");
                    self.walk(value, &path, Scope { command, ..scope }, sink);
                }
            }
        }
    }

    fn expand(&self, text: &str, spot: &Spot, scope: Scope<'_>, sink: &mut Sink) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find("${") {
            // `$${x}` is a literal `${x}`, for shells.
            if rest[..at].ends_with('$') {
                out.push_str(&rest[..at - 1]);
                out.push_str("${");
                rest = &rest[at + 2..];
                continue;
            }
            out.push_str(&rest[..at]);
            let Some(end) = rest[at..].find('}') else {
                sink.error(spot, "`${` without `}`", "expected `${name}`")
                    .help("write `$${` for a literal `${`");
                return out;
            };
            let name = &rest[at + 2..at + end];
            match self.value(name, spot, scope, sink) {
                Some(value) => out.push_str(&value),
                None => out.push_str(&rest[at..=at + end]),
            }
            rest = &rest[at + end + 1..];
        }
        out.push_str(rest);
        out
    }

    /// `None`: the placeholder stays.
    fn value(&self, name: &str, spot: &Spot, scope: Scope<'_>, sink: &mut Sink) -> Option<String> {
        if let Some(variable) = name.strip_prefix("env.") {
            return self.env_value(variable, spot, sink);
        }
        match (name, scope.model) {
            ("PORT" | "MODEL", _) if scope.command => return None,
            ("model", _) if scope.definition => return None,
            ("MODEL" | "model", Some(model)) => return Some(model.to_owned()),
            ("PORT", _) => {
                sink.error(spot, "`${PORT}` has no meaning here", "only `process.cmd` can use it")
                    .help("a container's own port is set by `docker.port`");
                return None;
            }
            ("MODEL" | "model", None) => {
                let message = format!("`${{{name}}}` has no meaning here");
                sink.error(spot, message, "only models and templates can use it");
                return None;
            }
            _ => {}
        }
        if let Some(value) = self.values.get(name) {
            return Some(self.late(value.clone(), spot, scope, sink));
        }
        self.unknown(name, spot, sink);
        None
    }

    /// A macro's value, with what its definition had to leave open.
    fn late(&self, mut text: String, spot: &Spot, scope: Scope<'_>, sink: &mut Sink) -> String {
        for name in ["PORT", "MODEL", "model"] {
            let placeholder = format!("${{{name}}}");
            if text.contains(&placeholder)
                && let Some(value) = self.value(name, spot, scope, sink)
            {
                text = text.replace(&placeholder, &value);
            }
        }
        text
    }

    fn env_value(&self, variable: &str, spot: &Spot, sink: &mut Sink) -> Option<String> {
        let value = (self.env)(variable);
        match &value {
            Some(value) if is_secret_name(variable) => sink.secrets.push(value.clone()),
            Some(_) => {}
            None => {
                let message = format!("the environment variable `{variable}` is not set");
                let problem = sink.error(spot, message, "");
                problem.expected = "expected it in Wharf's environment".to_owned();
                problem.help(format!("set it: `{variable}=… wharf serve`, or in the unit or .env"));
            }
        }
        value
    }

    fn unknown(&self, name: &str, spot: &Spot, sink: &mut Sink) {
        let known = self.values.keys().map(String::as_str).chain(["model", "PORT", "MODEL"]);
        let shown = name.escape_debug();
        let expected = match nearest(name, known) {
            Some(known) => format!("did you mean `${{{known}}}`?"),
            None if (self.env)(name).is_some() => format!("did you mean `${{env.{name}}}`?"),
            None => "expected a macro, or `${env.NAME}`".to_owned(),
        };
        sink.error(spot, format!("no macro is called `{shown}`"), expected)
            .help("define it under `macros:`, or write `$${…}` if a shell shall see it");
    }
}
