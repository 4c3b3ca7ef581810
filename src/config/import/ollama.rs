//! The two tools that load models of an Ollama: the swapper service and the model pool manager.

use std::collections::BTreeSet;

use super::yaml::{Entry, Out};
use super::{Draft, File, Keys, Model, items, seconds, texts};
use crate::config::tree::{Kind, Node};

const USUAL_URL: &str = "http://localhost:11434";

fn ollama_model(name: &str) -> Model {
    let entries = vec![Entry::new("engine", Out::plain("ollama"))];
    Model { name: name.to_owned(), comments: Vec::new(), entries }
}

/// Their scripts call one port for everything that is not inference.
fn control_port(port: u16, draft: &mut Draft) {
    let address = Entry::new("orchestrator", Out::plain(format!("127.0.0.1:{port}")));
    draft.top.push(Entry::said(
        "listen",
        Out::Map(vec![address]),
        "The port that scripts of the old service call; requests for answers go to 8080.",
    ));
}

fn about_address(draft: &mut Draft) {
    let lines = [
        format!("The models are those of the Ollama at OLLAMA_BASE_URL, else {USUAL_URL};"),
        "for another one: `external: { url: … }`.".to_owned(),
    ];
    if let Some(first) = draft.models.first_mut() {
        first.comments.splice(0..0, lines);
    }
}

/// swapper_config.yaml
pub(super) fn swapper(file: &File, draft: &mut Draft) {
    let mut keys = Keys::of(&file.root, "");
    control_port(8890, draft);
    let mut swap = Vec::new();
    if let Some((_, node)) = keys.take("swapper") {
        let mut swapper = Keys::of(node, "swapper");
        let mode = swapper.text("mode").map_or("single-active", |(_, mode)| mode);
        swap.push(Entry::new("mode", Out::text(mode)));
        let most = swapper.number("max_concurrent_models");
        if let Some((_, most)) = most.filter(|_| mode == "multi-active") {
            swap.push(Entry::new("max_concurrent_models", Out::plain(most.to_string())));
        }
        if let Some((_, timeout)) = swapper.number("model_swap_timeout") {
            swap.push(Entry::said(
                "start_timeout",
                seconds(timeout),
                "Of one start; leaving and freeing memory have deadlines of their own.",
            ));
        }
        for name in ["gpu_enabled", "metal_acceleration"] {
            let why = "the Ollama decides what it computes on";
            swapper.leave(name, why, "set it where the Ollama is started", file, draft);
        }
        swapper.rest(file, draft);
    }
    draft.top.push(Entry::new("swap", Out::Map(swap)));
    let models = keys.take("models").map(|(_, node)| node.entries()).unwrap_or_default();
    for (key, node) in models {
        let mut model = ollama_model(&key.text);
        let mut keys = Keys::of(node, &format!("models.{}", key.text));
        let path = keys.text("path").map(|(_, path)| path);
        match path.map(|path| path.split_once(':')) {
            Some(Some(("ollama", name))) if name != key.text => {
                model.set("upstream_name", Out::text(name));
            }
            Some(Some(("ollama", _))) => {}
            _ => {
                let why = "its `path` is not that of an Ollama model (`ollama:NAME`)";
                let what = "say how it is run: `engine`, and `docker` or `process`";
                draft.note(file, key.place, &keys.path, why, what);
                continue;
            }
        }
        for name in ["type", "description"] {
            if let Some((_, text)) = keys.text(name) {
                model.set(name, Out::text(text));
            }
        }
        if let Some((_, size)) = keys.number("size_gb") {
            model.set("size_gb", Out::plain(size.to_string()));
        }
        priority(&mut keys, &mut model, file, draft);
        keys.rest(file, draft);
        draft.models.push(model);
    }
    about_address(draft);
    keys.rest(file, draft);
}

fn priority(keys: &mut Keys<'_>, model: &mut Model, file: &File, draft: &mut Draft) {
    let Some((place, text)) = keys.text("priority") else { return };
    match text {
        "high" | "low" => model.set("priority", Out::text(text)),
        "normal" | "medium" => {}
        other => {
            let why = format!("`{other}` is no priority here");
            let name = keys.path_of("priority");
            draft.note(file, place, &name, &why, "choose `high`, `normal` or `low`");
        }
    }
}

/// The pool's configuration and its registry, in any order, or one of them.
pub(super) fn pool(files: &[File], draft: &mut Draft) {
    control_port(8050, draft);
    let mut warm: BTreeSet<String> = BTreeSet::new();
    let mut bounds = (None, None);
    let is_registry =
        |file: &&File| matches!(file.root.get("models"), Some(Node { kind: Kind::List(_), .. }));
    for file in files.iter().filter(|file| !is_registry(file)) {
        pool_settings(file, &mut warm, &mut bounds, draft);
    }
    for file in files.iter().filter(is_registry) {
        let mut keys = Keys::of(&file.root, "");
        if let Some((_, models)) = keys.take("models") {
            for (at, node) in items(models).iter().enumerate() {
                registered(at, node, &mut warm, bounds, file, draft);
            }
        }
        keys.rest(file, draft);
    }
    // Without the registry, these are the models that are known.
    for name in warm {
        let mut model = ollama_model(&name);
        model.set("warmup", Out::plain("true"));
        draft.models.push(model);
    }
    about_address(draft);
}

fn minutes(count: f64) -> Out {
    seconds(count * 60.0)
}

fn pool_settings(
    file: &File,
    warm: &mut BTreeSet<String>,
    bounds: &mut (Option<f64>, Option<f64>),
    draft: &mut Draft,
) {
    let mut keys = Keys::of(&file.root, "");
    let mut defaults = Vec::new();
    let unloads = keys.flag("auto_unload") != Some(false);
    if let Some((_, ttl)) = keys.number("default_ttl_minutes") {
        let ttl = if unloads && ttl > 0.0 { minutes(ttl) } else { Out::plain("never") };
        defaults.push(Entry::new("ttl", ttl));
    }
    *bounds = (
        keys.number("min_ttl_minutes").map(|(_, min)| min),
        keys.number("max_ttl_minutes").map(|(_, max)| max),
    );
    let sides = [("min", bounds.0), ("max", bounds.1)];
    let sides = sides.into_iter().filter_map(|(key, side)| Some(Entry::new(key, minutes(side?))));
    let sides: Vec<Entry> = sides.collect();
    if !sides.is_empty() {
        defaults.push(Entry::new("ttl_bounds", Out::Map(sides)));
    }
    defaults.push(Entry::said(
        "grace",
        Out::plain("2m"),
        "As the pool manager did: late requests rescue a model.",
    ));
    if let Some((_, url)) = keys.text("ollama_base_url")
        && url.trim_end_matches('/') != USUAL_URL
    {
        let url = Entry::new("url", Out::text(url.trim_end_matches('/')));
        defaults.push(Entry::new("external", Out::Map(vec![url])));
    }
    let mut swap = Vec::new();
    if let Some((_, most)) = keys.number("max_concurrent_models") {
        swap.push(Entry::new("max_concurrent_models", Out::plain(most.to_string())));
    }
    if let Some((_, wait)) = keys.number("graceful_shutdown_seconds") {
        swap.push(Entry::new("drain_timeout", seconds(wait)));
    }
    if !swap.is_empty() {
        draft.top.push(Entry::new("swap", Out::Map(swap)));
    }
    if let Some((_, node)) = keys.take("port_range") {
        let port = |key| node.get(key).and_then(Node::text);
        if let (Some(first), Some(last)) = (port("start"), port("end")) {
            let ports = Out::plain(format!("{first}-{last}"));
            draft.top.push(Entry::said("ports", ports, "One port per model, as before."));
        }
    }
    if let Some((_, every)) = keys.number("check_interval_seconds") {
        draft.top.push(Entry::said(
            "check_interval",
            seconds(every),
            "Shown only: deadlines are exact here.",
        ));
    }
    keys.leave(
        "memory_limit_mb",
        "what a model of an Ollama takes is known only when it is loaded",
        "`max_concurrent_models` bounds how many; `vram` on a model counts it against the GPUs",
        file,
        draft,
    );
    warm.extend(keys.take("warmup_models").map(|(_, node)| texts(node)).unwrap_or_default());
    draft.top.push(Entry::new("defaults", Out::Map(defaults)));
    keys.rest(file, draft);
}

fn registered(
    at: usize,
    node: &Node,
    warm: &mut BTreeSet<String>,
    bounds: (Option<f64>, Option<f64>),
    file: &File,
    draft: &mut Draft,
) {
    let mut keys = Keys::of(node, &format!("models[{at}]"));
    let Some((_, id)) = keys.text("model_id") else {
        let why = "it has no `model_id`";
        draft.note(file, node.place, &keys.path, why, "give it one, then import again");
        return;
    };
    let mut model = ollama_model(id);
    for (theirs, ours) in [("display_name", "name"), ("model_type", "type")] {
        if let Some((_, text)) = keys.text(theirs) {
            model.set(ours, Out::text(text));
        }
    }
    let told = warm.remove(id);
    let warmup = keys.flag("warmup") == Some(true) || told;
    let ttl = keys.number("ttl_minutes").map(|(_, ttl)| ttl);
    match ttl {
        _ if warmup => model.set("warmup", Out::plain("true")),
        Some(ttl) if ttl > 0.0 => {
            let bounded = ttl.max(bounds.0.unwrap_or(ttl)).min(bounds.1.unwrap_or(ttl));
            if bounded != ttl {
                model.comment(format!("Its ttl of {ttl} minutes lay outside of the bounds."));
            }
            model.set("ttl", minutes(bounded));
        }
        Some(_) => model.set("ttl", Out::plain("never")),
        None => {}
    }
    priority(&mut keys, &mut model, file, draft);
    if let Some((_, tags)) = keys.take("tags") {
        model.set("tags", Out::texts(texts(tags)));
    }
    keys.rest(file, draft);
    draft.models.push(model);
}
