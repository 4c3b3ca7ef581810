//! A real `wharf serve` with real stand-in processes, for end-to-end tests.
#![expect(dead_code, reason = "each test binary uses a part of this")]

pub mod ollama;
pub mod ports;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use wharf::cli::demo::server::Server;

use ports::free_port;

pub const EXE: &str = env!("CARGO_BIN_EXE_wharf");

/// Engine ports of this test alone, so that tests can run side by side.
fn engine_ports() -> (u16, u16) {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let first = NEXT.fetch_add(40, Ordering::Relaxed);
    (first, first + 39)
}

pub struct World {
    pub server: Server,
    pub dir: tempfile::TempDir,
}

/// `models` is the part of models.yaml below `models:`; `settings` comes before it.
pub async fn serve(settings: &str, models: &str, env: &[(&str, &str)]) -> World {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (first, last) = engine_ports();
    let ports = (free_port(), free_port());
    let server = Server::start(Path::new(EXE), dir.path(), ports, env, |gateway, orchestrator| {
        format!(
            "listen: {{ gateway: 127.0.0.1:{gateway}, orchestrator: 127.0.0.1:{orchestrator} }}\n\
             engine_ports: {first}-{last}\n{settings}\nmodels:\n{models}"
        )
    })
    .await
    .unwrap_or_else(|error| panic!("{error:?}"));
    World { server, dir }
}

/// A model run by a stand-in engine.
pub fn standin(name: &str, vram: &str, flags: &str) -> String {
    format!(
        "  {name}:\n    engine: openai\n    vram: {vram}\n    process:\n      cmd: >-\n        {EXE} engine \
         --host 127.0.0.1 --port ${{PORT}} --name {name} --vram {vram} {flags}\n"
    )
}

/// One simulated GPU.
pub fn gpu(memory: &str, release_lag: &str) -> String {
    format!(
        "gpu: {{ provider: simulated, memory: [{memory}], release_lag: {release_lag}, reserve: 256MiB }}"
    )
}

impl World {
    pub async fn status(&self) -> Value {
        self.server.talk.get("/status").await.expect("/status")
    }

    pub async fn state_of(&self, model: &str) -> String {
        self.status().await["models"][model]["state"].as_str().unwrap_or("?").to_owned()
    }

    pub async fn swaps(&self) -> Vec<Value> {
        let swaps = self.server.talk.get("/swaps?limit=1000").await.expect("/swaps");
        swaps["swaps"].as_array().cloned().unwrap_or_default()
    }

    /// Polls until `wanted` holds; the deadline is generous, the wait is not.
    pub async fn until(&self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let status = self.status().await;
            if wanted(&status) {
                return status;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{what} never came true: {status:#}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("wharf.log")).unwrap_or_default()
    }

    /// Pids of engines that this Wharf started (found as an operator would, by environment).
    pub fn engine_pids(&self) -> Vec<u32> {
        let marker = format!("WHARF_INSTALLATION={}", self.installation());
        processes_with(&marker)
    }

    pub fn installation(&self) -> String {
        std::fs::read_to_string(self.state_dir().join("installation")).unwrap_or_default()
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("wharf.d")
    }

    /// Stops Wharf; nothing of it may be left.
    pub async fn stop(self) {
        let installation = format!("WHARF_INSTALLATION={}", self.installation());
        let log = self.log();
        self.server.stop().await.expect("a clean stop");
        let left = processes_with(&installation);
        assert!(left.is_empty(), "left over: {left:?}\n{log}");
    }
}

/// Asks a server at `base` itself, past Wharf.
pub async fn status_of(base: &str, path: &str, key: Option<&str>) -> u16 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let address = base.trim_start_matches("http://");
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("a connection");
    let key = key.map_or(String::new(), |key| format!("Authorization: Bearer {key}\r\n"));
    let ask = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{key}\r\n");
    stream.write_all(ask.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect(&answer)
}

/// The interpreter that has the official Python clients; without one the test is told as skipped.
pub fn python(client: &str) -> Option<String> {
    let python = std::env::var("WHARF_TEST_PYTHON").ok();
    if python.is_none() {
        skip(&format!("official {client} client: WHARF_TEST_PYTHON is not set"));
    }
    python
}

/// Runs a script of tests/support to its end, which must be a success.
pub async fn run_script(python: &str, script: &str, args: &[&str], world: &World) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support").join(script);
    let output = tokio::process::Command::new(python).arg(script).args(args).output().await;
    let output = output.expect("the interpreter runs");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{}", world.log());
}

/// A test that cannot run here is counted and named in the last lines of the test command.
pub fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    if let Ok(path) = std::env::var("WHARF_SKIP_FILE") {
        use std::io::Write;
        let mut file =
            std::fs::File::options().create(true).append(true).open(path).expect("skip file");
        writeln!(file, "{why}").expect("skip file");
    }
}

pub fn processes_with(marker: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ.split(|byte| *byte == 0).any(|entry| entry == marker.as_bytes())
        })
        .collect()
}
