//! Sleep, waking, and the one token.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::model_support::{external, model};
use crate::world::World;
use wharf::config::catalog::{EngineKind, ModelSpec};
use wharf::engine::{canary, sleep, wake};
use wharf::runtime::ExitReport;
use wharf::scheduler::event::FaultKind;

fn spec(level: Option<u8>) -> ModelSpec {
    let mut spec = model(EngineKind::Vllm, external("http://127.0.0.1:1"));
    spec.sleep = level;
    spec
}

async fn sleeper() -> World {
    let asleep = AtomicBool::new(false);
    World::serving(move |target, _| {
        if target.starts_with("POST /sleep") {
            asleep.store(true, Ordering::SeqCst);
        } else if target == "POST /wake_up" || target.contains("kv_cache") {
            asleep.store(false, Ordering::SeqCst);
        }
        (200, format!("{{\"is_sleeping\":{}}}", asleep.load(Ordering::SeqCst)))
    })
    .await
}

#[tokio::test]
async fn level_1_is_one_call_each_way() {
    let world = sleeper().await;
    sleep(&spec(Some(1)), &world.running).await.expect("asleep");
    wake(&spec(Some(1)), &world.running).await.expect("awake");
    assert_eq!(
        world.asked(),
        ["POST /sleep?level=1", "GET /is_sleeping", "POST /wake_up", "GET /is_sleeping"]
    );
}

#[tokio::test]
async fn level_2_reads_the_weights_again() {
    let world = sleeper().await;
    sleep(&spec(Some(2)), &world.running).await.expect("asleep");
    wake(&spec(Some(2)), &world.running).await.expect("awake");
    assert_eq!(
        world.asked()[2..],
        [
            "POST /wake_up?tags=weights",
            "POST /collective_rpc {\"method\":\"reload_weights\"}",
            "POST /wake_up?tags=kv_cache",
            "POST /reset_prefix_cache",
            "GET /is_sleeping"
        ]
    );
}

#[tokio::test]
async fn a_sleep_that_fails_says_why() {
    let world = World::serving(|_, _| (404, String::new())).await;
    let fault = sleep(&spec(Some(1)), &world.running).await.expect_err("a fault");
    assert_eq!(fault.kind, FaultKind::SleepFailed);
    assert!(fault.message.contains("VLLM_SERVER_DEV_MODE"), "{}", fault.message);

    let world = World::serving(|_, _| (500, "CUDA error".to_owned())).await;
    let fault = wake(&spec(Some(1)), &world.running).await.expect_err("a fault");
    assert_eq!(fault.kind, FaultKind::WakeFailed);
    assert!(fault.message.contains("CUDA error"), "{}", fault.message);

    let ended = ExitReport { code: Some(1), signal: None, oom_killed: false };
    world.exit.send_replace(Some(ended));
    let fault = wake(&spec(Some(1)), &world.running).await.expect_err("a fault");
    assert!(fault.message.contains("exited with code 1"), "{}", fault.message);
}

#[tokio::test]
async fn one_token_by_chat_or_else_by_completion() {
    let world = World::serving(|target, body| match target {
        "POST /v1/completions" => {
            assert!(body.contains("\"max_tokens\":1") && body.contains("\"model\":\"coder\""));
            (200, "{\"choices\":[{}]}".to_owned())
        }
        _ => (500, "no chat template".to_owned()),
    })
    .await;
    canary(&spec(None), &world.running).await.expect("a token");
    assert_eq!(world.asked().len(), 2);
}

#[tokio::test]
async fn embeddings_give_a_vector_instead() {
    let world = World::serving(|target, _| match target {
        "POST /v1/embeddings" => (200, "{\"data\":[]}".to_owned()),
        _ => (404, String::new()),
    })
    .await;
    let mut spec = spec(None);
    spec.model_type = "embedding".to_owned();
    canary(&spec, &world.running).await.expect("a vector");
}

#[tokio::test]
async fn no_token_is_not_healthy() {
    let world = World::serving(|_, _| (500, "EngineDeadError".to_owned())).await;
    let fault = canary(&spec(None), &world.running).await.expect_err("a fault");
    assert_eq!(fault.kind, FaultKind::NeverHealthy);
    assert!(fault.message.contains("EngineDeadError"), "{}", fault.message);
}
