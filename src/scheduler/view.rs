//! The scheduler's state in words and figures, for `/status` and for clients that wait.

use std::time::Duration;

use super::Scheduler;
use super::event::Holder;
use super::memory::{UNSEEN, name_holders};
use super::policy::seconds;
use super::record::{GpuView, ModelView, Phase, ResidencyView, SchedulerView};
use super::residency::{Instance, Residency};
use super::swap::{StartBlock, Swap};
use crate::config::catalog::ModelSpec;
use crate::units::{Bytes, GpuId, ModelName};

impl Scheduler {
    pub(super) fn build_view(&self) -> SchedulerView {
        let mut names: Vec<&ModelName> = self.catalog.models.keys().collect();
        names.extend(self.models.keys().filter(|name| !self.catalog.models.contains_key(*name)));
        SchedulerView {
            models: names.into_iter().map(|name| self.model_view(name)).collect(),
            gpus: self
                .world
                .gpus
                .iter()
                .map(|g| GpuView {
                    gpu: g.id,
                    total: g.total,
                    promised: if self.is_blind(g.id) { Bytes::ZERO } else { self.promised(g.id) },
                    free: self.sampled(g.id).map(|m| m.free),
                })
                .collect(),
            ram: self.ram_view(),
            swaps: self.swaps.values().map(|s| s.record(self.now, None)).collect(),
            queued: u32::try_from(self.queued()).unwrap_or(u32::MAX),
            no_proof: self.memory.no_proof.as_ref().map(|n| n.message.clone()),
        }
    }

    pub(super) fn model_view(&self, name: &ModelName) -> ModelView {
        let state = self.models.get(name);
        // Shown: the current instance, else one that is still leaving.
        let instance =
            self.current(name).or_else(|| self.instances.values().rfind(|i| i.model == *name));
        let failed = state.and_then(|m| m.failure.as_ref());
        let residency = match (self.current(name), failed, instance) {
            (Some(current), _, _) => residency_view(current),
            (None, Some(failure), _) => {
                ResidencyView::Failed { retry_at: failure.retry_at, fault: failure.fault.clone() }
            }
            (None, None, Some(leaving)) => residency_view(leaving),
            (None, None, None) => ResidencyView::Stopped,
        };
        let spec = self.catalog.model(name);
        ModelView {
            name: name.clone(),
            residency,
            instance: instance.map(|i| i.id),
            gpus: instance
                .map(|i| i.gpus.iter().copied().filter(|&g| g != UNSEEN).collect())
                .unwrap_or_default(),
            since: instance.map(|i| i.since).or(state.map(|m| m.since)).unwrap_or_default(),
            footprint: self.footprint_shown(spec, instance),
            swap: self.swap_shown(name, instance),
            queue: state.into_iter().flat_map(|m| m.queue.iter()).map(|w| w.request.id).collect(),
            oldest: state.and_then(|m| m.queue.oldest()),
            ready_in: self.ready_in(name),
            waiting_for: match self.queue_len(name) {
                0 => String::new(),
                _ => self.waiting_for(name),
            },
            pinned: spec.is_some_and(|spec| self.pins(spec)),
            kept: self.is_kept(name),
            ttl_runs: instance.is_some_and(|i| i.is_ready() && self.ttl_runs(i)),
            ttl_until: instance.and_then(|i| i.ttl_until),
        }
    }

    fn footprint_shown(
        &self,
        spec: Option<&std::sync::Arc<ModelSpec>>,
        instance: Option<&Instance>,
    ) -> Option<Bytes> {
        let promised = instance.filter(|i| !i.is_sleeping()).and_then(|i| i.promise);
        let gpu = self.world.gpus.first().map(|g| g.id)?;
        promised.filter(|&b| b > Bytes(1)).or_else(|| {
            let need = self.need(spec?, gpu)?;
            (!need.elastic && need.bytes > Bytes(1)).then_some(need.bytes)
        })
    }

    fn swap_shown(
        &self,
        name: &ModelName,
        instance: Option<&Instance>,
    ) -> Option<crate::units::SwapId> {
        self.load_of(name).map(|s| s.id).or_else(|| {
            let id = instance?.id;
            self.swaps.values().find(|s| s.instance == id || s.has_victim(id)).map(|s| s.id)
        })
    }

    /// How long until the model is ready, as far as earlier moves tell.
    fn ready_in(&self, name: &ModelName) -> Option<Duration> {
        let current = self.current(name);
        if current.is_some_and(Instance::is_ready) {
            return Some(Duration::ZERO);
        }
        let known = self.known_move(name)?;
        let Some(swap) = self.load_of(name) else {
            return (self.queue_len(name) > 0).then_some(known);
        };
        let elapsed = self.now.since(swap.since);
        let stop = swap
            .victims
            .iter()
            .filter_map(|v| self.instances.get(&v.instance))
            .map(|i| self.stop_cost(&i.model))
            .max()
            .unwrap_or_default();
        Some(match swap.phase {
            Phase::Preflight | Phase::Fetch | Phase::Drain => stop + known,
            Phase::Vacate | Phase::Prove => stop.saturating_sub(elapsed) + known,
            Phase::Start => known.saturating_sub(elapsed),
            Phase::Vouch => {
                let started = swap.phases.iter().rfind(|(phase, _)| *phase == Phase::Start);
                let spent = started.map(|(_, took)| *took).unwrap_or_default() + elapsed;
                known.saturating_sub(spent)
            }
        })
    }

    /// Why the model's waiters still wait, in words.
    pub(super) fn waiting_for(&self, name: &ModelName) -> String {
        if let Some(no_proof) = &self.memory.no_proof {
            return format!("GPU memory cannot be read, nothing starts: {}", no_proof.message);
        }
        let estimate = self
            .ready_in(name)
            .filter(|left| !left.is_zero())
            .map(|left| format!(", ready in about {}", seconds(left)))
            .unwrap_or_default();
        if let Some(swap) = self.load_of(name) {
            return format!("{}{estimate}", self.swap_waits_for(swap));
        }
        let Some(current) = self.current(name) else {
            if let Some(leaving) = self.instances.values().find(|i| i.model == *name) {
                return self.leaving_text(leaving);
            }
            return self
                .blocked
                .get(name)
                .map_or_else(|| "its turn".to_owned(), |why| format!("room: {why}{estimate}"));
        };
        match current.residency {
            Residency::Ready => {
                format!("a place: {} of {} in use", current.in_flight(), current.permits())
            }
            Residency::Draining => {
                let next = current.drain.and_then(|d| self.swaps.get(&d.swap));
                let next = next.filter(|s| s.is_load()).map(|s| s.model.to_string());
                let next = next.unwrap_or_else(|| "a restart".to_owned());
                format!("its next turn, after {next}{estimate}")
            }
            Residency::Lost { .. } => {
                format!("its runtime, which does not answer: {}", self.runtime_fault)
            }
            Residency::FallingAsleep | Residency::Sleeping { .. } => self
                .blocked
                .get(name)
                .map_or_else(|| "its wake-up".to_owned(), |why| format!("room: {why}{estimate}")),
            Residency::Starting { .. } | Residency::Waking | Residency::Stopping => {
                format!("its start{estimate}")
            }
        }
    }

    fn leaving_text(&self, leaving: &Instance) -> String {
        match &leaving.trouble {
            Some(fault) => fault.public_message().to_owned(),
            None => format!("the earlier {} to be gone", leaving.model),
        }
    }

    fn swap_waits_for(&self, swap: &Swap) -> String {
        match swap.phase {
            Phase::Preflight => "checks before the start".to_owned(),
            Phase::Fetch => "its image and weights to be fetched, then start".to_owned(),
            Phase::Drain if swap.placed => self.drain_text(swap),
            Phase::Drain => {
                let why = self.blocked.get(&swap.model).map(String::as_str);
                format!("room: {}, then start", why.unwrap_or("its turn"))
            }
            Phase::Vacate => format!("{} to stop, then start", self.victim_names(swap)),
            Phase::Prove => self.prove_text(swap),
            Phase::Start => "start".to_owned(),
            Phase::Vouch => "start: the last checks".to_owned(),
        }
    }

    fn victim_names(&self, swap: &Swap) -> String {
        let names: Vec<String> = swap
            .victims
            .iter()
            .filter_map(|v| self.instances.get(&v.instance))
            .map(|i| i.model.to_string())
            .collect();
        if names.is_empty() { "the earlier model".to_owned() } else { names.join(", ") }
    }

    fn drain_text(&self, swap: &Swap) -> String {
        let parts: Vec<String> = swap
            .victims
            .iter()
            .filter_map(|v| self.instances.get(&v.instance))
            .map(|i| match i.in_flight() {
                1 => format!("{} (1 request)", i.model),
                n => format!("{} ({n} requests)", i.model),
            })
            .collect();
        format!("draining {}, then start", parts.join(", "))
    }

    fn prove_text(&self, swap: &Swap) -> String {
        match self.start_block(swap.id) {
            Err(StartBlock::Unproven | StartBlock::NoSample) => {
                let held: Option<(GpuId, Bytes)> = swap
                    .gpus
                    .iter()
                    .filter_map(|&g| Some((g, self.sampled(g)?)))
                    .map(|(g, m)| (g, m.total - m.free))
                    .max_by_key(|(_, used)| *used);
                let holder = self.leaving_holders(swap);
                match (holder, held) {
                    (Some(text), _) => text,
                    (None, Some((gpu, used))) => format!("{used} still in use on GPU {gpu}"),
                    (None, None) => "a reading of the GPU memory".to_owned(),
                }
            }
            Err(StartBlock::Held) => self.memory_text(&swap.model, &swap.gpus, None),
            Err(StartBlock::Moving(why) | StartBlock::Process(why)) => why,
            Err(StartBlock::NoProof) => "a reading of the GPU memory".to_owned(),
            Err(StartBlock::Stale) | Ok(_) => "start".to_owned(),
        }
    }

    /// "9.1 GiB still held by pid 4711 (vllm), 2.0 GiB by pid 4712 (vllm)".
    fn leaving_holders(&self, swap: &Swap) -> Option<String> {
        let leaving = |pid: u32, of: Option<crate::units::InstanceId>| {
            self.instances.values().any(|i| {
                i.is_stopping() && (of == Some(i.id) || (of.is_none() && i.pids.contains(&pid)))
            })
        };
        let mut holders: Vec<(GpuId, &Holder)> = swap
            .gpus
            .iter()
            .filter_map(|&g| self.sampled(g))
            .flat_map(|m| m.holders.iter().map(move |h| (m.gpu, h)))
            .filter(|(_, h)| leaving(h.pid, h.instance))
            .collect();
        holders.sort_by_key(|(gpu, h)| (std::cmp::Reverse(h.bytes), *gpu, h.pid));
        name_holders(&holders, "still held", |(_, h)| h.bytes.to_string())
    }
}

fn residency_view(instance: &Instance) -> ResidencyView {
    match instance.residency {
        Residency::Starting { phase } => ResidencyView::Starting { phase },
        Residency::Ready => ResidencyView::Ready,
        Residency::Draining => ResidencyView::Draining,
        Residency::Stopping => ResidencyView::Stopping,
        Residency::FallingAsleep => ResidencyView::FallingAsleep,
        Residency::Sleeping { level } => ResidencyView::Sleeping { level },
        Residency::Waking => ResidencyView::Waking,
        Residency::Lost { .. } => ResidencyView::Lost,
    }
}
