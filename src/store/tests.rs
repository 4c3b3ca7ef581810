use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::scheduler::record::{SwapCause, SwapKind, SwapOutcome};
use crate::units::{Bytes, Priority, Time};

fn swap(id: u64, model: &str) -> SwapRow {
    let record = SwapRecord {
        id: SwapId(id),
        model: ModelName::new(model),
        kind: SwapKind::Load,
        cause: SwapCause::Request,
        decision: "it was asked for".to_owned(),
        instance: None,
        gpus: Vec::new(),
        evicted: Vec::new(),
        began: Time(5_000),
        ended: Some(Time(7_000)),
        phases: Vec::new(),
        phase: None,
        outcome: Some(SwapOutcome::Ready),
    };
    SwapRow { began_unix_ms: unix_ms(), record }
}

fn request(path: &str) -> Activity {
    let (arrived_unix_ms, path) = (unix_ms(), path.to_owned().into());
    Activity { arrived_unix_ms, path, model: "ada".into(), status: 200, ..Activity::default() }
}

fn paths(store: &Store) -> Vec<String> {
    store.activity(0, 100).into_iter().map(|row| row.path.into_owned()).collect()
}

fn open(path: &Path) -> Store {
    Store::open(path, Retention::default())
}

async fn until(what: &str, wanted: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !wanted() {
        assert!(Instant::now() < end, "{what} never came true");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn sql(path: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(path).unwrap()
}

#[tokio::test]
async fn everything_is_there_again_after_a_restart_and_ids_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/wharf.db");
    let store = open(&path);
    assert!(store.health().ok, "{:?}", store.health());
    assert_eq!(store.record_activity(request("/one")), 1);
    assert_eq!(store.record_activity(request("/two")), 2);
    store.record_swap(swap(7, "ada"));
    let registration =
        Registration { model_id: "eva".to_owned(), warmup: true, ..Registration::default() };
    store.put_registered(registration.clone()).await.unwrap();
    let gone = Registration { model_id: "bob".to_owned(), ..Registration::default() };
    store.put_registered(gone).await.unwrap();
    let patches = BTreeMap::from([("swap.max_wait".to_owned(), Value::from("9s"))]);
    store.put_patches(BTreeMap::from([("gone".to_owned(), Value::Null)])).await.unwrap();
    store.delete_registered("bob", patches.clone()).await.unwrap();
    let ada = ModelName::new("ada");
    let (later, earlier) = (unix_ms() + 60_000, unix_ms() - 1);
    store.put_ttl_until(&ada, Some(later));
    store.put_ttl_until(&ModelName::new("eva"), Some(earlier));
    let totals = Totals { requests: 41, starts: 3, ..Totals::default() };
    store.put_totals(&ada, &totals);
    let figures = Figures { spec: "shape".to_owned(), ..Figures::default() };
    store.put_learned(&ada, &figures);
    store.flush().await.unwrap();
    // It sleeps by now, and has to be woken for that.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(store.close().await);

    let store = open(&path);
    assert_eq!(paths(&store), ["/one", "/two"]);
    assert_eq!(store.record_activity(request("/three")), 3);
    let swaps = store.swaps(10);
    assert_eq!(swaps.len(), 1);
    assert_eq!((swaps[0].record.id, swaps[0].record.ended), (SwapId(7), Some(Time(7_000))));
    assert_eq!(store.registered(), [registration]);
    assert_eq!(store.patches(), patches);
    assert_eq!(store.ttl_until(), BTreeMap::from([(ada.clone(), later)]), "none that is over");
    assert_eq!(store.totals()[&ada], totals);
    assert_eq!(store.learned()[&ada], figures);
}

#[tokio::test]
async fn nothing_is_kept_of_a_store_in_memory_and_registering_works() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(Path::new(MEMORY), Retention::default());
    let eva = Registration { model_id: "eva".to_owned(), ..Registration::default() };
    store.put_registered(eva).await.unwrap();
    store.record_swap(swap(1, "eva"));
    store.flush().await.unwrap();
    assert_eq!((store.registered().len(), store.swaps(9).len()), (1, 1));
    assert_eq!(store.swap_page(None, None, 10).await.unwrap().len(), 1);
    assert!(store.swap(SwapId(4)).await.is_none());
    assert!(store.health().ok && !store.is_durable());
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none());
    assert!(!Path::new(MEMORY).exists(), "no file of that name");
}

#[tokio::test]
async fn pages_reach_back_to_swaps_that_left_memory_and_name_each_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wharf.db");
    let store = open(&path);
    for id in 1..=1_600 {
        store.record_swap(swap(id, if id % 100 == 0 { "eva" } else { "ada" }));
        if id % 500 == 0 {
            store.flush().await.unwrap();
        }
    }
    let mut open_store = Some(store);
    for _ in 0..2 {
        let store = open_store.take().unwrap_or_else(|| open(&path));
        store.flush().await.unwrap();
        let (mut ids, mut before) = (Vec::new(), None);
        loop {
            let page = store.swap_page(None, before, 170).await.unwrap();
            ids.extend(page.iter().map(|row| row.record.id.0));
            let Some(last) = page.last() else { break };
            before = Some(last.record.id);
        }
        assert_eq!(ids, (1..=1_600).rev().collect::<Vec<_>>());
        let eva = store.swap_page(Some(&ModelName::new("eva")), None, 100).await.unwrap();
        assert_eq!(eva.len(), 16);
        assert_eq!(store.swap(SwapId(3)).await.unwrap().record.id, SwapId(3));
        assert!(store.swap_page(None, Some(SwapId(9_999)), 5).await.is_none());
        store.close().await;
    }
}

#[tokio::test]
async fn rows_that_are_too_old_or_too_many_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wharf.db");
    let mut disk = disk::Disk::open(&path, true).unwrap();
    let mut rows = Rows::default();
    rows.place = Place::Disk;
    let old = Activity { arrived_unix_ms: unix_ms() - 7_200_000, ..request("/old") };
    rows.push_activity(old);
    (0..30).for_each(|n| {
        rows.push_activity(request(&format!("/{n}")));
    });
    (0..30).for_each(|n| rows.push_swap(swap(n, "ada")));
    disk.write(&rows.take_batch()).unwrap();
    let retention = |rows| Retention { age: Duration::from_secs(3600), rows };
    assert!(!disk.prune(&retention(1_000)).unwrap());
    let left = disk.load().unwrap();
    assert_eq!((left.activity.len(), &*left.activity[0].1.path), (30, "/0"), "by age");
    assert!(!disk.prune(&retention(10)).unwrap());
    let left = disk.load().unwrap();
    assert_eq!((left.activity.len(), left.swaps.len()), (10, 10));
    assert_eq!(left.activity[0].1.path, "/20", "the newest stay");
    let none = Retention { age: Duration::ZERO, rows: 0 };
    disk.prune(&none).unwrap();
    drop(disk);
    let store = open(&path);
    assert_eq!(store.record_activity(request("/next")), 32, "no id comes twice");
}

#[tokio::test]
async fn what_cannot_be_used_is_left_alone_and_told_and_a_new_file_gets_what_is_in_memory() {
    let whole = {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wharf.db");
        let store = open(&path);
        store.record_activity(request("/before"));
        store.close().await;
        fs::read(&path).unwrap()
    };
    let other = {
        let dir = tempfile::tempdir().unwrap();
        sql(&dir.path().join("x.db")).execute_batch("CREATE TABLE theirs (x)").unwrap();
        fs::read(dir.path().join("x.db")).unwrap()
    };
    let mut newer = whole.clone();
    newer[60..64].copy_from_slice(&7_u32.to_be_bytes());
    let mut overwritten = whole.clone();
    overwritten[4096..8192].fill(0x5a);
    let cases: [(&str, &[u8], &str); 7] = [
        ("cut in the header", &whole[..50], "damaged"),
        ("cut in the first page", &whole[..600], "damaged"),
        ("cut after a few pages", &whole[..4096 * 3], "damaged"),
        ("overwritten", &overwritten, "damaged"),
        ("something else", b"models: {}\n".repeat(100).leak(), "damaged"),
        ("another program's", &other, "another program"),
        ("a newer one", &newer, "newer Wharf"),
    ];
    for (case, bytes, word) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wharf.db");
        fs::write(&path, bytes).unwrap();
        let store = open(&path);
        let health = store.health();
        assert!(!health.ok && health.detail.contains(word), "{case}: {health:?}");
        assert!(health.detail.contains("wharf.db"), "{case}: {health:?}");
        let id = store.record_activity(request("/meanwhile"));
        store.record_swap(swap(1, "ada"));
        assert_eq!(paths(&store), ["/meanwhile"], "{case}");
        let eva = Registration { model_id: "eva".to_owned(), ..Registration::default() };
        assert!(store.put_registered(eva.clone()).await.is_err(), "{case}: it would be lost");
        assert!(store.flush().await.is_err(), "{case}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "{case}: left as it was");

        fs::rename(&path, dir.path().join("moved")).unwrap();
        until("the store works again", || store.health().ok).await;
        store.put_registered(eva).await.unwrap();
        store.flush().await.unwrap();
        store.close().await;
        let store = open(&path);
        assert_eq!((paths(&store), store.swaps(9).len()), (vec!["/meanwhile".to_owned()], 1));
        assert_eq!((store.activity(0, 1)[0].id, store.registered().len()), (id, 1), "{case}");
    }
}

#[tokio::test]
async fn a_log_that_is_garbage_is_kept_aside_and_the_main_file_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wharf.db");
    let store = open(&path);
    store.record_activity(request("/before"));
    store.close().await;
    let garbage = b"garbage ".repeat(2_000);
    fs::write(dir.path().join("wharf.db-wal"), &garbage).unwrap();
    let store = open(&path);
    assert!(store.health().ok, "{:?}", store.health());
    assert_eq!(paths(&store), ["/before"]);
    store.record_activity(request("/after"));
    store.flush().await.unwrap();
    drop(store);
    let kept = fs::read_dir(dir.path()).unwrap().flatten();
    let kept =
        kept.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("damaged"));
    assert_eq!(fs::read(kept.expect("kept aside")).unwrap(), garbage);
}

/// The layout of version 1, as that version wrote it.
const VERSION_1: &str = "
    CREATE TABLE activity (id INTEGER PRIMARY KEY AUTOINCREMENT, at_unix_ms INTEGER NOT NULL,
        model TEXT NOT NULL, body TEXT NOT NULL);
    CREATE INDEX activity_at ON activity (at_unix_ms);
    CREATE TABLE swaps (id INTEGER PRIMARY KEY AUTOINCREMENT, at_unix_ms INTEGER NOT NULL,
        swap INTEGER NOT NULL, model TEXT NOT NULL, body TEXT NOT NULL);
    CREATE INDEX swaps_at ON swaps (at_unix_ms);
    CREATE TABLE kept (kind TEXT NOT NULL, name TEXT NOT NULL, body TEXT NOT NULL,
        PRIMARY KEY (kind, name)) WITHOUT ROWID;
    PRAGMA application_id = 0x57687266;
    PRAGMA user_version = 1;";

#[tokio::test]
async fn a_file_of_version_1_is_brought_up_to_date_with_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wharf.db");
    let old = sql(&path);
    old.execute_batch(VERSION_1).unwrap();
    let body = serde_json::to_string(&swap(12, "ada")).unwrap();
    let insert =
        "INSERT INTO swaps (id, at_unix_ms, swap, model, body) VALUES (4, ?1, 12, 'ada', ?2)";
    old.execute(insert, rusqlite::params![unix_ms() as i64, body]).unwrap();
    old.execute("INSERT INTO kept VALUES ('patch', 'queue.max', '9')", []).unwrap();
    old.execute("INSERT INTO kept VALUES ('of a later version', 'x', '{}')", []).unwrap();
    drop(old);
    let store = open(&path);
    assert!(store.health().ok, "{:?}", store.health());
    assert_eq!(store.swap(SwapId(12)).await.unwrap().record.model.as_str(), "ada");
    assert_eq!(store.patches()["queue.max"], Value::from(9));
    store.close().await;
    let number = |text: &str| sql(&path).query_row(text, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(number("PRAGMA user_version"), 2);
    let index = "SELECT count(*) FROM sqlite_schema WHERE name = 'swaps_model'";
    assert_eq!(number(index), 1);
    assert_eq!(number("SELECT count(*) FROM kept"), 2, "what is not understood stays");
}

#[tokio::test]
async fn a_lock_held_by_another_program_costs_nothing_but_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wharf.db");
    let store = open(&path);
    let other = sql(&path);
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    store.record_activity(request("/one"));
    until("the lock is noticed", || !store.health().ok).await;
    assert!(store.health().detail.contains("locked by another program"), "{:?}", store.health());
    other.execute_batch("COMMIT").unwrap();
    until("the store works again", || store.health().ok).await;
    store.flush().await.unwrap();
    let count = "SELECT count(*) FROM activity";
    assert_eq!(other.query_row(count, [], |row| row.get::<_, i64>(0)).unwrap(), 1);
}

fn push(rows: &mut Rows, count: u32) {
    for _ in 0..count {
        rows.push_activity(request("/x"));
    }
}

#[test]
fn a_full_memory_drops_the_oldest_rows_and_counts_those_that_no_disk_has() {
    let mut rows = Rows::default();
    rows.place = Place::Disk;
    push(&mut rows, 5_000);
    assert_eq!(rows.activity.dropped, 0);
    push(&mut rows, 7);
    assert_eq!((rows.activity.dropped, rows.activity.first()), (7, 8));
    let batch = rows.take_batch();
    rows.committed(batch);
    push(&mut rows, 7);
    assert_eq!(rows.activity.dropped, 7, "those were written");
}

#[test]
fn bytes_learned_of_another_engine_are_forgotten_and_durations_are_not() {
    let learned = Learned {
        footprint: Some(Bytes::gib(4)),
        asleep: Some(Bytes::gib(1)),
        start: Some(Duration::from_secs(9)),
        ..Learned::default()
    };
    let spec = ModelSpec::plain("ada");
    let figures = Figures { spec: spec.shape_hash(), learned };
    let written = serde_json::to_string(&figures).unwrap();
    let read: Figures = serde_json::from_str(&written).unwrap();
    assert_eq!(read, figures);
    let other = ModelSpec { priority: Priority::High, ..spec.clone() };
    assert_eq!(read.for_spec(&other), figures, "policy");
    let other = ModelSpec { upstream_name: Some("other".to_owned()), ..spec.clone() };
    let left = figures.clone().for_spec(&other).learned;
    assert_eq!((left.footprint, left.asleep), (None, None));
    assert_eq!(left.start, Some(Duration::from_secs(9)));
    let old: Figures = serde_json::from_str(&written.replace("spec", "before")).unwrap();
    assert_eq!(old.for_spec(&spec).learned.footprint, None, "nobody knows of which engine");
}

#[test]
fn a_change_whose_caller_was_told_that_it_failed_is_not_kept_later() {
    let mut rows = Rows::default();
    rows.place = Place::Disk;
    let put = |name: &str| Change::Put((Kind::Registered, name.to_owned()), "{}".to_owned());
    let ((late, gone), (ack, _waits)) = (oneshot::channel(), oneshot::channel());
    rows.submit(Job::Change(put("late"), late)).unwrap();
    rows.submit(Job::Change(put("wanted"), ack)).unwrap();
    drop(gone);
    let batch = rows.take_batch();
    let entries = batch.change.unwrap().0;
    assert_eq!(entries, [((Kind::Registered, "wanted".to_owned()), Some("{}".to_owned()))]);
}
