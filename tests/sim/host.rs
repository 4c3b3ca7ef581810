//! Host RAM: how much there is, who else takes of it, and what engines really take.

use std::collections::BTreeMap;
use std::sync::Arc;

use wharf::config::catalog::{Catalog, ModelSpec, RamSettings};
use wharf::scheduler::event::{HostMemory, HostUse};
use wharf::units::{Bytes, InstanceId, ModelName};

use crate::machine::{Inst, Machine, Real};
use crate::rng::Rng;
use crate::scenario::{Scenario, Step, Truth};
use crate::world::{Next, World};

#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub total: Bytes,
    /// Held by other programs.
    pub others: Bytes,
    /// Samples tell of it; else only what is declared is known.
    pub sampled: bool,
}

impl Inst {
    /// What falling asleep moves to host RAM.
    pub fn weights(&self) -> Bytes {
        let leaves = self.held - self.residue;
        let moved = self.spec.sleep == Some(1);
        self.gpus.iter().filter(|_| moved).map(|_| leaves).sum()
    }

    /// Bytes that must be promised to it at least: what it really takes. (What is declared may be
    /// more, until a peak has replaced it.)
    pub fn host_claim(&self) -> Bytes {
        match self.real {
            Real::Preparing | Real::Gone => Bytes::ZERO,
            Real::FallingAsleep => self.ram_need + self.weights(),
            Real::Launching | Real::Ready | Real::Asleep | Real::Waking | Real::Dying => {
                self.ram_need + (self.ram_held - self.ram_need)
            }
        }
    }
}

impl Machine {
    pub fn host_free(&self) -> Bytes {
        let Some(host) = self.host else { return Bytes(u64::MAX) };
        host.total - host.others - self.insts.values().map(|inst| inst.ram_held).sum()
    }

    /// Of every process; some of it are files.
    pub fn host_use(&self) -> BTreeMap<InstanceId, HostUse> {
        let runs = self.insts.iter().filter(|(_, inst)| inst.ram_held > Bytes::ZERO);
        let used =
            |inst: &Inst| HostUse { held: Bytes(inst.ram_held.0 / 4 * 3), resident: inst.ram_held };
        runs.map(|(&id, inst)| (id, used(inst))).collect()
    }

    pub fn host_memory(&self) -> Option<HostMemory> {
        let host = self.host.filter(|host| host.sampled)?;
        Some(HostMemory { total: host.total, available: self.host_free() })
    }
}

impl World {
    pub fn host_foreign(&mut self, bytes: Bytes, for_ms: u64) {
        let bytes = bytes.min(self.machine.host_free());
        if let Some(host) = &mut self.machine.host {
            host.others += bytes;
            self.note(|| format!("a stranger takes {bytes} of host RAM"));
            self.after(for_ms, Next::HostForeignGone(bytes));
        }
    }

    pub fn host_foreign_gone(&mut self, bytes: Bytes) {
        let least = self.scenario.host.map(|host| host.others).unwrap_or_default();
        if let Some(host) = &mut self.machine.host {
            host.others = (host.others - bytes).max(least);
        }
    }
}

/// Gives some days a host of limited RAM and models that need of it: from a random stream of its
/// own, so that all else in them stays as it was.
pub fn limit(scenario: &mut Scenario) {
    let rng = &mut Rng::new(scenario.seed ^ 0xC0FF_EE00_0000);
    if !rng.chance(350) {
        return;
    }
    let total = Bytes::gib(*rng.pick(&[8, 16, 32, 64]));
    let reserve = Bytes::mib(*rng.pick(&[0, 512, 2048]));
    let sampled = rng.chance(700);
    let others = if sampled { Bytes::mib(rng.below(total.as_mib() / 8)) } else { Bytes::ZERO };
    let declared = (!sampled || rng.chance(200)).then_some(total);
    let settings = RamSettings { total: declared, reserve };
    let needs = needs(rng, scenario.calm, total - reserve - others);
    scenario.host = Some(Host { total, others, sampled });
    let change = |catalog: &mut Arc<Catalog>, truth: &mut BTreeMap<ModelName, Truth>| {
        let catalog = Arc::make_mut(catalog);
        catalog.settings.ram = settings;
        for (name, spec) in &mut catalog.models {
            let (Some(need), Some(truth)) = (needs.get(name), truth.get_mut(name)) else {
                continue;
            };
            need.apply(Arc::make_mut(spec), truth);
        }
    };
    change(&mut scenario.catalog, &mut scenario.truth);
    for (_, step) in &mut scenario.steps {
        if let Step::Reload(catalog, truth) = step {
            change(catalog, truth);
        }
    }
    let catalog = Arc::clone(&scenario.catalog);
    scenario
        .adopted
        .retain(|(name, _)| catalog.models[name].ram.is_none_or(|ram| ram <= total - reserve));
    if !scenario.calm && sampled && rng.chance(500) {
        for _ in 0..rng.range(1, 3) {
            let bytes = Bytes::mib(rng.below(total.as_mib()));
            let for_ms = rng.range(1000, 60_000);
            let at = rng.below(scenario.quiet_from);
            scenario.steps.push((at, Step::HostForeign { bytes, for_ms }));
        }
    }
}

#[derive(Clone, Copy)]
struct Need {
    declared: Option<Bytes>,
    /// Per mille of what is declared.
    real: u64,
    deep_sleep: bool,
}

impl Need {
    fn apply(&self, spec: &mut ModelSpec, truth: &mut Truth) {
        spec.ram = self.declared;
        truth.ram = Bytes(self.declared.unwrap_or_default().0 / 1000 * self.real);
        if spec.is_external() {
            truth.ram = Bytes::ZERO;
        }
        if self.deep_sleep {
            spec.sleep = spec.sleep.map(|_| 2);
        }
    }
}

/// By name, so that a reload changes no more than it did.
fn needs(rng: &mut Rng, calm: bool, usable: Bytes) -> BTreeMap<ModelName, Need> {
    let need = |rng: &mut Rng| Need {
        declared: match rng.below(100) {
            0..30 => None,
            30..33 if !calm => Some(Bytes::gib(500)),
            _ => Some(Bytes::mib(usable.as_mib() * rng.range(3, 100) / 100)),
        },
        real: rng.range(600, 1000),
        deep_sleep: rng.chance(200),
    };
    (0..=30).map(|n| (ModelName::new(format!("m{n}")), need(rng))).collect()
}
