//! The curl lines of the four older tools' documents, run with curl against one Wharf that is
//! configured as theirs were: each answer has the documented fields.
//!
//! tests/seeds/*.txt hold the lines as they are printed there: `$` a line, `>` fields of its JSON
//! (`a.b`, `a[].b`: of the first entry), `~` text in it, `@ stream` it does not end, `? part` it
//! waits for [`PENDING`], `!` it asks another program.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::{gpu, serve, standin};

/// THE SWITCH: parts that are not there yet. Remove an entry, and its lines are run.
const PENDING: [(&str, &str); 5] = [
    ("front-doors", "one listener per model"),
    ("extend-ttl", "TTLs are not extended by hand yet"),
    ("register", "models are not registered yet"),
    ("config", "GET and PATCH /config"),
    ("profiles", "groups as profile/model"),
];

const DOCUMENTS: [&str; 4] =
    ["dynamic-model-orchestrator", "swapper-service", "model-pool-manager", "llama-swap"];

/// Which model the pool manager's own ports lead to.
const POOL_PORTS: [(&str, &str); 3] =
    [("8051", "qwen2.5-coder:7b"), ("8052", "llama3.1:8b"), ("8053", "deepseek-coder-v2:16b")];

#[derive(Debug, Default)]
struct Line {
    command: String,
    fields: Vec<String>,
    texts: Vec<String>,
    is_stream: bool,
    waits_for: Option<String>,
}

fn lines(document: &str) -> Vec<Line> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/seeds/{document}.txt"));
    let text = std::fs::read_to_string(path).expect("a list of lines");
    let mut lines: Vec<Line> = Vec::new();
    for row in text.lines() {
        let (mark, rest) = row.split_at_checked(2).unwrap_or((row, ""));
        let line = lines.last_mut();
        match (mark, line) {
            ("$ ", _) => lines.push(Line { command: rest.to_owned(), ..Line::default() }),
            ("> ", Some(line)) => line.fields.extend(rest.split(' ').map(str::to_owned)),
            ("~ ", Some(line)) => line.texts.push(rest.to_owned()),
            ("@ ", Some(line)) => line.is_stream = rest == "stream",
            ("? ", Some(line)) => line.waits_for = Some(rest.to_owned()),
            ("! ", _) => println!("{document}: not Wharf's: {rest}"),
            _ => assert!(row.is_empty() || row.starts_with('#'), "{document}: {row}"),
        }
    }
    lines
}

/// The documents' models, equivalent to their configurations.
fn models() -> String {
    let with = |name: &str, more: &str| standin(name, "2GiB", "--load 50ms") + more;
    let plain = ["mistral", "llava", "coder", "qwen"].map(|name| with(name, ""));
    let pool = "    ttl: 15m\n    type: code\n    tags: [code, python]\n";
    [
        plain.concat(),
        with("llama", "    aliases: [gpt-4o-mini, gpt-3.5-turbo]\n    ttl: 60s\n"),
        with("deepseek-r1-70b", "    size_gb: 42\n    priority: high\n    type: llm\n"),
        with("qwen2.5-coder:7b", "    warmup: true\n    type: code\n    tags: [code, fast]\n"),
        with("llama3.1:8b", "    warmup: true\n"),
        with("deepseek-coder-v2:16b", pool),
        with("codellama:13b", pool),
    ]
    .concat()
}

/// The documents' addresses → those of this test.
fn rewritten(command: &str, world: &support::World, ports: &[(&str, String)]) -> String {
    let talk = &world.server.talk;
    let mut command = command.replace("http://host/", &format!("{}/", talk.gateway));
    command = command.replace("http://localhost:8080", &talk.gateway);
    for orchestrator in ["8888", "8890", "8050"] {
        command = command.replace(&format!("http://localhost:{orchestrator}"), &talk.orchestrator);
    }
    for (port, endpoint) in ports {
        command = command.replace(&format!("http://localhost:{port}"), endpoint);
    }
    assert!(!command.contains("localhost"), "no address for {command}");
    command
}

fn run(command: &str, is_stream: bool) -> Output {
    // Streams are read for as long as the first answer takes.
    let limit = if is_stream { 3 } else { 60 };
    let script = format!(
        "set -o pipefail\n\
         curl() {{ command curl -sS --fail-with-body --max-time {limit} \"$@\"; }}\n\
         command -v jq >/dev/null || jq() {{ cat; }}\n\
         {command}\n"
    );
    Command::new("bash").args(["-c", &script]).output().expect("bash")
}

/// `a[].b`: of the first entry.
fn field<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let mut value = value;
    for step in path.split('.') {
        let (name, first) = step.strip_suffix("[]").map_or((step, false), |name| (name, true));
        if !name.is_empty() {
            value = value.get(name)?;
        }
        if first {
            value = value.get(0)?;
        }
    }
    Some(value)
}

fn wrong(line: &Line, output: &Output) -> Option<String> {
    const TIMED_OUT: i32 = 28;
    let text = String::from_utf8_lossy(&output.stdout);
    let code = output.status.code().unwrap_or(-1);
    let expected = if line.is_stream { TIMED_OUT } else { 0 };
    if code != expected {
        return Some(format!(
            "exit code {code}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    if let Some(missing) = line.texts.iter().find(|wanted| !text.contains(wanted.as_str())) {
        return Some(format!("no {missing:?} in {text}"));
    }
    if line.fields.is_empty() {
        return None;
    }
    let Ok(body) = serde_json::from_str::<Value>(&text) else {
        return Some(format!("not JSON: {text}"));
    };
    let missing: Vec<&String> =
        line.fields.iter().filter(|path| field(&body, path).is_none()).collect();
    (!missing.is_empty()).then(|| format!("no {missing:?} in {text}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lines_of_the_older_tools_documents_work() {
    if Command::new("curl").arg("--version").output().is_err() {
        support::skip("the documents' curl lines: curl is not installed");
        return;
    }
    let world = serve(&gpu("24GiB", "10ms"), &models(), &[]).await;
    world
        .until("the warm-up models are ready", |status| {
            ["qwen2.5-coder:7b", "llama3.1:8b"]
                .iter()
                .all(|model| status["models"][model]["state"] == "ready")
        })
        .await;
    let (mut ran, mut wrongs, mut pending) = (0, Vec::new(), Vec::new());
    for document in DOCUMENTS {
        for line in lines(document) {
            let waits_for = line
                .waits_for
                .as_deref()
                .and_then(|part| PENDING.iter().find(|(pending, _)| *pending == part));
            if let Some((part, why)) = waits_for {
                pending.push(format!("{document}: {} ({part}: {why})", line.command));
                continue;
            }
            // Front doors come and go with the configuration: asked anew for each line.
            let rows = world.server.talk.get("/models").await.expect("/models");
            let ports = POOL_PORTS.map(|(port, model)| {
                let rows = rows["models"].as_array().expect("rows");
                let row = rows.iter().find(|row| row["model_id"] == model).expect("configured");
                (port, row["endpoint"].as_str().expect("an endpoint").to_owned())
            });
            let command = rewritten(&line.command, &world, &ports);
            let is_stream = line.is_stream;
            let shown = command.clone();
            let output = tokio::task::spawn_blocking(move || run(&command, is_stream));
            ran += 1;
            match wrong(&line, &output.await.expect("bash ran")) {
                None => println!("ok       {document}: {}", line.command),
                Some(why) => {
                    wrongs.push(format!("{document}: {}\n    as {shown}\n    {why}", line.command))
                }
            }
        }
    }
    for line in &pending {
        println!("PENDING  {line}");
    }
    println!("{ran} lines ran, {} pending, {} wrong", pending.len(), wrongs.len());
    assert!(wrongs.is_empty(), "\n{}\n{}", wrongs.join("\n"), world.log());
    world.stop().await;
}

#[test]
fn every_pending_part_is_waited_for() {
    let lines: Vec<Line> = DOCUMENTS.iter().flat_map(|document| lines(document)).collect();
    for (part, _) in PENDING {
        let waits = |line: &Line| line.waits_for.as_deref() == Some(part);
        assert!(lines.iter().any(waits), "{part}: no line waits for it any more");
    }
}
