//! The engine without Wharf: spawn to its first 200 from /health, SIGTERM to its exit.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::raw;
use super::report::Own;

pub fn process(command: &str, name: &str, dir: &Path) -> anyhow::Result<Own> {
    let port = raw::free_port()?;
    let words = shell_words::split(command)?;
    let ledger = dir.join("alone");
    std::fs::create_dir_all(&ledger)?;
    let log = File::create(dir.join("alone.log"))?;
    let began = Instant::now();
    let mut child = Command::new(words.first().context("a command")?)
        .args(&words[1..])
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .env("WHARF_GPUS", "0")
        .env("WHARF_VRAM_LEDGER", &ledger)
        .env("WHARF_VRAM_TOTAL", (24_u64 << 30).to_string())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let start = raw::until_healthy(port)?.duration_since(began);
    let answer = raw::chat(port, name);
    let began = Instant::now();
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
    child.wait()?;
    let stop = began.elapsed();
    answer.context("an answer of the engine alone")?;
    Ok(Own { create: None, start, stop, remove: None })
}
