//! What an engine holds of the GPUs, by the memory readings before and after.

use std::time::{Duration, Instant};

use super::effects::Effects;
use crate::config::catalog::{ModelSpec, Vram};
use crate::engine::{sleep_finely, until_next_look};
use crate::gpu::GpuKind;
use crate::scheduler::event::{Fault, FaultKind, GpuMemory};
use crate::units::{Bytes, GpuId, InstanceId};

/// Engines show their memory in the driver's list a little after they answer.
const VRAM_VISIBLE_WITHIN: Duration = Duration::from_secs(3);

impl Effects {
    pub(super) async fn read_memory(&self) -> Option<Vec<GpuMemory>> {
        if self.gpus.kind() == GpuKind::None {
            return None;
        }
        let mut gpus = self.gpus.sample().await.ok()?;
        self.holders.attribute(&mut gpus);
        Some(gpus)
    }

    /// The largest number of bytes that the instance holds on one of its GPUs, where visible.
    pub async fn held_by(&self, instance: InstanceId, gpus: &[GpuId]) -> Option<Bytes> {
        held(&self.read_memory().await?, instance, gpus)
    }

    /// GPUs on which the instance is seen to hold memory.
    pub async fn gpus_held_by(&self, instance: InstanceId) -> Vec<GpuId> {
        let memory = self.read_memory().await.unwrap_or_default();
        let holds =
            |gpu: &&GpuMemory| gpu.holders.iter().any(|holder| holder.instance == Some(instance));
        memory.iter().filter(holds).map(|gpu| gpu.gpu).collect()
    }

    /// An engine that declared VRAM and holds none runs on the CPU: not what was promised.
    pub(super) async fn vouch_memory(
        &self,
        spec: &ModelSpec,
        gpus: &[GpuId],
        instance: InstanceId,
        before: Option<&[GpuMemory]>,
    ) -> Result<Option<Bytes>, Fault> {
        let Some(before) = before else { return Ok(None) };
        let declared = match spec.vram {
            Vram::Declared(bytes) => bytes,
            Vram::Unknown | Vram::Rest => Bytes::mib(1),
        };
        if gpus.is_empty() || declared == Bytes::ZERO {
            return Ok(None);
        }
        let began = Instant::now();
        let until = began + VRAM_VISIBLE_WITHIN;
        loop {
            let now = self.read_memory().await;
            if let Some(now) = &now {
                if let Some(bytes) = held(now, instance, gpus) {
                    return Ok(Some(bytes));
                }
                // Host pids are invisible under WSL and in containers: then bytes must have moved.
                if fell_by(before, now, gpus) >= Bytes(declared.0 / 4) {
                    return Ok(None);
                }
            }
            if Instant::now() >= until {
                return Err(Fault::new(
                    FaultKind::RunsOnCpu,
                    format!(
                        "{}: the engine runs on the CPU: it answers, but holds no memory on GPU {} \
                         where {declared} are declared; check its GPU build and driver, or set \
                         `gpus: 0`",
                        spec.name,
                        gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                    ),
                ));
            }
            sleep_finely(until_next_look(began.elapsed())).await;
        }
    }
}

fn held(memory: &[GpuMemory], instance: InstanceId, gpus: &[GpuId]) -> Option<Bytes> {
    memory
        .iter()
        .filter(|gpu| gpus.contains(&gpu.gpu))
        .map(|gpu| {
            gpu.holders
                .iter()
                .filter(|holder| holder.instance == Some(instance))
                .map(|holder| holder.bytes)
                .sum::<Bytes>()
        })
        .max()
        .filter(|bytes| *bytes > Bytes::ZERO)
}

fn fell_by(before: &[GpuMemory], now: &[GpuMemory], gpus: &[GpuId]) -> Bytes {
    let free = |memory: &[GpuMemory]| {
        memory.iter().filter(|gpu| gpus.contains(&gpu.gpu)).map(|gpu| gpu.free).sum::<Bytes>()
    };
    free(before) - free(now)
}
