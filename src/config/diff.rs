//! What a reload changes, in words: models by name, settings by key.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use super::catalog::{Catalog, GpuSettings, ModelSpec, Peer, Settings};

/// Names listed of each kind; the rest are counted.
const NAMES_MAX: usize = 10;

/// `added coder; changed llava (drained first); adjusted phi (goes on); settings changed: swap.max_wait`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<String>,
    pub removed: Vec<String>,
    pub changed: Vec<String>,
    /// What runs goes on under the new entry.
    pub adjusted: Vec<String>,
    pub settings: Vec<String>,
}

/// Compares two configurations; where a model stands in its file does not count.
pub fn changes(old: &Catalog, new: &Catalog) -> Changes {
    let missing_in = |there: &Catalog, here: &Catalog| {
        let names = here.models.keys().filter(|name| !there.models.contains_key(*name));
        names.map(ToString::to_string).collect::<Vec<_>>()
    };
    // A file does not name what its peers were found to have: that stays.
    let stays = |name: &String| {
        let spec = old.resolve(name).filter(|spec| old.is_discovered(spec));
        let peer = spec.and_then(|spec| new.peers.get(spec.peer.as_ref()?));
        let names_some = |peer: &Peer| {
            let of_peer = |spec: &Arc<ModelSpec>| spec.peer.as_ref() == Some(&peer.name);
            new.models.values().any(|spec| of_peer(spec) && new.is_discovered(spec))
        };
        peer.is_some_and(|peer| peer.is_open() && !names_some(peer))
    };
    let both = || new.models.values().filter_map(|spec| Some((old.model(&spec.name)?, spec)));
    let edited = |runs_on: bool| {
        let edited =
            both().filter(|(before, now)| !now.is_same(before) && now.runs_like(before) == runs_on);
        edited.map(|(_, now)| now.name.to_string()).collect()
    };
    let mut settings = settings(&old.settings, &new.settings);
    let parts = [
        ("groups", old.groups != new.groups),
        ("peers", old.peers != new.peers),
        ("routes", old.routes != new.routes),
    ];
    settings.extend(parts.iter().filter(|(_, differ)| *differ).map(|(key, _)| (*key).to_owned()));
    Changes {
        added: missing_in(old, new),
        removed: missing_in(new, old).into_iter().filter(|name| !stays(name)).collect(),
        changed: edited(false),
        adjusted: edited(true),
        settings,
    }
}

/// What only a start reads stays as it is in force; answers with the keys that the file changes in
/// vain until then.
pub fn keep_what_needs_a_restart(new: &mut Settings, running: &Settings) -> Vec<String> {
    let asked = new.clone();
    new.store.clone_from(&running.store);
    new.engine_ports = running.engine_ports;
    new.docker_host.clone_from(&running.docker_host);
    new.gpu = GpuSettings { reserve: new.gpu.reserve, ..running.gpu.clone() };
    settings(&asked, new)
}

/// Keys as they are written in models.yaml.
fn settings(old: &Settings, new: &Settings) -> Vec<String> {
    let tree = |settings| serde_json::to_value(settings).unwrap_or_default();
    let mut keys = Vec::new();
    differing("", &tree(old), &tree(new), &mut keys);
    for key in &mut keys {
        match key.as_str() {
            "gateway" | "orchestrator" | "connections" | "tls" | "tls.cert_file"
            | "tls.key_file" => key.insert_str(0, "listen."),
            "docker_host" => *key = "docker.host".to_owned(),
            "front_doors" => *key = "ports".to_owned(),
            "watch" => *key = "reload.watch".to_owned(),
            _ => {}
        }
    }
    // The secrets themselves are never serialised.
    if old.auth != new.auth && !keys.iter().any(|key| key == "auth.keys") {
        keys.push("auth.keys".to_owned());
    }
    keys
}

fn differing(path: &str, old: &Value, new: &Value, keys: &mut Vec<String>) {
    // A duration is an object too: its parts are no keys.
    let is_section = |value: &Value| value.is_object() && value.get("nanos").is_none();
    match (old.as_object(), new.as_object()) {
        _ if old == new => {}
        (Some(before), Some(now)) if is_section(old) && is_section(new) => {
            for (key, value) in now {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                differing(&path, before.get(key).unwrap_or(&Value::Null), value, keys);
            }
        }
        _ => keys.push(path.to_owned()),
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [
            ("added", &self.added, ""),
            ("removed", &self.removed, " (drained first)"),
            ("changed", &self.changed, " (drained first)"),
            ("adjusted", &self.adjusted, " (goes on)"),
            ("settings changed:", &self.settings, ""),
        ];
        let parts: Vec<String> = kinds
            .iter()
            .filter(|(_, names, _)| !names.is_empty())
            .map(|(what, names, note)| {
                let named = names.iter().take(NAMES_MAX).cloned().collect::<Vec<_>>().join(", ");
                match names.len().saturating_sub(NAMES_MAX) {
                    0 => format!("{what} {named}{note}"),
                    more => format!("{what} {named} and {more} more{note}"),
                }
            })
            .collect();
        match parts.as_slice() {
            [] => f.write_str("nothing changed"),
            parts => f.write_str(&parts.join("; ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;
    use crate::units::Bytes;

    fn catalog(text: &str) -> Catalog {
        parse(text, "models.yaml", &|_| None).unwrap().catalog
    }

    #[test]
    fn a_reload_names_models_and_keys() {
        let model = |name: &str, gib: u32| {
            format!(
                "  {name}: {{ engine: openai, process: {{ cmd: x }}, port: 9{gib:03}, gpus: 1, vram: {gib}GiB }}\n"
            )
        };
        let words = |model: String| model.replace("gpus: 1", "gpus: 1, ttl: 5m");
        let key = |key: &str| format!("auth: {{ keys: [{{ name: a, key: {key} }}] }}\n");
        let (first, second) = ("s3cret-s3cret-s3cret", "0ther-0ther-0ther-0ther");
        let old =
            format!("{}models:\n{}{}{}", key(first), model("a", 1), model("b", 2), model("c", 3))
                + &model("e", 5);
        let new = format!(
            "swap: {{ max_wait: 1m }}\nqueue: {{ limit: 9, per_model: 9 }}\n{}models:\n{}{}{}",
            key(second),
            model("b", 2),
            model("c", 4),
            model("d", 1)
        ) + &words(model("e", 5));
        let (old, new) = (catalog(&old), catalog(&new));
        assert_eq!(
            changes(&old, &new).to_string(),
            "added d; removed a (drained first); changed c (drained first); adjusted e \
             (goes on); settings changed: swap.max_wait, queue.limit, queue.per_model, auth.keys"
        );
        assert_eq!(changes(&new, &new.clone()).to_string(), "nothing changed");
    }

    #[test]
    fn a_long_list_is_counted() {
        let added = (0..13).map(|n| format!("m{n}")).collect();
        let text = Changes { added, ..Changes::default() }.to_string();
        assert!(text.ends_with("m8, m9 and 3 more"), "{text}");
    }

    #[test]
    fn what_only_a_start_reads_stays_in_force() {
        let running = Settings::default();
        let mut asked = Settings { store: "other.db".into(), ..Settings::default() };
        asked.gpu.memory = vec![Bytes::gib(8)];
        asked.gpu.reserve = Bytes::gib(2);
        asked.queue.limit = 7;
        let kept = keep_what_needs_a_restart(&mut asked, &running);
        assert_eq!(kept, ["gpu.memory", "store"]);
        let live = (asked.gpu.reserve, asked.queue.limit);
        assert_eq!(live, (Bytes::gib(2), 7));
        asked.gpu.reserve = running.gpu.reserve;
        asked.queue.limit = running.queue.limit;
        assert_eq!(asked, running);
    }
}
