//! What adapters ask of their bases.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::catalog::Catalog;
use crate::units::ModelName;

impl Catalog {
    /// Marks the bases of adapters, once all models are known.
    pub fn link_adapters(&mut self) {
        let bases: BTreeSet<ModelName> = self
            .models
            .values()
            .filter_map(|spec| Some(spec.adapter.as_ref()?.of.clone()))
            .collect();
        for (name, spec) in &mut self.models {
            let lora = bases.contains(name) && !crate::engine::says_lora(spec);
            if spec.lora != lora {
                Arc::make_mut(spec).lora = lora;
            }
        }
    }
}
