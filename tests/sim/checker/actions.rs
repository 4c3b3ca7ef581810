//! Every action goes to its rules; those for grants and gates are here.

use wharf::scheduler::action::Action;
use wharf::units::{Bytes, InstanceId, RequestId};

use super::{Checker, Known, Told};
use crate::machine::{Machine, Real};

impl Checker {
    pub fn on_action(&mut self, now: u64, action: &Action, machine: &Machine) {
        match action {
            Action::Grant { request, instance } => self.grant(*request, *instance, machine),
            Action::Refuse { request, refusal } => self.refuse(now, *request, refusal),
            Action::OpenGate { instance, permits } => self.open(*instance, *permits, machine),
            Action::CloseGate { instance } => {
                if let Some(known) = self.existing(*instance, "CloseGate") {
                    known.open = false;
                    known.closed_at = Some(now);
                }
            }
            Action::WatchGate { instance, .. } => {
                self.existing(*instance, "WatchGate");
            }
            Action::CancelLeases { instance, .. } => self.cancel(now, *instance, machine),
            Action::Preflight { swap, instance, model, gpus } => {
                self.preflight(*swap, *instance, model, gpus);
            }
            Action::Fetch { swap, instance, .. } => self.fetch(*swap, *instance),
            Action::Prepare { swap, instance, .. } => self.prepare(*swap, *instance),
            Action::StartInstance { swap, instance, model, gpus, footprint, deadline } => {
                self.counts.starts += 1;
                self.require(deadline.0 > now, || format!("{instance} starts past its deadline"));
                self.start(*swap, *instance, (model, gpus, *footprint), machine);
            }
            Action::StopInstance { swap, instance } => self.stop(*swap, *instance, machine),
            Action::Sleep { swap, instance } => self.sleep(*swap, *instance, machine),
            Action::Wake { swap, instance, .. } => self.wake(*swap, *instance, machine),
            Action::WatchMemory { swap, .. } => {
                let first = self.watches.insert(*swap);
                self.require(first, || format!("memory is watched twice for {swap}"));
            }
            Action::UnwatchMemory { swap } => {
                let was = self.watches.remove(swap);
                self.require(was, || format!("memory was not watched for {swap}"));
            }
            Action::Answer { ask, answer } => self.answer(now, *ask, answer, machine),
            Action::Record(record) => self.record(now, record),
            Action::TtlExtended { model, until } => {
                let ready = until.is_none() || self.ready(model).is_some();
                self.require(ready, || format!("{model} is extended, which is not ready"));
            }
            Action::Remember { model, learned } => {
                let sane = learned.footprint.is_none_or(|bytes| bytes < Bytes::gib(1000));
                self.require(sane, || format!("learned nonsense of {model}: {learned:?}"));
            }
            Action::Notice { text, .. } => {
                self.require(!text.is_empty(), || "an empty notice".to_owned());
            }
        }
    }

    /// The instance, if the scheduler may still speak of it.
    pub(super) fn existing(&mut self, instance: InstanceId, what: &str) -> Option<&mut Known> {
        if !self.insts.contains_key(&instance) {
            self.fail(format!("{what} for {instance}, which never was"));
        }
        self.insts.get_mut(&instance)
    }

    fn grant(&mut self, request: RequestId, instance: InstanceId, machine: &Machine) {
        self.counts.grants += 1;
        let Some(waiting) = self.forget(request) else {
            return self.fail(format!("{request} is granted, but does not wait"));
        };
        self.stalled.remove(&waiting.model);
        let Some(known) = self.existing(instance, "Grant") else { return };
        let known = known.clone();
        let fine = known.model == waiting.model
            && known.told == Told::Ready
            && !known.lost
            && really_ready(machine, instance);
        if !fine {
            let real = machine.insts.get(&instance).map(|inst| inst.real);
            return self.fail(format!(
                "{request} for {} is granted on {instance}: {} told {:?}, lost {}, really {real:?}",
                waiting.model, known.model, known.told, known.lost
            ));
        }
        let busy = machine.in_flight(instance);
        if let Some(known) = self.insts.get_mut(&instance) {
            known.in_flight += 1;
        }
        let limit = self.concurrency(&known);
        self.require(busy < limit, || {
            format!("{request} is granted on {instance} beside {busy}; the limit is {limit}")
        });
    }

    fn concurrency(&self, known: &Known) -> u32 {
        let now =
            self.catalog.model(&known.model).map_or(known.spec.concurrency, |s| s.concurrency);
        let limit = |limit: Option<u32>| limit.unwrap_or(u32::MAX);
        // A reload may have changed it: the larger one is in force at worst.
        limit(now).max(limit(known.spec.concurrency))
    }

    fn open(&mut self, instance: InstanceId, permits: u32, machine: &Machine) {
        let Some(known) = self.existing(instance, "OpenGate") else { return };
        (known.open, known.cancelled) = (true, false);
        let known = known.clone();
        let fine = known.told == Told::Ready && !known.lost && really_ready(machine, instance);
        self.require(fine, || format!("the gate of {instance} opens: told {:?}", known.told));
        let limit = self.concurrency(&known);
        self.require(permits <= limit, || {
            format!("the gate of {instance} opens with {permits} permits; the limit is {limit}")
        });
    }

    fn cancel(&mut self, now: u64, instance: InstanceId, machine: &Machine) {
        let drain = self.catalog.settings.swap.drain_timeout.as_millis() as u64;
        let forced = self.forced.clone();
        let shutting_down = self.shutting_down;
        let Some(known) = self.existing(instance, "CancelLeases") else { return };
        known.cancelled = true;
        let noticed = known.closed_at.into_iter().chain(known.listed_at).min();
        let drained = noticed.is_some_and(|at| now >= at + drain) && !known.open;
        let dead = known.told == Told::Gone || known.lost;
        let excused = forced.contains(&known.model) || drained || dead || shutting_down;
        self.require(excused || machine.in_flight(instance) == 0, || {
            format!("leases of {instance} are cancelled before drain_timeout ({noticed:?})")
        });
    }
}

/// Ready in truth, or dead so freshly that nobody could know.
pub(super) fn really_ready(machine: &Machine, instance: InstanceId) -> bool {
    machine
        .insts
        .get(&instance)
        .is_some_and(|inst| matches!(inst.real, Real::Ready | Real::Gone | Real::Dying))
}
