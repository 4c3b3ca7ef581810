//! `wharf top` and `wharf doctor`, as programs.

#[path = "support/fake_nvml.rs"]
mod fake_nvml;
mod support;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fake_nvml::FakeNvml;
use serde_json::Value;
use support::ollama::Ollama;
use support::ports::free_port;
use support::{EXE, gpu, serve, standin};

/// Exit code, stdout, stderr; nothing of the environment leads elsewhere.
fn wharf(dir: &Path, args: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
    let mut command = Command::new(EXE);
    for name in ["WHARF_URL", "WHARF_KEY", "WHARF_CONFIG", "WHARF_STORE", "OLLAMA_BASE_URL"] {
        command.env_remove(name);
    }
    let output =
        command.args(args).current_dir(dir).envs(env.iter().copied()).output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn models() -> String {
    standin("ada", "4GiB", "--load 50ms --tokens-per-second 200")
        .replace("    vram", "    ttl: 10m\n    vram")
        + &standin("bob", "4GiB", "--load 50ms")
}

// contract: CLI top
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn top_shows_models_speeds_ttls_and_gpus_once_or_live() {
    let world = serve(&gpu("24GiB", "50ms"), &models(), &[]).await;
    assert!(world.server.talk.chat("ada", true, &[]).await.unwrap().is_from("ada"));
    let url = world.server.talk.orchestrator.clone();
    let dir = world.dir.path();
    // Rows of activity are written behind the answers.
    let until = Instant::now() + Duration::from_secs(30);
    let picture = loop {
        let (code, picture, told) = wharf(dir, &["top", "--once", "--url", &url], &[]);
        assert_eq!(code, 0, "{told}");
        let ada = picture.lines().find(|line| line.starts_with("ada")).expect("ada's line");
        if words(ada)[5] != "-" {
            break picture;
        }
        assert!(Instant::now() < until, "no speed in {picture}");
    };
    println!("{picture}");
    let line = |start: &str| {
        let line = picture.lines().find(|line| line.starts_with(start));
        words(line.unwrap_or_else(|| panic!("no {start} in {picture}")))
    };
    assert_eq!(line("MODEL")[..3], ["MODEL", "STATE", "GPUS"]);
    let ada = line("ada");
    assert_eq!(ada[..5], ["ada", "ready", "0", "0", "0"]);
    assert!(ada[5].parse::<f64>().is_ok_and(|speed| speed > 1.0), "{ada:?}");
    assert!(ada[6].starts_with("9:") || ada[6] == "10:00", "{ada:?}");
    assert_eq!(line("bob")[..3], ["bob", "stopped", "-"]);
    assert!(picture.contains("1 of 2 models ready"), "{picture}");
    assert!(line("GPU")[..].join(" ").contains("GiB promised (ada)"), "{picture}");
    // Where stdout is no terminal it ends by itself as well.
    assert_eq!(wharf(dir, &["top", "--url", &url], &[]).0, 0);
    let (code, json, _) = wharf(dir, &["top", "--json", "--url", &url], &[]);
    let json: Value = serde_json::from_str(&json).expect("one JSON object");
    assert_eq!((code, &json["models"][0]["model"]), (0, &Value::from("ada")));
    assert!(json["models"][0]["ttl_left_seconds"].as_f64().is_some_and(|left| left > 500.0));
    assert_eq!(wharf(dir, &["top", "--url", "127.0.0.1:1"], &[]).0, 3);
    live(&url);
    world.stop().await;
}

/// In a terminal of its own: it draws, draws again, and `q` ends it.
fn live(url: &str) {
    let command = format!("{EXE} top --url {url}");
    let child = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else {
        return support::skip("wharf top in a terminal: script (util-linux) is not installed");
    };
    let mut out = child.stdout.take().expect("piped");
    let (pieces, drawn) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = out.read(&mut piece) {
            let _ = pieces.send(String::from_utf8_lossy(&piece[..count]).into_owned());
        }
    });
    let mut seen = String::new();
    while seen.matches("IN FLIGHT").count() < 2 {
        seen += &drawn.recv_timeout(Duration::from_secs(60)).expect("another picture");
    }
    let mut keyboard = child.stdin.take().expect("piped");
    keyboard.write_all(b"q").expect("typed");
    while let Ok(piece) = drawn.recv_timeout(Duration::from_secs(60)) {
        seen += &piece;
    }
    assert!(child.wait().expect("its end").success(), "{seen:?}");
    assert!(seen.contains("\x1b[?1049h") && seen.contains("\x1b[?1049l"), "{seen:?}");
}

/// The check of this name that says so; its status and fix.
fn check<'a>(report: &'a Value, name: &str, says: &str) -> (&'a str, &'a str) {
    let checks = report["checks"].as_array().expect("checks");
    let found = checks.iter().find(|check| {
        check["check"] == name && check["detail"].as_str().is_some_and(|told| told.contains(says))
    });
    let found = found.unwrap_or_else(|| panic!("no {name} with {says:?} in {report:#}"));
    (found["status"].as_str().expect("a status"), found["fix"].as_str().unwrap_or_default())
}

fn doctor(dir: &Path, env: &[(&str, &str)]) -> (i32, Value) {
    let (code, report, told) = wharf(dir, &["doctor", "--json"], env);
    let report = serde_json::from_str(&report).unwrap_or_else(|_| panic!("{report}{told}"));
    (code, report)
}

// contract: CLI doctor
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_finds_what_is_wrong_and_names_the_fix() {
    let dir = tempfile::tempdir().unwrap();
    let write = |yaml: &str| std::fs::write(dir.path().join("models.yaml"), yaml).unwrap();
    let ollama = Ollama::start(&["--name", "qwen:7b"]).await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let nobody = free_port();
    let sick = format!(
        "listen: {{ gateway: 127.0.0.1:{port}, orchestrator: 127.0.0.1:{nobody} }}\n\
         gpu: {{ provider: nvml }}\nstore: notes.txt\ndocker: {{ host: unix:///nonexistent/docker.sock }}\n\
         models:\n  lost: {{ engine: openai, process: {{ cmd: \"no-such-program --port ${{PORT}}\" }} }}\n\
         \x20 boxed: {{ engine: vllm, docker: {{ image: vllm/vllm-openai, args: [--model, x] }} }}\n\
         \x20 qwen: {{ engine: ollama, upstream_name: qwen:7b, external: {{ url: {} }} }}\n\
         \x20 mine: {{ engine: ollama, upstream_name: mine:1b, pull: never, external: {{ url: {} }} }}\n\
         \x20 away: {{ engine: openai, external: {{ url: http://127.0.0.1:{nobody} }} }}\n",
        ollama.url, ollama.url
    );
    write(&sick);
    std::fs::write(
        dir.path().join("notes.txt"),
        "no database, and longer than one page: ".repeat(40),
    )
    .unwrap();
    // No NVML, wherever this runs.
    let env = [("WHARF_NVML_LIBRARY", "/nonexistent/libnvidia-ml.so")];
    let (code, report) = doctor(dir.path(), &env);
    println!("{}", wharf(dir.path(), &["doctor"], &env).1);
    assert_eq!((code, &report["ok"]), (1, &Value::from(false)), "{report:#}");
    let failed = |name: &str, says: &str, fix: &str| {
        let (status, named) = check(&report, name, says);
        assert!(status == "fail" && named.contains(fix), "{name}: {status} {named:?}");
    };
    assert_eq!(check(&report, "configuration", "5 models").0, "ok");
    failed(
        "listeners",
        &format!("{port} is taken by pid {}", std::process::id()),
        "listen.gateway",
    );
    assert_eq!(check(&report, "listeners", &format!("{nobody} is free")).0, "ok");
    failed("programs", "no-such-program (lost)", "process.cmd");
    failed("docker", "/nonexistent/docker.sock", "");
    failed("gpu", "/nonexistent/libnvidia-ml.so", "nvidia-smi");
    failed("store", "notes.txt", "");
    failed("ollama", "lacks mine:1b", "ollama pull mine:1b");
    failed("external", &format!("127.0.0.1:{nobody}"), "away");
    assert_eq!(check(&report, "wharf", "none runs").0, "ok");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing was made");
    assert!(ollama.loaded().await.is_empty(), "nothing was loaded");

    write("models: { a: { engin: vllm } }\n");
    let (code, report) = doctor(dir.path(), &env);
    assert_eq!((code, check(&report, "configuration", "line 1").0), (1, "fail"), "{report:#}");
    std::fs::remove_file(dir.path().join("models.yaml")).unwrap();
    let (code, report) = doctor(dir.path(), &env);
    assert_eq!((code, check(&report, "configuration", "cannot be read").0), (1, "fail"));
    drop(taken);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_is_content_with_a_healthy_wharf_and_tells_it_from_others() {
    let world = serve(&gpu("24GiB", "50ms"), &models(), &[]).await;
    assert!(world.server.talk.chat("ada", false, &[]).await.unwrap().is_from("ada"));
    let (code, report) = doctor(world.dir.path(), &[]);
    println!("{}", wharf(world.dir.path(), &["doctor"], &[]).1);
    assert_eq!(code, 0, "{report:#}");
    assert_eq!(check(&report, "wharf", "healthy").0, "ok");
    for what in ["gateway", "orchestrator"] {
        let checks = report["checks"].as_array().unwrap().iter();
        let told: Vec<&str> = checks.filter_map(|check| check["detail"].as_str()).collect();
        let ours = |told: &&str| told.starts_with(what) && told.ends_with("Wharf answers there");
        assert!(told.iter().any(ours), "{what}: {told:?}");
    }
    assert_eq!(check(&report, "gpu", "simulated").0, "ok");
    assert_eq!(check(&report, "programs", EXE).0, "ok");
    world.stop().await;
}

#[test]
fn the_doctor_shows_driver_and_gpus() {
    let Some(nvml) = FakeNvml::build("count 2\ndriver 550.54.15\n") else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("models.yaml"),
        "models: { a: { engine: openai, process: { cmd: sleep 1 } } }\n",
    )
    .unwrap();
    let library = nvml.library().display().to_string();
    let (_, report) = doctor(dir.path(), &[("WHARF_NVML_LIBRARY", &library)]);
    let (status, _) = check(&report, "gpu", "nvml (driver ");
    assert_eq!(status, "ok", "{report:#}");
    check(&report, "gpu", "GPU 1 ");
}

#[test]
fn the_doctor_asks_docker_and_misses_named_containers() {
    let Ok(host) = std::env::var("WHARF_TEST_DOCKER") else {
        return support::skip("wharf doctor and Docker: WHARF_TEST_DOCKER names no Docker Engine");
    };
    let dir = tempfile::tempdir().unwrap();
    let yaml =
        "models: { a: { engine: vllm, gpus: 0, docker: { container: nobody-made-this } } }\n";
    std::fs::write(dir.path().join("models.yaml"), yaml).unwrap();
    let (code, report) = doctor(dir.path(), &[("DOCKER_HOST", &host)]);
    assert_eq!(check(&report, "docker", "Docker Engine ").0, "ok");
    let (status, fix) = check(&report, "docker", "no container nobody-made-this (a)");
    assert!(status == "fail" && fix.contains("docker create"), "{report:#}");
    assert_eq!((code, check(&report, "clock", "").0), (1, "ok"), "{report:#}");
}
