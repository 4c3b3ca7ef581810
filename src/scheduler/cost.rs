//! What moves cost, as earlier ones taught: exponentially weighted means, kept per model.

use std::time::Duration;

use super::Scheduler;
use super::action::Action;
use super::queue::Model;
use super::residency::{Instance, MoveKind};
use crate::units::{Bytes, InstanceId, ModelName};

/// Assumed for a start that was never seen.
const START_UNKNOWN: Duration = Duration::from_secs(10);
/// Assumed for a stop that was never seen.
const STOP_UNKNOWN: Duration = Duration::from_secs(1);
/// Differences between idle times that are shorter than this say little.
const USED_JUST_NOW: Duration = Duration::from_secs(10);
/// Floor of the default `max_wait`.
const MAX_WAIT_FLOOR: Duration = Duration::from_secs(30);
/// Assumed residue of a sleeper that was never measured (seen: 0.5 to 1.4 GB a GPU).
const RESIDUE_UNKNOWN: Bytes = Bytes::gib(2);

fn mean(old: Option<Duration>, new: Duration) -> Duration {
    old.map_or(new, |old| (old * 7 + new * 3) / 10)
}

/// Of an awake instance.
pub(super) fn stop_cost(state: &Model) -> Duration {
    state.learned.stop.unwrap_or(STOP_UNKNOWN)
}

impl Scheduler {
    /// Notes how long a finished move took.
    pub(super) fn learn_move(&mut self, model: &ModelName, kind: MoveKind, took: Duration) {
        let Some(state) = self.models.get_mut(model) else { return };
        let learned = &mut state.learned;
        let slot = match kind {
            MoveKind::Start => &mut learned.start,
            MoveKind::Stop => &mut learned.stop,
            MoveKind::Sleep => &mut learned.sleep,
            MoveKind::Wake => &mut learned.wake,
            MoveKind::Preflight | MoveKind::Fetch => return,
        };
        *slot = Some(mean(*slot, took));
        self.remember(model);
    }

    /// Notes the largest footprint seen; says so only when it grew. What a reload has changed
    /// since teaches nothing about its model.
    pub(super) fn learn_footprint(&mut self, id: InstanceId, bytes: Bytes) {
        let Some(instance) = self.instances.get(&id).filter(|i| self.is_current(i)) else { return };
        let model = &instance.model.clone();
        let Some(state) = self.models.get_mut(model) else { return };
        if bytes == Bytes::ZERO || state.learned.footprint.is_some_and(|known| known >= bytes) {
            return;
        }
        state.learned.footprint = Some(bytes);
        self.remember(model);
    }

    pub(super) fn learn_residue(&mut self, id: InstanceId, bytes: Bytes) {
        let Some(instance) = self.instances.get(&id).filter(|i| self.is_current(i)) else { return };
        let model = &instance.model.clone();
        let Some(state) = self.models.get_mut(model) else { return };
        if state.learned.asleep == Some(bytes) {
            return;
        }
        state.learned.asleep = Some(bytes);
        self.remember(model);
    }

    pub(super) fn remember(&mut self, model: &ModelName) {
        if let Some(state) = self.models.get(model) {
            let learned = state.learned.clone();
            if self.catalog.model(model).is_some_and(|spec| self.pins(spec)) {
                self.standing.fit.clear();
            } else {
                self.standing.fit.remove(model);
            }
            self.emit(Action::Remember { model: model.clone(), learned });
        }
    }

    /// The move that makes the model ready from where it is, if it was ever seen.
    pub(super) fn known_move(&self, model: &ModelName) -> Option<Duration> {
        let learned = &self.models.get(model)?.learned;
        let asleep = self.current(model).is_some_and(Instance::is_sleeping);
        if asleep { learned.wake.or(learned.start) } else { learned.start }
    }

    pub(super) fn move_cost(&self, model: &ModelName) -> Duration {
        self.known_move(model).unwrap_or(START_UNKNOWN)
    }

    pub(super) fn stop_cost(&self, model: &ModelName) -> Duration {
        self.models.get(model).map_or(STOP_UNKNOWN, stop_cost)
    }

    /// What bringing an evicted instance back would take.
    pub(super) fn bring_back(&self, instance: &Instance) -> Duration {
        let learned = self.models.get(&instance.model).map(|m| &m.learned);
        let sleeps = instance.can_sleep().is_some();
        learned
            .and_then(|l| if sleeps { l.wake.or(l.start) } else { l.start })
            .unwrap_or(START_UNKNOWN)
    }

    /// What the loss of an instance is likely to cost: the time to bring it back, by its priority,
    /// the more the sooner it will be wanted again.
    pub(super) fn price(&self, instance: &Instance) -> u128 {
        let gap = self.models.get(&instance.model).and_then(|m| m.gap).unwrap_or_default();
        let wanted_in = (gap.max(instance.idle_for(self.now)) + USED_JUST_NOW).as_millis();
        let back = self.bring_back(instance).as_millis() * 1_000_000;
        back * u128::from(instance.spec.priority.weight_x4()) / wanted_in
    }

    /// How long a ready model may not be given notice.
    pub(super) fn tenure(&self, instance: &Instance) -> Duration {
        let learned = self.models.get(&instance.model).and_then(|m| m.learned.start);
        self.catalog.settings.swap.min_residency.max(learned.unwrap_or_default() * 2)
    }

    /// How long requests for this model wait before notice to leave falls due, where they do not
    /// ask otherwise.
    pub(super) fn max_wait(&self, model: &ModelName) -> Duration {
        let auto = || MAX_WAIT_FLOOR.max(self.known_move(model).unwrap_or_default() * 3);
        self.catalog.settings.swap.max_wait.unwrap_or_else(auto)
    }

    /// What a sleeper keeps is never assumed: it was learned, or a sample will show it.
    pub(super) fn residue_can_be_known(&self, instance: &Instance) -> bool {
        let learned =
            || self.models.get(&instance.model).is_some_and(|m| m.learned.asleep.is_some());
        let blind = instance.gpus.iter().any(|&gpu| self.is_blind(gpu));
        !blind && (self.world.proof || learned())
    }

    /// Bytes that `instance` would keep on each GPU while asleep.
    pub(super) fn residue_expected(&self, instance: &Instance) -> Bytes {
        let promise = instance.promise.unwrap_or_default();
        let learned = self.models.get(&instance.model).and_then(|m| m.learned.asleep);
        learned.unwrap_or_else(|| RESIDUE_UNKNOWN.min(Bytes(promise.0 / 4))).min(promise)
    }

    /// How long an idle model may linger before it leaves for another: its callers' learned gap,
    /// at most a tenth of the round trip.
    pub(super) fn linger(&self, instance: &Instance) -> Duration {
        let Some(state) = self.models.get(&instance.model) else { return Duration::ZERO };
        let (Some(gap), Some(start)) = (state.gap, state.learned.start) else {
            return Duration::ZERO;
        };
        let round_trip = start + state.learned.stop.unwrap_or_default();
        let linger = gap + gap / 2;
        if linger > round_trip / 10 { Duration::ZERO } else { linger }
    }

    /// Notes an idle gap that a new request ended.
    pub(super) fn learn_gap(&mut self, model: &ModelName, gap: Duration) {
        if let Some(state) = self.models.get_mut(model) {
            state.gap = Some(mean(state.gap, gap));
        }
    }
}
