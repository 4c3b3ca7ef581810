//! `kill -9` of Wharf with containers at bad moments, `on_exit`, and containers that somebody else
//! made: what is healthy is adopted without a reload, the rest is reaped, strangers stay.

#[path = "support/containers.rs"]
mod containers;
#[path = "support/socket.rs"]
#[expect(dead_code, reason = "used in part")]
mod socket;
mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use containers::{Daemon, STANDIN, Scene, model, settings, standin, standin_args};
use serde_json::{Value, json};
use socket::{Interference, interfering};

fn given() -> Option<Daemon> {
    let daemon = Daemon::given("WHARF_TEST_DOCKER", "recovery in Docker")?;
    daemon.with_standin();
    Some(daemon)
}

/// Room for one of the two.
async fn scene(daemon: &Daemon, on_exit: &str) -> Scene {
    scene_with(daemon, on_exit, "--load 600ms").await
}

async fn scene_with(daemon: &Daemon, on_exit: &str, ada: &str) -> Scene {
    let models =
        standin("ada", "14GiB", ada) + &standin("bob", "14GiB", "--load 600ms --shutdown fixed:2s");
    let swap = format!("on_exit: {on_exit}");
    Scene::open(daemon, &settings(daemon, &swap), &models, &[]).await
}

/// A background request whose fate does not matter.
fn ask(scene: &Scene, model: &'static str) -> tokio::task::JoinHandle<()> {
    let talk = scene.world.server.talk.clone();
    tokio::spawn(async move {
        let _ = talk.chat(model, false, &[]).await;
    })
}

fn in_phase(phase: &'static str) -> impl Fn(&Value) -> bool {
    move |status| status["swaps"][0]["phase"] == phase
}

/// A container of nobody's, with the labels of another installation.
struct Stranger<'a> {
    daemon: &'a Daemon,
    id: String,
}

impl<'a> Stranger<'a> {
    fn run(daemon: &'a Daemon) -> Stranger<'a> {
        let labels =
            ["installation=another", "instance=1", "model=ada", "spec=0", "gpus=", "port=1"];
        let labels: Vec<String> = labels.map(|label| format!("--label=wharf.{label}")).into();
        let mut args = vec!["run", "-d", "--label=wharf.container_port=8000"];
        args.extend(labels.iter().map(String::as_str));
        args.extend([STANDIN, "engine", "--name", "stranger"]);
        Stranger { daemon, id: daemon.docker(&args) }
    }

    fn lives(&self) -> bool {
        self.daemon.docker(&["inspect", "--format", "{{.State.Running}}", &self.id]) == "true"
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        let _ = self.daemon.try_docker(&["rm", "-f", &self.id]);
    }
}

#[tokio::test]
async fn a_running_container_is_adopted_without_a_reload_and_a_stranger_is_left_alone() {
    let Some(daemon) = given() else { return };
    let stranger = Stranger::run(&daemon);
    let mut scene = scene(&daemon, "stop").await;
    scene.answers("ada").await;
    let before = scene.containers();
    scene.world.server.kill_and_restart().await.unwrap();
    assert_eq!(scene.world.state_of("ada").await, "ready", "{}", scene.world.log());
    scene.answers("ada").await;
    assert_eq!(scene.containers(), before, "the very same container");
    scene.started_once("ada").await;
    assert!(scene.world.swaps().await.iter().all(|swap| swap["id"] == "s1"), "no load was needed");
    // An adopted engine is as good as any: it can be swapped out.
    scene.answers("bob").await;
    scene.settles_at(1).await;
    assert!(stranger.lives());
    scene.stop().await;
    assert!(stranger.lives());
}

#[tokio::test]
async fn killed_in_the_middle_of_a_start_at_most_one_container_is_left() {
    let Some(daemon) = given() else { return };
    let mut scene = scene_with(&daemon, "stop", "--load 3s").await;
    let asked = ask(&scene, "ada");
    scene.world.until("ada starts", in_phase("start")).await;
    scene.world.server.kill().unwrap();
    asked.abort();
    scene.world.server.restart().await.unwrap();
    scene.answers("ada").await;
    // Docker may have carried out a start that nobody waited for any more.
    scene.settles_at(1).await;
    scene.answers("bob").await;
    scene.settles_at(1).await;
    scene.stop().await;
}

#[tokio::test]
async fn killed_in_the_middle_of_a_stop_nothing_is_left_behind() {
    let Some(daemon) = given() else { return };
    let mut scene = scene(&daemon, "stop").await;
    scene.answers("bob").await;
    let asked = ask(&scene, "ada");
    scene.world.until("bob stops", in_phase("vacate")).await;
    scene.world.server.kill().unwrap();
    asked.abort();
    scene.world.server.restart().await.unwrap();
    scene.answers("ada").await;
    scene.world.until("bob is gone", |status| status["models"]["bob"]["state"] == "stopped").await;
    scene.settles_at(1).await;
    scene.stop().await;
}

#[tokio::test]
async fn a_container_whose_configuration_changed_is_not_adopted() {
    let Some(daemon) = given() else { return };
    let mut scene = scene(&daemon, "stop").await;
    scene.answers("ada").await;
    let before = scene.containers();
    scene.world.server.kill().unwrap();
    let path = scene.world.dir.path().join("models.yaml");
    let yaml = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, yaml.replace("600ms", "200ms")).unwrap();
    scene.world.server.restart().await.unwrap();
    scene.settles_at(0).await;
    scene.answers("ada").await;
    assert_ne!(scene.containers(), before);
    scene.stop().await;
}

#[tokio::test]
async fn a_reload_may_bring_the_first_model_that_runs_in_docker() {
    let Some(daemon) = given() else { return };
    let process = support::standin("eve", "1GiB", "--load 100ms");
    let scene = Scene::open(&daemon, &settings(&daemon, "on_exit: stop"), &process, &[]).await;
    let health = scene.world.server.talk.get("/health").await.unwrap();
    assert_eq!(health["docker"]["status"], "unused", "{health:#}");
    let path = scene.world.dir.path().join("models.yaml");
    let yaml = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, yaml + &standin("ada", "14GiB", "--load 100ms")).unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(scene.world.server.pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    scene.world.until("ada is there", |status| status["models"]["ada"].is_object()).await;
    scene.answers("ada").await;
    scene.answers("eve").await;
    assert_eq!(scene.containers().len(), 1);
    let health = scene.world.server.talk.get("/health").await.unwrap();
    assert_eq!(health["docker"]["status"], "ok", "{health:#}");
    scene.stop().await;
}

#[tokio::test]
async fn containers_of_models_that_left_docker_are_reaped_all_the_same() {
    let Some(daemon) = given() else { return };
    let mut scene = scene(&daemon, "stop").await;
    scene.answers("ada").await;
    assert_eq!(scene.containers().len(), 1);
    scene.world.server.kill().unwrap();
    let path = scene.world.dir.path().join("models.yaml");
    let yaml = std::fs::read_to_string(&path).unwrap();
    let (settings, _) = yaml.split_once("models:").unwrap();
    let process = support::standin("eve", "1GiB", "--load 100ms");
    std::fs::write(&path, format!("{settings}models:\n{process}")).unwrap();
    scene.world.server.restart().await.unwrap();
    scene.settles_at(0).await;
    scene.answers("eve").await;
    // Nothing is left there: the next start does not even ask Docker.
    scene.world.server.kill_and_restart().await.unwrap();
    scene.world.server.kill_and_restart().await.unwrap();
    let health = scene.world.server.talk.get("/health").await.unwrap();
    assert_eq!(health["docker"]["detail"], "no model runs in Docker", "{health:#}");
    scene.stop().await;
}

/// Docker, behind a socket that breaks off whatever contains `/kill` while it is told to.
fn deaf_to_kill(daemon: &Daemon, dir: &Path) -> (Daemon, Arc<AtomicBool>) {
    let sockets = (daemon.host.as_str(), &*dir.join("deaf.sock"));
    let (host, deaf) = interfering(sockets, "/kill".to_owned(), Interference::BreakOff, false);
    (Daemon { host }, deaf)
}

#[tokio::test]
async fn what_cannot_be_reaped_is_shown_and_tried_again_until_it_is_gone() {
    let Some(daemon) = given().filter(|daemon| daemon.host.starts_with("unix://")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (proxied, deaf) = deaf_to_kill(&daemon, dir.path());
    let models = standin("ada", "14GiB", "--load 600ms") + &support::standin("eve", "1GiB", "");
    let settings = settings(&proxied, "on_exit: stop");
    let mut scene = Scene::open(&daemon, &settings, &models, &[]).await;
    scene.answers("ada").await;
    scene.world.server.kill().unwrap();
    let path = scene.world.dir.path().join("models.yaml");
    let yaml = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, yaml.replace("600ms", "200ms")).unwrap();
    deaf.store(true, Ordering::SeqCst);
    scene.world.server.restart().await.unwrap();
    let left = |status: &Value| status["leftovers"].as_array().map_or(0, Vec::len);
    let status = scene.world.until("the leftover shows", |status| left(status) == 1).await;
    let shown = &status["leftovers"][0];
    assert_eq!(shown["model"], "ada", "{shown:#}");
    assert!(shown["what"].as_str().unwrap().starts_with("container "), "{shown:#}");
    assert!(shown["message"].as_str().unwrap().contains("Docker"), "{shown:#}");
    // Its first session with Docker may begin a moment later.
    scene.world.until("Docker is there", |status| status["status"] == "healthy").await;
    let health = scene.world.server.talk.get("/health").await.unwrap();
    assert_eq!(health["orchestrator"]["status"], "degraded", "{health:#}");
    assert_eq!(health["status"], "healthy", "it serves: {health:#}");
    let told = Command::new(support::EXE)
        .args(["status", "--url", &scene.world.server.talk.orchestrator])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("leftover container"), "{told}");
    scene.answers("eve").await;
    deaf.store(false, Ordering::SeqCst);
    scene.world.until("the leftover is gone", |status| left(status) == 0).await;
    scene.settles_at(0).await;
    scene.answers("ada").await;
    scene.stop().await;
}

#[tokio::test]
async fn on_exit_keep_leaves_containers_to_be_adopted() {
    let Some(daemon) = given() else { return };
    let mut scene = scene(&daemon, "keep").await;
    scene.answers("ada").await;
    let before = scene.containers();
    scene.terminate().await;
    assert_eq!(scene.containers(), before);
    scene.world.server.restart().await.unwrap();
    scene.answers("ada").await;
    assert_eq!(scene.containers(), before, "{}", scene.world.log());
    scene.started_once("ada").await;
    // What is kept here goes with the scene.
}

/// As a stand-in for vLLM: it is given a key.
fn keyed(name: &str) -> String {
    let args = standin_args(name, "--load 300ms --style vllm");
    let docker = json!({ "image": STANDIN, "pull": "never", "args": args, "port": 8000 });
    model(name, &json!({ "engine": "vllm", "vram": "14GiB", "docker": docker }))
}

#[tokio::test]
async fn the_key_of_an_engine_is_read_back_from_its_container() {
    let Some(daemon) = given() else { return };
    let settings = settings(&daemon, "on_exit: stop");
    let mut scene = Scene::open(&daemon, &settings, &keyed("ada"), &[]).await;
    scene.answers("ada").await;
    let id = scene.containers().remove(0);
    let inspect = |what: &str| daemon.docker(&["inspect", "--format", what, &id]);
    let env = inspect("{{range .Config.Env}}{{println .}}{{end}}");
    let key = env.lines().find_map(|entry| entry.strip_prefix("VLLM_API_KEY=")).unwrap();
    assert_eq!(key.len(), 48, "{env}");
    assert!(!inspect("{{.Args}} {{.Config.Labels}}").contains(key));
    assert_eq!(straight(&scene, None).await, 401);
    assert_eq!(straight(&scene, Some(key)).await, 200);
    scene.world.server.kill_and_restart().await.unwrap();
    scene.answers("ada").await;
    assert_eq!(scene.containers(), [id.as_str()], "adopted");
    assert!(!scene.world.log().contains(key));
    scene.stop().await;
}

/// Asks the engine of ada itself, past Wharf.
async fn straight(scene: &Scene, key: Option<&str>) -> u16 {
    let model = scene.world.server.talk.get("/models/ada").await.expect("a row");
    let endpoint = model["engine_endpoint"].as_str().expect("an endpoint");
    support::status_of(endpoint, "/v1/models", key).await
}

#[tokio::test]
async fn on_exit_stop_leaves_none() {
    let Some(daemon) = given() else { return };
    let mut scene = scene(&daemon, "stop").await;
    scene.answers("ada").await;
    scene.terminate().await;
    assert!(scene.containers().is_empty());
}

/// As compose makes it: created, not started, publishing its own port.
struct Named<'a> {
    daemon: &'a Daemon,
    name: String,
}

impl<'a> Named<'a> {
    fn create(daemon: &'a Daemon, name: &str, more: &[&str]) -> Named<'a> {
        let name = format!("wharf-{name}-{}", std::process::id());
        let publish = format!("127.0.0.1:{}:8000", support::ports::free_port());
        let mut args = vec!["create", "--init", "--name", &name, "-p", &publish];
        args.extend(more);
        args.push(STANDIN);
        let engine = standin_args("ada", "--load 300ms");
        args.extend(engine.iter().map(String::as_str));
        daemon.docker(&args);
        Named { daemon, name }
    }

    fn inspect(&self, what: &str) -> String {
        self.daemon.docker(&["inspect", "--format", what, &self.name])
    }

    fn runs(&self) -> bool {
        self.inspect("{{.State.Running}}") == "true"
    }
}

impl Drop for Named<'_> {
    fn drop(&mut self) {
        let _ = self.daemon.try_docker(&["rm", "-f", &self.name]);
    }
}

#[tokio::test]
async fn a_container_that_compose_made_is_started_stopped_and_adopted_but_never_removed() {
    let Some(daemon) = given() else { return };
    let named = Named::create(&daemon, "named", &["-e", "VLLM_API_KEY=from-compose"]);
    let docker = json!({ "container": named.name, "port": 8000 });
    let models = model("ada", &json!({ "engine": "vllm", "vram": "14GiB", "docker": docker }))
        + &standin("bob", "14GiB", "--load 200ms");
    let mut scene = Scene::open(&daemon, &settings(&daemon, "on_exit: stop"), &models, &[]).await;
    assert!(!named.runs());
    scene.answers("ada").await;
    assert!(named.runs());
    scene.answers("bob").await;
    assert!(!named.runs(), "stopped for bob, still there");
    scene.answers("ada").await;
    let began = named.inspect("{{.State.StartedAt}}");
    scene.world.server.kill_and_restart().await.unwrap();
    assert_eq!(scene.world.state_of("ada").await, "ready", "{}", scene.world.log());
    scene.answers("ada").await;
    assert_eq!(named.inspect("{{.State.StartedAt}}"), began, "adopted as it ran");
    scene.answers("bob").await;
    assert!(!named.runs());
    scene.stop().await;
    assert!(!named.runs(), "stopped with Wharf, never removed");
}

#[tokio::test]
async fn a_named_container_that_runs_and_does_not_answer_is_stopped_and_serves_when_asked_for() {
    let Some(daemon) = given() else { return };
    let named = Named::create(&daemon, "loading", &[]);
    // As good as an engine that loads for long.
    let start_by_hand = || {
        daemon.docker(&["start", &named.name]);
        daemon.docker(&["pause", &named.name]);
    };
    start_by_hand();
    let docker = json!({ "container": named.name, "port": 8000 });
    let models = model("ada", &json!({ "engine": "openai", "vram": "14GiB", "docker": docker }))
        + &standin("bob", "14GiB", "--load 200ms");
    let scene = Scene::open(&daemon, &settings(&daemon, "on_exit: stop"), &models, &[]).await;
    scene.until("what was found is stopped", |_| !named.runs()).await;
    // Its place is free for others, and it comes back when it is asked for.
    scene.answers("bob").await;
    scene.answers("ada").await;
    scene.answers("bob").await;
    assert!(!named.runs());
    // Started by somebody else while Wharf runs: started anew.
    start_by_hand();
    scene.answers("ada").await;
    let swaps = scene.world.swaps().await;
    assert!(swaps.iter().all(|swap| swap["result"] != "failed"), "{swaps:#?}");
    scene.stop().await;
    assert!(!named.runs());
}
