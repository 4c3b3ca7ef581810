//! The demo ends as a person ends it: Ctrl-C in a terminal reaches every process of its group.

mod support;

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use support::{EXE, processes_with};

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn ctrl_c_ends_the_demo_with_its_server_and_engines() {
    let temporary = tempfile::tempdir().unwrap();
    let mut demo = Command::new(EXE)
        .arg("demo")
        .env("TMPDIR", temporary.path())
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let state = temporary.path().join(format!("wharf-demo-{}/wharf.d", demo.id()));
    let mut marker = String::new();
    until("an engine runs", || {
        let installation = std::fs::read_to_string(state.join("installation"));
        marker = format!("WHARF_INSTALLATION={}", installation.unwrap_or_default());
        !processes_with(&marker).is_empty()
    });
    let group = Pid::from_raw(i32::try_from(demo.id()).unwrap());
    killpg(group, Signal::SIGINT).unwrap();
    let status = ended(&mut demo);
    assert!(status.success(), "{status}");
    assert!(processes_with(&marker).is_empty(), "engines are left over");
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
