//! `wharf import`: the configuration of another tool → a models.yaml that means the same, and a
//! report of what has no equivalent.

mod compose;
mod docker_run;
mod llama_swap;
mod names;
mod ollama;
mod together;
mod yaml;

use super::problem::Place;
use super::tree::{self, Key, Kind, Node};
use yaml::{Entry, Out};

/// A file to convert: its name, for messages, and its text.
#[derive(Clone, Debug)]
pub struct Source {
    pub file: String,
    pub text: String,
}

#[derive(Clone, Debug)]
pub struct Imported {
    /// Which tool's files they are.
    pub tool: &'static str,
    pub yaml: String,
    /// What has no equivalent, in the order of the files.
    pub notes: Vec<Note>,
}

/// Something that is not in the result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// `config.yaml:12`
    pub at: String,
    /// `models.llama.cmdStop`
    pub name: String,
    pub why: String,
    pub what_to_do: String,
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}; {}", self.at, self.name, self.why, self.what_to_do)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    #[error("{file}:{line}: {message}")]
    Broken { file: String, line: u32, message: String },
    #[error(
        "{file}: no configuration of a known tool: expected llama-swap's config.yaml, the swapper's \
         swapper_config.yaml, the model pool manager's JSON files, or a docker-compose.yml with \
         services called …-llm"
    )]
    Unknown { file: String },
    #[error("{first} and {second} belong to different tools: convert them one by one")]
    Mixed { first: String, second: String },
    #[error("{file}: there is no model in it")]
    Empty { file: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tool {
    LlamaSwap,
    Swapper,
    Pool,
    Compose,
}

impl Tool {
    fn name(self) -> &'static str {
        match self {
            Tool::LlamaSwap => "llama-swap",
            Tool::Swapper => "the swapper service",
            Tool::Pool => "the model pool manager",
            Tool::Compose => "Docker Compose, as of the dynamic model orchestrator",
        }
    }
}

/// One file, read.
struct File {
    name: String,
    root: Node,
}

/// Converts one file, or the two of the model pool manager.
///
/// # Errors
/// A file that is broken, or of no known tool, or without a model.
pub fn convert(sources: &[Source]) -> Result<Imported, ImportError> {
    let mut files = Vec::new();
    let mut tool: Option<(Tool, String)> = None;
    for Source { file, text } in sources {
        let (root, flaws) = tree::parse(text.strip_prefix('\u{feff}').unwrap_or(text));
        if let Some(flaw) = flaws.into_iter().next() {
            let (line, message) = (flaw.place.line, flaw.message);
            return Err(ImportError::Broken { file: file.clone(), line, message });
        }
        let found = recognise(&root).ok_or_else(|| ImportError::Unknown { file: file.clone() })?;
        match &tool {
            Some((first, name)) if *first != found || found != Tool::Pool => {
                return Err(ImportError::Mixed { first: name.clone(), second: file.clone() });
            }
            _ => tool = Some((found, file.clone())),
        }
        files.push(File { name: file.clone(), root });
    }
    let Some((tool, first)) = tool else {
        return Err(ImportError::Unknown { file: "(nothing)".to_owned() });
    };
    let mut draft = Draft::default();
    for file in &files {
        match tool {
            Tool::LlamaSwap => llama_swap::convert(file, &mut draft),
            Tool::Swapper => ollama::swapper(file, &mut draft),
            Tool::Compose => compose::convert(file, &mut draft),
            Tool::Pool => {}
        }
    }
    if tool == Tool::Pool {
        ollama::pool(&files, &mut draft);
    }
    if draft.models.is_empty() {
        return Err(ImportError::Empty { file: first });
    }
    let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    Ok(draft.finish(tool, &names.join(" and ")))
}

fn recognise(root: &Node) -> Option<Tool> {
    let has = |key: &str| root.get(key).is_some();
    let models = root.get("models");
    if has("swapper") {
        return Some(Tool::Swapper);
    }
    if has("default_ttl_minutes") || has("warmup_models") || has("port_range") {
        return Some(Tool::Pool);
    }
    if let Some(Node { kind: Kind::List(items), .. }) = models {
        return items.iter().any(|item| item.get("model_id").is_some()).then_some(Tool::Pool);
    }
    let any = |wanted: &dyn Fn(&Node) -> bool| {
        models.is_some_and(|models| models.entries().iter().any(|(_, model)| wanted(model)))
    };
    if any(&|model| model.get("cmd").is_some_and(|cmd| cmd.text().is_some())) {
        return Some(Tool::LlamaSwap);
    }
    let is_ollama = |model: &Node| {
        model.get("path").and_then(Node::text).is_some_and(|path| path.starts_with("ollama:"))
    };
    if any(&is_ollama) {
        return Some(Tool::Swapper);
    }
    has("services").then_some(Tool::Compose)
}

/// The result while it is made.
#[derive(Default)]
struct Draft {
    /// What stands above `models:`.
    top: Vec<Entry>,
    models: Vec<Model>,
    /// What stands below.
    bottom: Vec<Entry>,
    notes: Vec<Note>,
}

struct Model {
    name: String,
    /// Said above the model.
    comments: Vec<String>,
    entries: Vec<Entry>,
}

impl Model {
    fn set(&mut self, key: &str, value: Out) {
        self.entries.push(Entry::new(key, value));
    }

    fn comment(&mut self, text: impl Into<String>) {
        self.comments.push(text.into());
    }
}

impl Draft {
    fn note(&mut self, file: &File, place: Place, name: &str, why: &str, what_to_do: &str) {
        self.notes.push(Note {
            at: format!("{}:{}", file.name, place.line),
            name: name.to_owned(),
            why: why.to_owned(),
            what_to_do: what_to_do.to_owned(),
        });
    }

    fn finish(self, tool: Tool, files: &str) -> Imported {
        let mut entries = self.top;
        let models = self.models.into_iter().map(|model| Entry {
            key: model.name,
            value: Out::Map(model.entries),
            comments: model.comments,
        });
        entries.push(Entry::new("models", Out::Map(models.collect())));
        entries.extend(self.bottom);
        let mut head = vec![
            "yaml-language-server: $schema=docs/wharf.schema.json".to_owned(),
            String::new(),
            format!("Made by `wharf import` from {files} ({}).", tool.name()),
        ];
        if matches!(tool, Tool::LlamaSwap | Tool::Compose) {
            let line = "What a model takes of its GPUs is measured once, alone; say `vram: 22GiB` if \
                        you know.";
            head.push(line.to_owned());
        }
        Imported { tool: tool.name(), yaml: yaml::render(&head, &entries), notes: self.notes }
    }
}

/// A mapping whose keys are taken one after the other; what is left has no equivalent.
struct Keys<'n> {
    entries: &'n [(Key, Node)],
    path: String,
    taken: Vec<&'static str>,
}

impl<'n> Keys<'n> {
    fn of(node: &'n Node, path: &str) -> Keys<'n> {
        Keys { entries: node.entries(), path: path.to_owned(), taken: Vec::new() }
    }

    /// Key and value; a value that is null counts as missing.
    fn take(&mut self, name: &'static str) -> Option<(Place, &'n Node)> {
        self.taken.push(name);
        let (key, node) = self.entries.iter().find(|(key, _)| key.text == name)?;
        (!matches!(node.kind, Kind::Null)).then_some((key.place, node))
    }

    fn text(&mut self, name: &'static str) -> Option<(Place, &'n str)> {
        let (place, node) = self.take(name)?;
        Some((place, node.text()?))
    }

    fn number(&mut self, name: &'static str) -> Option<(Place, f64)> {
        let (place, text) = self.text(name)?;
        Some((place, text.parse().ok()?))
    }

    fn flag(&mut self, name: &'static str) -> Option<bool> {
        self.text(name).map(|(_, text)| text.eq_ignore_ascii_case("true"))
    }

    fn path_of(&self, key: &str) -> String {
        tree::join(&self.path, key)
    }

    /// Tells of `name`, if it is there, that it cannot be carried over.
    fn leave(
        &mut self,
        name: &'static str,
        why: &str,
        what_to_do: &str,
        file: &File,
        draft: &mut Draft,
    ) {
        if let Some((place, _)) = self.take(name) {
            draft.note(file, place, &self.path_of(name), why, what_to_do);
        }
    }

    /// Tells of every key that was not taken.
    fn rest(self, file: &File, draft: &mut Draft) {
        for (key, _) in self.entries.iter().filter(|(k, _)| !self.taken.contains(&&*k.text)) {
            let name = self.path_of(&key.text);
            draft.note(file, key.place, &name, "no equivalent is known", "see `wharf schema`");
        }
    }
}

fn items(node: &Node) -> &[Node] {
    match &node.kind {
        Kind::List(items) => items,
        Kind::Null | Kind::Scalar(_) | Kind::Map(_) => &[],
    }
}

fn texts(node: &Node) -> Vec<String> {
    items(node).iter().filter_map(Node::text).map(str::to_owned).collect()
}

/// Seconds as a duration: whole minutes as such.
fn seconds(count: f64) -> Out {
    let count = count.max(0.0);
    if count > 0.0 && count % 60.0 == 0.0 {
        return Out::plain(format!("{}m", count / 60.0));
    }
    Out::plain(format!("{count}s"))
}

/// A value of the user's own, as it is.
fn same(node: &Node, expand: &dyn Fn(&str) -> String) -> Out {
    match &node.kind {
        Kind::Null => Out::plain("null"),
        Kind::Scalar(scalar) => {
            let text = expand(&scalar.text);
            let is_macro = scalar.text.starts_with("${") && scalar.text.ends_with('}');
            if scalar.quoted && !is_macro { Out::quoted(text) } else { Out::as_written(text) }
        }
        Kind::List(items) => Out::List(items.iter().map(|item| same(item, expand)).collect()),
        Kind::Map(entries) => Out::Map(
            entries.iter().map(|(key, node)| Entry::new(&key.text, same(node, expand))).collect(),
        ),
    }
}
