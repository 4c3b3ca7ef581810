//! wrk, told what to send and asked for figures instead of words.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::wire::{self, Wanted};

/// What wrk measured; times in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub per_second: f64,
    pub p50: f64,
    pub p99: f64,
    pub mean: f64,
    pub requests: f64,
}

/// A load: what is sent, by how many connections.
pub struct Load {
    pub script: PathBuf,
    pub connections: usize,
}

impl Load {
    /// `name` is the script's; requests of at least `sent` bytes for answers of `received`.
    pub fn new(
        work: &Path,
        name: &str,
        connections: usize,
        (sent, received): (usize, usize),
    ) -> io::Result<Load> {
        let (script, file) = (work.join(format!("{name}.lua")), work.join(format!("{name}.json")));
        fs::write(&file, wire::body(Wanted::Json { bytes: received }, sent))?;
        let file = file.display();
        // A non-200 answer is an error to wrk already; `done` is called once at the end.
        fs::write(
            &script,
            format!(
                "wrk.method = 'POST'\n\
                 wrk.headers['content-type'] = 'application/json'\n\
                 wrk.body = io.open('{file}', 'rb'):read('*a')\n\
                 function done(summary, latency, requests)\n\
                 local e = summary.errors\n\
                 local errors = e.connect + e.read + e.write + e.status + e.timeout\n\
                 print(string.format('FIGURES %d %d %d %.1f %.1f %.1f', summary.requests,\n\
                 summary.duration, errors, latency:percentile(50), latency:percentile(99), latency.mean))\n\
                 end\n"
            ),
        )?;
        Ok(Load { script, connections })
    }

    pub fn run(&self, target: SocketAddr, time: Duration) -> io::Result<Measured> {
        let threads = self.connections.min(2);
        let output = Command::new("wrk")
            .args(["-t", &threads.to_string(), "-c", &self.connections.to_string()])
            .args(["-d", &format!("{}s", time.as_secs().max(1)), "--timeout", "20s", "-s"])
            .arg(&self.script)
            .arg(format!("http://{target}/v1/chat/completions"))
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find_map(|line| line.strip_prefix("FIGURES "));
        let figures: Option<Vec<f64>> =
            line.map(|line| line.split(' ').filter_map(|word| word.parse().ok()).collect());
        match figures.as_deref() {
            Some(&[requests, duration, 0.0, p50, p99, mean])
                if requests > 0.0 && duration > 0.0 =>
            {
                Ok(Measured { per_second: requests * 1e6 / duration, p50, p99, mean, requests })
            }
            _ => {
                let words = String::from_utf8_lossy(&output.stderr);
                Err(io::Error::other(format!("wrk to {target}: {text}{words}")))
            }
        }
    }
}
