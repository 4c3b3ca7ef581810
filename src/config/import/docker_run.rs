//! `docker run …` → the `docker:` part of a model.

use super::yaml::{Entry, Out};

/// What a command line says.
#[derive(Default)]
pub(super) struct DockerRun {
    pub image: String,
    pub entries: Vec<Entry>,
    /// From `--gpus`.
    pub gpus: Option<Out>,
    /// Options that have no equivalent.
    pub left: Vec<String>,
}

/// `None`: the words are no `docker run`, or name no image.
pub(super) fn read(words: &[String]) -> Option<DockerRun> {
    let program = words.first()?.rsplit('/').next()?;
    if !matches!(program, "docker" | "podman") || words.get(1)? != "run" {
        return None;
    }
    let mut run = DockerRun::default();
    let mut lists = Lists::default();
    let mut at = 2;
    while let Some(word) = words.get(at).filter(|word| word.starts_with('-')) {
        at += 1;
        let (name, joined) = match word.split_once('=') {
            Some((name, value)) if word.starts_with("--") => (name, Some(value.to_owned())),
            _ => (word.as_str(), None),
        };
        if ALONE.contains(&name) {
            option(name, joined.as_deref().unwrap_or("true"), &mut run, &mut lists);
            continue;
        }
        let value = match joined {
            Some(value) => value,
            None => {
                at += 1;
                words.get(at - 1)?.clone()
            }
        };
        option(name, &value, &mut run, &mut lists);
    }
    run.image = words.get(at)?.clone();
    run.entries.insert(0, Entry::new("image", Out::text(&run.image)));
    if let Some(port) = lists.port {
        run.entries.push(Entry::new("port", Out::plain(port)));
    }
    for (key, values) in [("volumes", lists.volumes), ("env", lists.env), ("labels", lists.labels)]
    {
        if !values.is_empty() {
            run.entries.push(Entry::new(key, Out::texts(values)));
        }
    }
    let args = &words[at + 1..];
    if !args.is_empty() {
        run.entries.push(Entry::new("args", Out::texts(args)));
    }
    Some(run)
}

/// Options without a value.
const ALONE: [&str; 10] = [
    "--rm",
    "--init",
    "-d",
    "--detach",
    "-i",
    "-t",
    "-it",
    "--interactive",
    "--tty",
    "--privileged",
];

#[derive(Default)]
struct Lists {
    volumes: Vec<String>,
    env: Vec<String>,
    labels: Vec<String>,
    port: Option<String>,
}

fn option(name: &str, value: &str, run: &mut DockerRun, lists: &mut Lists) {
    let text = |key: &str, run: &mut DockerRun| run.entries.push(Entry::new(key, Out::text(value)));
    match name {
        // Wharf names its containers, removes them, and sees their output.
        "--rm" | "--name" | "-d" | "--detach" | "-i" | "-t" | "-it" | "--interactive" | "--tty"
        | "--restart" => {}
        "--init" => run.entries.push(Entry::new("init", Out::plain("true"))),
        "-p" | "--publish" => {
            let inside = value.rsplit(':').next().unwrap_or(value);
            lists.port = Some(inside.split('/').next().unwrap_or(inside).to_owned());
        }
        "-v" | "--volume" => lists.volumes.push(value.to_owned()),
        "-e" | "--env" => lists.env.push(value.to_owned()),
        "-l" | "--label" => lists.labels.push(value.to_owned()),
        "--ipc" => text("ipc", run),
        "--shm-size" => text("shm_size", run),
        "--network" | "--net" if value != "host" => text("network", run),
        "--runtime" => text("runtime", run),
        "-u" | "--user" => text("user", run),
        "--memory" | "-m" => text("memory", run),
        "--entrypoint" => {
            run.entries.push(Entry::new("entrypoint", Out::texts([value])));
        }
        "--pull" => text("pull", run),
        "--gpus" => run.gpus = gpus(value),
        _ => {
            run.left.push(if value == "true" { name.to_owned() } else { format!("{name} {value}") })
        }
    }
}

/// `all` says nothing of how many: Wharf chooses.
fn gpus(value: &str) -> Option<Out> {
    let value = value.trim_matches(['"', '\'']);
    if let Some(devices) = value.strip_prefix("device=") {
        return Some(Out::List(
            devices.split(',').map(|id| Out::as_written(id.to_owned())).collect(),
        ));
    }
    value.parse::<u16>().ok().map(|count| Out::plain(count.to_string()))
}
