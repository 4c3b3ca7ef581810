//! From a model and its place to everything a runtime needs: ports, derived arguments, identity.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use crate::config::catalog::{EngineKind, GpuRequest, ModelSpec, RuntimeSpec, Vram};
use crate::engine;
use crate::gpu::{Gpu, Gpus};
use crate::runtime::{GpuDevice, Identity, LaunchSpec};
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::{Bytes, GpuId, InstanceId};

/// Raise when Wharf starts engines differently for the same model entry.
const LAUNCH_VERSION: u32 = 1;

/// What shapes a running engine. Policy (priority, ttl, aliases, …) may change under it.
#[derive(Serialize)]
struct Shape<'a> {
    version: u32,
    engine: EngineKind,
    runtime: &'a RuntimeSpec,
    gpus: &'a GpuRequest,
    vram: Vram,
    served_name: &'a str,
    port: Option<u16>,
    sleep: Option<u8>,
}

/// Hash of everything that shapes the running engine (FNV-1a: stable over builds and machines).
pub fn spec_hash(spec: &ModelSpec) -> String {
    let shape = Shape {
        version: LAUNCH_VERSION,
        engine: spec.engine,
        runtime: &spec.runtime,
        gpus: &spec.gpus,
        vram: spec.vram,
        served_name: spec.served_name(),
        port: spec.port,
        sleep: spec.sleep,
    };
    let bytes = serde_json::to_vec(&shape).unwrap_or_default();
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// Loopback ports for engines: each instance its own, never one that a stranger listens on.
#[derive(Debug)]
pub struct Ports {
    range: (u16, u16),
    taken: BTreeMap<InstanceId, u16>,
    next: u16,
}

impl Ports {
    pub fn new(range: (u16, u16)) -> Ports {
        Ports { range, taken: BTreeMap::new(), next: range.0 }
    }

    pub fn reserve(&mut self, instance: InstanceId, port: u16) {
        self.taken.insert(instance, port);
    }

    pub fn release(&mut self, instance: InstanceId) {
        self.taken.remove(&instance);
    }

    /// The port of this instance: the one it has if nobody took it meanwhile, else a new one.
    pub fn assign(&mut self, instance: InstanceId, fixed: Option<u16>) -> Result<u16, Fault> {
        if let Some(port) = fixed {
            self.taken.insert(instance, port);
            return Ok(port);
        }
        if let Some(&port) = self.taken.get(&instance)
            && is_free(port)
        {
            return Ok(port);
        }
        let taken: BTreeSet<u16> = self.taken.values().copied().collect();
        let (first, last) = self.range;
        // Round robin: a port just left may still be in the kernel's TIME_WAIT.
        let later = self.next..=last;
        let earlier = first..self.next;
        let found = later.chain(earlier).find(|port| !taken.contains(port) && is_free(*port));
        let Some(port) = found else {
            return Err(Fault::new(
                FaultKind::PortTaken,
                format!("no free port left in engine_ports {first}-{last}: widen the range"),
            ));
        };
        self.next = if port >= last { first } else { port + 1 };
        self.taken.insert(instance, port);
        Ok(port)
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

pub struct Launcher<'a> {
    pub gpus: &'a Gpus,
    pub installation: &'a str,
    pub log_dir: PathBuf,
}

impl Launcher<'_> {
    pub fn launch(
        &self,
        instance: InstanceId,
        model: &Arc<ModelSpec>,
        gpus: &[GpuId],
        footprint: Option<Bytes>,
        port: u16,
    ) -> Result<LaunchSpec, Fault> {
        let used: Vec<&Gpu> =
            self.gpus.gpus().iter().filter(|gpu| gpus.contains(&gpu.id)).collect();
        let total = used.iter().map(|gpu| gpu.total).min();
        let derived = engine::derive(model, port, gpus.len(), footprint, total);
        let mut env = self.gpus.engine_env(gpus);
        if matches!(model.runtime, RuntimeSpec::Docker(_)) && !used.iter().all(|gpu| is_uuid(gpu)) {
            // A container counts only the GPUs that it was given: the host's indexes mislead it.
            env.remove("CUDA_VISIBLE_DEVICES");
        }
        env.extend(derived.env);
        let inherited = |name: &str| std::env::var(name).ok();
        let api_key = engine::launch_key(model, inherited).ok_or_else(|| {
            let message = format!("model {}: the operating system gives no randomness", model.name);
            Fault::new(FaultKind::Internal, message)
        })?;
        Ok(LaunchSpec {
            identity: Identity {
                installation: self.installation.to_owned(),
                instance,
                model: model.name.clone(),
                spec_hash: spec_hash(model),
                gpus: gpus.to_vec(),
                port,
            },
            model: Arc::clone(model),
            gpus: used.iter().map(|gpu| GpuDevice { id: gpu.id, uuid: gpu.uuid.clone() }).collect(),
            port,
            container_port: derived.container_port,
            args: derived.args,
            env,
            api_key,
            log_dir: self.log_dir.clone(),
        })
    }
}

fn is_uuid(gpu: &Gpu) -> bool {
    gpu.uuid.starts_with("GPU-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_a_stranger_took_is_not_handed_out() {
        let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = stranger.local_addr().unwrap().port();
        let mut ports = Ports::new((port, port.saturating_add(20)));
        let mine = ports.assign(InstanceId(1), None).unwrap();
        assert_ne!(mine, port);
        assert_eq!(ports.assign(InstanceId(1), None).unwrap(), mine, "kept while it is free");
        assert_ne!(ports.assign(InstanceId(2), None).unwrap(), mine);
    }

    #[test]
    fn an_exhausted_range_names_the_key() {
        let stranger = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = stranger.local_addr().unwrap().port();
        let fault = Ports::new((port, port)).assign(InstanceId(1), None).unwrap_err();
        assert!(fault.message.contains("engine_ports"), "{}", fault.message);
    }
}
