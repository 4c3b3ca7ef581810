//! Policies to compare the default with: `wharf replay` runs them through the same queue, memory
//! and swaps. Every way in which they differ from the default is a predicate here.
//!
//! *Exhaustive*: a ready model serves all who come; only idle ones leave, the least recently used
//! first; next is the model that was asked for first. Nobody is ever overdue.
//! *Fifo*: the same, and no request begins before one that came earlier.

use serde::{Deserialize, Serialize};

use super::Scheduler;
use super::policy::{Candidate, Leaves};
use super::queue::Model;
use super::residency::Instance;
use super::waiters::Waiter;
use crate::units::{ModelName, RequestId};

/// Whose turn it is, and who leaves for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    #[default]
    Fair,
    Exhaustive,
    Fifo,
}

impl Policy {
    pub const ALL: [Policy; 3] = [Policy::Fair, Policy::Exhaustive, Policy::Fifo];

    pub const fn as_str(self) -> &'static str {
        match self {
            Policy::Fair => "fair",
            Policy::Exhaustive => "exhaustive",
            Policy::Fifo => "fifo",
        }
    }
}

impl Scheduler {
    /// The same scheduler under another policy; before its first event.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Scheduler {
        Scheduler { policy, ..self }
    }

    pub(super) fn is_fair(&self) -> bool {
        self.policy == Policy::Fair
    }

    /// Rank among models that wait: who was asked for first.
    pub(super) fn baseline_score(&self, state: &Model) -> Option<u128> {
        let first = state.queue.iter().map(|w| w.request.id.0).min().unwrap_or(u64::MAX);
        (!self.is_fair()).then(|| u128::from(u64::MAX - first))
    }

    /// Only idle instances leave, and those at once. Under *fifo* who waits for one of them came
    /// later than the request for which it leaves.
    pub(super) fn baseline_may_leave(&self, instance: &Instance) -> Option<Result<Leaves, String>> {
        let wanted = self.policy != Policy::Fifo && self.queue_len(&instance.model) > 0;
        let idle = instance.in_flight() == 0 && !wanted;
        let busy = || format!("{} serves {} requests", instance.model, instance.in_flight());
        (!self.is_fair()).then(|| if idle { Ok(Leaves::Idle) } else { Err(busy()) })
    }

    /// Under *fifo* only the model of who came first may be given room.
    pub(super) fn keep_first_in_line(&self, candidates: &mut Vec<Candidate>) {
        if self.policy == Policy::Fifo
            && let Some((first, _)) = self.first_in_line()
        {
            candidates.retain(|c| c.spec.name == first);
        }
    }

    /// Under *fifo* nobody goes through a gate beside those who wait.
    pub(super) fn all_gates_wait(&self) -> bool {
        self.policy == Policy::Fifo && self.queued() > 0
    }

    /// Under *fifo*: grants from the head of the one line. False under any other policy.
    pub(super) fn grant_in_line(&mut self) -> bool {
        if self.policy != Policy::Fifo {
            return false;
        }
        while let Some((model, request)) = self.first_in_line()
            && let Some(instance) = self.current(&model).map(|i| i.id)
            && self.next_grant(instance) == Some(request)
        {
            self.gone(request);
            self.grant(request, instance);
            self.changed();
        }
        true
    }

    fn first_in_line(&self) -> Option<(ModelName, RequestId)> {
        let heads = self.models.iter().filter_map(|(name, m)| Some((m.queue.first()?, name)));
        let (first, model) = heads.min_by_key(|(waiter, _)| Waiter::order(waiter))?;
        Some((model.clone(), first.request.id))
    }
}
