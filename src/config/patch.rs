//! What of the configuration callers may patch: policy, and nothing that could be run, reached or
//! read. The pool manager's names are synonyms.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::catalog::Catalog;
use super::problem::nearest;

/// Keys of the whole, by path.
pub const GLOBAL: [&str; 18] = [
    "swap.mode",
    "swap.max_concurrent_models",
    "swap.max_wait",
    "swap.min_residency",
    "swap.drain_timeout",
    "swap.vram_timeout",
    "swap.start_timeout",
    "swap.shutdown_timeout",
    "swap.on_exit",
    "queue.limit",
    "queue.per_model",
    "queue.timeout",
    "queue.body_limit",
    "queue.total_bodies",
    "defaults.ttl",
    "defaults.ttl_bounds.min",
    "defaults.ttl_bounds.max",
    "defaults.grace",
];

/// Keys of one model, below `models.NAME.`
pub const OF_A_MODEL: [&str; 12] = [
    "ttl",
    "ttl_bounds.min",
    "ttl_bounds.max",
    "grace",
    "keep",
    "priority",
    "pinned",
    "warmup",
    "concurrency",
    "unlisted",
    "start_timeout",
    "waiting",
];

/// The pool manager's names that can be changed, and what they stand for.
pub const SYNONYMS: [(&str, &str); 7] = [
    ("default_ttl_minutes", "defaults.ttl"),
    ("min_ttl_minutes", "defaults.ttl_bounds.min"),
    ("max_ttl_minutes", "defaults.ttl_bounds.max"),
    ("max_concurrent_models", "swap.max_concurrent_models"),
    ("graceful_shutdown_seconds", "swap.shutdown_timeout"),
    ("auto_unload", "defaults.ttl"),
    ("warmup_models", "models.NAME.warmup"),
];

/// The pool manager's names that cannot be changed while Wharf runs, and why.
const FIXED: [(&str, &str); 3] = [
    (
        "memory_limit_mb",
        "how much memory there is, is read; `gpu.reserve` in models.yaml keeps some free",
    ),
    ("port_range", "addresses are for models.yaml: `ports`"),
    ("ollama_base_url", "addresses are for models.yaml: `external.url`"),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target<'p> {
    Global(&'p str),
    Model { name: &'p str, key: &'static str },
}

/// What a path means; `None`: it cannot be patched. Names of models may hold dots, keys of this
/// list cannot be mistaken for a part of one.
pub(super) fn target(path: &str) -> Option<Target<'_>> {
    if GLOBAL.contains(&path) {
        return Some(Target::Global(path));
    }
    let rest = path.strip_prefix("models.")?;
    OF_A_MODEL.iter().find_map(|key| {
        let name = rest.strip_suffix(key)?.strip_suffix('.')?;
        (!name.is_empty()).then_some(Target::Model { name, key })
    })
}

/// Every path that can be patched; `NAME` stands for any model.
pub fn patchable() -> Vec<String> {
    let models = OF_A_MODEL.iter().map(|key| format!("models.NAME.{key}"));
    GLOBAL.iter().map(|key| (*key).to_owned()).chain(models).collect()
}

/// What to say to who wanted to patch something else.
pub(super) fn listed(wanted: &str) -> String {
    let near =
        nearest(wanted, GLOBAL).map_or(String::new(), |near| format!("did you mean `{near}`? "));
    format!("{near}these can be patched: {}", patchable().join(", "))
}

/// A request's body as paths and values, `null` where a patch shall go.
#[derive(Debug, Default, PartialEq)]
pub struct Wanted {
    pub patches: BTreeMap<String, Value>,
    /// What is accepted and changes nothing.
    pub notes: Vec<String>,
}

/// Reads a body: nested (`{"swap": {"max_wait": "60s"}}`), by path (`{"swap.max_wait": "60s"}`) or
/// in the pool manager's words.
///
/// # Errors
/// Everything that cannot be patched.
pub fn read(body: &Map<String, Value>, catalog: &Catalog) -> Result<Wanted, Vec<String>> {
    let mut wanted = Wanted::default();
    let mut errors = Vec::new();
    for (key, value) in body {
        let read = match (key.as_str(), value) {
            ("models", Value::Object(models)) => models.iter().try_for_each(|(name, keys)| {
                let Value::Object(keys) = keys else {
                    return Err(format!("`models.{name}` must be an object of its keys"));
                };
                keys.iter().try_for_each(|(key, value)| of_a_model(name, key, value, &mut wanted))
            }),
            ("swap" | "queue" | "defaults", Value::Object(keys)) => keys
                .iter()
                .try_for_each(|(inner, value)| put(&format!("{key}.{inner}"), value, &mut wanted)),
            _ => match pool(key, value, catalog, &mut wanted) {
                Some(read) => read,
                None => put(key, value, &mut wanted),
            },
        };
        errors.extend(read.err());
    }
    if errors.is_empty() { Ok(wanted) } else { Err(errors) }
}

fn of_a_model(name: &str, key: &str, value: &Value, wanted: &mut Wanted) -> Result<(), String> {
    if key == "ttl_minutes" {
        let ttl = minutes(&format!("models.{name}.ttl_minutes"), value)?;
        return put(&format!("models.{name}.ttl"), &ttl, wanted);
    }
    put(&format!("models.{name}.{key}"), value, wanted)
}

fn put(path: &str, value: &Value, wanted: &mut Wanted) -> Result<(), String> {
    // A mapping of bounds is two keys.
    if path.ends_with("ttl_bounds") {
        let bounds = |side: &str| match value {
            Value::Null => Some(Value::Null),
            _ => value.get(side).cloned(),
        };
        for side in ["min", "max"] {
            if let Some(bound) = bounds(side) {
                put(&format!("{path}.{side}"), &bound, wanted)?;
            }
        }
        return Ok(());
    }
    if target(path).is_none() {
        return Err(format!("`{path}` cannot be patched; {}", listed(path)));
    }
    wanted.patches.insert(path.to_owned(), value.clone());
    Ok(())
}

/// The pool manager's words; `None`: it is none of them.
fn pool(
    key: &str,
    value: &Value,
    catalog: &Catalog,
    wanted: &mut Wanted,
) -> Option<Result<(), String>> {
    if let Some((_, why)) = FIXED.iter().find(|(name, _)| *name == key) {
        return Some(Err(format!("`{key}` cannot be patched: {why}")));
    }
    if key == "check_interval_seconds" {
        wanted.notes.push(
            "check_interval_seconds: models leave when their time is up, not at the next check"
                .to_owned(),
        );
        return Some(Ok(()));
    }
    let (_, path) = SYNONYMS.iter().find(|(name, _)| *name == key)?;
    Some(match key {
        "default_ttl_minutes" | "min_ttl_minutes" | "max_ttl_minutes" => {
            minutes(key, value).and_then(|ttl| put(path, &ttl, wanted))
        }
        "graceful_shutdown_seconds" => {
            seconds(key, value).and_then(|time| put(path, &time, wanted))
        }
        "auto_unload" => match value {
            Value::Bool(false) => put(path, &json!("never"), wanted),
            Value::Bool(true) | Value::Null => {
                // A time that the same body gives counts.
                wanted.patches.entry((*path).to_owned()).or_insert(Value::Null);
                Ok(())
            }
            _ => Err("`auto_unload` must be true or false".to_owned()),
        },
        "warmup_models" => warmups(value, catalog, wanted),
        _ => put(path, value, wanted),
    })
}

fn warmups(value: &Value, catalog: &Catalog, wanted: &mut Wanted) -> Result<(), String> {
    let names: Option<Vec<&str>> = match value {
        Value::Null => None,
        Value::Array(items) => items.iter().map(Value::as_str).collect(),
        _ => return Err("`warmup_models` must be a list of names".to_owned()),
    };
    let mut chosen = Vec::new();
    for name in names.iter().flatten() {
        match catalog.resolve(name) {
            Some(spec) => chosen.push(&spec.name),
            None => return Err(format!("`warmup_models`: no model is called `{name}`")),
        }
    }
    for spec in catalog.models.values() {
        let warmup = chosen.contains(&&spec.name);
        let value = match names {
            None => Value::Null,
            Some(_) if warmup == spec.warmup => continue,
            Some(_) => json!(warmup),
        };
        put(&format!("models.{}.warmup", spec.name), &value, wanted)?;
    }
    Ok(())
}

fn minutes(key: &str, value: &Value) -> Result<Value, String> {
    match (value, value.as_f64()) {
        (Value::Null, _) => Ok(Value::Null),
        (_, Some(minutes)) => match super::overlay::minutes(minutes) {
            Ok(text) => Ok(json!(text)),
            Err(_) => Err(format!("`{key}`: {minutes} is no number of minutes")),
        },
        _ => Err(format!("`{key}` must be a number of minutes")),
    }
}

fn seconds(key: &str, value: &Value) -> Result<Value, String> {
    match (value, value.as_f64()) {
        (Value::Null, _) => Ok(Value::Null),
        (_, Some(seconds)) if (0.0..1e9).contains(&seconds) => {
            Ok(json!(format!("{}ms", (seconds * 1000.0).round() as u64)))
        }
        _ => Err(format!("`{key}` must be a number of seconds")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(body: &str) -> Result<Wanted, Vec<String>> {
        let yaml = "models:\n  a: { engine: openai, external: { url: 'http://h:1' } }\n  b.c: { engine: openai, external: { url: 'http://h:2' }, warmup: true }\n";
        let catalog = crate::config::parse(yaml, "models.yaml", &|_| None).unwrap().catalog;
        read(serde_json::from_str::<Value>(body).unwrap().as_object().unwrap(), &catalog)
    }

    fn paths(body: &str) -> Vec<(String, Value)> {
        read_text(body).unwrap().patches.into_iter().collect()
    }

    #[test]
    fn nested_dotted_and_the_pool_managers_words_mean_the_same() {
        let one = |path: &str, value: Value| vec![(path.to_owned(), value)];
        assert_eq!(paths(r#"{"swap":{"max_wait":"60s"}}"#), one("swap.max_wait", json!("60s")));
        assert_eq!(paths(r#"{"swap.max_wait":null}"#), one("swap.max_wait", Value::Null));
        assert_eq!(paths(r#"{"default_ttl_minutes":15}"#), one("defaults.ttl", json!("900000ms")));
        assert_eq!(paths(r#"{"auto_unload":false}"#), one("defaults.ttl", json!("never")));
        assert_eq!(paths(r#"{"models":{"b.c":{"ttl":"5m"}}}"#), one("models.b.c.ttl", json!("5m")));
        assert_eq!(paths(r#"{"models.b.c.ttl":"5m"}"#), one("models.b.c.ttl", json!("5m")));
        assert_eq!(
            paths(r#"{"warmup_models":["a"]}"#),
            vec![
                ("models.a.warmup".to_owned(), json!(true)),
                ("models.b.c.warmup".to_owned(), json!(false))
            ]
        );
        assert_eq!(
            paths(r#"{"defaults":{"ttl_bounds":{"min":"5m"}}}"#),
            one("defaults.ttl_bounds.min", json!("5m"))
        );
        assert_eq!(read_text(r#"{"check_interval_seconds":5}"#).unwrap().notes.len(), 1);
    }

    #[test]
    fn whatever_could_be_run_reached_or_read_is_refused_with_the_list() {
        for body in [
            r#"{"models":{"a":{"docker":{"image":"evil"}}}}"#,
            r#"{"models":{"a":{"process":{"cmd":"evil"}}}}"#,
            r#"{"models":{"a":{"env":{"A":"b"}}}}"#,
            r#"{"models.a.external.url":"http://evil"}"#,
            r#"{"models":{"a":{"filters":{"set":{}}}}}"#,
            r#"{"listen":{"orchestrator":"0.0.0.0:1"}}"#,
            r#"{"listen.gateway":"0.0.0.0:1"}"#,
            r#"{"auth":{"keys":[]}}"#,
            r#"{"cors":["*"]}"#,
            r#"{"hosts":["*"]}"#,
            r#"{"store":"/etc/passwd"}"#,
            r#"{"announce":["http://evil"]}"#,
            r#"{"registration":{"templates":["x"]}}"#,
            r#"{"templates":{}}"#,
            r#"{"defaults":{"env":{"A":"b"}}}"#,
            r#"{"swap":{"policy":"x"}}"#,
            r#"{"engine_ports":"1-2"}"#,
            r#"{"models":null}"#,
            r#"{"ttl":"5m"}"#,
        ] {
            let errors = read_text(body).expect_err(body);
            let listed =
                errors[0].contains("cannot be patched") && errors[0].contains("swap.max_wait");
            assert!(listed, "{body}: {errors:?}");
        }
        for body in
            [r#"{"ollama_base_url":"x"}"#, r#"{"port_range":{}}"#, r#"{"memory_limit_mb":1}"#]
        {
            assert!(read_text(body).unwrap_err()[0].contains("models.yaml"), "{body}");
        }
    }
}
