//! GPUs whose memory cannot be read: their sizes are what the configuration says.

use super::{Gpu, gpu_id};
use crate::config::catalog::{GpuProvider, GpuSettings};

pub fn gpus(settings: &GpuSettings) -> Vec<Gpu> {
    let declared = |(at, total): (usize, &crate::units::Bytes)| Gpu {
        id: gpu_id(at),
        uuid: match settings.provider {
            // Said to be none: the sizes decide what fits together, nothing is there to pass on.
            GpuProvider::None => format!("declared-{at}"),
            // Unknown: whoever passes GPUs on does so by position.
            _ => String::new(),
        },
        name: "declared in gpu.memory".to_owned(),
        total: *total,
    };
    settings.memory.iter().enumerate().map(declared).collect()
}
