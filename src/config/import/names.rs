//! What llama-swap loads at start, and its names that lead elsewhere: selectors and peers.

use std::collections::BTreeMap;

use super::yaml::{Entry, Out};
use super::{Draft, File, Keys, items, texts};

pub(super) fn convert(keys: &mut Keys<'_>, file: &File, draft: &mut Draft) {
    preload(keys, file, draft);
    let mut routes = selectors(keys, file, draft);
    peers(keys, &mut routes, file, draft);
    if !routes.is_empty() {
        draft.bottom.push(Entry::new("routes", Out::Map(routes)));
    }
}

fn preload(keys: &mut Keys<'_>, file: &File, draft: &mut Draft) {
    let Some((_, node)) = keys.take("hooks") else { return };
    let mut hooks = Keys::of(node, "hooks");
    if let Some((_, node)) = hooks.take("on_startup") {
        let mut startup = Keys::of(node, "hooks.on_startup");
        if let Some((_, list)) = startup.take("preload") {
            for item in items(list) {
                let name = item.text().unwrap_or_default();
                match draft.models.iter_mut().find(|model| model.name == name) {
                    Some(model) => {
                        model.comment("Loaded at start, and again when there is room for it.");
                        model.set("warmup", Out::plain("true"));
                        // Both would contradict each other.
                        let before = model.entries.len();
                        model.entries.retain(|entry| entry.key != "ttl");
                        if model.entries.len() < before {
                            let path = format!("models.{name}.ttl");
                            let why = "a model that is loaded at start stays loaded";
                            let fix = "to let it leave: remove `warmup`, set its `ttl` again";
                            draft.note(file, item.place, &path, why, fix);
                        }
                    }
                    None => {
                        let why = format!("no model is called `{name}`");
                        let path = "hooks.on_startup.preload";
                        draft.note(file, item.place, path, &why, "nothing is to be done");
                    }
                }
            }
        }
        startup.leave(
            "profile",
            "no profile is active by itself",
            "set `warmup: true` on its models",
            file,
            draft,
        );
        startup.rest(file, draft);
    }
    hooks.rest(file, draft);
}

/// One name for several models.
fn selectors(keys: &mut Keys<'_>, file: &File, draft: &mut Draft) -> Vec<Entry> {
    let mut routes = Vec::new();
    let Some((_, node)) = keys.take("selectors") else { return routes };
    for (key, node) in node.entries() {
        let mut selector = Keys::of(node, &format!("selectors.{}", key.text));
        let strategy = selector.text("strategy").map_or("warm", |(_, text)| text).to_owned();
        let targets = selector.take("targets").map(|(_, node)| texts(node)).unwrap_or_default();
        let kind = if strategy == "warm" { "any_of" } else { "failover" };
        if strategy != "warm" {
            let why = format!("the strategy `{strategy}` is not known");
            let what = "`failover` takes the first that can be had in time";
            draft.note(file, key.place, &selector.path, &why, what);
        }
        selector.rest(file, draft);
        routes.push(Entry::new(&key.text, Out::Map(vec![Entry::new(kind, Out::texts(targets))])));
    }
    routes
}

fn peers(keys: &mut Keys<'_>, routes: &mut Vec<Entry>, file: &File, draft: &mut Draft) {
    let Some((_, node)) = keys.take("peers") else { return };
    let mut peers = Vec::new();
    let mut by_name: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, node) in node.entries() {
        let mut peer = Keys::of(node, &format!("peers.{}", key.text));
        let mut entries = Vec::new();
        if let Some((_, url)) = peer.text("proxy") {
            let url = url.trim_end_matches('/');
            entries.push(Entry::new("url", Out::text(url.strip_suffix("/v1").unwrap_or(url))));
        }
        if let Some((_, key)) = peer.text("apiKey").filter(|(_, key)| !key.is_empty()) {
            entries.push(Entry::new("api_key", Out::quoted(key)));
        }
        if let Some((_, list)) = peer.take("models") {
            let models = texts(list);
            for model in &models {
                by_name.entry(model.clone()).or_default().push(format!("{}/{model}", key.text));
            }
            entries.push(Entry::new("models", Out::texts(models)));
        }
        for name in ["filters", "timeouts"] {
            let why = "requests to peers go as they are, with the gateway's own bounds";
            peer.leave(name, why, "set filters on the peer itself", file, draft);
        }
        peer.rest(file, draft);
        peers.push(Entry::new(&key.text, Out::Map(entries)));
    }
    draft.bottom.push(Entry::new("peers", Out::Map(peers)));
    // llama-swap took their models' bare names where one peer has them, and no model here.
    for (name, targets) in by_name {
        let is_free = !draft.models.iter().any(|model| model.name == name)
            && !routes.iter().any(|route| route.key == name);
        if targets.len() == 1 && is_free {
            let target = Entry::new("any_of", Out::texts(targets));
            routes.push(Entry::new(&name, Out::Map(vec![target])));
        }
    }
}
