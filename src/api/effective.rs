//! The configuration in force as `GET /config` shows it: written as in models.yaml, secrets masked,
//! the pool manager's keys beside it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::render::{Snapshot, object};
use crate::config::catalog::{Catalog, ModelSpec, RuntimeSpec, Settings};
use crate::config::{is_secret_name, patch, values};
use crate::reload::InForce;
use crate::runtime::redact::Secrets;
use crate::units::Bytes;

const MASK: &str = "***";

pub fn effective(at: &Snapshot<'_>) -> Value {
    let in_force = at.handle.reloads().map(|reloads| reloads.in_force()).unwrap_or_default();
    let catalog = &at.catalog;
    let mut shown = object(pool(at, &in_force));
    shown.extend(settings(&catalog.settings));
    let models = catalog.models.values().map(|spec| (spec.name.to_string(), model(spec)));
    let doors = at.handle.front_doors();
    let rest = json!({
        "file": in_force.file.display().to_string(),
        "defaults": in_force.defaults,
        "models": models.collect::<Map<_, _>>(),
        "groups": catalog.groups,
        "registration": { "templates": catalog.registrable },
        "front_doors": doors.iter().map(|(name, at)| (name.to_string(), json!(at.port())))
            .collect::<Map<_, _>>(),
        "registered": in_force.overlay.registered,
        "patches": in_force.overlay.patches,
        "left_out": in_force.left_out,
        "overrides": overrides(&in_force, catalog),
        "origins": origins(&in_force),
        "patchable": patch::patchable(),
        "synonyms": patch::SYNONYMS.iter().map(|(pool, ours)| ((*pool).to_owned(), json!(ours)))
            .collect::<Map<_, _>>(),
    });
    shown.extend(object(rest));
    Value::Object(shown)
}

/// What was patched and has no effect, because something outranks it.
pub fn overruled(at: &Snapshot<'_>, patched: &[String]) -> Vec<String> {
    let Some(reloads) = at.handle.reloads() else { return Vec::new() };
    let in_force = reloads.in_force();
    let overruled =
        in_force.overrides.iter().filter(|row| patched.iter().any(|path| path == row.key));
    overruled
        .map(|row| {
            let (variable, value) = (row.variable, &row.value);
            format!("{}: the environment variable {variable}={value} outranks the patch", row.key)
        })
        .collect()
}

/// The keys of the pool manager's configuration.
fn pool(at: &Snapshot<'_>, in_force: &InForce) -> Value {
    let (catalog, settings) = (&at.catalog, &at.catalog.settings);
    let minutes = |key: &str| {
        let text = in_force.defaults.get(key)?;
        let time = values::duration(text).ok().filter(|time| !time.is_zero())?;
        Some(number(time.as_secs_f64() / 60.0))
    };
    let warmups = catalog.models.values().filter(|spec| spec.warmup).map(|spec| &spec.name);
    let (start, end) = settings.front_doors.unwrap_or(settings.engine_ports);
    let memory: Bytes = at
        .view
        .scheduler
        .gpus
        .iter()
        .map(|gpu| gpu.total.saturating_sub(settings.gpu.reserve))
        .sum();
    json!({
        // 0: never, as in its registry.
        "default_ttl_minutes": minutes("ttl").unwrap_or(json!(0)),
        "min_ttl_minutes": minutes("ttl_bounds.min"),
        "max_ttl_minutes": minutes("ttl_bounds.max"),
        "check_interval_seconds": number(settings.check_interval.as_secs_f64()),
        "warmup_models": warmups.collect::<Vec<_>>(),
        "port_range": { "start": start, "end": end },
        "max_concurrent_models": settings.swap.max_concurrent_models,
        "memory_limit_mb": memory.as_mib(),
        "auto_unload": catalog.models.values().any(|spec| spec.ttl.is_some()),
        "graceful_shutdown_seconds": number(settings.swap.shutdown_timeout.as_secs_f64()),
        "ollama_base_url": ollama(catalog),
    })
}

/// Whole numbers without a point.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 { json!(value as u64) } else { json!(value) }
}

fn ollama(catalog: &Catalog) -> Option<String> {
    let given = std::env::var("OLLAMA_BASE_URL").ok().filter(|url| !url.is_empty());
    let of_a_model = || {
        catalog.models.values().find_map(|spec| match &spec.runtime {
            RuntimeSpec::Ollama(ollama) => Some(ollama.at.url.clone()),
            _ => None,
        })
    };
    given.or_else(of_a_model).map(|url| without_user(&url))
}

/// As they are written in models.yaml.
fn settings(settings: &Settings) -> Map<String, Value> {
    let mut tree = object(readable(json!(settings)));
    let mut take = |key: &str| tree.remove(key).unwrap_or_default();
    take("connections");
    let tls = take("tls");
    let listen = json!({
        "gateway": take("gateway"),
        "orchestrator": take("orchestrator"),
        "connections": settings
            .connections
            .map_or_else(crate::gateway::usual_places, |max| max as usize),
        "tls": tls,
    });
    let docker = json!({ "host": take("docker_host") });
    take("front_doors");
    let watch = take("watch");
    let range = |(first, last): (u16, u16)| format!("{first}-{last}");
    let keys = settings.auth.keys.iter().map(|key| {
        let mut key = object(readable(json!(key)));
        key.insert("key".to_owned(), json!(MASK));
        Value::Object(key)
    });
    let keys: Vec<Value> = keys.collect();
    if let Some(auth) = tree.get_mut("auth") {
        auth["keys"] = json!(keys);
    }
    tree.extend(object(json!({
        "listen": listen,
        "docker": docker,
        "engine_ports": range(settings.engine_ports),
        "ports": settings.front_doors.map(range),
        "reload": { "watch": watch },
    })));
    let swap = &mut tree["swap"];
    if swap["max_wait"].is_null() {
        swap["max_wait"] = json!("auto");
    }
    for (section, key, size) in [
        ("queue", "body_limit", settings.queue.body_limit),
        ("queue", "total_bodies", settings.queue.total_bodies),
        ("gpu", "reserve", settings.gpu.reserve),
        ("ram", "reserve", settings.ram.reserve),
    ] {
        tree[section][key] = json!(exact(size));
    }
    mask(&mut Value::Object(tree)).as_object().cloned().unwrap_or_default()
}

/// A model with its engine's command, but without what may be secret.
fn model(spec: &ModelSpec) -> Value {
    let mut shown = readable(json!(spec));
    let env = match &spec.runtime {
        RuntimeSpec::Docker(docker) => Some((&docker.env, "docker", "args", &docker.args)),
        RuntimeSpec::Process(process) => Some((&process.env, "process", "argv", &process.argv)),
        RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => None,
    };
    if let Some((env, kind, key, words)) = env {
        let part = &mut shown["runtime"][kind];
        part["env"] = env.keys().map(|name| (name.clone(), json!(MASK))).collect();
        part[key] = json!(masked_words(words, env));
    }
    mask(&mut shown).clone()
}

/// Values of options whose names are those of secrets, and values of the environment.
fn masked_words(words: &[String], env: &BTreeMap<String, String>) -> Vec<String> {
    let secrets = Secrets::of_env(env.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let mut after_secret = false;
    words
        .iter()
        .map(|word| {
            let hide = std::mem::replace(
                &mut after_secret,
                word.starts_with('-') && !word.contains('=') && is_secret_name(word),
            );
            match word.split_once('=') {
                _ if hide && !word.starts_with('-') => MASK.to_owned(),
                Some((name, _)) if is_secret_name(name) => format!("{name}={MASK}"),
                _ => without_user(&secrets.redact(word)),
            }
        })
        .collect()
}

/// `https://user:password@host` → `https://***@host`
fn without_user(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let host_end = rest.find('/').unwrap_or(rest.len());
    match rest[..host_end].rfind('@') {
        Some(at) => format!("{scheme}://{MASK}{}", &rest[at..]),
        None => text.to_owned(),
    }
}

/// Masks texts under the names of secrets, and users in URLs.
fn mask(value: &mut Value) -> &mut Value {
    match value {
        Value::String(text) if text.contains("://") => *text = without_user(text),
        Value::Array(items) => {
            for item in items {
                mask(item);
            }
        }
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                if value.is_string() && is_secret_name(key) {
                    *value = json!(MASK);
                } else {
                    mask(value);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
    value
}

/// Durations as people write them.
fn readable(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(readable).collect(),
        Value::Object(map) => match (map.get("secs"), map.get("nanos"), map.len()) {
            (Some(secs), Some(nanos), 2) => {
                let nanos = u32::try_from(nanos.as_u64().unwrap_or(0)).unwrap_or(0);
                let time = Duration::new(secs.as_u64().unwrap_or(0), nanos);
                json!(humantime::format_duration(time).to_string())
            }
            _ => map.into_iter().map(|(key, value)| (key, readable(value))).collect(),
        },
        value => value,
    }
}

/// In the largest unit that says it exactly.
fn exact(Bytes(bytes): Bytes) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.iter().find(|(shift, _)| bytes > 0 && bytes % (1 << shift) == 0);
    unit.map_or_else(|| format!("{bytes}B"), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

/// What outranks or adds to the file.
fn overrides(in_force: &InForce, catalog: &Catalog) -> Vec<Value> {
    let left_out = |what: String| in_force.left_out.iter().any(|left| left.what == what);
    let flags = in_force
        .flags
        .iter()
        .map(|flag| json!({ "key": flag.key, "origin": "flag", "flag": flag.flag }));
    let environment = in_force.overrides.iter().map(|row| {
        json!({ "key": row.key, "origin": "environment", "variable": row.variable, "value": row.value })
    });
    let outranked = |path: &str| in_force.overrides.iter().any(|row| row.key == path);
    let patches = in_force.overlay.patches.iter().map(|(path, value)| {
        let fits = !left_out(format!("patch: {path}"));
        json!({
            "key": path,
            "origin": "patch",
            "value": value,
            "effective": fits && !outranked(path),
        })
    });
    let registered = in_force.overlay.registered.iter().map(|known| {
        let there = catalog.models.get(known.model_id.as_str()).is_some_and(|spec| spec.registered);
        json!({ "key": format!("models.{}", known.model_id), "origin": "registered", "effective": there })
    });
    flags.chain(environment).chain(patches).chain(registered).collect()
}

/// Where the value of each key that can be patched is from; keys that nobody set are left out.
fn origins(in_force: &InForce) -> Map<String, Value> {
    let mut origins = Map::new();
    let mut set = |path: &str, origin: &str| drop(origins.insert(path.to_owned(), json!(origin)));
    in_force.in_file.iter().for_each(|path| set(path, "file"));
    for path in in_force.overlay.patches.keys() {
        if in_force.left_out.iter().all(|left| left.what != format!("patch: {path}")) {
            set(path, "patch");
        }
    }
    in_force.overrides.iter().for_each(|row| set(row.key, "environment"));
    origins
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_can_be_read_back() {
        for text in ["64MiB", "1GiB", "3B", "1536KiB"] {
            assert_eq!(exact(values::size(text).unwrap()), text);
        }
        let shown = readable(json!({ "a": Duration::from_millis(90_500), "b": [1] }));
        assert_eq!(shown, json!({ "a": "1m 30s 500ms", "b": [1] }));
        assert_eq!(values::duration("1m 30s 500ms").unwrap(), Duration::from_millis(90_500));
    }

    #[test]
    fn secrets_are_masked_wherever_they_stand() {
        let words = ["serve", "--api-key", "s3cret", "--hf-token=abc", "x-from-env-x", "-m", "a"];
        let env = BTreeMap::from([("HF_TOKEN".to_owned(), "from-env".to_owned())]);
        let shown = masked_words(&words.map(str::to_owned), &env).join(" ");
        for secret in ["s3cret", "abc", "from-env"] {
            assert!(!shown.contains(secret), "{shown}");
        }
        assert!(shown.contains("serve --api-key ***") && shown.ends_with("-m a"), "{shown}");
        assert_eq!(without_user("http://u:p@h/x@y"), "http://***@h/x@y");
        let mut tree = json!({ "labels": { "db_password": "x" }, "url": "https://a:b@c", "tags": ["http://q:w@e"] });
        assert_eq!(
            *mask(&mut tree),
            json!({ "labels": { "db_password": "***" }, "url": "https://***@c", "tags": ["http://***@e"] })
        );
    }
}
