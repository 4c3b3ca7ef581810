//! What a swap costs beyond what the engines themselves need: `make bench-swap`.
//!
//! Two models that do not fit together on one simulated GPU are asked for in turn, so that every
//! request is a swap. In the same run, between the swaps, the same command is started and stopped
//! without Wharf. Swap tax = wall time of the swap (request sent to first byte) less the engine's
//! own stop and start (for Docker: less Docker's own create, start and stop as well).
//!
//! `WHARF_BENCH_SWAPS` sets how many (30). Stand-in processes always run; llama-server if
//! WHARF_TEST_LLAMA and WHARF_TEST_GGUF are set, Docker if WHARF_TEST_DOCKER is. One argument
//! (`process`, `llama`, `docker`) chooses one of them.

#[path = "../support/raw.rs"]
mod raw;

mod alone;
mod docker;
mod report;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;
use wharf::cli::demo::server::Server;

use report::{Report, Round};

pub const EXE: &str = env!("CARGO_BIN_EXE_wharf");
const NAMES: [&str; 2] = ["ada", "bob"];
/// Swaps before those that count: connections, caches and learned figures settle.
const WARM_UP: usize = 4;

/// How one engine is run.
pub enum Kind {
    Process { command: Box<dyn Fn(&str) -> String>, engine: &'static str },
    Docker { host: String },
}

fn main() -> anyhow::Result<()> {
    // Cargo runs benchmarks as tests, too: then two swaps show that it works.
    let short = !std::env::args().any(|arg| arg == "--bench");
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let wants = |name: &str| wanted.as_deref().is_none_or(|wanted| wanted == name);
    let asked = std::env::var("WHARF_BENCH_SWAPS").ok().and_then(|n| n.parse().ok());
    let swaps = asked.unwrap_or(if short { 2 } else { 30 });
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    if wants("process") {
        let command = Box::new(|name: &str| format!("{EXE} engine --name {name} --vram 14GiB"));
        let kind = Kind::Process { command, engine: "openai" };
        bench("process, stand-in engine", kind, swaps, &runtime)?;
    }
    if wants("llama") && !short {
        match (std::env::var("WHARF_TEST_LLAMA"), std::env::var("WHARF_TEST_GGUF")) {
            (Ok(server), Ok(folder)) => {
                let command = Box::new(move |name: &str| {
                    format!("{server} -m {folder}/{name}.gguf -t 1 -tb 1 --alias {name}")
                });
                let kind = Kind::Process { command, engine: "llamacpp" };
                bench("process, llama-server", kind, swaps, &runtime)?;
            }
            _ => println!("llama-server: left out (WHARF_TEST_LLAMA, WHARF_TEST_GGUF)\n"),
        }
    }
    if wants("docker") && !short {
        match std::env::var("WHARF_TEST_DOCKER") {
            Ok(host) => bench("Docker, stand-in engine", Kind::Docker { host }, swaps, &runtime)?,
            Err(_) => println!("Docker: left out (WHARF_TEST_DOCKER)\n"),
        }
    }
    Ok(())
}

fn bench(
    title: &str,
    kind: Kind,
    swaps: usize,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let models: String = NAMES.iter().map(|name| model(&kind, name)).collect();
    let settings = match &kind {
        Kind::Process { engine: "openai", .. } => {
            "gpu: { provider: simulated, memory: [24GiB], release_lag: 0ms, reserve: 256MiB }"
                .into()
        }
        Kind::Process { .. } => "gpu: { provider: none, memory: [24GiB] }".to_owned(),
        Kind::Docker { host } => {
            docker::image(host)?;
            format!("gpu: {{ provider: none, memory: [24GiB] }}\ndocker: {{ host: \"{host}\" }}")
        }
    };
    let yaml = |gateway, orchestrator| {
        format!(
            "listen: {{ gateway: 127.0.0.1:{gateway}, orchestrator: 127.0.0.1:{orchestrator} }}\n\
             engine_ports: 21000-21199\nswap: {{ min_residency: 1ms, on_exit: stop }}\n{settings}\n\
             models:\n{models}"
        )
    };
    let server = runtime.block_on(Server::start(Path::new(EXE), dir.path(), (0, 0), &[], yaml))?;
    let measured = measure(&kind, &server, swaps, runtime, dir.path().to_owned());
    runtime.block_on(server.stop())?;
    let report = measured.with_context(|| {
        std::fs::read_to_string(dir.path().join("wharf.log")).unwrap_or_default()
    })?;
    report.print(title);
    Ok(())
}

fn model(kind: &Kind, name: &str) -> String {
    let run = match kind {
        Kind::Process { command, engine } => {
            let command = command(name);
            format!(
                "engine: {engine}\n    process: {{ cmd: \"{command} --host 127.0.0.1 --port ${{PORT}}\" }}"
            )
        }
        Kind::Docker { .. } => format!("engine: openai\n    docker: {}", docker::spec(name)),
    };
    format!("  {name}:\n    vram: 14GiB\n    {run}\n")
}

fn measure(
    kind: &Kind,
    server: &Server,
    swaps: usize,
    runtime: &tokio::runtime::Runtime,
    dir: PathBuf,
) -> anyhow::Result<Report> {
    let gateway: u16 = port_of(&server.talk.gateway)?;
    let mut report = Report::default();
    for at in 0..swaps + WARM_UP {
        let name = NAMES[at % 2];
        let (began, sent) = (Instant::now(), raw::chat(gateway, name)?);
        ensure!(sent.status == 200, "{name}: {}", sent.text);
        let wall = sent.first_byte.duration_since(began);
        // Once more, now that it is ready: what its answer takes.
        let (began, again) = (Instant::now(), raw::chat(gateway, name)?);
        let hot = again.first_byte.duration_since(began);
        let swap = runtime.block_on(last_swap(server, name))?;
        let own = match kind {
            Kind::Process { command, .. } => alone::process(&command(name), name, &dir)?,
            Kind::Docker { host } => runtime.block_on(docker::alone(host, name))?,
        };
        if at >= WARM_UP {
            report.rounds.push(Round { wall, hot, phases: phases(&swap), own });
        }
    }
    Ok(report)
}

pub fn port_of(base: &str) -> anyhow::Result<u16> {
    Ok(base.rsplit(':').next().context("a port")?.parse()?)
}

async fn last_swap(server: &Server, model: &str) -> anyhow::Result<Value> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let swaps = server.talk.get("/swaps?limit=3").await?;
        let newest = swaps["swaps"].as_array().into_iter().flatten();
        let mut newest = newest.filter(|swap| swap["model"] == model && swap["result"] == "ready");
        if let Some(swap) = newest.next() {
            return Ok(swap.clone());
        }
        ensure!(Instant::now() < until, "no swap to {model}: {swaps}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn phases(swap: &Value) -> Vec<(String, Duration)> {
    let phases = swap["phases"].as_object().into_iter().flatten();
    phases
        .map(|(name, seconds)| {
            (name.clone(), Duration::from_secs_f64(seconds.as_f64().unwrap_or_default()))
        })
        .collect()
}
