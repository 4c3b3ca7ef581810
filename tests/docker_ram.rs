//! Host RAM of containers is learned: from their cgroup where it is to be seen, else from the
//! Docker API.
//!
//! Needs WHARF_TEST_DOCKER; the test command sets it.

#[path = "support/containers.rs"]
mod containers;
#[expect(dead_code, reason = "used in part")]
mod docker;
mod support;

use std::time::{Duration, Instant};

use containers::{Daemon, STANDIN, Scene, model, standin_args};
use hyper::Method;
use serde_json::json;

const MIB: u64 = 1 << 20;
const TAKEN: u64 = 300 * MIB;

fn with_host_ram(name: &str, flags: &str) -> String {
    let docker = json!({
        "image": STANDIN, "pull": "never", "args": standin_args(name, flags),
    });
    model(name, &json!({ "engine": "openai", "gpus": 0, "docker": docker }))
}

/// What the daemon says itself that the container takes: "312.4MiB / 15.6GiB".
fn told_by_docker(scene: &Scene, container: &str) -> f64 {
    let text =
        scene.daemon.docker(&["stats", "--no-stream", "--format", "{{.MemUsage}}", container]);
    let used = text.split('/').next().map(str::trim).expect("a figure");
    let (mib, factor) = used
        .strip_suffix("MiB")
        .map(|number| (number, 1.0))
        .or_else(|| Some((used.strip_suffix("GiB")?, 1024.0)))
        .unwrap_or_else(|| panic!("docker stats says {text:?}"));
    mib.parse::<f64>().expect("a number") * factor
}

/// Nobody declares anything: what the container was seen to take is promised, and keeps another
/// container out.
async fn is_learned(daemon: &Daemon) {
    let settings = format!(
        "docker: {{ host: \"{}\" }}\ngpu: {{ provider: none }}\n\
         ram: {{ total: 1GiB, reserve: 256MiB }}\nswap: {{ min_residency: 100ms, on_exit: stop }}",
        daemon.host
    );
    let models = with_host_ram("ada", "--host-ram 300MiB") + &with_host_ram("bob", "");
    let scene = Scene::open(daemon, &settings, &models, &[]).await;
    for name in ["ada", "bob"] {
        scene.answers(name).await;
    }
    let talk = &scene.world.server.talk;
    let end = Instant::now() + Duration::from_secs(60);
    let promised = loop {
        let gpus = talk.get("/gpus").await.expect("an answer");
        let promised = gpus["host_memory"]["promised_bytes"].as_u64().expect("bytes");
        if promised >= TAKEN {
            break promised;
        }
        assert!(Instant::now() < end, "{gpus:#}\n{}", scene.world.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let asked = json!({ "model": "ada" });
    let (_, plan) = talk.call(Method::POST, "/plan", asked).await.expect("a plan");
    let peak = plan["host_ram"]["peak_bytes"].as_u64().expect("a peak");
    let told: Vec<f64> = scene.containers().iter().map(|id| told_by_docker(&scene, id)).collect();
    let most = told.iter().copied().fold(0.0, f64::max);
    eprintln!(
        "{}: peak {} MiB, promised {} MiB, docker stats {told:?} MiB",
        daemon.host,
        peak / MIB,
        promised / MIB
    );
    assert!((TAKEN..TAKEN + 200 * MIB).contains(&peak), "{plan:#}");
    let difference = (peak as f64 / MIB as f64 - most).abs();
    assert!(difference < 30.0, "learned {} MiB, docker says {most} MiB", peak / MIB);
    scene.stop().await;
}

#[tokio::test]
async fn from_the_cgroup_or_the_daemon() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "host RAM of containers") else { return };
    is_learned(daemon.with_standin()).await;
}

/// Its cgroups are where Wharf does not look: the daemon is asked.
#[tokio::test]
async fn from_the_daemon_where_the_cgroup_is_elsewhere() {
    let flags = ["--cgroup-parent", "/wharf-test-ram"];
    let Some(own) = docker::OwnDaemon::start("ram", &flags) else { return };
    let daemon = Daemon { host: own.host.clone() };
    is_learned(daemon.with_standin()).await;
}
