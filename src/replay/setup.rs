//! The machine and the models of a replay: what the scheduler is told, and what is true.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::config::catalog::{
    Catalog, EngineKind, GpuRequest, GpuSettings, ModelSpec, QueueSettings, Settings, StopSpec,
    SwapSettings, Vram,
};
use crate::scheduler::GpuInfo;
use crate::scheduler::event::Learned;
use crate::units::{Bytes, GpuId, ModelName};

/// Nobody is refused for having waited: far beyond the end of any trace.
pub const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// In a world of equal slots only their number matters.
const SLOT: Bytes = Bytes::gib(16);

/// What the moves of one model take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Costs {
    pub start: Duration,
    pub stop: Duration,
    /// `None`: the engine does not sleep.
    pub sleep: Option<Duration>,
    pub wake: Option<Duration>,
    /// Bytes kept on each GPU while asleep.
    pub residue: Bytes,
}

impl Costs {
    /// What the scheduler has learned of them: as after a few moves of each kind.
    pub(super) fn learned(&self, footprint: Bytes) -> Learned {
        Learned {
            footprint: Some(footprint),
            asleep: self.sleep.map(|_| self.residue),
            start: Some(self.start),
            stop: Some(self.stop),
            sleep: self.sleep,
            wake: self.wake,
            ..Learned::default()
        }
    }
}

/// Bytes on each GPU, and how many GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub bytes: Bytes,
    pub gpus: u16,
}

/// Where models run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Machine {
    /// One GPU, on which so many models fit, all of the same size.
    Slots(u32),
    Gpus {
        memory: Vec<Bytes>,
        sizes: BTreeMap<ModelName, Size>,
    },
}

/// What holds for every model of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    pub costs: Costs,
    /// `None`: unbounded.
    pub concurrency: Option<u32>,
    /// `None`: as Wharf has it by default, max(30 s, 3 × the move).
    pub max_wait: Option<Duration>,
    /// `None`: as Wharf has it by default.
    pub drain_timeout: Option<Duration>,
    pub queue_timeout: Duration,
}

/// A machine with its models.
#[derive(Clone, Debug)]
pub struct Setup {
    pub catalog: Arc<Catalog>,
    pub gpus: Vec<GpuInfo>,
    pub costs: BTreeMap<ModelName, Costs>,
    /// Bytes on each GPU that a model really takes, where the catalog does not say.
    pub measured: BTreeMap<ModelName, Bytes>,
}

/// What a store has of a model: the moves that were seen, and its bytes.
pub type Known = BTreeMap<ModelName, Learned>;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    #[error("no size is known for model {0}: --sizes {0}=8GiB says it")]
    NoSize(ModelName),
    #[error("model {0} is not in the configuration")]
    NoModel(ModelName),
    #[error("there is no GPU: --slots or --gpus say what there is")]
    NoGpu,
}

impl Setup {
    /// A world in which every model of the trace costs the same to move.
    pub fn of_trace(
        models: &BTreeSet<ModelName>,
        machine: &Machine,
        terms: &Terms,
    ) -> Result<Setup, SetupError> {
        let memory = match machine {
            Machine::Slots(0) => return Err(SetupError::NoGpu),
            Machine::Slots(slots) => vec![Bytes(SLOT.0 * u64::from(*slots))],
            Machine::Gpus { memory, .. } if memory.is_empty() => return Err(SetupError::NoGpu),
            Machine::Gpus { memory, .. } => memory.clone(),
        };
        let spec = |name: &ModelName| {
            let size = match machine {
                Machine::Slots(_) => Size { bytes: SLOT, gpus: 1 },
                Machine::Gpus { sizes, .. } => {
                    *sizes.get(name).ok_or_else(|| SetupError::NoSize(name.clone()))?
                }
            };
            Ok((name.clone(), Arc::new(model(name, size, terms))))
        };
        let models: BTreeMap<ModelName, Arc<ModelSpec>> =
            models.iter().map(spec).collect::<Result<_, _>>()?;
        let costs = models.keys().map(|name| (name.clone(), terms.costs)).collect();
        let usual = Settings::default();
        let settings = Settings {
            swap: SwapSettings {
                max_wait: terms.max_wait,
                drain_timeout: terms.drain_timeout.unwrap_or(usual.swap.drain_timeout),
                ..usual.swap
            },
            gpu: GpuSettings { reserve: Bytes::ZERO, ..usual.gpu },
            ..usual
        };
        let mut catalog = Catalog { models, settings, ..Catalog::default() };
        never_refuse(&mut catalog, terms.queue_timeout);
        let gpus = gpus_of(&memory);
        Ok(Setup { catalog: Arc::new(catalog), gpus, costs, measured: BTreeMap::new() })
    }

    /// The models of a configuration, with what was learned of them; `terms` stand in for moves
    /// that were never seen. Requests that name an alias are given the model's name.
    pub fn of_catalog(
        catalog: &Catalog,
        known: &Known,
        memory: &[Bytes],
        sizes: &BTreeMap<ModelName, Size>,
        terms: &Terms,
    ) -> Result<Setup, SetupError> {
        if memory.is_empty() {
            return Err(SetupError::NoGpu);
        }
        let mut catalog = catalog.clone();
        never_refuse(&mut catalog, terms.queue_timeout);
        if terms.max_wait.is_some() {
            catalog.settings.swap.max_wait = terms.max_wait;
        }
        if let Some(timeout) = terms.drain_timeout {
            catalog.settings.swap.drain_timeout = timeout;
        }
        let (mut costs, mut measured) = (BTreeMap::new(), BTreeMap::new());
        for (name, spec) in &catalog.models {
            let learned = known.get(name).cloned().unwrap_or_default();
            let sleeps = spec.engine == EngineKind::Vllm && spec.sleep.is_some();
            let usual = terms.costs;
            costs.insert(
                name.clone(),
                Costs {
                    start: learned.start.unwrap_or(usual.start),
                    stop: learned.stop.unwrap_or(usual.stop),
                    sleep: learned.sleep.or(usual.sleep).or(Some(usual.stop)).filter(|_| sleeps),
                    wake: learned.wake.or(usual.wake).or(Some(usual.stop)).filter(|_| sleeps),
                    residue: learned.asleep.unwrap_or(usual.residue),
                },
            );
            let said = sizes.get(name).map(|size| size.bytes);
            match (spec.vram, learned.footprint.or(said)) {
                (Vram::Declared(_), _) => {}
                (Vram::Unknown | Vram::Rest, Some(bytes)) => {
                    measured.insert(name.clone(), bytes);
                }
                (Vram::Unknown | Vram::Rest, None) if spec.gpus == GpuRequest::None => {}
                (Vram::Unknown | Vram::Rest, None) => {
                    return Err(SetupError::NoSize(name.clone()));
                }
            }
        }
        Ok(Setup { catalog: Arc::new(catalog), gpus: gpus_of(memory), costs, measured })
    }

    pub(super) fn costs(&self, model: &ModelName) -> Costs {
        self.costs.get(model).copied().unwrap_or(Costs {
            start: Duration::ZERO,
            stop: Duration::ZERO,
            sleep: None,
            wake: None,
            residue: Bytes::ZERO,
        })
    }

    /// Bytes on each GPU that a model takes.
    pub(super) fn footprint(&self, model: &ModelName) -> Bytes {
        match self.catalog.model(model).map(|spec| spec.vram) {
            Some(Vram::Declared(bytes)) => bytes,
            Some(Vram::Unknown | Vram::Rest) | None => {
                self.measured.get(model).copied().unwrap_or_default()
            }
        }
    }

    pub(super) fn permits(&self, model: &ModelName) -> u32 {
        self.catalog.model(model).and_then(|spec| spec.concurrency).unwrap_or(u32::MAX)
    }
}

/// GPUs of these sizes, in this order.
pub fn gpus_of(memory: &[Bytes]) -> Vec<GpuInfo> {
    let gpu =
        |(&total, id): (&Bytes, u16)| GpuInfo { id: GpuId(id), uuid: format!("GPU-{id}"), total };
    memory.iter().zip(0..).map(gpu).collect()
}

/// A full queue would end requests whose waiting is to be measured.
pub fn never_refuse(catalog: &mut Catalog, timeout: Duration) {
    let usual = &catalog.settings.queue;
    catalog.settings.queue =
        QueueSettings { limit: u32::MAX, per_model: u32::MAX, timeout, ..usual.clone() };
}

fn model(name: &ModelName, size: Size, terms: &Terms) -> ModelSpec {
    let sleeps = terms.costs.sleep.is_some();
    ModelSpec {
        // Only vLLM sleeps.
        engine: if sleeps { EngineKind::Vllm } else { EngineKind::Llamacpp },
        sleep: sleeps.then_some(1),
        gpus: GpuRequest::Count(size.gpus),
        vram: Vram::Declared(size.bytes),
        concurrency: terms.concurrency,
        stop: StopSpec { signal: "SIGTERM".to_owned(), grace: terms.costs.stop * 2 },
        start_timeout: Some(terms.costs.start * 2 + Duration::from_secs(600)),
        ..ModelSpec::plain(name.as_str())
    }
}
