//! What declared needs come to on declared GPUs and in declared RAM, and how to say it.

use super::catalog::{GpuRequest, ModelSpec, Vram};
use super::fit::{self, Need};
use super::models::ReadModel;
use super::settings::ReadSettings;
use crate::units::Bytes;

pub(super) fn need_text(spec: &ModelSpec) -> String {
    let gpus = match &spec.gpus {
        GpuRequest::None => return format!("{} needs no GPU", spec.name),
        GpuRequest::Count(n) => usize::from(*n),
        GpuRequest::Explicit(names) => names.len(),
    };
    match spec.vram {
        Vram::Declared(vram) if gpus > 1 => format!("{} needs {gpus} × {vram}", spec.name),
        Vram::Declared(vram) => format!("{} needs {vram}", spec.name),
        Vram::Rest => format!("{} takes the rest", spec.name),
        Vram::Unknown => format!("{} is not known", spec.name),
    }
}

/// Whether the models may be resident together on the declared GPUs; unknown needs count as none.
pub(super) fn fits(models: &[&ReadModel], read: &ReadSettings) -> bool {
    let gpu = &read.settings.gpu;
    if gpu.memory.is_empty() {
        return true;
    }
    let free: Vec<Bytes> = gpu.memory.iter().map(|m| m.saturating_sub(gpu.reserve)).collect();
    let needs: Vec<Need> = models
        .iter()
        .filter_map(|model| {
            let Vram::Declared(bytes) = model.spec.vram else { return None };
            match &model.spec.gpus {
                GpuRequest::None => None,
                GpuRequest::Count(n) => Some(Need::Any { bytes, gpus: usize::from(*n) }),
                GpuRequest::Explicit(names) => {
                    // Which one a UUID means is known only where it runs.
                    let on: Option<Vec<usize>> = names.iter().map(|n| n.parse().ok()).collect();
                    match on {
                        Some(on) => Some(Need::On { bytes, on }),
                        None => Some(Need::Any { bytes, gpus: names.len() }),
                    }
                }
            }
        })
        .collect();
    fit::fits(&free, &needs)
}

/// Whether the models may be resident together in the declared host RAM.
pub(super) fn ram_fits(models: &[&ReadModel], read: &ReadSettings) -> bool {
    let ram = &read.settings.ram;
    let here = models.iter().filter(|model| !model.spec.is_external());
    let need: Bytes = here.filter_map(|model| model.spec.ram).sum();
    ram.total.is_none_or(|total| need == Bytes::ZERO || need <= total - ram.reserve)
}

pub(super) fn ram_capacity(read: &ReadSettings) -> String {
    let ram = &read.settings.ram;
    let total = ram.total.map_or_else(|| "unknown".to_owned(), |total| total.to_string());
    format!("the host has {total}, less {} in reserve", ram.reserve)
}

pub(super) fn capacity(read: &ReadSettings) -> String {
    let gpu = &read.settings.gpu;
    let sizes: Vec<String> = gpu.memory.iter().map(Bytes::to_string).collect();
    format!("GPUs have {}, less {} in reserve", sizes.join(", "), gpu.reserve)
}
