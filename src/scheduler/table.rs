//! Instances and swaps by id, with the way to them that decisions ask for most: by model.
//!
//! Only `insert` and `remove` touch the index; `check` says whether it still agrees.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};

use super::residency::Instance;
use super::swap::Swap;
use crate::units::{InstanceId, ModelName, SwapId};

#[derive(Clone, Debug, Default)]
pub(super) struct Instances {
    entries: BTreeMap<InstanceId, Instance>,
    by_model: BTreeMap<ModelName, BTreeSet<InstanceId>>,
}

impl Deref for Instances {
    type Target = BTreeMap<InstanceId, Instance>;

    fn deref(&self) -> &BTreeMap<InstanceId, Instance> {
        &self.entries
    }
}

impl DerefMut for Instances {
    fn deref_mut(&mut self) -> &mut BTreeMap<InstanceId, Instance> {
        &mut self.entries
    }
}

impl Instances {
    pub fn insert(&mut self, id: InstanceId, instance: Instance) {
        self.by_model.entry(instance.model.clone()).or_default().insert(id);
        self.entries.insert(id, instance);
    }

    pub fn remove(&mut self, id: &InstanceId) {
        let Some(instance) = self.entries.remove(id) else { return };
        if let Some(ids) = self.by_model.get_mut(&instance.model) {
            ids.remove(id);
            if ids.is_empty() {
                self.by_model.remove(&instance.model);
            }
        }
    }

    /// All of a model, the oldest first.
    pub fn of(&self, model: &ModelName) -> impl Iterator<Item = &Instance> {
        self.by_model.get(model).into_iter().flatten().filter_map(|id| self.entries.get(id))
    }

    pub fn check(&self) -> bool {
        let indexed = self.by_model.values().map(BTreeSet::len).sum::<usize>();
        let found = |i: &Instance| self.by_model.get(&i.model).is_some_and(|s| s.contains(&i.id));
        indexed == self.len() && self.values().all(found)
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Swaps {
    entries: BTreeMap<SwapId, Swap>,
    loads: BTreeMap<ModelName, BTreeSet<SwapId>>,
}

impl Deref for Swaps {
    type Target = BTreeMap<SwapId, Swap>;

    fn deref(&self) -> &BTreeMap<SwapId, Swap> {
        &self.entries
    }
}

impl DerefMut for Swaps {
    fn deref_mut(&mut self) -> &mut BTreeMap<SwapId, Swap> {
        &mut self.entries
    }
}

impl Swaps {
    pub fn insert(&mut self, id: SwapId, swap: Swap) {
        if swap.is_load() {
            self.loads.entry(swap.model.clone()).or_default().insert(id);
        }
        self.entries.insert(id, swap);
    }

    pub fn remove(&mut self, id: &SwapId) -> Option<Swap> {
        let swap = self.entries.remove(id)?;
        if let Some(ids) = self.loads.get_mut(&swap.model) {
            ids.remove(id);
            if ids.is_empty() {
                self.loads.remove(&swap.model);
            }
        }
        Some(swap)
    }

    /// The swap that makes a model ready.
    pub fn load_of(&self, model: &ModelName) -> Option<&Swap> {
        self.entries.get(self.loads.get(model)?.first()?)
    }

    pub fn check(&self) -> bool {
        let indexed = self.loads.values().map(BTreeSet::len).sum::<usize>();
        let loads = || self.values().filter(|s| s.is_load());
        let found = |s: &Swap| self.loads.get(&s.model).is_some_and(|ids| ids.contains(&s.id));
        indexed == loads().count() && loads().all(found)
    }
}
