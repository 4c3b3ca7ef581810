//! Bounded waiting: invariant 5 of the design, computed from what engines really take.

use std::collections::{BTreeMap, BTreeSet};

use wharf::units::{InstanceId, ModelName};

use super::{Checker, Told};
use crate::scenario::{Scenario, Truth};

#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// Milliseconds until a waiting model's turn has come.
    pub turn_ms: u64,
    /// Part of it that is `max_wait`.
    max_wait_ms: u64,
}

/// Samples, crossing messages and polls, per move.
const SLACK_MS: u64 = 1500;

pub(super) fn move_ms(truth: &Truth) -> u64 {
    50 + truth.fetch_ms.1
        + truth.start_ms.1
        + truth.stop_ms.1.max(truth.sleep_ms.1)
        + truth.release_ms.1
        + SLACK_MS
}

/// Only calm runs have one.
pub fn bounds(scenario: &Scenario) -> BTreeMap<ModelName, Bound> {
    if !scenario.calm {
        return BTreeMap::new();
    }
    let swap = &scenario.catalog.settings.swap;
    let (min_residency, drain) =
        (swap.min_residency.as_millis() as u64, swap.drain_timeout.as_millis() as u64);
    // Before a tenure ends, a caller's learned gap may be waited for.
    let turn = |truth: &Truth| {
        let took = move_ms(truth);
        min_residency.max(2 * took) + drain + took + took / 5
    };
    let one = |name: &ModelName| {
        let truth = &scenario.truth[name];
        let max_wait_ms = swap
            .max_wait
            .map_or((3 * move_ms(truth)).max(30_000), |max_wait| max_wait.as_millis() as u64);
        let others = scenario.catalog.models.keys().filter(|other| *other != name);
        let before: u64 = others.map(|other| turn(&scenario.truth[other])).sum();
        Bound { turn_ms: max_wait_ms + before + drain + move_ms(truth), max_wait_ms }
    };
    scenario.catalog.models.keys().map(|name| (name.clone(), one(name))).collect()
}

impl Checker {
    pub(super) fn check_waits(&mut self, now: u64) {
        if self.waiting.is_empty() {
            self.stalled.clear();
            return;
        }
        let ready: BTreeSet<ModelName> = self
            .live
            .iter()
            .map(|id| &self.insts[id])
            .filter(|known| known.told == Told::Ready && !known.lost)
            .map(|known| known.model.clone())
            .collect();
        let mut late = None;
        for (request, waiting) in &mut self.waiting {
            if ready.contains(&waiting.model) {
                // Waiting for a place counts against queue.timeout alone.
                waiting.clock = now;
                continue;
            }
            let Some(bound) = self.bounds.get(&waiting.model) else { continue };
            let asked = waiting.max_wait.map_or(0, |wait| wait.as_millis() as u64);
            let limit = bound.turn_ms + asked.saturating_sub(bound.max_wait_ms);
            let waited = now - waiting.clock;
            self.tightest = self.tightest.max(waited * 1000 / limit);
            if waited > limit {
                let model = &waiting.model;
                late = Some(format!("{request} waits {waited} ms for {model}; bound {limit}"));
            }
        }
        if let Some(late) = late {
            self.fail(late);
        }
        self.check_overtaking(&ready);
        self.check_stalled(now, &ready);
    }

    /// Newcomers go through an open gate by themselves: nobody may wait beside it.
    fn check_overtaking(&mut self, ready: &BTreeSet<ModelName>) {
        let beside = self.waiting.iter().find_map(|(request, waiting)| {
            let open = |id: &&InstanceId| {
                let known = &self.insts[id];
                known.model == waiting.model && known.open
            };
            let gate = ready.contains(&waiting.model).then(|| self.live.iter().find(open));
            Some((*request, *gate??))
        });
        if let Some((request, gate)) = beside {
            self.fail(format!("{request} waits while others go through the open gate of {gate}"));
        }
    }

    /// A ready model with a free place serves who waits for it, unless it is about to leave.
    fn check_stalled(&mut self, now: u64, ready: &BTreeSet<ModelName>) {
        let wanted: BTreeSet<&ModelName> = self.waiting.values().map(|w| &w.model).collect();
        let mut stalled = BTreeMap::new();
        for &model in wanted.intersection(&ready.iter().collect()) {
            let free = self.live.iter().map(|id| &self.insts[id]).any(|known| {
                let limit = known.spec.concurrency.unwrap_or(u32::MAX);
                known.model == *model && known.told == Told::Ready && known.in_flight < limit
            });
            if free {
                let since = self.stalled.get(model).copied().unwrap_or(now);
                stalled.insert(model.clone(), since);
            }
        }
        self.stalled = stalled;
        let swap = &self.catalog.settings.swap;
        // Under notice it grants no more; a neighbour's profiling may hold up its stop.
        let most = (swap.drain_timeout + swap.start_timeout).as_millis() as u64 + 5000;
        let over = self.stalled.iter().find(|(_, since)| now - **since > most);
        if let Some((model, since)) = over.map(|(model, since)| (model.clone(), *since)) {
            self.fail(format!("{model} is ready and has a place, but serves nobody since {since}"));
        }
    }
}
