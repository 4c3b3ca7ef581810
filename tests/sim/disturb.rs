//! The script's steps: what operators, strangers and bad luck do.

use std::collections::BTreeMap;
use std::sync::Arc;

use wharf::config::catalog::Catalog;
use wharf::scheduler::event::Event;
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, Time};

use crate::machine::{Inst, Real};
use crate::scenario::{Faults, Step, Truth};
use crate::world::{FIRST_ID, Next, World};

impl World {
    pub fn step(&mut self, step: Step) {
        match step {
            Step::Arrive(plan) => self.arrive(plan, None),
            Step::Loop(turns) => {
                self.loops.push(turns);
                self.turn(self.loops.len() - 1);
            }
            Step::Ensure { model, kind, timeout_ms, gone_after } => {
                let ask = self.ask_id();
                let deadline = Time(self.now + timeout_ms);
                self.tell(Event::EnsureAsked { ask, model, kind, deadline });
                if let Some(ms) = gone_after {
                    self.after(ms + 4, Next::Tell(Event::AskGone { ask }));
                }
            }
            Step::Unload { model, force } => {
                let ask = self.ask_id();
                self.tell(Event::UnloadAsked { ask, model, force });
            }
            Step::Stay { model, stay } => self.stay(model, &stay),
            Step::Company { group } => self.tell(Event::CompanyAsked { group }),
            Step::Reload(catalog, truth) => self.reload(catalog, truth),
            Step::Foreign { gpu, bytes, for_ms } => self.foreign(gpu, bytes, for_ms),
            Step::HostForeign { bytes, for_ms } => self.host_foreign(bytes, for_ms),
            Step::NoProof { for_ms } => {
                self.no_proof = true;
                self.after(for_ms, Next::ProofBack);
            }
            Step::RuntimeDown { for_ms } => self.runtime_gone(for_ms),
            Step::Crash { model } => self.crash(&model),
            Step::FaultsOff => self.faults_off(),
            Step::Shutdown => self.tell(Event::ShuttingDown),
        }
    }

    pub fn adopt(&mut self, model: ModelName, gpus: Vec<GpuId>) {
        let id = InstanceId(FIRST_ID - 50);
        self.instance(id, &model, gpus.clone(), Real::Ready);
        if let Some(inst) = self.machine.insts.get_mut(&id) {
            (inst.held, inst.ram_held) = (inst.need, inst.ram_need);
            let footprint = inst.need;
            let event = Event::Adopted { instance: id, model, gpus, footprint };
            self.after(0, Next::Tell(event));
        }
    }

    fn reload(&mut self, catalog: Arc<Catalog>, truth: BTreeMap<ModelName, Truth>) {
        self.catalog = Arc::clone(&catalog);
        self.truth.extend(truth);
        self.deliver(Event::CatalogChanged(catalog));
    }

    fn foreign(&mut self, gpu: GpuId, bytes: Bytes, for_ms: u64) {
        let bytes = bytes.min(self.machine.free(gpu));
        let pid = self.machine.pid();
        self.machine.gpus[usize::from(gpu.0)].foreign.insert(pid, bytes);
        self.note(|| format!("a stranger takes {bytes} of GPU {gpu}"));
        self.after(for_ms, Next::ForeignGone { gpu, pid });
    }

    fn runtime_gone(&mut self, for_ms: u64) {
        if self.runtime_down {
            return;
        }
        self.runtime_down = true;
        self.lost = self
            .machine
            .insts
            .iter()
            .filter(|(_, inst)| {
                inst.is_docker() && !matches!(inst.real, Real::Gone | Real::Preparing)
            })
            .map(|(&id, _)| id)
            .collect();
        let instances = self.lost.clone();
        self.deliver(Event::RuntimeLost { instances, why: "Docker is away".to_owned() });
        self.after(for_ms + 4, Next::RuntimeUp);
    }

    pub fn runtime_up(&mut self) {
        if !std::mem::take(&mut self.runtime_down) {
            return;
        }
        let lost = std::mem::take(&mut self.lost);
        let gone = |id: &InstanceId| {
            self.machine.insts.get(id).is_none_or(|inst: &Inst| inst.real == Real::Gone)
        };
        let (dead, alive) = lost.into_iter().partition(gone);
        // At once: a crash told later must not overtake this.
        self.deliver(Event::RuntimeBack { alive, dead });
    }

    fn crash(&mut self, model: &ModelName) {
        let victim = self.machine.insts.iter().find(|(_, inst)| {
            inst.model == *model
                && matches!(inst.real, Real::Launching | Real::Ready | Real::Asleep)
        });
        let Some((&instance, _)) = victim else { return };
        self.note(|| format!("{instance} of {model} crashes"));
        self.exit_late(instance);
    }

    /// From here on everything works, and what hung comes loose.
    fn faults_off(&mut self) {
        self.note(|| "the faults stop".to_owned());
        self.quiet = true;
        self.faults = Faults::default();
        self.no_proof = false;
        for gpu in &mut self.machine.gpus {
            gpu.foreign.clear();
        }
        self.machine.host = self.scenario.host;
        for truth in self.truth.values_mut() {
            (truth.broken, truth.never_frees) = (false, false);
        }
        self.runtime_up();
        let insts: Vec<(InstanceId, bool)> =
            self.machine.insts.iter().map(|(&id, inst)| (id, inst.stuck)).collect();
        for (id, _) in insts.into_iter().filter(|&(_, stuck)| stuck) {
            self.release_memory(id);
        }
    }
}
