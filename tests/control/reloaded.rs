use std::time::Duration;

use futures_util::future::join_all;
use hyper::Method;
use serde_json::{Value, json};

use super::support::{World, gpu, serve, standin};
use super::{call, free_port, until};

/// An answer takes 3.2 s.
const SLOW: &str = "--load 100ms --tokens-per-second 5";

fn three() -> String {
    standin("ada", "4GiB", SLOW) + &standin("bob", "4GiB", SLOW) + &standin("cyd", "4GiB", SLOW)
}

async fn loaded(models: &str) -> World {
    let world = serve(&gpu("24GiB", "50ms"), models, &[]).await;
    for name in ["ada", "bob", "cyd"] {
        world.post(&format!("/models/{name}/load"), json!({})).await;
    }
    world
}

async fn reload(world: &World, yaml: &str) -> (u16, Value) {
    world.write(yaml);
    world.post("/config/reload", Value::Null).await
}

fn names(answer: &Value, kind: &str) -> Vec<String> {
    let names = answer[kind].as_array().into_iter().flatten();
    names.map(|name| name.as_str().unwrap_or_default().to_owned()).collect()
}

/// 100 streams of 3.2 s each, all at once, while the file changes again and again.
// contract: POST /config/reload
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_of_an_untouched_model_breaks_however_often_the_file_changes() {
    let world = loaded(&three()).await;
    let before = world.yaml();
    let engine = |world: &World| {
        let talk = world.server.talk.clone();
        async move { talk.get("/models/ada").await.unwrap()["instance"].clone() }
    };
    let ada = engine(&world).await;
    let talk = &world.server.talk;
    let streams = (0..100_usize).map(|n| async move {
        let name = ["ada", "bob", "cyd"][n % 3];
        (name, talk.chat(name, true, &[]).await)
    });
    let rounds = async {
        world.until("the streams run", |status| status["in_flight"].as_u64() >= Some(60)).await;
        // Adds dan, changes bob, adjusts cyd.
        let added = before.replace(
            &standin("bob", "4GiB", SLOW),
            &standin("bob", "4GiB", &SLOW.replace("100ms", "150ms")),
        );
        let added = added.replace("  cyd:\n", "  cyd:\n    priority: high\n");
        let added = added + &standin("dan", "4GiB", SLOW);
        let (status, answer) = reload(&world, &added).await;
        assert_eq!(status, 200, "{answer:#}");
        assert_eq!(names(&answer, "added"), ["dan"]);
        assert_eq!(names(&answer, "changed"), ["bob"]);
        assert_eq!(names(&answer, "adjusted"), ["cyd"]);
        assert!(talk.chat("dan", false, &[]).await.unwrap().is_from("dan"));
        // Takes dan away again, and back; then a file that is wrong.
        for _ in 0..3 {
            let (_, answer) = reload(&world, &before).await;
            assert_eq!(names(&answer, "removed"), ["dan"], "{answer:#}");
            let (_, answer) = reload(&world, &added).await;
            assert_eq!(names(&answer, "added"), ["dan"], "{answer:#}");
        }
        let (status, _) = reload(&world, &added.replace("engine: openai", "engine: opnai")).await;
        assert_eq!(status, 400);
    };
    let (answers, ()) = tokio::join!(join_all(streams), rounds);
    for (name, answer) in answers {
        let answer = answer.unwrap();
        // Drained, not cut: that holds for the changed one as well.
        assert!(answer.is_from(name), "{name}: {answer:?}\n{}", world.log());
    }
    assert_eq!(engine(&world).await, ada, "the very same engine");
    assert!(world.server.talk.chat("bob", false, &[]).await.unwrap().is_from("bob"));
    world.stop().await;
}

// contract: CONFIG a bad file changes nothing
#[tokio::test]
async fn a_bad_file_changes_nothing_and_the_answer_says_where_every_error_is() {
    let world = loaded(&three()).await;
    let good = world.yaml();
    let before = (world.config().await, world.engine_pids());
    let bad = good.replace("vram: 4GiB\n", "vram: 4Gib8\n").replace("gpu:", "gpus:");
    let (status, answer) = reload(&world, &bad).await;
    assert_eq!(status, 400, "{answer:#}");
    let problems = answer["problems"].as_array().unwrap();
    let errors: Vec<&Value> = problems.iter().filter(|p| p["severity"] == "error").collect();
    assert!(errors.len() >= 4, "{answer:#}");
    for error in &errors {
        assert!(error["line"].as_u64() > Some(0) && error["column"].as_u64() > Some(0), "{error}");
    }
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("nothing was changed") && message.contains("models.yaml:"),
        "{message}"
    );
    assert_eq!((world.config().await, world.engine_pids()), before);
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    std::fs::remove_file(world.dir.path().join("models.yaml")).unwrap();
    let (status, answer) = world.post("/config/reload", Value::Null).await;
    assert_eq!(status, 400, "{answer:#}");
    let (status, answer) = reload(&world, &good).await;
    assert_eq!(
        (status, &answer["message"]),
        (200, &json!("configuration reloaded: nothing changed"))
    );
    world.stop().await;
}

#[tokio::test]
async fn listeners_move_in_place_and_what_is_under_way_on_the_old_address_ends() {
    let world = serve(&gpu("24GiB", "50ms"), &standin("ada", "4GiB", SLOW), &[]).await;
    let talk = world.server.talk.clone();
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let stream = tokio::spawn({
        let talk = talk.clone();
        async move { talk.chat("ada", true, &[]).await }
    });
    world.until("the stream runs", |status| status["in_flight"] == 1).await;
    let (old, port) = (talk.gateway.trim_start_matches("http://").to_owned(), free_port());
    let yaml = world.yaml();
    let new = format!("127.0.0.1:{port}");
    let (status, answer) = reload(&world, &yaml.replace(&old, &new)).await;
    assert_eq!(status, 200, "{answer:#}");
    assert_eq!(names(&answer, "settings"), ["listen.gateway"]);
    let (status, health) = call(Method::GET, &format!("http://{new}/health"), "").await.unwrap();
    assert_eq!(status, 200, "{health:#}");
    until("the old address closes", async || {
        tokio::net::TcpStream::connect(&old).await.is_err().then_some(())
    })
    .await;
    assert!(stream.await.unwrap().unwrap().is_from("ada"), "{}", world.log());
    // One address for both, then apart again: nothing is bound twice.
    let control = talk.orchestrator.trim_start_matches("http://").to_owned();
    let (status, answer) = reload(&world, &yaml.replace(&old, &control)).await;
    assert_eq!(status, 200, "{answer:#}");
    let both = format!("http://{control}/v1/models");
    assert_eq!(call(Method::GET, &both, "").await.unwrap().0, 200);
    let (status, _) = reload(&world, &yaml).await;
    assert_eq!(status, 200);
    assert_eq!(call(Method::GET, &both, "").await.unwrap().0, 404);
    // To every address: the same port, which only one of the two can have.
    let everywhere = old.replace("127.0.0.1", "0.0.0.0");
    let (status, answer) = reload(&world, &yaml.replace(&old, &everywhere)).await;
    assert_eq!(status, 200, "{answer:#}");
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let (status, answer) = reload(&world, &yaml).await;
    assert_eq!(status, 200, "{answer:#}");
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    world.stop().await;
}

#[tokio::test]
async fn an_address_that_somebody_has_changes_nothing_and_names_him() {
    let world = serve(&gpu("24GiB", "50ms"), &standin("ada", "4GiB", SLOW), &[]).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let talk = &world.server.talk;
    let old = talk.gateway.trim_start_matches("http://").to_owned();
    let there = taken.local_addr().unwrap().to_string();
    let yaml = world.yaml().replace(&old, &there).replace("reserve: 256MiB", "reserve: 300MiB");
    let (status, answer) = reload(&world, &yaml).await;
    assert_eq!(status, 409, "{answer:#}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains(&there) && message.contains("taken by"), "{message}");
    let config = world.config().await;
    assert_eq!(config["listen"]["gateway"], json!(old));
    assert_eq!(config["gpu"]["reserve"], json!("256MiB"), "nothing of that file");
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    // A control API for everyone is refused in a reload as at the start.
    let control = talk.orchestrator.trim_start_matches("http://").to_owned();
    let open = world.yaml().replace(&there, &old).replace(&control, "0.0.0.0:1");
    let (status, answer) = reload(&world, &open).await;
    assert_eq!(status, 400, "{answer:#}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("auth.keys"), "{answer}");
    world.stop().await;
}

#[tokio::test]
async fn keys_limits_and_hosts_change_in_place() {
    let models = standin("ada", "4GiB", SLOW);
    let world = serve(&gpu("24GiB", "50ms"), &models, &[]).await;
    let talk = &world.server.talk;
    let yaml = world.yaml();
    let keyed =
        "auth: { keys: [{ name: a, key: first-first-first-first, scopes: [inference, admin] }] }\n";
    let (status, answer) = reload(&world, &(keyed.to_owned() + &yaml)).await;
    assert_eq!((status, names(&answer, "settings")), (200, vec!["auth.keys".to_owned()]));
    assert_eq!(talk.chat("ada", false, &[]).await.unwrap().status, 401);
    let key = [("authorization", "Bearer first-first-first-first")];
    assert!(talk.chat("ada", false, &key).await.unwrap().is_from("ada"));
    world.write(&(yaml + "\n"));
    let pid = i32::try_from(world.server.pid()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGHUP)
        .unwrap();
    until("the key is gone", async || {
        talk.chat("ada", false, &[]).await.unwrap().is_from("ada").then_some(())
    })
    .await;
    world.stop().await;
}

// contract: CONFIG reload when the file changes
#[tokio::test]
async fn a_watched_file_is_read_again_when_an_editor_replaces_it() {
    let settings = gpu("24GiB", "50ms") + "\nreload: { watch: true }";
    let world = serve(&settings, &standin("ada", "4GiB", SLOW), &[]).await;
    let path = world.dir.path().join("models.yaml");
    let replace = |yaml: String| {
        let new = world.dir.path().join(".models.yaml.swp");
        std::fs::write(&new, yaml).unwrap();
        std::fs::rename(&new, &path).unwrap();
    };
    let yaml = world.yaml();
    let waits = async |wanted: &str| {
        until(wanted, async || {
            (world.config().await["swap"]["max_wait"] == json!(wanted)).then_some(())
        })
        .await;
    };
    // Each by another inode: a watch on the file itself would see the first only.
    for seconds in [41, 42, 43] {
        replace(format!("swap: {{ max_wait: {seconds}s }}\n{yaml}"));
        waits(&format!("{seconds}s")).await;
    }
    // One that is broken stays outside, and the next is seen all the same.
    replace(format!("swpa: {{ max_wait: 44s }}\n{yaml}"));
    until("the log names the error", async || world.log().contains("swpa").then_some(())).await;
    assert_eq!(world.config().await["swap"]["max_wait"], "43s");
    std::fs::write(&path, format!("swap: {{ max_wait: 45s }}\n{yaml}")).unwrap();
    waits("45s").await;
    assert!(world.log().contains("configuration reloaded (the file changed)"), "{}", world.log());
    tokio::time::timeout(Duration::from_secs(60), world.stop()).await.expect("a clean stop");
}

#[tokio::test]
async fn an_address_that_a_reload_closed_does_not_hold_up_the_end() {
    let times = "\nswap: { drain_timeout: 10m, shutdown_timeout: 1s }";
    // Its answer takes minutes.
    let slow = standin("ada", "4GiB", "--load 50ms --tokens-per-second 0.05");
    let world = serve(&(gpu("24GiB", "50ms") + times), &slow, &[]).await;
    let talk = world.server.talk.clone();
    let stream = tokio::spawn({
        let talk = talk.clone();
        async move { talk.chat("ada", true, &[]).await }
    });
    world.until("the stream runs", |status| status["in_flight"] == 1).await;
    let old = talk.gateway.trim_start_matches("http://").to_owned();
    let new = format!("127.0.0.1:{}", free_port());
    let (status, answer) = reload(&world, &world.yaml().replace(&old, &new)).await;
    assert_eq!(status, 200, "{answer:#}");
    tokio::time::timeout(Duration::from_secs(45), world.stop()).await.expect("a prompt end");
    stream.abort();
}
