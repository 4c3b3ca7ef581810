//! What needs a Docker Engine of the test's own: restarts, TCP, GPU hooks; and Wharf in a container.

use wharf::runtime::GpuDevice;
use wharf::runtime::docker::DockerRuntime;
use wharf::scheduler::event::FaultKind;
use wharf::units::GpuId;

use crate::docker::{self, BUSYBOX, OwnDaemon, Yard, eventually, exit_of, healthy, stop_spec};
use crate::{id_of, lifecycle};

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_may_go_away_and_come_back() {
    let test = "live-restore";
    let Some(daemon) = OwnDaemon::start(test, &["--live-restore"]) else { return };
    let yard = Yard::on(&daemon.host, test).await;
    let lasting = yard.runtime.start(&yard.server()).await.expect("a start");
    let script = "while [ ! -e /tmp/end ]; do sleep 0.1; done; exit 5";
    let dying = yard.runtime.start(&yard.spec(script)).await.expect("a start");
    healthy(&lasting.endpoint.base).await;
    let mut health = yard.runtime.health();
    health.wait_for(|health| health.ok).await.expect("healthy");
    let inside = yard.runtime.pids(&id_of(&dying)).await;

    daemon.crash();
    health.wait_for(|health| !health.ok).await.expect("it is seen");
    let fault = yard.runtime.stop(&lasting, &stop_spec(1)).await.expect_err("no daemon");
    assert_eq!(fault.kind, FaultKind::RuntimeUnreachable, "{}", fault.message);
    // One ends while nobody watches.
    std::fs::write(format!("/proc/{}/root/tmp/end", inside[0]), "").expect("its file system");
    eventually("it ended", async || {
        (!std::path::Path::new(&format!("/proc/{}", inside[0])).exists()).then_some(())
    })
    .await;
    assert!(lasting.exit.borrow().is_none() && dying.exit.borrow().is_none());

    daemon.up();
    health.wait_for(|health| health.ok).await.expect("healthy again");
    exit_of(&dying).await;
    assert!(yard.is_alive(&lasting).await);
    assert!(lasting.exit.borrow().is_none());
    healthy(&lasting.endpoint.base).await;
    yard.runtime.stop(&lasting, &stop_spec(2)).await.expect("a stop");
    exit_of(&lasting).await;
    yard.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_that_end_with_the_daemon_are_reported() {
    let test = "restart";
    let port = docker::free_port();
    let address = format!("tcp://127.0.0.1:{port}");
    let Some(daemon) = OwnDaemon::start(test, &["-H", &address]) else { return };
    // Over TCP, on the way.
    let yard = Yard::on(&address, test).await;
    lifecycle(&yard).await;
    let running = yard.runtime.start(&yard.server()).await.expect("a start");
    let mut health = yard.runtime.health();
    health.wait_for(|health| health.ok).await.expect("healthy");
    daemon.down();
    health.wait_for(|health| !health.ok).await.expect("it is seen");
    daemon.up();
    health.wait_for(|health| health.ok).await.expect("healthy again");
    exit_of(&running).await;
    assert!(!yard.is_alive(&running).await);
    yard.clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_with_a_gpu_that_are_not_ours_are_foreign() {
    let test = "foreign";
    let runc = docker::run(std::process::Command::new("sh").args(["-c", "command -v runc || :"]));
    let flag = format!("nvidia={runc}");
    let Some(daemon) = OwnDaemon::start(test, &["--add-runtime", &flag]) else { return };
    let yard = Yard::on(&daemon.host, test).await;
    let ours = yard.spec_with(|docker| {
        docker.runtime = Some("nvidia".into());
        docker.args = vec!["sleep".into(), "600".into()];
    });
    yard.runtime.preflight(&ours).await.expect("the runtime is known");
    yard.runtime.start(&ours).await.expect("a start");
    assert!(yard.runtime.foreign(&yard.installation).await.is_empty());
    // Seen by another installation, it is a stranger's.
    let other = DockerRuntime::new(Some(daemon.host.clone()));
    let foreign = other.foreign("another").await;
    assert_eq!(foreign.len(), 1, "{foreign:?}");
    assert_eq!(foreign[0].image, BUSYBOX);
    assert!(!foreign[0].pids.is_empty());
    yard.clean().await;
}

/// A Docker that believes to have an NVIDIA toolkit: its hook does nothing, and says which GPUs
/// Docker asked for.
#[tokio::test(flavor = "multi_thread")]
async fn gpus_are_given_by_uuid() {
    let test = "gpu-uuid";
    let daemon = OwnDaemon::start_with(test, &[], |dir| {
        let programs = dir.join("bin");
        std::fs::create_dir(&programs).expect("a folder");
        let hook = programs.join("nvidia-container-runtime-hook");
        std::fs::write(&hook, "#!/bin/sh\nexit 0\n").expect("the hook");
        docker::run(std::process::Command::new("chmod").arg("755").arg(&hook));
        if docker::engine_major() >= 25 {
            docker::write_cdi(dir);
        }
        programs.display().to_string()
    });
    let Some(daemon) = daemon else { return };
    let yard = Yard::on(&daemon.host, test).await;
    let uuids = ["GPU-aaaa", "GPU-bbbb"];
    let ways = if docker::engine_major() >= 25 { &[false, true][..] } else { &[false] };
    for &cdi in ways {
        let mut spec = yard.spec_with(|docker| {
            let script = "echo gpus=$NVIDIA_VISIBLE_DEVICES$CDI; sleep 600";
            docker.args = ["sh", "-c", script].map(str::to_owned).into();
            docker.cdi = cdi;
        });
        let device = |index| GpuDevice { id: GpuId(index), uuid: uuids[usize::from(index)].into() };
        spec.gpus = vec![device(0), device(1)];
        let running = yard.runtime.start(&spec).await.expect("a start");
        eventually("the GPUs", async || {
            let line = running.log.last(1).pop()?;
            let expected = if cdi { "gpus=GPU-bbbb" } else { "gpus=GPU-aaaa,GPU-bbbb" };
            (line == expected).then_some(())
        })
        .await;
        let other = DockerRuntime::new(Some(daemon.host.clone()));
        assert_eq!(other.foreign("another").await.len(), 1);
        yard.runtime.stop(&running, &stop_spec(1)).await.expect("a stop");
    }
}

/// This test program runs again inside a container, on a network of its own.
const INSIDE: &str = "WHARF_TEST_INSIDE";

#[tokio::test(flavor = "multi_thread")]
async fn in_a_container_instances_are_reached_over_its_network() {
    let test = "inside";
    if let Ok(host) = std::env::var(INSIDE) {
        return inside(&host).await;
    }
    let Some(yard) = Yard::open(test).await else { return };
    let Some(socket) = yard.host.strip_prefix("unix://") else {
        return docker::skipped(test, "needs a Docker Engine on a unix socket");
    };
    let image = "wharf-test/self:1";
    let program = std::env::current_exe().expect("this program");
    docker::run(
        std::process::Command::new(docker::support("image.sh"))
            .args([&yard.host, image])
            .arg(&program),
    );
    let network = format!("whnet-{}", std::process::id());
    let cli = |args: &[&str]| {
        docker::run(std::process::Command::new("docker").args(["-H", &yard.host]).args(args))
    };
    cli(&["network", "create", &network]);
    let variable = format!("{INSIDE}=unix:///docker.sock");
    let volume = format!("{socket}:/docker.sock");
    let name = "own_daemon::in_a_container_instances_are_reached_over_its_network";
    let arguments = ["run", "--rm", "--network", &network, "-v", &volume, "-e", &variable, image];
    let output = std::process::Command::new("docker")
        .args(["-H", &yard.host])
        .args(arguments)
        .args(["--exact", name, "--nocapture"])
        .output()
        .expect("docker");
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    cli(&["network", "rm", &network]);
    assert!(output.status.success() && said.contains("reached over"), "{said}");
}

async fn inside(host: &str) {
    let yard = Yard::on(host, "inside").await;
    let spec = yard.server();
    let running = yard.runtime.start(&spec).await.expect("a start");
    let base = &running.endpoint.base;
    assert!(base.ends_with(":8000") && !base.contains("127.0.0.1"), "{base}");
    healthy(base).await;
    println!("reached over {base}");
    assert_eq!(yard.found().await[0].running.endpoint, running.endpoint);
    yard.runtime.stop(&running, &stop_spec(2)).await.expect("a stop");
    assert!(yard.containers().await.is_empty());
}
