//! `kill -9` of Wharf at bad moments: what is healthy is adopted, the rest is reaped, strangers
//! are left alone.

mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use support::{EXE, World, gpu, serve, standin};

/// What failed is tried again every 10 s.
const PATIENCE: Duration = Duration::from_secs(60);

async fn world() -> World {
    world_with("--load 600ms").await
}

async fn world_with(ada: &str) -> World {
    let models =
        standin("ada", "14GiB", ada) + &standin("bob", "14GiB", "--load 600ms --shutdown fixed:2s");
    serve(&(gpu("24GiB", "100ms") + "\nswap: { min_residency: 100ms }"), &models, &[]).await
}

/// A background request whose fate does not matter.
fn ask(world: &World, model: &'static str) -> tokio::task::JoinHandle<()> {
    let talk = world.server.talk.clone();
    tokio::spawn(async move {
        let _ = talk.chat(model, false, &[]).await;
    })
}

fn is(model: &str, state: &str) -> impl Fn(&Value) -> bool {
    let (model, state) = (model.to_owned(), state.to_owned());
    move |status| status["models"][&model]["state"] == json!(state)
}

#[tokio::test]
async fn a_running_engine_is_adopted_without_a_reload_and_a_stranger_is_left_alone() {
    let mut world = world().await;
    // The same program, another installation: none of ours.
    let mut stranger = Command::new(EXE)
        .args(["engine", "--host", "127.0.0.1", "--port", "0", "--name", "stranger"])
        .env("WHARF_INSTALLATION", "somebody-else")
        .env("WHARF_INSTANCE", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let before = world.engine_pids();
    world.server.kill_and_restart().await.unwrap();
    assert!(is("ada", "ready")(&world.status().await), "adopted: {}", world.log());
    assert_eq!(world.engine_pids(), before, "the very same process");
    assert!(world.server.talk.chat("ada", true, &[]).await.unwrap().is_from("ada"));
    assert!(world.swaps().await.iter().all(|swap| swap["id"] == "s1"), "no load was needed");
    // An adopted engine is as good as any: it can be swapped out.
    assert!(world.server.talk.chat("bob", false, &[]).await.unwrap().is_from("bob"));
    assert!(stranger.try_wait().unwrap().is_none(), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    world.stop().await;
}

#[tokio::test]
async fn killed_in_the_middle_of_a_start_the_half_started_engine_is_reaped_or_adopted_whole() {
    let mut world = world_with("--load 3s").await;
    let asked = ask(&world, "ada");
    world.until("ada starts", |status| status["swaps"][0]["phase"] == "start").await;
    world.server.kill().unwrap();
    asked.abort();
    world.server.restart().await.unwrap();
    // Whatever was found: at most one engine, and it serves.
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    assert_eq!(world.engine_pids().len(), 1, "{}", world.log());
    world.stop().await;
}

#[tokio::test]
async fn killed_in_the_middle_of_a_stop_nothing_is_left_behind() {
    let mut world = world().await;
    assert!(world.server.talk.chat("bob", false, &[]).await.unwrap().is_from("bob"));
    let asked = ask(&world, "ada");
    world.until("bob stops", |status| status["swaps"][0]["phase"] == "vacate").await;
    world.server.kill().unwrap();
    asked.abort();
    world.server.restart().await.unwrap();
    assert!(
        world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"),
        "{}",
        world.log()
    );
    world.until("bob is gone", is("bob", "stopped")).await;
    assert_eq!(world.engine_pids().len(), 1);
    world.stop().await;
}

#[tokio::test]
async fn an_engine_whose_configuration_changed_is_not_adopted() {
    let mut world = world().await;
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let before = world.engine_pids();
    world.server.kill().unwrap();
    let path = world.dir.path().join("models.yaml");
    let yaml = std::fs::read_to_string(&path).unwrap().replace("--load 600ms", "--load 200ms");
    std::fs::write(&path, yaml).unwrap();
    world.server.restart().await.unwrap();
    assert!(world.engine_pids().is_empty(), "reaped: {}", world.log());
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    assert_ne!(world.engine_pids(), before);
    world.stop().await;
}

#[tokio::test]
async fn an_engine_that_sleeps_is_not_taken_for_a_ready_one() {
    let models = standin("ada", "14GiB", "--load 100ms --style vllm")
        .replace("engine: openai", "engine: vllm\n    sleep: 1");
    let mut world = serve(&gpu("24GiB", "100ms"), &models, &[]).await;
    assert!(
        world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"),
        "{}",
        world.log()
    );
    let status = world.server.talk.get("/models/ada").await.unwrap();
    let endpoint = status["engine_endpoint"].as_str().unwrap().to_owned();
    world.server.kill().unwrap();
    let address = endpoint.trim_start_matches("http://").to_owned();
    let mut engine = tokio::net::TcpStream::connect(&address).await.unwrap();
    let ask = b"POST /sleep?level=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    engine.write_all(ask).await.unwrap();
    let mut said = String::new();
    engine.read_to_string(&mut said).await.unwrap();
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    world.server.restart().await.unwrap();
    assert!(
        world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"),
        "{}",
        world.log()
    );
    world.stop().await;
}

#[tokio::test]
async fn a_full_disk_costs_the_journal_only_and_health_says_so() {
    let mut world = world().await;
    let journal = world.state_dir().join("journal/events.0.jsonl");
    world.server.kill().unwrap();
    std::fs::remove_file(&journal).unwrap();
    std::os::unix::fs::symlink("/dev/full", &journal).unwrap();
    // Neither can ids be written: their file is a folder.
    let ids = world.state_dir().join("last_id.new");
    std::fs::create_dir(&ids).unwrap();
    world.server.restart().await.unwrap();
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    assert!(world.server.talk.chat("bob", false, &[]).await.unwrap().is_from("bob"));
    let detail = |health: &Value| health["orchestrator"]["detail"].as_str().unwrap().to_owned();
    let told = |health: &Value| {
        detail(health).contains("state folder") && detail(health).contains("journal")
    };
    let health = health_when(&world, told).await;
    assert_eq!(health["orchestrator"]["status"], "degraded", "{health:#}\n{}", world.log());
    assert!(detail(&health).contains("No space left"), "{health:#}");
    assert!(detail(&health).contains("the state folder cannot be written"), "{health:#}");
    assert_eq!(world.log().matches("the journal cannot be written").count(), 1, "told once");
    std::fs::remove_file(&journal).unwrap();
    std::fs::remove_dir(&ids).unwrap();
    wait_for(&world, "the state folder can be written again").await;
    // The journal is written when there is something to write.
    for _ in 0..1000 {
        assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
        assert!(world.server.talk.chat("bob", false, &[]).await.unwrap().is_from("bob"));
        if world.log().contains("the journal can be written again") {
            break;
        }
    }
    let text = std::fs::read_to_string(&journal).unwrap();
    assert!(text.contains("\"dropped\""), "the gap is written down: {text}");
    health_when(&world, |health| health["orchestrator"]["status"] == "ok").await;
    world.stop().await;
}

#[tokio::test]
async fn a_crash_loop_keeps_its_journal_and_uses_no_id_twice() {
    let mut world = world().await;
    let mut largest = 0;
    for round in 1..=3 {
        assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
        assert!(world.server.talk.chat("bob", false, &[]).await.unwrap().is_from("bob"));
        let swaps = world.swaps().await;
        let ids = swaps.iter().map(|swap| {
            let id = swap["id"].as_str().unwrap().trim_start_matches('s');
            id.parse::<u64>().unwrap()
        });
        let ids: Vec<u64> = ids.collect();
        // Newest first, those of earlier rounds included.
        assert!(ids.is_sorted_by(|newer, older| newer > older), "round {round}: {ids:?}");
        assert!(ids[0] > largest, "round {round}: {ids:?} after {largest}");
        largest = ids[0];
        world.server.kill_and_restart().await.unwrap();
    }
    let path = world.state_dir().join("journal/events.0.jsonl");
    let read = || -> Vec<Value> {
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["begin"].is_object()).collect()
    };
    // Whoever writes it does so beside the way.
    world.until("all starts are written", |_| read().len() >= 4).await;
    let begins = read();
    assert_eq!(begins.len(), 4, "one for each start");
    let begin = &begins[0]["begin"];
    assert_eq!(begin["world"]["gpus"].as_array().map(Vec::len), Some(1), "{begin:#}");
    assert!(begin["catalog"]["models"]["ada"].is_object(), "{begin:#}");
    world.stop().await;
}

#[tokio::test]
async fn starts_and_restarts_are_counted_as_what_they_are() {
    let mut world = world().await;
    let counts = async |world: &World| {
        let model = world.server.talk.get("/models/ada").await.unwrap();
        (model["starts"].as_u64().unwrap(), model["restarts"].as_u64().unwrap())
    };
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    assert_eq!(counts(&world).await, (1, 0));
    let store = rusqlite::Connection::open(world.dir.path().join("wharf.db")).unwrap();
    let totals = "SELECT count(*) FROM kept WHERE kind = 'totals'";
    let is_kept = |store: &rusqlite::Connection| {
        store.query_row(totals, [], |row| row.get::<_, i64>(0)).is_ok_and(|count| count > 0)
    };
    world.until("the start is kept", |_| is_kept(&store)).await;
    drop(store);
    world.server.kill_and_restart().await.unwrap();
    world.until("ada is adopted", is("ada", "ready")).await;
    assert_eq!(counts(&world).await, (1, 0), "counted over both runs; an adoption is no start");
    let engine = i32::try_from(world.engine_pids()[0]).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(engine), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    world.until("the death is seen", |status| !is("ada", "ready")(status)).await;
    assert_eq!(counts(&world).await, (1, 0), "a death is no restart");
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    assert_eq!(counts(&world).await, (2, 1));
    world.stop().await;
}

#[tokio::test]
async fn a_second_wharf_on_the_same_store_is_kept_out() {
    let world = world().await;
    let second = Command::new(EXE)
        .args([
            "serve",
            "--config",
            "models.yaml",
            "--gateway",
            "127.0.0.1:0",
            "--orchestrator",
            "127.0.0.1:0",
        ])
        .current_dir(world.dir.path())
        .output()
        .unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("another wharf"), "{said}");
    world.stop().await;
}

#[tokio::test]
async fn a_bad_reload_changes_nothing_and_a_good_one_only_what_changed() {
    let world = world().await;
    let talk = &world.server.talk;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let before = world.engine_pids();
    let path = world.dir.path().join("models.yaml");
    let good = std::fs::read_to_string(&path).unwrap();
    let hangup = || {
        let pid = i32::try_from(world.server.pid()).unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGHUP)
            .unwrap();
    };
    std::fs::write(&path, good.replace("vram: 14GiB", "vrma: 14GiB")).unwrap();
    hangup();
    wait_for(&world, "vrma").await;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let changed = good.replace("  bob:", "  carl:").replace("--name bob", "--name carl");
    std::fs::write(&path, changed).unwrap();
    hangup();
    world.until("carl is there", |status| status["models"]["carl"].is_object()).await;
    assert_eq!(world.engine_pids(), before, "ada was not touched");
    assert!(talk.chat("carl", false, &[]).await.unwrap().is_from("carl"));
    assert_eq!(talk.chat("bob", false, &[]).await.unwrap().status, 404);
    world.stop().await;
}

#[tokio::test]
async fn a_reload_of_words_and_policy_keeps_the_engine_and_so_does_the_next_start() {
    let mut world = world().await;
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let before = world.engine_pids();
    let path = world.dir.path().join("models.yaml");
    let edited = std::fs::read_to_string(&path).unwrap().replace(
        "  ada:\n",
        "  ada:\n    description: new words\n    ttl: 10m\n    priority: high\n    concurrency: 2\n",
    );
    std::fs::write(&path, edited).unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(world.server.pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    wait_for(&world, "adjusted ada (goes on)").await;
    let ada = world.server.talk.get("/models/ada").await.unwrap();
    assert_eq!(ada["description"], "new words", "{ada:#}");
    assert_eq!(ada["residency"], "ready", "{ada:#}");
    assert!(world.server.talk.chat("ada", true, &[]).await.unwrap().is_from("ada"));
    assert_eq!(world.engine_pids(), before, "{}", world.log());
    assert_eq!(world.swaps().await.len(), 1, "its first load");
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(world.engine_pids(), before, "adopted under the new entry: {}", world.log());
    world.stop().await;
}

#[tokio::test]
async fn bytes_that_another_engine_taught_are_forgotten_at_the_next_start() {
    let models = standin("ada", "4GiB", "--load 100ms").replace("    vram: 4GiB\n", "");
    let mut world = serve(&gpu("24GiB", "100ms"), &models, &[]).await;
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let store = rusqlite::Connection::open(world.dir.path().join("wharf.db")).unwrap();
    let of_ada = "SELECT body FROM kept WHERE kind = 'learned' AND name = 'ada'";
    let knows = |store: &rusqlite::Connection| {
        let text: Option<String> = store.query_row(of_ada, [], |row| row.get(0)).ok();
        text.is_some_and(|text| {
            let figures: Value = serde_json::from_str(&text).unwrap();
            figures["footprint"].is_u64()
        })
    };
    world.until("4 GiB are learned", |_| knows(&store)).await;
    world.server.kill().unwrap();
    let path = world.dir.path().join("models.yaml");
    let yaml = std::fs::read_to_string(&path).unwrap().replace("--vram 4GiB", "--vram 18GiB");
    std::fs::write(&path, yaml).unwrap();
    world.server.restart().await.unwrap();
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let ada = world.server.talk.get("/models/ada").await.unwrap();
    let promised = ada["vram_bytes_per_gpu"].as_u64().unwrap();
    assert!(promised >= 18 << 30, "{ada:#}");
    world.stop().await;
}

async fn wait_for(world: &World, text: &str) {
    let end = Instant::now() + PATIENCE;
    while !world.log().contains(text) {
        assert!(Instant::now() < end, "the log never said {text:?}:\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// `/health` as soon as it is as wanted; always 200, as it serves.
async fn health_when(world: &World, wanted: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + PATIENCE;
    loop {
        let (status, health) =
            world.server.talk.call(Method::GET, "/health", Value::Null).await.expect("an answer");
        assert_eq!(status, 200, "it serves: {health:#}");
        if wanted(&health) {
            return health;
        }
        assert!(Instant::now() < end, "{health:#}\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
