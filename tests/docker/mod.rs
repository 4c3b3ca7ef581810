//! What the Docker tests share: a daemon, specs, and a folder of containers that cleans up.

pub mod registry;

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bollard::query_parameters::{ListContainersOptionsBuilder, RemoveContainerOptionsBuilder};
use bollard::{API_DEFAULT_VERSION, Docker};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use wharf::config::catalog::{
    Catalog, DockerSpec, GpuRequest, Health, ModelSpec, PullPolicy, RuntimeSpec, StopSpec,
};
use wharf::runtime::docker::DockerRuntime;
use wharf::runtime::{Found, Identity, LaunchKey, LaunchSpec, Running, RuntimeHandle};
use wharf::units::{InstanceId, ModelName};

pub const BUSYBOX: &str = "wharf-test/busybox:1";
/// Ample for a machine that is busy with other things.
pub const DEADLINE: Duration = Duration::from_secs(60);

pub fn support(script: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support").join(script)
}

/// Says so where people and the test script see it.
pub fn skipped(test: &str, why: &str) {
    eprintln!("SKIPPED: {test}: {why}");
    if let Some(file) = std::env::var_os("WHARF_SKIP_FILE") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(file);
        writeln!(file.expect("the skip file"), "{test}: {why}").expect("a line");
    }
}

/// Containers of one test, on one daemon.
pub struct Yard {
    pub host: String,
    pub docker: Docker,
    pub runtime: DockerRuntime,
    pub installation: String,
}

impl Yard {
    /// On the daemon that the test script names; `None` (and loudly so): there is none.
    pub async fn open(test: &str) -> Option<Yard> {
        match std::env::var("WHARF_TEST_DOCKER") {
            Ok(host) if !host.is_empty() => Some(Yard::on(&host, test).await),
            _ => {
                skipped(test, "WHARF_TEST_DOCKER names no Docker Engine");
                None
            }
        }
    }

    pub async fn on(host: &str, test: &str) -> Yard {
        let docker = if host.starts_with("tcp://") {
            Docker::connect_with_http(host, 60, API_DEFAULT_VERSION)
        } else {
            Docker::connect_with_unix(host, 60, API_DEFAULT_VERSION)
        };
        let docker = docker.expect("a client");
        if docker.inspect_image(BUSYBOX).await.is_err() {
            run(Command::new(support("image.sh")).args([host, "--busybox"]));
        }
        let runtime = DockerRuntime::new(Some(host.to_owned()));
        let installation = format!("{}-{test}", std::process::id());
        Yard { host: host.to_owned(), docker, runtime, installation }
    }

    /// A spec that runs a shell script in busybox.
    pub fn spec(&self, script: &str) -> LaunchSpec {
        self.spec_with(|docker| docker.args = vec!["sh".into(), "-c".into(), script.into()])
    }

    /// A spec that serves `/health` on its container port.
    pub fn server(&self) -> LaunchSpec {
        self.spec("echo listening; exec busybox httpd -f -p 8000 -h /www")
    }

    pub fn spec_with(&self, change: impl FnOnce(&mut DockerSpec)) -> LaunchSpec {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut docker = DockerSpec {
            image: Some(BUSYBOX.to_owned()),
            env: BTreeMap::from([("PATH".to_owned(), "/bin".to_owned())]),
            pull: PullPolicy::Never,
            ..DockerSpec::default()
        };
        change(&mut docker);
        let model = model(RuntimeSpec::Docker(docker));
        let port = free_port();
        LaunchSpec {
            identity: Identity {
                installation: self.installation.clone(),
                instance: InstanceId(number),
                model: model.name.clone(),
                spec_hash: "hash".to_owned(),
                gpus: Vec::new(),
                port,
            },
            model: Arc::new(model),
            gpus: Vec::new(),
            port,
            container_port: 8000,
            args: Vec::new(),
            env: BTreeMap::new(),
            api_key: LaunchKey::None,
            log_dir: PathBuf::new(),
        }
    }

    /// Every container of this test, running or not.
    pub async fn containers(&self) -> Vec<String> {
        // Those that were stopped are removed beside the way.
        self.runtime.cleared().await;
        let label = format!("wharf.installation={}", self.installation);
        let filters = HashMap::from([("label", vec![label])]);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let list = self.docker.list_containers(Some(options)).await.expect("a list");
        list.into_iter().filter_map(|container| container.id).collect()
    }

    /// Docker removes what ends by itself (`auto_remove`) a moment after we are told of the end.
    pub async fn nothing_is_left(&self) {
        eventually("nothing is left", async || self.containers().await.is_empty().then_some(()))
            .await;
    }

    pub async fn found(&self) -> Vec<Found> {
        let all = self.runtime.find(&self.installation).await.expect("the containers");
        assert!(all.silent.is_empty(), "{all:?}");
        all.found
    }

    pub async fn is_alive(&self, running: &Running) -> bool {
        let RuntimeHandle::Docker { id, .. } = &running.handle else { panic!("no container") };
        let ids = [id.clone()];
        self.runtime.running_of(&ids).await.expect("an answer").contains(id)
    }

    pub async fn clean(&self) {
        for id in self.containers().await {
            self.remove(&id).await;
        }
    }

    pub async fn remove(&self, id: &str) {
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        let _ = self.docker.remove_container(id, Some(options)).await;
    }
}

/// A test that fails half-way leaves nothing either.
impl Drop for Yard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let script = "docker -H $0 ps -aq --filter label=wharf.installation=$1 \
                          | xargs -r docker -H $0 rm -f";
            let arguments = ["-c", script, &self.host, &self.installation];
            let _ = Command::new("sh").args(arguments).output();
        }
    }
}

pub fn model(runtime: RuntimeSpec) -> ModelSpec {
    ModelSpec {
        runtime,
        gpus: GpuRequest::None,
        health: Health { path: Some("/health".to_owned()), stall: DEADLINE },
        stop: stop_spec(5),
        ..ModelSpec::plain("org/busy:1")
    }
}

/// Those models, with settings of no importance here.
pub fn catalog(models: impl IntoIterator<Item = (ModelName, Arc<ModelSpec>)>) -> Catalog {
    Catalog { models: models.into_iter().collect(), aliases: BTreeMap::new(), ..Catalog::default() }
}

pub fn stop_spec(seconds: u64) -> StopSpec {
    StopSpec { signal: "SIGTERM".to_owned(), grace: Duration::from_secs(seconds) }
}

/// Beside those of `support/ports.rs`, and like them no outgoing connection's.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let offset = std::process::id().wrapping_mul(61).wrapping_add(step) % 2000;
        let port = (30_000 + offset) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().expect("a program");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).expect("text").trim().to_owned()
}

/// Polls until `probe` yields something; panics with `what` at the deadline.
pub async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Body of `GET base/health` once it answers.
pub async fn healthy(base: &str) -> String {
    let address = base.strip_prefix("http://").expect("http").to_owned();
    eventually(&format!("{base}/health answers"), async || {
        let mut stream = TcpStream::connect(&address).await.ok()?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n").await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.contains(" 200 ").then(|| body.to_owned())
    })
    .await
}

pub async fn exit_of(running: &Running) -> wharf::runtime::ExitReport {
    let mut exit = running.exit.clone();
    let ended = tokio::time::timeout(DEADLINE, exit.wait_for(Option::is_some)).await;
    ended.expect("an exit in time").expect("a sender").clone().expect("a report")
}

/// A Docker Engine of the test's own, for what would disturb others.
pub struct OwnDaemon {
    dir: tempfile::TempDir,
    flags: Vec<String>,
    programs: String,
    pub host: String,
}

impl OwnDaemon {
    /// `None` (and loudly so): this machine cannot run one.
    pub fn start(test: &str, flags: &[&str]) -> Option<OwnDaemon> {
        OwnDaemon::start_with(test, flags, |_| String::new())
    }

    /// `prepare` may put files into the daemon's folder (its daemon.json among them) and returns
    /// a folder of programs that the daemon shall find first.
    pub fn start_with(
        test: &str,
        flags: &[&str],
        prepare: impl FnOnce(&Path) -> String,
    ) -> Option<OwnDaemon> {
        let asked = Command::new(support("dockerd.sh")).arg("available").output().expect("bash");
        if !asked.status.success() || std::env::var_os("WHARF_TEST_DOCKER").is_none() {
            skipped(test, "no Docker Engine of its own can be started here");
            return None;
        }
        // Directly under /tmp: a socket's path is short.
        let dir = tempfile::Builder::new().prefix("whd").tempdir_in("/tmp").expect("a folder");
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        let programs = prepare(dir.path());
        let mut daemon = OwnDaemon { dir, flags, programs, host: String::new() };
        daemon.host = daemon.up();
        Some(daemon)
    }

    fn script(&self, verb: &str) -> Command {
        let mut command = Command::new(support("dockerd.sh"));
        command.arg(verb).arg(self.dir.path());
        if !self.programs.is_empty() {
            let others = std::env::var("WHARF_DOCKER_PATH").unwrap_or_default();
            let path = format!("{}:{others}", self.programs);
            command.env("WHARF_DOCKER_PATH", path.trim_end_matches(':'));
        }
        command
    }

    pub fn up(&self) -> String {
        run(self.script("start").args(&self.flags))
    }

    pub fn crash(&self) {
        run(&mut self.script("kill"));
    }

    /// An orderly end that leaves the containers to the daemon's own habits.
    pub fn down(&self) {
        run(&mut self.script("down"));
    }
}

impl Drop for OwnDaemon {
    fn drop(&mut self) {
        let _ = self.script("stop").output();
    }
}

/// Major version of the engine that `OwnDaemon` starts.
pub fn engine_major() -> u32 {
    let first = std::env::var("WHARF_DOCKER_PATH").unwrap_or_default();
    let path = format!("{first}:{}:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let said = run(Command::new("sh").args(["-c", "dockerd --version"]).env("PATH", path));
    let number = said.split("version ").nth(1).and_then(|rest| rest.split('.').next());
    number.and_then(|number| number.parse().ok()).expect("a version")
}

/// CDI devices `nvidia.com/gpu=GPU-aaaa` and `…=GPU-bbbb` that set `CDI` to their name.
pub fn write_cdi(dir: &Path) {
    let device =
        |name: &str| format!(r#"{{"name":"{name}","containerEdits":{{"env":["CDI={name}"]}}}}"#);
    let spec = format!(
        r#"{{"cdiVersion":"0.5.0","kind":"nvidia.com/gpu","devices":[{},{}]}}"#,
        device("GPU-aaaa"),
        device("GPU-bbbb")
    );
    let specs = dir.join("cdi");
    std::fs::create_dir(&specs).expect("a folder");
    std::fs::write(specs.join("nvidia.json"), spec).expect("the devices");
    let config =
        format!(r#"{{"features":{{"cdi":true}},"cdi-spec-dirs":["{}"]}}"#, specs.display());
    std::fs::write(dir.join("daemon.json"), config).expect("the configuration");
}
