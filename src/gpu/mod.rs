//! Memory per GPU and per process: from NVML, from a simulation, or not at all.
//!
//! Readings are facts for the scheduler; nothing here decides.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::catalog::GpuSettings;
use crate::scheduler::event::{GpuMemory, NoProof};
use crate::units::{Bytes, GpuId};

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

#[derive(Clone, Debug)]
pub struct Gpus {
    kind: GpuKind,
    gpus: Vec<Gpu>,
}

impl Gpus {
    /// `ledger` is the folder in which stand-in engines declare simulated memory.
    pub async fn open(_settings: &GpuSettings, _ledger: &Path) -> Result<Gpus, GpuError> {
        Ok(Gpus { kind: GpuKind::None, gpus: Vec::new() })
    }

    pub fn kind(&self) -> GpuKind {
        self.kind
    }

    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// One reading of every GPU, made now. `Holder::instance` is left empty here.
    pub async fn sample(&self) -> Result<Vec<GpuMemory>, NoProof> {
        Ok(Vec::new())
    }

    /// 0.0..=1.0 per GPU where it can be read.
    pub async fn utilization(&self) -> BTreeMap<GpuId, f32> {
        BTreeMap::new()
    }

    /// `nvml (driver 550.54)`, `simulated`, `none: …` for health answers.
    pub fn describe(&self) -> String {
        String::new()
    }

    /// Environment that an engine needs to take part (CUDA_VISIBLE_DEVICES; the ledger when
    /// simulated).
    pub fn engine_env(&self, _gpus: &[GpuId]) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
}
