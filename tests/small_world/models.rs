//! The worlds: which models, what is loaded when the search begins, how much may happen.

use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::{
    Catalog, EngineKind, GpuProvider, GpuRequest, ModelSpec, Settings, StopSpec, Vram,
};
use wharf::scheduler::event::FaultKind;
use wharf::units::{Bytes, ModelName};

pub const GPU: Bytes = Bytes::gib(24);
/// What a sleeper keeps.
pub const RESIDUE: Bytes = Bytes::gib(1);

pub struct Setup {
    pub name: &'static str,
    pub catalog: Arc<Catalog>,
    /// Loaded (and idle) when the search begins.
    pub loaded: Vec<ModelName>,
    /// Requests that may arrive for each model, in the order of names.
    pub arrivals: [u8; 3],
    /// Moves that may fail, and clients that may leave the queue.
    pub failures: u8,
    pub leaves: u8,
    /// How often time may pass.
    pub ticks: u8,
    /// Nothing has to be brought here first: fetches complete at once.
    pub fetched: bool,
    /// The memory of who was stopped comes back later, by a completion of its own.
    pub late_release: bool,
    /// How starts fail.
    pub fault: FaultKind,
    pub depth: usize,
}

pub fn bytes(spec: &ModelSpec) -> Bytes {
    match spec.vram {
        Vram::Declared(bytes) => bytes,
        Vram::Unknown | Vram::Rest => unreachable!("all sizes are declared here"),
    }
}

fn model(name: &str, gib: u64, gpus: GpuRequest) -> ModelSpec {
    ModelSpec {
        gpus,
        engine: EngineKind::Llamacpp,
        vram: Vram::Declared(Bytes::gib(gib)),
        stop: StopSpec { signal: "SIGTERM".to_owned(), grace: Duration::from_secs(5) },
        ..ModelSpec::plain(name)
    }
}

fn on(gpu: u16) -> GpuRequest {
    GpuRequest::Explicit(vec![gpu.to_string()])
}

fn catalog(models: Vec<ModelSpec>) -> Arc<Catalog> {
    let seconds = Duration::from_secs;
    let mut settings = Settings::default();
    settings.swap.max_wait = Some(seconds(10));
    settings.swap.min_residency = seconds(5);
    settings.swap.drain_timeout = seconds(20);
    settings.swap.vram_timeout = seconds(8);
    settings.swap.start_timeout = seconds(60);
    settings.queue.timeout = seconds(300);
    settings.gpu.provider = GpuProvider::Simulated;
    settings.gpu.memory = vec![GPU, GPU];
    let models = models.into_iter().map(|m| (m.name.clone(), Arc::new(m))).collect();
    Arc::new(Catalog { models, settings, ..Catalog::default() })
}

fn setup(name: &'static str, models: Vec<ModelSpec>, loaded: &[&str]) -> Setup {
    Setup {
        name,
        catalog: catalog(models),
        loaded: loaded.iter().map(ModelName::new).collect(),
        arrivals: [2, 2, 1],
        failures: 1,
        leaves: 1,
        ticks: 3,
        fetched: true,
        late_release: false,
        fault: FaultKind::OutOfMemory,
        depth: 8,
    }
}

/// Two that never fit one GPU together, and a small one beside either.
pub fn singles() -> Setup {
    let any = || GpuRequest::Count(1);
    let models = vec![model("a", 18, any()), model("b", 16, any()), model("c", 12, any())];
    Setup { fault: FaultKind::PortTaken, ..setup("single GPUs", models, &["a", "c"]) }
}

/// One on each GPU, and one that needs them both.
pub fn both() -> Setup {
    let both = GpuRequest::Count(2);
    let models = vec![model("a", 16, on(0)), model("b", 16, on(1)), model("t", 14, both)];
    Setup { arrivals: [1, 1, 2], fetched: false, ..setup("both GPUs", models, &["a", "b"]) }
}

/// One with a single place, whose memory comes back late, and two that want its GPU.
pub fn one_place() -> Setup {
    let mut one = model("a", 18, on(0));
    one.concurrency = Some(1);
    let models = vec![one, model("b", 14, on(0)), model("c", 8, on(1))];
    let arrivals = [3, 1, 1];
    Setup { arrivals, late_release: true, ..setup("one place", models, &["a"]) }
}

/// Two vLLM on one GPU, one of which sleeps, and a plain one beside.
pub fn sleeper() -> Setup {
    let vllm = |name, gib| ModelSpec { engine: EngineKind::Vllm, ..model(name, gib, on(0)) };
    let sleeps = ModelSpec { sleep: Some(1), ..vllm("s", 20) };
    let models = vec![model("p", 3, on(0)), sleeps, vllm("v", 18)];
    Setup { arrivals: [1, 2, 2], ..setup("a sleeper", models, &["s"]) }
}
