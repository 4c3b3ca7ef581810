//! Killed in the middle of everything, and started again: what Wharf said yes to is there, nothing
//! is there twice.

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper::Method;
use rusqlite::{Connection, OpenFlags};
use serde_json::{Value, json};
use support::ports::free_ports;
use support::{EXE, World, gpu, serve, standin};
use wharf::cli::demo::talk::Talk;

/// Patches go up from here, one second each: `swap.max_wait` tells which was the last.
const WAIT_FIRST: u64 = 100;

fn settings() -> String {
    let engine = format!(
        "{{ engine: openai, vram: 2GiB, process: {{ cmd: \"{EXE} engine --host 127.0.0.1 --port \
         ${{PORT}} --name ${{model}} --vram 2GiB --load 50ms\" }} }}"
    );
    let first = free_ports(8);
    format!(
        "{}\nports: {first}-{}\nswap: {{ min_residency: 100ms }}\ntemplates: {{ chat: {engine} }}\n\
         registration: {{ templates: [chat] }}\n",
        gpu("24GiB", "50ms"),
        first + 7
    )
}

/// `ada` and `bob` exclude each other; `cyd` has a ttl; of `dee` nothing is declared.
fn models() -> String {
    // An answer takes 4 s: long enough to see it under way.
    let slow = "--load 300ms --tokens-per-second 4";
    standin("ada", "14GiB", slow)
        + &standin("bob", "14GiB", slow)
        + &standin("cyd", "2GiB", "--load 100ms").replace("    vram", "    ttl: 10m\n    vram")
        + &standin("dee", "3GiB", "--load 100ms").replacen("    vram: 3GiB\n", "", 1)
}

async fn call(world: &World, method: Method, path: &str, body: Value, expected: u16) -> Value {
    let (status, answer) = world.server.talk.call(method, path, body).await.expect(path);
    assert_eq!(status, expected, "{path}: {answer:#}\n{}", world.log());
    answer
}

async fn get(world: &World, path: &str) -> Value {
    call(world, Method::GET, path, Value::Null, 200).await
}

async fn says(world: &World, model: &str) {
    let answer = world.server.talk.chat(model, false, &[]).await.expect("an answer");
    assert!(answer.is_from(model), "{answer:?}\n{}", world.log());
}

/// Each string once, or it is told which one stands twice.
fn once(what: &str, all: Vec<String>) -> BTreeSet<String> {
    let set: BTreeSet<String> = all.iter().cloned().collect();
    assert_eq!(set.len(), all.len(), "{what}: one stands twice in {all:?}");
    set
}

fn texts(rows: &Value, key: &str) -> Vec<String> {
    let rows = rows.as_array().expect("rows").iter();
    rows.map(|row| row[key].to_string().trim_matches('"').to_owned()).collect()
}

async fn listed(world: &World) -> BTreeSet<String> {
    once("models", texts(&get(world, "/models").await["models"], "model_id"))
}

/// What a swap was, without what goes on with time.
fn essence(swap: &Value) -> Value {
    let keys = ["id", "model", "began", "result", "seconds", "phases", "evicted", "cause"];
    keys.iter()
        .map(|key| ((*key).to_owned(), swap[*key].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// All that ended, the oldest first.
async fn ended_swaps(world: &World) -> Vec<Value> {
    let mut swaps = world.swaps().await;
    swaps.retain(|swap| !swap["result"].is_null());
    swaps.reverse();
    once("swaps", texts(&json!(swaps), "id"));
    swaps.iter().map(essence).collect()
}

async fn activity(world: &World) -> Vec<Value> {
    let rows = get(world, "/api/metrics").await;
    once("activity", texts(&rows, "id"));
    rows.as_array().cloned().expect("rows")
}

/// Until the file holds so many rows: they were handed over, and are written behind the answers.
async fn on_disk(world: &World, swaps: usize, activity: usize) {
    let file = world.dir.path().join("wharf.db");
    let counts = || -> rusqlite::Result<(usize, usize)> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let store = Connection::open_with_flags(&file, flags)?;
        let count = |table: &str| {
            store.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0))
        };
        Ok((count("swaps")?, count("activity")?))
    };
    let began = Instant::now();
    loop {
        let found = counts();
        if found.as_ref().is_ok_and(|found| found.0 >= swaps && found.1 >= activity) {
            return;
        }
        let wanted = (swaps, activity);
        assert!(began.elapsed() < Duration::from_secs(30), "{found:?} of {wanted:?} rows");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What was said yes to while Wharf was on its way to its end.
#[derive(Debug, Default)]
struct Acknowledged {
    wait_seconds: AtomicU64,
    registered: AtomicU64,
}

/// Patches one value up and up until Wharf is gone.
async fn patch_on(talk: Talk, first: u64, said_yes: Arc<Acknowledged>) {
    for seconds in first.. {
        let body = json!({ "swap": { "max_wait": format!("{seconds}s") } });
        match talk.call(Method::PATCH, "/config", body).await {
            Ok((200, _)) => said_yes.wait_seconds.store(seconds, Ordering::SeqCst),
            Ok((status, answer)) => panic!("{status} {answer:#}"),
            Err(_) => return,
        }
    }
}

/// Registers one model after the other until Wharf is gone.
async fn register_on(talk: Talk, round: u32, said_yes: Arc<Acknowledged>) {
    for number in 1..=20 {
        let body = json!({ "model_id": format!("late/{round}-{number}"), "template": "chat" });
        match talk.call(Method::POST, "/models/register", body).await {
            Ok((201, _)) => said_yes.registered.store(number, Ordering::SeqCst),
            Ok((status, answer)) => panic!("{status} {answer:#}"),
            Err(_) => return,
        }
        // So that it still goes on when Wharf is killed.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Kills Wharf while streams run, a swap is under way, patches are being written and models are
/// being registered; what it had said yes to.
async fn killed_in_the_middle(world: &mut World, round: u32, first: u64) -> Arc<Acknowledged> {
    says(world, "ada").await;
    let talk = &world.server.talk;
    let said_yes = Arc::<Acknowledged>::default();
    let patching = tokio::spawn(patch_on(talk.clone(), first, Arc::clone(&said_yes)));
    let registering = tokio::spawn(register_on(talk.clone(), round, Arc::clone(&said_yes)));
    let began = Instant::now();
    while said_yes.wait_seconds.load(Ordering::SeqCst) < first + 2
        || said_yes.registered.load(Ordering::SeqCst) < 2
    {
        assert!(began.elapsed() < Duration::from_secs(60), "{said_yes:?}\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // From here on the kill must come before bob's answer, whatever a disk takes.
    let chat = |model: &'static str, stream: bool| {
        let talk = talk.clone();
        tokio::spawn(async move { talk.chat(model, stream, &[]).await })
    };
    let mut asked = vec![chat("ada", true), chat("ada", true), chat("cyd", true)];
    world.until("streams run", |status| status["models"]["ada"]["in_flight"] == 2).await;
    asked.push(chat("bob", false));
    world.until("a swap is under way", |status| status["swaps"][0]["model"] == "bob").await;
    world.server.kill().expect("killed");
    patching.await.expect("only yes was said");
    registering.await.expect("only yes was said");
    for request in asked {
        let cut = request.await.expect("no panic");
        assert!(!cut.is_ok_and(|answer| answer.is_from("bob")), "the swap was under way");
    }
    said_yes
}

/// `swap.max_wait` in seconds.
async fn max_wait(world: &World) -> u64 {
    let config = get(world, "/config").await;
    assert_eq!(config["origins"]["swap.max_wait"], "patch", "{config:#}");
    let shown = config["swap"]["max_wait"].as_str().expect("a duration").replace(' ', "");
    humantime::parse_duration(&shown).expect("a duration").as_secs()
}

async fn leaves_at(world: &World, model: &str) -> std::time::SystemTime {
    let row = get(world, &format!("/models/{model}")).await;
    let at = row["leaves_at"].as_str().unwrap_or_else(|| panic!("{row:#}\n{}", world.log()));
    humantime::parse_rfc3339(at).expect("a time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_twice_in_the_middle_of_everything_all_that_was_acknowledged_is_there_once() {
    let mut world = serve(&settings(), &models(), &[]).await;
    let registration = json!({ "model_id": "new/one", "template": "chat", "ttl_minutes": 30 });
    call(&world, Method::POST, "/models/register", registration, 201).await;
    let patch = json!({ "default_ttl_minutes": 45, "models": { "bob": { "priority": "high" } } });
    call(&world, Method::PATCH, "/config", patch, 200).await;
    for model in ["dee", "ada", "bob", "cyd", "new/one"] {
        says(&world, model).await;
    }
    let mut names: BTreeSet<String> =
        ["ada", "bob", "cyd", "dee", "new/one"].map(str::to_owned).into();
    let mut next_wait = WAIT_FIRST;
    for round in 1..=2 {
        says(&world, "cyd").await;
        let extended =
            call(&world, Method::POST, "/models/cyd/extend-ttl", json!({ "minutes": 30 }), 200)
                .await;
        assert!(extended["ttl_remaining_minutes"].as_f64().unwrap() > 30.0, "{extended:#}");
        let leaves = leaves_at(&world, "cyd").await;
        let pid = world.engine_pids();
        let swaps = ended_swaps(&world).await;
        let rows = activity(&world).await;
        on_disk(&world, swaps.len(), rows.len()).await;
        let doors = get(&world, "/config").await["front_doors"].clone();
        let installation = world.installation();
        assert!(!pid.is_empty() && !swaps.is_empty() && rows.len() >= 5);

        let said_yes = killed_in_the_middle(&mut world, round, next_wait).await;
        world.server.restart().await.expect("it starts again");
        assert_eq!(world.installation(), installation);

        // What was registered: each once. One more may have been written and not answered.
        let acknowledged = said_yes.registered.load(Ordering::SeqCst);
        names.extend((1..=acknowledged).map(|number| format!("late/{round}-{number}")));
        let listed = listed(&world).await;
        let more: Vec<&String> = listed.difference(&names).collect();
        assert!(names.is_subset(&listed), "{names:?} of {listed:?}\n{}", world.log());
        let unanswered = format!("late/{round}-{}", acknowledged + 1);
        assert!(more.is_empty() || more == [&unanswered], "{more:?}");
        println!("round {round}: {} models listed, {acknowledged} registered last", listed.len());
        names.clone_from(&listed);

        // What was patched.
        let patched = said_yes.wait_seconds.load(Ordering::SeqCst);
        let in_force = max_wait(&world).await;
        assert!((patched..=patched + 1).contains(&in_force), "{patched} acknowledged, {in_force}");
        let config = get(&world, "/config").await;
        assert_eq!(config["default_ttl_minutes"], 45);
        assert_eq!(get(&world, "/models/bob").await["priority"], "high");
        assert_eq!(config["left_out"], json!([]), "{config:#}");
        println!("round {round}: max_wait {patched} s acknowledged, {in_force} s in force");
        next_wait = in_force + 1;

        // Doors: whoever was in the file has its own.
        for (model, port) in doors.as_object().expect("doors") {
            assert_eq!(config["front_doors"][model], *port, "{model}: {doors} {config:#}");
        }

        // The ledger and the activity, with their ids, the earlier ones first.
        let now = ended_swaps(&world).await;
        let same: Vec<&Value> = now.iter().filter(|swap| swaps.contains(swap)).collect();
        assert_eq!(same, swaps.iter().collect::<Vec<_>>(), "{now:#?}\n{}", world.log());
        let rows_now = activity(&world).await;
        let same: Vec<&Value> = rows_now.iter().filter(|row| rows.contains(row)).collect();
        assert_eq!(same, rows.iter().collect::<Vec<_>>(), "{rows_now:#?}");
        println!(
            "round {round}: {} of {} swaps and {} of {} rows of activity are of before",
            swaps.len(),
            now.len(),
            rows.len(),
            rows_now.len()
        );

        // What was learned: estimates, and memory that nobody declared.
        says(&world, "ada").await;
        let plan = call(&world, Method::POST, "/plan", json!({ "model": "bob" }), 200).await;
        let estimate = plan["estimate_seconds"].as_f64().unwrap_or_default();
        assert!((0.2..10.0).contains(&estimate), "a start of bob takes 0.3 s: {plan:#}");
        let plan = call(&world, Method::POST, "/plan", json!({ "model": "dee" }), 200).await;
        let measured = plan["vram_bytes_per_gpu"].as_u64().unwrap_or_default();
        assert!((3 << 30..4 << 30).contains(&measured), "nobody declared it: {plan:#}");
        println!("round {round}: bob is estimated at {estimate:.2} s");

        // The extension: cyd's engine was adopted, and stays as long as was promised.
        let adopted = get(&world, "/models/cyd").await;
        assert_eq!(adopted["residency"], "ready", "{adopted:#}\n{}", world.log());
        assert!(adopted["ttl_remaining_minutes"].as_f64().unwrap() > 30.0, "{adopted:#}");
        let left = leaves_at(&world, "cyd").await;
        let apart = left.duration_since(leaves).unwrap_or_else(|earlier| earlier.duration());
        assert!(apart < Duration::from_secs(60), "{leaves:?} → {left:?}");
        println!("round {round}: cyd's ttl {} min", adopted["ttl_remaining_minutes"]);

        // And it serves, registered models too, each swap with an id of its own.
        let late = format!("late/{round}-1");
        for model in ["bob", "new/one", &late, "ada"] {
            says(&world, model).await;
        }
        ended_swaps(&world).await;
        activity(&world).await;
    }
    world.stop().await;
}
