//! An operator puts a model to sleep: it drains like one that is unloaded, and keeps its place in
//! host RAM instead. Whoever asks for it afterwards wakes it.

use super::Scheduler;
use super::action::{Answer, Refusal};
use super::ask::{Ask, AskKind};
use super::record::SwapCause;
use super::residency::{Instance, Residency};
use crate::units::{AskId, InstanceId, ModelName, SwapId, Time};

impl Scheduler {
    pub(super) fn sleep_asked(&mut self, ask: AskId, model: ModelName) {
        let instance = match self.may_be_put_to_sleep(&model) {
            Ok(instance) => instance,
            Err(answer) => return self.answer(ask, answer),
        };
        if let Some(state) = self.models.get_mut(&model) {
            // A warm-up model would be woken again at once.
            state.unloaded = true;
        }
        if let Some(instance) = self.instances.get_mut(&instance)
            && instance.is_ready()
        {
            (instance.sleep_wanted, instance.hold) = (true, None);
        }
        let kind = AskKind::Asleep { instance };
        self.asks.insert(ask, Ask { model, kind, deadline: Time::MAX });
        self.changed();
    }

    /// The instance, ready or asleep already.
    fn may_be_put_to_sleep(&self, model: &ModelName) -> Result<InstanceId, Answer> {
        if self.shutting_down {
            return Err(Answer::Refused(Refusal::ShuttingDown));
        }
        if self.catalog.model(model).is_none() {
            return Err(Answer::Refused(Refusal::UnknownModel));
        }
        if let Some(refusal) = self.runtime_gone(model) {
            return Err(Answer::Refused(refusal));
        }
        let declined = |why: String| Err(Answer::Declined { why });
        let Some(instance) = self.current(model) else {
            return declined(format!("{} and cannot be put to sleep", self.not_loaded(model)));
        };
        match instance.residency {
            Residency::Sleeping { .. } | Residency::FallingAsleep => return Ok(instance.id),
            Residency::Ready => {}
            Residency::Draining if self.falls_asleep(instance) => return Ok(instance.id),
            Residency::Starting { .. }
            | Residency::Draining
            | Residency::Stopping
            | Residency::Waking
            | Residency::Lost { .. } => {
                return declined(format!("{}, so it is not put to sleep", self.not_loaded(model)));
            }
        }
        if instance.can_sleep().is_none() {
            return declined(format!(
                "the engine of {model} does not sleep: only vLLM with `sleep: 1` or `sleep: 2` does"
            ));
        }
        if !self.residue_can_be_known(instance) {
            return declined(format!(
                "{model} is not put to sleep where GPU memory cannot be read: nobody could say \
                 what it keeps"
            ));
        }
        if !self.has_ram(self.ram_to_sleep(instance)) {
            return declined(format!(
                "the host has no RAM left for the weights of {model} ({})",
                self.ram_to_sleep(instance)
            ));
        }
        Ok(instance.id)
    }

    /// It drains because it shall sleep, and for nobody else.
    pub(super) fn falls_asleep(&self, instance: &Instance) -> bool {
        let swap = instance.drain.and_then(|drain| self.swaps.get(&drain.swap));
        swap.is_some_and(|swap| swap.cause == SwapCause::Sleep)
    }

    /// The victim of such a swap falls asleep instead of being stopped.
    pub(super) fn let_it_sleep(&mut self, swap: SwapId) {
        if let Some(swap) = self.swaps.get_mut(&swap) {
            for victim in &mut swap.victims {
                victim.asleep = true;
            }
        }
    }

    /// Asks whose model sleeps now, or never will.
    pub(super) fn answer_asleep(&mut self) {
        let decided: Vec<(AskId, Answer)> = self
            .asks
            .iter()
            .filter_map(|(&id, ask)| match ask.kind {
                AskKind::Asleep { instance } => Some((id, self.slept(instance, &ask.model)?)),
                AskKind::Ready(_) | AskKind::Gone { .. } => None,
            })
            .collect();
        for (ask, answer) in decided {
            self.answer(ask, answer);
        }
    }

    fn slept(&self, instance: InstanceId, model: &ModelName) -> Option<Answer> {
        let gone = || Answer::Declined {
            why: format!("{model} did not fall asleep and was stopped: GET /swaps says why"),
        };
        let Some(instance) = self.instances.get(&instance) else { return Some(gone()) };
        match instance.residency {
            Residency::Sleeping { level } if instance.release.is_none() => {
                Some(Answer::Asleep { level })
            }
            Residency::Stopping => Some(gone()),
            // Somebody else's swap put it to sleep, and it was wanted again before we looked.
            Residency::Waking => {
                Some(Answer::Declined { why: format!("{model} was wanted again and wakes") })
            }
            Residency::Starting { .. }
            | Residency::Ready
            | Residency::Draining
            | Residency::FallingAsleep
            | Residency::Sleeping { .. }
            | Residency::Lost { .. } => None,
        }
    }

    /// Why a wake cannot be had: it is for models that sleep.
    pub(super) fn wake_declined(&self, model: &ModelName) -> Option<Answer> {
        let sleeps = self.current(model).is_some_and(|i| match i.residency {
            Residency::Ready
            | Residency::FallingAsleep
            | Residency::Sleeping { .. }
            | Residency::Waking
            | Residency::Lost { asleep: true } => true,
            Residency::Draining => self.falls_asleep(i),
            Residency::Starting { .. }
            | Residency::Stopping
            | Residency::Lost { asleep: false } => false,
        });
        (!sleeps).then(|| Answer::Declined {
            why: format!(
                "{}, so there is nothing to wake: POST /models/{model}/load loads it",
                self.not_loaded(model)
            ),
        })
    }
}
