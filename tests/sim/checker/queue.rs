//! Who waits, for how long, and who must have been decided at once.

use std::collections::BTreeMap;
use std::time::Duration;

use wharf::scheduler::event::Request;
use wharf::units::{ModelName, Priority, RequestId};

use super::Checker;
use crate::scenario::fits;

#[derive(Clone, Debug)]
pub struct Waiting {
    pub model: ModelName,
    pub priority: Priority,
    pub never_start: bool,
    pub max_wait: Option<Duration>,
    /// `queue.timeout` passes.
    pub due: u64,
    /// Since when its turn is awaited.
    pub clock: u64,
    /// Arrived just now: must be decided at once if it can never be served.
    pub at: u64,
}

impl Checker {
    pub(super) fn arrived(&mut self, now: u64, request: &Request) {
        let timeout = self.catalog.settings.queue.timeout.as_millis() as u64;
        let due = now.max(request.arrived.0) + timeout;
        let waiting = Waiting {
            model: request.model.clone(),
            priority: request.priority,
            never_start: request.never_start,
            max_wait: request.max_wait,
            due,
            clock: now,
            at: now,
        };
        self.queue_changed = true;
        self.due.insert((due, request.id));
        self.waiting.insert(request.id, waiting);
    }

    /// Out of the queue, if it was there.
    pub(super) fn forget(&mut self, request: RequestId) -> Option<Waiting> {
        let waiting = self.waiting.remove(&request)?;
        self.due.remove(&(waiting.due, request));
        self.decided.insert(request);
        Some(waiting)
    }

    pub(super) fn check_due(&mut self, now: u64) {
        if let Some(&(due, request)) = self.due.first()
            && due < now
        {
            let model = self.waiting[&request].model.clone();
            self.fail(format!("{request} for {model} still waits past queue.timeout ({due})"));
        }
    }

    pub(super) fn check_queue(&mut self, now: u64) {
        let limit = self.catalog.settings.queue.limit as usize;
        let waits = self.waiting.len();
        self.require(waits <= limit, || format!("{waits} wait, queue.limit is {limit}"));
        let mut per_model: BTreeMap<&ModelName, u32> = BTreeMap::new();
        let mut wrong = None;
        for (request, waiting) in &self.waiting {
            let count = per_model.entry(&waiting.model).or_default();
            *count += 1;
            if *count > self.catalog.settings.queue.per_model {
                wrong = Some(format!("{count} wait for {}: over per_model", waiting.model));
            }
            wrong = wrong.or_else(|| self.undecidable(now, *request, waiting));
        }
        if let Some(wrong) = wrong {
            self.fail(wrong);
        }
    }

    /// Why this request must have been decided at once.
    fn undecidable(&self, now: u64, request: RequestId, waiting: &Waiting) -> Option<String> {
        let Some(spec) = self.catalog.model(&waiting.model) else {
            return Some(format!("{request} waits for {}, which is unknown", waiting.model));
        };
        if self.shutting_down {
            return Some(format!("{request} waits though all is shutting down"));
        }
        if waiting.at == now
            && fits(&self.catalog, &self.gpus, self.host_total(), spec) == Some(false)
        {
            let fitting = self.ready(&waiting.model).is_some();
            return (!fitting)
                .then(|| format!("{request} waits for {}, which never fits", waiting.model));
        }
        (waiting.never_start && waiting.at == now && self.ready(&waiting.model).is_none())
            .then(|| format!("{request} waits though it must not start {}", waiting.model))
    }
}
