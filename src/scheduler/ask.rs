//! Callers of ensure, load, warm-up and unload, each with exactly one answer.

use std::time::Duration;

use super::Scheduler;
use super::action::{Action, Answer, Refusal};
use super::event::EnsureKind;
use super::queue::refusal_of;
use super::record::{Phase, SwapCause};
use super::residency::{Hold, Instance, Residency};
use crate::units::{AskId, InstanceId, ModelName, SwapId, Time};

/// How long ensure holds its model for a first request.
const HOLD: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AskKind {
    Ready(EnsureKind),
    Gone { instance: InstanceId },
    Asleep { instance: InstanceId },
}

#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub model: ModelName,
    pub kind: AskKind,
    pub deadline: Time,
}

impl Scheduler {
    pub(super) fn ensure_asked(
        &mut self,
        id: AskId,
        model: ModelName,
        kind: EnsureKind,
        deadline: Time,
    ) {
        // Adapters are asked for by their base's name.
        let spec = self.catalog.model(&model).filter(|spec| spec.adapter.is_none()).cloned();
        let refusal = match (&spec, self.models.get(&model)) {
            _ if self.shutting_down => Some(Refusal::ShuttingDown),
            (Some(spec), Some(state)) => match (&state.failure, self.current(&model)) {
                (Some(failure), current) if !current.is_some_and(Instance::is_ready) => {
                    Some(failure.refusal.clone())
                }
                (_, None) => self.cannot_fit(spec),
                (_, Some(_)) => self.runtime_gone(&model),
            },
            (None, _) | (_, None) => Some(Refusal::UnknownModel),
        };
        if let Some(refusal) = refusal {
            self.answer(id, Answer::Refused(refusal));
            return;
        }
        if kind == EnsureKind::Wake
            && let Some(declined) = self.wake_declined(&model)
        {
            return self.answer(id, declined);
        }
        if kind != EnsureKind::Warmup {
            self.last_demand = self.now;
        }
        if let Some(state) = self.models.get_mut(&model) {
            state.unloaded = false;
        }
        let ready = self.current(&model).filter(|i| i.is_ready()).map(|i| i.id);
        if let Some(instance) = ready {
            if kind == EnsureKind::Ensure {
                self.hold(instance);
            }
            self.answer(id, Answer::Ready { instance, swap: None, swapped: false });
            return;
        }
        self.asks.insert(id, Ask { model: model.clone(), kind: AskKind::Ready(kind), deadline });
        if kind != EnsureKind::Warmup {
            self.call_off_for(&model);
        }
    }

    /// An ensure outranks the requests for which its model is being drained.
    fn call_off_for(&mut self, model: &ModelName) {
        let draining = self.current(model).filter(|i| i.residency == Residency::Draining);
        let Some(swap) = draining.and_then(|i| i.drain).map(|d| d.swap) else { return };
        let for_requests = self.swaps.get(&swap).is_some_and(|s| {
            s.is_load() && s.phase == Phase::Drain && s.cause == SwapCause::Request
        });
        if for_requests {
            self.unplace(swap, "an ensure came first");
        }
    }

    pub(super) fn hold(&mut self, instance: InstanceId) {
        let now = self.now;
        if let Some(instance) = self.instances.get_mut(&instance) {
            instance.hold = Some(Hold { until: now + HOLD, ended_before: instance.ended() });
        }
    }

    pub(super) fn expire_holds(&mut self) {
        let now = self.now;
        for instance in self.instances.values_mut() {
            let over = |hold: Hold| hold.until <= now || instance.ended() > hold.ended_before;
            if instance.hold.is_some_and(over) {
                instance.hold = None;
            }
        }
    }

    pub(super) fn unload_asked(&mut self, id: AskId, model: ModelName, force: bool) {
        if !self.models.contains_key(&model) {
            self.answer(id, Answer::Refused(Refusal::UnknownModel));
            return;
        }
        if let Some(state) = self.models.get_mut(&model) {
            state.unloaded = true;
        }
        self.refuse_queue(&model, &Refusal::Unloaded);
        self.refuse_asks(&model, &Refusal::Unloaded);
        self.company.remove(&model);
        self.unload_company(&model);
        let Some(instance) = self.instance_to_unload(&model) else {
            self.answer(id, Answer::Unloaded { was_loaded: false });
            return;
        };
        if self
            .instances
            .get(&instance)
            .is_some_and(|i| matches!(i.residency, Residency::Lost { .. }))
        {
            let message = self.runtime_fault.clone();
            self.answer(id, Answer::Refused(Refusal::RuntimeLost { message }));
            return;
        }
        let kind = AskKind::Gone { instance };
        self.asks.insert(id, Ask { model, kind, deadline: Time::MAX });
        self.unload(instance, force);
    }

    /// The instance an unload means: the current one, else one still on its way out.
    fn instance_to_unload(&self, model: &ModelName) -> Option<InstanceId> {
        let leaving = || self.instances.values().find(|i| i.model == *model).map(|i| i.id);
        self.current(model).map(|i| i.id).or_else(leaving)
    }

    pub(super) fn unload(&mut self, id: InstanceId, force: bool) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        instance.unload = Some(force || instance.unload == Some(true));
        instance.hold = None;
        match instance.residency {
            Residency::Starting { .. } => {
                self.cancel_start(id, "unloaded while it started", SwapCause::Unload);
            }
            Residency::Waking => self.cancel_start(id, "unloaded while it woke", SwapCause::Unload),
            Residency::Draining => {
                if force {
                    self.cancel_leases(id, "unloaded by an operator");
                }
            }
            // `begin_unloads` takes it from here; what is leaving already goes on.
            Residency::Ready
            | Residency::Sleeping { .. }
            | Residency::Stopping
            | Residency::FallingAsleep
            | Residency::Lost { .. } => {}
        }
    }

    pub(super) fn ask_gone(&mut self, id: AskId) {
        self.asks.remove(&id);
    }

    pub(super) fn answer(&mut self, ask: AskId, answer: Answer) {
        self.asks.remove(&ask);
        self.emit(Action::Answer { ask, answer });
    }

    /// The model is ready: everyone who asked for that hears it. True if an ensure was among them.
    pub(super) fn answer_ready(&mut self, model: &ModelName, instance: InstanceId, swap: SwapId) {
        let waiting = self.asks_for(model, |kind| matches!(kind, AskKind::Ready(_)));
        let ensured = self
            .asks
            .values()
            .any(|a| a.model == *model && a.kind == AskKind::Ready(EnsureKind::Ensure));
        if ensured || self.swaps.get(&swap).is_some_and(|s| s.cause == SwapCause::Ensure) {
            self.hold(instance);
        }
        for ask in waiting {
            self.answer(ask, Answer::Ready { instance, swap: Some(swap), swapped: true });
        }
    }

    /// Asks that a ready model satisfies without a swap (its drain was called off).
    pub(super) fn answer_rescued(&mut self) {
        let ready: Vec<(AskId, InstanceId, bool)> = self
            .asks
            .iter()
            .filter_map(|(&id, ask)| match ask.kind {
                AskKind::Ready(kind) => {
                    let instance = self.current(&ask.model).filter(|i| i.is_ready())?;
                    Some((id, instance.id, kind == EnsureKind::Ensure))
                }
                AskKind::Gone { .. } | AskKind::Asleep { .. } => None,
            })
            .collect();
        for (ask, instance, ensure) in ready {
            if ensure {
                self.hold(instance);
            }
            self.answer(ask, Answer::Ready { instance, swap: None, swapped: false });
        }
    }

    pub(super) fn refuse_asks(&mut self, model: &ModelName, refusal: &Refusal) {
        for ask in self.asks_for(model, |kind| matches!(kind, AskKind::Ready(_))) {
            self.answer(ask, Answer::Refused(refusal.clone()));
        }
    }

    /// Also those that want it gone: that goes on by itself.
    pub(super) fn refuse_all_asks(&mut self, model: &ModelName, refusal: &Refusal) {
        for ask in self.asks_for(model, |_| true) {
            self.answer(ask, Answer::Refused(refusal.clone()));
        }
    }

    /// Somebody waits for the model, or for its end.
    pub(super) fn is_wanted(&self, model: &ModelName) -> bool {
        self.queue_len(model) > 0 || self.asks.values().any(|ask| ask.model == *model)
    }

    fn asks_for(&self, model: &ModelName, of: impl Fn(AskKind) -> bool) -> Vec<AskId> {
        let wanted = |ask: &Ask| ask.model == *model && of(ask.kind);
        self.asks.iter().filter(|(_, ask)| wanted(ask)).map(|(&id, _)| id).collect()
    }

    fn asks_to_unload(&self, instance: InstanceId) -> Vec<AskId> {
        let of = AskKind::Gone { instance };
        self.asks.iter().filter(|(_, ask)| ask.kind == of).map(|(&id, _)| id).collect()
    }

    /// The instance is gone, its memory proven free.
    pub(super) fn answer_unloaded(&mut self, instance: InstanceId) {
        for ask in self.asks_to_unload(instance) {
            self.answer(ask, Answer::Unloaded { was_loaded: true });
        }
    }

    /// Answers asks whose deadline passed, or whose instance cannot be made to go.
    pub(super) fn expire_asks(&mut self) {
        let now = self.now;
        let late: Vec<(AskId, ModelName)> = self
            .asks
            .iter()
            .filter(|(_, ask)| ask.deadline <= now)
            .map(|(&id, ask)| (id, ask.model.clone()))
            .collect();
        for (ask, model) in late {
            let swap = self.load_of(&model).map(|s| s.id);
            self.answer(ask, Answer::TimedOut { swap });
        }
        let stuck: Vec<(InstanceId, Refusal)> = self
            .instances
            .values()
            .filter_map(|i| {
                let fault = i.trouble.as_ref()?;
                Some((i.id, refusal_of(i.stopped_by, fault, i.stop_retry.unwrap_or(now))))
            })
            .collect();
        for (instance, refusal) in stuck {
            for ask in self.asks_to_unload(instance) {
                self.answer(ask, Answer::Refused(refusal.clone()));
            }
        }
    }
}
