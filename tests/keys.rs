//! Keys of engines: each that Wharf starts has one of its own, requests through Wharf carry it,
//! nobody else can ask the engine past Wharf, and the key is shown nowhere.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use support::{World, gpu, processes_with, serve, standin, status_of};

/// A stand-in that takes a key as vLLM does.
fn keyed(name: &str, flags: &str) -> String {
    standin(name, "9GiB", &format!("--load 100ms --style vllm {flags}"))
        .replace("engine: openai", "engine: vllm\n    canary: true")
}

async fn world(models: &str, env: &[(&str, &str)]) -> World {
    serve(&(gpu("24GiB", "50ms") + "\nswap: { min_residency: 100ms }"), models, env).await
}

async fn answers(world: &World, model: &str) {
    let answer = world.server.talk.chat(model, false, &[]).await.unwrap();
    assert!(answer.is_from(model), "{answer:?}\n{}", world.log());
}

async fn endpoint(world: &World, model: &str) -> String {
    let row = world.server.talk.get(&format!("/models/{model}")).await.unwrap();
    row["engine_endpoint"].as_str().unwrap().to_owned()
}

fn pid_of(world: &World, model: &str) -> u32 {
    let ours = world.engine_pids();
    let named = processes_with(&format!("WHARF_MODEL={model}"));
    *named.iter().find(|pid| ours.contains(pid)).expect("its process")
}

fn in_environment(pid: u32, variable: &str) -> Option<String> {
    let environ = std::fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    environ
        .split('\0')
        .find_map(|entry| Some(entry.strip_prefix(variable)?.strip_prefix('=')?.to_owned()))
}

/// Whether any file below `dir` holds `text`.
fn written(dir: &Path, text: &str) -> bool {
    std::fs::read_dir(dir).unwrap().flatten().any(|entry| match entry.path() {
        path if path.is_dir() => written(&path, text),
        path => String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains(text),
    })
}

#[tokio::test]
async fn only_wharf_can_ask_an_engine_also_after_it_was_killed_and_adopted_the_engine() {
    let mut world = world(&(keyed("ada", "") + &keyed("bob", "")), &[]).await;
    answers(&world, "ada").await;
    answers(&world, "bob").await;
    let pids = [pid_of(&world, "ada"), pid_of(&world, "bob")];
    let keys = pids.map(|pid| in_environment(pid, "VLLM_API_KEY").expect("a key"));
    assert_ne!(keys[0], keys[1], "each instance has its own");
    assert!(keys.iter().all(|key| key.len() >= 32));
    let base = endpoint(&world, "ada").await;
    assert_eq!(status_of(&base, "/v1/models", None).await, 401);
    assert_eq!(status_of(&base, "/v1/models", Some(&keys[1])).await, 401);
    assert_eq!(status_of(&base, "/v1/models", Some(&keys[0])).await, 200);

    world.server.kill_and_restart().await.unwrap();
    assert_eq!(world.state_of("ada").await, "ready", "{}", world.log());
    answers(&world, "ada").await;
    assert_eq!([pid_of(&world, "ada"), pid_of(&world, "bob")], pids, "adopted");
    assert_eq!(in_environment(pids[0], "VLLM_API_KEY").as_ref(), Some(&keys[0]));

    for key in &keys {
        assert!(!written(world.dir.path(), key), "log, journal or another file of Wharf's");
        for path in ["/status", "/swaps?limit=100", "/models", "/health", "/metrics/ada"] {
            let shown = world.server.talk.get(path).await.unwrap().to_string();
            assert!(!shown.contains(key.as_str()), "{path}");
        }
        for pid in pids {
            let args = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
            assert!(!args.contains(key.as_str()), "anyone may read arguments");
        }
    }
    world.stop().await;
}

#[tokio::test]
async fn a_key_that_the_user_gave_is_used_and_none_is_made() {
    let by_env = keyed("env", "")
        .replace("    process:\n", "    process:\n      env: { VLLM_API_KEY: key-of-the-user }\n");
    let open = keyed("open", "")
        .replace("    process:\n", "    process:\n      env: { VLLM_API_KEY: '' }\n");
    let flag = keyed("flag", "--api-key flag-of-the-user");
    // An engine of which nothing is known gets no key, but one that it was told to want is used.
    let plain = standin("plain", "1GiB", "--api-key plain-key");
    for (name, models, key) in [
        ("env", by_env, Some("key-of-the-user")),
        ("flag", flag, Some("flag-of-the-user")),
        ("open", open, None),
        ("plain", plain, Some("plain-key")),
    ] {
        let mut world = world(&models, &[]).await;
        answers(&world, name).await;
        let base = endpoint(&world, name).await;
        let without = if key.is_some() { 401 } else { 200 };
        assert_eq!(status_of(&base, "/v1/models", None).await, without, "{name}");
        assert_eq!(status_of(&base, "/v1/models", key).await, 200, "{name}");
        world.server.kill_and_restart().await.unwrap();
        answers(&world, name).await;
        let swaps = world.swaps().await;
        assert!(swaps.iter().all(|swap| swap["id"] == "s1"), "{name} was adopted");
        world.stop().await;
    }
}

#[tokio::test]
async fn a_key_in_the_environment_of_wharf_reaches_its_engines_and_counts() {
    let mut world = world(&keyed("ada", ""), &[("VLLM_API_KEY", "inherited-key")]).await;
    answers(&world, "ada").await;
    let base = endpoint(&world, "ada").await;
    assert_eq!(status_of(&base, "/v1/models", None).await, 401);
    assert_eq!(status_of(&base, "/v1/models", Some("inherited-key")).await, 200);
    world.server.kill_and_restart().await.unwrap();
    answers(&world, "ada").await;
    world.stop().await;
}

#[tokio::test]
async fn an_engine_sleeps_and_wakes_with_its_key() {
    let one = |name: &str| {
        keyed(name, "").replace("vram: 9GiB", "vram: 14GiB").replace("--vram 9GiB", "--vram 14GiB")
    };
    let sleeper = one("ada").replace("engine: vllm", "engine: vllm\n    sleep: 1");
    let world = world(&(sleeper + &one("bob")), &[]).await;
    for name in ["ada", "bob", "ada"] {
        answers(&world, name).await;
    }
    world.stop().await;
}

/// Status and JSON body, asked with a key of Wharf's own.
async fn ask(base: &str, line: &str, key: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    let text = format!(
        "{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    let mut stream =
        tokio::net::TcpStream::connect(base.trim_start_matches("http://")).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer}")))
}

#[tokio::test]
async fn what_an_engine_writes_of_secrets_is_shown_to_nobody_and_its_log_to_few() {
    // Fails to start, saying too much.
    let failing = |name: &str, last: &str| {
        let script = format!(
            "echo on ${{PORT}} with $VLLM_API_KEY, api_key=abcd, $DB_PASSWORD and hf_Abcdef012345; \
             echo {last}; exit 3"
        );
        format!(
            "  {name}:\n    engine: vllm\n    vram: 1GiB\n    process: {}\n",
            json!({ "cmd": ["sh", "-c", script], "env": { "DB_PASSWORD": "pa55word" } })
        )
    };
    let models = failing("odd", "the last words, $DB_PASSWORD")
        + &failing("oom", "CUDA out of memory for sk-abcdefgh");
    let settings = "gpu: { provider: none, memory: [24GiB] }\n\
        auth: { keys: [{ name: a, key: key-of-an-admin-0, scopes: [inference, admin] }, \
        { name: b, key: key-of-a-client-0, scopes: [inference] }] }";
    let world = serve(settings, &models, &[]).await;
    let talk = &world.server.talk;
    let secrets = ["pa55word", "abcd,", "hf_Abc", "sk-abc"];
    for (model, quoted) in [("odd", "the last words"), ("oom", "CUDA out of memory for ***")] {
        let chat = json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] });
        let line = "POST /v1/chat/completions";
        let (status, few) = ask(&talk.gateway, line, "key-of-a-client-0", &chat).await;
        assert_eq!(status, 503, "{few:#}");
        let (_, all) = ask(&talk.gateway, line, "key-of-an-admin-0", &chat).await;
        let message = |body: &Value| body["error"]["message"].as_str().unwrap().to_owned();
        // A line that tells the cause is for everyone, any other for readers of logs.
        assert_eq!(message(&few).contains(quoted), model == "oom", "{few:#}");
        assert!(message(&all).contains(quoted), "{all:#}");
        assert!(few["cause"]["log"].is_null(), "{few:#}");
        let log = all["cause"]["log"].to_string();
        assert!(log.contains("with ***, api_key=***, *** and ***"), "{log}");

        let swap = format!("GET /swaps/{}", few["swap_id"].as_str().unwrap());
        let (_, swap) = ask(&talk.orchestrator, &swap, "key-of-an-admin-0", &Value::Null).await;
        assert!(swap["log"].to_string().contains("with ***, api_key=***"), "{swap:#}");
        let status =
            ask(&talk.orchestrator, "GET /status", "key-of-an-admin-0", &Value::Null).await;
        for body in [&few, &all, &swap, &status.1] {
            for secret in secrets {
                assert!(!body.to_string().contains(secret), "{secret}: {body:#}");
            }
        }
    }
    let made = long_hex_words(&world);
    assert!(made.is_empty(), "a random key in {made:?}");
    world.stop().await;
}

/// Words of 48 hexadecimal digits in Wharf's log and journal.
fn long_hex_words(world: &World) -> Vec<String> {
    let mut texts = vec![world.log()];
    let journal = world.state_dir().join("journal");
    for entry in std::fs::read_dir(&journal).unwrap().flatten() {
        texts.push(std::fs::read_to_string(entry.path()).unwrap());
    }
    let is_key =
        |word: &&str| word.len() == 48 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let words = texts.iter().flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric()));
    words.filter(is_key).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_real_llama_server_wants_its_key_too() {
    let (Ok(server), Ok(gguf)) =
        (std::env::var("WHARF_TEST_LLAMA"), std::env::var("WHARF_TEST_GGUF"))
    else {
        support::skip("llama-server's key: WHARF_TEST_LLAMA and WHARF_TEST_GGUF are not set");
        return;
    };
    let model = |name: &str, flags: &str| {
        format!(
            "  {name}:\n    engine: llamacpp\n    gpus: 0\n    canary: true\n    process:\n      cmd: >-\n        \
             {server} -m {gguf}/{name}.gguf --port ${{PORT}} -t 1 -tb 1 --metrics {flags}\n"
        )
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "key-in-a-file\n").unwrap();
    let with_file = model("bob", &format!("--api-key-file {}", file.path().display()));
    let settings = "gpu: { provider: none, memory: [24GiB] }";
    let mut world = serve(settings, &(model("ada", "") + &with_file), &[]).await;
    for name in ["ada", "bob"] {
        answers(&world, name).await;
        let key = in_environment(pid_of(&world, name), "LLAMA_API_KEY").expect("a key");
        let base = endpoint(&world, name).await;
        assert_eq!(status_of(&base, "/props", None).await, 401);
        assert_eq!(status_of(&base, "/props", Some(&key)).await, 200);
        assert_eq!(status_of(&base, "/health", None).await, 200);
    }
    let base = endpoint(&world, "bob").await;
    assert_eq!(status_of(&base, "/props", Some("key-in-a-file")).await, 200, "still good");
    let pids = world.engine_pids();
    world.server.kill_and_restart().await.unwrap();
    for name in ["ada", "bob"] {
        answers(&world, name).await;
    }
    assert_eq!(world.engine_pids(), pids, "adopted");
    world.stop().await;
}
