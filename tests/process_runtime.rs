//! The process runtime with real processes: nothing is left behind, nothing foreign is touched,
//! and everything is found again after `kill -9` of the one who started it.

#[path = "support/engine.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;
use wharf::config::catalog::{GpuRequest, Health, ModelSpec, ProcessSpec, RuntimeSpec, StopSpec};
use wharf::runtime::process::ProcessRuntime;
use wharf::runtime::{ExitReport, Found, Identity, LaunchKey, LaunchSpec, Running, RuntimeHandle};
use wharf::scheduler::event::FaultKind;
use wharf::units::{GpuId, InstanceId};

use support::{DEADLINE, free_port, healthy, http, until};

const WHARF: &str = env!("CARGO_BIN_EXE_wharf");

fn spec(dir: &Path, port: u16, argv: &[&str]) -> LaunchSpec {
    let process = ProcessSpec {
        argv: argv.iter().map(ToString::to_string).collect(),
        env: BTreeMap::new(),
        cwd: None,
    };
    let model = ModelSpec {
        runtime: RuntimeSpec::Process(process),
        gpus: GpuRequest::None,
        health: Health { path: Some("/health".into()), stall: DEADLINE },
        stop: stop("SIGTERM", DEADLINE),
        ..ModelSpec::plain("coder")
    };
    LaunchSpec {
        identity: Identity {
            // The folder is this test's own, and so is what it starts.
            installation: dir.display().to_string(),
            instance: InstanceId(7),
            model: model.name.clone(),
            spec_hash: "hash".into(),
            gpus: vec![GpuId(0), GpuId(1)],
            port,
        },
        model: Arc::new(model),
        gpus: Vec::new(),
        port,
        container_port: port,
        args: Vec::new(),
        env: BTreeMap::new(),
        api_key: LaunchKey::None,
        log_dir: dir.join("logs"),
    }
}

fn process_of(spec: &mut LaunchSpec) -> &mut ProcessSpec {
    match &mut Arc::make_mut(&mut spec.model).runtime {
        RuntimeSpec::Process(process) => process,
        RuntimeSpec::Docker(_) | RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => {
            panic!("a process")
        }
    }
}

fn engine(dir: &Path, port: u16, args: &[&str]) -> LaunchSpec {
    spec(dir, port, &[&[WHARF, "engine", "--name", "${MODEL}", "--port", "${PORT}"], args].concat())
}

fn stop(signal: &str, grace: Duration) -> StopSpec {
    StopSpec { signal: signal.into(), grace }
}

fn gentle() -> StopSpec {
    stop("SIGTERM", DEADLINE)
}

fn pid(running: &Running) -> u32 {
    match running.handle {
        RuntimeHandle::Process { pid, .. } => pid,
        RuntimeHandle::Docker { .. } | RuntimeHandle::External | RuntimeHandle::Ollama { .. } => {
            panic!("a process")
        }
    }
}

fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Workers of a dead leader are reaped by init, in its own time.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn kill_alone(pid: u32) {
    kill(Pid::from_raw(pid as i32), Signal::SIGKILL).expect("killed");
}

async fn exit_of(running: &Running) -> ExitReport {
    let mut exit = running.exit.clone();
    let report = tokio::time::timeout(DEADLINE, exit.wait_for(Option::is_some));
    report.await.expect("in time").expect("a report").clone().expect("some")
}

async fn logged(running: &Running, part: &str) {
    until(part, async || {
        running.log.last(usize::MAX).iter().any(|line| line.contains(part)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn start_and_stop_leave_nothing_behind() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let spec = engine(dir.path(), port, &["--children", "2"]);
    let runtime = ProcessRuntime::default();
    runtime.preflight(&spec).await.expect("ready to start");
    let running = runtime.start(&spec).await.expect("started");
    healthy(port).await;
    assert_eq!(running.endpoint.base, format!("http://127.0.0.1:{port}"));
    logged(&running, "ready on").await;
    let pids = runtime.group_pids(pid(&running));
    assert_eq!(pids.len(), 3, "{pids:?}");
    let listeners = runtime.listeners(port).await;
    assert_eq!(listeners.first().map(|listener| listener.pid), Some(pid(&running)));

    runtime.stop(&running, &gentle()).await.expect("stopped");
    assert_eq!(
        exit_of(&running).await,
        ExitReport { code: Some(0), signal: None, oom_killed: false }
    );
    assert!(!pids.iter().any(|pid| exists(*pid)), "no process, no zombie");
    assert!(runtime.find(&spec.identity.installation).await.expect("a scan").is_empty());
    runtime.stop(&running, &gentle()).await.expect("a second stop finds nothing to do");
}

#[tokio::test]
async fn the_command_gets_its_port_its_environment_and_its_folder() {
    let dir = tempfile::tempdir().expect("a folder");
    let script = "echo arg:$0 port:${PORT} model:${MODEL} extra:$1 pwd:$PWD; env";
    let mut spec = spec(dir.path(), 28_123, &["sh", "-c", script, "${PORT}"]);
    spec.args = vec!["--derived".into()];
    spec.env =
        BTreeMap::from([("BOTH".into(), "derived".into()), ("DERIVED".into(), "yes".into())]);
    let process = process_of(&mut spec);
    process.cwd = Some(dir.path().to_owned());
    process.env = BTreeMap::from([
        ("BOTH".into(), "configured ${PORT}".into()),
        ("WHARF_INSTANCE".into(), "forged".into()),
    ]);
    let running = ProcessRuntime::default().start(&spec).await.expect("started");
    assert_eq!(exit_of(&running).await.code, Some(0));
    let lines = running.log.last(usize::MAX);
    let here = dir.path().canonicalize().expect("a path");
    let first = format!("arg:28123 port:28123 model:coder extra:--derived pwd:{}", here.display());
    assert_eq!(lines.first(), Some(&first), "the log is complete before the exit is told");
    for expected in [
        "BOTH=configured 28123",
        "DERIVED=yes",
        "WHARF_INSTANCE=i7",
        "WHARF_MODEL=coder",
        "WHARF_SPEC=hash",
        "WHARF_GPUS=0,1",
        "WHARF_PORT=28123",
        &format!("WHARF_INSTALLATION={}", dir.path().display()),
    ] {
        assert!(lines.iter().any(|line| line == expected), "{expected} in {lines:?}");
    }
}

#[tokio::test]
async fn preflight_names_what_is_wrong() {
    let dir = tempfile::tempdir().expect("a folder");
    let runtime = ProcessRuntime::default();
    let fault = async |spec: &LaunchSpec| runtime.preflight(spec).await.expect_err("a fault");

    let missing = fault(&spec(dir.path(), free_port(), &["no-such-engine"])).await;
    assert_eq!(missing.kind, FaultKind::CommandMissing);
    assert!(missing.message.contains("no-such-engine"), "{}", missing.message);

    let mut nowhere = spec(dir.path(), free_port(), &["sh"]);
    process_of(&mut nowhere).cwd = Some("/no/such/folder".into());
    let nowhere = fault(&nowhere).await;
    assert_eq!(nowhere.kind, FaultKind::BadSpec);
    assert!(nowhere.message.contains("/no/such/folder"), "{}", nowhere.message);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let taken = fault(&spec(dir.path(), port, &["sh"])).await;
    assert_eq!(taken.kind, FaultKind::PortTaken);
    let own = format!("pid {}", std::process::id());
    assert!(taken.message.contains(&own), "{}", taken.message);
}

#[tokio::test]
async fn a_program_that_cannot_run_is_a_named_fault() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = dir.path().join("engine");
    std::fs::write(&program, "#!/no/such/interpreter\n").expect("written");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&program, mode).expect("executable");
    let spec = spec(dir.path(), free_port(), &[program.to_str().expect("utf-8")]);
    let fault = ProcessRuntime::default().start(&spec).await.expect_err("a fault");
    assert_eq!(fault.kind, FaultKind::CommandMissing, "{}", fault.message);
}

#[tokio::test]
async fn who_refuses_to_end_is_killed_after_the_grace() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let runtime = ProcessRuntime::default();
    let spec = engine(dir.path(), port, &["--shutdown", "refuse", "--children", "1"]);
    let running = runtime.start(&spec).await.expect("started");
    healthy(port).await;
    let pids = runtime.group_pids(pid(&running));
    let grace = Duration::from_secs(3);
    let begun = Instant::now();
    runtime.stop(&running, &stop("SIGTERM", grace)).await.expect("stopped");
    assert!(begun.elapsed() >= grace, "the grace is given");
    assert_eq!(exit_of(&running).await.signal, Some(9));
    logged(&running, "signal ignored").await;
    assert!(!exists(pid(&running)) && !pids.iter().any(|pid| lives(*pid)), "{pids:?}");
}

#[tokio::test]
async fn workers_get_the_grace_even_when_their_leader_ends_first() {
    let dir = tempfile::tempdir().expect("a folder");
    // A wrapper that dies of the signal at once, and an engine that takes its time.
    let script = "(trap 'sleep 0.6; echo tidied up; exit' TERM; echo up; while :; do sleep 0.05; done) & wait";
    let spec = spec(dir.path(), free_port(), &["sh", "-c", script]);
    let runtime = ProcessRuntime::default();
    let running = runtime.start(&spec).await.expect("started");
    logged(&running, "up").await;
    runtime.stop(&running, &gentle()).await.expect("stopped");
    assert_eq!(running.log.last(1), ["tidied up"]);
}

#[tokio::test]
async fn a_leader_that_dies_takes_its_workers_along() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let runtime = ProcessRuntime::default();
    let spec = engine(dir.path(), port, &["--children", "2"]);
    let running = runtime.start(&spec).await.expect("started");
    healthy(port).await;
    let pids = runtime.group_pids(pid(&running));
    assert_eq!(pids.len(), 3);
    kill_alone(pid(&running));
    let report = exit_of(&running).await;
    assert_eq!((report.signal, report.oom_killed), (Some(9), false));
    assert!(!pids.iter().any(|pid| lives(*pid)), "the exit is told when all are gone");
    logged(&running, "SIGKILL that Wharf did not send").await;
}

#[tokio::test]
async fn who_leaves_the_group_is_ended_too() {
    let dir = tempfile::tempdir().expect("a folder");
    let script = "setsid sh -c 'echo escaped; exec sleep 600' & exec sleep 601";
    let spec = spec(dir.path(), free_port(), &["sh", "-c", script]);
    let runtime = ProcessRuntime::default();
    let running = runtime.start(&spec).await.expect("started");
    logged(&running, "escaped").await;
    let pids = runtime.group_pids(pid(&running));
    assert_eq!(pids.len(), 2, "{pids:?}");
    // The leader first: then only the environment tells whose the other is.
    kill_alone(pid(&running));
    exit_of(&running).await;
    // The kernel takes a dying process's memory (and its environment) before it becomes a zombie.
    until("the end of both", async || (!pids.iter().any(|pid| lives(*pid))).then_some(())).await;
}

#[tokio::test]
async fn the_last_lines_and_the_code_of_a_crash_are_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let fatal = "ValueError: No available memory for the cache blocks";
    let spec = engine(dir.path(), free_port(), &["--fatal-line", fatal]);
    let running = ProcessRuntime::default().start(&spec).await.expect("started");
    let report = exit_of(&running).await;
    assert_eq!(report, ExitReport { code: Some(1), signal: None, oom_killed: false });
    assert_eq!(running.log.last(1), [fatal]);
}

/// Not a test: the one below runs it in a process of its own, which it makes the parent of every
/// orphan, as the first process of a container is.
#[tokio::test]
#[ignore = "run by another test"]
async fn as_first_process() {
    let Ok(dir) = std::env::var("FIRST_PROCESS_DIR") else { return };
    nix::sys::prctl::set_child_subreaper(true).expect("a subreaper");
    let runtime = ProcessRuntime::default();
    let port = free_port();
    let spec = engine(Path::new(&dir), port, &["--children", "2"]);
    let running = runtime.start(&spec).await.expect("started");
    healthy(port).await;
    let pids = runtime.group_pids(pid(&running));
    assert_eq!(pids.len(), 3);
    kill_alone(pid(&running));
    exit_of(&running).await;
    assert!(!pids.iter().any(|pid| exists(*pid)), "zombies: {pids:?}");
}

#[test]
fn as_the_first_process_of_a_container_it_reaps_orphans() {
    let dir = tempfile::tempdir().expect("a folder");
    let status = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "as_first_process", "--ignored"])
        .env("FIRST_PROCESS_DIR", dir.path())
        .status()
        .expect("it runs");
    assert!(status.success());
}

/// Not a test: what the tests below start and kill. It starts one engine and stays.
#[tokio::test]
#[ignore = "run by other tests"]
async fn starter() {
    let Ok(dir) = std::env::var("STARTER_DIR") else { return };
    let port = std::env::var("STARTER_PORT").expect("set").parse().expect("a port");
    let spec = engine(Path::new(&dir), port, &["--children", "1", "--residue", "1MiB"]);
    let running = ProcessRuntime::default().start(&spec).await.expect("started");
    println!("\nstarted {}", pid(&running));
    std::future::pending::<()>().await;
}

/// Starts an engine from another process and ends that one by SIGKILL. Returns the engine's pid.
fn started_by_somebody_killed(dir: &Path, port: u16) -> u32 {
    let mut starter = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "starter", "--ignored", "--nocapture"])
        .env("STARTER_DIR", dir)
        .env("STARTER_PORT", port.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the starter runs");
    let mut lines = BufReader::new(starter.stdout.take().expect("stdout")).lines();
    let started = lines.find_map(|line| line.ok()?.strip_prefix("started ")?.parse().ok());
    kill_alone(starter.id());
    starter.wait().expect("reaped");
    started.expect("it started")
}

async fn found(runtime: &ProcessRuntime, dir: &Path) -> Found {
    let mut all = runtime.find(&dir.display().to_string()).await.expect("a scan");
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

#[tokio::test]
async fn after_kill_9_of_the_starter_the_engine_is_adopted() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let leader = started_by_somebody_killed(dir.path(), port);
    healthy(port).await;

    let runtime = ProcessRuntime::default();
    let Found { running, alive } = found(&runtime, dir.path()).await;
    assert!(alive);
    assert_eq!(pid(&running), leader);
    assert_eq!(running.identity, engine(dir.path(), port, &[]).identity);
    assert_eq!(running.endpoint.base, format!("http://127.0.0.1:{port}"));
    logged(&running, "ready on").await;
    http(port, "POST", "/sleep?level=1", "").await.expect("asleep");
    logged(&running, "Sleep mode (level 1)").await;
    assert!(running.exit.borrow().is_none());

    let pids = runtime.group_pids(leader);
    assert_eq!(pids.len(), 2);
    runtime.stop(&running, &gentle()).await.expect("stopped");
    assert_eq!(exit_of(&running).await.code, None, "its exit code went to another parent");
    assert!(runtime.group_pids(leader).is_empty());
    assert!(runtime.find(&dir.path().display().to_string()).await.expect("a scan").is_empty());
}

#[tokio::test]
async fn the_end_of_an_adopted_engine_is_seen() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let leader = started_by_somebody_killed(dir.path(), port);
    let runtime = ProcessRuntime::default();
    let Found { running, .. } = found(&runtime, dir.path()).await;
    until("both processes", async || (runtime.group_pids(leader).len() == 2).then_some(())).await;
    kill_alone(leader);
    exit_of(&running).await;
    assert!(runtime.group_pids(leader).is_empty());
}

#[tokio::test]
async fn workers_without_a_leader_are_found_and_reaped() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port();
    let leader = started_by_somebody_killed(dir.path(), port);
    healthy(port).await;
    kill_alone(leader);
    let runtime = ProcessRuntime::default();
    until("a worker alone", async || (runtime.group_pids(leader).len() == 1).then_some(())).await;
    let Found { running, alive } = found(&runtime, dir.path()).await;
    assert!(!alive);
    assert!(running.exit.borrow().is_some());
    runtime.stop(&running, &gentle()).await.expect("stopped");
    assert!(runtime.group_pids(leader).is_empty());
}

#[tokio::test]
async fn nothing_foreign_is_found_or_touched() {
    let (mine, other) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
    let runtime = ProcessRuntime::default();
    let ours =
        runtime.start(&spec(mine.path(), free_port(), &["sleep", "600"])).await.expect("one");
    let theirs =
        runtime.start(&spec(other.path(), free_port(), &["sleep", "600"])).await.expect("two");
    let stranger = Command::new("sleep").arg("600").spawn().expect("three");

    // A leader's pid that now means another process: its start time tells.
    let mut stale = ours.clone();
    stale.handle = RuntimeHandle::Process { pid: stranger.id(), start_ticks: 1 };
    stale.identity.instance = InstanceId(99);
    runtime.stop(&stale, &gentle()).await.expect("nothing to stop");
    assert!(exists(stranger.id()));

    assert_eq!(pid(&found(&ProcessRuntime::default(), mine.path()).await.running), pid(&ours));
    runtime.stop(&ours, &gentle()).await.expect("stopped");
    assert!(exists(pid(&theirs)) && exists(stranger.id()));
    runtime.stop(&theirs, &gentle()).await.expect("stopped");
    let mut stranger = stranger;
    stranger.kill().expect("killed");
    stranger.wait().expect("reaped");
}
