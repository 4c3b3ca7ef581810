//! What a store that fails, fills up or is killed costs: durability, never an answer.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyper::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rusqlite::Connection;
use serde_json::{Value, json};
use support::{EXE, World, gpu, serve, standin};
use wharf::config::catalog::Retention;
use wharf::scheduler::record::{SwapCause, SwapKind, SwapOutcome, SwapRecord};
use wharf::store::{Activity, Registration, Store, SwapRow};
use wharf::units::{ModelName, SwapId, Time};

const KILLS: u32 = 200;
/// Names the store that the child of the kill test writes.
const CHILD: &str = "WHARF_TEST_STORE_CHILD";

fn activity(n: u64) -> Activity {
    Activity {
        model: "ada".into(),
        path: format!("/{n}").into(),
        status: 200,
        ..Activity::default()
    }
}

fn ended_swap(id: u64) -> SwapRow {
    let record = SwapRecord {
        id: SwapId(id),
        model: ModelName::new("ada"),
        kind: SwapKind::Load,
        cause: SwapCause::Request,
        decision: "it was asked for".to_owned(),
        instance: None,
        gpus: Vec::new(),
        evicted: Vec::new(),
        began: Time(0),
        ended: Some(Time(9)),
        phases: Vec::new(),
        phase: None,
        outcome: Some(SwapOutcome::Ready),
    };
    SwapRow { began_unix_ms: 1_700_000_000_000, record }
}

/// Acknowledges on standard output what is committed, until it is killed.
#[tokio::test]
#[ignore = "the child of the test below, which kills it"]
async fn child_that_writes_until_it_is_killed() {
    let path = std::env::var(CHILD).expect("the path of the store");
    let forever = Duration::from_secs(100 * 365 * 24 * 3600);
    let store = Store::open(Path::new(&path), Retention { age: forever, rows: u64::MAX });
    assert!(store.health().ok, "{:?}", store.health());
    loop {
        let id = store.record_activity(Activity { arrived_unix_ms: 1, ..activity(0) });
        store.record_swap(ended_swap(id));
        if id.is_multiple_of(3) {
            let model_id = format!("m{}", id % 30);
            let display_name = Some(id.to_string());
            let wanted = Registration { model_id, display_name, ..Registration::default() };
            store.put_registered(wanted).await.expect("kept");
            println!("\nREGISTERED {id}");
        }
        store.flush().await.expect("on disk");
        println!("\nACK {id}");
    }
}

/// Reads lines that begin with `word`, until `wanted` came or the child is gone.
fn acks(lines: &mut impl Iterator<Item = String>, wanted: usize) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    while found.len() < wanted {
        let Some(line) = lines.next() else { break };
        if let Some((word, id)) = line.split_once(' ')
            && matches!(word, "ACK" | "REGISTERED")
        {
            found.push((word.to_owned(), id.parse().expect("an id")));
        }
    }
    found
}

#[test]
fn what_was_acknowledged_is_there_after_each_of_200_kills_in_the_middle_of_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wharf.db");
    let (mut acked, mut registered) = (BTreeSet::new(), BTreeMap::new());
    let mut random = 7_u64;
    for round in 0..KILLS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_it_is_killed", "--ignored", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut lines = output.lines().map_while(Result::ok);
        // Some are killed at any moment of their start: while the file is made, opened, recovered.
        let mut found = if round % 4 == 3 {
            std::thread::sleep(Duration::from_micros((random >> 40) % 30_000));
            Vec::new()
        } else {
            acks(&mut lines, 1 + (random >> 33) as usize % 12)
        };
        child.kill().unwrap();
        child.wait().unwrap();
        found.extend(acks(&mut lines, usize::MAX));
        for (word, id) in found {
            match word.as_str() {
                "ACK" => assert!(acked.insert(id), "id {id} came twice"),
                _ => drop(registered.insert(format!("m{}", id % 30), id)),
            }
        }
        // The next child mostly finds what the kill left, its log included.
        if round % 10 == 9 {
            look(&path, &acked, &registered);
        }
    }
    assert!(acked.len() > KILLS as usize / 2, "they did get to write: {}", acked.len());
    look(&path, &acked, &registered);
}

fn look(path: &Path, acked: &BTreeSet<u64>, registered: &BTreeMap<String, u64>) {
    let file = Connection::open(path).expect("a whole store");
    let ids = |sql: &str| -> Vec<u64> {
        let mut rows = file.prepare(sql).expect("a whole store");
        let ids = rows.query_map([], |row| row.get::<_, i64>(0)).expect("a whole store");
        ids.map(|id| id.expect("a whole store") as u64).collect()
    };
    for sql in ["SELECT id FROM activity", "SELECT swap FROM swaps"] {
        let listed = ids(sql);
        let once: BTreeSet<u64> = listed.iter().copied().collect();
        assert_eq!(listed.len(), once.len(), "{sql}: a row twice");
        let missing: Vec<_> = acked.difference(&once).collect();
        assert!(missing.is_empty(), "{sql}: acknowledged and gone: {missing:?}");
    }
    for (name, id) in registered {
        let sql = "SELECT body FROM kept WHERE kind = 'registered' AND name = ?1";
        let body: String = file.query_row(sql, [name], |row| row.get(0)).expect("a whole store");
        let body: Value = serde_json::from_str(&body).expect("a whole store");
        let kept: u64 =
            body["display_name"].as_str().expect("a whole store").parse().expect("a whole store");
        assert!(kept >= *id, "{name}: {kept} is older than {id}");
    }
    let verdict: String =
        file.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("a whole store");
    assert_eq!(verdict, "ok");
}

fn two_models() -> String {
    standin("ada", "14GiB", "--load 50ms") + &standin("bob", "14GiB", "--load 50ms")
}

async fn chat(world: &World, model: &str) {
    let answer = world.server.talk.chat(model, false, &[]).await.expect("an answer");
    assert!(answer.is_from(model), "{answer:?}\n{}", world.log());
}

/// The store's part of `/health`, once it is in this state.
async fn store_is(world: &World, status: &str) -> String {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        // 200: whatever the store does, Wharf serves.
        let health = world.server.talk.get("/health").await.expect("200");
        if health["store"]["status"] == status {
            return health["store"]["detail"].as_str().expect("text").to_owned();
        }
        assert!(Instant::now() < end, "never {status}: {health:#}\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Ids of all swaps, each of which must be listed once.
async fn swap_ids(world: &World) -> Vec<String> {
    let swaps = world.swaps().await;
    let ids: Vec<String> = swaps.iter().map(|swap| swap["id"].to_string()).collect();
    let once: BTreeSet<&String> = ids.iter().collect();
    assert_eq!(once.len(), ids.len(), "listed twice: {ids:?}");
    ids
}

/// Until the file has this many swaps.
async fn swaps_on_disk(path: &Path, wanted: usize) {
    rows_on_disk(path, "swaps", wanted).await;
}

async fn rows_on_disk(path: &Path, which: &str, wanted: usize) {
    let sql = format!("SELECT count(*) FROM {which}");
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let count = Connection::open(path)
            .and_then(|file| file.query_row(&sql, [], |row| row.get::<_, i64>(0)));
        match count {
            Ok(found) if found >= wanted as i64 => return,
            _ => assert!(Instant::now() < end, "never {wanted} {which}: {count:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// As an operator would, and then starts it again.
async fn restart(world: &mut World) {
    let pid = world.server.pid();
    kill(Pid::from_raw(i32::try_from(pid).expect("it runs")), Signal::SIGTERM).expect("it runs");
    let stat = format!("/proc/{pid}/stat");
    let end = Instant::now() + Duration::from_secs(60);
    while !std::fs::read_to_string(&stat).unwrap_or_default().contains(") Z ") {
        assert!(Instant::now() < end, "it never ended\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.server.kill().expect("it runs");
    world.server.restart().await.expect("it runs");
}

// contract: GET /swaps
// contract: GET /swaps/{id}
#[tokio::test]
async fn swaps_totals_and_figures_of_earlier_runs_are_there_after_a_restart_each_once() {
    let mut world = serve(&gpu("24GiB", "50ms"), &two_models(), &[]).await;
    for model in ["ada", "bob", "ada"] {
        chat(&world, model).await;
    }
    let before = world.swaps().await;
    assert_eq!(before.len(), 3, "{before:#?}");
    // The end of Wharf does not wait for a slow disk.
    let path = world.dir.path().join("wharf.db");
    swaps_on_disk(&path, 3).await;
    rows_on_disk(&path, "kept WHERE kind = 'learned'", 2).await;
    let of_old = world.state_dir().join("learned.json");
    let figures = json!({ "eva": { "spec": "x", "footprint": 7, "asleep": null, "start": null,
        "stop": null, "sleep": null, "wake": null, "phases": {} } });
    std::fs::write(&of_old, figures.to_string()).unwrap();
    restart(&mut world).await;
    assert!(store_is(&world, "ok").await.contains("wharf.db"));
    let after = world.swaps().await;
    let without_stops: Vec<&Value> =
        after.iter().filter(|swap| before.iter().any(|old| old["id"] == swap["id"])).collect();
    assert_eq!(without_stops, before.iter().collect::<Vec<_>>(), "as they were told then");
    let ids = swap_ids(&world).await;
    let one = world.server.talk.get("/swaps/1").await.unwrap();
    assert_eq!((&one["model"], &one["result"]), (&json!("ada"), &json!("ready")), "{one:#}");
    let ada = world.server.talk.get("/models/ada").await.unwrap();
    assert_eq!((&ada["starts"], &ada["request_count"]), (&json!(2), &json!(2)), "{ada:#}");
    assert!(ada["total_uptime_seconds"].as_f64().unwrap() > 0.0, "{ada:#}");
    assert!(ada["loaded_at"].is_string() && ada["unloaded_at"].is_string(), "{ada:#}");
    let file = Connection::open(&path).unwrap();
    let sql = "SELECT count(*) FROM kept WHERE kind = 'learned'";
    assert_eq!(file.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap(), 3, "eva's, imported");
    assert!(!of_old.exists(), "imported once");

    chat(&world, "bob").await;
    assert_eq!(swap_ids(&world).await.len(), ids.len() + 1);
    world.server.kill_and_restart().await.unwrap();
    let wharf = Command::new(EXE)
        .args(["swaps", "--url", &world.server.talk.orchestrator])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&wharf.stdout).into_owned();
    assert!(wharf.status.success() && told.contains("s1 ") && told.contains("s2 "), "{told}");
    let first = world.server.talk.get("/swaps?limit=2").await.unwrap();
    let last = first["swaps"][1]["id"].as_str().unwrap().to_owned();
    let next = world.server.talk.get(&format!("/swaps?limit=2&before={last}")).await.unwrap();
    let listed = swap_ids(&world).await;
    let paged: Vec<String> = [&first, &next]
        .iter()
        .flat_map(|page| page["swaps"].as_array().unwrap())
        .map(|swap| swap["id"].to_string())
        .collect();
    assert_eq!(paged, listed[..paged.len()], "a page goes on where the one before it ended");
    world.stop().await;
}

#[tokio::test]
async fn a_store_in_memory_makes_no_file_and_serves() {
    let settings = gpu("24GiB", "50ms") + "\nstore: ':memory:'";
    let world = serve(&settings, &two_models(), &[]).await;
    chat(&world, "ada").await;
    assert!(store_is(&world, "ok").await.contains("in memory"));
    assert_eq!(swap_ids(&world).await.len(), 1);
    let files = std::fs::read_dir(world.dir.path()).unwrap().flatten();
    let names: Vec<_> = files.map(|file| file.file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains(".db") || name.contains("memory")), "{names:?}");
    world.stop().await;
}

#[tokio::test]
async fn a_damaged_store_is_left_as_it_is_and_serving_goes_on() {
    let mut world =
        serve(&(gpu("24GiB", "50ms") + "\ndefaults: { ttl: 10m }"), &two_models(), &[]).await;
    let path = world.dir.path().join("wharf.db");
    chat(&world, "ada").await;
    world.server.kill().unwrap();
    for log in ["wharf.db-wal", "wharf.db-shm"] {
        std::fs::remove_file(world.dir.path().join(log)).unwrap();
    }
    let garbage = b"no database ".repeat(1000);
    std::fs::write(&path, &garbage).unwrap();
    world.server.restart().await.unwrap();
    let detail = store_is(&world, "degraded").await;
    assert!(detail.contains("wharf.db is damaged") && detail.contains("move it away"), "{detail}");
    chat(&world, "ada").await;
    chat(&world, "bob").await;
    assert_eq!(swap_ids(&world).await.len(), 1, "of this run: ada was adopted");
    assert_eq!(std::fs::read(&path).unwrap(), garbage);
    assert_eq!(world.log().matches("wharf.db is damaged").count(), 1, "told once");
    let talk = &world.server.talk;
    let (status, extended) =
        talk.call(Method::POST, "/models/bob/extend-ttl", json!({ "minutes": 5 })).await.unwrap();
    let message = extended["message"].as_str().unwrap();
    assert!(status == 200 && message.contains("a restart may forget it"), "{extended:#}");

    std::fs::rename(&path, world.dir.path().join("wharf.db.damaged")).unwrap();
    store_is(&world, "ok").await;
    swaps_on_disk(&path, 1).await;
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(swap_ids(&world).await.len(), 1, "what was in memory was written");
    world.stop().await;
}

/// A file system of its own.
struct Small(PathBuf);

impl Small {
    /// `None`: this user may not mount.
    fn mount(at: &Path, size: &str) -> Option<Small> {
        std::fs::create_dir(at).expect("a folder");
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Small(at.to_owned()))
    }

    fn remount(&self, how: &str) {
        let options = format!("remount,{how}");
        let mount =
            Command::new("mount").args(["-o", &options]).arg(&self.0).status().expect("mount");
        assert!(mount.success(), "{options}");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Also while a process still has a file of it open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A world whose store lies in a small file system, its state folder beside the others.
async fn world_on_small(size: &str, test: &str) -> Option<(World, Small, tempfile::TempDir)> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let at = dir.path().join("small");
    let Some(small) = Small::mount(&at, size) else {
        support::skip(&format!("{test}: a small file system cannot be mounted (run it as root)"));
        return None;
    };
    let state = dir.path().join("state");
    std::fs::create_dir(&state).expect("a temporary folder");
    symlink(&state, at.join("wharf.d")).expect("a temporary folder");
    let settings = format!("{}\nstore: {}/wharf.db", gpu("24GiB", "50ms"), at.display());
    let world = serve(&settings, &two_models(), &[]).await;
    symlink(&state, world.state_dir()).expect("a temporary folder");
    Some((world, small, dir))
}

#[tokio::test]
async fn a_full_disk_costs_no_answer_and_rows_are_written_once_there_is_space() {
    let Some((mut world, small, _dir)) = world_on_small("1m", "a full disk").await else { return };
    let path = small.0.join("wharf.db");
    chat(&world, "ada").await;
    swaps_on_disk(&path, 1).await;
    let filler = small.0.join("filler");
    let fill = || {
        use std::io::Write as _;
        let mut file = std::fs::File::options().create(true).append(true).open(&filler).unwrap();
        // Ends with "no space left".
        while file.write_all(&[7; 1024]).is_ok() {}
        while file.write_all(&[7]).is_ok() {}
    };
    fill();
    let mut model = ["bob", "ada"].into_iter().cycle();
    let end = Instant::now() + Duration::from_secs(60);
    // A row or two may still find room in pages that the store has.
    while world.server.talk.get("/health").await.expect("200")["store"]["status"] == "ok" {
        assert!(Instant::now() < end, "a full disk is noticed\n{}", world.log());
        chat(&world, model.next().unwrap()).await;
    }
    let detail = store_is(&world, "degraded").await;
    assert!(detail.contains("wharf.db"), "{detail}");
    chat(&world, "bob").await;
    chat(&world, "ada").await;
    world.server.kill_and_restart().await.unwrap();
    chat(&world, "bob").await;
    chat(&world, "ada").await;
    store_is(&world, "degraded").await;
    let of_this_run = swap_ids(&world).await.len();

    std::fs::remove_file(&filler).unwrap();
    store_is(&world, "ok").await;
    let listed = swap_ids(&world).await;
    assert!(listed.len() >= of_this_run, "{listed:?}");
    swaps_on_disk(&path, listed.len()).await;
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(swap_ids(&world).await, listed, "all of them, once");
    let told = world.log().matches("Wharf goes on, with the newest rows").count();
    assert_eq!(told, 2, "once in each run\n{}", world.log());
    world.stop().await;
    drop(small);
}

#[tokio::test]
async fn a_read_only_disk_is_read_and_costs_no_answer() {
    let Some((mut world, small, _dir)) = world_on_small("8m", "a read-only disk").await else {
        return;
    };
    let path = small.0.join("wharf.db");
    chat(&world, "ada").await;
    swaps_on_disk(&path, 1).await;
    restart(&mut world).await;
    world.server.kill().unwrap();
    small.remount("ro");
    world.server.restart().await.unwrap();
    let detail = store_is(&world, "degraded").await;
    assert!(detail.contains("wharf.db") && detail.contains("writable"), "{detail}");
    let before = swap_ids(&world).await;
    assert!(!before.is_empty(), "what the file says is known");
    chat(&world, "ada").await;
    chat(&world, "bob").await;
    let listed = swap_ids(&world).await;
    assert_eq!(listed.len(), before.len() + 2);
    small.remount("rw");
    store_is(&world, "ok").await;
    swaps_on_disk(&path, listed.len()).await;
    world.server.kill_and_restart().await.unwrap();
    assert_eq!(swap_ids(&world).await, listed);
    world.stop().await;
    drop(small);
}
