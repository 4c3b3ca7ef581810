//! `wharf schema`: the table of keys as JSON Schema (2020-12) for editors, and as a page of docs.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// One key, as keys.yaml has it.
struct Key {
    path: String,
    shape: String,
    default: String,
    example: String,
    says: String,
}

/// The keys of the file, and those of one model.
struct Keys {
    global: Vec<Key>,
    model: Vec<Key>,
}

impl Keys {
    fn read() -> Keys {
        // It is a part of this program, and a test reads it.
        let table: Value = serde_yaml::from_str(include_str!("keys.yaml")).unwrap_or_default();
        let keys = |part: &str| {
            let rows = table[part].as_object().into_iter().flatten();
            rows.map(|(path, row)| {
                let cell = |at: usize| row[at].as_str().unwrap_or_default().to_owned();
                let (shape, default, example, says) = (cell(0), cell(1), cell(2), cell(3));
                Key { path: path.clone(), shape, default, example, says }
            })
            .collect()
        };
        Keys { global: keys("global"), model: keys("model") }
    }
}

/// The JSON Schema of models.yaml, with a line feed at its end.
pub fn json_schema() -> String {
    let keys = Keys::read();
    let mut schema = Tree::of(&keys.global).schema();
    let head = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://wharf.invalid/models.schema.json",
        "title": "models.yaml of Wharf",
        "description": "Made by `wharf schema`. `wharf check` says more: it also checks what must \
                        hold between keys.",
    });
    let mut whole = head.as_object().cloned().unwrap_or_default();
    if let Some(schema) = schema.as_object_mut() {
        whole.append(schema);
    }
    whole.insert("required".to_owned(), json!(["models"]));
    let mut model = Tree::of(&keys.model).schema();
    model["description"] = json!("A model, a template, or what all models have in common.");
    whole.insert(
        "$defs".to_owned(),
        json!({
            "model": model,
            "macro": { "type": "string", "pattern": "\\$\\{" },
            "size": {
                "description": "Binary units as in Docker (K, M, G, T, or KiB …), decimal as KB …",
                "type": ["string", "integer"],
                "pattern": "^\\s*[0-9.]+\\s*([KMGTkmgt]?[Ii]?[Bb]?)\\s*$|[x×*]|\\$\\{",
                "maximum": 0,
            },
            "duration": {
                "description": "With a unit: ms, s, m, h, d; several may follow each other.",
                "type": ["string", "integer"],
                "pattern": "^[0-9.]+\\s*[a-z]+|^0$|\\$\\{",
                "maximum": 0,
            },
            "scalar": { "type": ["string", "number", "boolean"] },
        }),
    );
    // Plain data with string keys: serialising it cannot fail.
    serde_json::to_string_pretty(&whole).unwrap_or_default() + "\n"
}

/// docs/configuration.md.
pub fn markdown() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         <!-- Made by `wharf schema --format markdown`; do not edit. -->\n\n\
         One file, `models.yaml`; another by `--config`, `WHARF_CONFIG` or `SWAPPER_CONFIG_PATH`. \
         `wharf check` tells every mistake at once, with its line and the nearest valid name. \
         Unknown keys are refused.\n\n\
         `${name}` is a macro, `${env.NAME}` a variable of Wharf's environment, `${model}` the \
         model's name, `$${` a literal `${`. Sizes are binary (`22GiB`, `512M`) unless written \
         `GB`; durations have a unit (`30s`, `5m`, `1h 30m`).\n\n\
         Of the environment, these outrank the file: `SWAPPER_MODE` (`swap.mode`), \
         `MAX_CONCURRENT_MODELS`, `MODEL_SWAP_TIMEOUT` (`swap.start_timeout`); `OLLAMA_BASE_URL` \
         is the address of models that name none.\n\n\
         For completion and checks in editors, the first line of `models.yaml` names the schema:\n\n\
         ```yaml\n# yaml-language-server: $schema=docs/wharf.schema.json\n```\n\n\
         `wharf schema > wharf.schema.json` makes that file.\n\n## The file\n",
    );
    let keys = Keys::read();
    rows(&keys.global, &mut page);
    page.push_str(
        "\n## One model\n\nThe keys of an entry of `models:` or `templates:`, and of \
                   `defaults:`.\n",
    );
    rows(&keys.model, &mut page);
    page
}

fn rows(keys: &[Key], page: &mut String) {
    page.push_str("\n| key | value | default | meaning |\n|---|---|---|---|\n");
    for key in keys {
        let path = key.path.replace(".[]", "[]");
        let cell = |text: &str| text.replace('|', "\\|");
        let code = |text: &str| {
            if text.is_empty() { String::new() } else { format!("`{}`", cell(text)) }
        };
        let example = match key.example.as_str() {
            "" => String::new(),
            example => format!(" For example `{}`.", cell(example)),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            page,
            "| `{path}` | {} | {} | {}{example} |",
            cell(&in_words(key, keys)),
            code(&key.default),
            cell(&key.says),
        );
    }
}

/// `size / list size` → "size, or list of size".
fn in_words(key: &Key, keys: &[Key]) -> String {
    let word = |shape: &str| -> String {
        let (list, shape) = match shape.strip_prefix("list ") {
            Some(shape) => ("list of ", shape),
            None => ("", shape),
        };
        let word = match shape.split_once(' ') {
            Some(("one", choices)) => {
                let choices: Vec<String> =
                    choices.split('|').map(|choice| format!("`{choice}`")).collect();
                choices.join(", ")
            }
            Some(("int", range)) => format!("number {}", range.replace("..", " to ")),
            Some(("map", _)) => "mapping".to_owned(),
            _ => match shape {
                "bool" => "`true`, `false`".to_owned(),
                "words" => "command line, or list".to_owned(),
                "pairs" => "mapping, or list of NAME=value".to_owned(),
                "model" => "a model's keys".to_owned(),
                "any" => "value".to_owned(),
                "scalar" => "text".to_owned(),
                other => other.to_owned(),
            },
        };
        format!("{list}{word}")
    };
    let below = format!("{}.", key.path);
    let mut words: Vec<String> =
        key.shape.split(" / ").filter(|s| !s.is_empty()).map(word).collect();
    if keys.iter().any(|other| other.path.starts_with(&below)) {
        let list = keys.iter().any(|other| other.path.starts_with(&format!("{below}[]")));
        words.push(if list { "list" } else { "mapping" }.to_owned());
    }
    words.join(", or ")
}

/// The keys by their paths.
#[derive(Default)]
struct Tree<'k> {
    key: Option<&'k Key>,
    below: Vec<(&'k str, Tree<'k>)>,
}

impl<'k> Tree<'k> {
    fn of(keys: &'k [Key]) -> Tree<'k> {
        let mut root = Tree::default();
        for key in keys {
            let mut at = &mut root;
            for part in key.path.split('.') {
                let index = match at.below.iter().position(|(name, _)| *name == part) {
                    Some(index) => index,
                    None => {
                        at.below.push((part, Tree::default()));
                        at.below.len() - 1
                    }
                };
                at = &mut at.below[index].1;
            }
            at.key = Some(key);
        }
        root
    }

    fn schema(&self) -> Value {
        let mut ways: Vec<Value> = Vec::new();
        if let Some(key) = self.key {
            ways.extend(key.shape.split(" / ").filter(|s| !s.is_empty()).map(shape));
        }
        match self.below.as_slice() {
            [] => {}
            [("*", one)] => {
                ways.push(json!({ "type": "object", "additionalProperties": one.schema() }));
            }
            [("[]", one)] => ways.push(json!({ "type": "array", "items": one.schema() })),
            below => {
                let properties: Map<String, Value> =
                    below.iter().map(|(name, tree)| ((*name).to_owned(), tree.schema())).collect();
                ways.push(json!({
                    "type": "object",
                    "properties": properties,
                    "additionalProperties": false,
                }));
            }
        }
        let mut schema = Map::new();
        if let Some(key) = self.key {
            schema.insert("description".to_owned(), json!(key.says));
            if let Some(default) = yaml(&key.default) {
                schema.insert("default".to_owned(), default);
            }
            if let Some(example) = yaml(&key.example) {
                schema.insert("examples".to_owned(), json!([example]));
            }
        }
        match (ways.len(), ways.pop()) {
            (1, Some(Value::Object(mut one))) => schema.append(&mut one),
            (_, Some(last)) => {
                ways.push(last);
                schema.insert("anyOf".to_owned(), json!(ways));
            }
            (_, None) => {}
        }
        Value::Object(schema)
    }
}

fn yaml(text: &str) -> Option<Value> {
    if text.is_empty() { None } else { serde_yaml::from_str(text).ok() }
}

/// One way to write a value: `text`, `bool`, `number`, `int 1..9`, `size`, `duration`, `address`,
/// `ports`, `words` (a command line or a list), `pairs` (a mapping or NAME=value), `any`, `model`,
/// `one a|b`, `list SHAPE`, `map SHAPE`. Where no text fits, a macro does.
fn shape(text: &str) -> Value {
    let or_macro = |value: Value| json!({ "anyOf": [value, { "$ref": "#/$defs/macro" }] });
    match text.split_once(' ') {
        Some(("list", of)) => json!({ "type": "array", "items": shape(of) }),
        Some(("map", of)) => json!({ "type": "object", "additionalProperties": shape(of) }),
        Some(("int", range)) => {
            let (min, max) = range.split_once("..").unwrap_or((range, range));
            let number = |text: &str| text.parse::<u64>().unwrap_or_default();
            or_macro(json!({ "type": "integer", "minimum": number(min), "maximum": number(max) }))
        }
        Some(("one", choices)) => {
            let number = |choice: &str| choice.parse::<u64>().ok().map(Value::from);
            let texts = choices.split('|').map(Value::from);
            let choices: Vec<Value> = texts.chain(choices.split('|').filter_map(number)).collect();
            or_macro(json!({ "enum": choices }))
        }
        _ => match text {
            "bool" => or_macro(json!({ "type": "boolean" })),
            "number" => or_macro(json!({ "type": "number", "minimum": 0 })),
            "size" | "duration" | "model" | "scalar" => {
                json!({ "$ref": format!("#/$defs/{text}") })
            }
            "ports" => json!({
                "type": ["string", "integer"],
                "pattern": "^[0-9]+(\\s*-\\s*[0-9]+)?$|\\$\\{",
                "minimum": 1,
                "maximum": 65_535,
            }),
            "address" => json!({ "type": "string", "pattern": ":[0-9]+$|\\$\\{" }),
            "words" => json!({
                "type": ["string", "array"],
                "items": { "$ref": "#/$defs/scalar" },
            }),
            "pairs" => json!({
                "type": ["object", "array"],
                "additionalProperties": { "$ref": "#/$defs/scalar" },
                "items": { "type": "string" },
            }),
            "any" => json!({}),
            _ => json!({ "type": "string" }),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::config::decode::Sink;
    use crate::config::{read, tree};

    const EVERYTHING: &str = include_str!("../../tests/config/everything.yaml");

    /// Table → keys, names of the user's replaced by `*`, and entries of models by `model`.
    type Tables = BTreeMap<String, BTreeSet<String>>;

    /// What the readers looked for in a file that has every table.
    fn looked_for() -> Tables {
        let (root, _) = tree::parse(EVERYTHING);
        let mut sink = Sink::default();
        let names: Vec<(String, String)> = ["models", "templates", "groups", "peers", "routes"]
            .into_iter()
            .flat_map(|section| {
                let entries = root.get(section).map(tree::Node::entries).unwrap_or_default();
                let own = match section {
                    "models" | "templates" => "model".to_owned(),
                    section => format!("{section}.*"),
                };
                entries.iter().map(move |(k, _)| (format!("{section}.{}", k.text), own.clone()))
            })
            .chain([("defaults".to_owned(), "model".to_owned())])
            .collect();
        assert!(read(root, &|_| Some("set-in-the-environment".to_owned()), &mut sink).is_some());
        let mut tables = Tables::new();
        for (path, taken) in sink.looked_for {
            let is_in = |name: &str| {
                path.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            let path = match names.iter().find(|(name, _)| is_in(name)) {
                Some((name, own)) => format!("{own}{}", &path[name.len()..]),
                None => path,
            };
            let mut plain = String::new();
            for part in path.split('[') {
                match part.split_once(']') {
                    Some((_, rest)) => plain.push_str(&format!(".[]{rest}")),
                    None => plain.push_str(part),
                }
            }
            tables.entry(plain).or_default().extend(taken.into_iter().map(str::to_owned));
        }
        tables
    }

    fn in_the_table() -> Tables {
        let mut tables = Tables::new();
        let keys = Keys::read();
        let rows = keys.global.iter().map(|key| key.path.clone());
        for path in rows.chain(keys.model.iter().map(|key| format!("model.{}", key.path))) {
            let (table, key) = path.rsplit_once('.').unwrap_or(("", &path));
            if key != "*" && key != "[]" {
                tables.entry(table.to_owned()).or_default().insert(key.to_owned());
            }
        }
        tables
    }

    #[test]
    fn the_schema_has_every_key_that_is_read_and_no_other() {
        let (mut read, table) = (looked_for(), in_the_table());
        // Limits of a container are named by the user, with `soft` and `hard` below.
        read.retain(|path, _| !path.starts_with("model.docker.ulimits."));
        assert_eq!(read.keys().collect::<Vec<_>>(), table.keys().collect::<Vec<_>>());
        for (path, keys) in &table {
            assert_eq!(&read[path], keys, "{path}");
        }
    }

    #[test]
    fn every_key_says_what_it_means_and_its_yaml_can_be_read() {
        let keys = Keys::read();
        assert!(keys.global.len() > 90 && keys.model.len() > 70, "the table is read");
        for key in keys.global.iter().chain(&keys.model) {
            assert!(
                key.says.ends_with('.') || key.says.ends_with(')'),
                "{}: {}",
                key.path,
                key.says
            );
            for text in [&key.default, &key.example].into_iter().filter(|text| !text.is_empty()) {
                assert!(yaml(text).is_some(), "{}: {text}", key.path);
            }
        }
    }
}
