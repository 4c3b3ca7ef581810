//! Engines of the modelled world: how they come and go, and when.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::Stay;
use super::{Effect, Engine, Next, World};
use crate::scheduler::event::{Done, Event, GateCount};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, SwapId};

impl World<'_> {
    pub(super) fn stay_begins(&mut self, instance: InstanceId, bytes: Bytes) {
        let Some(engine) = self.engines.get_mut(&instance) else { return };
        engine.stay = Some(self.stays.len());
        self.stays.push(Stay {
            model: engine.model.clone(),
            gpus: engine.gpus.clone(),
            bytes,
            began: self.now,
            ready: None,
            left: None,
            ended: self.now,
        });
    }

    pub(super) fn leave(&mut self, swap: SwapId, instance: InstanceId, asleep: bool) {
        let Some(engine) = self.engines.get_mut(&instance) else {
            // Called off before anything was there.
            return self.begin(swap, instance, Duration::ZERO, Done::Stop(Ok(())));
        };
        if engine.count.in_flight > 0 {
            return self.forbid(format!("{instance} is stopped while it serves"));
        }
        let (model, stay) = (engine.model.clone(), engine.stay);
        if let Some(stay) = stay {
            self.stays[stay].left = Some(self.now);
        }
        let costs = self.setup.costs(&model);
        // (A sleeper's process ends as any other does.)
        let never_started = !engine.launched;
        let (took, done) = match asleep {
            true => (costs.sleep.unwrap_or_default(), Done::Sleep(Ok(Some(costs.residue)))),
            false if never_started => (Duration::ZERO, Done::Stop(Ok(()))),
            false => (costs.stop, Done::Stop(Ok(()))),
        };
        self.begin(swap, instance, took, done);
    }

    /// Takes the place of an effect under way, which then does not report any more.
    pub(super) fn begin(&mut self, swap: SwapId, instance: InstanceId, took: Duration, done: Done) {
        self.sequence += 1;
        let id = self.sequence;
        let unknown = || Engine::new(ModelName::new(""), Vec::new());
        let engine = self.engines.entry(instance).or_insert_with(unknown);
        engine.effect = Some(Effect { id, swap, done });
        self.at(self.now + took, Next::EffectEnds { instance, effect: id });
    }

    pub(super) fn effect_ends(&mut self, instance: InstanceId, effect: u64) {
        let Some(engine) = self.engines.get_mut(&instance) else { return };
        let Some(Effect { swap, done, .. }) = engine.effect.take_if(|e| e.id == effect) else {
            return;
        };
        match (&done, engine.stay) {
            (Done::Start(_), Some(stay)) => {
                self.stays[stay].ready = Some(self.now);
                // (Its counters begin anew; a woken engine keeps them.)
                engine.count = GateCount::default();
                engine.permits = self.setup.permits(&engine.model);
            }
            (Done::Wake(_), Some(stay)) => self.stays[stay].ready = Some(self.now),
            (Done::Stop(_) | Done::Sleep(_), Some(stay)) => {
                self.stays[stay].ended = self.now;
                engine.stay = None;
            }
            (_, _) => {}
        }
        if matches!(done, Done::Stop(_)) {
            self.open.retain(|_, open| *open != instance);
            self.engines.remove(&instance);
            self.dirty.remove(&instance);
        }
        self.tell(Event::MoveDone { swap, instance, done });
    }
}

impl Engine {
    pub(super) fn new(model: ModelName, gpus: Vec<GpuId>) -> Engine {
        Engine {
            model,
            gpus,
            effect: None,
            launched: false,
            stay: None,
            open: false,
            permits: 0,
            every_release: false,
            count: GateCount::default(),
            serving: BTreeSet::new(),
        }
    }
}
