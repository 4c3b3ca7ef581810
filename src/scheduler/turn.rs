//! Whose turn it is among models that wait, and when a waiter outranks them all.
//!
//! *Score*: what the waiters of a model have suffered, per second that its turn would take. To
//! serve the largest sum of ages keeps the mean wait small when one move serves everybody who
//! waits; the squares, against the oldest age of all, keep those who wait alone from waiting long.
//!
//! *Claim*: a waiter past `max_wait` has a claim, which falls due when everyone overdue before it
//! on the same GPUs could have had a full turn. Until then scores decide, so that an overload,
//! where everybody is overdue, is served as efficiently as ever; once due it outranks them all,
//! the earliest due first, and takes the place of a busy model after its tenure. So nobody waits
//! longer than if the overdue had been served strictly in line.

use std::time::Duration;

use super::Scheduler;
use super::cost::stop_cost;
use super::policy::Candidate;
use super::queue::Model;
use super::residency::Instance;
use crate::config::catalog::ModelSpec;
use crate::units::{ModelName, Priority, Time};

/// Busy models get notice when what waits has suffered so many moves' time for each request that
/// would have to go without them. Less gives way too early: turns become short, and moves many.
pub(super) const NOTICE_MOVES: u128 = 12;
/// Of the mean service time, in the length of a turn: a few requests at once take about twice the
/// mean of one.
const SERVICE_WEIGHT: u32 = 2;
/// Weight of the squares in the score, in per cent of the sum.
const SQUARES_PERCENT: u128 = 100;

/// A waiter's right to a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Since when it is overdue.
    pub since: Time,
    /// From here on it outranks every score.
    pub due: Time,
}

impl Scheduler {
    /// Claims of those who became overdue; ends those of models that wait no more.
    pub(super) fn renew_claims(&mut self) {
        let (mut fresh, mut over): (Vec<(Time, ModelName)>, Vec<ModelName>) = Default::default();
        for (name, state) in &self.models {
            if state.claim.is_none() && state.queue.is_empty() {
                continue;
            }
            let overdue = self.overdue_since(name).filter(|&at| at <= self.now);
            let waits = || !self.current(name).is_some_and(Instance::is_ready);
            match (overdue.filter(|_| waits()), state.claim) {
                (None, Some(_)) => over.push(name.clone()),
                (Some(since), None) => fresh.push((since, name.clone())),
                (None, None) | (Some(_), Some(_)) => {}
            }
        }
        for name in over {
            if let Some(state) = self.models.get_mut(&name) {
                state.claim = None;
            }
        }
        fresh.sort();
        for (since, name) in fresh {
            let due = since + self.turns_before(&name);
            if let Some(state) = self.models.get_mut(&name) {
                state.claim = Some(Claim { since, due });
            }
        }
    }

    /// The turns of those who have a claim on the same GPUs already, but one: whoever is there
    /// now may be in the middle of its own.
    fn turns_before(&self, model: &ModelName) -> Duration {
        let Some(spec) = self.catalog.model(model) else { return Duration::ZERO };
        let turns = self.models.iter().filter(|(name, m)| m.claim.is_some() && *name != model);
        let turns = turns.filter_map(|(name, _)| self.catalog.model(name));
        let turns: Vec<Duration> =
            turns.filter(|other| self.may_share(spec, other)).map(|o| self.full_turn(o)).collect();
        turns.iter().sum::<Duration>() - turns.iter().max().copied().unwrap_or_default()
    }

    /// Whether one may have to wait for the other's room.
    fn may_share(&self, one: &ModelSpec, other: &ModelSpec) -> bool {
        match (self.explicit(one), self.explicit(other)) {
            (Some(one), Some(other)) => one.iter().any(|gpu| other.contains(gpu)),
            _ => true,
        }
    }

    /// The longest turn that a model may take: its tenure, the drain after it, and its move.
    fn full_turn(&self, spec: &ModelSpec) -> Duration {
        let swap = &self.catalog.settings.swap;
        let start = self.move_cost(&spec.name);
        swap.min_residency.max(start * 2) + swap.drain_timeout + start + self.stop_cost(&spec.name)
    }

    /// When a model that waits outranks the others, as things are.
    pub(super) fn claim_due(&self, model: &ModelName) -> Option<Time> {
        let claim = self.models.get(model)?.claim;
        claim.map(|claim| claim.due).or_else(|| self.overdue_since(model))
    }

    /// The age of who waits longest for any model, in milliseconds.
    pub(super) fn longest_wait(&self) -> u128 {
        let oldest = self.models.values().filter_map(|m| m.queue.oldest());
        oldest.min().map_or(0, |at| self.now.since(at).as_millis())
    }

    /// Rank among models that wait (larger is sooner), and what weighs against those who are
    /// there: weighted milliseconds per millisecond of move.
    pub(super) fn score(&self, spec: &ModelSpec, state: &Model, longest: u128) -> (u128, u128) {
        let service = state.visit.mean().unwrap_or_default();
        let start = self.move_cost(&spec.name);
        let turn = start + stop_cost(state) + service * SERVICE_WEIGHT;
        let class = u128::from(spec.priority.weight_x4());
        let (ages, squares) = state.queue.suffered(self.now);
        let waits = (ages + squares * SQUARES_PERCENT / 100 / longest.max(1)) * class;
        (waits * 1000 / (turn.as_millis() + 100), waits / start.as_millis().max(1))
    }

    /// What waits has suffered enough for what the resident would have to leave undone.
    pub(super) fn outweighs(&self, candidate: &Candidate, instance: &Instance) -> bool {
        candidate.pressure >= NOTICE_MOVES * self.stays_weight(instance)
    }

    /// What would have to do without the instance, and as much as one request for itself.
    pub(super) fn stays_weight(&self, instance: &Instance) -> u128 {
        let one = u128::from(Priority::Normal.weight_x4());
        (self.work(instance) + one) * u128::from(instance.spec.priority.weight_x4())
    }

    /// Requests that an instance serves, or has waiting, by their weight.
    pub(super) fn work(&self, instance: &Instance) -> u128 {
        let queued = self.models.get(&instance.model).map_or(0, |m| m.queue.weight_x4());
        let running = u64::from(instance.in_flight()) * Priority::Normal.weight_x4();
        u128::from(queued + running)
    }
}
