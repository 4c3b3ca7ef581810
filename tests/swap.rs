//! The main job, with real processes: a request names a model, and that model answers.

mod support;

use std::time::Duration;

use futures_util::future::join_all;
use hyper::Method;
use serde_json::json;
use support::{gpu, serve, standin};

const LAG: &str = "300ms";

// contract: CLI serve
#[tokio::test]
async fn each_request_is_answered_by_the_model_it_names_and_the_first_is_gone_before_the_second() {
    let models = standin("ada", "14GiB", "--load 300ms") + &standin("bob", "14GiB", "--load 300ms");
    let world = serve(&gpu("24GiB", LAG), &models, &[]).await;
    for name in ["ada", "bob", "ada"] {
        let answer = world.server.talk.chat(name, name == "bob", &[]).await.unwrap();
        assert!(answer.is_from(name), "{answer:?}\n{}", world.log());
        assert_eq!(world.engine_pids().len(), 1, "one engine at a time fits");
    }
    let swaps = world.swaps().await;
    let ready = swaps.iter().filter(|swap| swap["result"] == "ready").count();
    assert_eq!(ready, 3, "{swaps:#?}");
    let second = swaps.iter().find(|swap| swap["model"] == "bob").unwrap();
    assert_eq!(second["evicted"][0]["model"], "ada");
    let before_start: f64 = ["drain", "vacate", "prove"]
        .iter()
        .map(|phase| second["phases"][phase].as_f64().unwrap_or(0.0))
        .sum();
    assert!(before_start > 0.25, "the release lag of 300 ms was waited for: {second}");
    world.stop().await;
}

#[tokio::test]
async fn models_that_fit_together_stay_together() {
    let models = standin("ada", "10GiB", "--load 100ms") + &standin("bob", "10GiB", "--load 100ms");
    let world = serve(&gpu("24GiB", LAG), &models, &[]).await;
    for name in ["ada", "bob", "ada", "bob"] {
        assert!(world.server.talk.chat(name, false, &[]).await.unwrap().is_from(name));
    }
    assert_eq!(world.swaps().await.len(), 2);
    assert_eq!(world.engine_pids().len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn ensure_swaps_and_says_what_it_did() {
    let models = standin("ada", "14GiB", "--load 200ms") + &standin("bob", "14GiB", "--load 200ms");
    let world = serve(&gpu("24GiB", LAG), &models, &[]).await;
    let talk = &world.server.talk;
    let ensure = |model: &str| talk.call(Method::POST, "/ensure_model", json!({ "model": model }));
    let (status, first) = ensure("ada").await.unwrap();
    assert_eq!((status, &first["swapped"]), (200, &json!(true)), "{first}");
    let (_, again) = ensure("ada").await.unwrap();
    assert_eq!(again["swapped"], json!(false));
    let (_, other) = ensure("bob").await.unwrap();
    assert_eq!((&other["swapped"], &other["from"]), (&json!(true), &json!("ada")), "{other}");
    let (status, unknown) = ensure("bobb").await.unwrap();
    assert_eq!(status, 404);
    assert!(unknown["error"]["message"].as_str().unwrap().contains("bob"), "{unknown}");
    world.stop().await;
}

#[tokio::test]
async fn never_start_serves_only_what_is_ready() {
    let models = standin("ada", "14GiB", "--load 100ms") + &standin("bob", "14GiB", "--load 100ms");
    let world = serve(&gpu("24GiB", LAG), &models, &[]).await;
    let talk = &world.server.talk;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let never = [("x-wharf-start", "never")];
    assert!(talk.chat("ada", false, &never).await.unwrap().is_from("ada"));
    let refused = talk.chat("bob", false, &never).await.unwrap();
    assert_eq!(refused.status, 503, "{refused:?}");
    assert_eq!(world.swaps().await.len(), 1);
    world.stop().await;
}

#[tokio::test]
async fn a_model_that_cannot_start_backs_off_and_the_others_serve() {
    let models = standin("ada", "10GiB", "--load 100ms")
        + &standin(
            "bad",
            "10GiB",
            "--load 100ms --fatal-line 'torch.OutOfMemoryError: CUDA out of memory' --exit-code 1",
        );
    let world = serve(&gpu("24GiB", LAG), &models, &[]).await;
    let talk = &world.server.talk;
    for _ in 0..3 {
        let refused = talk.chat("bad", false, &[]).await.unwrap();
        assert_eq!(refused.status, 503, "{refused:?}");
        assert!(refused.text.contains("bad"), "{refused:?}");
    }
    let starts = world.swaps().await.iter().filter(|swap| swap["model"] == "bad").count();
    assert_eq!(starts, 1, "not started anew for every request");
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    assert_eq!(world.state_of("bad").await, "failed");
    world.stop().await;
}

#[tokio::test]
async fn an_engine_that_dies_while_serving_is_started_again() {
    let models = standin("ada", "10GiB", "--load 100ms");
    let world = serve(&gpu("24GiB", "50ms"), &models, &[]).await;
    let talk = &world.server.talk;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let pid = i32::try_from(world.engine_pids()[0]).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    world.until("the death is seen", |status| status["models"]["ada"]["state"] != "ready").await;
    let answer = talk.chat("ada", false, &[]).await.unwrap();
    assert!(answer.is_from("ada"), "{answer:?}\n{}", world.log());
    world.stop().await;
}

#[tokio::test]
async fn whoever_waits_when_wharf_stops_is_told_so() {
    let models = standin("ada", "14GiB", "--load 60s");
    let world = serve(&gpu("24GiB", "50ms"), &models, &[]).await;
    let talk = world.server.talk.clone();
    let asked = tokio::spawn(async move { talk.chat("ada", false, &[]).await });
    world.until("ada starts", |status| status["swaps"][0]["phase"] == "start").await;
    world.stop().await;
    let answer = asked.await.unwrap().expect("an answer, not a cut connection");
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.text.contains("shutting down"), "{answer:?}");
}

/// 600 requests, streams among them, over five models on room for two; one in ten hangs up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_is_served_whole_and_leaves_nothing_behind() {
    const NAMES: [&str; 5] = ["ada", "bob", "cyd", "dan", "eve"];
    let models: String = NAMES
        .iter()
        .map(|name| standin(name, "11GiB", "--load 200ms --tokens-per-second 400"))
        .collect();
    let settings = gpu("24GiB", "50ms") + "\nswap: { min_residency: 200ms, max_wait: 2s }\n";
    let world = serve(&settings, &models, &[]).await;
    let talk = &world.server.talk;
    let crowd = (0..600_usize).map(|n| async move {
        let name = NAMES[(n * 7 + n / 11) % NAMES.len()];
        // Deterministic, but spread over the whole run.
        if n % 10 == 3 {
            let patience = Duration::from_millis(((n * 37) % 4000) as u64);
            let asked = tokio::time::timeout(patience, talk.chat(name, true, &[])).await;
            return asked.ok().map(|answer| (name, answer));
        }
        Some((name, talk.chat(name, n % 2 == 0, &[]).await))
    });
    let mut answered = 0;
    for (name, answer) in join_all(crowd).await.into_iter().flatten() {
        let answer = answer.unwrap();
        assert!(answer.is_from(name), "{name}: {answer:?}\n{}", world.log());
        answered += 1;
    }
    assert!(answered >= 540, "{answered}");
    world
        .until("everything is back to zero", |status| {
            status["queued"] == 0 && status["in_flight"] == 0 && status["swaps"] == json!([])
        })
        .await;
    world.stop().await;
}
