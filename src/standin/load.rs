//! The load: phases with the log lines of the engine it resembles, and memory that grows.

use std::time::Duration;

use super::engine::{Engine, say};
use super::ledger::Shortage;
use super::options::{FatalThen, Style};
use crate::units::Bytes;

/// One part of a load.
struct Step {
    /// Part of the whole load time that passes before `lines` appear.
    share: f64,
    /// Part of the memory held from then on.
    vram: f64,
    lines: Vec<String>,
}

/// Why there is no engine after all.
#[derive(Debug)]
pub enum LoadError {
    OutOfMemory,
    FatalLine,
}

pub async fn load(engine: &Engine) -> Result<(), LoadError> {
    let options = &engine.options;
    let total = options.load.load_time;
    // vLLM looks at the free memory first of all and gives up if its share is not there.
    if options.style == Style::Vllm
        && let Err(shortage) = engine.room_for(engine.vram())
    {
        say(&free_memory_line(&shortage));
        return Err(LoadError::OutOfMemory);
    }
    let steps = steps(engine, total);
    let half = steps.len() / 2;
    for (at, step) in steps.into_iter().enumerate() {
        if at == half {
            faults(engine).await?;
        }
        tokio::time::sleep(total.mul_f64(step.share)).await;
        if let Err(shortage) = engine.hold(Bytes((engine.vram().0 as f64 * step.vram) as u64)) {
            say(&out_of_memory_line(&shortage));
            return Err(LoadError::OutOfMemory);
        }
        step.lines.iter().for_each(|line| say(line));
    }
    Ok(())
}

async fn faults(engine: &Engine) -> Result<(), LoadError> {
    let faults = &engine.options.faults;
    if let Some(line) = &faults.fatal_line {
        say(line);
        match faults.fatal_then {
            FatalThen::Exit => return Err(LoadError::FatalLine),
            FatalThen::Hang => std::future::pending::<()>().await,
        }
    }
    if faults.hang_load {
        std::future::pending::<()>().await;
    }
    Ok(())
}

fn steps(engine: &Engine, total: Duration) -> Vec<Step> {
    match engine.options.style {
        Style::Vllm => vllm(engine, total),
        Style::Llamacpp => llamacpp(engine),
        Style::Plain | Style::Ollama => plain(),
    }
}

fn plain() -> Vec<Step> {
    (1..=10)
        .map(|tenth| Step {
            share: 0.1,
            vram: f64::from(tenth) / 10.0,
            lines: vec![format!("loading {}%", tenth * 10)],
        })
        .collect()
}

/// Lines of vLLM 0.32, in their order; seconds follow from the load time.
fn vllm(engine: &Engine, total: Duration) -> Vec<Step> {
    let pid = std::process::id();
    let core = |line: String| format!("(EngineCore pid={pid}) INFO 01-01 00:00:00 {line}");
    let seconds = |share: f64| total.mul_f64(share).as_secs_f64();
    let gib = engine.vram().0 as f64 / Bytes::gib(1).0 as f64;
    let step = |share, vram, line: String| Step { share, vram, lines: vec![line] };
    let mut steps = vec![
        step(
            0.0,
            0.0,
            format!(
                "(APIServer pid={pid}) INFO 01-01 00:00:00 [api_server.py:1] vLLM API server (stand-in)"
            ),
        ),
        step(0.05, 0.05, core("[core.py:1] Initializing a V1 LLM engine".into())),
    ];
    const SHARDS: u32 = 8;
    for shard in 0..=SHARDS {
        let percent = shard * 100 / SHARDS;
        steps.push(step(
            if shard == 0 { 0.0 } else { 0.4 / f64::from(SHARDS) },
            0.05 + 0.5 * f64::from(shard) / f64::from(SHARDS),
            format!(
                "Loading safetensors checkpoint shards: {percent:3}% Completed | {shard}/{SHARDS} [00:00<00:00]"
            ),
        ));
    }
    let tokens = engine.vram().as_mib() * 8;
    let lines = [
        (
            0.0,
            0.55,
            format!("[default_loader.py:1] Loading weights took {:.2} seconds", seconds(0.4)),
        ),
        (
            0.05,
            0.55,
            format!(
                "[gpu_model_runner.py:1] Model loading took {:.4} GiB memory and {:.6} seconds",
                gib * 0.5,
                seconds(0.45)
            ),
        ),
        (
            0.15,
            0.6,
            format!("[backends.py:1] Dynamo bytecode transform time: {:.2} s", seconds(0.15)),
        ),
        (0.15, 0.65, format!("[monitor.py:1] torch.compile takes {:.2} s in total", seconds(0.3))),
        (0.05, 0.95, format!("[kv_cache_utils.py:1] GPU KV cache size: {tokens} tokens")),
        (
            0.1,
            1.0,
            format!(
                "[gpu_model_runner.py:1] Graph capturing finished in {:.0} secs, took 0.25 GiB",
                seconds(0.1)
            ),
        ),
        (
            0.05,
            1.0,
            format!(
                "[core.py:1] init engine (profile, create kv cache, warmup model) took {:.2} seconds",
                seconds(0.5)
            ),
        ),
    ];
    steps.extend(lines.map(|(share, vram, line)| step(share, vram, core(line))));
    steps
}

/// Lines of llama-server.
fn llamacpp(engine: &Engine) -> Vec<Step> {
    let step = |share, vram, line: &str| Step { share, vram, lines: vec![line.to_owned()] };
    let buffer = format!(
        "load_tensors:        CUDA0 model buffer size = {:8.2} MiB",
        engine.vram().as_mib() as f64 * 0.8
    );
    vec![
        step(0.0, 0.0, "main: loading model (stand-in)"),
        step(0.1, 0.1, "llama_model_loader: loaded meta data with 28 key-value pairs"),
        step(
            0.1,
            0.2,
            "load_tensors: loading model tensors, this can take a while... (mmap = true)",
        ),
        step(0.3, 0.5, "load_tensors: offloaded 33/33 layers to GPU"),
        step(0.3, 0.8, &buffer),
        step(0.1, 0.95, "llama_context: n_ctx         = 4096"),
        step(0.1, 1.0, "main: model loaded"),
    ]
}

fn free_memory_line(shortage: &Shortage) -> String {
    let gib = |bytes: Bytes| bytes.0 as f64 / Bytes::gib(1).0 as f64;
    format!(
        "ValueError: Free memory on device cuda:{} ({:.2}/{:.2} GiB) on startup is less than desired \
         GPU memory utilization ({:.2} GiB). Decrease GPU memory utilization or reduce GPU memory \
         used by other processes.",
        shortage.gpu,
        gib(shortage.free),
        gib(shortage.total),
        gib(shortage.wanted)
    )
}

pub fn out_of_memory_line(shortage: &Shortage) -> String {
    format!(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {}. GPU {} has a total \
         capacity of {} of which {} is free.",
        shortage.wanted, shortage.gpu, shortage.total, shortage.free
    )
}
