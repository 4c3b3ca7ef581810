//! docker-compose.yml of the dynamic model orchestrator: it has no file of its own; its models are
//! services called …-llm, whose containers Wharf manages as they are.

use super::yaml::{Entry, Out};
use super::{Draft, File, Keys, Model, items};
use crate::config::tree::Node;

pub(super) fn convert(file: &File, draft: &mut Draft) {
    let mode = Entry::said(
        "mode",
        Out::plain("single-active"),
        "As before, one model at a time; `multi-active` keeps as many as fit into the GPUs.",
    );
    draft.top.push(Entry::new("swap", Out::Map(vec![mode])));
    let services = file.root.get("services").map(Node::entries).unwrap_or_default();
    for (key, node) in services {
        let Some(name) = key.text.strip_suffix("-llm") else { continue };
        let mut service = Keys::of(node, &format!("services.{}", key.text));
        let mut model = Model { name: name.to_owned(), comments: Vec::new(), entries: Vec::new() };
        let image = service.text("image").map_or("", |(_, image)| image);
        let engine = ["vllm", "sglang"].into_iter().find(|engine| image.contains(engine));
        let is_llama = image.contains("llama.cpp");
        let engine = engine.unwrap_or(if is_llama { "llamacpp" } else { "openai" });
        model.set("engine", Out::plain(engine));
        let container = match service.text("container_name") {
            Some((_, name)) => name.to_owned(),
            None => {
                let why = "Compose names its container after the project";
                let what = "set `container_name` there, and `docker.container` here, to one name";
                draft.note(file, key.place, &service.path, why, what);
                key.text.clone()
            }
        };
        let mut docker = vec![Entry::new("container", Out::text(container))];
        if let Some(port) = port(&mut service) {
            docker.push(Entry::new("port", Out::plain(port)));
        }
        model.set("docker", Out::Map(docker));
        if let Some(name) = served_name(&mut service) {
            model.comment("The name under which the container serves it.");
            model.set("upstream_name", Out::text(name));
        }
        if let Some(gpus) = gpus(node) {
            model.set("gpus", gpus);
        }
        if node.get("restart").and_then(Node::text).is_some_and(|restart| restart != "no") {
            let why = "Docker would start it again after Wharf stopped it";
            draft.note(file, key.place, &service.path_of("restart"), why, "set `restart: \"no\"`");
        }
        draft.models.push(model);
    }
    let others: Vec<&str> = services
        .iter()
        .map(|(key, _)| key.text.as_str())
        .filter(|name| !name.ends_with("-llm"))
        .collect();
    if !others.is_empty() && !draft.models.is_empty() {
        draft.note(
            file,
            file.root.place,
            "services",
            &format!("not models: {}", others.join(", ")),
            "Wharf takes the place of gateway and orchestrator; the rest stays as it is",
        );
    }
}

/// The port inside of `ports: ["8001:8000"]`.
fn port(service: &mut Keys<'_>) -> Option<String> {
    let (_, ports) = service.take("ports")?;
    let first = items(ports).first()?.text()?;
    let inside = first.rsplit(':').next()?.split('/').next()?;
    inside.parse::<u16>().ok().map(|port| port.to_string())
}

/// What the container's command calls the model.
fn served_name(service: &mut Keys<'_>) -> Option<String> {
    let (_, command) = service.take("command")?;
    let words: Vec<String> = match command.text() {
        Some(text) => shell_words::split(text).ok()?,
        None => items(command).iter().filter_map(Node::text).map(str::to_owned).collect(),
    };
    ["--served-model-name", "--alias", "--model"].into_iter().find_map(|flag| {
        let at = words.iter().position(|word| word.split('=').next() == Some(flag))?;
        match words[at].split_once('=') {
            Some((_, value)) => Some(value.to_owned()),
            None => words.get(at + 1).cloned(),
        }
    })
}

fn gpus(node: &Node) -> Option<Out> {
    let path = ["deploy", "resources", "reservations", "devices"];
    let devices = path.iter().try_fold(node, |node, key| node.get(key))?;
    let device = items(devices).first()?;
    if let Some(ids) = device.get("device_ids") {
        let ids = items(ids).iter().filter_map(Node::text);
        return Some(Out::List(ids.map(|id| Out::as_written(id.to_owned())).collect()));
    }
    device.get("count")?.text()?.parse::<u16>().ok().map(|count| Out::plain(count.to_string()))
}
