//! Nobody is refused without reason.

use std::collections::BTreeMap;

use wharf::config::catalog::ModelSpec;
use wharf::scheduler::action::Refusal;
use wharf::units::{ModelName, RequestId, Time};

use super::Checker;
use super::waits::move_ms;
use crate::scenario::{Scenario, Step, fits};

/// The longest that anything of one model takes in a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Longest {
    service_ms: u64,
    move_ms: u64,
}

pub fn longest(scenario: &Scenario) -> BTreeMap<ModelName, Longest> {
    let mut longest: BTreeMap<ModelName, Longest> = BTreeMap::new();
    let mut moves = vec![&scenario.truth];
    for (_, step) in &scenario.steps {
        let plans = match step {
            Step::Arrive(plan) => std::slice::from_ref(plan),
            Step::Loop(turns) => turns.turns.as_slice(),
            Step::Reload(_, truth) => {
                moves.push(truth);
                &[]
            }
            _ => &[],
        };
        for plan in plans {
            let known = longest.entry(plan.model.clone()).or_default();
            known.service_ms = known.service_ms.max(plan.service_ms);
        }
    }
    for (name, truth) in moves.into_iter().flatten() {
        let known = longest.entry(name.clone()).or_default();
        known.move_ms = known.move_ms.max(move_ms(truth));
    }
    longest
}

impl Checker {
    pub(super) fn refuse(&mut self, now: u64, request: RequestId, refusal: &Refusal) {
        *self.counts.refusals.entry(refusal_name(refusal)).or_default() += 1;
        let before = self.waiting.len();
        let of_model = |checker: &Checker, model: &ModelName| {
            checker.waiting.values().filter(|other| other.model == *model).count()
        };
        let Some(waiting) = self.forget(request) else {
            return self.fail(format!("{request} is refused, but does not wait: {refusal:?}"));
        };
        let queue = self.catalog.settings.queue.clone();
        match refusal {
            Refusal::QueueTimeout { .. } => {
                // A retry's age counts from its first arrival.
                let timeout = queue.timeout.as_millis() as u64;
                let early = now + 2 * timeout < waiting.due || now < waiting.at;
                self.require(!early, || format!("{request} timed out early"));
            }
            Refusal::QueueFull { per_model: true, .. } => {
                let others = of_model(self, &waiting.model) + 1;
                let full = others > queue.per_model as usize;
                self.require(full, || format!("{request}: queue not full, {others} wait"));
            }
            Refusal::QueueFull { per_model: false, .. } => {
                let full = before > queue.limit as usize;
                self.require(full, || format!("{request}: queue not full, {before} wait"));
            }
            Refusal::Overloaded { .. } => {
                let others = of_model(self, &waiting.model) as u64;
                let late = self.may_come_too_late(&waiting.model, others);
                self.require(late, || format!("{request} is refused, but only {others} wait"));
            }
            Refusal::NotLoaded => {
                let asked = waiting.never_start;
                self.require(asked, || format!("{request} did not ask for start: never"));
            }
            _ => {}
        }
        self.refusal_is_true(now, &waiting.model, refusal, Some(waiting.at));
    }

    pub(super) fn refusal_is_true(
        &mut self,
        now: u64,
        model: &ModelName,
        refusal: &Refusal,
        arrived: Option<u64>,
    ) {
        let spec = self.catalog.model(model).cloned();
        let holds = match refusal {
            Refusal::UnknownModel => spec.is_none(),
            Refusal::Removed => spec.is_none(),
            // Under notice it takes no one new.
            Refusal::NotLoaded => self.ready(model).is_none_or(|id| {
                let known = &self.insts[&id];
                !known.open || known.in_flight >= known.spec.concurrency.unwrap_or(u32::MAX)
            }),
            Refusal::CannotFit { .. } => self.may_never_fit(spec.as_deref()),
            Refusal::KeptApart { .. } => self.may_be_kept_apart(model),
            Refusal::StartFailed { retry_at, .. } => {
                self.failed_models.contains(model) && *retry_at >= Time(now)
            }
            Refusal::VramNeverFreed { .. } => !self.calm,
            Refusal::NoVramProof { .. } => self.no_proof,
            Refusal::RuntimeLost { .. } => {
                self.ever_lost
                    && self.insts.values().any(|known| known.model == *model && known.lost)
            }
            Refusal::InstanceLost { .. } => !self.calm,
            Refusal::ShuttingDown => self.shutting_down,
            Refusal::Unloaded => !self.calm,
            Refusal::QueueTimeout { .. } => !self.calm || arrived.is_none(),
            // Where all is calm nobody's time passes, so nobody would have come too late.
            Refusal::Overloaded { .. } => !self.calm && arrived == Some(now),
            Refusal::QueueFull { .. } => true,
        };
        self.require(holds, || format!("{model} is refused without reason: {refusal:?}"));
    }

    /// If each of the others takes as long as any request for the model does, their places come
    /// free too late for one more.
    fn may_come_too_late(&self, model: &ModelName, others: u64) -> bool {
        let places = self.catalog.model(model).and_then(|spec| spec.concurrency);
        let longest = self.longest.get(model).copied().unwrap_or_default();
        let start = if self.ready(model).is_some() { 0 } else { longest.move_ms };
        let timeout = self.catalog.settings.queue.timeout.as_millis() as u64;
        places.is_some_and(|places| {
            others * longest.service_ms / u64::from(places) + start >= timeout
        })
    }

    fn may_never_fit(&self, spec: Option<&ModelSpec>) -> bool {
        let Some(spec) = spec else { return false };
        let pinned = self.catalog.models.keys().any(|other| self.may_be_pinned(other));
        let stays = self.catalog.groups.values().any(|group| group.persistent);
        pinned || stays || fits(&self.catalog, &self.gpus, self.host_total(), spec) != Some(true)
    }
}

fn refusal_name(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::UnknownModel => "unknown_model",
        Refusal::NotLoaded => "not_loaded",
        Refusal::QueueFull { .. } => "queue_full",
        Refusal::Overloaded { .. } => "overloaded",
        Refusal::QueueTimeout { .. } => "queue_timeout",
        Refusal::CannotFit { .. } => "cannot_fit",
        Refusal::KeptApart { .. } => "kept_apart",
        Refusal::StartFailed { .. } => "start_failed",
        Refusal::VramNeverFreed { .. } => "vram_never_freed",
        Refusal::NoVramProof { .. } => "no_vram_proof",
        Refusal::RuntimeLost { .. } => "runtime_lost",
        Refusal::Unloaded => "unloaded",
        Refusal::Removed => "removed",
        Refusal::InstanceLost { .. } => "instance_lost",
        Refusal::ShuttingDown => "shutting_down",
    }
}
