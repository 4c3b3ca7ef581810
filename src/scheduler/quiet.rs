//! Most events change nothing that anybody decides: one more request behind others, a place given
//! back on a model that stays busy. These are settled where they happened, and the rest is left.
//!
//! `room` counts whatever bears on a decision: everything but such requests. While it stands where
//! the last settling left it, nothing has fallen due and the last look at who waits is fresh
//! enough, only what the event touched is granted, and its gate set. Ages grow meanwhile, and
//! queues get shorter, and samples show other figures: so while anybody waits for room, no look at
//! them is older than [`LOOK_AGAIN`] when an event comes.

use std::collections::BTreeSet;
use std::time::Duration;

use super::policy::Candidate;
use super::residency::Instance;
use super::{Scheduler, WakeCause};
use crate::units::{Bytes, GpuId, InstanceId, ModelName, Time};

const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What the last whole settling left.
#[derive(Clone, Debug, Default)]
pub(super) struct Standing {
    /// `Scheduler::room` at its end.
    pub room: u64,
    /// When it looked at who waits for room.
    looked: Time,
    /// Who waits for room and has none yet, by rank.
    pub candidates: Vec<Candidate>,
    /// GPUs that the urgent among them wait for.
    pub wanted: BTreeSet<GpuId>,
    /// When something falls due, at the earliest.
    pub due: Option<(Time, WakeCause)>,
    /// Models that were found to fit, while nothing that this depends on has changed.
    pub fit: BTreeSet<ModelName>,
    /// The pinned ones that they were found to fit beside.
    pinned: Vec<(InstanceId, Option<Bytes>)>,
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
        self.note_due(touched.model.as_ref());
        true
    }

    fn is_standing(&self) -> bool {
        let fresh = self.now < self.standing.looked + LOOK_AGAIN;
        self.room == self.standing.room && (fresh || self.standing.candidates.is_empty())
    }

    /// What a request that came or went may be due for.
    fn note_due(&mut self, model: Option<&ModelName>) {
        let timeout = self.catalog.settings.queue.timeout;
        let first = model.and_then(|m| self.models.get(m)).and_then(|m| m.queue.first_entry());
        let times_out = first.map(|at| (at + timeout, WakeCause::QueueTimeout));
        let overdue = model.and_then(|m| self.claim_due(m)).map(|at| (at, WakeCause::MaxWait));
        // Every demand puts off the return of warm-up models.
        let warm = self.catalog.models.values().filter(|spec| spec.warmup);
        let back = warm.filter_map(|spec| Some((self.restore_due(spec)?, WakeCause::Restore)));
        let asked = [times_out, overdue, self.standing.due].into_iter().flatten();
        let due = asked.chain(back).filter(|(at, _)| *at > self.now).min();
        self.standing.due = due;
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
    }

    /// Whether a model fits depends on its size, and on who is pinned beside it.
    pub(super) fn renew_fits(&mut self) {
        let pinned = self.instances.values().filter(|i| !i.is_stopping() && self.is_pinned(i));
        let pinned: Vec<(InstanceId, Option<Bytes>)> = pinned.map(|i| (i.id, i.promise)).collect();
        if pinned != self.standing.pinned || !self.catalog.groups.is_empty() {
            self.standing.fit.clear();
            self.standing.pinned = pinned;
        }
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
