//! Performing actions: what the orchestrator's effects do to the machine, and how they fail.

use wharf::config::catalog::Vram;
use wharf::scheduler::action::Action;
use wharf::scheduler::event::{Done, Event, Fault, FaultKind, NoProof};
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, SwapId, Time};

use crate::clients::LeaseEnd;
use crate::machine::{Gate, Inst, Real};
use crate::world::{Next, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Preflight,
    Fetch,
    Start,
    Stop,
    Sleep,
    Wake,
}

#[derive(Clone, Debug)]
pub struct Effect {
    pub kind: Kind,
    pub swap: SwapId,
    pub instance: InstanceId,
    pub fault: Option<Fault>,
}

impl Effect {
    fn done(&self, result: Result<Option<Bytes>, Fault>) -> Done {
        let plain = result.clone().map(|_| ());
        match self.kind {
            Kind::Preflight => Done::Preflight(plain),
            Kind::Fetch => Done::Fetch(plain),
            Kind::Start => Done::Start(result),
            Kind::Stop => Done::Stop(plain),
            Kind::Sleep => Done::Sleep(result),
            Kind::Wake => Done::Wake(result),
        }
    }
}

fn fault(kind: FaultKind) -> Fault {
    Fault::new(kind, format!("{kind:?}, says the simulated engine"))
}

impl World {
    pub fn perform(&mut self, action: Action) {
        match action {
            Action::Grant { request, instance } => self.granted(request, instance),
            Action::Refuse { request, refusal } => self.refused(request, &refusal),
            Action::OpenGate { instance, permits } => {
                let gate = self.machine.gates.entry(instance).or_default();
                (gate.open, gate.permits) = (true, permits);
            }
            Action::CloseGate { instance } => {
                self.machine.gates.entry(instance).or_default().open = false;
                self.gate_closed(instance);
            }
            Action::WatchGate { instance, every_release } => {
                self.machine.gates.entry(instance).or_default().every_release = every_release;
            }
            Action::CancelLeases { instance, .. } => {
                self.end_leases(instance, LeaseEnd::Cancelled, 200);
            }
            Action::Preflight { swap, instance, model, gpus } => {
                self.preflight(swap, instance, &model, gpus);
            }
            Action::Fetch { swap, instance, model } => self.fetch(swap, instance, &model),
            Action::StartInstance { swap, instance, model, gpus, footprint, deadline } => {
                if !self.machine.insts.contains_key(&instance) {
                    self.instance(instance, &model, Vec::new(), Real::Preparing);
                }
                if let Some(inst) = self.machine.insts.get_mut(&instance) {
                    inst.gpus = gpus;
                }
                self.start(swap, instance, &model, footprint, deadline);
            }
            Action::StopInstance { swap, instance } => self.stop(swap, instance),
            Action::Sleep { swap, instance } => self.sleep(swap, instance),
            Action::Wake { swap, instance, deadline } => self.wake(swap, instance, deadline),
            Action::WatchMemory { swap, .. } => {
                let generation = self.id();
                self.watches.insert(swap, generation);
                let delay = self.rng.below(6);
                self.after(delay, Next::Watch { swap, generation, step_ms: 5 });
            }
            Action::UnwatchMemory { swap } => {
                self.watches.remove(&swap);
            }
            Action::Prepare { .. }
            | Action::Answer { .. }
            | Action::Record(_)
            | Action::Remember { .. }
            | Action::TtlExtended { .. }
            | Action::Notice { .. } => {}
        }
    }

    fn begin(&mut self, kind: Kind, swap: SwapId, instance: InstanceId) -> u64 {
        let id = self.id();
        self.effects.insert(id, Effect { kind, swap, instance, fault: None });
        id
    }

    fn end_after(&mut self, effect: u64, ms: u64, fault: Option<Fault>) {
        if let Some(effect) = self.effects.get_mut(&effect) {
            effect.fault = fault;
        }
        self.after(ms, Next::EffectEnd(effect));
    }

    fn unreachable(&self, instance: InstanceId) -> bool {
        self.runtime_down && self.machine.insts.get(&instance).is_some_and(Inst::is_docker)
    }

    fn preflight(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        model: &ModelName,
        gpus: Vec<GpuId>,
    ) {
        self.instance(instance, model, gpus, Real::Preparing);
        let effect = self.begin(Kind::Preflight, swap, instance);
        let ms = self.rng.skewed(50);
        let bad = if self.unreachable(instance) {
            Some(fault(FaultKind::RuntimeUnreachable))
        } else {
            self.rng.chance(self.faults.preflight).then(|| fault(FaultKind::ImageMissing))
        };
        self.end_after(effect, ms, bad);
    }

    pub fn instance(&mut self, id: InstanceId, model: &ModelName, gpus: Vec<GpuId>, real: Real) {
        let Some(spec) = self.catalog.model(model).cloned() else { return };
        let truth = &self.truth[model];
        let inst = Inst {
            model: model.clone(),
            spec,
            gpus,
            real,
            need: truth.awake,
            residue: truth.residue,
            held: Bytes::ZERO,
            pid: self.machine.pid(),
            pid_visible: true,
            stuck: false,
            ram_need: truth.ram,
            ram_held: Bytes::ZERO,
        };
        self.machine.insts.insert(id, inst);
        self.machine.gates.insert(id, Gate::default());
    }

    fn fetch(&mut self, swap: SwapId, instance: InstanceId, model: &ModelName) {
        let effect = self.begin(Kind::Fetch, swap, instance);
        let ms = self.truth.get(model).map_or(0, |truth| self.rng.within(truth.fetch_ms));
        let bad = self.rng.chance(self.faults.fetch).then(|| fault(FaultKind::FetchFailed));
        self.end_after(effect, ms, bad);
    }

    fn start(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        model: &ModelName,
        footprint: Option<Bytes>,
        deadline: Time,
    ) {
        let effect = self.begin(Kind::Start, swap, instance);
        let (Some(truth), Some(inst)) =
            (self.truth.get(model), self.machine.insts.get_mut(&instance))
        else {
            return;
        };
        inst.real = Real::Launching;
        (inst.pid_visible, inst.stuck, inst.held) = (true, false, Bytes::ZERO);
        if inst.spec.vram == Vram::Rest {
            inst.need = footprint.unwrap_or(truth.awake);
        }
        let ms = self.rng.within(truth.start_ms);
        let broken = truth.broken;
        let limit = deadline.0.saturating_sub(self.now);
        if self.unreachable(instance) {
            let ms = self.rng.range(100, 2000);
            return self.end_after(effect, ms, Some(fault(FaultKind::RuntimeUnreachable)));
        }
        if self.rng.chance(self.faults.start_transient) {
            let ms = self.rng.range(1, 20);
            return self.end_after(effect, ms, Some(fault(FaultKind::PortTaken)));
        }
        self.after(ms / 10, Next::Allocate { effect, whole: false });
        self.after(ms * 6 / 10, Next::Allocate { effect, whole: true });
        if broken || self.rng.chance(self.faults.start_crash) {
            let ms = self.rng.range(0, ms);
            return self.end_after(effect, ms, Some(fault(FaultKind::Exited)));
        }
        if self.rng.chance(self.faults.start_hang) || ms > limit {
            return self.end_after(effect, limit, Some(fault(FaultKind::TimedOut)));
        }
        if self.rng.chance(900) {
            self.after(ms * 9 / 10, Next::Vouch(effect));
        }
        self.end_after(effect, ms, None);
    }

    pub fn vouch(&mut self, effect: u64) {
        if let Some(effect) = self.effects.get(&effect) {
            let (swap, instance) = (effect.swap, effect.instance);
            self.tell(Event::Vouching { swap, instance });
        }
    }

    pub fn allocate(&mut self, id: u64, whole: bool) {
        let Some(effect) = self.effects.get(&id) else { return };
        let instance = effect.instance;
        // What died meanwhile takes nothing more.
        let loads = |inst: &&Inst| matches!(inst.real, Real::Launching | Real::Waking);
        let Some(inst) = self.machine.insts.get(&instance).filter(loads) else { return };
        let want = if whole { inst.need } else { Bytes(inst.need.0 / 3) };
        let more = want - inst.held;
        let ram = if whole { inst.ram_need } else { Bytes(inst.ram_need.0 / 3) };
        let too_much = self.machine.host_free() < ram - inst.ram_held;
        if too_much || inst.gpus.iter().any(|&gpu| self.machine.free(gpu) < more) {
            self.note(|| format!("{instance} meets an out-of-memory"));
            self.end_after(id, 1, Some(fault(FaultKind::OutOfMemory)));
        } else if let Some(inst) = self.machine.insts.get_mut(&instance) {
            inst.held = inst.held.max(want);
            inst.ram_held = inst.ram_held.max(ram);
        }
    }

    fn stop(&mut self, swap: SwapId, instance: InstanceId) {
        self.cancel_effects(instance);
        let effect = self.begin(Kind::Stop, swap, instance);
        let unreachable = self.unreachable(instance);
        let Some(inst) = self.machine.insts.get_mut(&instance) else { return };
        let stop_ms = self.truth.get(&inst.model).map_or((1, 10), |truth| truth.stop_ms);
        let ms = self.rng.within(stop_ms);
        match inst.real {
            Real::Gone => self.end_after(effect, ms.min(5), None),
            Real::Preparing => {
                inst.real = Real::Gone;
                self.end_after(effect, ms.min(20), None);
            }
            _ if unreachable => {
                let ms = self.rng.range(10, 2000);
                self.end_after(effect, ms, Some(fault(FaultKind::RuntimeUnreachable)));
            }
            _ => {
                inst.real = Real::Dying;
                let bad = self.rng.chance(self.faults.stop_fail);
                self.end_after(effect, ms, bad.then(|| fault(FaultKind::StopFailed)));
            }
        }
    }

    /// A stop ends what is under way; its completion may still arrive, as a cancellation.
    fn cancel_effects(&mut self, instance: InstanceId) {
        let under_way: Vec<u64> = self
            .effects
            .iter()
            .filter(|(_, effect)| effect.instance == instance && effect.kind != Kind::Stop)
            .map(|(&id, _)| id)
            .collect();
        for id in under_way {
            let Some(effect) = self.effects.remove(&id) else { continue };
            if self.rng.chance(700) {
                let done = effect.done(Err(fault(FaultKind::Cancelled)));
                self.tell(Event::MoveDone { swap: effect.swap, instance, done });
            }
        }
    }

    fn sleep(&mut self, swap: SwapId, instance: InstanceId) {
        let effect = self.begin(Kind::Sleep, swap, instance);
        let Some(inst) = self.machine.insts.get_mut(&instance) else { return };
        let ms = self.rng.within(self.truth[&inst.model].sleep_ms);
        if inst.real != Real::Ready {
            return self.end_after(effect, 5, Some(fault(FaultKind::SleepFailed)));
        }
        inst.real = Real::FallingAsleep;
        let bad = self.rng.chance(self.faults.sleep_fail);
        self.end_after(effect, ms, bad.then(|| fault(FaultKind::SleepFailed)));
    }

    fn wake(&mut self, swap: SwapId, instance: InstanceId, deadline: Time) {
        let effect = self.begin(Kind::Wake, swap, instance);
        let Some(inst) = self.machine.insts.get_mut(&instance) else { return };
        let ms = self.rng.within(self.truth[&inst.model].wake_ms);
        if inst.real != Real::Asleep {
            return self.end_after(effect, 5, Some(fault(FaultKind::WakeFailed)));
        }
        inst.real = Real::Waking;
        self.after(ms / 2, Next::Allocate { effect, whole: true });
        let late = self.now + ms > deadline.0;
        let bad = late || self.rng.chance(self.faults.wake_fail);
        self.end_after(effect, ms, bad.then(|| fault(FaultKind::WakeFailed)));
    }

    pub fn effect_end(&mut self, id: u64) {
        let Some(effect) = self.effects.remove(&id) else { return };
        let instance = effect.instance;
        let result = match effect.fault.clone() {
            Some(fault) => self.effect_failed(&effect, fault),
            None => self.effect_worked(&effect),
        };
        let transient = matches!(&result, Err(fault) if fault.kind.is_transient());
        let failed_start = effect.kind == Kind::Start && result.is_err();
        let event = Event::MoveDone { swap: effect.swap, instance, done: effect.done(result) };
        if failed_start && self.rng.chance(150) {
            let fault = fault(FaultKind::Exited);
            self.tell(Event::InstanceDied { instance, fault });
        }
        self.tell(event.clone());
        // A repeated transient failure could not be told from that of the retry.
        if !transient && self.rng.chance(self.faults.duplicate) {
            let later = self.rng.skewed(30_000);
            self.after(later + 4, Next::Tell(event.clone()));
        }
        if self.rng.chance(self.faults.stale)
            && let Event::MoveDone { done, .. } = event
        {
            let swap = SwapId(9_000_000);
            self.tell(Event::MoveDone { swap, instance, done });
        }
    }

    fn effect_worked(&mut self, effect: &Effect) -> Result<Option<Bytes>, Fault> {
        let visible = self.scenario.proof && self.rng.chance(850);
        let Some(inst) = self.machine.insts.get_mut(&effect.instance) else { return Ok(None) };
        let bytes = (visible && !inst.gpus.is_empty()).then_some(());
        match (effect.kind, inst.real) {
            (Kind::Start, Real::Launching) | (Kind::Wake, Real::Waking) => {
                inst.real = Real::Ready;
                inst.ram_held = inst.ram_need;
                Ok(bytes.map(|()| inst.held))
            }
            (Kind::Sleep, Real::FallingAsleep) => {
                inst.real = Real::Asleep;
                inst.ram_held += inst.weights();
                inst.held = inst.residue.min(inst.held);
                Ok(bytes.map(|()| inst.held))
            }
            (Kind::Stop, _) => {
                self.kill(effect.instance);
                Ok(None)
            }
            (Kind::Preflight | Kind::Fetch, _) => Ok(None),
            _ => Err(fault(FaultKind::Exited)),
        }
    }

    fn effect_failed(&mut self, effect: &Effect, fault: Fault) -> Result<Option<Bytes>, Fault> {
        let down = self.unreachable(effect.instance);
        let Some(inst) = self.machine.insts.get_mut(&effect.instance) else { return Err(fault) };
        match effect.kind {
            // A start that failed leaves no process behind; its memory may take a while.
            Kind::Start => self.kill(effect.instance),
            Kind::Stop if fault.kind == FaultKind::RuntimeUnreachable => {
                if !down && inst.real == Real::Gone {
                    return Ok(None);
                }
            }
            // It dies in the end, but not now.
            Kind::Stop => {
                let ms = self.rng.skewed(60_000);
                self.after(ms, Next::Exit(effect.instance));
            }
            Kind::Sleep if inst.real == Real::FallingAsleep => inst.real = Real::Ready,
            Kind::Wake if inst.real == Real::Waking => {
                inst.real = Real::Asleep;
                inst.held = inst.held.min(inst.residue);
            }
            Kind::Preflight | Kind::Fetch | Kind::Sleep | Kind::Wake => {}
        }
        Err(fault)
    }

    /// The process ends now; its memory follows.
    pub fn kill(&mut self, instance: InstanceId) {
        let Some(inst) = self.machine.insts.get_mut(&instance) else { return };
        if inst.real == Real::Gone {
            return;
        }
        (inst.real, inst.ram_held) = (Real::Gone, Bytes::ZERO);
        let truth = &self.truth[&inst.model];
        let mut ms = self.rng.within(truth.release_ms);
        inst.stuck = truth.never_frees
            || (self.scenario.proof && self.rng.chance(self.faults.stuck_release));
        if self.scenario.proof && self.rng.chance(self.faults.late_release) {
            ms = self.rng.range(0, 30_000);
        }
        inst.pid_visible = truth.never_frees || self.rng.chance(500);
        if inst.held == Bytes::ZERO || self.quiet {
            inst.stuck = false;
        }
        if !inst.stuck {
            self.after(ms, Next::Release(instance));
        }
        self.end_leases(instance, LeaseEnd::Broken, 50);
    }

    /// A process that outlived its stop, or crashes: ends, and is told of.
    pub fn exit_late(&mut self, instance: InstanceId) {
        let Some(inst) = self.machine.insts.get(&instance) else { return };
        if inst.real == Real::Gone {
            return;
        }
        self.kill(instance);
        if self.lost.contains(&instance) {
            return;
        }
        let fault = fault(FaultKind::Exited);
        let ms = self.rng.skewed(50);
        self.after(ms, Next::Tell(Event::InstanceDied { instance, fault }));
    }

    pub fn release_memory(&mut self, instance: InstanceId) {
        if let Some(inst) = self.machine.insts.get_mut(&instance)
            && inst.real == Real::Gone
        {
            (inst.held, inst.stuck) = (Bytes::ZERO, false);
            self.note(|| format!("memory of {instance} is free"));
        }
    }

    pub fn watch(&mut self, swap: SwapId, generation: u64, step_ms: u64) {
        if self.watches.get(&swap) != Some(&generation) {
            return;
        }
        self.sample();
        let next = (step_ms * 2).min(250);
        self.after(next, Next::Watch { swap, generation, step_ms: next });
    }

    pub fn background(&mut self) {
        self.sample();
        let every = if self.quiet { 20_000 } else { self.scenario.sample_every };
        self.after(every, Next::Background);
    }

    /// Readings take a moment to arrive: what they show may be over by then.
    fn sample(&mut self) {
        let seen = if self.no_proof {
            Err(NoProof { message: "Failed to initialize NVML: Unknown Error".to_owned() })
        } else {
            Ok(self.machine.sample(self.now, self.scenario.proof))
        };
        if self.is_sampled() {
            self.tell(Event::MemorySeen(seen));
        }
    }

    pub fn is_sampled(&self) -> bool {
        self.scenario.proof || self.machine.host.is_some_and(|host| host.sampled)
    }
}
