//! Who is refused at arrival because the places of its model would come free too late: those
//! ahead of it take longer, by what was learned, than `queue.timeout` lets it wait. Told at once,
//! it can go elsewhere or come back; told after its time it has waited for nothing.
//!
//! The estimate is to be exceeded, not met: every place busy all the time, no other model's turn
//! in between, and half as much again before anybody is refused. So it is refused only what
//! would not have been served.
//!
//! The mean time of a lease is taken while others wait for a place, when every end is told at
//! once: by Little's law it is the leases held, summed over time, per lease that ended.

use std::time::Duration;

use super::Scheduler;
use super::action::Refusal;
use super::residency::Instance;
use super::waiters::Waiter;
use crate::units::InstanceId;

/// Fewer ended leases say nothing.
const LEARNED_FROM: u64 = 8;
/// Then the older ones count half.
const REMEMBERED: u64 = 64;

/// Leases of one model, as far as others waited meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Service {
    pub held_ms: u64,
    pub ended: u64,
}

impl Service {
    fn add(&mut self, held: Duration, leases: u32, ended: u64) {
        let held = u64::try_from(held.as_millis()).unwrap_or(u64::MAX);
        self.held_ms = self.held_ms.saturating_add(held.saturating_mul(leases.into()));
        self.ended = self.ended.saturating_add(ended);
        while self.ended >= REMEMBERED {
            (self.held_ms, self.ended) = (self.held_ms / 2, self.ended / 2);
        }
    }

    pub fn mean(&self) -> Option<Duration> {
        let known = self.ended >= LEARNED_FROM;
        known.then(|| Duration::from_millis(self.held_ms / self.ended))
    }
}

impl Scheduler {
    /// Before the count of a gate changes, by `ended` leases among others.
    pub(super) fn count_service(&mut self, id: InstanceId, ended: u64) {
        let now = self.now;
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let gate = &mut instance.gate;
        let since = std::mem::replace(&mut gate.counted_at, now);
        // Else leases come and go of which we hear later.
        let (watched, exact) = (gate.watched, gate.watched && !gate.open && !gate.unconfirmed);
        let (leases, model) = (gate.count.in_flight, &instance.model);
        let Some(state) = self.models.get_mut(model) else { return };
        if exact {
            state.service.add(now.since(since), leases, ended);
        }
        if watched {
            state.visit.add(now.since(since), leases, ended);
        }
    }

    /// Why the waiter had better not wait.
    pub(super) fn overloaded(&self, waiter: &Waiter) -> Option<Refusal> {
        let model = &waiter.request.model;
        let state = self.models.get(model)?;
        let mean = state.service.mean()?;
        let instance = self.current(model).filter(|i| i.is_ready());
        let places = self.catalog.model(model)?.concurrency?;
        let places = places.max(instance.map_or(0, Instance::permits));
        let ahead = state.queue.ahead_of(waiter);
        let ready_in = instance.is_none().then(|| self.known_move(model)).flatten();
        let work = mean.saturating_mul(u32::try_from(ahead).unwrap_or(u32::MAX)) / places.max(1);
        let expected = work + ready_in.unwrap_or_default();
        let timeout = self.catalog.settings.queue.timeout;
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        // By the line alone: who comes first starts the model, however long that takes.
        (work >= timeout + timeout / 2)
            .then(|| Refusal::Overloaded { expected_ms: ms(expected), timeout_ms: ms(timeout) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_follows_the_newest_leases() {
        let mut service = Service::default();
        let second = Duration::from_secs(1);
        for _ in 0..7 {
            service.add(second, 2, 1);
        }
        assert_eq!(service.mean(), None, "too few");
        service.add(second, 2, 1);
        assert_eq!(service.mean(), Some(2 * second), "two at a time, one ended each second");
        for _ in 0..400 {
            service.add(second, 4, 1);
        }
        let mean = service.mean().expect("learned");
        assert!(mean.abs_diff(4 * second) < Duration::from_millis(50), "{mean:?}");
    }
}
