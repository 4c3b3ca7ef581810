//! llama-swap's config.yaml.

use super::names;
use super::together::{self, Wanted};
use super::yaml::{Entry, Out};
use super::{Draft, File, Keys, Model, docker_run, items, same, seconds, texts};
use crate::config::tree::{Kind, Node};

/// In the order of the file: one may use those above it.
type Macros = Vec<(String, String)>;

pub(super) fn convert(file: &File, draft: &mut Draft) {
    let mut keys = Keys::of(&file.root, "");
    let global = macros(keys.take("macros").map(|(_, node)| node));
    draft.top.push(Entry::said(
        "listen",
        Out::Map(vec![Entry::new("gateway", Out::plain("127.0.0.1:8080"))]),
        "llama-swap listened on all addresses: 0.0.0.0:8080 here, with keys in `auth`.",
    ));
    settings(&mut keys, file, draft);
    keys_of_clients(&mut keys, draft);
    if !global.is_empty() {
        let entries = global.iter().map(|(name, text)| {
            Entry::new(name, Out::text(text.replace("${MODEL_ID}", "${model}")))
        });
        draft.top.push(Entry::new("macros", Out::Map(entries.collect())));
    }
    let mut wanted = Wanted::default();
    if let Some((_, models)) = keys.take("models") {
        for (key, node) in models.entries() {
            model(&key.text, node, &global, &mut wanted, file, draft);
        }
    }
    let routing = keys.take("routing");
    together::convert(&mut keys, routing.map(|(_, node)| node), &mut wanted, file, draft);
    names::convert(&mut keys, file, draft);
    keys.rest(file, draft);
}

fn macros(node: Option<&Node>) -> Macros {
    let entries = node.map(Node::entries).unwrap_or_default();
    let pair = |(key, node): &(crate::config::tree::Key, Node)| {
        Some((key.text.clone(), one_line(node.text()?)))
    };
    entries.iter().filter_map(pair).collect()
}

/// Replaces macros until none is left that is known; `${env.…}`, `${PORT}` stay.
fn expand(text: &str, macros: &[&Macros], id: &str) -> String {
    let mut text = text.replace("${MODEL_ID}", id);
    // A macro may hold others, never itself: the depth is bounded by their number.
    for _ in 0..=macros.iter().map(|macros| macros.len()).sum::<usize>() {
        let before = text.clone();
        for (name, value) in macros.iter().flat_map(|macros| macros.iter()) {
            text = text.replace(&format!("${{{name}}}"), value);
        }
        if text == before {
            break;
        }
    }
    text.replace("${MODEL_ID}", id)
}

/// A command over several lines, comments among them, as one line.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let lines: Vec<&str> =
        lines.map(|line| line.strip_suffix('\\').unwrap_or(line).trim()).collect();
    lines.join(" ").trim().to_owned()
}

fn settings(keys: &mut Keys<'_>, file: &File, draft: &mut Draft) {
    if let Some((_, wait)) = keys.number("healthCheckTimeout") {
        let start = Entry::new("start_timeout", seconds(wait.max(15.0)));
        draft.top.push(Entry::new("swap", Out::Map(vec![start])));
    }
    let mut defaults = Vec::new();
    if let Some((_, ttl)) = keys.number("globalTTL") {
        let ttl = if ttl > 0.0 { seconds(ttl) } else { Out::plain("never") };
        defaults.push(Entry::new("ttl", ttl));
    }
    if let Some((_, grace)) = keys.number("unloadTimeout").filter(|(_, grace)| *grace > 0.0) {
        defaults.push(Entry::new("stop", Out::Map(vec![Entry::new("grace", seconds(grace))])));
    }
    if !defaults.is_empty() {
        draft.top.push(Entry::new("defaults", Out::Map(defaults)));
    }
    if let Some((_, first)) = keys.number("startPort") {
        let last = (first as u32 + 999).min(65_535);
        let ports = Out::plain(format!("{first}-{last}"));
        draft.top.push(Entry::said("engine_ports", ports, "What `${PORT}` is chosen from."));
    }
    if keys.flag("sendLoadingState") == Some(true) {
        let waiting = vec![
            Entry::new("style", Out::plain("reasoning")),
            Entry::new("after", Out::plain("1s")),
        ];
        draft.top.push(Entry::new("waiting", Out::Map(waiting)));
    }
    if let Some((_, size)) = keys.number("captureBuffer").filter(|(_, size)| *size > 0.0) {
        let captures = vec![
            Entry::new("enabled", Out::plain("true")),
            Entry::new("total", Out::plain(format!("{size}MiB"))),
        ];
        draft.top.push(Entry::said(
            "captures",
            Out::Map(captures),
            "Prompts and answers are kept in memory, as llama-swap did.",
        ));
    }
    for name in ["logLevel", "logTimeFormat", "logToStdout", "logRequests"] {
        let why = "Wharf's own log is set by its environment, engines' logs are at /logs";
        keys.leave(name, why, "WHARF_LOG=debug says more", file, draft);
    }
    keys.leave(
        "metricsMaxInMemory",
        "activity is kept in the store",
        "`retention: { rows: … }` bounds it",
        file,
        draft,
    );
    keys.leave(
        "includeAliasesInList",
        "there is no such switch",
        "`GET /v1/models` tells the aliases of each model",
        file,
        draft,
    );
}

fn keys_of_clients(keys: &mut Keys<'_>, draft: &mut Draft) {
    let Some((_, node)) = keys.take("apiKeys") else { return };
    let keys = texts(node).into_iter().enumerate().map(|(at, key)| {
        Out::Map(vec![
            Entry::new("name", Out::text(format!("client-{}", at + 1))),
            Entry::new("key", Out::quoted(key)),
            Entry::new("scopes", Out::texts(["inference", "read", "admin"])),
        ])
    });
    let list = Entry::new("keys", Out::List(keys.collect()));
    draft.top.push(Entry::said(
        "auth",
        Out::Map(vec![list]),
        "llama-swap's keys opened everything; clients that only chat need no `read`, no `admin`.",
    ));
}

fn model(
    id: &str,
    node: &Node,
    global: &Macros,
    wanted: &mut Wanted,
    file: &File,
    draft: &mut Draft,
) {
    let mut keys = Keys::of(node, &format!("models.{id}"));
    let own = macros(keys.take("macros").map(|(_, node)| node));
    let expanded = |text: &str| expand(text, &[&own, global], id);
    let mut model = Model { name: id.to_owned(), comments: Vec::new(), entries: Vec::new() };
    let Some((place, written)) = keys.text("cmd") else {
        let why = "it has no `cmd`";
        draft.note(file, node.place, &keys.path, why, "say how it is run, then import again");
        return;
    };
    let command = one_line(&expanded(&one_line(written)));
    let words = shell_words::split(&command).unwrap_or_default();
    let mut env: Vec<String> = keys
        .take("env")
        .map(|(_, node)| texts(node).iter().map(|text| expanded(text)).collect())
        .unwrap_or_default();
    let docker = docker_run::read(&words);
    let engine = engine(docker.as_ref().map(|run| run.image.as_str()), &words);
    model.set("engine", Out::plain(engine));
    let answers = answers(&mut keys, &expanded);
    let is_docker = docker.is_some();
    match docker {
        Some(run) => {
            model.set("docker", Out::Map(run.entries));
            for option in run.left {
                let why = format!("`{option}` has no equivalent");
                let what = "see the keys of `docker` in docs/configuration.md";
                draft.note(file, place, &keys.path_of("cmd"), &why, what);
            }
            model.entries.extend(run.gpus.map(|gpus| Entry::new("gpus", gpus)));
        }
        None if let Answers::Elsewhere(url) = &answers => {
            let why = "its server answers on another machine: the command is not run";
            let what = "start it there, or run Wharf there and make that a peer";
            draft.note(file, place, &keys.path_of("cmd"), why, what);
            model.set("external", Out::Map(vec![Entry::new("url", Out::text(url))]));
        }
        None => {
            let keeps_macros = own.is_empty();
            let cmd = if keeps_macros { one_line(written) } else { command.clone() };
            let cmd = cmd.replace("${MODEL_ID}", "${model}");
            model.set("process", Out::Map(vec![Entry::new("cmd", Out::text(cmd))]));
            if let Answers::Fixed(port) = answers {
                model.set("port", Out::plain(port.to_string()));
                wanted.ports.push((id.to_owned(), port));
            }
        }
    }
    let runs_here = !model.entries.iter().any(|entry| entry.key == "external");
    if runs_here {
        gpus(&words, &mut env, &mut model);
    }
    if runs_here && !env.is_empty() {
        model.set("env", Out::texts(&env));
    }
    about(&mut keys, &expanded, &mut model);
    policy(&mut keys, engine, &words, &mut model);
    if runs_here {
        stop(&mut keys, is_docker, &mut model, file, draft);
    } else {
        keys.taken.extend(["cmdStop", "unloadTimeout"]);
    }
    traffic(&mut keys, &expanded, &mut model, file, draft);
    keys.rest(file, draft);
    wanted.models.push(id.to_owned());
    draft.models.push(model);
}

/// By the image, or by the program.
fn engine(image: Option<&str>, words: &[String]) -> &'static str {
    let program = words.first().map(String::as_str).unwrap_or_default();
    let told = image.unwrap_or_else(|| program.rsplit('/').next().unwrap_or(program));
    match told {
        told if told.contains("vllm") => "vllm",
        told if told.contains("sglang") => "sglang",
        told if told.contains("llama.cpp") || told.contains("llama-server") => "llamacpp",
        _ if image.is_none() && words.iter().any(|word| word.contains("sglang")) => "sglang",
        _ if image.is_none() && words.iter().any(|word| word.contains("vllm.")) => "vllm",
        _ => "openai",
    }
}

/// Where the server of a command is, by `proxy`.
enum Answers {
    /// On the port that it is given.
    Given,
    Fixed(u16),
    /// What precedes `/v1`.
    Elsewhere(String),
}

fn answers(keys: &mut Keys<'_>, expanded: &dyn Fn(&str) -> String) -> Answers {
    let Some((_, proxy)) = keys.text("proxy") else { return Answers::Given };
    let proxy = expanded(proxy);
    let url = proxy.trim_end_matches('/');
    let Some(uri) = Some(url).filter(|url| !url.contains("${")).and_then(|url| url.parse().ok())
    else {
        return Answers::Given;
    };
    let uri: http::Uri = uri;
    match (uri.host(), uri.port_u16()) {
        (Some("127.0.0.1" | "localhost" | "0.0.0.0" | "[::1]"), Some(port)) => Answers::Fixed(port),
        (Some("127.0.0.1" | "localhost" | "0.0.0.0" | "[::1]") | None, _) => Answers::Given,
        _ => Answers::Elsewhere(url.strip_suffix("/v1").unwrap_or(url).to_owned()),
    }
}

/// `CUDA_VISIBLE_DEVICES` is Wharf's to set; layers on no GPU mean the CPU.
fn gpus(words: &[String], env: &mut Vec<String>, model: &mut Model) {
    if let Some(at) = env.iter().position(|pair| pair.starts_with("CUDA_VISIBLE_DEVICES=")) {
        let pair = env.remove(at);
        let devices = pair.split_once('=').map_or("", |(_, devices)| devices).trim();
        let gpus = match devices {
            "" | "-1" => Out::plain("0"),
            devices => Out::List(
                devices.split(',').map(|gpu| Out::as_written(gpu.trim().to_owned())).collect(),
            ),
        };
        model.set("gpus", gpus);
        return;
    }
    let flags = ["-ngl", "--n-gpu-layers", "--gpu-layers"];
    let none = words.windows(2).any(|pair| flags.contains(&&*pair[0]) && pair[1] == "0");
    if none {
        model.set("gpus", Out::plain("0"));
    }
}

fn about(keys: &mut Keys<'_>, expanded: &dyn Fn(&str) -> String, model: &mut Model) {
    for key in ["name", "description"] {
        if let Some((_, text)) = keys.text(key).filter(|(_, text)| !text.is_empty()) {
            model.set(key, Out::text(expanded(text)));
        }
    }
    if let Some((_, node)) = keys.take("aliases") {
        let id = |node: &Node| node.text().or_else(|| node.get("id")?.text()).map(expanded);
        let aliases: Vec<String> = items(node).iter().filter_map(id).collect();
        if !aliases.is_empty() {
            model.set("aliases", Out::texts(aliases));
        }
    }
    if keys.flag("unlisted") == Some(true) {
        model.set("unlisted", Out::plain("true"));
    }
    let mut metadata = Vec::new();
    for (name, key) in [("metadata", None), ("capabilities", Some("capabilities"))] {
        let Some((_, node)) = keys.take(name) else { continue };
        let Out::Map(entries) = same(node, &|text| expanded(text).replace("${PORT}", "(port)"))
        else {
            continue;
        };
        match key {
            Some(key) => metadata.push(Entry::new(key, Out::Map(entries))),
            None => metadata.extend(entries),
        }
    }
    if !metadata.is_empty() {
        model.set("metadata", Out::Map(metadata));
    }
}

fn policy(keys: &mut Keys<'_>, engine: &str, words: &[String], model: &mut Model) {
    if let Some((_, ttl)) = keys.number("ttl").filter(|(_, ttl)| *ttl >= 0.0) {
        // Written out: a default for all may say otherwise.
        model.set("ttl", if ttl > 0.0 { seconds(ttl) } else { Out::plain("never") });
    }
    match keys.text("checkEndpoint") {
        Some((_, path)) => model.set("health", Out::text(path)),
        // llama-swap's usual path; Wharf's is another one for these.
        None if engine == "openai" => model.set("health", Out::plain("/health")),
        None => {}
    }
    if let Some((_, limit)) = keys.number("concurrencyLimit").filter(|(_, limit)| *limit > 0.0) {
        model.comment("More requests than `concurrency` wait here; llama-swap answered 429.");
        model.set("concurrency", Out::plain(limit.to_string()));
    }
    if let Some(on) = keys.flag("sendLoadingState") {
        model.set("send_loading_state", Out::plain(on.to_string()));
    }
    let told = keys.text("useModelName").map(|(_, name)| name.to_owned());
    let served = || {
        let at = words.iter().position(|word| word == "--served-model-name")?;
        words.get(at + 1).cloned()
    };
    let name = told.filter(|name| !name.is_empty()).or_else(served);
    if let Some(name) = name.filter(|name| *name != model.name) {
        model.set("upstream_name", Out::text(name));
    }
}

fn stop(keys: &mut Keys<'_>, is_docker: bool, model: &mut Model, file: &File, draft: &mut Draft) {
    let mut stop = Vec::new();
    if let Some((place, command)) = keys.text("cmdStop") {
        let words = shell_words::split(command).unwrap_or_default();
        let signal = words.iter().find_map(|word| {
            let name = word.trim_start_matches('-').trim_start_matches("SIG");
            let known = ["TERM", "INT", "QUIT", "KILL", "HUP"].contains(&name);
            known.then(|| format!("SIG{name}"))
        });
        match (is_docker, words.first().map(String::as_str), signal) {
            // Wharf stops its containers itself.
            (true, Some("docker" | "podman"), _) => {}
            (_, Some("kill"), Some(signal)) => stop.push(Entry::new("signal", Out::text(signal))),
            _ => draft.note(
                file,
                place,
                &keys.path_of("cmdStop"),
                "no command is run to stop an engine: its whole process group is told by a signal",
                "set `stop: { signal: …, grace: … }` if SIGTERM is not the right one",
            ),
        }
    }
    if let Some((_, grace)) = keys.number("unloadTimeout").filter(|(_, grace)| *grace > 0.0) {
        stop.push(Entry::new("grace", seconds(grace)));
    }
    if !stop.is_empty() {
        model.set("stop", Out::Map(stop));
    }
}

fn traffic(
    keys: &mut Keys<'_>,
    expanded: &dyn Fn(&str) -> String,
    model: &mut Model,
    file: &File,
    draft: &mut Draft,
) {
    if let Some((_, node)) = keys.take("filters") {
        let filters = filters(node, &keys.path_of("filters"), expanded, file, draft);
        if !filters.is_empty() {
            model.set("filters", Out::Map(filters));
        }
    }
    if let Some((_, node)) = keys.take("timeouts") {
        let mut timeouts = Keys::of(node, &keys.path_of("timeouts"));
        if let Some((_, wait)) = timeouts.number("responseHeader").filter(|(_, wait)| *wait > 0.0) {
            let answer = Entry::new("answer", seconds(wait));
            model.set("timeouts", Out::Map(vec![answer]));
        }
        for name in ["connect", "keepalive", "tlsHandshake", "idleConn"] {
            let why = "connections to engines on this machine have fixed bounds";
            timeouts.leave(name, why, "nothing is to be done", file, draft);
        }
        timeouts.rest(file, draft);
    }
    keys.leave(
        "compat",
        "WebSockets go through `/upstream`, and hold the model as any request does",
        "for servers that are no LLM's see `engine: http`",
        file,
        draft,
    );
}

fn filters(
    node: &Node,
    path: &str,
    expanded: &dyn Fn(&str) -> String,
    file: &File,
    draft: &mut Draft,
) -> Vec<Entry> {
    let mut keys = Keys::of(node, path);
    let mut filters = Vec::new();
    let strip = keys.text("stripParams").or_else(|| keys.text("strip_params"));
    keys.taken.push("strip_params");
    if let Some((_, names)) = strip {
        let names = expanded(names);
        let names = names.split(',').map(str::trim).filter(|n| !n.is_empty() && *n != "model");
        filters.push(Entry::new("strip", Out::texts(names)));
    }
    if let Some((_, Node { kind: Kind::Map(entries), .. })) = keys.take("setParams") {
        let entries = entries.iter().filter(|(key, _)| key.text != "model");
        let entries = entries.map(|(key, node)| Entry::new(&key.text, same(node, expanded)));
        filters.push(Entry::new("set", Out::Map(entries.collect())));
    }
    keys.leave(
        "setParamsByID",
        "parameters do not depend on the name that a request carries",
        "let clients send them, or make a model of its own with `filters.set`",
        file,
        draft,
    );
    keys.rest(file, draft);
    filters
}
