//! The owner's protocol as it is written on `Event` and `Action`: gates are read before any other
//! event, effects report once (and here once more, and too late), memory is read after each move.

use std::collections::BTreeMap;

use wharf::scheduler::action::Action;
use wharf::scheduler::event::{
    Done, Event, Fault, FaultKind, GateCount, GpuMemory, Holder, MemorySample,
};
use wharf::scheduler::record::SchedulerView;
use wharf::units::{Bytes, GpuId, InstanceId, SwapId, Time};

use crate::models::{GPU, RESIDUE, bytes};
use crate::reference::Told;
use crate::world::{Check, Counters, Engine, Move, World, take};

/// More wakes than this at one instant: the scheduler spins.
const WAKES_MAX: usize = 50;

impl World {
    /// A move ends. Its completion is delivered twice, and late ones of what was called off with
    /// it: nothing may come of those. Then memory is read.
    pub fn completes(&mut self, id: InstanceId, well: bool) -> Check {
        self.advance(self.now + 1)?;
        let engine = self.engines.get_mut(&id).ok_or("no such engine")?;
        let (what, swap) = engine.moving.take().ok_or("nothing moves")?;
        let stale = engine.stale.take();
        let model = engine.model.clone();
        let took = self.now - engine.moving_since;
        if what == Move::Release {
            engine.held = Bytes::ZERO;
            return self.sample();
        }
        if let Some((what, swap)) = stale {
            let done = self.done(id, what, true)?;
            self.nothing_comes_of(Event::MoveDone { swap, instance: id, done })?;
        }
        if well && what == Move::Start {
            self.reference.slowest_start = self.reference.slowest_start.max(took);
        }
        if !well {
            self.reference.failed.insert(model);
            self.reference.stuck |= what == Move::Stop;
        }
        let done = self.done(id, what, well)?;
        self.told_of(id, what, well)?;
        let event = Event::MoveDone { swap, instance: id, done };
        self.deliver(event.clone())?;
        // (Not where the same was begun once more.)
        if self.engines.get(&id).is_none_or(|e| e.moving.is_none_or(|m| m.1 != swap)) {
            self.nothing_comes_of(event)?;
        }
        self.sample()
    }

    fn done(&mut self, id: InstanceId, what: Move, well: bool) -> Result<Done, String> {
        let engine = self.engines.get(&id).ok_or("no such engine")?;
        let fault = |kind: FaultKind| Fault::new(kind, "it was its turn to fail");
        let held = Some(engine.held);
        Ok(match (what, well) {
            (Move::Fetch, true) => Done::Fetch(Ok(())),
            (Move::Fetch, false) => Done::Fetch(Err(fault(FaultKind::FetchFailed))),
            (Move::Start, true) => Done::Start(Ok(held)),
            (Move::Start, false) => Done::Start(Err(fault(self.setup.fault))),
            (Move::Stop | Move::Release, true) => Done::Stop(Ok(())),
            (Move::Stop | Move::Release, false) => Done::Stop(Err(fault(FaultKind::StopFailed))),
            (Move::Sleep, true) => Done::Sleep(Ok(Some(RESIDUE))),
            (Move::Sleep, false) => Done::Sleep(Err(fault(FaultKind::SleepFailed))),
            (Move::Wake, true) => Done::Wake(Ok(held)),
            (Move::Wake, false) => Done::Wake(Err(fault(FaultKind::WakeFailed))),
        })
    }

    /// What really happened, and what the scheduler is about to hear of it.
    fn told_of(&mut self, id: InstanceId, what: Move, well: bool) -> Check {
        let late = self.setup.late_release;
        let swap = SwapId(0);
        let engine = self.engines.get_mut(&id).ok_or("no such engine")?;
        match (what, well) {
            (Move::Start | Move::Wake, true) => self.tell(id, Told::Ready),
            (Move::Sleep, true) => {
                engine.held = RESIDUE;
                self.tell(id, Told::Asleep)
            }
            (Move::Stop, true) => {
                engine.runs = false;
                if late && engine.held > Bytes::ZERO {
                    engine.moving = Some((Move::Release, swap));
                    self.reference.stuck = true;
                } else {
                    engine.held = Bytes::ZERO;
                }
                Ok(())
            }
            (Move::Sleep, false) => self.tell(id, Told::Ready),
            (Move::Wake, false) => self.tell(id, Told::Asleep),
            (Move::Fetch | Move::Release, _) | (Move::Start | Move::Stop, false) => Ok(()),
        }
    }

    /// Lets time pass, with every wake in its time.
    pub fn advance(&mut self, until: u64) -> Check {
        for _ in 0..WAKES_MAX {
            match self.scheduler.next_wake() {
                Some((at, _)) if at.0 <= until => {
                    self.now = self.now.max(at.0);
                    self.deliver(Event::Woke)?;
                }
                Some(_) | None => {
                    self.now = self.now.max(until);
                    return Ok(());
                }
            }
        }
        Err(format!("the scheduler spins: {:?}", self.scheduler.next_wake()))
    }

    /// A reading of the memory, a moment later.
    pub fn sample(&mut self) -> Check {
        self.advance(self.now + 1)?;
        let gpus = [0, 1].map(|n| self.memory_of(GpuId(n))).to_vec();
        let sample =
            MemorySample { taken_at: Time(self.now), gpus, host: None, ram: BTreeMap::new() };
        self.seen();
        self.deliver(Event::MemorySeen(Ok(sample)))
    }

    fn memory_of(&self, gpu: GpuId) -> GpuMemory {
        let here = self.engines.iter().filter(|(_, e)| e.gpus.contains(&gpu));
        let holders: Vec<Holder> = here
            .filter(|(_, e)| e.held > Bytes::ZERO)
            .map(|(&id, e)| Holder {
                pid: 1000 + id.0 as u32,
                bytes: e.held,
                label: e.model.to_string(),
                instance: Some(id),
            })
            .collect();
        let held: Bytes = holders.iter().map(|holder| holder.bytes).sum();
        GpuMemory { gpu, uuid: format!("GPU-{}", gpu.0), total: GPU, free: GPU - held, holders }
    }

    /// One event for the scheduler, after every gate that changed, and all that follows at once.
    pub fn deliver(&mut self, event: Event) -> Check {
        self.read_gates()?;
        self.handle(event)?;
        self.follow()
    }

    pub fn follow(&mut self) -> Check {
        while let Some(event) = self.inbox.pop_front() {
            self.handle(event)?;
        }
        Ok(())
    }

    pub fn read_gates(&mut self) -> Check {
        for id in std::mem::take(&mut self.unread) {
            self.read_gate(id);
        }
        self.follow()
    }

    fn read_gate(&mut self, id: InstanceId) {
        if let Some(engine) = self.engines.get(&id) {
            let Counters { in_flight, granted, last_used } = engine.gate.count;
            let gate = GateCount { in_flight, granted, last_used: Time(last_used) };
            self.inbox.push_back(Event::GateSeen { instance: id, gate });
        }
    }

    fn nothing_comes_of(&mut self, event: Event) -> Check {
        self.read_gates()?;
        let mut out = Vec::new();
        let text = format!("{event:?}");
        self.scheduler.handle(Time(self.now), event, &mut out);
        if out.is_empty() { Ok(()) } else { Err(format!("{text} is stale, and yet: {out:?}")) }
    }

    fn handle(&mut self, event: Event) -> Check {
        self.note(|| format!("    < {event:?}"));
        let mut out = Vec::new();
        self.scheduler.handle(Time(self.now), event, &mut out);
        for action in out {
            if !matches!(action, Action::Record(_)) {
                self.note(|| format!("      > {action:?}"));
            }
            self.judge(&action)?;
            self.perform(action)?;
        }
        self.scheduler.check_invariants()
    }

    pub fn view(&self) -> SchedulerView {
        self.scheduler.view(Time(self.now))
    }

    pub fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let mut text = text();
            text.truncate(text.char_indices().nth(230).map_or(text.len(), |(at, _)| at));
            trace.push(text);
        }
    }

    fn perform(&mut self, action: Action) -> Check {
        let now = self.now;
        match action {
            Action::Grant { request, instance } => {
                take(self.engine(instance)?, request, now);
            }
            Action::OpenGate { instance, permits } => {
                let gate = &mut self.engine(instance)?.gate;
                (gate.open, gate.permits) = (true, permits);
                self.book_mut(instance)?.closed_at = None;
            }
            Action::CloseGate { instance } => {
                self.engine(instance)?.gate.open = false;
                self.read_gate(instance);
            }
            Action::WatchGate { instance, every_release } => {
                self.engine(instance)?.gate.every_release = every_release;
            }
            Action::CancelLeases { instance, .. } => {
                let engine = self.engine(instance)?;
                engine.leases.clear();
                engine.gate.count.in_flight = 0;
                self.read_gate(instance);
            }
            Action::Preflight { swap, instance, model, gpus } => {
                self.engines.insert(instance, Engine::new(model, gpus));
                let done = Done::Preflight(Ok(()));
                self.inbox.push_back(Event::MoveDone { swap, instance, done });
            }
            Action::Fetch { swap, instance, .. } if self.setup.fetched => {
                let done = Done::Fetch(Ok(()));
                self.inbox.push_back(Event::MoveDone { swap, instance, done });
            }
            Action::Fetch { swap, instance, .. } => self.begin(instance, Move::Fetch, swap)?,
            Action::StartInstance { swap, instance, model, gpus, .. } => {
                let need = bytes(&self.spec(&model));
                let new = || Engine::new(model.clone(), gpus.clone());
                let engine = self.engines.entry(instance).or_insert_with(new);
                (engine.gpus, engine.held, engine.runs) = (gpus, need, true);
                self.begin(instance, Move::Start, swap)?;
            }
            Action::StopInstance { swap, instance } => {
                // One that was called off before anything was done for it.
                if !self.engines.contains_key(&instance) {
                    let done = Done::Stop(Ok(()));
                    self.inbox.push_back(Event::MoveDone { swap, instance, done });
                    return Ok(());
                }
                let engine = self.engine(instance)?;
                engine.stale = engine.moving.take().or(engine.stale);
                self.begin(instance, Move::Stop, swap)?;
            }
            Action::Sleep { swap, instance } => self.begin(instance, Move::Sleep, swap)?,
            Action::Wake { swap, instance, .. } => {
                let model = self.engine(instance)?.model.clone();
                self.engine(instance)?.held = bytes(&self.spec(&model));
                self.begin(instance, Move::Wake, swap)?;
            }
            Action::Refuse { .. }
            | Action::WatchMemory { .. }
            | Action::Prepare { .. }
            | Action::UnwatchMemory { .. }
            | Action::TtlExtended { .. }
            | Action::Answer { .. }
            | Action::Record(_)
            | Action::Remember { .. }
            | Action::Notice { .. } => {}
        }
        Ok(())
    }

    fn begin(&mut self, instance: InstanceId, what: Move, swap: SwapId) -> Check {
        let now = self.now;
        let engine = self.engine(instance)?;
        (engine.moving, engine.moving_since) = (Some((what, swap)), now);
        Ok(())
    }

    pub fn engine(&mut self, instance: InstanceId) -> Result<&mut Engine, String> {
        self.engines.get_mut(&instance).ok_or_else(|| format!("{instance} is no engine"))
    }
}
