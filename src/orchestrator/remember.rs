//! What the owner keeps of what happened: figures per model, the ledger, the last id used.

use std::sync::Arc;

use super::run::Owner;
use super::view::LEDGER_ROWS_MAX;
use crate::scheduler::record::{Phase, SwapRecord};
use crate::store::SwapRow;
use crate::units::{InstanceId, ModelName, Time};

impl Owner {
    /// Adds the residency that ends now to the model's totals.
    pub(super) fn count_residency(&mut self, now: Time, instance: InstanceId) {
        let Some(live) = self.instances.get_mut(&instance) else { return };
        let Some(ready_at) = live.ready_at.take() else { return };
        let facts = self.facts.entry(live.spec.name.clone()).or_default();
        facts.unloaded_at = Some(now);
        facts.uptime_before += now.since(ready_at);
        facts.requests_before += live.gate.as_ref().map_or(0, |gate| gate.granted());
        facts.endpoint = None;
        let model = live.spec.name.clone();
        self.keep_totals(&model);
    }

    /// `/models` counts over all runs.
    pub(super) fn keep_totals(&self, model: &ModelName) {
        if let Some(facts) = self.facts.get(model) {
            let totals = facts.totals(|time| self.shared.wall_ms(time));
            self.shared.store.put_totals(model, &totals);
        }
    }

    /// At the end: with the residencies that are not over.
    pub(super) fn keep_all_totals(&self) {
        let now = self.effects.now();
        for live in self.instances.values() {
            let (Some(ready_at), Some(facts)) = (live.ready_at, self.facts.get(&live.spec.name))
            else {
                continue;
            };
            let mut facts = facts.clone();
            facts.unloaded_at = Some(now);
            facts.uptime_before += now.since(ready_at);
            facts.requests_before += live.gate.as_ref().map_or(0, |gate| gate.granted());
            let totals = facts.totals(|time| self.shared.wall_ms(time));
            self.shared.store.put_totals(&live.spec.name, &totals);
        }
    }

    pub(super) fn count_start(&mut self, model: &ModelName) {
        let facts = self.facts.entry(model.clone()).or_default();
        facts.starts += 1;
        if self.died.remove(model) {
            facts.restarts += 1;
            self.metrics.instance_restarted(model);
        }
        self.keep_totals(model);
    }

    pub(super) fn record(&mut self, record: SwapRecord) {
        self.last_ids.swap = self.last_ids.swap.max(record.id.0);
        self.writer.use_ids(self.last_ids);
        let Some(outcome) = &record.outcome else { return };
        tracing::info!(
            swap = %record.id,
            model = %record.model,
            cause = record.cause.as_str(),
            result = outcome.as_str(),
            fault = outcome.fault().map(|fault| fault.kind.as_str()),
            ms = record.ended.map_or(0, |ended| ended.since(record.began).as_millis() as u64),
            decision = record.decision,
            "swap ended"
        );
        self.metrics.swap_ended(&record);
        self.forget_unstarted(&record);
        let began_unix_ms = self.shared.wall_ms(record.began);
        self.shared.store.record_swap(SwapRow { began_unix_ms, record: record.clone() });
        let ledger = Arc::make_mut(&mut self.ledger);
        if ledger.len() >= LEDGER_ROWS_MAX {
            ledger.pop_front();
        }
        ledger.push_back(Arc::new(record));
    }

    /// An instance whose swap ended before its start leaves nothing that a stop would clear up.
    pub(super) fn forget_unstarted(&mut self, record: &SwapRecord) {
        let Some(instance) = record.instance else { return };
        let Some(live) = self.instances.get(&instance) else { return };
        // An effect that is late (its swap gave it up) would otherwise keep entry and port for ever.
        let is_started = record.phases.iter().any(|(phase, _)| *phase >= Phase::Start);
        let is_held = live.stopping || live.gate.is_some() || live.slot.peek().is_some();
        if is_held || (live.task.is_some() && is_started) {
            return;
        }
        if let Some(task) = self.instances.remove(&instance).and_then(|live| live.task) {
            task.cancel.cancel();
        }
        self.ports.release(instance);
    }

    pub(super) fn note_id(&mut self, id: u64) {
        self.last_ids.instance = self.last_ids.instance.max(id);
        self.writer.use_ids(self.last_ids);
    }
}
