//! Groups: who may be up beside whom, read from the configuration anew, not by the scheduler's
//! own lookup.

use wharf::config::catalog::ModelSpec;
use wharf::scheduler::record::{SwapCause, SwapRecord};
use wharf::units::{InstanceId, ModelName};

use super::{Checker, Told};

impl Checker {
    /// What starts or wakes finds nobody up whom a group keeps away from it.
    pub(super) fn starts_apart(&mut self, instance: InstanceId) {
        let me = &self.insts[&instance];
        let up = |told: Told| {
            !matches!(told, Told::Preparing | Told::Asleep | Told::Gone | Told::StopFailed)
        };
        let others = self.live.iter().filter(|&&other| other != instance).map(|id| &self.insts[id]);
        let clash = others
            .filter(|other| other.launched && up(other.told) && other.model != me.model)
            .find_map(|other| {
                let rule = self.rule_between((&me.model, &me.spec), (&other.model, &other.spec))?;
                Some(format!(
                    "{} starts beside {} ({:?}): group {rule} keeps them apart",
                    me.model, other.model, other.told
                ))
            });
        if let Some(clash) = clash {
            self.fail(clash);
        }
    }

    fn rule_between(
        &self,
        (a, spec_a): (&ModelName, &ModelSpec),
        (b, spec_b): (&ModelName, &ModelSpec),
    ) -> Option<&str> {
        if spec_a.is_external() || spec_b.is_external() {
            return None;
        }
        for (name, group) in &self.catalog.groups {
            let inside = |model: &ModelName| group.models.contains(model);
            let sheltered = |outside: &ModelName, spec: &ModelSpec, inside: &ModelName| {
                let now = self.catalog.model(outside).is_some_and(|spec| spec.pinned);
                let persists = self.catalog.groups.values().any(|other| {
                    other.persistent
                        && other.models.contains(outside)
                        && !other.models.contains(inside)
                });
                spec.pinned || now || persists
            };
            let apart = match (inside(a), inside(b)) {
                (true, true) => !group.together,
                (true, false) => group.exclusive && !sheltered(b, spec_b, a),
                (false, true) => group.exclusive && !sheltered(a, spec_a, b),
                (false, false) => false,
            };
            if apart {
                return Some(name);
            }
        }
        None
    }

    /// Nobody leaves a persistent group for others, nor for company's sake one of the same group.
    pub(super) fn groups_are_kept(&mut self, record: &SwapRecord) {
        for evicted in &record.evicted {
            let outdated = self.insts.get(&evicted.instance).is_none_or(|known| {
                self.catalog.model(&known.model).is_none_or(|spec| *spec != known.spec)
            });
            let broken = self.catalog.groups.iter().find(|(_, group)| {
                let has = |model: &ModelName| group.models.contains(model);
                let leaves = has(&evicted.model);
                let persists = group.persistent && leaves && !has(&record.model);
                let company = group.together
                    && leaves
                    && has(&record.model)
                    && record.cause == SwapCause::Group;
                (persists && !outdated) || company
            });
            let broken = broken.map(|(name, _)| name.clone());
            self.require(broken.is_none(), || {
                format!("{} evicts {} against group {broken:?}", record.id, evicted.model)
            });
        }
    }

    /// Pinned, or of a persistent group without `me`: a model of unknown size gets what is left.
    pub(super) fn stays_beside(&self, other: &ModelName, me: &ModelName) -> bool {
        let persists = self.catalog.groups.values().any(|group| {
            group.persistent && group.models.contains(other) && !group.models.contains(me)
        });
        persists || self.may_be_pinned(other)
    }

    /// Somebody who is there for good may keep the model away.
    pub(super) fn may_be_kept_apart(&self, model: &ModelName) -> bool {
        let catalog = &self.catalog;
        let pinned = catalog.models.keys().any(|other| other != model && self.may_be_pinned(other));
        !catalog.groups.is_empty()
            && (pinned || catalog.groups.values().any(|group| group.persistent))
    }
}
