//! How an engine is run: the `docker:`, `process:` and `external:` parts of a model.

use std::collections::BTreeMap;

use super::catalog::{DockerSpec, ExternalSpec, ProcessSpec, PullPolicy};
use super::decode::{At, Sink, Spot, Table, Unread};
use super::fields::Reading;
use super::tree::Node;

const ARGS_HINT: Unread = Unread::Hint("did you mean `args`?");
const ENV_HINT: Unread = Unread::Hint("did you mean `env`?");
const MODEL_HINT: Unread = Unread::Hint("this is a key of the model itself, one level up");

pub(super) fn docker(at: &At<'_>, reading: Reading<'_>, sink: &mut Sink) -> Option<DockerSpec> {
    let mut table = at.table(sink, "`image` (or `container`), `args` and other keys")?;
    let mut spec = DockerSpec {
        container: text(&mut table, "container", "a container's name", sink),
        image: text(&mut table, "image", "an image such as vllm/vllm-openai:v0.31.0", sink),
        args: words(&mut table, "args", sink).unwrap_or_default(),
        entrypoint: words(&mut table, "entrypoint", sink),
        env: table.take("env").and_then(|at| at.pairs(sink, Some(reading.env))).unwrap_or_default(),
        volumes: table.take("volumes").map(|at| volumes(&at, sink)).unwrap_or_default(),
        ipc: text(&mut table, "ipc", "`host`, `private` or `shareable`", sink),
        shm_size: table.take("shm_size").and_then(|at| at.size(sink)),
        ulimits: table.take("ulimits").map(|at| ulimits(&at, sink)).unwrap_or_default(),
        labels: table.take("labels").and_then(|at| at.pairs(sink, None)).unwrap_or_default(),
        network: text(&mut table, "network", "a network's name", sink),
        runtime: text(&mut table, "runtime", "a Docker runtime such as nvidia", sink),
        cdi: table.take("cdi").and_then(|at| at.boolean(sink)).unwrap_or_default(),
        init: table.take("init").and_then(|at| at.boolean(sink)),
        user: text(&mut table, "user", "a user such as 1000:1000", sink),
        pull: PullPolicy::default(),
        port: table.take("port").and_then(|at| at.int(sink, 1..=u16::MAX)),
        memory: table.take("memory").and_then(|at| at.size(sink)),
    };
    if let Some(at) = table.take("pull") {
        spec.pull = pull(&at, sink).unwrap_or_default();
    }
    check_docker(&table, &spec, reading.whole, sink);
    table.finish(
        sink,
        &[
            ("command", ARGS_HINT),
            ("cmd", ARGS_HINT),
            ("environment", ENV_HINT),
            ("container_name", Unread::Hint("did you mean `container` (one that exists already)?")),
            ("name", Unread::Hint("Wharf names the containers it makes; remove it")),
            (
                "ports",
                Unread::Hint("Wharf publishes the engine's port itself; did you mean `port`?"),
            ),
            ("restart", Unread::Hint("Wharf decides what runs; remove it")),
            ("gpus", MODEL_HINT),
            ("vram", MODEL_HINT),
            ("stop", MODEL_HINT),
            ("health", MODEL_HINT),
            ("deploy", Unread::Hint("did you mean `gpus`, a key of the model itself?")),
            ("devices", Unread::Hint("did you mean `gpus`, a key of the model itself?")),
            ("privileged", Unread::Hint("not supported: engines need no privileges")),
            ("mounts", Unread::Hint("did you mean `volumes`?")),
        ],
    );
    Some(spec)
}

fn check_docker(table: &Table<'_>, spec: &DockerSpec, whole: bool, sink: &mut Sink) {
    if let Some(name) = &spec.container {
        // A container that exists has all of this already; setting it here would have no effect.
        const OTHERS: [&str; 16] = [
            "image",
            "args",
            "entrypoint",
            "env",
            "volumes",
            "ipc",
            "shm_size",
            "ulimits",
            "labels",
            "network",
            "runtime",
            "cdi",
            "init",
            "user",
            "pull",
            "memory",
        ];
        for key in OTHERS {
            let Some(spot) = table.key_spot(key) else { continue };
            let message = format!("`{key}` has no effect on the existing container `{name}`");
            sink.error(&spot, message, "remove it, or remove `container`").help(
                "`container` manages one that compose made, as it is; \
                 `image` makes a new one. Only `port` goes with `container`",
            );
        }
    } else if whole && table.key_spot("image").is_none() && !table.has_slip_of("image") {
        sink.error(&table.at.key_spot(), "`docker` names no image", "expected `image: …`")
            .help("or `container: …` to manage a container that exists already");
    }
    if let Some((spot, image)) = table.key_spot("image").zip(spec.image.as_ref())
        && (image.contains(char::is_whitespace) || image.contains("://"))
    {
        let message = format!("`{}` is no image name", image.escape_debug());
        sink.error(&spot, message, "expected name:tag, such as vllm/vllm-openai:v0.31.0");
    }
}

pub(super) fn pull(at: &At<'_>, sink: &mut Sink) -> Option<PullPolicy> {
    let choices = [
        ("missing", PullPolicy::Missing),
        ("always", PullPolicy::Always),
        ("never", PullPolicy::Never),
    ];
    if !at.is_map() {
        return at.choice(sink, &choices);
    }
    let mut table = at.table(sink, "`policy`")?;
    let policy = table.take("policy").and_then(|at| at.choice(sink, &choices));
    table.finish(sink, &[]);
    policy
}

fn text(table: &mut Table<'_>, key: &'static str, what: &str, sink: &mut Sink) -> Option<String> {
    table.take(key)?.string(sink, what)
}

fn words(table: &mut Table<'_>, key: &'static str, sink: &mut Sink) -> Option<Vec<String>> {
    table.take(key)?.words(sink)
}

fn volumes(at: &At<'_>, sink: &mut Sink) -> Vec<String> {
    let volume = |text: &str| {
        let mut parts = text.split(':');
        let (source, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let named = source.starts_with(|c: char| c.is_ascii_alphanumeric())
            && source.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        if source.starts_with(['.', '~']) {
            return Err("Docker needs the whole path from `/`, or a volume's name".to_owned());
        }
        if !named && !source.starts_with('/') || !target.starts_with('/') || parts.count() > 1 {
            return Err("expected source:/path/in/container, `:ro` may follow".to_owned());
        }
        Ok(text.to_owned())
    };
    let items = at.list(sink, "a list such as [\"hf-cache:/root/.cache/huggingface\"]");
    let what = "a volume such as hf-cache:/root/.cache/huggingface";
    items.unwrap_or_default().iter().filter_map(|item| item.parsed(sink, what, volume)).collect()
}

fn ulimits(at: &At<'_>, sink: &mut Sink) -> BTreeMap<String, (i64, i64)> {
    let mut limits = BTreeMap::new();
    if at.table(sink, "limits such as `memlock: -1`").is_none() {
        return limits;
    }
    for (key, node) in at.node.entries() {
        let entry = at.entry(key, node);
        let both = if entry.is_map() {
            let Some(mut table) = entry.table(sink, "`soft` and `hard`") else { continue };
            let soft = table.take("soft").and_then(|at| at.int(sink, -1..=i64::MAX));
            let hard = table.take("hard").and_then(|at| at.int(sink, -1..=i64::MAX));
            if table.key_spot("soft").is_none() || table.key_spot("hard").is_none() {
                sink.error(
                    &entry.spot,
                    "a limit has `soft` and `hard`",
                    "expected both, or one number",
                );
            }
            table.finish(sink, &[]);
            soft.zip(hard)
        } else {
            entry.int(sink, -1..=i64::MAX).map(|n| (n, n))
        };
        if let Some(both) = both {
            limits.insert(key.text.clone(), both);
        }
    }
    limits
}

pub(super) fn process(at: &At<'_>, reading: Reading<'_>, sink: &mut Sink) -> Option<ProcessSpec> {
    let mut table = at.table(sink, "`cmd`, `env` and `cwd`")?;
    let cmd = table.take("cmd");
    let argv = cmd.as_ref().and_then(|at| at.words(sink)).unwrap_or_default();
    match &cmd {
        None if !reading.whole => {}
        None => {
            sink.error(&at.key_spot(), "`process` has no `cmd`", "expected `cmd: …`");
        }
        Some(cmd) if argv.first().is_none_or(String::is_empty) => {
            // A command line that could not be split was told already.
            if cmd.node.text().is_none_or(|text| shell_words::split(text).is_ok()) {
                sink.error(&cmd.spot, "this command is empty", "expected a program");
            }
        }
        Some(cmd) => check_command(&argv, cmd, sink),
    }
    let spec = ProcessSpec {
        argv,
        env: table.take("env").and_then(|at| at.pairs(sink, Some(reading.env))).unwrap_or_default(),
        cwd: text(&mut table, "cwd", "a folder", sink).map(Into::into),
    };
    table.finish(
        sink,
        &[
            ("command", Unread::Hint("did you mean `cmd`?")),
            ("args", Unread::Hint("arguments are part of `cmd`")),
            ("environment", ENV_HINT),
            ("workdir", Unread::Hint("did you mean `cwd`?")),
            ("working_dir", Unread::Hint("did you mean `cwd`?")),
            ("stop", MODEL_HINT),
            ("port", MODEL_HINT),
            ("health", MODEL_HINT),
        ],
    );
    Some(spec)
}

/// Commands are not run by a shell: a pipe would be handed to the program as an argument.
fn check_command(argv: &[String], cmd: &At<'_>, sink: &mut Sink) {
    let shell = |word: &&String| {
        matches!(word.as_str(), "|" | "||" | "&" | "&&" | ";" | ">" | ">>" | "<" | "2>&1")
    };
    if let Some(word) = argv.iter().find(shell) {
        sink.error(&cmd.spot, format!("`{word}` needs a shell, and commands run without one"), "")
            .help("wrap it: cmd: [sh, -c, \"…\"] (with `exec`, so that signals reach the engine)");
    }
}

pub(super) fn external(at: &At<'_>, reading: Reading<'_>, sink: &mut Sink) -> Option<ExternalSpec> {
    let mut table = at.table(sink, "`url`, `api_key` and `ca`")?;
    let url = match table.take("url") {
        Some(at) => at.parsed(sink, "a URL such as http://10.0.0.2:8000", url),
        None => url_of_environment(&at.spot, reading, sink),
    };
    let is_missing = table.key_spot("url").is_none() && outer_url(reading).is_none();
    if reading.whole && is_missing && !reading.ollama {
        sink.error(&at.key_spot(), "`external` has no `url`", "expected `url: http://host:port`");
    }
    let url = url.or_else(|| (reading.ollama && is_missing).then(|| OLLAMA_URL.to_owned()));
    let spec = ExternalSpec {
        url: url.unwrap_or_default(),
        api_key: text(&mut table, "api_key", "a text such as ${env.NAME}", sink),
        ca: text(&mut table, "ca", "a PEM file with the authority's certificate", sink)
            .map(Into::into),
    };
    if let Some(spot) = table.key_spot("ca")
        && spec.url.starts_with("http://")
    {
        sink.error(&spot, "`ca` is for https", "expected `url: https://host:port`");
    }
    table.finish(sink, &[("key", Unread::Hint("did you mean `api_key`?"))]);
    Some(spec)
}

/// Where Ollama listens if nobody says otherwise.
const OLLAMA_URL: &str = "http://localhost:11434";

/// A model of an Ollama needs no `external:` at all.
pub(super) fn ollama(spot: &Spot, reading: Reading<'_>, sink: &mut Sink) -> ExternalSpec {
    let url = match outer_url(reading) {
        Some(_) => url_of_environment(spot, reading, sink),
        None => Some(OLLAMA_URL.to_owned()),
    };
    ExternalSpec { url: url.unwrap_or_default(), ca: None, api_key: None }
}

fn outer_url(reading: Reading<'_>) -> Option<String> {
    (reading.env)("OLLAMA_BASE_URL").filter(|text| !text.trim().is_empty())
}

/// The swapper service's variable names the server that the models live on.
fn url_of_environment(spot: &Spot, reading: Reading<'_>, sink: &mut Sink) -> Option<String> {
    match url(&outer_url(reading)?) {
        Ok(url) => Some(url),
        Err(hint) => {
            sink.error(spot, "OLLAMA_BASE_URL holds no usable URL", hint);
            None
        }
    }
}

/// What precedes `/v1` of a server that speaks the OpenAI API.
pub(super) fn url(text: &str) -> Result<String, String> {
    let text = any_url(text)?;
    match text.strip_suffix("/v1") {
        Some(base) => Err(format!("leave out `/v1` (requests bring it): `{base}`")),
        None => Ok(text),
    }
}

pub(super) fn any_url(text: &str) -> Result<String, String> {
    let text = text.trim().trim_end_matches('/');
    let example = "expected a URL such as http://10.0.0.2:8000".to_owned();
    let Ok(uri) = text.parse::<http::Uri>() else { return Err(example) };
    let Some(authority) = uri.authority() else {
        let lacks_scheme = text.split_once("://").is_none() && !text.is_empty();
        return Err(if lacks_scheme { format!("did you mean `http://{text}`?") } else { example });
    };
    if authority.as_str().contains('@') {
        return Err("put the credentials into `api_key`, not into the URL".to_owned());
    }
    match uri.scheme_str() {
        Some("http" | "https") => {}
        None => return Err(format!("did you mean `http://{text}`?")),
        Some(_) => return Err("expected http:// or https://".to_owned()),
    }
    let names_port = authority.as_str().len() > authority.host().len();
    if authority.host().is_empty() || names_port && authority.port_u16().is_none() {
        return Err(example);
    }
    if uri.query().is_some() {
        return Err("leave out the query (`?…`)".to_owned());
    }
    Ok(text.to_owned())
}

/// Where an argument stands in the file: its own item if `docker.args` or `process.cmd` is a
/// list, else the whole.
pub(super) fn argument_spot(model: &Node, path: &str, argument: &str) -> Option<Spot> {
    for (part, key) in [("docker", "args"), ("process", "cmd")] {
        let Some(node) = model.get(part).and_then(|node| node.get(key)) else { continue };
        let spot = Spot { place: node.place, path: format!("{path}.{part}.{key}") };
        let at = At { node, spot, key: node.place };
        let super::tree::Kind::List(items) = &node.kind else { return Some(at.spot) };
        let flag = argument.split(['=', ' ']).next().unwrap_or(argument);
        let stands = |text: &str| text == flag || text.starts_with(&format!("{flag}="));
        let found = items.iter().position(|item| item.text().is_some_and(stands));
        return Some(match found {
            Some(i) => at.item(i, &items[i]).spot,
            None => at.spot,
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_scheme_host_port_and_what_precedes_v1() {
        assert_eq!(url("http://10.0.0.2:8000/"), Ok("http://10.0.0.2:8000".to_owned()));
        assert_eq!(url("https://gpu2.lan/api/"), Ok("https://gpu2.lan/api".to_owned()));
        assert!(url("http://a/v1").unwrap_err().contains("`http://a`"));
        assert!(url("https://a/api/v1/").unwrap_err().contains("`https://a/api`"));
        assert!(url("a.lan:8000").unwrap_err().contains("http://a.lan:8000"));
        let credentials = url("http://me:pa55@a:80").unwrap_err();
        assert!(credentials.contains("api_key") && !credentials.contains("pa55"));
        for bad in ["", "http://", "http://a/?b=c", "ftp://a", "http://a:99999", "http://a b"] {
            assert!(url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_argument_is_found_where_it_stands() {
        let (root, _) =
            super::super::tree::parse("docker:\n  args:\n    - --model\n    - x\n    - --port=9\n");
        let place = |argument: &str| {
            let spot = argument_spot(&root, "models.m", argument).expect("docker.args");
            (spot.place.line, spot.path)
        };
        assert_eq!(place("--port"), (5, "models.m.docker.args[2]".to_owned()));
        assert_eq!(place("--port=9"), (5, "models.m.docker.args[2]".to_owned()));
        assert_eq!(place("--port 9"), (5, "models.m.docker.args[2]".to_owned()));
        assert_eq!(place("--other"), (3, "models.m.docker.args".to_owned()));
    }
}
