//! The stand-in engine as its users see it: a process with an HTTP port.

#[path = "support/engine.rs"]
mod support;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use support::{DEADLINE, free_port, healthy, http, send, until};

struct Engine {
    child: Child,
    port: u16,
}

impl Engine {
    fn start(args: &[&str]) -> Engine {
        Engine::start_with(args, &[])
    }

    fn start_with(args: &[&str], env: &[(&str, &str)]) -> Engine {
        let port = free_port();
        let child = Command::new(env!("CARGO_BIN_EXE_wharf"))
            .args(["engine", "--port", &port.to_string()])
            .args(args)
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the engine starts");
        Engine { child, port }
    }

    async fn ready(args: &[&str]) -> Engine {
        let engine = Engine::start(args);
        healthy(engine.port).await;
        engine
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().expect("it runs") as i32)
    }

    async fn line(&mut self, part: &str) -> String {
        let mut lines = BufReader::new(self.child.stdout.take().expect("stdout")).lines();
        let find = async {
            while let Some(line) = lines.next_line().await.expect("readable") {
                if line.contains(part) {
                    return line;
                }
            }
            panic!("no line with {part:?}")
        };
        tokio::time::timeout(DEADLINE, find).await.expect("in time")
    }

    async fn code(&mut self) -> Option<i32> {
        tokio::time::timeout(DEADLINE, self.child.wait())
            .await
            .expect("it ends")
            .expect("status")
            .code()
    }

    async fn chat(&self, body: &str) -> (u16, String) {
        http(self.port, "POST", "/v1/chat/completions", body).await.expect("an answer")
    }
}

/// A stream that has begun: at least its first token has come.
async fn open_stream(port: u16) -> TcpStream {
    let body = r#"{"stream":true,"max_tokens":100000}"#;
    let mut stream = send(port, "POST", "/v1/chat/completions", body).await.expect("sent");
    let mut seen = String::new();
    while !seen.contains("standin-1") {
        let mut buffer = [0; 4096];
        let read = stream.read(&mut buffer).await.expect("readable");
        assert!(read > 0, "it ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    stream
}

// contract: CLI engine
#[tokio::test]
async fn a_reply_names_its_model_and_keeps_to_max_tokens() {
    let engine = Engine::ready(&["--name", "coder", "--name", "org/coder:7b"]).await;
    let (status, body) = engine
        .chat(r#"{"model":"org/coder:7b","max_tokens":3,"messages":[{"role":"user","content":"one two"}]}"#)
        .await;
    let answer: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(status, 200);
    assert_eq!(
        answer["choices"][0]["message"]["content"],
        "org/coder:7b-1 org/coder:7b-2 org/coder:7b-3"
    );
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["prompt_tokens"], 2);
    assert_eq!(answer["usage"]["completion_tokens"], 3);

    let (status, body) = engine.chat(r#"{"model":"mistral"}"#).await;
    assert_eq!(status, 404);
    assert!(body.contains("NotFoundError") && body.contains("mistral"), "{body}");
    assert_eq!(engine.chat("{").await.0, 400);
}

#[tokio::test]
async fn a_stream_ends_with_usage_if_asked_for() {
    let engine = Engine::ready(&["--name", "m"]).await;
    let (_, body) = engine
        .chat(r#"{"stream":true,"max_tokens":2,"stream_options":{"include_usage":true}}"#)
        .await;
    let events: Vec<&str> =
        body.lines().filter_map(|line| line.trim().strip_prefix("data: ")).collect();
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str(event).expect("JSON"))
        .collect();
    let text: String =
        chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "m-1 m-2");
    assert_eq!(chunks.last().expect("chunks")["usage"]["completion_tokens"], 2);

    let (_, body) = engine.chat(r#"{"stream":true,"max_tokens":2}"#).await;
    assert!(!body.contains("usage") && body.contains("[DONE]"), "{body}");
}

#[tokio::test]
async fn embeddings_follow_from_model_and_text() {
    let engine = Engine::ready(&["--name", "m"]).await;
    let embed = async |body: &str| {
        let (status, body) =
            http(engine.port, "POST", "/v1/embeddings", body).await.expect("an answer");
        assert_eq!(status, 200);
        serde_json::from_str::<Value>(&body).expect("JSON")["data"].clone()
    };
    let both = embed(r#"{"model":"m","input":["a","b"]}"#).await;
    assert_eq!(both.as_array().map(Vec::len), Some(2));
    assert_ne!(both[0]["embedding"], both[1]["embedding"]);
    assert_eq!(embed(r#"{"model":"m","input":"a"}"#).await[0]["embedding"], both[0]["embedding"]);
}

#[tokio::test]
async fn vllm_refuses_connections_while_it_loads() {
    let mut engine = Engine::start(&["--style", "vllm", "--load", "5s", "--vram", "4GiB"]);
    engine.line("Loading weights took").await;
    assert!(http(engine.port, "GET", "/health", "").await.is_err(), "refused");
    // Its pipe is closed now; that must not end it.
    healthy(engine.port).await;
}

#[tokio::test]
async fn llama_server_answers_503_while_it_loads() {
    let engine = Engine::start(&["--style", "llamacpp", "--load", "5s", "--name", "tiny"]);
    let body = until("an answer", async || {
        let (status, body) = http(engine.port, "GET", "/health", "").await.ok()?;
        (status == 503).then_some(body)
    })
    .await;
    assert!(body.contains("Loading model"), "{body}");
    healthy(engine.port).await;
    let (_, body) = engine.chat(r#"{"model":"any"}"#).await;
    assert!(body.contains("tiny-1 tiny-2"), "{body}");
    assert_eq!(http(engine.port, "POST", "/sleep", "").await.expect("an answer").0, 404);
}

#[tokio::test]
async fn asleep_it_is_healthy_and_chat_hangs() {
    let engine = Engine::ready(&["--style", "vllm", "--name", "m"]).await;
    let port = engine.port;
    let post = async |path: &str, body: &str| http(port, "POST", path, body).await.expect("answer");
    assert_eq!(post("/sleep?level=2", "").await.0, 200);
    assert_eq!(http(port, "GET", "/health", "").await.expect("answer").0, 200);
    let sleeping = http(port, "GET", "/is_sleeping", "").await.expect("answer").1;
    assert_eq!(sleeping, r#"{"is_sleeping":true}"#);

    let hanging = tokio::spawn(async move {
        http(port, "POST", "/v1/chat/completions", r#"{"max_tokens":1}"#).await
    });
    until("a waiting request", async || {
        let (_, metrics) = http(port, "GET", "/metrics", "").await.ok()?;
        let waits =
            |line: &str| line.starts_with("vllm:num_requests_waiting{") && line.ends_with(" 1");
        metrics.lines().any(waits).then_some(())
    })
    .await;
    assert!(!hanging.is_finished());

    post("/wake_up?tags=weights", "").await;
    assert!(!hanging.is_finished(), "half awake is asleep");
    post("/wake_up?tags=kv_cache", "").await;
    let (_, body) = hanging.await.expect("no panic").expect("an answer");
    assert!(body.contains("garbage-1"), "level 2 without a reload: {body}");
    assert_eq!(post("/collective_rpc", r#"{"method":"reload_weights"}"#).await.0, 200);
    let (_, body) = engine.chat("{}").await;
    assert!(body.contains("m-1"), "{body}");
}

#[tokio::test]
async fn sleep_aborts_what_is_under_way() {
    let engine = Engine::ready(&["--tokens-per-second", "20"]).await;
    let mut stream = open_stream(engine.port).await;
    http(engine.port, "POST", "/sleep", "").await.expect("asleep");
    let mut rest = String::new();
    let read = stream.read_to_string(&mut rest);
    tokio::time::timeout(DEADLINE, read).await.expect("in time").expect("readable");
    assert!(rest.contains("abort"), "{rest}");
}

#[tokio::test]
async fn stuck_on_stream_ends_only_when_the_client_hangs_up() {
    let mut engine =
        Engine::ready(&["--shutdown", "stuck-on-stream", "--tokens-per-second", "50"]).await;
    let stream = open_stream(engine.port).await;
    kill(engine.pid(), Signal::SIGTERM).expect("signalled");
    // The port closes at once, the process stays.
    until("a closed port", async || TcpStream::connect(("127.0.0.1", engine.port)).await.err())
        .await;
    let early = tokio::time::timeout(Duration::from_millis(300), engine.child.wait()).await;
    assert!(early.is_err(), "it must still run");
    drop(stream);
    assert_eq!(engine.code().await, Some(0));
}

#[tokio::test]
async fn drain_finishes_replies_and_is_bounded() {
    let mut engine = Engine::ready(&["--shutdown", "drain:50s", "--tokens-per-second", "20"]).await;
    let port = engine.port;
    let body = r#"{"stream":true,"max_tokens":20}"#;
    let mut stream = send(port, "POST", "/v1/chat/completions", body).await.expect("sent");
    let mut head = [0; 16];
    stream.read_exact(&mut head).await.expect("the reply has begun");
    kill(engine.pid(), Signal::SIGTERM).expect("signalled");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.expect("readable");
    assert!(rest.contains("standin-20") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(engine.code().await, Some(0));

    let mut engine =
        Engine::ready(&["--shutdown", "drain:100ms", "--tokens-per-second", "20"]).await;
    let _held = open_stream(engine.port).await;
    kill(engine.pid(), Signal::SIGTERM).expect("signalled");
    assert_eq!(engine.code().await, Some(0));
}

#[tokio::test]
async fn refuse_ignores_the_signal() {
    let mut engine = Engine::ready(&["--shutdown", "refuse"]).await;
    kill(engine.pid(), Signal::SIGTERM).expect("signalled");
    engine.line("signal ignored").await;
    assert_eq!(engine.chat("{}").await.0, 200);
}

#[tokio::test]
async fn faults_strike_when_told() {
    let engine = Engine::ready(&["--reset-connection-every", "2"]).await;
    assert_eq!(engine.chat("{}").await.0, 200);
    let reset = http(engine.port, "POST", "/v1/chat/completions", "{}").await;
    assert_eq!(reset.expect_err("no answer").kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(engine.chat("{}").await.0, 200);

    let mut engine = Engine::ready(&["--crash-on-request", "1", "--exit-code", "7"]).await;
    let crash = http(engine.port, "POST", "/v1/chat/completions", "{}").await;
    assert!(crash.is_err());
    assert_eq!(engine.code().await, Some(7));

    let mut engine = Engine::start(&["--crash-after-load", "1ms"]);
    assert_eq!(engine.code().await, Some(1));

    let engine = Engine::ready(&["--fail-with", "500"]).await;
    assert_eq!(engine.chat("{}").await.0, 500);

    let mut engine = Engine::start(&["--fatal-line", "RuntimeError: no kernel image"]);
    engine.line("RuntimeError: no kernel image").await;
    assert_eq!(engine.code().await, Some(1));

    let mut engine = Engine::start(&["--wrong-health"]);
    engine.line("ready on").await;
    assert_eq!(http(engine.port, "GET", "/health", "").await.expect("an answer").0, 500);

    let engine = Engine::ready(&["--api-key", "secret"]).await;
    assert_eq!(engine.chat("{}").await.0, 401);
}

#[tokio::test]
async fn a_hung_load_is_silent_and_ends_on_signal() {
    let mut engine = Engine::start(&["--hang-load", "--load", "10ms"]);
    engine.line("loading 50%").await;
    assert!(http(engine.port, "GET", "/health", "").await.is_err());
    kill(engine.pid(), Signal::SIGTERM).expect("signalled");
    assert_eq!(engine.code().await, Some(0));
}

fn held(folder: &Path) -> Vec<Value> {
    let files = std::fs::read_dir(folder).expect("the ledger").flatten();
    files
        .filter(|file| file.path().extension().is_some_and(|extension| extension == "json"))
        .map(|file| {
            serde_json::from_slice(&std::fs::read(file.path()).expect("read")).expect("JSON")
        })
        .collect()
}

#[tokio::test]
async fn memory_is_entered_in_the_ledger_and_never_over_committed() {
    let folder = tempfile::tempdir().expect("a folder");
    let ledger = folder.path().to_str().expect("utf-8");
    let total = (24_u64 << 30).to_string();
    let totals = format!("{total},{total}");
    let env = [
        ("WHARF_VRAM_LEDGER", ledger),
        ("WHARF_VRAM_TOTAL", totals.as_str()),
        ("WHARF_GPUS", "1"),
        ("WHARF_INSTANCE", "i7"),
    ];
    let mut first =
        Engine::start_with(&["--name", "a", "--vram", "14GiB", "--children", "1"], &env);
    healthy(first.port).await;
    let entries = held(folder.path());
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0]["bytes"], 14_u64 << 30);
    assert_eq!(entries[0]["gpus"], serde_json::json!([1]));
    assert_eq!(entries[0]["instance"], "i7");
    assert_eq!(entries[0]["label"], "wharf engine a");
    assert_ne!(entries[0]["pid"], first.child.id().expect("runs"), "its worker holds it");

    for (style, line) in [("plain", "CUDA out of memory"), ("vllm", "ValueError: Free memory on")] {
        let mut second = Engine::start_with(&["--style", style, "--vram", "11GiB"], &env);
        second.line(line).await;
        assert_eq!(second.code().await, Some(1));
    }
    let other_gpu = [env[0], env[1], ("WHARF_GPUS", "0")];
    let third = Engine::start_with(&["--vram", "11GiB"], &other_gpu);
    healthy(third.port).await;

    http(first.port, "POST", "/sleep?level=1", "").await.expect("asleep");
    let small = held(folder.path()).iter().any(|entry| entry["bytes"] == 600_u64 << 20);
    assert!(small, "the residue");
    kill(first.pid(), Signal::SIGTERM).expect("signalled");
    assert_eq!(first.code().await, Some(0));
    let fourth = Engine::start_with(&["--style", "vllm", "--gpu-memory-utilization", "0.9"], &env);
    healthy(fourth.port).await;
    let pid = fourth.child.id().expect("runs");
    let share =
        held(folder.path()).iter().find(|entry| entry["pid"] == pid).expect("it")["bytes"].as_u64();
    assert_eq!(share, Some(((24_u64 << 30) as f64 * 0.9) as u64));
}

#[tokio::test]
async fn a_server_that_is_no_llms_queues_its_work_and_tells_it() {
    let mut engine = Engine::start(&["--style", "comfyui", "--work", "3s"]);
    let port = engine.port;
    until("its page", async || {
        matches!(http(port, "GET", "/", "").await, Ok((200, _))).then_some(())
    })
    .await;
    for number in 1..=2 {
        let (status, body) = http(port, "POST", "/prompt", "{}").await.unwrap();
        assert_eq!(status, 200, "{body}");
        assert!(body.contains(&format!("\"prompt-{number}\"")), "{body}");
    }
    let queue = async || {
        let (_, body) = http(port, "GET", "/queue", "").await.unwrap();
        serde_json::from_str::<Value>(&body).unwrap()
    };
    let first = queue().await;
    assert_eq!(first["queue_running"].as_array().unwrap().len(), 1, "{first}");
    assert_eq!(first["queue_pending"].as_array().unwrap().len(), 1, "{first}");
    until("an empty queue", async || {
        (queue().await["queue_running"] == serde_json::json!([])).then_some(())
    })
    .await;
    let (_, history) = http(port, "GET", "/history", "").await.unwrap();
    assert!(history.contains("prompt-1") && history.contains("prompt-2"), "{history}");
    assert_eq!(http(port, "POST", "/free", "{\"a\":1}").await.unwrap().0, 200);
    assert_eq!(http(port, "GET", "/ws", "").await.unwrap().0, 400, "no handshake");
    assert_eq!(http(port, "GET", "/v1/models", "").await.unwrap().0, 404);
    engine.line("freeing memory: {\"a\":1}").await;
}
