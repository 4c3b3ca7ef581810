//! Builds the snapshot that everyone else reads.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::adapters::AdapterState;
use super::news;
use super::run::Owner;
use super::view::{GpuFacts, Health, ModelFacts, View};
use crate::scheduler::record::{ModelView, Phase, ResidencyView, SchedulerView};
use crate::units::ModelName;

impl Owner {
    pub(super) fn publish(&mut self) {
        self.shared.follow_wall_clock();
        let now = self.effects.now();
        let reading = self.memory.latest.borrow().clone();
        let gpus = self
            .effects
            .gpus
            .gpus()
            .iter()
            .map(|gpu| GpuFacts {
                id: gpu.id,
                uuid: gpu.uuid.clone(),
                name: gpu.name.clone(),
                memory: reading.gpus.iter().find(|memory| memory.gpu == gpu.id).cloned(),
                utilization: reading.utilization.get(&gpu.id).copied(),
            })
            .collect();
        let mut scheduler = self.scheduler.view_in_passing(now);
        let mut models = self.facts.clone();
        self.show_adapters(&mut scheduler, &mut models);
        let gpu_health = match (&scheduler.no_proof, &reading.error) {
            (Some(message), _) | (None, Some(message)) => {
                Health { ok: false, detail: message.clone() }
            }
            (None, None) => Health { ok: true, detail: self.effects.gpus.describe() },
        };
        let progress = self
            .instances
            .iter()
            .filter(|(_, live)| live.ready_at.is_none() && live.task.is_some())
            .map(|(instance, live)| (*instance, live.progress_now.borrow().clone()))
            .collect();
        let view = Arc::new(View {
            at: now,
            scheduler,
            models,
            progress,
            gpus,
            gpu_health,
            docker_health: self.docker.health.clone(),
            outages: self.outages.values().cloned().collect(),
            leftovers: self.leftovers.values().cloned().collect(),
            foreign: self.foreign.borrow().clone(),
            ledger: Arc::clone(&self.ledger),
        });
        self.preload.look(view.preload(&self.shared.catalog.load()));
        let before = self.shared.view.swap(Arc::clone(&view));
        // Told only now: who hears of a change can read it.
        for news in news::between(&before, &view) {
            self.shared.feed.publish(news);
        }
        self.shared.published.send_replace(());
    }

    /// An adapter is where its base is, but for what became of itself.
    fn show_adapters(
        &self,
        scheduler: &mut SchedulerView,
        facts: &mut BTreeMap<ModelName, ModelFacts>,
    ) {
        let catalog = self.shared.catalog.load();
        for spec in catalog.models.values() {
            let Some(adapter) = &spec.adapter else { continue };
            let Some(base) = scheduler.models.iter().find(|m| m.name == adapter.of) else {
                continue;
            };
            let live = base.instance.and_then(|id| self.instances.get(&id));
            let state = live
                .and_then(|live| live.adapters.as_ref())
                .and_then(|desk| desk.states().borrow().get(&spec.name).cloned());
            let mine = |id: &crate::units::RequestId| {
                self.waiting.get(id).is_some_and(|waiting| waiting.model == spec.name)
            };
            let queue: Vec<_> = base.queue.iter().copied().filter(mine).collect();
            let oldest = queue.iter().filter_map(|id| Some(self.waiting.get(id)?.arrived)).min();
            let shown = ModelView {
                name: spec.name.clone(),
                residency: adapter_residency(&base.residency, state),
                waiting_for: match queue.is_empty() {
                    true => String::new(),
                    false => base.waiting_for.clone(),
                },
                queue,
                oldest,
                ..base.clone()
            };
            let base_facts = facts.get(&adapter.of).cloned().unwrap_or_default();
            let own = facts.entry(spec.name.clone()).or_default();
            own.endpoint = base_facts.endpoint.filter(|_| shown.residency == ResidencyView::Ready);
            (own.loaded_at, own.unloaded_at) = (base_facts.loaded_at, base_facts.unloaded_at);
            match scheduler.models.iter_mut().find(|m| m.name == spec.name) {
                Some(row) => *row = shown,
                None => scheduler.models.push(shown),
            }
        }
    }
}

fn adapter_residency(base: &ResidencyView, state: Option<AdapterState>) -> ResidencyView {
    match (base, state) {
        (ResidencyView::Ready | ResidencyView::Draining, Some(AdapterState::Loaded)) => {
            base.clone()
        }
        (ResidencyView::Ready | ResidencyView::Draining, Some(AdapterState::Loading)) => {
            ResidencyView::Starting { phase: Phase::Vouch }
        }
        (ResidencyView::Ready | ResidencyView::Draining, Some(AdapterState::Leaving)) => {
            ResidencyView::Draining
        }
        (
            ResidencyView::Ready | ResidencyView::Draining,
            Some(AdapterState::Failed { fault, retry_at }),
        ) => ResidencyView::Failed { retry_at, fault },
        (ResidencyView::Ready | ResidencyView::Draining, None) => ResidencyView::Stopped,
        (base, _) => base.clone(),
    }
}
