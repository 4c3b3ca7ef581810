//! The next time at which something falls due by itself, and why.

use super::policy::Urgency;
use super::record::{Phase, SwapCause};
use super::residency::{Instance, MoveKind};
use super::swap::{CANCEL_GRACE, FETCH_CLAIM};
use super::{Scheduler, WakeCause};
use crate::units::{ModelName, Time};

type Due = (Time, WakeCause);

impl Scheduler {
    /// Things that `handle` deals with when their time comes: never left overdue.
    pub(super) fn deadlines(&self) -> impl Iterator<Item = Due> + '_ {
        let queue_timeout = self.catalog.settings.queue.timeout;
        let waiters = self.models.values().flat_map(move |m| {
            let oldest = m.queue.first_entry().map(|at| at + queue_timeout);
            let retry = m.failure.as_ref().map(|f| (f.retry_at, WakeCause::RetryAt));
            oldest.map(|at| (at, WakeCause::QueueTimeout)).into_iter().chain(retry)
        });
        let asks = self.asks.values().map(|a| (a.deadline, WakeCause::AskDeadline));
        let instances = self.instances.values().flat_map(|i| self.instance_deadlines(i));
        let lost = self.instances.values().filter(|i| i.is_lost()).map(|i| &i.model);
        let lost = lost
            .filter(|name| self.is_wanted(name))
            .filter_map(|name| Some((self.runtime_due(name)?, WakeCause::RuntimeWait)));
        waiters.chain(asks).chain(lost).chain(instances).filter(|(at, _)| *at < Time::MAX)
    }

    fn instance_deadlines(&self, i: &Instance) -> impl Iterator<Item = Due> + use<> {
        let moving = i.moving.map(|m| {
            let cause = match m.kind {
                MoveKind::Preflight | MoveKind::Fetch | MoveKind::Start | MoveKind::Wake => {
                    WakeCause::StartDeadline
                }
                MoveKind::Stop | MoveKind::Sleep => WakeCause::DrainDeadline,
            };
            (m.deadline, cause)
        });
        let drain = i.drain.filter(|_| !i.is_drained() || self.has_privileged(i)).and_then(|d| {
            // Past its deadline and told to end: only the grace is left.
            let at = d.cancelled_at.map_or(d.deadline, |at| at + CANCEL_GRACE);
            (at > self.now).then_some((at, WakeCause::DrainDeadline))
        });
        let release = i
            .release
            .as_ref()
            .filter(|_| i.trouble.is_none() && self.memory.no_proof.is_none())
            .map(|r| (r.since + self.catalog.settings.swap.vram_timeout, WakeCause::VramDeadline));
        let hold = i.hold.map(|h| (h.until, WakeCause::EnsureHold));
        let stop = i.stop_retry.map(|at| (at, WakeCause::RetryAt));
        [moving, drain, release, hold, stop].into_iter().flatten()
    }

    /// Times at which a decision may turn out differently.
    pub(super) fn turns(&self) -> impl Iterator<Item = Due> + '_ {
        let waiting = &self.standing.candidates;
        let anyone = !waiting.is_empty();
        let preloads: Vec<ModelName> = waiting
            .iter()
            .filter(|c| c.urgency == Urgency::Preload)
            .map(|c| c.spec.name.clone())
            .collect();
        let overdue: Vec<Due> = waiting
            .iter()
            .filter_map(|c| self.claim_due(&c.spec.name))
            .map(|at| (at, WakeCause::MaxWait))
            .collect();
        let placed = self.swaps.values().filter(|s| s.is_load()).flat_map(|s| {
            let timeout = self.catalog.settings.swap.vram_timeout;
            let wait = s.memory_wait.map(|at| (at + timeout, WakeCause::VramDeadline));
            let claim =
                (s.phase == Phase::Fetch).then(|| (s.since + FETCH_CLAIM, WakeCause::Linger));
            wait.into_iter().chain(claim)
        });
        let residents = self.instances.values().filter(|i| i.is_ready()).flat_map(move |i| {
            let ttl = self.ttl_due(i).map(|at| (at, WakeCause::Ttl));
            let tenure = (i.ready_at + self.tenure(i), WakeCause::MinResidency);
            // (One in use leaves for none of these.)
            let idle = self.is_idle(i);
            let linger = idle.then(|| (i.last_used() + self.linger(i), WakeCause::Linger));
            let victim = [Some(tenure), linger].into_iter().flatten().filter(move |_| anyone);
            let preloads = preloads.clone().into_iter().filter(move |_| idle);
            let long_idle = preloads.map(|c| (self.idle_enough_at(&c, i), WakeCause::Linger));
            ttl.into_iter().chain(victim).chain(long_idle)
        });
        overdue.into_iter().chain(placed).chain(residents).chain(self.restores())
    }

    /// When warm-up models may come back into free memory.
    fn restores(&self) -> impl Iterator<Item = Due> + '_ {
        self.catalog
            .models
            .values()
            .filter(|spec| self.load_of(&spec.name).is_none_or(|s| s.cause == SwapCause::Restore))
            .flat_map(|spec| self.restore_due(spec).into_iter().chain(self.keep_due(spec)))
            .map(|at| (at, WakeCause::Restore))
    }
}
