//! What goes wrong with containers: each failure has its own clear message for the client, in the
//! log and in `/swaps/{id}`, and the other models go on serving.

#[path = "support/containers.rs"]
mod containers;
#[expect(dead_code, reason = "used in part")]
mod docker;
mod support;

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use containers::{BUSYBOX, Daemon, STANDIN, Scene, model, settings, standin, standin_args};
use docker::OwnDaemon;
use serde_json::{Value, json};

/// A small model of the generic engine; `more` are keys of the model itself.
fn broken(name: &str, docker: &Value, more: &Value) -> String {
    let mut spec = json!({ "engine": "openai", "vram": "1GiB", "docker": docker });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    model(name, &spec)
}

fn standin_spec(name: &str, flags: &str) -> Value {
    json!({ "image": STANDIN, "pull": "never", "args": standin_args(name, flags) })
}

async fn scene(daemon: &Daemon, models: &str) -> Scene {
    let models = standin("fine", "5GiB", "--load 100ms") + models;
    let scene = Scene::open(daemon, &settings(daemon, "on_exit: stop"), &models, &[]).await;
    scene.answers("fine").await;
    scene
}

/// Only the one that serves is left, and was never disturbed.
async fn only_fine_is_left(scene: Scene) {
    scene.answers("fine").await;
    // Failed starts leave nothing.
    scene.settles_at(1).await;
    scene.started_once("fine").await;
    scene.stop().await;
}

#[tokio::test]
async fn what_cannot_even_be_created_is_named() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "Docker faults") else { return };
    let nope = format!("wharf-nope-{}", std::process::id());
    let always = format!("wharf-always-{}", std::process::id());
    daemon.with_standin().docker(&["create", "--name", &always, "--restart", "always", STANDIN]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let none = json!({});
    let models = [
        broken("never", &json!({ "image": "wharf-test/none:1", "pull": "never" }), &none),
        broken("missing", &json!({ "image": "127.0.0.1:1/org/none:1", "pull": "missing" }), &none),
        broken("taken", &standin_spec("taken", ""), &json!({ "port": port })),
        broken(
            "command",
            &json!({ "image": STANDIN, "pull": "never", "entrypoint": ["/bin/nope"], "init": false }),
            &none,
        ),
        broken("runtime", &json!({ "image": STANDIN, "pull": "never", "runtime": "nope" }), &none),
        broken("unmade", &json!({ "container": nope, "port": 8000 }), &none),
        broken("always", &json!({ "container": always, "port": 8000 }), &none),
    ];
    let scene = scene(&daemon, &models.concat()).await;
    let update = format!("docker update --restart=no {always}");
    scene.fails("never", "image_missing", &["wharf-test/none:1", "pull: never"]).await;
    scene.fails("missing", "fetch_failed", &["cannot reach registry 127.0.0.1:1"]).await;
    scene.fails("taken", "port_taken", &[&format!("port {port}"), "taken"]).await;
    scene.fails("command", "command_missing", &["/bin/nope", "entrypoint"]).await;
    scene.fails("runtime", "bad_spec", &["no runtime `nope`"]).await;
    scene.fails("unmade", "bad_spec", &[&format!("no container `{nope}`")]).await;
    scene.fails("always", "bad_spec", &[&update]).await;
    daemon.docker(&["rm", "-f", &always]);
    only_fine_is_left(scene).await;
}

#[tokio::test]
async fn what_fails_while_it_loads_is_named_and_cleared_away() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "Docker start faults") else { return };
    daemon.with_standin().with_busybox();
    // Docker keeps no order between the two pipes of a container.
    let fatal = json!({
        "image": BUSYBOX, "pull": "never",
        "args": ["sh", "-c", "exec >&2; echo reading weights; echo weights are cut off; exit 3"],
    });
    let greedy = json!({
        "image": BUSYBOX, "pull": "never", "args": ["tail", "/dev/zero"], "memory": "16MiB",
    });
    let wrong = standin_spec("wrong", "--wrong-health");
    let models = [
        broken("fatal", &fatal, &json!({})),
        broken("greedy", &greedy, &json!({})),
        broken("wrong", &wrong, &json!({ "start_timeout": "15s", "health": "/health" })),
        broken(
            "silent",
            &standin_spec("silent", "--hang-load --load 1s"),
            &json!({ "health": { "stall": "2s" } }),
        ),
    ];
    let scene = scene(&daemon, &models.concat()).await;
    let body = scene.fails("fatal", "exited", &["code 3", "weights are cut off"]).await;
    assert_eq!(body["cause"]["log"], json!(["reading weights", "weights are cut off"]));
    // It backs off: the second request is told the same, without another start.
    let (status, again) = scene.ask("fatal").await;
    assert_eq!((status, &again["cause"]["kind"]), (503, &json!("exited")), "{again:#}");
    scene.started_once("fatal").await;
    scene.fails("greedy", "out_of_memory", &["out of memory (host RAM)", "more memory"]).await;
    scene.fails("wrong", "never_healthy", &["/health", "never with 200"]).await;
    scene.fails("silent", "stalled", &["stalled", "2s"]).await;
    only_fine_is_left(scene).await;
}

/// GPUs by a library that says what a file tells it to; Docker, without NVIDIA's toolkit, has none.
#[tokio::test]
async fn a_missing_gpu_driver_is_named() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "no GPU in Docker") else { return };
    let dir = tempfile::tempdir().unwrap();
    let (library, state) = (dir.path().join("libnvidia-ml.so.1"), dir.path().join("state"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/fake_nvml.c");
    let mut cc = Command::new("cc");
    match cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status() {
        Ok(status) => assert!(status.success(), "fake_nvml.c does not compile"),
        Err(error) => return support::skip(&format!("no GPU in Docker: no C compiler ({error})")),
    }
    std::fs::write(&state, "count 1\ngpu 0 total 24576\n").unwrap();
    let env = [
        ("WHARF_NVML_LIBRARY", library.to_str().unwrap()),
        ("FAKE_NVML_STATE", state.to_str().unwrap()),
    ];
    let daemon = daemon.with_standin();
    let on_cpu = json!({
        "engine": "openai", "gpus": 0, "docker": standin_spec("fine", "--load 100ms"),
    });
    let models = model("fine", &on_cpu)
        + &broken("gpu", &standin_spec("gpu", ""), &json!({}))
        + &broken("cdi", &json!({ "image": STANDIN, "pull": "never", "cdi": true }), &json!({}));
    let settings = format!(
        "docker: {{ host: \"{}\" }}\ngpu: {{ provider: nvml }}\nswap: {{ on_exit: stop }}",
        daemon.host
    );
    let scene = Scene::open(daemon, &settings, &models, &env).await;
    scene.answers("fine").await;
    for name in ["gpu", "cdi"] {
        scene.fails(name, "gpu_driver_missing", &["NVIDIA Container Toolkit", "gpus: 0"]).await;
    }
    only_fine_is_left(scene).await;
}

#[tokio::test]
async fn a_container_killed_while_it_serves_ends_its_streams_and_comes_back() {
    let Some(daemon) = Daemon::given("WHARF_TEST_DOCKER", "killed in Docker") else { return };
    let slow = standin("ada", "5GiB", "--load 100ms --tokens-per-second 2 --reply-tokens 16");
    let scene = scene(daemon.with_standin(), &slow).await;
    let talk = scene.world.server.talk.clone();
    let stream = tokio::spawn(async move { talk.chat("ada", true, &[]).await });
    scene.world.until("a stream runs", |status| status["models"]["ada"]["in_flight"] == 1).await;
    let label = "label=wharf.model=ada";
    let ours = format!("label=wharf.installation={}", scene.world.installation());
    let id = scene.daemon.docker(&["ps", "-q", "--filter", label, "--filter", &ours]);
    scene.daemon.docker(&["kill", &id]);
    let cut = stream.await.unwrap().unwrap();
    assert!(!cut.done, "no [DONE] for half an answer: {cut:?}");
    assert!(cut.text.contains("ada"), "the error names the model: {cut:?}");
    eprintln!("ada, killed: {}", cut.text);
    scene.answers("fine").await;
    scene
        .world
        .until("the death is seen", |status| status["models"]["ada"]["state"] != "ready")
        .await;
    let log = scene.world.log();
    assert!(log.contains("ended by signal 9"), "{log}");
    let restarted = scene.world.server.talk.chat("ada", false, &[]).await.unwrap();
    assert!(restarted.is_from("ada"), "{restarted:?}\n{}", scene.world.log());
    scene.started_once("fine").await;
    scene.stop().await;
}

/// A model in Docker, and one that runs as a process beside it.
async fn half_in_docker(daemon: &Daemon) -> Scene {
    let models = standin("ada", "5GiB", "--load 100ms")
        + &standin("bob", "5GiB", "--load 100ms")
        + &support::standin("pro", "5GiB", "--load 100ms");
    let settings = settings(daemon, "on_exit: stop") + "\nqueue: { timeout: 60s }";
    let scene = Scene::open(daemon, &settings, &models, &[]).await;
    scene.answers("ada").await;
    scene
}

async fn docker_is(scene: &Scene, wanted: &str) -> Value {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let health = scene.world.server.talk.get("/health").await.expect("an answer");
        if health["docker"]["status"] == wanted {
            return health;
        }
        assert!(Instant::now() < end, "Docker never was {wanted}\n{}", scene.world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn docker_may_stop_and_come_back() {
    let Some(own) = OwnDaemon::start("stopped", &[]) else { return };
    let daemon = Daemon { host: own.host.clone() };
    let scene = half_in_docker(daemon.with_standin()).await;
    own.down();
    let health = docker_is(&scene, "failed").await;
    assert!(health["docker"]["detail"].as_str().unwrap().contains("Docker"), "{health:#}");
    // The process serves; what needs Docker is refused with the reason.
    scene.answers("pro").await;
    scene.fails("bob", "runtime_unreachable", &["Docker", &daemon.host]).await;
    // Its container may still run: a request for it waits for Docker, but not for long.
    let (status, body) = scene.ask("ada").await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("runtime_lost")), "{body:#}");
    assert_eq!(body["cause"]["kind"], "runtime_unreachable", "{body:#}");
    let message = body["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("Docker"), "{body:#}");
    eprintln!("ada, Docker stopped: {message}");
    own.up();
    docker_is(&scene, "ok").await;
    // Its container ended with the daemon; it is started anew.
    scene.until_answers("ada").await;
    scene.answers("pro").await;
    scene.settles_at(1).await;
    scene.stop().await;
}

#[tokio::test]
async fn a_named_container_whose_docker_is_away_at_the_start_is_adopted_when_it_is_back() {
    let Some(own) = OwnDaemon::start("named", &["--live-restore"]) else { return };
    let daemon = Daemon { host: own.host.clone() };
    let publish = format!("127.0.0.1:{}:8000", support::ports::free_port());
    let mut args = vec!["run", "-d", "--init", "--name", "coder", "-p", &publish, STANDIN];
    let engine = standin_args("ada", "");
    args.extend(engine.iter().map(String::as_str));
    daemon.with_standin().docker(&args);
    let began = || daemon.docker(&["inspect", "--format", "{{.State.StartedAt}}", "coder"]);
    let before = began();
    own.crash();
    let docker = json!({ "container": "coder", "port": 8000 });
    let models = model("ada", &json!({ "engine": "openai", "vram": "1GiB", "docker": docker }))
        + &support::standin("pro", "5GiB", "--load 100ms");
    let scene = Scene::open(&daemon, &settings(&daemon, "on_exit: stop"), &models, &[]).await;
    scene.fails("ada", "runtime_unreachable", &["Docker", &daemon.host]).await;
    scene.answers("pro").await;
    own.up();
    docker_is(&scene, "ok").await;
    scene.until_answers("ada").await;
    assert_eq!(began(), before, "as it ran: {}", scene.world.log());
    scene.world.server.stop().await.unwrap();
    assert_eq!(daemon.docker(&["inspect", "--format", "{{.State.Running}}", "coder"]), "false");
}

#[tokio::test]
async fn containers_that_outlive_a_crash_of_docker_serve_on() {
    let Some(own) = OwnDaemon::start("crash", &["--live-restore"]) else { return };
    let daemon = Daemon { host: own.host.clone() };
    let scene = half_in_docker(daemon.with_standin()).await;
    let before = scene.containers();
    own.crash();
    docker_is(&scene, "failed").await;
    scene.answers("pro").await;
    own.up();
    docker_is(&scene, "ok").await;
    scene.until_answers("ada").await;
    assert_eq!(scene.containers(), before, "the same container: {}", scene.world.log());
    scene.stop().await;
}
