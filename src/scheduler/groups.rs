//! Groups: who is loaded together, who is never up beside whom, and who stays for others.
//!
//! *Company*: when a member of a `together` group starts for somebody, the others are loaded too.
//! They take free room, or that of models which nobody uses; never that of one another. What was
//! evicted later comes back when the group is asked for again. They leave together, too: an
//! unload by hand takes along the members that nobody uses, and the ttl counts from the last use
//! of any of them.
//!
//! *Apart*: models that a rule keeps apart are like models that need the same memory: who wants
//! one in has the other leave, by the same right and in the same order (`policy`). While an
//! overdue one waits, nothing that it would have to wait for begins.

use std::collections::BTreeSet;

use super::Scheduler;
use super::action::Refusal;
use super::ask::AskKind;
use super::policy::{Candidate, Urgency};
use super::residency::{Instance, Residency};
use super::swap::StartBlock;
use crate::config::catalog::{Group, ModelSpec};
use crate::units::{InstanceId, ModelName, Time};

impl Scheduler {
    /// It stays whatever this model needs: pinned, or of a persistent group of others.
    pub(super) fn stays_for(&self, model: &ModelName, instance: &Instance) -> bool {
        self.is_pinned(instance) || self.catalog.persists_for(&instance.model, model).is_some()
    }

    /// As [`Scheduler::stays_for`], and no ttl ends it.
    pub(super) fn stays_for_good(&self, model: &ModelName, instance: &Instance) -> bool {
        let ttl = instance.spec.ttl.is_some_and(|ttl| !ttl.is_zero());
        self.is_pinned(instance) || (!ttl && self.stays_for(model, instance))
    }

    /// The group that keeps the two apart, if the instance is up.
    pub(super) fn kept_apart(&self, spec: &ModelSpec, instance: &Instance) -> Option<&str> {
        self.takes_slot(instance).then(|| self.catalog.keeps_apart(spec, &instance.spec)).flatten()
    }

    /// Another swap is about to start what may not be up beside this model.
    pub(super) fn rival_coming(&self, candidate: &Candidate) -> Option<String> {
        let coming = |s: &&super::swap::Swap| {
            Some(s.id) != candidate.swap && s.is_load() && s.claims(self.now) && !s.started
        };
        self.swaps.values().filter(coming).find_map(|s| {
            let group = self.catalog.keeps_apart(&candidate.spec, self.catalog.model(&s.model)?)?;
            Some(format!("{} comes first, and group {group} keeps them apart", s.model))
        })
    }

    /// Who waits longer and would have to wait for this candidate, too.
    pub(super) fn rival_waiting(
        &self,
        candidate: &Candidate,
        longer: &[ModelName],
    ) -> Option<String> {
        longer.iter().find_map(|name| {
            let group = self.catalog.keeps_apart(&candidate.spec, self.catalog.model(name)?)?;
            Some(format!("{name} waits longer, and group {group} keeps them apart"))
        })
    }

    /// Set if somebody who never leaves keeps the model away.
    pub(super) fn kept_away(&self, spec: &ModelSpec) -> Option<Refusal> {
        self.instances.values().filter(|i| !i.is_stopping()).find_map(|i| {
            let group = self.kept_apart(spec, i).filter(|_| self.stays_for_good(&spec.name, i))?;
            Some(Refusal::KeptApart { group: group.to_owned(), by: i.model.clone() })
        })
    }

    /// What may not run beside the target has to be gone, or asleep.
    pub(super) fn group_block(&self, target: &Instance) -> Result<(), StartBlock> {
        let beside = |i: &&Instance| {
            i.id != target.id
                && i.launched
                && !i.is_sleeping()
                && i.may_run()
                && self.catalog.keeps_apart(&target.spec, &i.spec).is_some()
        };
        let mut leaving = None;
        for instance in self.instances.values().filter(beside) {
            match instance.residency {
                Residency::Stopping | Residency::FallingAsleep => leaving = Some(&instance.model),
                Residency::Starting { .. }
                | Residency::Ready
                | Residency::Draining
                | Residency::Sleeping { .. }
                | Residency::Waking
                | Residency::Lost { .. } => return Err(StartBlock::Stale),
            }
        }
        leaving.map_or(Ok(()), |name| Err(StartBlock::Process(format!("{name} to be gone"))))
    }

    /// `group/model` was asked for: whoever of the group is not there is loaded, too.
    pub(super) fn company_asked(&mut self, group: &str) {
        let Some(members) = self.catalog.groups.get(group).filter(|group| group.together) else {
            return;
        };
        for name in self.catalog.members(members) {
            let ready = self.current(&name).is_some_and(Instance::is_ready);
            if !ready && self.company.insert(name.clone(), group.to_owned()).is_none() {
                self.changed();
            }
            if let Some(state) = self.models.get_mut(&name) {
                state.unloaded = false;
            }
        }
    }

    /// A model starts for somebody: its group comes with it.
    pub(super) fn call_company(&mut self, model: &ModelName) {
        if let Some(group) = self.catalog.company_of(model).map(str::to_owned) {
            self.company_asked(&group);
        }
    }

    /// Loaded for the sake of its group, as long as another member is up.
    pub(super) fn company_due(&self, model: &ModelName) -> bool {
        let Some(group) = self.company.get(model).and_then(|g| self.catalog.groups.get(g)) else {
            return false;
        };
        self.catalog.members(group).iter().any(|mate| {
            mate != model && self.current(mate).is_some_and(|i| i.launched && !i.is_sleeping())
        })
    }

    /// Forgets wishes that came true, and those of groups that nobody uses any more.
    pub(super) fn forget_company(&mut self) {
        let over: Vec<ModelName> = self
            .company
            .iter()
            .filter(|(name, group)| {
                let group = self.catalog.groups.get(*group).filter(|group| group.together);
                let wanted = |group: &Group| {
                    self.catalog.members(group).iter().any(|mate| {
                        mate != *name
                            && (self.queue_len(mate) > 0
                                || self.load_of(mate).is_some()
                                || self.current(mate).is_some_and(|i| !i.is_sleeping())
                                || self.is_asked_for(mate))
                    })
                };
                let there = self.current(name).is_some_and(Instance::is_ready);
                // One that cannot be started is not tried again for company's sake.
                let able = self.models.get(*name).is_some_and(|m| m.failure.is_none());
                there || !able || !group.is_some_and(wanted)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in over {
            self.company.remove(&name);
        }
    }

    fn is_asked_for(&self, model: &ModelName) -> bool {
        let ready = |kind: AskKind| matches!(kind, AskKind::Ready(_));
        self.asks.values().any(|ask| ask.model == *model && ready(ask.kind))
    }

    /// Why an instance does not leave for a candidate that comes as company only.
    pub(super) fn stays_for_company(
        &self,
        candidate: &Candidate,
        instance: &Instance,
    ) -> Option<String> {
        if candidate.urgency != Urgency::Company {
            return None;
        }
        let name = &instance.model;
        if self.catalog.are_mates(&candidate.spec.name, name) {
            return Some(format!("{name} belongs to the same group"));
        }
        (self.queue_len(name) > 0 || self.is_asked_for(name))
            .then(|| format!("somebody waits for {name}"))
    }

    /// Members that leave with one that an operator unloads: those that nobody uses.
    pub(super) fn unload_company(&mut self, model: &ModelName) {
        let names: BTreeSet<ModelName> = self
            .catalog
            .together_with(model)
            .flat_map(|(_, group)| self.catalog.members(group))
            .filter(|mate| mate != model)
            .collect();
        for mate in names {
            let used = |i: &Instance| {
                i.in_flight() > 0 || i.hold.is_some() || i.spec.warmup || self.is_pinned(i)
            };
            let idle: Option<InstanceId> =
                self.current(&mate).filter(|i| !used(i) && !i.is_lost()).map(|i| i.id);
            if self.queue_len(&mate) > 0 || self.is_asked_for(&mate) {
                continue;
            }
            self.company.remove(&mate);
            if let Some(instance) = idle {
                self.unload(instance, false);
            }
        }
    }

    /// For the ttl: when the instance, or one that leaves with it, was last used. `None`: one of
    /// them is in use.
    pub(super) fn idle_since(&self, instance: &Instance) -> Option<Time> {
        let mates = self
            .catalog
            .together_with(&instance.model)
            .flat_map(|(_, group)| self.catalog.members(group));
        let mut last = instance.last_used();
        for mate in mates.filter(|mate| *mate != instance.model) {
            let Some(mate) = self.current(&mate).filter(|i| i.launched && !i.is_sleeping()) else {
                continue;
            };
            if !self.is_idle(mate) || mate.hold.is_some() {
                return None;
            }
            last = last.max(mate.last_used());
        }
        Some(last)
    }
}
