//! What reading ahead saves: `make bench-read-ahead`.
//!
//! A real llama-server and a 2 GB GGUF whose page cache is dropped, asked for while another model
//! still answers a stream of 3 s. With `read_ahead: true`, with `false`, and (for comparison) with
//! the file in the cache already; with llama-server's mmap and without. Interleaved, medians.
//! *To ready*: from the end of that stream until the model is ready.
//!
//! Needs WHARF_TEST_LLAMA (the server) and WHARF_TEST_LARGE_GGUF. `WHARF_BENCH_ROUNDS`: 5.

#[path = "../support/raw.rs"]
#[expect(dead_code, reason = "used in part")]
mod raw;

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::Value;
use wharf::cli::demo::server::Server;

const EXE: &str = env!("CARGO_BIN_EXE_wharf");
const DRAIN_TOKENS: u32 = 30;
const TOKENS_PER_SECOND: u32 = 10;

/// One way of starting, and what was measured of it.
struct Case {
    title: &'static str,
    model: &'static str,
    cached: bool,
    to_ready: Vec<f64>,
    start: Vec<f64>,
    first_byte: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let given = (std::env::var("WHARF_TEST_LLAMA"), std::env::var("WHARF_TEST_LARGE_GGUF"));
    let (Ok(llama), Ok(gguf)) = given else {
        println!("left out: WHARF_TEST_LLAMA and WHARF_TEST_LARGE_GGUF are not set");
        return Ok(());
    };
    if !std::env::args().any(|arg| arg == "--bench") {
        return Ok(());
    }
    let rounds = std::env::var("WHARF_BENCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    let case = |title, model, cached| {
        let (to_ready, start, first_byte) = (Vec::new(), Vec::new(), Vec::new());
        Case { title, model, cached, to_ready, start, first_byte }
    };
    let mut cases = [
        case("mmap, read ahead", "mapped", false),
        case("mmap, not read ahead", "mapped-cold", false),
        case("mmap, cached before", "mapped-cold", true),
        case("--no-mmap, read ahead", "read", false),
        case("--no-mmap, not read ahead", "read-cold", false),
        case("--no-mmap, cached before", "read-cold", true),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let dir = tempfile::tempdir()?;
    let yaml = |gateway, orchestrator| models(&llama, &gguf, gateway, orchestrator);
    let server = runtime.block_on(Server::start(Path::new(EXE), dir.path(), (0, 0), &[], yaml))?;
    let mut measure = || {
        for _ in 0..rounds {
            for case in &mut cases {
                round(case, &server, &runtime, Path::new(&gguf))?;
            }
        }
        anyhow::Ok(())
    };
    let measured = measure();
    let log = std::fs::read_to_string(dir.path().join("wharf.log")).unwrap_or_default();
    runtime.block_on(server.stop())?;
    measured.context(log.clone())?;
    let size = std::fs::metadata(&gguf)?.len() as f64 / 1e9;
    println!("{size:.2} GB GGUF, drain of 3 s, {rounds} rounds, medians in seconds");
    println!("{:<28} {:>10} {:>10} {:>12}", "", "to ready", "start", "first byte");
    for case in &mut cases {
        let [ready, start, first] =
            [&mut case.to_ready, &mut case.start, &mut case.first_byte].map(|list| median(list));
        println!("{:<28} {ready:>10.2} {start:>10.2} {first:>12.2}", case.title);
    }
    for line in log.lines().filter(|line| line.contains("read ahead")).take(4) {
        println!("{line}");
    }
    Ok(())
}

fn models(llama: &str, gguf: &str, gateway: u16, orchestrator: u16) -> String {
    let large = |name: &str, flags: &str, read_ahead: bool| {
        format!(
            "  {name}:\n    engine: llamacpp\n    vram: 14GiB\n    read_ahead: {read_ahead}\n    \
             process: {{ cmd: \"{llama} -m {gguf} --alias {name} -t 1 -tb 1 --no-warmup {flags} \
             --host 127.0.0.1 --port ${{PORT}}\" }}\n"
        )
    };
    format!(
        "listen: {{ gateway: 127.0.0.1:{gateway}, orchestrator: 127.0.0.1:{orchestrator} }}\n\
         engine_ports: 21200-21299\nswap: {{ min_residency: 1ms, max_wait: 1ms }}\n\
         gpu: {{ provider: none, memory: [24GiB] }}\nmodels:\n  before:\n    engine: openai\n    \
         vram: 14GiB\n    process: {{ cmd: \"{EXE} engine --name before --tokens-per-second \
         {TOKENS_PER_SECOND} --host 127.0.0.1 --port ${{PORT}}\" }}\n{}{}{}{}",
        large("mapped", "", true),
        large("mapped-cold", "", false),
        large("read", "--no-mmap", true),
        large("read-cold", "--no-mmap", false),
    )
}

fn round(
    case: &mut Case,
    server: &Server,
    runtime: &tokio::runtime::Runtime,
    gguf: &Path,
) -> anyhow::Result<()> {
    let gateway: u16 = server.talk.gateway.rsplit(':').next().context("a port")?.parse()?;
    // Whoever was there before is gone: nobody maps the file any more.
    let answer = raw::chat(gateway, "before")?;
    ensure!(answer.status == 200, "{}", answer.text);
    cache(gguf, case.cached)?;
    let body = raw::chat_body("before", true, DRAIN_TOKENS);
    let mut stream = raw::send(gateway, "POST", "/v1/chat/completions", &body)?;
    stream.read_exact(&mut [0])?;
    let stream = std::thread::spawn(move || {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).map(|_| Instant::now())
    });
    // Random weights do not always keep to UTF-8, which llama-server answers with 500: an answer of
    // the engine is all that is wanted.
    let body = serde_json::json!({ "model": case.model, "prompt": "hi", "max_tokens": 1 });
    let answer = raw::ask(gateway, "POST", "/v1/completions", &body.to_string())?;
    ensure!(answer.text.contains("x-wharf-model"), "{answer:?}");
    let ended = stream.join().map_err(|_| anyhow::anyhow!("the stream"))??;
    let swaps = runtime.block_on(server.talk.get("/swaps?limit=5"))?;
    let newest = swaps["swaps"].as_array().into_iter().flatten();
    let swap = newest.into_iter().find(|swap| swap["model"] == case.model).context("the swap")?;
    let phase = |name: &str| swap["phases"][name].as_f64().unwrap_or_default();
    case.to_ready.push(["vacate", "prove", "start", "vouch"].into_iter().map(phase).sum());
    case.start.push(phase("start"));
    case.first_byte.push(answer.first_byte.saturating_duration_since(ended).as_secs_f64());
    ensure!(
        phase("drain") > 1.0,
        "the stream did not hold it: {swap:#}",
        swap = Value::clone(swap)
    );
    Ok(())
}

/// Drops the file from the page cache, or reads it into it.
fn cache(path: &Path, cached: bool) -> anyhow::Result<()> {
    let mut file = File::open(path)?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    if cached {
        std::io::copy(&mut file, &mut std::io::sink())?;
    }
    std::thread::sleep(Duration::from_millis(100));
    Ok(())
}

fn median(list: &mut [f64]) -> f64 {
    list.sort_unstable_by(f64::total_cmp);
    list.get(list.len() / 2).copied().unwrap_or_default()
}
