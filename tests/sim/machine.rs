//! The machine as it really is, whatever the scheduler believes: GPUs with bytes, processes that
//! hold them, gates with counts.

use std::collections::BTreeMap;
use std::sync::Arc;

use wharf::config::catalog::{ModelSpec, RuntimeSpec};
use wharf::scheduler::event::{GateCount, GpuMemory, Holder, MemorySample};
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, Time};

use crate::host::Host;

#[derive(Clone, Debug)]
pub struct Gpu {
    pub total: Bytes,
    /// Held by the driver: in nobody's list.
    pub base: Bytes,
    /// Strangers: pid → bytes.
    pub foreign: BTreeMap<u32, Bytes>,
}

impl Gpu {
    pub fn foreign_bytes(&self) -> Bytes {
        self.foreign.values().copied().sum()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Real {
    /// No process yet.
    Preparing,
    Launching,
    Ready,
    FallingAsleep,
    Asleep,
    Waking,
    /// Told to stop, still there.
    Dying,
    Gone,
}

#[derive(Clone, Debug)]
pub struct Inst {
    pub model: ModelName,
    pub spec: Arc<ModelSpec>,
    pub gpus: Vec<GpuId>,
    pub real: Real,
    /// Bytes it takes on each GPU when awake.
    pub need: Bytes,
    pub residue: Bytes,
    /// Bytes it holds on each GPU now; outlives the process for a while.
    pub held: Bytes,
    pub pid: u32,
    pub pid_visible: bool,
    /// Memory that comes back only when the faults stop.
    pub stuck: bool,
    /// Host RAM that it takes, and holds now.
    pub ram_need: Bytes,
    pub ram_held: Bytes,
}

impl Inst {
    pub fn is_docker(&self) -> bool {
        matches!(self.spec.runtime, RuntimeSpec::Docker(_))
    }

    /// Bytes it holds, or will as soon as the move under way has come that far.
    pub fn claim(&self) -> Bytes {
        match self.real {
            Real::Launching | Real::Waking => self.need.max(self.held),
            Real::Preparing
            | Real::Ready
            | Real::FallingAsleep
            | Real::Asleep
            | Real::Dying
            | Real::Gone => self.held,
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Gate {
    pub open: bool,
    pub permits: u32,
    pub count: GateCount,
    pub every_release: bool,
    pub pinged: bool,
}

#[derive(Debug, Default)]
pub struct Machine {
    pub gpus: Vec<Gpu>,
    pub host: Option<Host>,
    pub insts: BTreeMap<InstanceId, Inst>,
    pub gates: BTreeMap<InstanceId, Gate>,
    next_pid: u32,
}

impl Machine {
    pub fn new(gpus: Vec<Gpu>, host: Option<Host>) -> Machine {
        Machine { gpus, host, next_pid: 1000, ..Machine::default() }
    }

    pub fn pid(&mut self) -> u32 {
        self.next_pid += 1;
        self.next_pid
    }

    pub fn on(&self, gpu: GpuId) -> impl Iterator<Item = (&InstanceId, &Inst)> {
        self.insts.iter().filter(move |(_, inst)| inst.gpus.contains(&gpu))
    }

    pub fn free(&self, gpu: GpuId) -> Bytes {
        let card = &self.gpus[usize::from(gpu.0)];
        let held: Bytes = self.on(gpu).map(|(_, inst)| inst.held).sum();
        card.total - card.base - card.foreign_bytes() - held
    }

    /// `proof`: the GPUs can be read, too.
    pub fn sample(&self, now: u64, proof: bool) -> MemorySample {
        let read = if proof { self.gpus.len() } else { 0 };
        let gpus = (0..read).map(|n| self.gpu_memory(GpuId(n as u16))).collect();
        let host = self.host_memory();
        let ram = if host.is_some() { self.host_use() } else { BTreeMap::new() };
        MemorySample { taken_at: Time(now), gpus, host, ram }
    }

    fn gpu_memory(&self, gpu: GpuId) -> GpuMemory {
        let card = &self.gpus[usize::from(gpu.0)];
        let strangers = card.foreign.iter().map(|(&pid, &bytes)| Holder {
            pid,
            bytes,
            label: "python train.py".to_owned(),
            instance: None,
        });
        let own = self.on(gpu).filter(|(_, inst)| inst.pid_visible && inst.held > Bytes::ZERO);
        let own = own.map(|(&id, inst)| Holder {
            pid: inst.pid,
            bytes: inst.held,
            label: inst.model.to_string(),
            instance: Some(id),
        });
        GpuMemory {
            gpu,
            uuid: uuid(gpu),
            total: card.total,
            free: self.free(gpu),
            holders: strangers.chain(own).collect(),
        }
    }

    pub fn in_flight(&self, instance: InstanceId) -> u32 {
        self.gates.get(&instance).map_or(0, |gate| gate.count.in_flight)
    }

    /// The instance whose gate lets a request for `model` through without asking.
    pub fn open_gate(&self, model: &ModelName) -> Option<InstanceId> {
        let (&id, _) = self.gates.iter().find(|(id, gate)| {
            gate.open
                && gate.count.in_flight < gate.permits
                && self.insts.get(id).is_some_and(|inst| inst.model == *model)
        })?;
        Some(id)
    }
}

pub fn uuid(gpu: GpuId) -> String {
    format!("GPU-sim-{gpu}")
}
