//! `wharf replay`: waits that can be computed by hand, and what the command says of itself.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use wharf::replay::setup::{Costs, FOR_EVER, Machine, Setup, Size, Terms};
use wharf::replay::{self, Arrival, Run, sessions};
use wharf::scheduler::Policy;
use wharf::units::{Bytes, ModelName, Time};

const EXE: &str = env!("CARGO_BIN_EXE_wharf");

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// (arrival, model, service), in seconds.
fn trace(rows: &[(u64, &str, u64)]) -> Vec<Arrival> {
    let arrival = |&(at, model, service): &(u64, &str, u64)| Arrival {
        at: Time(at * 1000),
        model: model.into(),
        service: s(service),
    };
    rows.iter().map(arrival).collect()
}

/// A start takes 5 s, a stop 1 s.
fn terms(concurrency: u32) -> Terms {
    let costs = Costs { start: s(5), stop: s(1), sleep: None, wake: None, residue: Bytes::ZERO };
    Terms {
        costs,
        concurrency: Some(concurrency),
        max_wait: None,
        drain_timeout: None,
        queue_timeout: FOR_EVER,
    }
}

fn setup(rows: &[(u64, &str, u64)], machine: &Machine, terms: &Terms) -> Setup {
    let models: BTreeSet<ModelName> = rows.iter().map(|(_, model, _)| (*model).into()).collect();
    Setup::of_trace(&models, machine, terms).expect("a world")
}

fn ran(policy: Policy, rows: &[(u64, &str, u64)], slots: u32, concurrency: u32) -> Run {
    let setup = setup(rows, &Machine::Slots(slots), &terms(concurrency));
    replay::run(&setup, policy, &trace(rows)).expect("it keeps the protocol")
}

/// Seconds from arrival to the start of service.
fn waits(run: &Run) -> Vec<f64> {
    let wait = |v: &replay::Visit| v.began.expect("it was served").since(v.arrived).as_secs_f64();
    run.visits.iter().map(wait).collect()
}

fn loads(run: &Run) -> Vec<&str> {
    run.stays.iter().map(|stay| stay.model.as_str()).collect()
}

/// ada's second request comes while bob waits.
const BYPASS: [(u64, &str, u64); 3] = [(0, "ada", 10), (2, "bob", 4), (6, "ada", 3)];

#[test]
fn exhaustive_lets_a_ready_model_serve_all_who_come() {
    let run = ran(Policy::Exhaustive, &BYPASS, 1, 2);
    // ada is ready at 5 and idle at 15; bob is ready after 1 s of stop and 5 s of start.
    assert_eq!(waits(&run), [5.0, 19.0, 0.0]);
    assert_eq!(loads(&run), ["ada", "bob"]);
    assert_eq!(run.ended, Time(25_000));
}

#[test]
fn fifo_begins_nobody_before_one_that_came_earlier() {
    let run = ran(Policy::Fifo, &BYPASS, 1, 2);
    // ada's second one waits until bob is served, at 25, and ada has come again, at 31.
    assert_eq!(waits(&run), [5.0, 19.0, 25.0]);
    assert_eq!(loads(&run), ["ada", "bob", "ada"]);
    assert_eq!(run.ended, Time(34_000));
}

#[test]
fn exhaustive_evicts_the_least_recently_used_and_serves_models_as_they_were_asked_for() {
    let rows = [
        (0, "ada", 1),
        (10, "bob", 1),
        (20, "ada", 1),
        (30, "eve", 1),
        (40, "ada", 1),
        (50, "bob", 1),
    ];
    let run = ran(Policy::Exhaustive, &rows, 2, 1);
    // eve takes bob's place, and bob eve's.
    assert_eq!(waits(&run), [5.0, 5.0, 0.0, 6.0, 0.0, 6.0]);
    // Three wait for one place: the heap of requests for eve does not outrank bob, who came first.
    let rows = [(0, "ada", 10), (1, "bob", 1), (2, "eve", 1), (2, "eve", 1), (2, "eve", 1)];
    let run = ran(Policy::Exhaustive, &rows, 1, 4);
    assert_eq!(loads(&run), ["ada", "bob", "eve"]);
    assert_eq!(waits(&run), [5.0, 20.0, 26.0, 26.0, 26.0]);
}

#[test]
fn a_model_serves_only_so_many_at_once() {
    let rows = [(0, "ada", 10), (0, "ada", 10), (0, "ada", 10)];
    for policy in Policy::ALL {
        assert_eq!(waits(&ran(policy, &rows, 1, 2)), [5.0, 5.0, 15.0], "{policy:?}");
    }
}

#[test]
fn models_share_gpus_of_different_sizes_by_what_they_take() {
    let gib = Bytes::gib;
    let sizes = [("small", 20, 1), ("large", 40, 1), ("wide", 22, 2), ("huge", 50, 1)];
    let sizes = sizes.map(|(name, bytes, gpus)| (name.into(), Size { bytes: gib(bytes), gpus }));
    let machine = Machine::Gpus { memory: vec![gib(24), gib(48)], sizes: sizes.into() };
    let rows = [(0, "small", 60), (0, "large", 60), (10, "wide", 1), (20, "huge", 1)];
    let setup = setup(&rows, &machine, &terms(1));
    let run = replay::run(&setup, Policy::Exhaustive, &trace(&rows)).expect("it runs");
    let began: Vec<Option<u64>> = run.visits.iter().map(|v| v.began.map(|t| t.0 / 1000)).collect();
    // Side by side; who needs both GPUs comes when both are idle; who fits nowhere is refused.
    assert_eq!(began, [Some(5), Some(5), Some(71), None]);
    assert!(run.visits[3].refused.as_ref().is_some_and(|why| why.starts_with("cannot fit")));
    let wide = run.stays.last().expect("a stay");
    assert_eq!((wide.model.as_str(), wide.gpus.len()), ("wide", 2));
}

#[test]
fn who_can_sleep_comes_back_as_fast_as_it_wakes() {
    let rows = [(0, "ada", 1), (10, "bob", 1), (20, "ada", 1)];
    let mut terms = terms(1);
    (terms.costs.sleep, terms.costs.wake) = (Some(s(2)), Some(s(3)));
    let setup = setup(&rows, &Machine::Slots(1), &terms);
    for policy in Policy::ALL {
        let run = replay::run(&setup, policy, &trace(&rows)).expect("it runs");
        // Falling asleep and starting: 2 + 5; falling asleep and waking: 2 + 3.
        assert_eq!(waits(&run), [5.0, 7.0, 5.0], "{policy:?}");
    }
}

#[test]
fn fifo_keeps_the_order_of_arrival_and_all_policies_serve_everybody() {
    let mut arrivals = replay::generate::generate(4, 300);
    for arrival in &mut arrivals {
        arrival.at = Time(arrival.at.0 / 20);
        arrival.service /= 5;
    }
    let models = arrivals.iter().map(|a| a.model.clone()).collect();
    let setup = Setup::of_trace(&models, &Machine::Slots(3), &terms(4)).expect("a world");
    for policy in Policy::ALL {
        let run = replay::run(&setup, policy, &arrivals).expect("it runs");
        assert!(run.visits.iter().all(|v| v.ended.is_some() && v.refused.is_none()), "{policy:?}");
        let began: Vec<Time> = run.visits.iter().filter_map(|v| v.began).collect();
        assert_eq!(began.is_sorted(), policy == Policy::Fifo, "{policy:?}");
        // Never more than fit, from the decision to start until the memory is free.
        for stay in &run.stays {
            let beside =
                |other: &&replay::Stay| other.began <= stay.began && stay.began < other.ended;
            assert!(run.stays.iter().filter(beside).count() <= 3, "{policy:?}: {stay:?}");
        }
    }
}

#[test]
fn agents_ask_again_only_when_they_were_answered() {
    let models = [sessions::PLANNER, sessions::CODER].map(ModelName::from).into();
    let setup = Setup::of_trace(&models, &Machine::Slots(1), &terms(16)).expect("a world");
    for policy in Policy::ALL {
        let run = || replay::run_sessions(&setup, policy, sessions::agents(3, 1)).expect("it runs");
        let alone = run();
        assert_eq!(alone, run(), "only the seed decides");
        let pairs = alone.visits.windows(2);
        assert!(pairs.into_iter().all(|v| v[0].ended.is_some_and(|ended| ended <= v[1].arrived)));
        // Planner and coder in turn: two swaps a task, but the first and between two tasks.
        assert_eq!(sessions::session_figures(&alone, 1).loads, 2 * sessions::TASKS + 1);
    }
}

// ── the command ──

fn wharf(args: &[&str]) -> Output {
    Command::new(EXE).arg("replay").args(args).output().expect("it runs")
}

fn said(args: &[&str]) -> String {
    let output = wharf(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&said(args)).expect("JSON")
}

/// Why it did not run.
fn refused(args: &[&str]) -> String {
    let output = wharf(args);
    assert!(!output.status.success(), "{args:?} ran");
    String::from_utf8(output.stderr).expect("text")
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a folder"))
    }

    fn path(&self, name: &str) -> String {
        let path: PathBuf = self.0.path().join(name);
        path.to_str().expect("text").to_owned()
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("it can be written");
        path
    }
}

const CSV: &str = "arrival_s,model,service_s\n0,ada,10\n2,bob,4\n6,ada,3\n";

// contract: CLI replay
#[test]
fn the_command_compares_the_policies_in_figures_and_in_a_table() {
    let folder = Folder::new();
    let csv = folder.file("t.csv", CSV);
    let told = json(&[&csv, "--concurrency", "2", "--json"]);
    let policies = told["policies"].as_array().expect("a list");
    let names: Vec<&str> = policies.iter().filter_map(|p| p["policy"].as_str()).collect();
    assert_eq!(names, ["fair", "exhaustive", "fifo"]);
    let (exhaustive, fifo) = (&policies[1], &policies[2]);
    assert_eq!(exhaustive["wait"]["mean_s"], 8.0);
    assert_eq!(exhaustive["wait"]["max_s"], 19.0);
    assert_eq!(exhaustive["wait"]["p50_s"], 5.0);
    assert_eq!((&exhaustive["loads"], &fifo["loads"]), (&2.into(), &3.into()));
    assert_eq!(exhaustive["bytes_moved"], Bytes::gib(32).0);
    assert_eq!(exhaustive["models"]["bob"]["wait"]["mean_s"], 19.0);
    assert_eq!(exhaustive["longest_turn_s"], 19.0);
    assert_eq!(exhaustive["starved"], 0);
    // Busy from 5 to 15 and from 21 to 25, of 25 s; moving: 5 + 1 + 5.
    assert_eq!(exhaustive["gpu_busy"], 14.0 / 25.0);
    assert_eq!(exhaustive["gpu_moving"], 11.0 / 25.0);
    assert!(exhaustive["bound"].is_null(), "it keeps none");
    assert_eq!(policies[0]["bound"]["beyond"], 0);
    let ratio = policies[0]["wait"]["mean_s"].as_f64().map(|mean| mean / 8.0);
    assert_eq!(told["fair_to_exhaustive"]["mean"].as_f64(), ratio);

    let table = said(&[&csv, "--concurrency", "2"]);
    assert!(table.contains("t.csv: 3 arrivals\n"), "{table}");
    assert!(table.contains("room for 1 of 2 models, start 5 s, stop 1 s, 2 at once"), "{table}");
    let mean = table.lines().find(|line| line.starts_with("wait, mean")).expect("a row");
    assert!(mean.contains("8.0 s"), "{mean}");
    assert!(table.contains("beyond their bound"), "{table}");
}

#[test]
fn time_can_be_compressed_and_the_trace_cut_short() {
    let folder = Folder::new();
    let csv = folder.file("t.csv", CSV);
    let args = ["--policy", "exhaustive", "--json", "--compress", "2", "--service-scale", "0.5"];
    let told = json(&[&[csv.as_str(), "--limit", "2"], &args[..]].concat());
    let only = &told["policies"][0];
    // ada from 5 to 10; bob came at 1 and begins at 16.
    assert_eq!(only["arrivals"], 2);
    assert_eq!(only["models"]["bob"]["wait"]["max_s"], 15.0);
    assert!(told["fair_to_exhaustive"].is_null(), "there is nothing to compare");
}

#[test]
fn made_up_traffic_depends_on_its_seed_alone_and_can_be_kept() {
    let folder = Folder::new();
    let limit = ["--limit", "200"];
    let csv = said(&[&["--generate", "5", "--csv"], &limit[..]].concat());
    assert_eq!(csv.lines().count(), 201);
    assert_eq!(csv, said(&[&["--generate", "5", "--csv"], &limit[..]].concat()));
    let kept = folder.file("kept.csv", &csv);
    let args = ["--compress", "10", "--policy", "exhaustive", "--json"];
    let from_seed = json(&[&["--generate", "5"], &limit[..], &args].concat());
    let from_file = json(&[&[kept.as_str()], &args[..]].concat());
    assert_eq!(from_seed["policies"][0]["wait"], from_file["policies"][0]["wait"]);
    let other = json(&[&["--generate", "6"], &limit[..], &args].concat());
    assert_ne!(from_seed["policies"], other["policies"]);
}

#[test]
fn the_plot_is_an_svg() {
    let folder = Folder::new();
    let (csv, svg) = (folder.file("t.csv", CSV), folder.path("waits.svg"));
    said(&[&csv, "--plot", &svg]);
    let svg = std::fs::read_to_string(svg).expect("it was drawn");
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
    for policy in Policy::ALL {
        assert!(svg.contains(policy.as_str()));
    }
}

#[test]
fn sessions_tell_swaps_a_task_and_the_makespan() {
    let told = json(&["--sessions", "2", "--seed", "9", "--json"]);
    assert_eq!(told, json(&["--sessions", "2", "--seed", "9", "--json"]));
    let policies = told["policies"].as_array().expect("a list");
    assert_eq!(policies.len(), 3);
    for policy in policies {
        assert_eq!((&policy["agents"], &policy["tasks"]), (&2.into(), &10.into()));
        assert!(policy["makespan_s"].as_f64() > Some(0.0));
        assert!(policy["swaps_per_task"].as_f64() > Some(0.0));
    }
    // Both models fit: each is loaded once.
    let told = json(&["--sessions", "2", "--slots", "2", "--json"]);
    assert_eq!(told["policies"][0]["loads"], 2);
    assert!(said(&["--sessions", "2"]).contains("swaps per task"));
    assert!(refused(&["--sessions", "17"]).contains("expected 1 to 16 agents"));
}

#[test]
fn a_configuration_gives_models_sizes_and_aliases() {
    let folder = Folder::new();
    let config = folder.file(
        "models.yaml",
        "store: ':memory:'\n\
         gpu: { provider: simulated, memory: [24GiB], reserve: 0 }\n\
         models:\n\
         \x20 ada: { engine: llamacpp, process: { cmd: \"x ${PORT}\" }, vram: 10GiB, aliases: [a], concurrency: 1 }\n\
         \x20 bob: { engine: llamacpp, process: { cmd: \"x ${PORT}\" }, vram: 10GiB, concurrency: 1 }\n\
         \x20 eve: { engine: llamacpp, process: { cmd: \"x ${PORT}\" }, vram: 20GiB, concurrency: 1 }\n",
    );
    let csv = folder.file("t.csv", "arrival_s,model,service_s\n0,a,4\n0,bob,4\n1,ada,4\n9,eve,1\n");
    let told = json(&[&csv, "--config", &config, "--policy", "exhaustive", "--json"]);
    let models = &told["policies"][0]["models"];
    // ada and bob side by side; ada serves one at a time; eve needs the places of both.
    assert_eq!(models["ada"]["arrivals"], 2);
    assert_eq!(models["ada"]["wait"]["max_s"], 8.0);
    assert_eq!(models["bob"]["wait"]["max_s"], 5.0);
    assert_eq!(models["eve"]["wait"]["max_s"], 10.0);

    let stranger = folder.file("s.csv", "arrival_s,model,service_s\n0,mallory,4\n");
    let why = refused(&[&stranger, "--config", &config]);
    assert!(why.contains("asks for mallory, which is not in"), "{why}");
    let bare = folder.file(
        "bare.yaml",
        "store: ':memory:'\nmodels:\n  a: { engine: llamacpp, process: { cmd: \"x ${PORT}\" } }\n",
    );
    let why = refused(&[&csv, "--config", &bare]);
    assert!(why.contains("--gpus"), "{why}");
}

#[test]
fn what_cannot_be_replayed_is_told_with_its_place() {
    let folder = Folder::new();
    let bad = folder.file("bad.csv", "arrival_s,model,service_s\n0,ada,10\n2,bob,soon\n");
    let why = refused(&[&bad]);
    assert!(why.contains("bad.csv:3, service_s: "), "{why}");
    let headless = folder.file("headless.csv", "when,who\n0,ada\n");
    assert!(refused(&[&headless]).contains("headless.csv:1"));
    assert!(refused(&[&folder.path("none.csv")]).contains("none.csv"));

    let csv = folder.file("t.csv", CSV);
    let why = refused(&[&csv, "--gpus", "24GiB", "--sizes", "ada=8GiB"]);
    assert!(why.contains("no size is known for model bob"), "{why}");
    let why = refused(&[&csv, "--gpus", "24GiB", "--sizes", "ada=8GiB,eve=8GiB"]);
    assert!(why.contains("nobody asks for eve"), "{why}");
    assert!(refused(&[&csv, "--compress", "0"]).contains("greater than 0"));
    assert!(refused(&[&csv, "--slots", "0"]).contains("there is no GPU"));
    assert!(refused(&[]).contains("TRACE"));
}

#[test]
fn help_teaches_figures_and_policies() {
    let help = said(&["--help"]);
    for word in ["exhaustive", "starved", "turn", "--compress", "Examples:", "Exit codes"] {
        assert!(help.contains(word), "no {word} in:\n{help}");
    }
}
