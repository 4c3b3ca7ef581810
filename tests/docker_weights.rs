//! Weights that are fetched ahead of a swap: the hub's real client, in real containers, against a
//! stand-in of the hub on loopback.
//!
//! Run with WHARF_TEST_DOCKER=unix:///… and WHARF_TEST_PYTHON, an interpreter that has the package
//! huggingface_hub; otherwise every test says that it was skipped.

#[expect(dead_code, reason = "used in part")]
#[path = "docker/mod.rs"]
mod docker;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bollard::models::ContainerCreateBody;
use bollard::query_parameters::{CreateContainerOptions, ListContainersOptionsBuilder};
use docker::{BUSYBOX, Yard, eventually, run, skipped, support};
use wharf::cli::pull;
use wharf::config::catalog::{DockerSpec, EngineKind, ModelSpec, PullPolicy};
use wharf::runtime::docker::{DockerRuntime, Weights};
use wharf::runtime::{LaunchSpec, Progress, ProgressNow};
use wharf::scheduler::event::FaultKind;
use wharf::units::ModelName;

const IMAGE: &str = "wharf-test/python:1";
/// What the stand-in hub calls its only commit.
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// `None` (and loudly so): there is no interpreter with the hub's client.
fn python(test: &str) -> Option<String> {
    let python = std::env::var("WHARF_TEST_PYTHON").unwrap_or_default();
    let import = ["-c", "import huggingface_hub"];
    let has = !python.is_empty()
        && Command::new(&python).args(import).output().is_ok_and(|output| output.status.success());
    if !has {
        skipped(test, "WHARF_TEST_PYTHON names no interpreter with huggingface_hub");
    }
    has.then_some(python)
}

/// Ends with this value, as its stdin does.
struct Hub {
    child: Child,
    url: String,
}

impl Hub {
    fn start(python: &str) -> Hub {
        let mut command = Command::new(python);
        command.arg(support("fake_hub.py")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the hub");
        let mut url = String::new();
        BufReader::new(child.stdout.take().expect("its stdout")).read_line(&mut url).expect("url");
        Hub { child, url: url.trim().to_owned() }
    }

    /// Requests so far (this one left out), and files sent.
    async fn stats(&self) -> (u64, u64) {
        let address = self.url.strip_prefix("http://").expect("http").to_owned();
        let ask = move || {
            use std::io::{Read as _, Write as _};
            let mut stream = std::net::TcpStream::connect(address).expect("the hub");
            stream.write_all(b"GET /-/stats HTTP/1.0\r\n\r\n").expect("a request");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("an answer");
            answer
        };
        let answer = tokio::task::spawn_blocking(ask).await.expect("an answer");
        let body = answer.split("\r\n\r\n").nth(1).expect("a body");
        let stats: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let number = |name: &str| stats[name].as_u64().expect("a number");
        (number("asked"), number("bodies"))
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct World {
    yard: Yard,
    hub: Hub,
    cache: tempfile::TempDir,
    python: Python,
}

/// The interpreter's own library, mounted into containers; the image has the program.
struct Python {
    prefix: String,
    stdlib: String,
    site: String,
}

impl World {
    async fn open(test: &str) -> Option<World> {
        let yard = Yard::open(test).await?;
        let program = python(test)?;
        let script = "import sys, sysconfig as s, os; p = s.get_paths(); print(os.path.realpath(\
                      sys.executable), sys.base_prefix, p['stdlib'], p['purelib'], sep='\\n')";
        let said = run(Command::new(&program).args(["-c", script]));
        let mut lines = said.lines().map(str::to_owned);
        let mut next = || lines.next().expect("a path");
        let (real, prefix, stdlib, site) = (next(), next(), next(), next());
        if yard.docker.inspect_image(IMAGE).await.is_err() {
            let dir = tempfile::tempdir().expect("a folder");
            let named = dir.path().join("python3");
            std::os::unix::fs::symlink(real, &named).expect("a link");
            let modules = format!("{stdlib}/lib-dynload");
            run(Command::new(support("image.sh"))
                .args([&yard.host, IMAGE])
                .arg(named)
                .arg(modules));
        }
        let hub = Hub::start(&program);
        let cache = tempfile::tempdir().expect("a cache");
        Some(World { yard, hub, cache, python: Python { prefix, stdlib, site } })
    }

    fn spec(&self, args: &[&str], change: impl FnOnce(&mut DockerSpec)) -> LaunchSpec {
        let mut spec = self.yard.spec_with(|docker| {
            self.describe(docker);
            docker.args = args.iter().map(|&arg| arg.to_owned()).collect();
            change(docker);
        });
        Arc::make_mut(&mut spec.model).engine = EngineKind::Vllm;
        spec
    }

    fn describe(&self, docker: &mut DockerSpec) {
        let Python { prefix, stdlib, site } = &self.python;
        docker.image = Some(IMAGE.to_owned());
        docker.network = Some("host".to_owned());
        docker.volumes = vec![
            format!("{stdlib}:{stdlib}:ro"),
            format!("{site}:/site:ro"),
            format!("{}:/cache", self.cache.path().display()),
        ];
        docker.env = self.env(prefix);
    }

    fn env(&self, prefix: &str) -> BTreeMap<String, String> {
        let env = [
            ("PATH", "/"),
            ("PYTHONHOME", prefix),
            ("PYTHONPATH", "/site"),
            ("PYTHONDONTWRITEBYTECODE", "1"),
            ("HF_HOME", "/cache"),
            ("HF_HUB_DISABLE_XET", "1"),
            ("HF_ENDPOINT", &self.hub.url),
        ];
        env.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }

    /// Path of a file of the repository in the cache.
    fn file(&self, repo: &str, name: &str) -> PathBuf {
        let folder = format!("hub/models--{}/snapshots/{COMMIT}", repo.replace('/', "--"));
        self.cache.path().join(folder).join(name)
    }

    async fn weights(&self, spec: &LaunchSpec) -> Result<Weights, wharf::scheduler::event::Fault> {
        self.yard.runtime.fetch_weights(&spec.model, &Progress::new().0).await
    }
}

fn size(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|meta| meta.len())
}

/// Everything that was reported until the sender went.
async fn reports(mut seen: tokio::sync::watch::Receiver<ProgressNow>) -> Vec<ProgressNow> {
    let mut reports = Vec::new();
    while seen.changed().await.is_ok() {
        reports.push(seen.borrow_and_update().clone());
    }
    reports
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_come_with_progress_and_only_once() {
    let Some(world) = World::open("weights").await else { return };
    let spec = world.spec(&["org/slow", "--max-model-len", "64"], |_| {});
    let (progress, seen) = Progress::new();
    let watch = tokio::spawn(reports(seen));
    world.yard.runtime.fetch(&spec, &progress).await.expect("the weights");
    drop(progress);
    assert_eq!(size(&world.file("org/slow", "model.safetensors")), Some(48 << 20));
    let reports = watch.await.expect("the reports");
    assert!(reports.iter().all(|report| report.stage == "weights"), "{reports:?}");
    let rated = reports.iter().find(|report| {
        report.fraction.is_some_and(|f| f > 0.0 && f < 1.0) && report.detail.ends_with("/s")
    });
    assert!(rated.is_some_and(|report| report.detail.contains(" of 48.0 MiB, ")), "{reports:?}");
    assert_eq!(reports.last().and_then(|report| report.fraction), Some(1.0), "{reports:?}");

    let (asked, sent) = world.hub.stats().await;
    world.yard.runtime.fetch(&spec, &Progress::new().0).await.expect("known");
    assert_eq!(world.hub.stats().await, (asked, sent), "nobody is asked again");
    let other = DockerRuntime::new(Some(world.yard.host.clone()));
    other.fetch(&spec, &Progress::new().0).await.expect("present");
    let (asked_again, sent_again) = world.hub.stats().await;
    assert!(asked_again > asked && sent_again == sent, "asked, but nothing was sent");
    world.yard.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_vllm_reads_is_fetched() {
    let Some(world) = World::open("weights-chosen").await else { return };
    let spec = world.spec(&["serve", "org/open", "--download-dir=/cache/other"], |_| {});
    assert_eq!(world.weights(&spec).await.expect("it"), Weights::Present("org/open".to_owned()));
    let folder = world.cache.path().join("other/models--org--open/snapshots").join(COMMIT);
    assert_eq!(size(&folder.join("model.safetensors")), Some(6 << 20));
    assert!(folder.join("config.json").exists());
    assert!(!folder.join("pytorch_model.bin").exists() && !folder.join("original").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_named_and_tokens_stay_secret() {
    let Some(world) = World::open("weights-refused").await else { return };
    let with_token = |repo: &str, token: &str| {
        world.spec(&["--model", repo], |docker| {
            docker.env.insert("HF_TOKEN".into(), token.into());
        })
    };
    let page = format!("{}/org/gated", world.hub.url);
    let gated = [world.spec(&["--model", "org/gated"], |_| {}), with_token("org/gated", "hf_bad")];
    for spec in gated {
        let fault = world.weights(&spec).await.expect_err("gated");
        assert_eq!(fault.kind, FaultKind::FetchDenied, "{}", fault.message);
        for part in [page.as_str(), "HF_TOKEN", "licence"] {
            assert!(fault.message.contains(part), "{part}: {}", fault.message);
        }
        assert!(!format!("{fault:?}").contains("hf_bad"), "{fault:?}");
    }
    let fine = with_token("org/gated", "hf_good");
    world.weights(&fine).await.expect("the token may");

    let revision = world.spec(&["org/open", "--revision", "v9"], |_| {});
    let vast = world.spec(&["org/vast"], |_| {});
    for (spec, kind, parts) in [
        (with_token("org/nowhere", "hf_good"), FaultKind::FetchFailed, ["org/nowhere", "has no"]),
        (revision, FaultKind::FetchFailed, ["v9", "revision"]),
        (vast, FaultKind::DiskFull, ["1048576.0 TiB", "/cache"]),
        (world.spec(&["org/broken"], |_| {}), FaultKind::FetchFailed, ["org/broken", "500"]),
    ] {
        let fault = world.weights(&spec).await.expect_err("a refusal");
        assert_eq!(fault.kind, kind, "{}", fault.message);
        for part in parts {
            assert!(fault.message.contains(part), "{part}: {}", fault.message);
        }
    }
    world.yard.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_hub_what_is_complete_is_enough() {
    let Some(world) = World::open("weights-offline").await else { return };
    let sharded = world.spec(&["org/sharded"], |_| {});
    world.weights(&sharded).await.expect("the weights");
    let away = |repo: &str| {
        world.spec(&[repo], |docker| {
            docker.env.insert("HF_ENDPOINT".into(), "http://127.0.0.1:9".into());
        })
    };
    world.weights(&away("org/sharded")).await.expect("all files are here");
    let fault = world.weights(&away("org/open")).await.expect_err("no network");
    assert_eq!(fault.kind, FaultKind::FetchFailed, "{}", fault.message);
    assert!(fault.message.contains("cannot reach http://127.0.0.1:9"), "{}", fault.message);

    let shard = world.file("org/sharded", "model-00002-of-00002.safetensors");
    std::fs::remove_file(shard).expect("a file less");
    let other = DockerRuntime::new(Some(world.yard.host.clone()));
    let again = other.fetch_weights(&away("org/sharded").model, &Progress::new().0).await;
    assert_eq!(again.expect_err("one is missing").kind, FaultKind::FetchFailed);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_fetched_ahead_is_left_to_the_engine() {
    let Some(world) = World::open("weights-left").await else { return };
    let left = async |spec: &LaunchSpec| match world.weights(spec).await.expect("no fault") {
        Weights::LeftToEngine(why) => why,
        other => panic!("{other:?}"),
    };
    let no_volume = world.spec(&["org/open"], |docker| docker.volumes.clear());
    assert!(left(&no_volume).await.contains("no volume"));
    let beside = world.spec(&["org/open"], |docker| {
        docker.env.insert("HF_HOME".into(), "/tmp/hf".into());
    });
    assert!(left(&beside).await.contains("/tmp/hf"), "in the container, not on a volume");
    let no_python = world.spec(&["org/open"], |docker| docker.image = Some(BUSYBOX.into()));
    assert!(left(&no_python).await.contains("python3"));
    let no_client = world.spec(&["org/open"], |docker| {
        docker.env.remove("PYTHONPATH");
    });
    assert!(left(&no_client).await.contains("huggingface_hub"));

    for (args, offline) in [(["/models/a"], "0"), (["gpt2"], "0"), (["org/open"], "1")] {
        let spec = world.spec(&args, |docker| {
            docker.env.insert("HF_HUB_OFFLINE".into(), offline.into());
        });
        assert_eq!(world.weights(&spec).await.expect("no fault"), Weights::Elsewhere, "{args:?}");
    }
    world.yard.nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_is_dropped_or_left_behind_goes() {
    let Some(world) = World::open("weights-dropped").await else { return };
    let spec = world.spec(&["org/slow"], |_| {});
    for millis in [0, 5, 20, 80, 300, 1000] {
        let limit = Duration::from_millis(millis);
        let _ =
            tokio::time::timeout(limit, world.yard.runtime.fetch(&spec, &Progress::new().0)).await;
    }
    // What is on its way must have arrived: a fetch asked for last is done last.
    let last = world.spec(&["org/sharded"], |_| {});
    world.yard.runtime.fetch(&last, &Progress::new().0).await.expect("another fetch");
    world.yard.nothing_is_left().await;

    let labels =
        [("wharf.installation", world.yard.installation.as_str()), ("wharf.purpose", "fetch")];
    let body = ContainerCreateBody {
        image: Some(BUSYBOX.into()),
        labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
        ..ContainerCreateBody::default()
    };
    world.yard.docker.create_container(None::<CreateContainerOptions>, body).await.expect("it");
    assert!(world.yard.found().await.is_empty());
    assert!(world.yard.containers().await.is_empty(), "an earlier run's fetch is removed");
}

/// Containers that fetch for a model, of whatever installation.
async fn fetching(yard: &Yard, model: &str) -> usize {
    let label = vec!["wharf.purpose=fetch".to_owned(), format!("wharf.model={model}")];
    let filters = HashMap::from([("label", label)]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    yard.docker.list_containers(Some(options)).await.expect("a list").len()
}

fn write_models(world: &World, model: &str, repo: &str) -> PathBuf {
    let mut docker = DockerSpec::default();
    world.describe(&mut docker);
    let host = serde_json::json!({ "host": world.yard.host });
    let models = serde_json::json!({ (model): {
        "engine": "vllm", "gpus": 0,
        "docker": {
            "image": IMAGE, "args": [repo], "volumes": docker.volumes, "env": docker.env,
            "network": "host", "pull": "never",
        },
    }});
    // JSON is YAML.
    let text = serde_json::json!({ "docker": host, "models": models }).to_string();
    let file = world.cache.path().join("models.yaml");
    std::fs::write(&file, text).expect("the configuration");
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_wharf_leaves_no_download_behind() {
    let Some(world) = World::open("weights-killed").await else { return };
    let model = format!("killed-{}", std::process::id());
    let config = write_models(&world, &model, "org/slower");
    let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
    command.args(["pull", &model, "--config"]).arg(config).env_remove("HF_TOKEN");
    let mut wharf = command.stdout(Stdio::null()).spawn().expect("wharf");
    let blobs = world.cache.path().join("hub/models--org--slower/blobs");
    eventually("a file is on its way", async || {
        let mut files = std::fs::read_dir(&blobs).ok()?.flatten();
        files.any(|file| file.file_name().to_string_lossy().ends_with(".incomplete")).then_some(())
    })
    .await;
    assert_eq!(fetching(&world.yard, &model).await, 1);
    wharf.kill().expect("SIGKILL");
    wharf.wait().expect("its end");
    eventually("its container ends and is removed", async || {
        (fetching(&world.yard, &model).await == 0).then_some(())
    })
    .await;
    assert!(
        !world.file("org/slower", "model.safetensors").exists(),
        "killed before it was complete"
    );
}

// contract: CLI pull
#[tokio::test(flavor = "multi_thread")]
async fn the_pull_command_brings_weights_with_a_token_from_a_file() {
    let Some(world) = World::open("weights-pull").await else { return };
    let config = write_models(&world, "gated", "org/gated");
    let secret = world.cache.path().join("token");
    let pull = |secret: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wharf"));
        command.args(["pull", "--all", "--config"]).arg(&config).env_remove("HF_TOKEN");
        let output = command.env("HF_TOKEN_FILE", secret).output().expect("wharf");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let (code, said) = pull(&secret);
    assert!(code == Some(1) && said.contains("HF_TOKEN_FILE names"), "{said}");
    std::fs::write(&secret, "hf_bad\n").expect("a secret");
    let (code, said) = pull(&secret);
    assert!(code == Some(1) && said.contains("licence") && !said.contains("hf_bad"), "{said}");
    std::fs::write(&secret, "hf_good\n").expect("a secret");
    let (code, said) = pull(&secret);
    assert!(code == Some(0) && said.contains("the weights of org/gated are here"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_of_one_image_each_get_their_weights() {
    let Some(world) = World::open("weights-models").await else { return };
    let model = |name: &str, repo: &str| {
        let spec = world.spec(&[repo], |docker| docker.pull = PullPolicy::Never);
        let model = ModelSpec { name: ModelName::new(name), ..(*spec.model).clone() };
        (model.name.clone(), Arc::new(model))
    };
    let catalog = docker::catalog([
        model("a", "org/open"),
        model("b", "org/sharded"),
        model("c", "org/vast"),
    ]);
    let run = async |models: &[&str]| {
        let models = models.iter().map(|&model| model.to_owned()).collect();
        let args = pull::Args { models, all: false };
        pull::run(&args, &catalog, &world.yard.runtime).await.expect("a result")
    };
    assert_eq!(run(&["a", "b"]).await, ExitCode::SUCCESS);
    assert!(world.file("org/open", "model.safetensors").exists());
    assert!(world.file("org/sharded", "model-00002-of-00002.safetensors").exists());
    assert_eq!(run(&["c", "a"]).await, ExitCode::FAILURE);
}
