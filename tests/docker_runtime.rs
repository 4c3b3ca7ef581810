//! The Docker runtime against a real Docker Engine.
//!
//! Run with WHARF_TEST_DOCKER=unix:///… (see tests/support/dockerd.sh); otherwise every test says
//! that it was skipped.

#[path = "docker/mod.rs"]
mod docker;
#[path = "docker/own_daemon.rs"]
mod own_daemon;
#[path = "support/socket.rs"]
#[expect(dead_code, reason = "used in part")]
mod socket;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bollard::models::{ContainerCreateBody, HostConfig, RestartPolicy, RestartPolicyNameEnum};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, KillContainerOptionsBuilder, RemoveImageOptions,
};
use docker::{BUSYBOX, Yard, eventually, exit_of, healthy, stop_spec};
use socket::{Interference, interfering};
use wharf::cli::pull;
use wharf::config::catalog::{ModelSpec, PullPolicy};
use wharf::runtime::docker::DockerRuntime;
use wharf::runtime::{GpuDevice, Progress, RuntimeHandle};
use wharf::scheduler::event::FaultKind;
use wharf::units::{Bytes, GpuId, ModelName};

fn id_of(running: &wharf::runtime::Running) -> String {
    match &running.handle {
        RuntimeHandle::Docker { id, .. } => id.clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_started_reached_and_removed() {
    let Some(yard) = Yard::open("lifecycle").await else { return };
    lifecycle(&yard).await;
}

async fn lifecycle(yard: &Yard) {
    let spec = yard.server();
    yard.runtime.preflight(&spec).await.expect("preflight");
    yard.runtime.fetch(&spec, &Progress::new().0).await.expect("the image is there");
    let running = yard.runtime.start(&spec).await.expect("a start");
    assert_eq!(running.endpoint.base, format!("http://127.0.0.1:{}", spec.port));
    assert_eq!(healthy(&running.endpoint.base).await, "ready\n");
    eventually("the log line", async || {
        running.log.last(5).contains(&"listening".to_owned()).then_some(())
    })
    .await;
    assert!(!yard.runtime.pids(&id_of(&running)).await.is_empty());
    assert!(yard.is_alive(&running).await);
    let health = yard.runtime.health();
    eventually("health", async || health.borrow().ok.then_some(())).await;
    assert!(health.borrow().detail.contains("Docker Engine"), "{:?}", health.borrow());

    let found = yard.found().await;
    assert_eq!(found.len(), 1);
    assert!(found[0].alive);
    assert_eq!(found[0].running.identity, spec.identity);
    assert_eq!(found[0].running.endpoint, running.endpoint);

    yard.runtime.stop(&running, &spec.model.stop).await.expect("a stop");
    assert!(yard.containers().await.is_empty());
    assert!(!yard.is_alive(&running).await);
    exit_of(&running).await;
    yard.runtime.stop(&running, &spec.model.stop).await.expect("stopping twice is fine");
}

// contract: CONFIG processes and containers get their GPUs
#[tokio::test(flavor = "multi_thread")]
async fn what_is_created_follows_the_spec() {
    let Some(yard) = Yard::open("spec").await else { return };
    let volume = std::env::temp_dir();
    let mut spec = yard.spec_with(|docker| {
        docker.args = vec!["sh".into(), "-c".into(), "echo $A $B $0 $1; sleep 600".into()];
        docker.env.insert("A".into(), "configured".into());
        docker.volumes = vec![format!("{}:/data:ro", volume.display())];
        docker.shm_size = Some(Bytes::mib(96));
        docker.ipc = Some("private".into());
        docker.ulimits.insert("nofile".into(), (1024, 2048));
        docker.labels.insert("team".into(), "a".into());
        docker.user = Some("65534".into());
        docker.memory = Some(Bytes::mib(64));
    });
    spec.args = vec!["derived".into(), "args".into()];
    spec.env = [("A", "derived"), ("B", "derived")].map(|(k, v)| (k.into(), v.into())).into();
    let running = yard.runtime.start(&spec).await.expect("a start");
    eventually("arguments and environment", async || {
        running.log.last(9).contains(&"configured derived derived args".to_owned()).then_some(())
    })
    .await;
    let made = yard.docker.inspect_container(&id_of(&running), None).await.expect("it");
    let host = made.host_config.expect("a host config");
    assert_eq!(host.restart_policy.and_then(|p| p.name), Some(RestartPolicyNameEnum::NO));
    assert_eq!(host.init, Some(true));
    assert_eq!(host.shm_size, Some(96 << 20));
    assert_eq!(host.memory, Some(64 << 20));
    assert_eq!(host.binds.expect("binds").len(), 1);
    assert_eq!(host.ulimits.expect("ulimits")[0].hard, Some(2048));
    let config = made.config.expect("a config");
    assert_eq!(config.user.as_deref(), Some("65534"));
    let labels = config.labels.expect("labels");
    assert_eq!(labels["team"], "a");
    assert_eq!(labels["wharf.model"], "org/busy:1");
    yard.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_there_is_named() {
    let Some(yard) = Yard::open("image").await else { return };
    let spec = yard.spec_with(|docker| docker.image = Some("wharf-test/none:1".into()));
    for fault in [
        yard.runtime.preflight(&spec).await.expect_err("no image"),
        yard.runtime.fetch(&spec, &Progress::new().0).await.expect_err("no image"),
        yard.runtime.start(&spec).await.expect_err("no image"),
    ] {
        assert_eq!(fault.kind, FaultKind::ImageMissing, "{}", fault.message);
        assert!(fault.message.contains("wharf-test/none:1"), "{}", fault.message);
    }
    assert!(yard.containers().await.is_empty());
    let bad = yard.spec_with(|docker| docker.image = Some("Not An Image".into()));
    let fault = yard.runtime.preflight(&bad).await.expect_err("a bad name");
    assert_eq!(fault.kind, FaultKind::BadSpec);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_cannot_be_reached_is_named() {
    let Some(yard) = Yard::open("registry").await else { return };
    let registry = format!("127.0.0.1:{}", docker::free_port());
    let spec = yard.spec_with(|docker| {
        docker.image = Some(format!("{registry}/org/model:1"));
        docker.pull = PullPolicy::Missing;
    });
    let fault = yard.runtime.fetch(&spec, &Progress::new().0).await.expect_err("no registry");
    assert_eq!(fault.kind, FaultKind::FetchFailed, "{}", fault.message);
    assert!(fault.message.contains(&registry), "{}", fault.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_with_progress_and_refusals_are_named() {
    let Some(yard) = Yard::open("pull").await else { return };
    let registry = docker::registry::serve().await;
    let spec = |path: &str, pull: PullPolicy| {
        yard.spec_with(|docker| {
            docker.image = Some(format!("{registry}/{path}"));
            docker.pull = pull;
        })
    };
    let (progress, mut seen) = Progress::new();
    let watch = tokio::spawn(async move {
        let mut reports = Vec::new();
        while seen.changed().await.is_ok() {
            reports.push(seen.borrow_and_update().clone());
        }
        reports
    });
    let open = spec("open/model:1", PullPolicy::Missing);
    yard.runtime.fetch(&open, &progress).await.expect("a pull");
    drop(progress);
    let reports = watch.await.expect("the reports");
    assert!(reports.iter().all(|report| report.stage == "pull"));
    let on_the_way = |f: f32| f > 0.0 && f < 1.0;
    let rated = reports
        .iter()
        .find(|report| report.fraction.is_some_and(on_the_way) && report.detail.ends_with("/s"));
    assert!(rated.is_some_and(|report| report.detail.contains(" of 8.0 MiB, ")), "{reports:?}");
    assert_eq!(reports.last().and_then(|report| report.fraction), Some(1.0), "{reports:?}");
    // Present now, so nobody is asked.
    yard.runtime
        .fetch(&spec("open/model:1", PullPolicy::Never), &Progress::new().0)
        .await
        .expect("it");

    for (path, kind) in
        [("gated/model:1", FaultKind::FetchDenied), ("none/model:1", FaultKind::ImageMissing)]
    {
        let spec = spec(path, PullPolicy::Missing);
        let fault = yard.runtime.fetch(&spec, &Progress::new().0).await.expect_err(path);
        assert_eq!(fault.kind, kind, "{}", fault.message);
        assert!(fault.message.contains(&registry), "{}", fault.message);
    }
    let image = format!("{registry}/open/model:1");
    yard.docker.remove_image(&image, None::<RemoveImageOptions>, None).await.expect("removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_named_and_nothing_is_left() {
    let Some(yard) = Yard::open("port").await else { return };
    let spec = yard.server();
    let stranger = std::net::TcpListener::bind(("127.0.0.1", spec.port)).expect("the port");
    let fault = yard.runtime.start(&spec).await.expect_err("the port is taken");
    assert_eq!(fault.kind, FaultKind::PortTaken, "{}", fault.message);
    assert!(fault.message.contains(&spec.port.to_string()), "{}", fault.message);
    assert!(yard.containers().await.is_empty());
    drop(stranger);

    let first = yard.runtime.start(&spec).await.expect("the port is free again");
    let mut second = yard.server();
    second.port = spec.port;
    let fault = yard.runtime.start(&second).await.expect_err("our own port");
    assert_eq!(fault.kind, FaultKind::PortTaken, "{}", fault.message);
    assert!(fault.message.contains("wharf-org-busy-1-"), "{}", fault.message);
    yard.runtime.stop(&first, &stop_spec(1)).await.expect("a stop");
    assert!(yard.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_gpu_driver_and_an_unknown_runtime_are_named() {
    let Some(yard) = Yard::open("gpu").await else { return };
    let uuid = "GPU-00000000-0000-0000-0000-000000000000".to_owned();
    for cdi in [false, true] {
        let mut spec = yard.spec_with(|docker| docker.cdi = cdi);
        spec.gpus = vec![GpuDevice { id: GpuId(0), uuid: uuid.clone() }];
        let fault = yard.runtime.start(&spec).await.expect_err("no driver");
        assert_eq!(fault.kind, FaultKind::GpuDriverMissing, "{}", fault.message);
        assert!(fault.message.contains("NVIDIA Container Toolkit"), "{}", fault.message);
    }
    let spec = yard.spec_with(|docker| docker.runtime = Some("nvidia-nope".into()));
    for fault in [
        yard.runtime.preflight(&spec).await.expect_err("no runtime"),
        yard.runtime.start(&spec).await.expect_err("no runtime"),
    ] {
        assert_eq!(fault.kind, FaultKind::BadSpec, "{}", fault.message);
        assert!(fault.message.contains("nvidia-nope"), "{}", fault.message);
    }
    assert!(yard.containers().await.is_empty());

    let mut simulated = yard.server();
    simulated.gpus = vec![GpuDevice { id: GpuId(0), uuid: "SIM-0".into() }];
    let running = yard.runtime.start(&simulated).await.expect("simulated GPUs need no driver");
    yard.runtime.stop(&running, &stop_spec(1)).await.expect("a stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_not_in_the_image_is_named() {
    let Some(yard) = Yard::open("command").await else { return };
    let spec = yard.spec_with(|docker| {
        docker.entrypoint = Some(vec!["/bin/nope".into()]);
        docker.init = Some(false);
    });
    let fault = yard.runtime.start(&spec).await.expect_err("no such program");
    assert_eq!(fault.kind, FaultKind::CommandMissing, "{}", fault.message);
    assert!(yard.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_comes_with_its_code_and_the_last_log_lines() {
    let Some(yard) = Yard::open("exit").await else { return };
    let spec = yard.spec("sleep 0.3; echo first; echo fatal: no weights >&2; exit 3");
    let running = yard.runtime.start(&spec).await.expect("a start");
    let report = exit_of(&running).await;
    assert_eq!((report.code, report.signal, report.oom_killed), (Some(3), None, false));
    // Already complete when the exit is known. Its two pipes are in no order.
    let log = running.log.last(9);
    assert_eq!(log.len(), 2, "{log:?}");
    assert!(log.iter().any(|line| line == "fatal: no weights"), "{log:?}");
    assert!(!yard.found().await[0].alive);
    yard.runtime.stop(&running, &stop_spec(1)).await.expect("removed");
    assert!(yard.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instant_exit_is_not_missed() {
    let Some(yard) = Yard::open("instant").await else { return };
    for _ in 0..5 {
        let running = yard.runtime.start(&yard.spec("exit 7")).await.expect("a start");
        assert_eq!(exit_of(&running).await.code, Some(7));
    }
    yard.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn running_out_of_host_memory_is_told_apart() {
    let Some(yard) = Yard::open("oom").await else { return };
    let spec = yard.spec_with(|docker| {
        docker.args = vec!["tail".into(), "/dev/zero".into()];
        docker.memory = Some(Bytes::mib(16));
    });
    let running = yard.runtime.start(&spec).await.expect("a start");
    let report = exit_of(&running).await;
    assert!(report.oom_killed, "{report:?}");
    assert!(report.to_string().contains("out of memory"), "{report}");
    yard.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_ignores_its_signal_is_killed_after_the_grace() {
    let Some(yard) = Yard::open("grace").await else { return };
    let spec = yard.spec("trap 'echo not yet' TERM; echo armed; while :; do sleep 0.1; done");
    let running = yard.runtime.start(&spec).await.expect("a start");
    eventually("the trap", async || (running.log.last(1) == ["armed"]).then_some(())).await;
    let begun = Instant::now();
    yard.runtime.stop(&running, &stop_spec(1)).await.expect("a stop");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let report = exit_of(&running).await;
    assert_eq!(report.signal, Some(9), "{report:?}");
    assert!(yard.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_container_can_be_stopped() {
    let Some(yard) = Yard::open("paused").await else { return };
    let running = yard.runtime.start(&yard.server()).await.expect("a start");
    yard.docker.pause_container(&id_of(&running)).await.expect("paused");
    assert!(yard.is_alive(&running).await);
    yard.runtime.stop(&running, &stop_spec(2)).await.expect("a stop");
    assert!(yard.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_our_name_stays_and_a_leftover_goes() {
    let Some(yard) = Yard::open("name").await else { return };
    let spec = yard.server();
    let running = yard.runtime.start(&spec).await.expect("a start");
    let RuntimeHandle::Docker { name, .. } = &running.handle else { panic!("no container") };

    // The same instance again (Wharf was killed in the middle): its own leftover goes.
    let again = yard.runtime.start(&spec).await.expect("the leftover is replaced");
    assert_ne!(id_of(&again), id_of(&running));
    assert_eq!(yard.containers().await, [id_of(&again)]);
    yard.runtime.stop(&again, &stop_spec(1)).await.expect("a stop");
    yard.runtime.cleared().await;

    let body = ContainerCreateBody { image: Some(BUSYBOX.into()), ..Default::default() };
    let options = CreateContainerOptionsBuilder::new().name(name).build();
    let stranger = yard.docker.create_container(Some(options), body).await.expect("a stranger");
    let fault = yard.runtime.start(&spec).await.expect_err("the name is taken");
    assert_eq!(fault.kind, FaultKind::NameConflict, "{}", fault.message);
    assert!(fault.message.contains(name), "{}", fault.message);
    yard.docker.inspect_container(&stranger.id, None).await.expect("the stranger stays");
    yard.remove(&stranger.id).await;
}

async fn named(yard: &Yard, name: &str, policy: RestartPolicyNameEnum, script: &str) -> String {
    let options = CreateContainerOptionsBuilder::new().name(name).build();
    let restart_policy = RestartPolicy { name: Some(policy), maximum_retry_count: None };
    let body = ContainerCreateBody {
        image: Some(BUSYBOX.into()),
        cmd: Some(["sh", "-c", script].map(str::to_owned).into()),
        env: Some(vec!["PATH=/bin".into()]),
        host_config: Some(HostConfig {
            restart_policy: Some(restart_policy),
            init: Some(true),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    };
    yard.docker.create_container(Some(options), body).await.expect("a named container").id
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_container_is_started_and_stopped_but_never_removed() {
    let Some(yard) = Yard::open("named").await else { return };
    let name = format!("coder-{}", std::process::id());
    let script = "echo run; exec busybox httpd -f -p 8000 -h /www";
    let id = named(&yard, &name, RestartPolicyNameEnum::NO, script).await;
    let spec = yard.spec_with(|docker| {
        docker.container = Some(name.clone());
        docker.image = None;
    });
    yard.runtime.preflight(&spec).await.expect("preflight");
    assert!(!yard.runtime.find_named(&name).await.expect("an answer").expect("it").alive);
    for _ in 0..2 {
        let running = yard.runtime.start(&spec).await.expect("a start");
        assert_eq!(id_of(&running), id);
        healthy(&running.endpoint.base).await;
        assert!(yard.runtime.find_named(&name).await.expect("an answer").expect("it").alive);
        let adopted = yard.runtime.adopt_named(&name, spec.identity.clone(), 8000).await;
        let adopted = adopted.expect("an answer").expect("it runs");
        assert_eq!(adopted.endpoint, running.endpoint);
        // Lines of the run before are not repeated.
        eventually("its log", async || (running.log.last(9) == ["run"]).then_some(())).await;
        yard.runtime.stop(&running, &spec.model.stop).await.expect("a stop");
        exit_of(&running).await;
        assert!(!yard.runtime.find_named(&name).await.expect("an answer").expect("it").alive);
    }
    yard.remove(&id).await;
    let fault = yard.runtime.preflight(&spec).await.expect_err("it is gone");
    assert_eq!(fault.kind, FaultKind::BadSpec);
    assert!(fault.message.contains(&name), "{}", fault.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_container_that_docker_restarts_is_refused() {
    let Some(yard) = Yard::open("policy").await else { return };
    let name = format!("always-{}", std::process::id());
    let id = named(&yard, &name, RestartPolicyNameEnum::UNLESS_STOPPED, "sleep 600").await;
    let spec = yard.spec_with(|docker| docker.container = Some(name.clone()));
    let fault = yard.runtime.preflight(&spec).await.expect_err("the policy");
    assert_eq!(fault.kind, FaultKind::BadSpec);
    let fix = format!("docker update --restart=no {name}");
    assert!(fault.message.contains(&fix), "{}", fault.message);
    yard.remove(&id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_are_found_again_after_a_crash() {
    let Some(yard) = Yard::open("adopt").await else { return };
    let (server, dead) = (yard.server(), yard.spec("exit 0"));
    let first = DockerRuntime::new(Some(yard.host.clone()));
    healthy(&first.start(&server).await.expect("a start").endpoint.base).await;
    exit_of(&first.start(&dead).await.expect("a start")).await;
    drop(first);

    let found = yard.found().await;
    assert_eq!(found.len(), 2, "{found:?}");
    let alive: Vec<bool> = found.iter().map(|found| found.alive).collect();
    assert_eq!(alive, [true, false]);
    assert!(found[1].running.exit.borrow().is_some());
    let adopted = &found[0].running;
    assert_eq!(adopted.identity, server.identity);
    healthy(&adopted.endpoint.base).await;
    eventually("its past log", async || {
        adopted.log.last(9).contains(&"listening".to_owned()).then_some(())
    })
    .await;
    let kill = KillContainerOptionsBuilder::new().signal("SIGKILL").build();
    yard.docker.kill_container(&id_of(adopted), Some(kill)).await.expect("killed");
    assert_eq!(exit_of(adopted).await.signal, Some(9));
    for found in yard.found().await {
        yard.runtime.stop(&found.running, &stop_spec(1)).await.expect("reaped");
    }
    assert!(yard.containers().await.is_empty());
}

/// Docker, behind a socket at `dir/held.sock` that keeps back whatever is asked of that container.
fn holding(host: &str, dir: &std::path::Path, id: &str) -> (String, Arc<AtomicBool>) {
    let sockets = (host, &*dir.join("held.sock"));
    interfering(sockets, format!("/containers/{id}"), Interference::HoldBack, true)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_docker_cannot_look_at_hides_no_other() {
    let Some(yard) = Yard::open("held").await else { return };
    if !yard.host.starts_with("unix://") {
        return docker::skipped("held", "no socket to put another one before");
    }
    let stuck = yard.runtime.start(&yard.server()).await.expect("a start");
    let well = yard.runtime.start(&yard.server()).await.expect("a start");
    let gone = yard.runtime.start(&yard.spec("exit 0")).await.expect("a start");
    exit_of(&gone).await;
    let dir = tempfile::tempdir().expect("a folder");
    let (host, held) = holding(&yard.host, dir.path(), &id_of(&stuck));
    let later = DockerRuntime::new(Some(host));

    let ids = [&stuck, &well, &gone].map(id_of);
    let running = later.running_of(&ids).await.expect("a list takes no lock");
    assert_eq!(running, ids[..2].iter().cloned().collect());

    let all = later.find(&yard.installation).await.expect("the containers");
    let found: Vec<String> = all.found.iter().map(|found| id_of(&found.running)).collect();
    assert_eq!(found, ids[1..]);
    let silent: Vec<&str> = all.silent.iter().map(|silent| silent.id.as_str()).collect();
    assert_eq!(silent, [&ids[0]]);

    held.store(false, Ordering::SeqCst);
    let all = later.find(&yard.installation).await.expect("the containers");
    assert_eq!((all.found.len(), all.silent.len()), (3, 0));
    for running in [stuck, well, gone] {
        yard.runtime.stop(&running, &stop_spec(1)).await.expect("a stop");
    }
    assert!(yard.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_grows_is_seen_before_it_ends() {
    let Some(yard) = Yard::open("dots").await else { return };
    let script = "while [ ! -e /tmp/end ]; do printf .; sleep 0.05; done; echo; sleep 600";
    let running = yard.runtime.start(&yard.spec(script)).await.expect("a start");
    let mut unfinished = running.log.unfinished();
    let id = id_of(&running);
    let more = tokio::time::timeout(docker::DEADLINE, async {
        for _ in 0..5 {
            unfinished.changed().await.expect("a sender");
        }
        unfinished.borrow().trim_matches('.').is_empty()
    });
    let only_dots = tokio::select! {
        more = more => more.expect("dots in time"),
        never = yard.runtime.follow_unfinished(&id, &running.log) => match never {},
    };
    assert!(only_dots, "{}", &**unfinished.borrow());
    assert!(running.log.last(9).is_empty(), "Docker itself keeps the line to its end");
    let pid = yard.runtime.pids(&id).await[0];
    std::fs::write(format!("/proc/{pid}/root/tmp/end"), "").expect("its file system");
    eventually("the whole line", async || (!running.log.last(9).is_empty()).then_some(())).await;
    yard.runtime.stop(&running, &stop_spec(1)).await.expect("a stop");
    assert!(yard.containers().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_dropped_leaves_nothing() {
    let Some(yard) = Yard::open("dropped").await else { return };
    // At every stage from "not yet asked" to "already running".
    for millis in [0, 1, 3, 6, 12, 25, 50, 100, 200, 400] {
        let limit = Duration::from_millis(millis);
        if let Ok(Ok(done)) = tokio::time::timeout(limit, yard.runtime.start(&yard.server())).await
        {
            yard.runtime.stop(&done, &stop_spec(1)).await.expect("a stop");
        }
    }
    // What is on its way must have arrived: a start asked for last is done last.
    let last = yard.runtime.start(&yard.server()).await.expect("a start");
    yard.runtime.stop(&last, &stop_spec(1)).await.expect("a stop");
    yard.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_ahead_is_started_if_it_still_fits_and_removed_if_nobody_wants_it() {
    let Some(yard) = Yard::open("ahead").await else { return };
    let spec = yard.server();
    let made = yard.runtime.make(&spec).await.expect("made").expect("a container");
    let ids = yard.containers().await;
    let running = yard.runtime.start_made(&spec, Some(made)).await.expect("a start");
    assert_eq!([id_of(&running)], ids.as_slice(), "the one that was made");
    yard.runtime.stop(&running, &stop_spec(1)).await.expect("a stop");
    assert!(yard.containers().await.is_empty());

    let spec = yard.server();
    let made = yard.runtime.make(&spec).await.expect("made").expect("a container");
    let ids = yard.containers().await;
    let mut changed = spec.clone();
    changed.env.insert("CHANGED".to_owned(), "1".to_owned());
    let running = yard.runtime.start_made(&changed, Some(made)).await.expect("a start");
    assert_ne!([id_of(&running)], ids.as_slice());
    assert_eq!(yard.containers().await, [id_of(&running)], "the other one is gone");
    yard.runtime.stop(&running, &stop_spec(1)).await.expect("a stop");

    // Called off: when it is there, and while it is being made.
    drop(yard.runtime.make(&yard.server()).await.expect("made"));
    for millis in [0, 1, 2, 4, 8, 16] {
        let limit = Duration::from_millis(millis);
        let _ = tokio::time::timeout(limit, yard.runtime.make(&yard.server())).await;
    }
    yard.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_daemon_is_unreachable_everywhere() {
    let runtime = DockerRuntime::new(Some("unix:///nonexistent/docker.sock".into()));
    runtime.connect();
    assert!(!runtime.health().borrow().ok);
    let fault = runtime.find("x").await.expect_err("no daemon");
    assert_eq!(fault.kind, FaultKind::RuntimeUnreachable);
    let health = runtime.health();
    eventually("the reason", async || {
        health.borrow().detail.contains("/nonexistent/docker.sock").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pull_command_tells_what_is_here_and_what_cannot_be_had() {
    let Some(yard) = Yard::open("pull-command").await else { return };
    let registry = docker::registry::serve().await;
    let model = |name: &str, image: String| {
        let spec = yard.spec_with(|docker| {
            docker.image = Some(image);
            docker.pull = PullPolicy::Missing;
        });
        let model = ModelSpec { name: ModelName::new(name), ..(*spec.model).clone() };
        (model.name.clone(), Arc::new(model))
    };
    let catalog = docker::catalog([
        model("here", BUSYBOX.to_owned()),
        model("gated", format!("{registry}/gated/model:1")),
    ]);
    let run = async |models: &[&str], all| {
        let models = models.iter().map(|&model| model.to_owned()).collect();
        pull::run(&pull::Args { models, all }, &catalog, &yard.runtime).await
    };
    assert_eq!(run(&["here"], false).await.expect("a result"), ExitCode::SUCCESS);
    assert_eq!(run(&[], true).await.expect("a result"), ExitCode::FAILURE);
    let unknown = run(&["nowhere"], false).await.expect_err("no such model").to_string();
    assert!(unknown.contains("nowhere") && unknown.contains("gated, here"), "{unknown}");
}
