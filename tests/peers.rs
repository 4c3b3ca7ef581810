//! Two real Wharfs, one the peer of the other; and names that lead to one of several models.

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{World, gpu, serve, standin};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wharf::cli::demo::talk::{Answer, Talk};

const KEY: &str = "key-of-the-peer-0123456789";

/// On the CPU of a machine whose GPU is simulated.
fn engine(name: &str, flags: &str) -> String {
    standin(name, "1GiB", flags)
}

/// The peer: its callers need a key, and so would the test.
async fn far(models: &str) -> World {
    let key = format!("{{ name: near, key: {KEY}, models: ['*'], scopes: [inference] }}");
    serve(&format!("{}\nauth: {{ keys: [{key}] }}", gpu("24GiB", "10ms")), models, &[]).await
}

fn peer(world: &World, more: &str) -> String {
    format!("peers: {{ far: {{ url: \"{}\", api_key: {KEY}{more} }} }}", world.server.talk.gateway)
}

async fn near(settings: &str, models: &str) -> World {
    serve(&(gpu("24GiB", "10ms") + "\n" + settings), models, &[]).await
}

fn gateway(world: &World) -> Talk {
    let mut talk = world.server.talk.clone();
    talk.orchestrator = talk.gateway.clone();
    talk
}

async fn listed(world: &World) -> Vec<Value> {
    let list = gateway(world).get("/v1/models").await.expect("a list");
    list["data"].as_array().expect("rows").clone()
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["id"].as_str().expect("an id")).collect()
}

async fn until_listed(world: &World, name: &str) {
    let began = Instant::now();
    while !names(&listed(world).await).contains(&name) {
        assert!(began.elapsed() < Duration::from_secs(60), "no {name}\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn ask(world: &World, model: &str, stream: bool) -> Answer {
    world.server.talk.chat(model, stream, &[]).await.expect("an answer")
}

async fn says(world: &World, asked: &str, stream: bool, engine: &str) {
    let answer = ask(world, asked, stream).await;
    assert!(answer.is_from(engine), "{asked}: {answer:?}\n{}", world.log());
}

/// The latest row of activity: which model answered.
async fn answered_by(world: &World) -> String {
    let rows = world.server.talk.get("/api/metrics").await.expect("rows");
    let last = rows.as_array().expect("rows").last().expect("a row").clone();
    last["model"].as_str().expect("a model").to_owned()
}

fn reload(world: &World) {
    let pid = Pid::from_raw(i32::try_from(world.server.pid()).expect("a pid"));
    kill(pid, Signal::SIGHUP).expect("a signal");
}

#[tokio::test]
async fn a_peer_is_a_namespace_whose_models_are_found_and_survive_a_reload() {
    let far = far(&(engine("ada", "") + &engine("org/bob", ""))).await;
    let near = near(&peer(&far, ""), &engine("own", "")).await;
    until_listed(&near, "far/org/bob").await;
    let rows = listed(&near).await;
    assert_eq!(names(&rows), ["far/ada", "far/org/bob", "own"]);
    assert_eq!((&rows[0]["meta"]["peer"], &rows[2]["meta"]["peer"]), (&json!("far"), &Value::Null));
    for stream in [false, true] {
        says(&near, "far/ada", stream, "ada").await;
        says(&near, "far/org/bob", stream, "org/bob").await;
    }
    says(&near, "own", false, "own").await;

    let file = near.dir.path().join("models.yaml");
    let text = std::fs::read_to_string(&file).expect("its file");
    std::fs::write(&file, text + &engine("more", "")).expect("written");
    reload(&near);
    until_listed(&near, "more").await;
    assert_eq!(names(&listed(&near).await), ["far/ada", "far/org/bob", "more", "own"]);
    says(&near, "far/ada", false, "ada").await;
    assert!(!near.log().contains(KEY) && !far.log().contains(KEY));
    near.stop().await;
    far.stop().await;
}

#[tokio::test]
async fn a_peer_that_dies_is_refused_at_once_and_used_again_when_it_is_back() {
    let mut far = far(&engine("ada", "")).await;
    let near = near(&peer(&far, ", models: [ada]"), &engine("own", "")).await;
    says(&near, "far/ada", false, "ada").await;
    assert_eq!(near.state_of("far/ada").await, "ready");
    far.server.kill().expect("killed");
    // Noticed without any request.
    near.until("it is noticed", |status| status["models"]["far/ada"]["state"] != "ready").await;
    let first = ask(&near, "far/ada", false).await;
    assert_eq!(first.status, 503, "{first:?}");
    assert!(first.text.contains("does not answer"), "{first:?}");
    // The circuit is open: not even tried.
    let swaps = near.swaps().await.len();
    let body = json!({ "model": "far/ada", "messages": [] });
    let (status, refused) =
        gateway(&near).call(Method::POST, "/v1/chat/completions", body).await.expect("an answer");
    assert_eq!((status, &refused["error"]["code"]), (503, &json!("start_failed")), "{refused:#}");
    assert_eq!(near.swaps().await.len(), swaps);
    far.server.restart().await.expect("back");
    let began = Instant::now();
    while !ask(&near, "far/ada", false).await.is_from("ada") {
        assert!(began.elapsed() < Duration::from_secs(90), "never back\n{}", near.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    near.stop().await;
    far.stop().await;
}

#[tokio::test]
async fn requests_that_fail_open_the_circuit_too() {
    let mut far = far(&engine("ada", "")).await;
    let near = near(&peer(&far, ", models: [ada]"), &engine("own", "")).await;
    says(&near, "far/ada", true, "ada").await;
    far.server.kill().expect("killed");
    for _ in 0..4 {
        assert_eq!(ask(&near, "far/ada", false).await.status, 503);
    }
    assert_ne!(near.state_of("far/ada").await, "ready");
    far.server.restart().await.expect("back");
    near.stop().await;
    far.stop().await;
}

#[tokio::test]
async fn failover_asks_the_peer_when_the_own_model_cannot_be_had_in_time() {
    let far = far(&engine("ada", "")).await;
    let models =
        "  broken: { engine: openai, vram: 1GiB, process: { cmd: 'false' }, port: 19999 }\n"
            .to_owned()
            + &engine("slow", "--load 90s")
            + &engine("dies", "--crash-on-request 1")
            + &engine("own", "");
    let settings = peer(&far, ", models: [ada]")
        + "\nroutes:\n  smart: { failover: [broken, far/ada] }\n  patient: { failover: [slow, \
           far/ada], within: 300ms }\n  shaky: { failover: [dies, far/ada] }\n  home: { failover: [own, far/ada] }\n  lost: { failover: \
           [broken, far/gone] }\n";
    let settings = settings.replace("models: [ada]", "models: [ada, gone]");
    let near = near(&settings, &models).await;
    for stream in [false, true, false] {
        says(&near, "smart", stream, "ada").await;
        assert_eq!(answered_by(&near).await, "far/ada");
    }
    says(&near, "patient", false, "ada").await;
    assert_eq!(answered_by(&near).await, "far/ada");
    // Started, and gone before it answered: twice, as one retry is its own.
    says(&near, "shaky", true, "ada").await;
    assert_eq!(answered_by(&near).await, "far/ada");
    says(&near, "home", false, "own").await;
    assert_eq!(answered_by(&near).await, "own");
    // The last one's answer is the answer, and every request is told of once.
    let lost = ask(&near, "lost", false).await;
    assert_eq!(lost.status, 404, "{lost:?}");
    let rows = near.server.talk.get("/api/metrics").await.expect("rows");
    assert_eq!(rows.as_array().expect("rows").len(), 7);
    let row = &listed(&near).await;
    let row = row.iter().find(|row| row["id"] == "smart").expect("the route");
    assert_eq!(row["meta"]["route"], "failover");
    near.stop().await;
    far.stop().await;
}

#[tokio::test]
async fn any_of_takes_the_model_that_is_ready() {
    let models = engine("ada", "--load 60s") + &engine("bob", "") + &engine("eve", "--load 60s");
    let near = near("routes: { any: { any_of: [ada, bob, eve] } }", &models).await;
    says(&near, "bob", false, "bob").await;
    for stream in [false, true] {
        says(&near, "any", stream, "bob").await;
        assert_eq!(answered_by(&near).await, "bob");
    }
    assert_eq!(near.state_of("ada").await, "stopped");
    let raw = gateway(&near).get("/upstream/any/v1/models").await.expect("an answer");
    assert_eq!(raw["data"][0]["id"], "bob", "{raw:#}");
    near.stop().await;
}

#[tokio::test]
async fn two_that_lead_to_each_other_end_the_circle() {
    let here = near("", &engine("own", "")).await;
    let there = near("", &engine("own", "")).await;
    for (world, other) in [(&here, &there), (&there, &here)] {
        // It may be up before it heeds the signal: by then it does.
        says(world, "own", false, "own").await;
        let file = world.dir.path().join("models.yaml");
        let text = std::fs::read_to_string(&file).expect("its file");
        let url = &other.server.talk.gateway;
        let more = format!(
            "peers: {{ other: {{ url: \"{url}\", models: [loop] }} }}\n\
             routes: {{ loop: {{ any_of: [other/loop] }} }}\n"
        );
        std::fs::write(&file, more + &text).expect("written");
        reload(world);
    }
    until_listed(&here, "loop").await;
    until_listed(&there, "loop").await;
    let answer = ask(&here, "loop", false).await;
    assert_eq!(answer.status, 508, "{answer:?}");
    assert!(answer.text.contains("in a circle"), "{answer:?}");
    here.stop().await;
    there.stop().await;
}

/// A request with all of its body.
fn is_whole(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    body.len() >= length.map_or(0, |length| length.trim().parse().expect("a length"))
}

/// Answers everything, and keeps what it was asked.
async fn recorder() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("its address"));
    let heads = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut bytes = Vec::new();
            while !is_whole(&bytes) && stream.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {}
            kept.lock().expect("unpoisoned").push(String::from_utf8_lossy(&bytes).into());
            let body = r#"{"data":[],"choices":[{"message":{"content":"x-1"}}]}"#;
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (url, heads)
}

#[tokio::test]
async fn a_peer_gets_its_own_key_and_nothing_of_the_callers() {
    let (url, heads) = recorder().await;
    let settings = format!("peers: {{ far: {{ url: \"{url}\", api_key: {KEY}, models: [x] }} }}");
    let near = near(&settings, &engine("own", "")).await;
    let headers = [
        ("authorization", "Bearer of-the-caller"),
        ("x-api-key", "of-the-caller"),
        ("cookie", "session=of-the-caller"),
        ("x-wharf-hops", "2"),
    ];
    let answer = near.server.talk.chat("far/x", false, &headers).await.expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}\n{}", near.log());
    let asked = heads.lock().expect("unpoisoned").clone();
    assert!(asked.iter().all(|head| !head.contains("of-the-caller")), "{asked:#?}");
    let chat = asked.iter().find(|head| head.starts_with("POST")).expect("the request");
    for part in [&format!("authorization: Bearer {KEY}"), "x-wharf-hops: 3", "\"model\":\"x\""] {
        assert!(chat.contains(part), "no {part} in {chat}");
    }
    near.stop().await;
}
