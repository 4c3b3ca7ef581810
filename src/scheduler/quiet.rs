//! Most events change nothing that anybody decides: one more request behind others, a place given
//! back on a model that stays busy. These are settled where they happened, and the rest is left.
//!
//! `room` counts whatever bears on a decision: everything but such requests. While it stands where
//! the last settling left it, nothing has fallen due and the last look at who waits is fresh
//! enough, only what the event touched is granted, and its gate set. Ages grow meanwhile, and
//! queues get shorter: so a look at whether what waits outweighs what runs is never older than
//! [`LOOK_AGAIN`] when an event comes.

use std::collections::BTreeSet;
use std::time::Duration;

use super::policy::Candidate;
use super::residency::Instance;
use super::{Scheduler, WakeCause};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, Time};

const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Driver bookkeeping moves free memory by less.
const SAMPLE_SLACK: Bytes = Bytes::mib(16);

/// What the last whole settling left.
#[derive(Clone, Debug, Default)]
pub(super) struct Standing {
    /// `Scheduler::room` at its end.
    pub room: u64,
    /// When it looked at who waits for room.
    looked: Time,
    /// Who waits for room and has none yet, by rank.
    pub candidates: Vec<Candidate>,
    /// When something falls due, at the earliest.
    pub due: Option<(Time, WakeCause)>,
    /// Free memory that it decided on, where a sample was fresh.
    free: Vec<(GpuId, Option<Bytes>)>,
    /// Models that were found to fit, while nothing that this depends on has changed.
    pub fit: BTreeSet<ModelName>,
}

/// Requests came or went here, nothing else.
#[derive(Clone, Debug, Default)]
pub(super) struct Touched {
    pub instance: Option<InstanceId>,
    pub model: Option<ModelName>,
}

impl Scheduler {
    /// Something that decisions rest on changed.
    pub(super) fn changed(&mut self) {
        self.changes += 1;
        self.room += 1;
    }

    /// A request came, went or was granted: nothing for others to decide.
    pub(super) fn progressed(&mut self) {
        self.changes += 1;
    }

    /// True if what the event touched is settled, and nothing else has to be.
    pub(super) fn settle_quietly(&mut self) -> bool {
        let touched = std::mem::take(&mut self.touched);
        if !self.is_fair() || self.shutting_down || !self.is_standing() {
            return false;
        }
        if let Some(id) = touched.instance {
            self.grant_from(id);
        }
        if !self.is_standing() {
            return false;
        }
        if let Some(id) = touched.instance {
            self.sync_gate(id, !self.standing.candidates.is_empty());
        }
        if let Some(model) = &touched.model {
            self.note_due(model);
        }
        self.note_put_off(touched.instance);
        true
    }

    fn is_standing(&self) -> bool {
        let fresh = self.now < self.standing.looked + LOOK_AGAIN;
        self.room == self.standing.room && (fresh || self.standing.candidates.is_empty())
    }

    /// What a request of this model that came or went may be due for.
    fn note_due(&mut self, model: &ModelName) {
        let timeout = self.catalog.settings.queue.timeout;
        let first = self.models.get(model).and_then(|m| m.queue.first_entry());
        let times_out = first.map(|at| (at + timeout, WakeCause::QueueTimeout));
        let overdue = self.claim_due(model).map(|at| (at, WakeCause::MaxWait));
        let now = self.now;
        let due = [times_out, overdue, self.standing.due].into_iter().flatten();
        self.standing.due = due.filter(|(at, _)| *at > now).min();
    }

    /// What a use put off: somebody lingers anew, and warm-up models wait for quiet again.
    fn note_put_off(&mut self, used: Option<InstanceId>) {
        let used = used.and_then(|id| self.instances.get(&id)).filter(|i| i.is_ready());
        let lingers = used.map(|i| (i.last_used() + self.linger(i), WakeCause::Linger));
        let ttl = used.and_then(|i| Some((self.ttl_due(i)?, WakeCause::Ttl)));
        let due = self.restores().chain(lingers).chain(ttl).filter(|(at, _)| *at > self.now);
        self.standing.due = due.chain(self.standing.due).min();
    }

    /// Whether something has fallen due that nobody has looked at.
    pub(super) fn is_due(&self) -> bool {
        self.standing.due.is_some_and(|(at, _)| at <= self.now)
    }

    /// At the end of a whole settling.
    pub(super) fn take_standing(&mut self) {
        self.standing.room = self.room;
        self.standing.due = self.first_due();
    }

    pub(super) fn first_due(&self) -> Option<(Time, WakeCause)> {
        let turns = self.turns().filter(|(at, _)| *at > self.now);
        self.deadlines().chain(turns).min()
    }

    /// Whether who waits has to be looked at (again).
    pub(super) fn must_look(&self, settled: u64) -> bool {
        !self.is_fair() || self.room != settled || self.now >= self.standing.looked + LOOK_AGAIN
    }

    /// They wait, and could not be helped.
    pub(super) fn looked_at(&mut self, candidates: Vec<Candidate>) {
        self.standing.looked = self.now;
        self.standing.candidates = candidates;
        self.standing.free = self.free_now();
    }

    fn free_now(&self) -> Vec<(GpuId, Option<Bytes>)> {
        self.world.gpus.iter().map(|g| (g.id, self.fresh_free(g.id))).collect()
    }

    /// A sample showed something else than the last decision was made on.
    pub(super) fn is_news(&self) -> bool {
        let alike = |now: Option<Bytes>, then: Option<Bytes>| match (now, then) {
            (Some(now), Some(then)) => now - then < SAMPLE_SLACK && then - now < SAMPLE_SLACK,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        let now = self.free_now();
        now.len() != self.standing.free.len()
            || !now.iter().zip(&self.standing.free).all(|(now, then)| alike(now.1, then.1))
            || self.is_ram_sampled()
            || self.swaps.values().any(|s| s.memory_wait.is_some())
    }

    /// As `is_idle`, by what is known of its gate.
    pub(super) fn is_idle(&self, instance: &Instance) -> bool {
        instance.in_flight() == 0 && self.queue_len(&instance.model) == 0
    }

    /// Only requests concern it now: it is ready, and nobody has asked for anything else.
    pub(super) fn only_serves(&self, instance: &Instance) -> bool {
        instance.is_ready()
            && !instance.gate.unconfirmed
            && instance.hold.is_none()
            && instance.unload.is_none()
            && !instance.sleep_wanted
    }
}
