//! Profiles and LoRA adapters end to end, with real stand-in processes.

mod support;

use http::Method;
use serde_json::{Value, json};
use support::{EXE, World, gpu, serve, standin};

async fn profile() -> World {
    let settings = gpu("24GiB", "50ms")
        + "\ngroups: { coding: { models: [qwen, llama], together: true } }"
        + "\nswap: { min_residency: 100ms }";
    let models = standin("qwen", "8GiB", "") + &standin("llama", "8GiB", "");
    serve(&settings, &(models + &standin("other", "4GiB", "")), &[]).await
}

fn is(status: &Value, model: &str, state: &str) -> bool {
    status["models"][model]["state"] == state
}

// contract: RULE group/model is a name
// contract: POST /v1/chat/completions
#[tokio::test]
async fn a_chat_with_a_profiles_model_makes_the_whole_profile_ready() {
    let world = profile().await;
    let talk = &world.server.talk;
    assert!(talk.chat("coding/qwen", false, &[]).await.unwrap().is_from("qwen"), "{}", world.log());
    let status = world
        .until("llama comes along", |status| {
            is(status, "qwen", "ready") && is(status, "llama", "ready")
        })
        .await;
    assert!(is(&status, "other", "stopped"));
    // They leave together, and one call brings both back.
    let (code, body) = talk.call(Method::POST, "/models/coding/unload", json!({})).await.unwrap();
    assert_eq!((code, &body["was_loaded"]), (200, &json!(true)), "{body}");
    world.until("both are gone", |s| is(s, "qwen", "stopped") && is(s, "llama", "stopped")).await;
    let (code, body) =
        talk.call(Method::POST, "/ensure_model", json!({"model": "coding"})).await.unwrap();
    assert_eq!((code, &body["state"]), (200, &json!("ready")), "{body}");
    assert_eq!(body["models"].as_array().map(Vec::len), Some(2));
    let status = world.status().await;
    assert!(is(&status, "qwen", "ready") && is(&status, "llama", "ready"));
    world.stop().await;
}

fn adapters(more: &str) -> String {
    format!(
        "  base:\n    engine: vllm\n    vram: 8GiB\n    process:\n      cmd: >-\n        {EXE} engine \
         --style vllm --host 127.0.0.1 --port ${{PORT}} --vram 8GiB --fail-adapter broken \
         --tokens-per-second 5\n  sql: {{ adapter_of: base, adapter: org/sql }}\n  \
         broken: {{ adapter_of: base, adapter: org/broken }}\n{more}"
    )
}

async fn with_adapters() -> World {
    serve(&gpu("24GiB", "50ms"), &adapters(""), &[]).await
}

// contract: RULE adapters are models of their own
#[tokio::test]
async fn adapters_share_their_bases_engine_and_one_that_fails_harms_nobody() {
    let mut world = with_adapters().await;
    let talk = world.server.talk.clone();
    assert!(talk.chat("sql", false, &[]).await.unwrap().is_from("sql"), "{}", world.log());
    assert!(talk.chat("base", true, &[]).await.unwrap().is_from("base"));
    assert_eq!(world.engine_pids().len(), 1, "one engine for all of them");
    let body = json!({"model": "broken", "messages": [{"role": "user", "content": "hi"}]});
    let (code, refused) =
        talk.call(Method::POST, "/ensure_model", json!({"model": "broken"})).await.unwrap();
    assert_eq!(code, 503, "{refused}");
    let text = refused.to_string();
    assert!(text.contains("adapter_failed") && text.contains("No adapter found"), "{text}");
    let answer = talk.chat("broken", false, &[]).await.unwrap();
    assert_eq!(answer.status, 503, "{body}");
    let status = world.status().await;
    let states = ["base", "sql", "broken"].map(|name| status["models"][name]["state"].clone());
    assert_eq!(states, [json!("ready"), json!("ready"), json!("failed")]);
    // An adapter leaves alone, and comes back for a request.
    let (code, gone) = talk.call(Method::POST, "/models/sql/unload", json!({})).await.unwrap();
    assert_eq!((code, &gone["was_loaded"]), (200, &json!(true)), "{gone}");
    world.until("sql left", |s| is(s, "sql", "stopped") && is(s, "base", "ready")).await;
    assert!(talk.chat("sql", false, &[]).await.unwrap().is_from("sql"));
    let pids = world.engine_pids();
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(world.engine_pids(), pids, "adopted with what it has loaded");
    assert!(world.server.talk.chat("sql", false, &[]).await.unwrap().is_from("sql"));
    world.stop().await;
}

// contract: RULE adapters are models of their own
#[tokio::test]
async fn an_adapter_has_keys_and_metrics_of_its_own() {
    let key = |name: &str, model: &str| {
        format!(
            "{{ name: {name}, key: key-of-{name}-0123456, models: [{model}], scopes: [inference, read] }}"
        )
    };
    let keys = [key("analyst", "sql"), key("writer", "base"), key("all", "'*'")].join(", ");
    let settings = gpu("24GiB", "50ms") + &format!("\nauth: {{ keys: [{keys}] }}");
    let world = serve(&settings, &adapters(""), &[]).await;
    let talk = &world.server.talk;
    let chat = async |key: &str, model: &str| {
        let key = format!("Bearer key-of-{key}-0123456");
        talk.chat(model, false, &[("authorization", &key)]).await.unwrap()
    };
    for (key, model, other) in [("analyst", "sql", "base"), ("writer", "base", "sql")] {
        for _ in 0..2 {
            let answer = chat(key, model).await;
            assert!(answer.is_from(model), "{key}: {answer:?}\n{}", world.log());
        }
        // The adapter's name, its source's and the base's are no way to the other one.
        for name in [other, "broken"] {
            let refused = chat(key, name).await;
            assert_eq!(refused.status, 403, "{key} {name}: {refused:?}");
        }
        assert_eq!(chat(key, "org/sql").await.status, 404);
    }
    assert!(chat("all", "sql").await.is_from("sql"));
    let output = tokio::process::Command::new("curl")
        .args(["-sS", "-H", "Authorization: Bearer key-of-all-0123456"])
        .arg(format!("{}/metrics", talk.orchestrator))
        .output()
        .await;
    let Ok(output) = output else {
        support::skip("metrics of adapters: curl is not installed");
        return world.stop().await;
    };
    let text = String::from_utf8(output.stdout).unwrap();
    for series in [
        "orchestrator_requests_total{model=\"sql\",outcome=\"ok\"} 3",
        "orchestrator_requests_total{model=\"base\",outcome=\"ok\"} 2",
        "orchestrator_current_model{model=\"sql\"} 1",
        "orchestrator_current_model{model=\"base\"} 1",
        "orchestrator_current_model{model=\"broken\"} 0",
        "swapper_model_requests_total{model=\"sql\"} 3",
    ] {
        assert!(text.contains(&format!("{series}\n")), "no {series} in\n{text}");
    }
    assert!(!text.contains("org/sql"), "{text}");
    world.stop().await;
}

// contract: CONFIG reload by SIGHUP
#[tokio::test]
async fn a_reload_adds_and_removes_adapters_while_a_stream_of_the_base_runs() {
    let world = with_adapters().await;
    let talk = world.server.talk.clone();
    assert!(talk.chat("sql", false, &[]).await.unwrap().is_from("sql"), "{}", world.log());
    let before = world.engine_pids();
    // 16 tokens at 5 a second: the reload comes in the middle.
    let streaming = talk.clone();
    let stream = tokio::spawn(async move { streaming.chat("base", true, &[]).await });
    world.until("the stream runs", |status| status["models"]["base"]["in_flight"] == 1).await;
    let path = world.dir.path().join("models.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace("  sql: {", "  law: {").replace("org/sql", "org/law");
    std::fs::write(&path, text).unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(world.server.pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    world.until("law is there", |status| is(status, "law", "ready")).await;
    assert!(stream.await.unwrap().unwrap().is_from("base"), "unbroken: {}", world.log());
    assert!(talk.chat("law", false, &[]).await.unwrap().is_from("law"));
    assert_eq!(talk.chat("sql", false, &[]).await.unwrap().status, 404);
    assert_eq!(world.engine_pids(), before, "the same engine: {}", world.log());
    world.stop().await;
}
