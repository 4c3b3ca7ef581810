//! Worlds whose models are containers: a daemon, images, what the daemon itself saw, cleaning up.
#![expect(dead_code, reason = "each test binary uses a part of this")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::{Value, json};

use crate::support::{self, EXE, World, serve};

pub const STANDIN: &str = "wharf-test/standin:1";
pub const BUSYBOX: &str = "wharf-test/busybox:1";
pub const LLAMA: &str = "wharf-test/llama:1";
/// Ample for a machine that is busy with other things.
const DEADLINE: Duration = Duration::from_secs(60);

/// A Docker Engine, seen through its own command line: not through Wharf's client.
#[derive(Clone, Debug)]
pub struct Daemon {
    pub host: String,
}

impl Daemon {
    /// The one that the test command started; `None` (and loudly so): there is none.
    pub fn given(variable: &str, test: &str) -> Option<Daemon> {
        match std::env::var(variable) {
            Ok(host) if !host.is_empty() => Some(Daemon { host }),
            _ => {
                support::skip(&format!("{test}: {variable} names no Docker Engine"));
                None
            }
        }
    }

    pub fn try_docker(&self, args: &[&str]) -> Result<String, String> {
        let output =
            Command::new("docker").args(["-H", &self.host]).args(args).output().expect("docker");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    pub fn docker(&self, args: &[&str]) -> String {
        self.try_docker(args).unwrap_or_else(|error| panic!("docker {args:?}: {error}"))
    }

    /// Makes an image once per test program; `args` as for image.sh.
    fn image(&self, args: &[&str]) {
        static MADE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let mut made = MADE.lock().unwrap();
        if made.insert(format!("{} {args:?}", self.host)) {
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/image.sh");
            let output = Command::new(script).arg(&self.host).args(args).output().expect("bash");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "image.sh {args:?}: {said}");
        }
    }

    pub fn with_standin(&self) -> &Daemon {
        self.image(&[STANDIN, EXE]);
        self
    }

    pub fn with_busybox(&self) -> &Daemon {
        self.image(&["--busybox"]);
        self
    }

    /// A real llama-server with its libraries, and models.
    pub fn with_llama(&self, server: &str, models: &str) -> &Daemon {
        let folder = Path::new(server).parent().unwrap().to_str().unwrap();
        self.image(&[LLAMA, server, folder, models]);
        self
    }
}

/// A model by its part of models.yaml (JSON is YAML, too).
pub fn model(name: &str, spec: &Value) -> String {
    format!("  {name}: {spec}\n")
}

/// The arguments of a stand-in in a container.
pub fn standin_args(name: &str, flags: &str) -> Vec<String> {
    format!("engine --host 0.0.0.0 --port 8000 --name {name} {flags}")
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

pub fn standin(name: &str, vram: &str, flags: &str) -> String {
    let args = standin_args(name, flags);
    let docker = json!({ "image": STANDIN, "pull": "never", "args": args });
    model(name, &json!({ "engine": "openai", "vram": vram, "docker": docker }))
}

/// Nothing measures memory; the declared sizes decide. `swap`: more keys of that section.
pub fn settings(daemon: &Daemon, swap: &str) -> String {
    format!(
        "docker: {{ host: \"{}\" }}\ngpu: {{ provider: none, memory: [24GiB] }}\n\
         swap: {{ min_residency: 100ms, {swap} }}",
        daemon.host
    )
}

/// A Wharf on the host, whose models are containers of `daemon`.
pub struct Scene {
    pub world: World,
    pub events: Events,
    _sweep: Sweep,
    pub daemon: Daemon,
}

/// Removes what a failed test left.
struct Sweep {
    daemon: Daemon,
    label: String,
}

impl Drop for Sweep {
    fn drop(&mut self) {
        let list = ["ps", "-aq", "--filter", &format!("label={}", self.label)];
        for id in self.daemon.try_docker(&list).unwrap_or_default().lines() {
            let _ = self.daemon.try_docker(&["rm", "-f", id]);
        }
    }
}

impl Scene {
    pub async fn open(
        daemon: &Daemon,
        settings: &str,
        models: &str,
        env: &[(&str, &str)],
    ) -> Scene {
        let world = serve(settings, models, env).await;
        let label = format!("wharf.installation={}", world.installation());
        let events = Events::follow(daemon, &label, world.dir.path());
        let daemon = daemon.clone();
        Scene { world, events, _sweep: Sweep { daemon: daemon.clone(), label }, daemon }
    }

    /// Ids of this installation's containers, running or not.
    pub fn containers(&self) -> Vec<String> {
        let label = format!("label=wharf.installation={}", self.world.installation());
        let list = self.daemon.docker(&["ps", "-aq", "--no-trunc", "--filter", &label]);
        list.lines().map(str::to_owned).collect()
    }

    /// Docker removes what was stopped a little later than Wharf goes on.
    pub async fn settles_at(&self, containers: usize) {
        let what = format!("{containers} containers");
        self.until(&what, |scene| scene.containers().len() == containers).await;
    }

    pub async fn answers(&self, model: &str) {
        let answer = self.world.server.talk.chat(model, false, &[]).await.unwrap();
        assert!(answer.is_from(model), "{answer:?}\n{}", self.world.log());
    }

    /// The same for a model that may still be backing off.
    pub async fn until_answers(&self, model: &str) {
        let end = Instant::now() + DEADLINE;
        loop {
            let answer = self.world.server.talk.chat(model, false, &[]).await.unwrap();
            if answer.is_from(model) {
                return;
            }
            assert_eq!(answer.status, 503, "{answer:?}");
            assert!(Instant::now() < end, "{answer:?}\n{}", self.world.log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The daemon tells of a start a little later.
    pub async fn started_once(&self, model: &str) {
        let start = format!("start {model}");
        self.until(&start, |scene| scene.events.count(&start) >= 1).await;
        assert_eq!(self.events.count(&start), 1, "{:?}", self.events.seen());
    }

    /// Status and whole body, as an OpenAI client gets them.
    pub async fn ask(&self, model: &str) -> (u16, Value) {
        let mut talk = self.world.server.talk.clone();
        talk.orchestrator = talk.gateway.clone();
        let body = json!({ "model": model, "messages": [{ "role": "user", "content": "hi" }] });
        talk.call(Method::POST, "/v1/chat/completions", body).await.unwrap()
    }

    /// A request that fails to start its model: the same cause, in words that name the thing, for
    /// the client, in the ledger and in the log.
    pub async fn fails(&self, model: &str, kind: &str, words: &[&str]) -> Value {
        let (status, body) = self.ask(model).await;
        let context = || format!("{model}: {status} {body:#}\n{}", self.world.log());
        assert_eq!(status, 503, "{}", context());
        let message = body["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert_eq!(body["cause"]["kind"], kind, "{}", context());
        assert_eq!(body["model"], model, "{}", context());
        for word in words {
            assert!(message.contains(word), "no {word:?} in {}", context());
        }
        let id = body["swap_id"].as_str().unwrap_or_else(|| panic!("no swap: {}", context()));
        let swap = self.ended_swap(id).await;
        assert_eq!(swap["result"], "failed", "{swap:#}");
        assert_eq!(swap["fault"], kind, "{swap:#}");
        let told = swap["message"].as_str().unwrap_or_default();
        for word in words {
            assert!(told.contains(word), "no {word:?} in {swap:#}");
        }
        let log = self.world.log();
        let in_log = log.lines().any(|line| line.contains(model) && line.contains(words[0]));
        assert!(in_log, "{model}: no {:?} in the log:\n{log}", words[0]);
        eprintln!("{model}: {message}");
        body
    }

    /// What is published may be some milliseconds behind an answer.
    async fn ended_swap(&self, id: &str) -> Value {
        let end = Instant::now() + DEADLINE;
        loop {
            let swap = self.world.server.talk.get(&format!("/swaps/{id}")).await.unwrap();
            if !swap["result"].is_null() || Instant::now() >= end {
                return swap;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn until(&self, what: &str, mut wanted: impl FnMut(&Scene) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !wanted(self) {
            assert!(Instant::now() < end, "{what} never came true\n{}", self.world.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGTERM, and the end of Wharf; the folder stays, so that it can be started again.
    pub async fn terminate(&mut self) {
        let pid = i32::try_from(self.world.server.pid()).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.until("the end of wharf", |_| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.starts_with(" Z"))
        })
        .await;
        self.world.server.kill().unwrap();
    }

    /// Stops Wharf; no container of its own may be left.
    pub async fn stop(self) {
        let Scene { world, events, _sweep, daemon } = self;
        let (label, log) = (format!("label={}", _sweep.label), world.dir.path().join("wharf.log"));
        drop(events);
        world.server.stop().await.expect("a clean stop");
        let left = daemon.docker(&["ps", "-aq", "--filter", &label]);
        assert!(left.is_empty(), "left: {left}\n{}", std::fs::read_to_string(log).unwrap());
    }
}

/// What the daemon reports of this installation's containers, in its order.
pub struct Events {
    child: Child,
    file: PathBuf,
}

impl Events {
    fn follow(daemon: &Daemon, label: &str, dir: &Path) -> Events {
        let file = dir.join("docker-events");
        let out = File::create(&file).unwrap();
        let since = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() - 60;
        let child = Command::new("docker")
            .args(["-H", &daemon.host, "events", "--since", &since.to_string()])
            .args(["--filter", "type=container", "--filter", &format!("label={label}")])
            .args(["--format", "{{json .}}"])
            .stdout(out)
            .stderr(Stdio::null())
            .spawn()
            .expect("docker events");
        Events { child, file }
    }

    /// `start ada`, `die ada`, `destroy ada`, … with the daemon's time in nanoseconds.
    pub fn seen(&self) -> Vec<(u64, String)> {
        let text = std::fs::read_to_string(&self.file).unwrap();
        text.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter_map(|event| {
                let action = event["Action"].as_str()?;
                let model = event["Actor"]["Attributes"]["wharf.model"].as_str()?;
                let told = matches!(action, "start" | "die" | "destroy");
                told.then(|| (event["timeNano"].as_u64().unwrap(), format!("{action} {model}")))
            })
            .collect()
    }

    pub fn count(&self, what: &str) -> usize {
        self.seen().iter().filter(|(_, event)| event == what).count()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
