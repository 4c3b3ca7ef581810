//! The OpenAPI document against a running Wharf: a fuzzer makes requests from it, and compares what
//! it gets with what is written there. Needs WHARF_TEST_PYTHON with schemathesis; the test command
//! sets it. WHARF_FUZZ_EXAMPLES, WHARF_FUZZ_SEED and WHARF_FUZZ_CHECKS are for a longer look.

mod support;

use std::path::Path;

use support::ports::free_port;
use support::{EXE, World, gpu, serve, standin};
use wharf::cli::demo::server::Server;

const KEY: &str = "key-for-the-fuzzer-001";
const CHECKS: &str = "status_code_conformance,content_type_conformance,\
                      response_headers_conformance,response_schema_conformance,ignored_auth,\
                      negative_data_rejection";
/// Streams that do not end; `tests/events.rs` reads them.
const ENDLESS: &str = "^/(events|api/events|logs/stream.*)$";

/// Both listeners at one address, so that one run reaches all that is described.
async fn whole(dir: &Path) -> Server {
    let port = free_port();
    let models = standin("ada", "6GiB", "--load 20ms")
        + &standin("org/bob:7b", "6GiB", "--load 20ms")
        + &standin("cleo", "14GiB", "--load 20ms")
        + &standin("broken", "2GiB", "--load 10ms --fatal-line 'CUDA out of memory' --exit-code 1");
    let template = format!(
        "templates:\n  small:\n    engine: openai\n    vram: 1GiB\n    process: {{ cmd: \"{EXE} \
         engine --host 127.0.0.1 --port ${{PORT}} --name ${{model}} --vram 1GiB\" }}\n"
    );
    Server::start(Path::new(EXE), dir, (port, port), &[], |gateway, orchestrator| {
        assert_eq!(gateway, orchestrator, "somebody else took the port");
        format!(
            "listen: {{ gateway: 127.0.0.1:{gateway}, orchestrator: 127.0.0.1:{gateway} }}\n\
             engine_ports: 27000-27199\n{}\nqueue: {{ timeout: 2s }}\n\
             swap: {{ min_residency: 0s, start_timeout: 5s }}\nregistration: {{ templates: [small] }}\n\
             auth: {{ keys: [{{ name: fuzzer, key: {KEY}, models: [\"*\"], scopes: [inference, admin] }}] }}\n\
             {template}models:\n{models}",
            gpu("24GiB", "5ms")
        )
    })
    .await
    .unwrap_or_else(|error| panic!("{error:?}"))
}

// contract: GET /openapi.json
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_fuzzer_sends_is_answered_as_the_document_says() {
    let Ok(python) = std::env::var("WHARF_TEST_PYTHON") else {
        support::skip("schemathesis over /openapi.json: WHARF_TEST_PYTHON is not set");
        return;
    };
    let dir = tempfile::tempdir().expect("a folder");
    let world = World { server: whole(dir.path()).await, dir };
    let url = format!("{}/openapi.json", world.server.talk.gateway);
    let set = |name: &str, usual: &str| std::env::var(name).unwrap_or_else(|_| usual.to_owned());
    let (examples, seed) = (set("WHARF_FUZZ_EXAMPLES", "8"), set("WHARF_FUZZ_SEED", "1"));
    let checks = set("WHARF_FUZZ_CHECKS", CHECKS);
    let hooks = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fuzz.py");
    let output = tokio::process::Command::new(python)
        .args(["-m", "schemathesis.cli", "run", &url, "--checks", &checks, "--seed", &seed])
        .args(["--max-examples", &examples, "--phases", "examples,coverage,fuzzing"])
        .args(["--exclude-path-regex", ENDLESS, "--request-timeout", "30", "--workers", "2"])
        .args(["-H", &format!("Authorization: Bearer {KEY}"), "--warnings", "off"])
        .args(["--continue-on-failure", "--suppress-health-check", "all", "--no-color"])
        .env("SCHEMATHESIS_HOOKS", hooks)
        .env("WHARF_FUZZ_NAMES", "ada,org/bob:7b,cleo,broken,nobody")
        .current_dir(world.dir.path())
        .output()
        .await
        .expect("python");
    let report = String::from_utf8_lossy(&output.stdout);
    if report.is_empty() && String::from_utf8_lossy(&output.stderr).contains("No module named") {
        support::skip("schemathesis over /openapi.json: it is not installed");
        return;
    }
    println!("{report}");
    assert!(
        output.status.success(),
        "{report}\n{}\n{}",
        String::from_utf8_lossy(&output.stderr),
        world.log()
    );
    world.stop().await;
}

/// Both listeners give it, without a key, and it is the same.
// contract: GET /openapi.json
#[tokio::test]
async fn the_document_is_there_for_everybody_on_both_listeners() {
    let settings = format!(
        "{}\nauth: {{ keys: [{{ name: a, key: {KEY}, models: [\"*\"], scopes: [admin] }}] }}",
        gpu("24GiB", "5ms")
    );
    let world = serve(&settings, &standin("ada", "6GiB", ""), &[]).await;
    let document = world.server.talk.get("/openapi.json").await.expect("a document");
    assert_eq!(document["openapi"], "3.1.0");
    let load = &document["paths"]["/models/{name}/load"]["post"];
    assert_eq!(load["x-wharf-scope"], "admin");
    assert_eq!(load["x-wharf-listeners"], serde_json::json!(["orchestrator"]));
    let chat = &document["paths"]["/v1/chat/completions"]["post"];
    assert_eq!(chat["x-wharf-scope"], "inference");
    assert!(chat["responses"]["429"]["headers"]["Retry-After"].is_object(), "{chat:#}");
    let mut gateway = world.server.talk.clone();
    gateway.orchestrator = gateway.gateway.clone();
    assert_eq!(gateway.get("/openapi.json").await.expect("a document"), document);
    world.stop().await;
}
