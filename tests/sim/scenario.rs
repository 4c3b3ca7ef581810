//! What one run consists of: a machine, a catalog, how engines really behave, and a script.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::{
    Catalog, GpuProvider, GpuRequest, GpuSettings, ModelSpec, Settings, SwapSettings, Vram,
};
use wharf::scheduler::event::{EnsureKind, Learned};
use wharf::units::{Bytes, GpuId, ModelName, Priority};

use crate::host::Host;
use crate::machine::Gpu;
use crate::stay::Stay;

/// How an engine really behaves. Times in milliseconds, (least, most).
#[derive(Clone, Debug)]
pub struct Truth {
    /// Bytes on each GPU when ready; with `Vram::Rest` what the start action says.
    pub awake: Bytes,
    pub residue: Bytes,
    pub fetch_ms: (u64, u64),
    pub start_ms: (u64, u64),
    pub stop_ms: (u64, u64),
    /// From the end of the process until its memory is free.
    pub release_ms: (u64, u64),
    pub sleep_ms: (u64, u64),
    pub wake_ms: (u64, u64),
    /// Never comes up.
    pub broken: bool,
    /// Its memory is not released before the faults stop.
    pub never_frees: bool,
    /// Host RAM that it takes while its process lives.
    pub ram: Bytes,
}

impl Truth {
    pub fn quick(awake: Bytes) -> Truth {
        Truth {
            awake,
            residue: Bytes::mib(600),
            fetch_ms: (0, 5),
            start_ms: (1000, 1000),
            stop_ms: (100, 100),
            release_ms: (50, 50),
            sleep_ms: (100, 100),
            wake_ms: (200, 200),
            broken: false,
            never_frees: false,
            ram: Bytes::ZERO,
        }
    }
}

/// Chances per mille that an effect goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    pub preflight: u32,
    pub fetch: u32,
    pub start_transient: u32,
    pub start_crash: u32,
    pub start_hang: u32,
    pub stop_fail: u32,
    pub sleep_fail: u32,
    pub wake_fail: u32,
    pub late_release: u32,
    pub stuck_release: u32,
    pub duplicate: u32,
    pub stale: u32,
    /// That an instance dies during a lease.
    pub crash_serving: u32,
    /// That the end of a client reaches the owner late.
    pub late_gone: u32,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub model: ModelName,
    pub service_ms: u64,
    /// From the lease to the response head: before it, a retry is safe.
    pub head_ms: u64,
    pub leaves_queue_after: Option<u64>,
    pub leaves_flight_after: Option<u64>,
    pub never_start: bool,
    pub priority: Priority,
    pub max_wait: Option<Duration>,
    /// A probe after the faults stopped: must be served.
    pub must_be_served: bool,
}

impl Plan {
    pub fn new(model: &ModelName, service_ms: u64) -> Plan {
        Plan {
            model: model.clone(),
            service_ms,
            head_ms: service_ms / 4,
            leaves_queue_after: None,
            leaves_flight_after: None,
            never_start: false,
            priority: Priority::Normal,
            max_wait: None,
            must_be_served: false,
        }
    }
}

/// A client that asks again after each answer, for its models in turn.
#[derive(Clone, Debug)]
pub struct Loop {
    pub turns: Vec<Plan>,
    pub think_ms: u64,
    pub until: u64,
    /// Requests it still makes.
    pub left: usize,
}

#[derive(Clone, Debug)]
pub enum Step {
    Arrive(Plan),
    Loop(Loop),
    Ensure {
        model: ModelName,
        kind: EnsureKind,
        timeout_ms: u64,
        gone_after: Option<u64>,
    },
    Unload {
        model: ModelName,
        force: bool,
    },
    Stay {
        model: ModelName,
        stay: Stay,
    },
    /// Somebody asked for `group/model`.
    Company {
        group: String,
    },
    Reload(Arc<Catalog>, BTreeMap<ModelName, Truth>),
    /// A stranger takes memory and gives it back.
    Foreign {
        gpu: GpuId,
        bytes: Bytes,
        for_ms: u64,
    },
    HostForeign {
        bytes: Bytes,
        for_ms: u64,
    },
    NoProof {
        for_ms: u64,
    },
    RuntimeDown {
        for_ms: u64,
    },
    Crash {
        model: ModelName,
    },
    FaultsOff,
    Shutdown,
}

#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    pub gpus: Vec<Gpu>,
    /// `None`: host RAM is no matter.
    pub host: Option<Host>,
    pub proof: bool,
    /// The scheduler is told of no GPU at all: room for one model at a time.
    pub unseen: bool,
    pub catalog: Arc<Catalog>,
    pub truth: BTreeMap<ModelName, Truth>,
    pub faults: Faults,
    /// Milliseconds between background memory samples.
    pub sample_every: u64,
    pub steps: Vec<(u64, Step)>,
    /// Ready when the scheduler begins.
    pub adopted: Vec<(ModelName, Vec<GpuId>)>,
    /// What earlier runs taught.
    pub remembered: Vec<(ModelName, Learned)>,
    /// From here on nothing is asked any more and nothing goes wrong.
    pub quiet_from: u64,
    /// Models that must be served once all is quiet, one after the other.
    pub probes: Vec<ModelName>,
    /// Nothing goes wrong and nobody interferes: the bound on waiting holds.
    pub calm: bool,
}

pub fn settings(gpus: &[Gpu]) -> Settings {
    let usual = Settings::default();
    Settings {
        swap: SwapSettings {
            max_wait: Some(Duration::from_secs(10)),
            drain_timeout: Duration::from_secs(20),
            vram_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(120),
            ..usual.swap
        },
        gpu: GpuSettings {
            provider: GpuProvider::Simulated,
            memory: gpus.iter().map(|gpu| gpu.total).collect(),
            ..usual.gpu
        },
        ..usual
    }
}

pub fn spec(name: &str, gpus: GpuRequest, vram: Vram) -> ModelSpec {
    ModelSpec { gpus, vram, ..ModelSpec::plain(name) }
}

pub fn catalog(settings: Settings, models: impl IntoIterator<Item = ModelSpec>) -> Catalog {
    let models = models.into_iter().map(|spec| (spec.name.clone(), Arc::new(spec))).collect();
    Catalog { models, settings, ..Catalog::default() }
}

impl Scenario {
    /// The GPUs that the scheduler is told of.
    pub fn told_gpus(&self) -> &[Gpu] {
        if self.unseen { &[] } else { &self.gpus }
    }
}

/// Whether the model could ever run here, pinned models left aside. `None`: cannot be said.
pub fn fits(
    catalog: &Catalog,
    gpus: &[Gpu],
    host: Option<Bytes>,
    spec: &ModelSpec,
) -> Option<bool> {
    let ram = spec.ram.filter(|_| !spec.is_external()).unwrap_or_default();
    if host.is_some_and(|total| ram > total - catalog.settings.ram.reserve) {
        return Some(false);
    }
    if gpus.is_empty() {
        return Some(true);
    }
    let usable = |gpu: &Gpu, bytes: Bytes| gpu.total - catalog.settings.gpu.reserve >= bytes;
    let bytes = match spec.vram {
        Vram::Declared(bytes) => bytes,
        Vram::Unknown | Vram::Rest => Bytes::ZERO,
    };
    match &spec.gpus {
        GpuRequest::None => Some(true),
        GpuRequest::Count(n) => {
            Some(gpus.iter().filter(|gpu| usable(gpu, bytes)).count() >= usize::from(*n))
        }
        GpuRequest::Explicit(names) => {
            let mut all = true;
            for name in names {
                let index: usize = name.trim_start_matches("GPU-sim-").parse().ok()?;
                all &= gpus.get(index).is_some_and(|gpu| usable(gpu, bytes));
            }
            Some(all)
        }
    }
}
