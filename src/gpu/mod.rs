//! Memory per GPU and per process: from NVML, from a simulation, or not at all. And the host's.
//!
//! Readings are facts for the scheduler; nothing here decides.

mod host;
mod label;
mod none;
mod nvml;
mod simulated;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use host::host_memory;

use crate::config::catalog::{GpuProvider, GpuSettings};
use crate::scheduler::event::{GpuMemory, HostMemory, NoProof};
use crate::units::{Bytes, GpuId};

/// Path of the NVML library to load instead of the system's.
pub const NVML_LIBRARY: &str = "WHARF_NVML_LIBRARY";

/// A driver call that takes longer is given up: no proof.
pub const NVML_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuKind {
    Nvml,
    Simulated,
    /// No reading: declared sizes (if any), no proof.
    None,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub id: GpuId,
    pub uuid: String,
    pub name: String,
    pub total: Bytes,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GpuError(pub String);

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gpus {
    provider: Provider,
    gpus: Arc<[Gpu]>,
    about: Arc<str>,
}

#[derive(Clone, Debug)]
enum Provider {
    Nvml(nvml::Reader),
    Simulated(simulated::Ledger),
    None,
}

impl Gpus {
    /// `ledger` is the folder in which stand-in engines declare simulated memory.
    ///
    /// Provider `auto` takes NVML if it loads and finds a GPU; otherwise there is no proof, and
    /// [`Gpus::describe`] says why.
    pub async fn open(settings: &GpuSettings, ledger: &Path) -> Result<Gpus, GpuError> {
        let library = std::env::var_os(NVML_LIBRARY).map(PathBuf::from);
        match settings.provider {
            GpuProvider::Nvml => Gpus::open_nvml(library, NVML_DEADLINE).await,
            GpuProvider::None => Ok(Gpus::without_proof(settings, "chosen by gpu.provider")),
            GpuProvider::Simulated => Gpus::simulated(settings, ledger),
            GpuProvider::Auto => match nvml::open(library, NVML_DEADLINE).await {
                Ok(opened) => Ok(Gpus::from_nvml(opened)),
                Err(nvml::OpenError::Absent(why)) => Ok(Gpus::without_proof(settings, &why)),
                Err(nvml::OpenError::Unusable(why)) => Err(GpuError(why)),
            },
        }
    }

    /// NVML from this library (`None`: the system's), with this deadline for every call.
    pub async fn open_nvml(library: Option<PathBuf>, deadline: Duration) -> Result<Gpus, GpuError> {
        match nvml::open(library, deadline).await {
            Ok(opened) => Ok(Gpus::from_nvml(opened)),
            Err(nvml::OpenError::Absent(why) | nvml::OpenError::Unusable(why)) => {
                Err(GpuError(why))
            }
        }
    }

    fn from_nvml(opened: nvml::Opened) -> Gpus {
        let about = format!("nvml (driver {})", opened.driver);
        let provider = Provider::Nvml(opened.reader);
        Gpus { provider, gpus: opened.gpus.into(), about: about.into() }
    }

    fn simulated(settings: &GpuSettings, ledger: &Path) -> Result<Gpus, GpuError> {
        let ledger = simulated::Ledger::open(settings, ledger)?;
        let gpus: Arc<[Gpu]> = simulated::gpus(settings).into();
        let about = format!("simulated: {} declared in gpu.memory", count(gpus.len()));
        Ok(Gpus { provider: Provider::Simulated(ledger), gpus, about: about.into() })
    }

    fn without_proof(settings: &GpuSettings, why: &str) -> Gpus {
        let gpus: Arc<[Gpu]> = none::gpus(settings).into();
        let sizes = match gpus.len() {
            0 => String::new(),
            n => format!(" ({} declared in gpu.memory)", count(n)),
        };
        let about = format!("none: {why}; freed memory is not proven{sizes}");
        Gpus { provider: Provider::None, gpus, about: about.into() }
    }

    pub fn kind(&self) -> GpuKind {
        match self.provider {
            Provider::Nvml(_) => GpuKind::Nvml,
            Provider::Simulated(_) => GpuKind::Simulated,
            Provider::None => GpuKind::None,
        }
    }

    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// One reading of every GPU, made now. `Holder::instance` is left empty here. Without a
    /// provider there is nothing to read: an empty list.
    pub async fn sample(&self) -> Result<Vec<GpuMemory>, NoProof> {
        match &self.provider {
            Provider::Nvml(reader) => reader.sample().await,
            Provider::Simulated(ledger) => ledger.sample().await,
            Provider::None => Ok(Vec::new()),
        }
    }

    /// Host RAM beside them. Simulated GPUs belong to a simulated machine: its RAM is what
    /// `ram.total` declares, whatever this one has.
    pub fn host_memory(&self) -> Option<HostMemory> {
        match self.provider {
            Provider::Nvml(_) | Provider::None => host::host_memory(),
            Provider::Simulated(_) => None,
        }
    }

    /// 0.0..=1.0 per GPU where it can be read.
    pub async fn utilization(&self) -> BTreeMap<GpuId, f32> {
        match &self.provider {
            Provider::Nvml(reader) => reader.utilization().await,
            Provider::Simulated(_) | Provider::None => BTreeMap::new(),
        }
    }

    /// `nvml (driver 550.54)`, `simulated`, `none: …` for health answers.
    pub fn describe(&self) -> String {
        self.about.to_string()
    }

    /// Environment that an engine needs to take part (CUDA_VISIBLE_DEVICES; the ledger when
    /// simulated). An engine without a GPU is shown none, unless no GPU is known at all.
    pub fn engine_env(&self, gpus: &[GpuId]) -> BTreeMap<String, String> {
        let indexes = join(gpus.iter().map(GpuId::to_string));
        let mut env = BTreeMap::from([("WHARF_GPUS".to_owned(), indexes.clone())]);
        if self.gpus.is_empty() {
            return env;
        }
        let uuids = || {
            let used = self.gpus.iter().filter(|gpu| gpus.contains(&gpu.id));
            join(used.map(|gpu| gpu.uuid.clone()))
        };
        let visible = match &self.provider {
            Provider::Nvml(_) => uuids(),
            Provider::Simulated(_) | Provider::None => indexes,
        };
        env.insert("CUDA_DEVICE_ORDER".to_owned(), "PCI_BUS_ID".to_owned());
        env.insert("CUDA_VISIBLE_DEVICES".to_owned(), visible);
        if let Provider::Simulated(ledger) = &self.provider {
            let totals = join(self.gpus.iter().map(|gpu| gpu.total.0.to_string()));
            env.insert("WHARF_VRAM_LEDGER".to_owned(), ledger.folder().display().to_string());
            env.insert("WHARF_VRAM_TOTAL".to_owned(), totals);
        }
        env
    }
}

fn join(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(",")
}

fn count(gpus: usize) -> String {
    if gpus == 1 { "1 GPU".to_owned() } else { format!("{gpus} GPUs") }
}

/// Position in a list of GPUs.
fn gpu_id(at: usize) -> GpuId {
    GpuId(u16::try_from(at).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(provider: GpuProvider, memory: Vec<Bytes>) -> GpuSettings {
        GpuSettings {
            provider,
            reserve: Bytes::mib(512),
            memory,
            release_lag: Duration::ZERO,
            foreign: Vec::new(),
        }
    }

    #[tokio::test]
    async fn declared_sizes_become_gpus_without_proof() {
        let settings = settings(GpuProvider::None, vec![Bytes::gib(24), Bytes::gib(16)]);
        let gpus = Gpus::open(&settings, Path::new("/nowhere")).await.expect("open");
        assert_eq!(gpus.kind(), GpuKind::None);
        assert_eq!(gpus.gpus()[1].total, Bytes::gib(16));
        assert_eq!(gpus.sample().await, Ok(Vec::new()));
        assert!(gpus.describe().contains("not proven"), "{}", gpus.describe());
        let env = gpus.engine_env(&[GpuId(1)]);
        assert_eq!(env["CUDA_VISIBLE_DEVICES"], "1");
        assert_eq!(env["CUDA_DEVICE_ORDER"], "PCI_BUS_ID");
        assert_eq!(gpus.engine_env(&[])["CUDA_VISIBLE_DEVICES"], "", "a CPU model sees no GPU");
    }

    #[tokio::test]
    async fn where_no_gpu_is_known_none_is_hidden() {
        let settings = settings(GpuProvider::None, Vec::new());
        let gpus = Gpus::open(&settings, Path::new("/nowhere")).await.expect("open");
        assert!(!gpus.engine_env(&[]).contains_key("CUDA_VISIBLE_DEVICES"));
    }

    #[tokio::test]
    async fn a_simulation_without_sizes_is_refused() {
        let settings = settings(GpuProvider::Simulated, Vec::new());
        let error = Gpus::open(&settings, Path::new("/nowhere")).await.expect_err("refused");
        assert!(error.to_string().contains("gpu.memory"), "{error}");
    }

    #[tokio::test]
    async fn engines_are_told_where_the_ledger_lies() {
        let folder = tempfile::tempdir().expect("a folder");
        let settings = settings(GpuProvider::Simulated, vec![Bytes(100), Bytes(200)]);
        let gpus = Gpus::open(&settings, folder.path()).await.expect("open");
        let env = gpus.engine_env(&[GpuId(0), GpuId(1)]);
        assert_eq!(env["WHARF_VRAM_TOTAL"], "100,200");
        assert_eq!(env["WHARF_GPUS"], "0,1");
        assert!(Path::new(&env["WHARF_VRAM_LEDGER"]).is_absolute());
    }
}
