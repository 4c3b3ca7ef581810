//! The main job with containers: A → B → A by chat requests, the first one gone before the second
//! starts; with real llama-servers and with stand-ins, on both engines, over a socket and TCP.
//!
//! Needs WHARF_TEST_DOCKER (and WHARF_TEST_DOCKER26), and for real engines WHARF_TEST_LLAMA and
//! WHARF_TEST_GGUF; the test command sets all of them.

#[path = "support/containers.rs"]
mod containers;
#[expect(dead_code, reason = "used in part")]
mod docker;
mod support;

use containers::{Daemon, LLAMA, Scene, model, settings, standin};
use serde_json::{Value, json};

/// Room for one of the two.
async fn there_and_back(daemon: &Daemon, models: &str) {
    let scene = Scene::open(daemon, &settings(daemon, "on_exit: stop"), models, &[]).await;
    for (name, stream) in [("ada", false), ("bob", true), ("ada", true)] {
        let answer = scene.world.server.talk.chat(name, stream, &[]).await.expect("an answer");
        assert!(answer.is_from(name), "{answer:?}\n{}", scene.world.log());
        scene.settles_at(1).await;
        eprintln!(
            "{}: {name} says {:?} after {:.2} s",
            daemon.host,
            answer.text,
            answer.took.as_secs_f64()
        );
    }
    // The daemon's own account: each has ended before the next begins. (It is removed meanwhile.)
    let wanted = ["start ada", "die ada", "start bob", "die bob", "start ada"];
    scene.until("all is reported", |scene| scene.events.seen().len() >= wanted.len() + 2).await;
    let seen = scene.events.seen();
    let (removed, seen): (Vec<_>, Vec<_>) =
        seen.into_iter().partition(|(_, event)| event.starts_with("destroy"));
    assert_eq!(removed.len(), 2, "{removed:?}");
    let order: Vec<&str> = seen.iter().map(|(_, event)| event.as_str()).collect();
    assert_eq!(order, wanted);
    for pair in [1, 3].map(|at| (&seen[at], &seen[at + 1])) {
        let millis = (pair.1.0 - pair.0.0) / 1_000_000;
        eprintln!("{} → {}: {millis} ms", pair.0.1, pair.1.1);
    }
    let swaps = scene.world.swaps().await;
    let ready: Vec<&Value> = swaps.iter().filter(|swap| swap["result"] == json!("ready")).collect();
    assert_eq!(ready.len(), 3, "{swaps:#?}");
    for swap in ready {
        eprintln!("{} {} s {}", swap["model"], swap["seconds"], swap["phases"]);
    }
    scene.stop().await;
}

fn llama_models(server: &str, gguf: &str) -> String {
    let one = |name: &str| {
        let weights = format!("{gguf}/{name}.gguf");
        let args = ["-m", weights.as_str(), "-t", "1", "-tb", "1", "--metrics"];
        let docker = json!({
            "image": LLAMA, "pull": "never", "entrypoint": [server], "args": args,
        });
        model(name, &json!({ "engine": "llamacpp", "vram": "14GiB", "docker": docker }))
    };
    one("ada") + &one("bob")
}

async fn real_engines(variable: &str, test: &str) {
    let Some(daemon) = Daemon::given(variable, test) else { return };
    let (Ok(server), Ok(gguf)) =
        (std::env::var("WHARF_TEST_LLAMA"), std::env::var("WHARF_TEST_GGUF"))
    else {
        return support::skip(&format!("{test}: WHARF_TEST_LLAMA or WHARF_TEST_GGUF is not set"));
    };
    there_and_back(daemon.with_llama(&server, &gguf), &llama_models(&server, &gguf)).await;
}

fn standins() -> String {
    standin("ada", "14GiB", "--load 300ms") + &standin("bob", "14GiB", "--load 300ms")
}

#[tokio::test]
async fn two_real_llama_servers_take_turns_in_containers() {
    real_engines("WHARF_TEST_DOCKER", "llama-server in Docker").await;
}

#[tokio::test]
async fn two_real_llama_servers_take_turns_on_the_newer_engine() {
    real_engines("WHARF_TEST_DOCKER26", "llama-server in Docker 26").await;
}

#[tokio::test]
async fn stand_ins_take_turns() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "stand-ins in Docker") else { return };
    there_and_back(daemon.with_standin(), &standins()).await;
}

#[tokio::test]
async fn over_tcp_too() {
    let address = format!("tcp://127.0.0.1:{}", docker::free_port());
    let Some(_own) = docker::OwnDaemon::start("tcp", &["-H", &address]) else { return };
    let daemon = Daemon { host: address };
    there_and_back(daemon.with_standin(), &standins()).await;
}

/// What fits together stays together, and one more takes the place of the idlest only.
#[tokio::test]
async fn no_more_leaves_than_must() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "packing in Docker") else { return };
    let models = ["ada", "bob", "cyd"].map(|name| standin(name, "11GiB", "--load 100ms")).concat();
    let daemon = daemon.with_standin();
    let scene = Scene::open(daemon, &settings(daemon, "on_exit: stop"), &models, &[]).await;
    for name in ["ada", "bob", "ada", "bob"] {
        scene.answers(name).await;
    }
    assert_eq!(scene.containers().len(), 2);
    assert_eq!(scene.world.swaps().await.len(), 2, "no swap where both fit");
    scene.answers("cyd").await;
    let swaps = scene.world.swaps().await;
    assert_eq!(swaps[0]["evicted"].as_array().map(Vec::len), Some(1), "{swaps:#?}");
    scene.settles_at(2).await;
    let stayed = if swaps[0]["evicted"][0]["model"] == "ada" { "bob" } else { "ada" };
    scene.answers(stayed).await;
    assert_eq!(scene.world.swaps().await.len(), 3, "who stayed was not started anew");
    scene.stop().await;
}

/// A container is made while the other model still answers; whoever wanted it leaves.
#[tokio::test]
async fn a_swap_that_is_called_off_leaves_no_container_that_was_made_for_it() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "called off") else { return };
    let models = standin("ada", "14GiB", "--tokens-per-second 2") + &standin("bob", "14GiB", "");
    let settings = settings(&daemon, "on_exit: stop, max_wait: 1ms");
    let scene = Scene::open(daemon.with_standin(), &settings, &models, &[]).await;
    scene.answers("ada").await;
    let talk = scene.world.server.talk.clone();
    let stream = tokio::spawn(async move { talk.chat("ada", true, &[]).await });
    scene.world.until("ada answers", |status| status["in_flight"] == 1).await;
    let talk = scene.world.server.talk.clone();
    let leaver = tokio::spawn(async move { talk.chat("bob", false, &[]).await });
    scene.settles_at(2).await;
    assert!(scene.events.seen().iter().all(|(_, event)| event != "start bob"));
    leaver.abort();
    scene.settles_at(1).await;
    let answer = stream.await.expect("no panic").expect("an answer");
    assert!(answer.is_from("ada"), "{answer:?}");
    scene.stop().await;
}
