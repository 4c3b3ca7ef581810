//! The curl lines of the four older tools' documents, run with curl against a Wharf that is
//! configured as each of them was: each answer has the documented fields.
//!
//! tests/seeds/*.txt hold the lines as they are printed there: `$` a line, `>` fields of its JSON
//! (`a.b`, `a[].b`: of the first entry), `~` text in it, `@ stream` it does not end.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::ollama::Ollama;
use support::ports::free_ports;
use support::{World, gpu, serve, standin};

const DOCUMENTS: [&str; 4] =
    ["dynamic-model-orchestrator", "swapper-service", "model-pool-manager", "llama-swap"];

/// Front doors, from the document's 8051 on.
const DOORS: u16 = 8;

/// What the documents' Ollama has.
const OLLAMAS: [&str; 14] = [
    "--name",
    "deepseek-r1:70b",
    "--name",
    "qwen2.5-coder:32b",
    "--name",
    "qwen2.5-coder:7b",
    "--name",
    "llama3.1:8b",
    "--name",
    "deepseek-coder-v2:16b",
    "--name",
    "codellama:13b",
    "--name",
    "starcoder2:3b",
];

#[derive(Debug, Default)]
struct Line {
    command: String,
    fields: Vec<String>,
    texts: Vec<String>,
    is_stream: bool,
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
            _ => assert!(row.is_empty() || row.starts_with('#'), "{document}: {row}"),
        }
    }
    lines
}

/// A document's configuration, in Wharf's words.
fn configuration(document: &str, ollama: &Ollama, doors: u16) -> (String, String) {
    let ollama = |name: &str, known_as: &str, more: &str| {
        format!(
            "  {name}: {{ engine: ollama, upstream_name: \"{known_as}\", external: {{ url: \"{}\" \
             }}{more} }}\n",
            ollama.url
        )
    };
    let engine = |name: &str, style: &str, more: &str| {
        let styled = standin(name, "20GiB", &format!("--style {style} --load 50ms"));
        styled.replace("engine: openai", &format!("engine: {style}")) + more
    };
    let blind = "gpu: { provider: none }\nswap: { mode: single-active }";
    match document {
        "dynamic-model-orchestrator" => {
            let models = ["mistral", "llava", "coder"].map(|name| engine(name, "vllm", ""));
            (gpu("24GiB", "10ms"), models.concat())
        }
        "swapper-service" => {
            let models = ollama(
                "deepseek-r1-70b",
                "deepseek-r1:70b",
                ", type: llm, size_gb: 42, priority: high",
            ) + &ollama("qwen2.5-coder-32b", "qwen2.5-coder:32b", ", type: code");
            (blind.to_owned(), models)
        }
        "model-pool-manager" => {
            let code = ", warmup: true, priority: high, name: Qwen 2.5 Coder 7B, type: code, \
                        tags: [code, python, fast]";
            let models = [
                ollama("qwen2.5-coder:7b", "qwen2.5-coder:7b", code),
                ollama("llama3.1:8b", "llama3.1:8b", ", warmup: true"),
                ollama("deepseek-coder-v2:16b", "deepseek-coder-v2:16b", ""),
                ollama("codellama:13b", "codellama:13b", ""),
            ];
            let template = ollama("small", "${model}", "");
            let settings = format!(
                "gpu: {{ provider: none, memory: [32GiB] }}\n\
                 swap: {{ max_concurrent_models: 5, shutdown_timeout: 30s }}\n\
                 ports: {doors}-{}\ncheck_interval: 30s\n\
                 defaults: {{ ttl: 15m, grace: 2m, vram: 4GiB, ttl_bounds: {{ min: 5m, max: 60m }} }}\n\
                 registration: {{ templates: [small] }}\ntemplates:\n{template}",
                doors + DOORS - 1
            );
            (settings, models.concat())
        }
        "llama-swap" => {
            let aliases = "    aliases: [gpt-4o-mini, gpt-3.5-turbo]\n    ttl: 60s\n";
            let models = engine("llama", "llamacpp", aliases) + &engine("qwen", "llamacpp", "");
            let settings = gpu("48GiB", "10ms")
                + "\ngroups: { coding: { models: [qwen, llama], together: true } }\n\
                   captures: { enabled: true }";
            (settings, models)
        }
        _ => panic!("no configuration for {document}"),
    }
}

/// The documents' addresses → those of this test.
async fn rewritten(command: &str, world: &World, ollama: &Ollama, doors: u16) -> String {
    let talk = &world.server.talk;
    let mut command = command.replace("http://host/", &format!("{}/", talk.gateway));
    command = command.replace("http://localhost:8080", &talk.gateway);
    command = command.replace("http://localhost:11434", &ollama.url);
    for orchestrator in ["8888", "8890", "8050"] {
        command = command.replace(&format!("http://localhost:{orchestrator}"), &talk.orchestrator);
    }
    // Two ports are assigned, the third is allocated: a client reads of it in `endpoint`.
    for (at, documented) in ["http://localhost:8051", "http://localhost:8052"].iter().enumerate() {
        let door = usize::from(doors) + at;
        command = command.replace(documented, &format!("http://127.0.0.1:{door}"));
    }
    if command.contains("http://localhost:8053") {
        let row = talk.get("/models/deepseek-coder-v2:16b").await.expect("its row");
        let endpoint = row["endpoint"].as_str().expect("an endpoint");
        command = command.replace("http://localhost:8053", endpoint);
    }
    assert!(!command.contains("localhost"), "no address for {command}");
    command
}

fn run(command: &str, is_stream: bool) -> Output {
    // Streams are read for as long as the first answer takes, also on a busy machine.
    let limit = if is_stream { 10 } else { 60 };
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

async fn document(document: &str, lines: &[Line]) -> Vec<String> {
    let doors = free_ports(DOORS);
    let ollama = Ollama::start(&OLLAMAS).await;
    let (settings, models) = configuration(document, &ollama, doors);
    let world = serve(&settings, &models, &[]).await;
    if document == "model-pool-manager" {
        let ready = |status: &Value, model: &str| status["models"][model]["state"] == "ready";
        world
            .until("the warm-up models are ready", |status| {
                ready(status, "qwen2.5-coder:7b") && ready(status, "llama3.1:8b")
            })
            .await;
    }
    let mut wrongs = Vec::new();
    for line in lines {
        let command = rewritten(&line.command, &world, &ollama, doors).await;
        let (shown, is_stream) = (command.clone(), line.is_stream);
        let output = tokio::task::spawn_blocking(move || run(&command, is_stream));
        match wrong(line, &output.await.expect("bash ran")) {
            None => println!("ok     {document}: {}", line.command),
            Some(why) => {
                println!("WRONG  {document}: {}", line.command);
                wrongs.push(format!("{document}: {}\n    as {shown}\n    {why}", line.command));
            }
        }
    }
    if !wrongs.is_empty() {
        wrongs.push(world.log());
    }
    world.stop().await;
    wrongs
}

// contract: GET /health
// contract: GET /status
// contract: GET /metrics
// contract: POST /ensure_model
// contract: GET /models
// contract: GET /models/{name}
// contract: POST /models/{name}/load
// contract: POST /models/{name}/unload
// contract: GET /metrics/{name}
// contract: POST /models/register
// contract: DELETE /models/{id}
// contract: POST /models/{id}/extend-ttl
// contract: GET /models/{id}/health
// contract: GET /config
// contract: PATCH /config
// contract: ports 8051–8099
// contract: GET /logs
// contract: GET /log
// contract: GET /logs/stream
// contract: GET /logs/streamSSE
// contract: GET /running
// contract: GET /unload
// contract: RULE control bodies are JSON whatever their content type
// contract: RULE group/model is a name
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lines_of_the_older_tools_documents_work() {
    if Command::new("curl").arg("--version").output().is_err() {
        support::skip("the documents' curl lines: curl is not installed");
        return;
    }
    let (mut ran, mut wrongs) = (0, Vec::new());
    for name in DOCUMENTS {
        let lines = lines(name);
        assert!(lines.len() > 5, "{name}: {} lines", lines.len());
        ran += lines.len();
        wrongs.extend(document(name, &lines).await);
    }
    println!("{ran} lines of {} documents ran", DOCUMENTS.len());
    assert!(wrongs.is_empty(), "\n{}", wrongs.join("\n"));
}
