//! Builds the snapshot that everyone else reads.

use std::sync::Arc;

use super::news;
use super::run::Owner;
use super::view::{GpuFacts, Health, View};

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
        let scheduler = self.scheduler.view(now);
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
            models: self.facts.clone(),
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
}
