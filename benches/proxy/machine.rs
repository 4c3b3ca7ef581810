//! Where and with what it was measured.

use std::fs;
use std::path::Path;
use std::process::Command;

fn first_line(command: &str, argument: &str) -> String {
    let output = Command::new(command).arg(argument).output();
    let words = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&words);
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// Pairs of a name and a value, in the order in which they are shown.
pub fn describe(binary: &Path) -> Vec<(&'static str, String)> {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = memory.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let wrk = first_line("wrk", "-v");
    vec![
        ("date", first_line("date", "-uI")),
        ("processor", model.map_or(String::new(), |(_, name)| name.to_owned())),
        ("cores", cores.to_string()),
        ("memory", format!("{:.0} GiB", total.unwrap_or_default() / 1024.0 / 1024.0)),
        ("kernel", kernel.trim().to_owned()),
        ("wharf", first_line(&binary.display().to_string(), "--version")),
        ("commit", commit()),
        ("rustc", first_line("rustc", "--version")),
        ("nginx", first_line("nginx", "-v").replace("nginx version: ", "")),
        ("wrk", wrk.split('[').next().unwrap_or_default().trim().to_owned()),
    ]
}

fn commit() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let words = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&words).trim().to_owned()
}
