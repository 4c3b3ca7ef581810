//! Swaps that take a model away without another in its place: by hand, by ttl, by a reload, or
//! to clean up. They run the second half of the way: drain, vacate, prove.

use super::super::Scheduler;
use super::super::placement::Victim;
use super::super::record::{Phase, SwapCause, SwapKind};
use super::super::residency::Instance;
use super::Swap;
use crate::units::{InstanceId, SwapId};

impl Scheduler {
    pub(in crate::scheduler) fn begin_unload(
        &mut self,
        id: InstanceId,
        cause: SwapCause,
        decision: String,
        phase: Phase,
    ) -> SwapId {
        let swap = self.take_swap_id();
        // An earlier attempt to take the same instance away ends here.
        let earlier: Vec<SwapId> = self
            .swaps
            .values()
            .filter(|s| !s.is_load() && s.instance == id)
            .map(|s| s.id)
            .collect();
        for earlier in earlier {
            self.cancel_swap(earlier, "another swap takes it away");
        }
        let (model, gpus) = self
            .instances
            .get(&id)
            .map(|i| (i.model.clone(), i.gpus.clone()))
            .unwrap_or_else(|| (crate::units::ModelName::new(""), Vec::new()));
        let victim = Victim { instance: id, asleep: false, busy: true, why: decision.clone() };
        self.swaps.insert(
            swap,
            Swap {
                id: swap,
                model,
                kind: SwapKind::Unload,
                cause,
                decision,
                instance: id,
                gpus,
                victims: vec![victim],
                evicted: Vec::new(),
                evicted_before: Vec::new(),
                began: self.now,
                phases: Vec::new(),
                phase,
                since: self.now,
                planned: true,
                placed: true,
                urgent: false,
                started: false,
                vacated: phase > Phase::Drain,
                retried: false,
                rethought: false,
                memory_wait: None,
                watching: false,
                instead_of: None,
                death: None,
            },
        );
        self.changed();
        self.record(swap);
        swap
    }

    /// Unloads that are due and whose instance is free to be moved: asked for by an operator,
    /// outdated by a reload, or idle for longer than the ttl.
    pub(in crate::scheduler) fn begin_unloads(&mut self) {
        let due: Vec<(InstanceId, SwapCause, String)> = self
            .instances
            .values()
            .filter(|i| i.is_ready() || (i.is_sleeping() && i.release.is_none()))
            .filter(|i| {
                let takes = |s: &Swap| s.instance == i.id || (!s.started && s.has_victim(i.id));
                !self.swaps.values().any(takes)
            })
            .filter_map(|i| self.unload_due(i).map(|(cause, why)| (i.id, cause, why)))
            .collect();
        for (id, cause, why) in due {
            let asleep = self.instances.get(&id).is_some_and(Instance::is_sleeping);
            let force = self.instances.get(&id).is_some_and(|i| i.unload == Some(true));
            let swap = self.begin_unload(id, cause, why, Phase::Drain);
            if cause == SwapCause::Sleep {
                self.let_it_sleep(swap);
            }
            if !asleep {
                self.begin_drain(id, swap, cause != SwapCause::Ttl);
            }
            if force {
                self.cancel_leases(id, "unloaded by an operator");
            }
        }
    }

    pub(in crate::scheduler) fn unload_due(
        &self,
        instance: &Instance,
    ) -> Option<(SwapCause, String)> {
        if instance.unload.is_some() {
            return Some((SwapCause::Unload, "asked for by an operator".to_owned()));
        }
        if self.catalog.model(&instance.model).is_none() {
            return Some((SwapCause::Reload, "removed from the configuration".to_owned()));
        }
        if !self.is_current(instance) {
            return Some((SwapCause::Reload, "its configuration changed".to_owned()));
        }
        if instance.sleep_wanted && !instance.is_sleeping() {
            return Some((SwapCause::Sleep, "put to sleep by an operator".to_owned()));
        }
        let due = self.ttl_due(instance)?;
        (due <= self.now).then(|| {
            let idle = super::super::policy::seconds(instance.idle_for(self.now));
            let grace = if instance.spec.grace.is_zero() { "" } else { " and the grace after it" };
            (SwapCause::Ttl, format!("idle {idle}, longer than its ttl{grace}"))
        })
    }
}
