//! Instances and swaps by id, with the way to them that decisions ask for most: by model.
//!
//! Only `insert` and `remove` touch the index; `check` says whether it still agrees.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};

use super::residency::Instance;
use super::swap::Swap;
use crate::units::ModelName;

/// What a table finds by model.
pub(super) trait OfModel {
    /// `None`: not to be found that way.
    fn of_model(&self) -> Option<&ModelName>;
}

impl OfModel for Instance {
    fn of_model(&self) -> Option<&ModelName> {
        Some(&self.model)
    }
}

impl OfModel for Swap {
    /// Those that make their model ready.
    fn of_model(&self) -> Option<&ModelName> {
        self.is_load().then_some(&self.model)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Table<K, V> {
    entries: BTreeMap<K, V>,
    by_model: BTreeMap<ModelName, BTreeSet<K>>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Table<K, V> {
        Table { entries: BTreeMap::new(), by_model: BTreeMap::new() }
    }
}

impl<K, V> Deref for Table<K, V> {
    type Target = BTreeMap<K, V>;

    fn deref(&self) -> &BTreeMap<K, V> {
        &self.entries
    }
}

impl<K, V> DerefMut for Table<K, V> {
    fn deref_mut(&mut self) -> &mut BTreeMap<K, V> {
        &mut self.entries
    }
}

impl<K: Ord + Copy, V: OfModel> Table<K, V> {
    pub fn insert(&mut self, id: K, entry: V) {
        if let Some(model) = entry.of_model() {
            self.by_model.entry(model.clone()).or_default().insert(id);
        }
        self.entries.insert(id, entry);
    }

    pub fn remove(&mut self, id: &K) -> Option<V> {
        let entry = self.entries.remove(id)?;
        if let Some(model) = entry.of_model()
            && let Some(ids) = self.by_model.get_mut(model)
        {
            ids.remove(id);
            if ids.is_empty() {
                self.by_model.remove(model);
            }
        }
        Some(entry)
    }

    /// All of a model, the oldest first.
    pub fn of(&self, model: &ModelName) -> impl Iterator<Item = &V> {
        self.by_model.get(model).into_iter().flatten().filter_map(|id| self.entries.get(id))
    }

    pub fn check(&self) -> bool {
        let indexed = self.by_model.values().map(BTreeSet::len).sum::<usize>();
        let models = || self.iter().filter_map(|(id, entry)| Some((id, entry.of_model()?)));
        let found = |(id, model): (&K, &ModelName)| {
            self.by_model.get(model).is_some_and(|ids| ids.contains(id))
        };
        indexed == models().count() && models().all(found)
    }
}
