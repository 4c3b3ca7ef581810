//! Models inside a running Ollama: loaded, kept, unloaded and found again by its API. The Ollama is
//! a stand-in, written after its public API documentation, as no real one can be had here.

mod support;

use std::time::Duration;

use serde_json::json;
use support::ollama::Ollama;
use support::{World, serve};

fn model(name: &str, known_as: &str, ollama: &Ollama, more: &str) -> String {
    format!(
        "  {name}: {{ engine: ollama, upstream_name: \"{known_as}\", external: {{ url: \"{}\" }}{more} }}\n",
        ollama.url
    )
}

/// Nothing can be proven of GPU memory here.
const BLIND: &str = "gpu: { provider: none }\nswap: { mode: single-active }";

async fn two(ollama: &Ollama) -> World {
    let models = model("qwen", "qwen:7b", ollama, "") + &model("llama", "llama3", ollama, "");
    serve(BLIND, &models, &[]).await
}

async fn says(world: &World, model: &str, begin: &str) {
    let answer = world.server.talk.chat(model, false, &[]).await.expect("an answer");
    assert!(answer.status == 200 && answer.text.starts_with(begin), "{answer:?}\n{}", world.log());
}

#[tokio::test]
async fn a_request_has_its_model_loaded_and_the_other_one_unloaded() {
    let ollama = Ollama::start(&["--name", "qwen:7b", "--name", "llama3", "--load", "200ms"]).await;
    let world = two(&ollama).await;
    for (name, begin, loaded) in [
        ("qwen", "qwen:7b-1", "qwen:7b"),
        ("llama", "llama3:latest-1", "llama3:latest"),
        ("qwen", "qwen:7b-1", "qwen:7b"),
    ] {
        says(&world, name, begin).await;
        assert_eq!(ollama.loaded().await, [loaded]);
    }
    let (status, _) =
        world.server.talk.call(http::Method::POST, "/models/qwen/unload", json!({})).await.unwrap();
    assert_eq!(status, 200);
    assert!(ollama.loaded().await.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn a_loaded_model_is_told_to_stay_although_every_request_sets_its_keep_alive_back() {
    let ollama =
        Ollama::start(&["--name", "qwen:7b", "--name", "llama3", "--keep-alive", "20s"]).await;
    let world = two(&ollama).await;
    says(&world, "qwen", "qwen:7b-1").await;
    let in_an_hour = || {
        let then = std::time::SystemTime::now() + Duration::from_secs(3600);
        humantime::format_rfc3339(then).to_string()
    };
    ollama
        .until("it stays for ever", |ps| {
            ps[0]["expires_at"].as_str().is_some_and(|at| at > in_an_hour().as_str())
        })
        .await;
    world.stop().await;
}

#[tokio::test]
async fn a_model_that_somebody_else_unloads_is_noticed_and_loaded_again_when_wanted() {
    let ollama = Ollama::start(&["--name", "qwen:7b", "--name", "llama3"]).await;
    let world = two(&ollama).await;
    says(&world, "qwen", "qwen:7b-1").await;
    ollama.post("/api/generate", json!({"model": "qwen:7b", "keep_alive": 0})).await;
    world.until("it is noticed", |status| status["models"]["qwen"]["state"] != "ready").await;
    says(&world, "qwen", "qwen:7b-1").await;
    world.stop().await;
}

#[tokio::test]
async fn what_is_loaded_is_adopted_after_a_crash_and_unloaded_when_room_is_wanted() {
    let ollama = Ollama::start(&["--name", "qwen:7b", "--name", "llama3"]).await;
    let mut world = two(&ollama).await;
    says(&world, "qwen", "qwen:7b-1").await;
    world.server.kill_and_restart().await.unwrap();
    world.until("it is adopted", |status| status["models"]["qwen"]["state"] == "ready").await;
    assert!(world.swaps().await.iter().all(|swap| swap["model"] != "llama"));
    says(&world, "llama", "llama3:latest-1").await;
    assert_eq!(ollama.loaded().await, ["llama3:latest"]);
    world.stop().await;
}

#[tokio::test]
async fn what_ollama_lacks_is_pulled_and_what_cannot_be_had_is_named() {
    let ollama = Ollama::start(&["--name", "llama3"]).await;
    let models = model("qwen", "qwen:7b", &ollama, "")
        + &model("gone", "missing:1b", &ollama, "")
        + &model("mine", "other:1b", &ollama, ", pull: never");
    let world = serve(BLIND, &models, &[]).await;
    says(&world, "qwen", "qwen:7b-1").await;
    for (name, cause) in [("gone", "file does not exist"), ("mine", "ollama pull other:1b")] {
        let answer = world.server.talk.chat(name, false, &[]).await.unwrap();
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.text.contains(cause), "{answer:?}");
    }
    says(&world, "qwen", "qwen:7b-1").await;
    world.stop().await;
}

#[tokio::test]
async fn an_ollama_that_does_not_run_is_named_with_the_fix() {
    let ollama = Ollama::start(&["--name", "qwen:7b", "--name", "llama3"]).await;
    let world = two(&ollama).await;
    let url = ollama.url.clone();
    drop(ollama);
    let answer = world.server.talk.chat("qwen", false, &[]).await.unwrap();
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.text.contains(&url) && answer.text.contains("start it"), "{answer:?}");
    world.stop().await;
}

/// Its own client, through the pass-through. Needs WHARF_TEST_PYTHON with the package ollama.
#[tokio::test]
async fn ollamas_own_client_works_and_can_neither_load_nor_unload_nor_keep() {
    let Some(python) = support::python("ollama") else { return };
    let ollama = Ollama::start(&["--name", "qwen:7b", "--name", "llama3"]).await;
    let world = two(&ollama).await;
    let url = format!("{}/upstream/qwen", world.server.talk.gateway);
    support::run_script(&python, "ollama_client.py", &[&url], &world).await;
    world.stop().await;
}
