//! How long models stay, end to end: ttl, grace, rescue, extension, pins, keep windows, plans.

mod support;

use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::{Value, json};

use support::{World, gpu, serve, standin};

fn with(standin: &str, keys: &str) -> String {
    format!("{standin}    {keys}\n")
}

async fn world(models: &str) -> World {
    serve(&gpu("24GiB", "50ms"), models, &[]).await
}

async fn row(world: &World, model: &str) -> Value {
    world.server.talk.get(&format!("/models/{model}")).await.expect("its row")
}

/// Polls the model's row; the deadline is generous.
async fn until(world: &World, model: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let row = row(world, model).await;
        if wanted(&row) {
            return row;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{row:#}\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn post(world: &World, path: &str, body: Value) -> (u16, Value) {
    world.server.talk.call(Method::POST, path, body).await.expect("an answer")
}

async fn chat(world: &World, model: &str) {
    let answer = world.server.talk.chat(model, false, &[]).await.expect("an answer");
    assert!(answer.is_from(model), "{answer:?}");
}

// contract: POST /models/{id}/extend-ttl
#[tokio::test]
async fn a_late_request_rescues_a_cooling_model_and_an_extension_outlives_a_crash() {
    let patient = with(&standin("ada", "8GiB", "--load 50ms"), "ttl: 200ms\n    grace: 10m");
    let brief = with(&standin("bob", "8GiB", "--load 50ms"), "ttl: 100ms\n    grace: 100ms");
    let mut world = world(&(patient + &brief)).await;
    chat(&world, "ada").await;
    let cooling = until(&world, "ada", |row| row["state"] == "COOLING").await;
    assert_eq!(cooling["ttl_remaining_minutes"], 0.0, "{cooling}");
    assert_eq!(cooling["status"], "loaded");
    let pids = world.engine_pids();
    chat(&world, "ada").await;
    until(&world, "ada", |row| row["state"] == "COOLING").await;
    assert_eq!(world.engine_pids(), pids, "rescued: the same engine");

    let (status, extended) = post(&world, "/models/ada/extend-ttl", json!({ "minutes": 30 })).await;
    assert_eq!(status, 200, "{extended}");
    assert_eq!(extended["status"], "success");
    assert_eq!(extended["model_id"], "ada");
    let left = |row: &Value| row["ttl_remaining_minutes"].as_f64().unwrap();
    assert!((29.0..=30.0).contains(&left(&extended)), "{extended}");
    assert_eq!(row(&world, "ada").await["state"], "HOT");

    for minutes in [json!(0), json!(-3), json!("soon")] {
        let (status, bad) =
            post(&world, "/models/ada/extend-ttl", json!({ "minutes": minutes })).await;
        assert_eq!(status, 400, "{bad}");
    }

    chat(&world, "bob").await;
    until(&world, "bob", |row| row["residency"] == "stopped").await;
    let swaps = world.swaps().await;
    let unload = swaps.iter().find(|swap| swap["cause"] == "ttl").expect("its unload");
    assert_eq!(unload["model"], "bob", "{unload}");
    let (status, refused) = post(&world, "/models/bob/extend-ttl", json!({})).await;
    assert_eq!(status, 409, "{refused}");
    assert!(refused["error"]["message"].as_str().unwrap().contains("bob is not loaded"));

    world.server.kill_and_restart().await.unwrap();
    let adopted = until(&world, "ada", |row| row["residency"] == "ready").await;
    assert!(left(&adopted) > 20.0, "the extension is known after a restart: {adopted}");
    world.stop().await;
}

// contract: POST /models/{name}/pin
#[tokio::test]
async fn a_pin_by_hand_keeps_others_out_and_its_end_lets_them_in() {
    let models = standin("ada", "14GiB", "--load 50ms") + &standin("bob", "14GiB", "--load 50ms");
    let world = world(&models).await;
    chat(&world, "ada").await;
    let (status, pinned) = post(&world, "/models/ada/pin", json!({})).await;
    assert_eq!((status, &pinned["pinned"]), (200, &json!(true)), "{pinned}");
    assert_eq!(pinned["shut_out"], json!(["bob"]));
    assert_eq!(row(&world, "ada").await["pinned"], true);
    let refused = world.server.talk.chat("bob", false, &[]).await.unwrap();
    assert_eq!(refused.status, 507, "{refused:?}");
    assert!(refused.text.contains("pinned models: ada"), "{refused:?}");
    let (_, plan) = post(&world, "/plan", json!({ "model": "bob" })).await;
    assert_eq!((&plan["verdict"], &plan["fits"]), (&json!("refused"), &json!(false)), "{plan}");
    assert_eq!(plan["error"]["code"], "cannot_fit");
    let (_, unpinned) = post(&world, "/models/ada/pin", json!({ "pinned": false })).await;
    assert_eq!(unpinned["pinned"], false, "{unpinned}");
    chat(&world, "bob").await;
    world.stop().await;
}

// contract: POST /plan
#[tokio::test]
async fn a_plan_names_who_would_leave_and_changes_nothing() {
    let models = standin("ada", "14GiB", "--load 50ms") + &standin("bob", "14GiB", "--load 50ms");
    let world = world(&models).await;
    chat(&world, "ada").await;
    let (status, plan) = post(&world, "/plan", json!({ "model": "bob" })).await;
    assert_eq!(status, 200, "{plan}");
    assert_eq!((&plan["verdict"], &plan["fits"]), (&json!("begins"), &json!(true)), "{plan}");
    assert_eq!(plan["evicts"][0]["model"], "ada");
    assert_eq!(plan["gpus"], json!([0]));
    let (_, ready) = post(&world, "/plan", json!({ "model": "ada" })).await;
    assert_eq!((&ready["verdict"], &ready["evicts"]), (&json!("ready"), &json!([])), "{ready}");
    let (status, unknown) = post(&world, "/plan", json!({ "model": "bobb" })).await;
    assert_eq!(status, 404, "{unknown}");
    assert_eq!(world.state_of("ada").await, "ready", "nothing was done");
    assert_eq!(world.swaps().await.len(), 1);
    world.stop().await;
}

#[tokio::test]
async fn an_open_window_and_a_warm_up_are_loaded_before_anybody_asks() {
    let always = "keep: \"Mon-Sun 00:00-24:00\"\n    ttl: 100ms";
    let models = with(&standin("ada", "8GiB", "--load 50ms"), always)
        + &with(&standin("bob", "8GiB", "--load 50ms"), "warmup: true")
        + &standin("eve", "8GiB", "--load 50ms");
    let world = world(&models).await;
    let status = world.until("both are ready", |status| status["preload"]["done"] == 2).await;
    let none = json!([]);
    assert_eq!(
        status["preload"],
        json!({ "done": 2, "total": 2, "loading": none, "waiting": none, "failed": none })
    );
    assert_eq!(status["models"]["eve"]["state"], "stopped");
    let kept = row(&world, "ada").await;
    assert_eq!((&kept["kept"], &kept["state"]), (&json!(true), &json!("HOT")), "no ttl runs");
    let (status, refused) = post(&world, "/models/ada/extend-ttl", json!({})).await;
    assert_eq!(status, 409, "{refused}");
    assert!(world.log().contains("preload: 2 of 2 ready"), "{}", world.log());
    world.stop().await;
}

// contract: POST /models/{name}/sleep
// contract: POST /models/{name}/wake
#[tokio::test]
async fn a_model_sleeps_and_wakes_by_hand_in_one_process() {
    let sleeper = standin("ada", "8GiB", "--load 100ms --style vllm")
        .replace("engine: openai", "engine: vllm\n    sleep: 1");
    let world = world(&sleeper).await;
    chat(&world, "ada").await;
    let pids = world.engine_pids();
    let (status, asleep) = post(&world, "/models/ada/sleep", json!({})).await;
    assert_eq!((status, &asleep["status"]), (200, &json!("success")), "{asleep}");
    assert_eq!((&asleep["model"], &asleep["sleep_level"]), (&json!("ada"), &json!(1)), "{asleep}");
    assert_eq!(world.state_of("ada").await, "sleeping");
    let (status, woken) = post(&world, "/models/ada/wake", json!({})).await;
    assert_eq!((status, &woken["swapped"]), (200, &json!(true)), "{woken}");
    assert_eq!(world.state_of("ada").await, "ready");
    assert_eq!(world.engine_pids(), pids, "the very same engine");
    world.stop().await;
}

#[tokio::test]
async fn sleep_and_wake_say_in_words_why_they_cannot_be_had() {
    let world = world(&standin("ada", "8GiB", "--load 50ms")).await;
    let message = |answer: &Value| answer["error"]["message"].as_str().unwrap_or("").to_owned();
    let (status, asleep) = post(&world, "/models/ada/sleep", json!({})).await;
    assert_eq!(status, 409, "{asleep}");
    assert!(message(&asleep).contains("ada is not loaded"), "{asleep}");
    let (status, woken) = post(&world, "/models/ada/wake", json!({})).await;
    assert_eq!(status, 409, "{woken}");
    assert!(message(&woken).contains("/models/ada/load"), "{woken}");
    chat(&world, "ada").await;
    let (status, asleep) = post(&world, "/models/ada/sleep", json!({})).await;
    assert_eq!(status, 409, "{asleep}");
    assert!(message(&asleep).contains("does not sleep"), "{asleep}");
    let (status, woken) = post(&world, "/models/ada/wake", json!({})).await;
    assert_eq!((status, &woken["status"]), (200, &json!("success")), "{woken}");
    world.stop().await;
}
