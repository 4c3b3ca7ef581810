//! What must hold after every event. Each rule is a function with a name; debug builds and the
//! simulator check them all.

use std::collections::{BTreeMap, BTreeSet};

use super::Scheduler;
use super::record::Phase;
use super::residency::{Instance, MoveKind, Residency};
use crate::config::catalog::EngineKind;
use crate::units::{GpuId, SwapId};

type Check = Result<(), String>;

impl Scheduler {
    /// Every rule, in order; the first that is broken, in words.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.memory_is_never_over_promised()?;
        self.at_most_one_current_instance()?;
        self.adapters_have_no_instance()?;
        self.gates_are_open_only_when_ready()?;
        self.draining_has_a_swap()?;
        self.at_most_one_vacating_swap_per_gpu()?;
        self.vllm_measures_alone()?;
        self.groups_are_kept_apart()?;
        self.loads_have_their_instance()?;
        self.starting_has_a_swap()?;
        self.waiters_are_bounded_and_unique()?;
        self.a_failed_model_has_no_waiters()?;
        self.indexes_agree()?;
        self.nobody_is_woken_too_late()?;
        self.nothing_is_left_overdue()
    }

    fn indexes_agree(&self) -> Check {
        let queued: usize = self.models.values().map(|m| m.queue.len()).sum();
        if !self.instances.check() || !self.swaps.check() || queued != self.waiting.len() {
            return Err("an index does not agree with what it is of".to_owned());
        }
        Ok(())
    }

    fn nobody_is_woken_too_late(&self) -> Check {
        let Some((due, cause)) = self.first_due() else { return Ok(()) };
        match self.standing.due {
            Some((at, _)) if at <= due => Ok(()),
            known => Err(format!("{cause:?} is due at {}, and {known:?} is known", due.0)),
        }
    }

    fn memory_is_never_over_promised(&self) -> Check {
        // Adopted instances are facts, and a reload may shrink what may be promised.
        if self.capacity_cut || self.instances.values().any(|i| i.adopted) {
            return Ok(());
        }
        for gpu in self.world.gpus.iter().map(|g| g.id).chain([super::memory::UNSEEN]) {
            let (promised, capacity) = (self.promised(gpu), self.capacity(gpu));
            if promised > capacity {
                return Err(format!("GPU {gpu}: {promised} promised, {capacity} to give"));
            }
        }
        let promised = self.ram_promised();
        if let Some(capacity) = self.ram_capacity().filter(|&capacity| promised > capacity) {
            return Err(format!("host RAM: {promised} promised, {capacity} to give"));
        }
        Ok(())
    }

    fn at_most_one_current_instance(&self) -> Check {
        let mut seen = BTreeSet::new();
        for instance in self.instances.values().filter(|i| !i.is_stopping()) {
            if !seen.insert(&instance.model) {
                return Err(format!("{} has two current instances", instance.model));
            }
        }
        Ok(())
    }

    fn adapters_have_no_instance(&self) -> Check {
        match self.instances.values().find(|i| i.spec.adapter.is_some()) {
            Some(instance) => Err(format!("{} is an adapter and was placed", instance.model)),
            None => Ok(()),
        }
    }

    fn gates_are_open_only_when_ready(&self) -> Check {
        for instance in self.instances.values().filter(|i| i.gate.open) {
            if !instance.is_ready() || self.queue_len(&instance.model) > 0 {
                return Err(format!(
                    "gate of {} is open while {:?} with {} waiting",
                    instance.model,
                    instance.residency,
                    self.queue_len(&instance.model)
                ));
            }
        }
        Ok(())
    }

    fn draining_has_a_swap(&self) -> Check {
        for instance in self.instances.values() {
            let draining = instance.residency == Residency::Draining;
            if draining != instance.drain.is_some() {
                return Err(format!("{} drains without a drain, or not", instance.model));
            }
            if let Some(drain) = instance.drain
                && !self.swaps.get(&drain.swap).is_some_and(|s| s.has_victim(instance.id))
            {
                return Err(format!("{} drains for {}, which is over", instance.model, drain.swap));
            }
        }
        Ok(())
    }

    fn at_most_one_vacating_swap_per_gpu(&self) -> Check {
        let mut by_gpu: BTreeMap<GpuId, SwapId> = BTreeMap::new();
        for instance in self.instances.values().filter(|i| i.launched && i.stop_tries == 0) {
            let Some(drain) = instance.drain else { continue };
            if !self.swaps.get(&drain.swap).is_some_and(super::swap::Swap::is_load) {
                continue;
            }
            for &gpu in &instance.gpus {
                let first = *by_gpu.entry(gpu).or_insert(drain.swap);
                if first != drain.swap {
                    return Err(format!("GPU {gpu} is vacated by {first} and {}", drain.swap));
                }
            }
        }
        Ok(())
    }

    fn vllm_measures_alone(&self) -> Check {
        for vllm in self.instances.values() {
            if vllm.spec.engine != EngineKind::Vllm || !vllm.is_moving(MoveKind::Start) {
                continue;
            }
            for other in self.instances.values().filter(|i| i.id != vllm.id) {
                let shares = other.gpus.iter().any(|g| vllm.gpus.contains(g));
                let moves = other.moving.is_some_and(|m| m.kind.touches_memory());
                if shares && moves && other.promise.is_some() {
                    return Err(format!("{} moves while {} measures", other.model, vllm.model));
                }
            }
        }
        Ok(())
    }

    fn groups_are_kept_apart(&self) -> Check {
        match self.up_against_a_rule().filter(|_| !self.apart_cut) {
            Some((a, b, group)) => {
                let (a, b) = (&a.model, &b.model);
                Err(format!("{a} and {b} are up, and group {group} keeps them apart"))
            }
            None => Ok(()),
        }
    }

    /// Two that a group keeps apart and that are up all the same. (Adopted instances are facts.)
    pub(super) fn up_against_a_rule(&self) -> Option<(&Instance, &Instance, &str)> {
        if self.catalog.groups.is_empty() {
            return None;
        }
        let up = |i: &&Instance| match i.residency {
            Residency::Starting { .. } => i.launched,
            Residency::Ready
            | Residency::Draining
            | Residency::FallingAsleep
            | Residency::Waking
            | Residency::Lost { asleep: false } => !i.adopted,
            Residency::Stopping | Residency::Sleeping { .. } | Residency::Lost { asleep: true } => {
                false
            }
        };
        let up: Vec<&Instance> = self.instances.values().filter(up).collect();
        up.iter().enumerate().find_map(|(at, &a)| {
            up[at + 1..]
                .iter()
                .find_map(|&b| Some((a, b, self.catalog.keeps_apart(&a.spec, &b.spec)?)))
        })
    }

    fn loads_have_their_instance(&self) -> Check {
        for swap in self.swaps.values().filter(|s| s.is_load()) {
            let Some(instance) = self.instances.get(&swap.instance) else {
                return Err(format!("{} makes {} ready, which is gone", swap.id, swap.instance));
            };
            let fits = match instance.residency {
                Residency::Starting { phase } => phase == swap.phase,
                Residency::Sleeping { .. } => !swap.started,
                Residency::Waking => swap.phase >= Phase::Start,
                Residency::Ready
                | Residency::Draining
                | Residency::Stopping
                | Residency::FallingAsleep
                | Residency::Lost { .. } => false,
            };
            if !fits {
                let state = instance.residency;
                return Err(format!("{} in {:?} has an instance {state:?}", swap.id, swap.phase));
            }
        }
        Ok(())
    }

    fn starting_has_a_swap(&self) -> Check {
        for instance in self.instances.values() {
            let starts =
                matches!(instance.residency, Residency::Starting { .. } | Residency::Waking);
            if starts && !self.swaps.values().any(|s| s.is_load() && s.instance == instance.id) {
                return Err(format!("{} starts without a swap", instance.model));
            }
        }
        Ok(())
    }

    fn waiters_are_bounded_and_unique(&self) -> Check {
        let mut seen = BTreeSet::new();
        for (name, state) in &self.models {
            if !state.queue.check() {
                return Err(format!("the sums of {name}'s queue are not those of its waiters"));
            }
            for waiter in state.queue.iter() {
                if !seen.insert(waiter.request.id) {
                    return Err(format!("{} waits twice", waiter.request.id));
                }
                if waiter.request.model != *name {
                    return Err(format!("{} waits in the wrong queue", waiter.request.id));
                }
            }
        }
        if self.shutting_down && !seen.is_empty() {
            return Err("somebody waits after the shut-down".to_owned());
        }
        Ok(())
    }

    fn a_failed_model_has_no_waiters(&self) -> Check {
        for (name, state) in &self.models {
            let ready = self.current(name).is_some_and(Instance::is_ready);
            if state.failure.is_some() && !ready && !state.queue.is_empty() {
                return Err(format!("{name} failed and {} wait for it", state.queue.len()));
            }
        }
        Ok(())
    }

    /// A deadline in the past would wake us again and again.
    fn nothing_is_left_overdue(&self) -> Check {
        match self.deadlines().find(|(at, _)| *at <= self.now) {
            Some((at, cause)) => {
                Err(format!("{cause:?} was due at {} and it is {}", at.0, self.now.0))
            }
            None => Ok(()),
        }
    }
}
