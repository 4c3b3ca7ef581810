//! What waits for each model: admission, order, time limits, grants.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::Scheduler;
use super::action::{Action, Refusal};
use super::event::{Fault, Learned, Request};
use super::overload::Service;
use super::quiet::Touched;
use super::residency::{Instance, Residency};
use super::stay::Stay;
use super::turn::Claim;
use super::waiters::{Queue, Waiter};
use crate::config::catalog::ModelSpec;
use crate::units::{InstanceId, ModelName, RequestId, SwapId, Time};

/// First back-off after a failed start; doubles up to the largest.
const BACKOFF_FIRST: Duration = Duration::from_secs(10);
const BACKOFF_MAX: Duration = Duration::from_secs(600);
/// Of what runs elsewhere: to look whether it is back costs nothing.
const BACKOFF_ELSEWHERE_MAX: Duration = Duration::from_secs(20);
/// How long a runtime that stopped answering is waited for: a restart of Docker takes seconds.
pub(super) const RUNTIME_WAIT: Duration = Duration::from_secs(10);

/// What the scheduler keeps of a model beside its instances.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub queue: Queue,
    pub learned: Learned,
    pub service: Service,
    pub failure: Option<Failure>,
    /// Failed starts in a row.
    pub failures: u32,
    /// Deaths of ready instances in a row.
    pub deaths: u32,
    /// Unloaded by hand: not restored until somebody wants it.
    pub unloaded: bool,
    pub stay: Stay,
    /// When its keep window opened.
    pub kept_from: Time,
    /// Learned idle gap between requests.
    pub gap: Option<Duration>,
    pub since: Time,
    /// A start was called off for a higher class, and it was not ready since.
    pub called_off: bool,
    /// Its first waiter is overdue.
    pub claim: Option<Claim>,
    /// Leases of late, about.
    pub visit: Service,
}

/// The residency `Failed{retry_at}`: between two instances, nothing is tried until `retry_at`.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub fault: Fault,
    pub retry_at: Time,
    /// Given to everyone who waits or comes until then.
    pub refusal: Refusal,
}

impl Scheduler {
    pub(super) fn arrived(&mut self, request: Request) {
        if !request.never_start {
            self.last_demand = self.now;
        }
        let model = request.model.clone();
        if let Err(refusal) = self.admit(&request) {
            self.emit(Action::Refuse { request: request.id, refusal });
            return;
        }
        if request.never_start {
            match self.servable_now(&model) {
                Some(instance) => self.grant(request.id, instance),
                None => {
                    self.emit(Action::Refuse { request: request.id, refusal: Refusal::NotLoaded });
                }
            }
            return;
        }
        let overdue_from = if request.attempt > 1 { self.now } else { request.arrived };
        let waiter = Waiter { request, enqueued: self.now, overdue_from };
        if waiter.request.attempt == 1
            && let Some(refusal) = self.overloaded(&waiter)
        {
            self.emit(Action::Refuse { request: waiter.request.id, refusal });
            return;
        }
        if let Some(state) = self.models.get_mut(&model) {
            state.unloaded = false;
            // The first of its model, or of its class, may be given what others could not.
            let leads = state.queue.top().is_none_or(|top| top < waiter.request.priority);
            self.waiting.insert(waiter.request.id, model.clone());
            state.queue.insert(waiter);
            let served = self.current(&model).filter(|i| self.only_serves(i)).map(|i| i.id);
            if leads && served.is_none() {
                self.changed();
            }
            self.touched = Touched { instance: served, model: Some(model) };
        }
    }

    /// Reasons to refuse at once.
    fn admit(&self, request: &Request) -> Result<(), Refusal> {
        if self.shutting_down {
            return Err(Refusal::ShuttingDown);
        }
        let served = |spec: &&Arc<ModelSpec>| spec.adapter.is_none();
        let (Some(spec), Some(state)) =
            (self.catalog.model(&request.model).filter(served), self.models.get(&request.model))
        else {
            return Err(Refusal::UnknownModel);
        };
        if request.never_start || self.servable_now(&request.model).is_some() {
            return Ok(());
        }
        if let Some(failure) = &state.failure
            && !self.current(&request.model).is_some_and(Instance::is_ready)
        {
            return Err(failure.refusal.clone());
        }
        if let Some(refusal) = self.runtime_gone(&request.model) {
            return Err(refusal);
        }
        // One that is away, or asleep, and was configured anew meanwhile will not serve again.
        let serves = |i: &Instance| i.is_ready() || spec.is_same(&i.spec);
        if !self.current(&request.model).is_some_and(serves)
            && !self.standing.fit.contains(&spec.name)
            && let Some(refusal) = self.cannot_fit(spec)
        {
            return Err(refusal);
        }
        let limits = &self.catalog.settings.queue;
        if state.queue.len() >= limits.per_model as usize {
            return Err(Refusal::QueueFull { limit: limits.per_model, per_model: true });
        }
        if self.queued() >= limits.limit as usize {
            return Err(Refusal::QueueFull { limit: limits.limit, per_model: false });
        }
        Ok(())
    }

    pub(super) fn queued(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn queue_len(&self, model: &ModelName) -> usize {
        self.models.get(model).map_or(0, |m| m.queue.len())
    }

    /// Nobody uses it, or waits for it.
    pub(super) fn is_idle(&self, instance: &Instance) -> bool {
        instance.in_flight() == 0 && self.queue_len(&instance.model) == 0
    }

    /// The ready instance that could take one more request of this model right now.
    fn servable_now(&self, model: &ModelName) -> Option<InstanceId> {
        let instance = self.current(model)?;
        (instance.is_ready()
            && self.queue_len(model) == 0
            && instance.in_flight() < instance.permits())
        .then_some(instance.id)
    }

    fn take_out(&mut self, request: RequestId) -> Option<ModelName> {
        let model = self.waiting.remove(&request)?;
        if let Some(state) = self.models.get_mut(&model) {
            state.queue.remove(request);
        }
        Some(model)
    }

    pub(super) fn gone(&mut self, request: RequestId) {
        let Some(model) = self.take_out(request) else { return };
        let served = self.current(&model).filter(|i| self.only_serves(i));
        let is_busy = served.is_some_and(|i| i.in_flight() > 0);
        let instance = served.map(|i| i.id);
        if !is_busy && self.queue_len(&model) == 0 {
            self.changed();
        }
        self.touched = Touched { instance, model: Some(model) };
    }

    pub(super) fn grant(&mut self, request: RequestId, id: InstanceId) {
        let now = self.now;
        self.count_service(id, 0);
        if let Some(instance) = self.instances.get_mut(&id) {
            instance.gate.count.in_flight += 1;
            instance.gate.count.granted += 1;
            instance.gate.count.last_used = instance.gate.count.last_used.max(now);
        }
        self.emit(Action::Grant { request, instance: id });
    }

    /// Grants what may be granted on every ready (or leaving) instance.
    pub(super) fn grant_waiting(&mut self) {
        if self.grant_in_line() {
            return;
        }
        let ids: Vec<InstanceId> = self.instances.keys().copied().collect();
        for id in ids {
            self.grant_from(id);
        }
    }

    pub(super) fn grant_from(&mut self, id: InstanceId) {
        while let Some(request) = self.next_grant(id) {
            self.take_out(request);
            self.grant(request, id);
            self.progressed();
        }
    }

    /// The next waiter that this instance may serve. With limited places the gate is closed
    /// first, so that the gateway cannot take the place we give away.
    pub(super) fn next_grant(&self, id: InstanceId) -> Option<RequestId> {
        let instance = self.instances.get(&id)?;
        let limited = instance.spec.concurrency.is_some();
        if instance.in_flight() >= instance.permits()
            || (limited && (instance.gate.open || instance.gate.unconfirmed))
        {
            return None;
        }
        let mut queue = self.models.get(&instance.model)?.queue.iter();
        if instance.is_ready() {
            return queue.next().map(|w| w.request.id);
        }
        queue.find(|w| self.is_privileged(instance, w)).map(|w| w.request.id)
    }

    /// After notice only what was queued when the tenure began is granted, until the deadline.
    pub(super) fn is_privileged(&self, instance: &Instance, waiter: &Waiter) -> bool {
        instance.drain.is_some_and(|drain| {
            drain.notice && drain.cancelled_at.is_none() && self.now < drain.deadline
        }) && instance.unload.is_none()
            && waiter.enqueued <= instance.ready_at
    }

    pub(super) fn has_privileged(&self, instance: &Instance) -> bool {
        self.models
            .get(&instance.model)
            .is_some_and(|m| m.queue.iter().any(|w| self.is_privileged(instance, w)))
    }

    /// Waiters that a leaving instance leaves behind lead its next tenure.
    pub(super) fn restart_overdue(&mut self, model: &ModelName) {
        let now = self.now;
        if let Some(state) = self.models.get_mut(model) {
            state.queue.restart_overdue(now);
        }
    }

    pub(super) fn refuse_queue(&mut self, model: &ModelName, refusal: &Refusal) {
        let Some(state) = self.models.get_mut(model) else { return };
        for waiter in state.queue.take() {
            self.waiting.remove(&waiter.request.id);
            self.emit(Action::Refuse { request: waiter.request.id, refusal: refusal.clone() });
        }
    }

    /// Refuses what waited for `queue.timeout`.
    pub(super) fn expire_waiters(&mut self) {
        let timeout = self.catalog.settings.queue.timeout;
        let now = self.now;
        let late = |m: &Model| m.queue.first_entry().is_some_and(|at| at + timeout <= now);
        let names: Vec<ModelName> =
            self.models.iter().filter(|(_, m)| late(m)).map(|(name, _)| name.clone()).collect();
        for name in names {
            let waiting_for = self.waiting_for(&name);
            let Some(state) = self.models.get_mut(&name) else { continue };
            for waiter in state.queue.take_late(now, timeout) {
                self.waiting.remove(&waiter.request.id);
                let waited = now.since(waiter.enqueued).as_millis();
                let refusal = Refusal::QueueTimeout {
                    waited_ms: u64::try_from(waited).unwrap_or(u64::MAX),
                    waiting_for: waiting_for.clone(),
                };
                self.emit(Action::Refuse { request: waiter.request.id, refusal });
            }
            self.changed();
        }
    }

    /// When waiting for the lost runtime of the model's instance ends.
    pub(super) fn runtime_due(&self, model: &ModelName) -> Option<Time> {
        let instance = self.current(model)?;
        matches!(instance.residency, Residency::Lost { .. }).then(|| instance.since + RUNTIME_WAIT)
    }

    /// What those who want a model hear whose runtime has been away for long.
    pub(super) fn runtime_gone(&self, model: &ModelName) -> Option<Refusal> {
        let message = self.runtime_fault.clone();
        (self.runtime_due(model)? <= self.now).then_some(Refusal::RuntimeLost { message })
    }

    /// Refuses who waited for a runtime to come back; its instances stay lost, their bytes promised.
    pub(super) fn expire_lost(&mut self) {
        let lost = self.instances.values().filter(|i| i.is_lost()).map(|i| &i.model);
        let names: BTreeSet<ModelName> =
            lost.filter(|name| self.is_wanted(name)).cloned().collect();
        for name in names {
            let Some(refusal) = self.runtime_gone(&name) else { continue };
            self.refuse_queue(&name, &refusal);
            self.refuse_all_asks(&name, &refusal);
            self.changed();
        }
    }

    /// The model enters `Failed{retry_at}`; everyone who waits for it hears why.
    pub(super) fn fail_model(
        &mut self,
        model: &ModelName,
        swap: Option<SwapId>,
        fault: Fault,
        eviction_cost: Duration,
    ) {
        let elsewhere = self.catalog.model(model).is_some_and(|spec| spec.is_external());
        let longest = if elsewhere { BACKOFF_ELSEWHERE_MAX } else { BACKOFF_MAX };
        let Some(state) = self.models.get_mut(model) else { return };
        let doubled = BACKOFF_FIRST * 2_u32.saturating_pow(state.failures.min(6));
        state.failures = state.failures.saturating_add(1);
        let retry_at = self.now + doubled.min(longest).max(eviction_cost * 10);
        let refusal = refusal_of(swap, &fault, retry_at);
        state.failure = Some(Failure { fault, retry_at, refusal: refusal.clone() });
        state.since = self.now;
        self.changed();
        self.refuse_queue(model, &refusal);
        self.refuse_asks(model, &refusal);
    }

    /// Back-offs that ended.
    pub(super) fn expire_failures(&mut self) {
        let now = self.now;
        for state in self.models.values_mut() {
            if state.failure.as_ref().is_some_and(|f| f.retry_at <= now) {
                state.failure = None;
                state.since = now;
            }
        }
    }
}

/// What those who wait for a failed model hear.
pub(super) fn refusal_of(swap: Option<SwapId>, fault: &Fault, retry_at: Time) -> Refusal {
    use super::event::FaultKind as Kind;
    match (swap, fault.kind) {
        (Some(swap), Kind::VramNeverFreed | Kind::StopFailed) => {
            Refusal::VramNeverFreed { swap, fault: fault.clone(), retry_at }
        }
        (swap, _) => Refusal::StartFailed { swap, fault: fault.clone(), retry_at },
    }
}
