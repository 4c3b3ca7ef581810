//! How long a model stays where nobody wants its room: ttl, grace and extension, pins, and times
//! of day at which it shall be loaded.
//!
//! ```text
//!  last activity ──ttl──▶ (or the extension) ──grace──▶ unloaded
//!                                  a request in the grace rescues it: the ttl begins anew
//! ```

use std::collections::BTreeSet;
use std::time::Duration;

use super::Scheduler;
use super::action::{Action, Answer, Refusal};
use super::policy::seconds;
use super::record::Phase;
use super::residency::{Instance, Residency};
use crate::config::catalog::ModelSpec;
use crate::units::{AskId, InstanceId, ModelName, SwapId, Time};

/// What an operator, or the time of day, wants of a model beside its configuration.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stay {
    /// In force instead of the configured one.
    pub pinned: Option<bool>,
    /// One of its keep windows is open.
    pub kept: bool,
}

impl Scheduler {
    /// As an operator wants it, else as it is configured.
    pub(super) fn pins(&self, spec: &ModelSpec) -> bool {
        let asked = self.models.get(&spec.name).and_then(|m| m.stay.pinned);
        asked.unwrap_or(spec.pinned)
    }

    pub(super) fn is_kept(&self, model: &ModelName) -> bool {
        self.models.get(model).is_some_and(|m| m.stay.kept)
    }

    /// Why no ttl runs for an instance, in words; `None`: one does.
    fn no_ttl(&self, instance: &Instance) -> Option<&'static str> {
        let spec = &instance.spec;
        if spec.ttl.is_none_or(|ttl| ttl.is_zero()) {
            Some("has no ttl: it leaves only when its room is wanted")
        } else if self.pins(spec) {
            Some("is pinned: no ttl runs")
        } else if spec.warmup {
            Some("is a warm-up model: no ttl runs")
        } else if self.is_kept(&instance.model) {
            Some("is kept by its schedule: no ttl runs until the window closes")
        } else if spec.is_external() {
            Some("runs elsewhere: no ttl runs")
        } else {
            None
        }
    }

    /// Whether a ttl runs for the model's instance, once it is idle.
    pub(super) fn ttl_runs(&self, instance: &Instance) -> bool {
        self.no_ttl(instance).is_none()
    }

    /// When the ttl of an instance ends that is idle from now on, or was since its last request.
    fn ttl_ends(&self, instance: &Instance) -> Option<Time> {
        let ttl = instance.spec.ttl.filter(|_| self.ttl_runs(instance))?;
        let idle = self.is_idle(instance);
        // Members of a group leave together: the last use of any counts.
        let from = idle.then(|| self.idle_since(instance)).flatten().unwrap_or(self.now);
        Some((from + ttl).max(instance.ttl_until.unwrap_or_default()))
    }

    /// When an idle instance leaves: the end of its ttl and of the grace after it.
    pub(super) fn ttl_due(&self, instance: &Instance) -> Option<Time> {
        let counts = instance.residency == Residency::Ready
            && self.is_idle(instance)
            && instance.hold.is_none();
        let ends = self.ttl_ends(instance).filter(|_| counts)?;
        Some(ends + instance.spec.grace)
    }

    /// `by`: added to what is left (`None`: the model's own ttl), within its bounds.
    pub(super) fn extend_asked(&mut self, ask: AskId, model: &ModelName, by: Option<Duration>) {
        let answer = match self.extended(model, by) {
            Ok((instance, until, bounded)) => {
                if let Some(instance) = self.instances.get_mut(&instance) {
                    instance.ttl_until = Some(until);
                }
                self.emit(Action::TtlExtended { model: model.clone(), until: Some(until) });
                self.changed();
                Answer::Extended { until, left: until.since(self.now), bounded }
            }
            Err(answer) => answer,
        };
        self.answer(ask, answer);
    }

    fn extended(
        &self,
        model: &ModelName,
        by: Option<Duration>,
    ) -> Result<(InstanceId, Time, bool), Answer> {
        let declined = |why: String| Err(Answer::Declined { why });
        let Some(spec) = self.catalog.model(model) else {
            return Err(Answer::Refused(Refusal::UnknownModel));
        };
        let Some(instance) = self.current(model).filter(|i| i.is_ready()) else {
            return declined(format!("{}: there is no ttl to extend", self.not_loaded(model)));
        };
        if let Some(why) = self.no_ttl(instance) {
            return Err(Answer::WithoutTtl { why: format!("{model} {why}") });
        }
        let (Some(ends), Some(ttl)) = (self.ttl_ends(instance), spec.ttl) else {
            return declined(format!("{model} has no ttl"));
        };
        let asked = ends.max(self.now) + by.unwrap_or(ttl);
        let bounds = spec.ttl_bounds;
        let least = bounds.min.map_or(asked, |min| asked.max(self.now + min));
        // What it has already is not taken away.
        let until = bounds.max.map_or(least, |max| least.min(self.now + max)).max(ends);
        Ok((instance.id, until, until != asked))
    }

    /// "mistral is not loaded", "mistral sleeps": fit to begin a sentence.
    pub(super) fn not_loaded(&self, model: &ModelName) -> String {
        let what = match self.current(model).map(|i| i.residency) {
            None => "is not loaded",
            Some(Residency::Starting { .. } | Residency::Waking) => "is still starting",
            Some(Residency::Sleeping { .. } | Residency::FallingAsleep) => "is asleep",
            Some(Residency::Draining | Residency::Stopping) => "is about to leave",
            Some(Residency::Lost { .. }) => "is out of reach: its runtime does not answer",
            Some(Residency::Ready) => "is ready",
        };
        format!("{model} {what}")
    }

    /// An extension of an earlier run, for what was adopted.
    pub(super) fn ttl_until(&mut self, model: &ModelName, until: Time) {
        let adopted = self.current(model).filter(|i| i.adopted && i.is_ready()).map(|i| i.id);
        if let Some(instance) = adopted.and_then(|id| self.instances.get_mut(&id)) {
            instance.ttl_until = Some(until);
        }
    }

    /// The extension ends with its instance.
    pub(super) fn forget_extension(&mut self, id: InstanceId) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        if instance.ttl_until.take().is_some() {
            let model = instance.model.clone();
            self.emit(Action::TtlExtended { model, until: None });
        }
    }

    /// A pin (or its end) that holds until it is asked for differently, whatever a reload says.
    pub(super) fn pin_asked(&mut self, ask: AskId, model: &ModelName, pinned: bool) {
        let before = self.shut_out();
        let known = self.catalog.models.contains_key(model);
        let Some(state) = self.models.get_mut(model).filter(|_| known) else {
            return self.answer(ask, Answer::Refused(Refusal::UnknownModel));
        };
        state.stay.pinned = Some(pinned);
        self.standing.fit.clear();
        self.spare_pinned();
        self.changed();
        let shut_out = self.shut_out().difference(&before).cloned().collect();
        self.answer(ask, Answer::Pinned { pinned, shut_out });
    }

    /// Models that can never be loaded beside those that are pinned.
    fn shut_out(&self) -> BTreeSet<ModelName> {
        let away = |spec: &&std::sync::Arc<ModelSpec>| {
            !self.current(&spec.name).is_some_and(Instance::is_ready)
                && self.cannot_fit(spec).is_some()
        };
        self.catalog.models.values().filter(away).map(|spec| spec.name.clone()).collect()
    }

    /// Pinned models beside this one, for whoever cannot be loaded for them.
    pub(super) fn pinned_beside(&self, model: &ModelName) -> Vec<ModelName> {
        let others = self.catalog.models.values().filter(|spec| spec.name != *model);
        others.filter(|spec| self.pins(spec)).map(|spec| spec.name.clone()).collect()
    }

    /// Whoever drains and is pinned now stays.
    pub(super) fn spare_pinned(&mut self) {
        let spared: Vec<SwapId> = self
            .swaps
            .values()
            .filter(|s| s.is_load() && s.placed && s.phase == Phase::Drain)
            .filter(|s| s.victims.iter().any(|v| self.is_spared(v.instance)))
            .map(|s| s.id)
            .collect();
        for swap in spared {
            self.unplace(swap, "a model that was to leave is pinned now");
        }
    }

    fn is_spared(&self, victim: InstanceId) -> bool {
        let draining = |i: &&Instance| i.residency == Residency::Draining && self.is_current(i);
        self.instances.get(&victim).filter(draining).is_some_and(|i| self.is_pinned(i))
    }

    /// A keep window of the model opened or closed.
    pub(super) fn keep_changed(&mut self, model: &ModelName, kept: bool) {
        let Some(state) = self.models.get_mut(model) else { return };
        if state.stay.kept == kept {
            return;
        }
        state.stay.kept = kept;
        if kept {
            // What an operator unloaded yesterday is wanted again.
            state.unloaded = false;
            state.kept_from = self.now;
        }
        self.changed();
    }

    /// When a model whose window is open may be loaded: at once, or, if it had to leave since,
    /// after twice its move.
    pub(super) fn keep_due(&self, spec: &ModelSpec) -> Option<Time> {
        let state = self.models.get(&spec.name)?;
        let away = self.current(&spec.name).is_none_or(Instance::is_sleeping);
        let wanted = state.stay.kept && !state.unloaded && state.failure.is_none() && away;
        let left_since = state.since > state.kept_from;
        let patience = if left_since { self.keep_patience(&spec.name) } else { Duration::ZERO };
        wanted.then(|| state.since.max(state.kept_from) + patience)
    }

    /// Who is to make room for a model that nobody asked for yet has been idle for so long.
    pub(super) fn keep_patience(&self, model: &ModelName) -> Duration {
        self.move_cost(model) * 2
    }

    /// Why a model that nobody asked for yet may not take the place of this one; `None`: it may,
    /// if that one is idle for long enough.
    pub(super) fn outlasts_preload(
        &self,
        candidate: &ModelName,
        instance: &Instance,
    ) -> Option<String> {
        let name = &instance.model;
        if self.is_kept(name) {
            return Some(format!("{name} is kept by its schedule"));
        }
        if !self.is_idle(instance) {
            return Some(format!("{name} serves {} requests", instance.in_flight()));
        }
        let free_from = self.idle_enough_at(candidate, instance);
        (free_from > self.now && instance.is_ready()).then(|| {
            let left = seconds(free_from.since(self.now));
            format!("{name} was used a moment ago, and is left alone for {left} more")
        })
    }

    /// From when on an idle instance may be replaced by a preload.
    pub(super) fn idle_enough_at(&self, candidate: &ModelName, instance: &Instance) -> Time {
        instance.last_used() + self.keep_patience(candidate).max(self.linger(instance))
    }
}
