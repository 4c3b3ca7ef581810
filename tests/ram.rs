//! Host RAM decides, too: with real processes, two models that fit on the GPU and not in the host.

mod support;

use serde_json::json;
use support::{EXE, gpu, serve, standin};

/// A model of 1 GiB on the GPU, declared with this much host RAM.
fn with_ram(name: &str, ram: &str) -> String {
    standin(name, "1GiB", "--load 100ms") + &format!("    ram: {ram}\n")
}

#[tokio::test]
async fn a_model_leaves_for_host_ram_though_the_gpu_has_room() {
    let settings = gpu("80GiB", "20ms") + "\nram: { total: 16GiB, reserve: 1GiB }";
    let models = with_ram("ada", "8GiB") + &with_ram("bob", "8GiB") + &with_ram("cyd", "2GiB");
    let world = serve(&settings, &models, &[]).await;
    let talk = &world.server.talk;
    for name in ["cyd", "ada", "bob"] {
        let answer = talk.chat(name, false, &[]).await.unwrap();
        assert!(answer.is_from(name), "{answer:?}\n{}", world.log());
    }
    // Its GPU bytes may be proven free later than bob answers.
    world.until("ada is gone", |status| status["models"]["ada"]["state"] == "stopped").await;
    assert_eq!(world.state_of("cyd").await, "ready", "no more than needed");
    assert_eq!(world.engine_pids().len(), 2);
    let swaps = world.swaps().await;
    let swap = swaps.iter().find(|swap| swap["model"] == "bob").expect("a row");
    assert_eq!(swap["evicted"][0]["model"], "ada");
    let why = swap["evicted"][0]["why"].as_str().expect("a reason");
    assert!(why.contains("8.0 GiB of host RAM"), "{why}");

    let gpus = talk.get("/gpus").await.unwrap();
    let host = &gpus["host_memory"];
    assert_eq!(host["total_bytes"], 16u64 << 30);
    assert_eq!(host["promised_bytes"], 10u64 << 30, "{host}");
    assert_eq!(host["promised_to"], json!(["cyd", "bob"]));
    world.stop().await;
}

#[tokio::test]
async fn what_pinned_models_leave_too_little_for_is_refused_at_once() {
    let settings = gpu("80GiB", "20ms") + "\nram: { total: 16GiB, reserve: 1GiB }";
    let models = with_ram("ada", "10GiB") + "    pinned: true\n" + &with_ram("bob", "8GiB");
    let world = serve(&settings, &models, &[]).await;
    let refused = world.server.talk.chat("bob", false, &[]).await.unwrap();
    assert_eq!(refused.status, 507, "{refused:?}");
    assert!(refused.text.contains("8.0 GiB of host RAM"), "{refused:?}");
    world.stop().await;
}

/// Nobody declares anything: what the processes were seen to take counts.
#[tokio::test]
async fn what_processes_take_of_host_ram_is_learned() {
    let settings = "gpu: { provider: none }\nram: { total: 1GiB, reserve: 256MiB }";
    let engine = |name: &str, flags: &str| {
        format!(
            "  {name}:\n    engine: openai\n    gpus: 0\n    process:\n      cmd: >-\n        {EXE} \
             engine --host 127.0.0.1 --port ${{PORT}} --name {name} {flags}\n"
        )
    };
    let models = engine("ada", "--host-ram 300MiB --children 1") + &engine("bob", "");
    let world = serve(settings, &models, &[]).await;
    let talk = &world.server.talk;
    for name in ["ada", "bob"] {
        let answer = talk.chat(name, false, &[]).await.unwrap();
        assert!(answer.is_from(name), "{answer:?}\n{}", world.log());
    }
    let mut promised = 0;
    for _ in 0..600 {
        let gpus = talk.get("/gpus").await.unwrap();
        promised = gpus["host_memory"]["promised_bytes"].as_u64().unwrap();
        if promised >= 300 << 20 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!((300 << 20..600 << 20).contains(&promised), "{promised} bytes are promised");
    let asked = json!({ "model": "ada" });
    let (_, plan) = talk.call(hyper::Method::POST, "/plan", asked).await.unwrap();
    let peak = plan["host_ram"]["peak_bytes"].as_u64().unwrap();
    assert!(peak >= 300 << 20, "{plan}");
    assert_eq!(plan["host_ram"]["declared_bytes"], json!(null));
    world.stop().await;
}
