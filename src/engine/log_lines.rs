//! What lines of an engine's log mean while it loads: phases, known causes of failure.

use crate::config::catalog::EngineKind;
use crate::scheduler::event::FaultKind;

#[derive(Clone, Debug, PartialEq)]
pub enum Meaning {
    /// The engine is in this phase, so far (0.0..=1.0), where that can be told.
    Phase(&'static str, Option<f32>),
    /// It says that it is ready: worth asking at once.
    Ready,
    /// The start cannot succeed any more.
    Fatal(Cause),
    /// Explains a failure, if one follows.
    Hint(Cause),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Cause {
    pub kind: FaultKind,
    pub fix: &'static str,
}

pub fn meaning(engine: EngineKind, line: &str) -> Option<Meaning> {
    let own = match engine {
        EngineKind::Vllm => VLLM_FAILURES,
        EngineKind::Llamacpp => LLAMACPP_FAILURES,
        EngineKind::Openai | EngineKind::Ollama | EngineKind::Http => &[],
    };
    failure(own, line).or_else(|| failure(FAILURES, line)).or_else(|| match engine {
        EngineKind::Vllm => phase(VLLM_PHASES, line),
        EngineKind::Llamacpp => llamacpp_dots(line).or_else(|| phase(LLAMACPP_PHASES, line)),
        EngineKind::Openai | EngineKind::Ollama | EngineKind::Http => {
            let ready = READY.iter().any(|needle| line.contains(needle)).then_some(Meaning::Ready);
            ready.or_else(|| percent(line).map(|part| Meaning::Phase("load", Some(part))))
        }
    })
}

/// How servers of any kind say that they listen (uvicorn, gunicorn, Go's and Node's habits). A line
/// that says so by mistake costs one question.
const READY: &[&str] = &[
    "Uvicorn running on",
    "Application startup complete",
    "istening on",
    "istening at",
    "running on http",
    "ready on http",
    "GUI go to: http",
];

struct Failure {
    needle: &'static str,
    kind: FaultKind,
    certain: bool,
    fix: &'static str,
}

const fn fatal(needle: &'static str, kind: FaultKind, fix: &'static str) -> Failure {
    Failure { needle, kind, certain: true, fix }
}

const fn hint(needle: &'static str, kind: FaultKind, fix: &'static str) -> Failure {
    Failure { needle, kind, certain: false, fix }
}

fn failure(table: &[Failure], line: &str) -> Option<Meaning> {
    let failure = table.iter().find(|failure| line.contains(failure.needle))?;
    let cause = Cause { kind: failure.kind, fix: failure.fix };
    Some(if failure.certain { Meaning::Fatal(cause) } else { Meaning::Hint(cause) })
}

const MORE_VRAM: &str = "the GPU has less memory left than the model takes: raise `vram:` to what \
    it really needs, shorten its context, or make room on the GPU";
const SMALLER: &str = "raise `vram:`, or lower the context length (`--max-model-len`)";
const LICENCE: &str = "accept the model's licence on huggingface.co and give HF_TOKEN in `env:`";
const PORT: &str = "another program listens on the port";
const ARGUMENT: &str = "this version of the engine does not know that argument: correct it, or \
    update the engine";
const MODEL_PATH: &str = "check the model's name or path, and what is mounted";
const DRIVER: &str = "the NVIDIA driver is missing or too old for this engine: update it, and \
    start containers with the NVIDIA Container Toolkit";
const SEE_LOG: &str = "the log lines before it say why";

const FAILURES: &[Failure] = &[
    fatal("CUDA out of memory", FaultKind::OutOfMemory, MORE_VRAM),
    fatal("GatedRepoError", FaultKind::FetchDenied, LICENCE),
    fatal("Cannot access gated repo", FaultKind::FetchDenied, LICENCE),
    fatal("You are trying to access a gated repo", FaultKind::FetchDenied, LICENCE),
    fatal("RepositoryNotFoundError", FaultKind::FetchDenied, LICENCE),
    hint("401 Client Error", FaultKind::FetchDenied, LICENCE),
    hint("403 Client Error", FaultKind::FetchDenied, LICENCE),
    hint("is not a valid model identifier", FaultKind::FetchFailed, MODEL_PATH),
    hint("LocalEntryNotFoundError", FaultKind::FetchFailed, "the network, or HF_HUB_OFFLINE"),
    hint("No space left on device", FaultKind::DiskFull, "free disk space, or raise `shm_size:`"),
    fatal("Address already in use", FaultKind::PortTaken, PORT),
    fatal("address already in use", FaultKind::PortTaken, PORT),
    fatal("CUDA driver version is insufficient", FaultKind::GpuDriverMissing, DRIVER),
    hint("no CUDA-capable device is detected", FaultKind::GpuDriverMissing, DRIVER),
    hint("Found no NVIDIA driver on your system", FaultKind::GpuDriverMissing, DRIVER),
];

const VLLM_FAILURES: &[Failure] = &[
    fatal("ValueError: Free memory on device", FaultKind::OutOfMemory, MORE_VRAM),
    fatal("No available memory for the cache blocks", FaultKind::OutOfMemory, SMALLER),
    fatal("larger than the available KV cache memory", FaultKind::OutOfMemory, SMALLER),
    fatal("error: unrecognized arguments", FaultKind::BadSpec, ARGUMENT),
    // A consequence: what was noted before it is the cause.
    fatal("Engine core initialization failed", FaultKind::FatalLogLine, SEE_LOG),
];

const LLAMACPP_FAILURES: &[Failure] = &[
    // While it fits its parameters to the memory it may fail to load and go on after all.
    hint("cudaMalloc failed: out of memory", FaultKind::OutOfMemory, MORE_VRAM),
    hint("failed to allocate", FaultKind::OutOfMemory, MORE_VRAM),
    hint("failed to open GGUF file", FaultKind::FatalLogLine, MODEL_PATH),
    hint("error loading model", FaultKind::FatalLogLine, MODEL_PATH),
    hint("failed to load model", FaultKind::FatalLogLine, MODEL_PATH),
    fatal("exiting due to model loading error", FaultKind::FatalLogLine, SEE_LOG),
    fatal("error: invalid argument", FaultKind::BadSpec, ARGUMENT),
    fatal("couldn't bind", FaultKind::PortTaken, PORT),
];

enum Part {
    Percent,
    Fixed(f32),
    Unknown,
    Ready,
}

fn phase(table: &[(&str, &'static str, Part)], line: &str) -> Option<Meaning> {
    let (_, stage, part) = table.iter().find(|(needle, ..)| line.contains(needle))?;
    Some(match part {
        Part::Percent => Meaning::Phase(stage, percent(line)),
        Part::Fixed(part) => Meaning::Phase(stage, Some(*part)),
        Part::Unknown => Meaning::Phase(stage, None),
        Part::Ready => Meaning::Ready,
    })
}

const VLLM_PHASES: &[(&str, &str, Part)] = &[
    ("Starting to load model", "load_weights", Part::Fixed(0.0)),
    ("checkpoint shards", "load_weights", Part::Percent),
    ("Loading weights took", "load_weights", Part::Fixed(1.0)),
    ("Model loading took", "load_weights", Part::Fixed(1.0)),
    ("Dynamo bytecode transform time", "compile", Part::Unknown),
    ("torch.compile takes", "compile", Part::Fixed(1.0)),
    ("GPU KV cache size", "size_kv_cache", Part::Fixed(1.0)),
    ("Capturing CUDA graph", "capture_graphs", Part::Percent),
    ("Graph capturing finished", "capture_graphs", Part::Fixed(1.0)),
    ("init engine (", "warm_up", Part::Fixed(1.0)),
    ("Application startup complete", "", Part::Ready),
    ("Uvicorn running on", "", Part::Ready),
];

const LLAMACPP_PHASES: &[(&str, &str, Part)] = &[
    ("llama_model_loader: loaded meta data", "read_metadata", Part::Unknown),
    ("load_model: loading model", "load_weights", Part::Fixed(0.0)),
    ("load_tensors: loading model tensors", "load_weights", Part::Fixed(0.0)),
    ("load_tensors: offload", "load_weights", Part::Unknown),
    ("model buffer size", "load_weights", Part::Unknown),
    ("llama_context:", "size_kv_cache", Part::Unknown),
    ("llama_kv_cache", "size_kv_cache", Part::Unknown),
    ("load_model: initializing", "size_kv_cache", Part::Unknown),
    ("warming up the model", "warm_up", Part::Unknown),
    ("model loaded", "", Part::Ready),
    ("server is listening", "", Part::Ready),
];

/// llama.cpp prints a dot for each percent.
fn llamacpp_dots(line: &str) -> Option<Meaning> {
    let dots = line.trim();
    let only_dots = dots.len() > 3 && dots.bytes().all(|byte| byte == b'.');
    only_dots.then(|| Meaning::Phase("load_weights", Some((dots.len() as f32 / 100.0).min(1.0))))
}

/// The last `n%` of the line: progress bars redraw themselves on one line.
fn percent(line: &str) -> Option<f32> {
    let before = &line[..line.rfind('%')?];
    let start = before
        .rfind(|c: char| !c.is_ascii_digit() && c != '.')
        .map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8));
    let percent: f32 = before[start..].parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(engine: EngineKind, line: &str) -> Option<(FaultKind, bool)> {
        match meaning(engine, line)? {
            Meaning::Fatal(cause) => Some((cause.kind, true)),
            Meaning::Hint(cause) => Some((cause.kind, false)),
            Meaning::Phase(..) | Meaning::Ready => None,
        }
    }

    #[test]
    fn vllm_phases_are_read() {
        let phase = |line| meaning(EngineKind::Vllm, line);
        let shards = "\rLoading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03]\r\
                      Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:02<00:02]";
        assert_eq!(phase(shards), Some(Meaning::Phase("load_weights", Some(0.5))));
        let graphs = "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|███| 67/67";
        assert_eq!(phase(graphs), Some(Meaning::Phase("capture_graphs", Some(1.0))));
        assert_eq!(
            phase("INFO [kv_cache_utils.py:1] GPU KV cache size: 1,234 tokens"),
            Some(Meaning::Phase("size_kv_cache", Some(1.0)))
        );
        assert_eq!(phase("INFO:     Application startup complete."), Some(Meaning::Ready));
        assert_eq!(phase("INFO 01-01 00:00:00 nothing of note"), None);
    }

    #[test]
    fn llamacpp_phases_are_read() {
        let phase = |line| meaning(EngineKind::Llamacpp, line);
        let dots = ".".repeat(40);
        assert_eq!(phase(&dots), Some(Meaning::Phase("load_weights", Some(0.4))));
        assert_eq!(phase("..."), None);
        assert_eq!(
            phase("load_tensors: loading model tensors, this can take a while... (mmap = true)"),
            Some(Meaning::Phase("load_weights", Some(0.0)))
        );
        assert_eq!(phase("main: model loaded"), Some(Meaning::Ready));
    }

    #[test]
    fn any_percentage_counts_for_a_generic_engine() {
        let phase = |line| meaning(EngineKind::Openai, line);
        assert_eq!(phase("loading 30%"), Some(Meaning::Phase("load", Some(0.3))));
        assert_eq!(phase("é12.5% done"), Some(Meaning::Phase("load", Some(0.125))));
        assert_eq!(phase("ready on http://127.0.0.1:18051"), Some(Meaning::Ready));
        assert_eq!(phase("INFO: Uvicorn running on http://0.0.0.0:8000"), Some(Meaning::Ready));
        assert_eq!(phase("400% faster"), None);
        assert_eq!(phase("%"), None);
    }

    #[test]
    fn known_failures_are_recognised() {
        let vllm = |line| kind(EngineKind::Vllm, line);
        assert_eq!(
            vllm("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
            Some((FaultKind::OutOfMemory, true))
        );
        assert_eq!(
            vllm("ValueError: Free memory on device cuda:0 (3.1/24.0 GiB) on startup is less than"),
            Some((FaultKind::OutOfMemory, true))
        );
        assert_eq!(
            vllm("huggingface_hub.errors.GatedRepoError: 403 Client Error."),
            Some((FaultKind::FetchDenied, true))
        );
        assert_eq!(
            vllm("OSError: [Errno 98] Address already in use"),
            Some((FaultKind::PortTaken, true))
        );
        let llama = |line| kind(EngineKind::Llamacpp, line);
        assert_eq!(
            llama("llama_model_load: error loading model: tensor 'x' has wrong shape"),
            Some((FaultKind::FatalLogLine, false))
        );
        assert_eq!(
            llama("E srv  llama_server: exiting due to model loading error"),
            Some((FaultKind::FatalLogLine, true))
        );
        assert_eq!(
            llama("allocating 900.00 MiB on device 0: cudaMalloc failed: out of memory"),
            Some((FaultKind::OutOfMemory, false))
        );
        assert_eq!(kind(EngineKind::Openai, "error loading model"), None);
    }
}
