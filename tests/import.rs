//! `wharf import`: what comes out of other tools' files, what is said of the rest, and that Wharf
//! takes and serves the result.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

mod support;

use std::path::Path;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use support::ports::free_port;
use wharf::cli::check;
use wharf::cli::demo::server::Server;
use wharf::config;
use wharf::config::import::{Imported, Source, convert};

fn source(file: &str) -> Source {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import").join(file);
    Source { file: file.to_owned(), text: std::fs::read_to_string(path).unwrap() }
}

fn import(files: &[&str]) -> Imported {
    let sources: Vec<Source> = files.iter().map(|file| source(file)).collect();
    convert(&sources).unwrap_or_else(|error| panic!("{error}"))
}

/// The result, the report, and what `wharf check` says of it.
fn all_of(imported: &Imported) -> String {
    let env = |name: &str| match name {
        "CLIENT_KEY" | "OPENROUTER_API_KEY" => Some(format!("value-of-{name}")),
        _ => None,
    };
    let loaded = config::parse(&imported.yaml, "models.yaml", &env);
    let outcome = check::outcome("models.yaml", loaded, false);
    assert_eq!(outcome.code, 0, "{}\n{}", imported.yaml, outcome.problems);
    let notes: Vec<String> = imported.notes.iter().map(ToString::to_string).collect();
    format!(
        "{}\n=== {}\n{}\n=== {}\n{}",
        imported.yaml,
        imported.tool,
        notes.join("\n"),
        outcome.result,
        outcome.problems
    )
}

macro_rules! imports {
    ($($name:ident: $files:expr;)*) => {$(
        #[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), all_of(&import(&$files)));
        }
    )*};
}

imports! {
    llama_swap_profiles: ["llama-swap-profiles.yaml"];
    llama_swap_one_port: ["llama-swap-one-port.yaml"];
    llama_swap_groups: ["llama-swap-groups.yaml"];
    llama_swap_matrix: ["llama-swap-matrix.yaml"];
    swapper: ["swapper_config.yaml"];
    pool: ["model_pool_config.json", "model_pool_registry.json"];
    pool_config_alone: ["model_pool_config.json"];
    pool_registry_alone: ["model_pool_registry.json"];
    compose: ["docker-compose.yml"];
}

// contract: CONFIG the four formats are imported
#[test]
fn the_order_of_the_pools_files_does_not_matter() {
    let one = import(&["model_pool_config.json", "model_pool_registry.json"]);
    let other = import(&["model_pool_registry.json", "model_pool_config.json"]);
    let body = |imported: &Imported| imported.yaml.split_once("\n\n").unwrap().1.to_owned();
    assert_eq!(body(&one), body(&other));
}

#[test]
fn what_is_no_known_file_is_refused() {
    let text = |text: &str| Source { file: "x.yaml".to_owned(), text: text.to_owned() };
    let said = |sources: &[Source]| convert(sources).unwrap_err().to_string();
    assert!(said(&[text("a: 1")]).contains("no configuration of a known tool"));
    assert!(said(&[text("models: { a: { engine: vllm } }")]).contains("known tool"), "our own");
    assert!(said(&[text("a: [1")]).contains("x.yaml:1: this `[` is never closed"));
    assert!(said(&[text("swapper: {}")]).contains("no model"));
    let mixed = [source("swapper_config.yaml"), source("model_pool_config.json")];
    assert!(said(&mixed).contains("different tools"));
    let both = [source("swapper_config.yaml"), source("swapper_config.yaml")];
    assert!(said(&both).contains("one by one"));
}

/// A `llama-server` in the PATH that is the stand-in engine.
fn path_with_llama_server(dir: &Path) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let script = dir.join("llama-server");
    let text = format!("#!/bin/sh\nexec {} engine --vram 1GiB \"$@\"\n", support::EXE);
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", dir.display())
}

/// Serves an imported file and asks each model; its ports are chosen by the test.
async fn every_model_answers(imported: &Imported, names: &[&str]) {
    let bin = tempfile::tempdir().unwrap();
    let path = path_with_llama_server(bin.path());
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(
        Path::new(support::EXE),
        dir.path(),
        (free_port(), free_port()),
        &[("PATH", &path)],
        |gateway, orchestrator| {
            let listen = format!(
                "  gateway: 127.0.0.1:{gateway}\n  orchestrator: 127.0.0.1:{orchestrator}\n"
            );
            // The stand-in answers on the usual path only.
            let yaml = imported.yaml.replace("  gateway: 127.0.0.1:8080\n", &listen);
            yaml.replace("/custom-endpoint", "/health")
                + "\nengine_ports: 19000-19019\ngpu: { provider: simulated, memory: [24GiB] }\n"
        },
    )
    .await
    .unwrap_or_else(|error| panic!("{error:?}"));
    for name in names {
        let body = serde_json::json!({
            "model": name, "max_tokens": 2, "messages": [{ "role": "user", "content": "hi" }],
        });
        let client = Client::builder(TokioExecutor::new()).build_http();
        let request = Request::post(format!("{}/v1/chat/completions", server.talk.gateway))
            .body(Full::new(Bytes::from(body.to_string())))
            .unwrap();
        let answer = client.request(request).await.unwrap();
        let status = answer.status();
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(status, 200, "{name}: {}", String::from_utf8_lossy(&text));
    }
    server.stop().await.unwrap();
}

// contract: CONFIG the four formats are imported
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_imported_llama_swap_with_a_profile_serves_every_model() {
    let imported = import(&["llama-swap-profiles.yaml"]);
    every_model_answers(&imported, &["llama", "gpt-4o-mini", "qwen"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn imported_models_on_one_port_serve_one_after_the_other() {
    let imported = import(&["llama-swap-one-port.yaml"]);
    every_model_answers(&imported, &["a", "b", "a"]).await;
}

// contract: CONFIG the four formats are imported
// contract: CLI import
/// The command: what it writes, where, and its exit codes.
#[test]
fn the_command_writes_reports_and_never_overwrites_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("models.yaml");
    let fixture = |file: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import").join(file).display().to_string()
    };
    let run = |args: &[&str]| {
        let output = std::process::Command::new(support::EXE)
            .arg("import")
            .args(args)
            .env_remove("OLLAMA_BASE_URL")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let file = fixture("swapper_config.yaml");
    let to = out.display().to_string();
    let (code, stdout, stderr) = run(&[&file, "-o", &to]);
    assert_eq!((code, stdout.as_str()), (Some(3), ""), "{stderr}");
    assert!(stderr.contains("recognised: the swapper service"), "{stderr}");
    assert!(stderr.contains(":6: swapper.metal_acceleration: "), "{stderr}");
    let written = std::fs::read_to_string(&out).unwrap();
    assert!(written.contains("upstream_name: deepseek-r1:70b"));
    let (code, _, stderr) = run(&[&file, "-o", &to]);
    assert!(code == Some(2) && stderr.contains("cannot write"), "{stderr}");
    assert_eq!(run(&[&file, "-o", &to, "--force"]).0, Some(3));
    let (code, stdout, _) = run(&[&fixture("llama-swap-one-port.yaml")]);
    assert!(code == Some(0) && stdout.contains("mode: single-active"));
    assert_eq!(run(&["/does/not/exist"]).0, Some(2));
    assert_eq!(run(&[concat!(env!("CARGO_MANIFEST_DIR"), "/models.yaml")]).0, Some(1));
}
