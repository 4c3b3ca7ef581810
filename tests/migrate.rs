//! From another tool to Wharf, as its user goes: the example configuration of that tool's own
//! document → `wharf import` → `wharf check` → `wharf serve` → an answer from each model.
//!
//! Nothing of what `wharf import` writes is edited. The commands and servers that the examples name
//! are stand-ins: `llama-server` in the PATH, an Ollama, containers under the documents' names.

#[path = "support/containers.rs"]
mod containers;
mod support;

use std::path::Path;
use std::process::Command;

use http::Method;
use serde_json::{Value, json};
use support::ollama::Ollama;
use support::ports::free_port;
use support::{EXE, World};
use wharf::cli::demo::server::Server;

/// Variables that would lead elsewhere than the test means.
const FOREIGN: [&str; 6] = [
    "OLLAMA_BASE_URL",
    "SWAPPER_CONFIG_PATH",
    "SWAPPER_MODE",
    "MAX_CONCURRENT_MODELS",
    "WHARF_GATEWAY",
    "WHARF_ORCHESTRATOR",
];

fn wharf(dir: &Path, args: &[&str], env: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = Command::new(EXE);
    for name in FOREIGN {
        command.env_remove(name);
    }
    let output =
        command.args(args).current_dir(dir).envs(env.iter().copied()).output().expect("it runs");
    let told = [&output.stdout[..], &output.stderr[..]].concat();
    (output.status.code(), String::from_utf8_lossy(&told).into_owned())
}

/// The way of a user, to the running server. Its two addresses are free ones, by the environment;
/// `change` is for what a user would correct in models.yaml.
async fn migrated(files: &[&str], env: &[(&str, &str)], change: fn(String) -> String) -> World {
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import/documents");
    let dir = tempfile::tempdir().expect("a folder");
    let mut args = vec!["import", "-o", "models.yaml"];
    for file in files {
        std::fs::copy(documents.join(file), dir.path().join(file)).expect("a file");
        args.push(file);
    }
    let (code, told) = wharf(dir.path(), &args, env);
    println!("$ wharf {}\n{told}exit code {code:?}", args.join(" "));
    assert!(matches!(code, Some(0 | 3)), "{told}");
    let yaml = change(std::fs::read_to_string(dir.path().join("models.yaml")).expect("a file"));
    let (code, told) = wharf(dir.path(), &["check"], env);
    println!("$ wharf check\n{told}exit code {code:?}");
    assert_eq!(code, Some(0), "{told}\n{yaml}");
    let ports = (free_port(), free_port());
    let (gateway, orchestrator) =
        (format!("127.0.0.1:{}", ports.0), format!("127.0.0.1:{}", ports.1));
    let mut env = env.to_vec();
    env.push(("WHARF_GATEWAY", &gateway));
    env.push(("WHARF_ORCHESTRATOR", &orchestrator));
    let server = Server::start(Path::new(EXE), dir.path(), ports, &env, |gateway, orchestrator| {
        assert_eq!((gateway, orchestrator), ports, "nobody took them meanwhile");
        yaml
    })
    .await
    .unwrap_or_else(|error| panic!("{error:?}"));
    println!("$ wharf serve");
    World { server, dir }
}

/// `served` is the name under which the stand-in knows the model: its answers begin with it.
async fn answers(world: &World, asked: &str, served: &str) {
    let answer = world.server.talk.chat(asked, false, &[]).await.expect("an answer");
    let beginning: String = answer.text.chars().take(40).collect();
    println!("{asked}: {} {beginning:?} after {:.2} s", answer.status, answer.took.as_secs_f64());
    assert!(answer.is_from(served), "{asked}: {answer:?}\n{}", world.log());
}

async fn row(world: &World, model: &str) -> Value {
    let path = format!("/models/{model}");
    world.server.talk.get(&path).await.expect("its row")
}

/// Puts a `llama-server` into a PATH.
fn path_with(dir: &Path, script: &str) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let file = dir.join("llama-server");
    std::fs::write(&file, format!("#!/bin/bash\n{script}\n")).expect("a file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("a file");
    format!("{}:{}", dir.display(), std::env::var("PATH").unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_llama_swap_serves_each_model_alias_and_profile() {
    let bin = tempfile::tempdir().unwrap();
    let path = path_with(
        bin.path(),
        &format!("exec {EXE} engine --style llamacpp --health-path /custom-endpoint \"$@\""),
    );
    let world = migrated(&["llama-swap.yaml"], &[("PATH", &path)], |yaml| yaml).await;
    for (asked, served) in [
        ("llama", "llama"),
        ("gpt-4o-mini", "llama"),
        ("gpt-3.5-turbo", "llama"),
        ("qwen", "qwen"),
        ("coding/qwen", "qwen"),
        ("coding/llama", "llama"),
    ] {
        answers(&world, asked, served).await;
    }
    assert_eq!(row(&world, "llama").await["ttl_seconds"], 60.0);
    assert_eq!(row(&world, "qwen").await["ttl_seconds"], Value::Null);
    world.stop().await;
}

/// Its weights are not here, and no llama-server has a /custom-endpoint: both are corrected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_llama_swap_serves_with_the_real_llama_server() {
    let (Ok(server), Ok(gguf)) =
        (std::env::var("WHARF_TEST_LLAMA"), std::env::var("WHARF_TEST_GGUF"))
    else {
        return support::skip(
            "llama-swap's example: WHARF_TEST_LLAMA or WHARF_TEST_GGUF is not set",
        );
    };
    let bin = tempfile::tempdir().unwrap();
    let script = format!(
        "case \"$*\" in *Qwen*) weights=bob ;; *) weights=ada ;; esac\nargs=()\n\
         while [ $# -gt 0 ]; do case \"$1\" in -m|--model) shift 2 ;; *) args+=(\"$1\"); shift ;; esac; done\n\
         exec {server} -m {gguf}/$weights.gguf -t 1 -tb 1 \"${{args[@]}}\""
    );
    let path = path_with(bin.path(), &script);
    let change = |yaml: String| yaml.replace("/custom-endpoint", "/health");
    let world = migrated(&["llama-swap.yaml"], &[("PATH", &path)], change).await;
    for (asked, served) in [("llama", "ada"), ("qwen", "bob"), ("gpt-4o-mini", "ada")] {
        answers(&world, asked, served).await;
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_the_swapper_service_serves_its_model_of_an_ollama() {
    let ollama = Ollama::start(&["--name", "deepseek-r1:70b", "--load", "100ms"]).await;
    let env = [("OLLAMA_BASE_URL", ollama.url.as_str())];
    let world = migrated(&["swapper_config.yaml"], &env, |yaml| yaml).await;
    answers(&world, "deepseek-r1-70b", "deepseek-r1:70b").await;
    assert_eq!(ollama.loaded().await, ["deepseek-r1:70b"]);
    let shown = row(&world, "deepseek-r1-70b").await;
    assert_eq!(shown["ollama_name"], "deepseek-r1:70b");
    assert_eq!(shown["status"], "loaded");
    assert_eq!(world.status().await["mode"], "single-active");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_of_the_model_pool_manager_serves_each_model_at_its_own_port() {
    const MODELS: [&str; 4] =
        ["qwen2.5-coder:7b", "llama3.1:8b", "deepseek-coder-v2:16b", "codellama:13b"];
    let names: Vec<&str> = MODELS.iter().flat_map(|name| ["--name", *name]).collect();
    let ollama = Ollama::start(&[&names[..], &["--load", "100ms"]].concat()).await;
    let env = [("OLLAMA_BASE_URL", ollama.url.as_str())];
    let files = ["model_pool_config.json", "model_pool_registry.json"];
    let world = migrated(&files, &env, |yaml| yaml).await;
    // Both are loaded at start, as the document shows, on a machine without a GPU as well.
    world
        .until("the warm-up models are ready", |status| {
            MODELS[..2].iter().all(|model| status["models"][*model]["state"] == "ready")
        })
        .await;
    let health = world.server.talk.get("/health").await.unwrap();
    assert_eq!((&health["active_models"], &health["total_models"]), (&json!(2), &json!(4)));
    let mut ports = Vec::new();
    for model in MODELS {
        answers(&world, model, model).await;
        let shown = row(&world, model).await;
        let port = shown["port"].as_u64().expect("a port");
        assert!((8051..=8099).contains(&port), "{shown:#}");
        let mut door = world.server.talk.clone();
        door.orchestrator = format!("http://127.0.0.1:{port}");
        let body = json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] });
        let (status, answer) =
            door.call(Method::POST, "/v1/chat/completions", body).await.expect("an answer");
        let content = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default();
        assert!(status == 200 && content.starts_with(&format!("{model}-1")), "{answer:#}");
        println!("{model}: at port {port}, too");
        ports.push(port);
    }
    // 8051 and 8052 where nobody has them, as the document assigns them.
    assert!(ports.is_sorted(), "{ports:?}");
    let mut loaded = ollama.loaded().await;
    loaded.sort();
    assert_eq!(loaded.len(), 4, "five may be loaded at once: {loaded:?}");
    let ttl = |shown: &Value| shown["ttl_remaining_minutes"].as_f64().unwrap();
    assert_eq!(ttl(&row(&world, MODELS[0]).await), 0.0, "kept");
    let left = ttl(&row(&world, MODELS[3]).await);
    assert!((14.0..=15.0).contains(&left), "{left}");
    world.stop().await;
}

/// It has names of containers only; this is the Compose file that makes them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_containers_of_the_dynamic_model_orchestrator_serve_one_after_the_other() {
    use containers::{Daemon, STANDIN, standin_args};
    let test = "the dynamic model orchestrator's containers";
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", test) else { return };
    daemon.with_standin();
    let models =
        [("mistral", "mistral"), ("llava", "llava-hf/llava-1.5-7b-hf"), ("coder", "coder")];
    let _made = models.map(|(name, served)| {
        let container = format!("{name}-llm");
        // What a run of this test left that was cut off.
        let _ = daemon.try_docker(&["rm", "-f", &container]);
        let args = standin_args(served, "--style vllm --load 200ms");
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let create = ["create", "--name", &container, "-p", "127.0.0.1::8000", STANDIN];
        daemon.docker(&[&create[..], &args].concat());
        Made { daemon: daemon.clone(), container }
    });
    let env = [("DOCKER_HOST", daemon.host.as_str())];
    let world = migrated(&["docker-compose.yml"], &env, |yaml| yaml).await;
    for (name, served) in models.iter().chain(&models[..1]) {
        answers(&world, name, served).await;
        let running = daemon.docker(&["ps", "--format", "{{.Names}}", "--filter", "name=-llm"]);
        assert_eq!(running, format!("{name}-llm"), "one at a time, as before");
    }
    // An instance of the machine's own Docker outlives Wharf, as ever.
    world.server.stop().await.expect("a clean stop");
}

struct Made {
    daemon: containers::Daemon,
    container: String,
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = self.daemon.try_docker(&["rm", "-f", &self.container]);
    }
}
