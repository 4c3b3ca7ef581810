//! What is laid over models.yaml: patched policy, and models that callers registered.
//!
//! Both go into the tree of the file before it is read, so that they pass the same checks as what
//! an operator writes. What comes from here has line 0 and its index as column, until
//! [`name`] turns that into words.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::patch::{self, Target};
use super::problem::{Place, Problem, nearest};
use super::tree::{Key, Kind, Node, Scalar};
use crate::store::{Registration, Store};

/// A bound against a store that fills up: each is read at every reload.
pub const REGISTERED_MAX: usize = 256;
/// As many as one request can bring.
pub const PATCHES_MAX: usize = 2048;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overlay {
    /// By path: `swap.max_wait`, `models.mistral.ttl`.
    pub patches: BTreeMap<String, Value>,
    pub registered: Vec<Registration>,
}

/// A part of the overlay that does not fit the file any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// `patch: swap.max_wait`, `registered model qwen`
    pub what: String,
    pub why: String,
}

impl Overlay {
    pub fn of(store: &Store) -> Overlay {
        Overlay { patches: store.patches(), registered: store.registered() }
    }

    pub fn is_empty(&self) -> bool {
        self.patches.is_empty() && self.registered.is_empty()
    }

    /// How a patch is called in messages.
    pub fn patch(path: &str) -> String {
        format!("patch: {path}")
    }

    /// How a registered model is called in messages.
    pub fn model(name: &str) -> String {
        format!("registered model {name}")
    }

    /// Whether there is an item of this name.
    pub fn has(&self, label: &str) -> bool {
        self.items().into_iter().any(|item| item.label() == label)
    }

    /// Without the items that were left out.
    pub fn without(&self, left_out: &[LeftOut]) -> Overlay {
        let items = self.items().into_iter().enumerate();
        let fits = |item: Item<'_>| left_out.iter().all(|left| left.what != item.label());
        let kept: Vec<usize> = items.filter(|(_, item)| fits(*item)).map(|(at, _)| at).collect();
        self.keep_only(&kept)
    }

    /// Registered models first: patches outrank them.
    pub(super) fn items(&self) -> Vec<Item<'_>> {
        let models = self.registered.iter().map(Item::Model);
        models.chain(self.patches.iter().map(|(path, value)| Item::Patch { path, value })).collect()
    }

    /// Without the items at these places of [`Overlay::items`].
    pub(super) fn keep_only(&self, kept: &[usize]) -> Overlay {
        let mut left = Overlay::default();
        for (at, item) in self.items().into_iter().enumerate() {
            match item {
                _ if !kept.contains(&at) => {}
                Item::Model(registration) => left.registered.push(registration.clone()),
                Item::Patch { path, value } => {
                    left.patches.insert(path.to_owned(), value.clone());
                }
            }
        }
        left
    }
}

#[derive(Clone, Copy)]
pub(super) enum Item<'o> {
    Model(&'o Registration),
    Patch { path: &'o str, value: &'o Value },
}

impl Item<'_> {
    pub(super) fn label(self) -> String {
        match self {
            Item::Model(registration) => Overlay::model(&registration.model_id),
            Item::Patch { path, .. } => Overlay::patch(path),
        }
    }
}

/// The items that errors name as theirs, with the first error of each.
pub(super) fn blamed<'p>(
    overlay: &Overlay,
    problems: &'p [Problem],
) -> BTreeMap<usize, &'p Problem> {
    let errors =
        problems.iter().filter(|p| p.severity == super::Severity::Error && p.place.line == 0);
    let mut blamed = BTreeMap::new();
    let items = overlay.items();
    for problem in errors {
        let names = |item: &Item<'_>| {
            let rest = problem.path.strip_prefix(&item.label());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(": "))
        };
        if let Some(at) = items.iter().position(names) {
            blamed.entry(at).or_insert(problem);
        }
    }
    blamed
}

/// Lays every item over the tree; answers with what cannot be laid there at all.
pub(super) fn apply(root: &mut Node, overlay: &Overlay) -> Vec<Problem> {
    let allowed = registrable(root);
    let mut problems = Vec::new();
    for (at, item) in overlay.items().into_iter().enumerate() {
        let place = place(at);
        let laid = match item {
            Item::Model(registration) => register(root, registration, &allowed, place),
            Item::Patch { path, value } => set(root, path, value, place),
        };
        if let Err(why) = laid {
            let mut problem =
                Problem::outside(super::Severity::Error, &item.label(), why.message, &why.help);
            problem.place = place;
            problems.push(problem);
        }
    }
    problems
}

/// See the top of this file.
fn place(at: usize) -> Place {
    Place { line: 0, column: u32::try_from(at + 1).unwrap_or(u32::MAX), width: 0 }
}

/// Names the item of the overlay that a problem lies in, instead of a place in the file.
pub(super) fn name(problems: &mut [Problem], overlay: &Overlay) {
    let items = overlay.items();
    for problem in problems.iter_mut().filter(|p| p.place.line == 0 && p.place.column > 0) {
        let item = items.get(problem.place.column as usize - 1).copied();
        problem.place.column = 0;
        let Some(item) = item else { continue };
        let label = item.label();
        let inside = match item {
            Item::Model(registration) => {
                let prefix = format!("models.{}.", registration.model_id);
                problem.path.strip_prefix(&prefix).map(|key| format!("{label}: {key}"))
            }
            Item::Patch { .. } => None,
        };
        problem.path = inside.unwrap_or(label);
    }
}

pub(super) struct Why {
    message: String,
    help: String,
}

fn why(message: impl Into<String>, help: impl Into<String>) -> Why {
    Why { message: message.into(), help: help.into() }
}

/// `registration: { templates: [...] }`
fn registrable(root: &Node) -> Vec<String> {
    let templates = root.get("registration").and_then(|node| node.get("templates"));
    match templates.map(|node| &node.kind) {
        Some(Kind::List(items)) => {
            items.iter().filter_map(|item| Some(item.text()?.to_owned())).collect()
        }
        _ => Vec::new(),
    }
}

fn register(
    root: &mut Node,
    registration: &Registration,
    allowed: &[String],
    place: Place,
) -> Result<(), Why> {
    let name = registration.model_id.as_str();
    // Names go into arguments of engines, as `${model}`.
    if name.starts_with('-') {
        return Err(why(format!("the name `{name}` would be read as an option"), "choose another"));
    }
    if root.get("models").is_some_and(|models| models.get(name).is_some()) {
        return Err(why(
            format!("models.yaml has a model called `{name}`"),
            "that one is used; DELETE the registration, or rename one of the two",
        ));
    }
    if let Some(owner) = alias_of(root, name) {
        return Err(why(
            format!("`{name}` is an alias of `{owner}` in models.yaml"),
            "choose another name, or remove the alias",
        ));
    }
    let template = template_of(registration, allowed)?;
    let mut entry = vec![(key("template", place), scalar(&template, place))];
    let mut text = |name: &str, value: Option<&str>| {
        if let Some(value) = value {
            entry.push((key(name, place), scalar(value, place)));
        }
    };
    text("name", registration.display_name.as_deref());
    text("type", registration.model_type.as_deref());
    // The pool manager's registry knows it, Wharf's file does not.
    let priority = registration.priority.as_deref();
    text("priority", priority.map(|word| if word == "medium" { "normal" } else { word }));
    text("warmup", registration.warmup.then_some("true"));
    let ttl = registration.ttl_minutes.map(minutes).transpose()?;
    text("ttl", ttl.as_deref().filter(|_| !registration.warmup));
    if !registration.tags.is_empty() {
        let tags = registration.tags.iter().map(|tag| scalar(tag, place)).collect();
        entry.push((key("tags", place), Node { place, kind: Kind::List(tags) }));
    }
    let texts = [&registration.display_name, &registration.model_type, &registration.priority];
    let texts = texts.into_iter().flatten().chain(&registration.tags);
    for text in texts.chain([&registration.model_id]) {
        harmless(text)?;
    }
    let node = Node { place, kind: Kind::Map(entry) };
    insert(root, &["models", name], node, place);
    Ok(())
}

fn alias_of<'r>(root: &'r Node, name: &str) -> Option<&'r str> {
    let models = root.get("models").map(Node::entries).unwrap_or_default();
    let has = |model: &Node| match model.get("aliases").map(|node| &node.kind) {
        Some(Kind::List(items)) => items.iter().any(|item| item.text() == Some(name)),
        _ => false,
    };
    models.iter().find(|(_, model)| has(model)).map(|(key, _)| key.text.as_str())
}

fn template_of(registration: &Registration, allowed: &[String]) -> Result<String, Why> {
    let listed = || {
        let names: Vec<String> = allowed.iter().map(|name| format!("`{name}`")).collect();
        names.join(", ")
    };
    if allowed.is_empty() {
        return Err(why(
            "models.yaml allows no template to registrations",
            "the operator lists them: `registration: { templates: [NAME] }`",
        ));
    }
    match (&registration.template, allowed) {
        (Some(name), _) if allowed.contains(name) => Ok(name.clone()),
        (Some(name), _) => {
            let near = nearest(name, allowed.iter().map(String::as_str));
            let hint = near.map_or(String::new(), |near| format!("did you mean `{near}`? "));
            Err(why(
                format!("the template `{}` is not one that registrations may use", escaped(name)),
                format!("{hint}allowed are {}", listed()),
            ))
        }
        (None, [only]) => Ok(only.clone()),
        (None, _) => Err(why("it names no `template`", format!("allowed are {}", listed()))),
    }
}

/// As a duration of models.yaml; 0 stays 0, which means never.
pub(super) fn minutes(minutes: f64) -> Result<String, Why> {
    if !(0.0..=366.0 * 24.0 * 60.0).contains(&minutes) {
        return Err(why(
            format!("{minutes} minutes are no time to live"),
            "expected 0 (never) to 527040",
        ));
    }
    Ok(format!("{}ms", (minutes * 60_000.0).round() as u64))
}

fn set(root: &mut Node, path: &str, value: &Value, place: Place) -> Result<(), Why> {
    let target = patch::target(path).ok_or_else(|| {
        why(format!("`{}` cannot be patched", escaped(path)), patch::listed(path))
    })?;
    harmless_value(value)?;
    match target {
        Target::Global(path) => {
            let parts: Vec<&str> = path.split('.').collect();
            insert(root, &parts, node(value, place), place);
        }
        Target::Model { name, key } => {
            let models = root.get("models");
            if models.is_none_or(|models| models.get(name).is_none()) {
                let known = models.map(Node::entries).unwrap_or_default();
                let near = nearest(name, known.iter().map(|(key, _)| key.text.as_str()));
                let hint = near.map_or(String::new(), |near| format!("did you mean `{near}`?"));
                return Err(why(format!("no model is called `{}`", escaped(name)), hint));
            }
            let parts: Vec<&str> = ["models", name].into_iter().chain(key.split('.')).collect();
            insert(root, &parts, node(value, place), place);
        }
    }
    Ok(())
}

/// Nothing that would be replaced: `${env.NAME}` would give secrets away.
fn harmless(text: &str) -> Result<(), Why> {
    if text.contains("${") {
        return Err(why(
            format!("`{}` holds `${{`", escaped(text)),
            "variables and macros are for models.yaml",
        ));
    }
    if text.len() > 1000 || text.chars().any(char::is_control) {
        return Err(why(
            format!("`{}` is not one line of text", escaped(text)),
            "expected at most 1000 bytes, without control characters",
        ));
    }
    Ok(())
}

fn harmless_value(value: &Value) -> Result<(), Why> {
    match value {
        Value::String(text) => harmless(text),
        Value::Array(items) => items.iter().try_for_each(harmless_value),
        Value::Object(map) => map.iter().try_for_each(|(key, value)| {
            harmless(key)?;
            harmless_value(value)
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}

fn escaped(text: &str) -> String {
    text.chars().take(100).collect::<String>().escape_debug().to_string()
}

fn key(name: &str, place: Place) -> Key {
    Key { text: name.to_owned(), place }
}

fn scalar(text: &str, place: Place) -> Node {
    Node {
        place,
        kind: Kind::Scalar(Scalar { text: text.to_owned(), written: None, quoted: true }),
    }
}

fn node(value: &Value, place: Place) -> Node {
    let kind = match value {
        Value::Null => Kind::Null,
        Value::String(text) => return scalar(text, place),
        Value::Bool(_) | Value::Number(_) => return scalar(&value.to_string(), place),
        Value::Array(items) => Kind::List(items.iter().map(|item| node(item, place)).collect()),
        Value::Object(map) => Kind::Map(
            map.iter().map(|(name, value)| (key(name, place), node(value, place))).collect(),
        ),
    };
    Node { place, kind }
}

/// Puts `value` at a path; what stands in its way and is no mapping gives way.
fn insert(root: &mut Node, path: &[&str], value: Node, place: Place) {
    let Some((first, rest)) = path.split_first() else {
        *root = value;
        return;
    };
    if !matches!(root.kind, Kind::Map(_)) {
        root.kind = Kind::Map(bounds(root, place));
    }
    let Kind::Map(entries) = &mut root.kind else { return };
    match entries.iter_mut().find(|(key, _)| key.text == *first) {
        Some((_, node)) => insert(node, rest, value, place),
        None => {
            let mut node = Node::null(place);
            insert(&mut node, rest, value, place);
            entries.push((key(first, place), node));
        }
    }
}

/// `[5m, 60m]` as `{ min: 5m, max: 60m }`, so that one of them can be patched; empty for all else.
fn bounds(node: &Node, place: Place) -> Vec<(Key, Node)> {
    match &node.kind {
        Kind::List(items) if items.len() == 2 => ["min", "max"]
            .into_iter()
            .map(|name| key(name, place))
            .zip(items.iter().cloned())
            .collect(),
        _ => Vec::new(),
    }
}
