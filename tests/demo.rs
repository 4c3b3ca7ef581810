//! The demo ends as a person ends it: Ctrl-C in a terminal reaches every process of its group.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use support::{EXE, processes_with};

/// Two demos at the same moment would find the same ports free.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
const PATIENCE: Duration = Duration::from_secs(120);

// contract: CLI demo
#[test]
fn ctrl_c_ends_the_demo_with_its_server_and_engines() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let temporary = tempfile::tempdir().unwrap();
    let (mut demo, group) = start(temporary.path(), Stdio::null());
    let state = temporary.path().join(format!("wharf-demo-{}/wharf.d", demo.id()));
    let mut marker = String::new();
    until("an engine runs", || {
        let installation = std::fs::read_to_string(state.join("installation"));
        marker = format!("WHARF_INSTALLATION={}", installation.unwrap_or_default());
        !processes_with(&marker).is_empty()
    });
    killpg(group, Signal::SIGINT).unwrap();
    let status = ended(&mut demo);
    assert!(status.success(), "{status}");
    assert!(processes_with(&marker).is_empty(), "engines are left over");
}

#[test]
fn the_demo_shows_the_requests_of_its_visitor() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let temporary = tempfile::tempdir().unwrap();
    let (mut demo, group) = start(temporary.path(), Stdio::piped());
    let (tell, told) = mpsc::channel();
    let stdout = BufReader::new(demo.stdout.take().unwrap());
    std::thread::spawn(move || stdout.lines().map_while(Result::ok).all(|l| tell.send(l).is_ok()));
    let next = |wanted: &str| loop {
        let line = told.recv_timeout(PATIENCE).expect(wanted);
        if line.contains(wanted) {
            break line;
        }
    };
    let gateway = next("gateway      http://");
    let address = gateway.split(['/', ' ']).find(|word| word.contains("127.0.0.1")).unwrap();
    let body = r#"{"model":"llava","messages":[]}"#;
    let mut visitor = TcpStream::connect(address).unwrap();
    let head = format!("content-length: {}\r\nconnection: close", body.len());
    write!(
        visitor,
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\n{head}\r\n\r\n{body}"
    )
    .unwrap();
    next("→ your request for llava arrives");
    next("your request for llava waits: ");
    next("your request for llava: answered by llava in ");
    killpg(group, Signal::SIGINT).unwrap();
    assert!(ended(&mut demo).success());
}

/// The demo with its state under `temporary`, as the leader of a process group of its own.
fn start(temporary: &Path, stdout: Stdio) -> (Child, Pid) {
    let demo = Command::new(EXE)
        .arg("demo")
        .env("TMPDIR", temporary)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::null())
        .spawn()
        .expect("the demo");
    let group = Pid::from_raw(i32::try_from(demo.id()).expect("a pid"));
    (demo, group)
}

fn ended(child: &mut Child) -> ExitStatus {
    let mut status = None;
    until("the demo ended", || {
        status = child.try_wait().expect("it can be waited for");
        status.is_some()
    });
    status.expect("it ended")
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
