//! Who leaves by its ttl, and who may be replaced by a model that nobody asked for.

use std::time::Duration;

use wharf::scheduler::record::{SwapCause, SwapKind, SwapRecord};
use wharf::units::{InstanceId, ModelName};

use super::{Checker, Told};

impl Checker {
    /// What an operator said; nothing is known of a model that left the configuration since.
    pub(super) fn pin(&mut self, model: &ModelName, pinned: bool) {
        self.pins.insert(model.clone(), Some(pinned));
    }

    pub(super) fn forget_removed(&mut self) {
        let catalog = self.catalog.clone();
        for (model, pinned) in &mut self.pins {
            if catalog.model(model).is_none() {
                *pinned = None;
            }
        }
        self.kept.retain(|model| catalog.model(model).is_some());
    }

    /// Surely pinned, whichever way a removed entry is read.
    pub(super) fn is_pinned(&self, model: &ModelName) -> bool {
        match self.pins.get(model) {
            Some(pinned) => *pinned == Some(true),
            None => self.catalog.model(model).is_some_and(|spec| spec.pinned),
        }
    }

    /// Perhaps pinned.
    pub(super) fn may_be_pinned(&self, model: &ModelName) -> bool {
        let configured = || self.catalog.model(model).is_some_and(|spec| spec.pinned);
        self.pins.get(model).map_or_else(configured, |pinned| pinned.unwrap_or(true))
    }

    /// A ttl ran for it, and nobody wanted it for so long.
    pub(super) fn ttl_was_over(&mut self, now: u64, record: &SwapRecord) {
        if record.kind != SwapKind::Unload || record.cause != SwapCause::Ttl {
            return;
        }
        let (id, model) = (record.id, &record.model);
        let known = record.instance.and_then(|instance| self.insts.get(&instance)).cloned();
        let spec = self.catalog.model(model).cloned();
        let (Some(known), Some(spec)) = (known, spec) else {
            return self.fail(format!("{id}: the ttl of what is not there"));
        };
        let ms = |duration: Duration| duration.as_millis() as u64;
        let ttl = spec.ttl.map_or(u64::MAX / 2, ms) + ms(spec.grace);
        let since = known.last_used.max(known.ready_at);
        self.require(known.in_flight == 0, || format!("{id}: {model} leaves by ttl in use"));
        self.require(now >= since + ttl, || {
            format!("{id}: {model} leaves by ttl {} ms after its last use", now - since)
        });
        self.require(now >= known.extended + ms(spec.grace), || {
            format!("{id}: {model} leaves by ttl, extended until {}", known.extended)
        });
        let exempt = self.is_pinned(model) || spec.warmup || self.kept.contains(model);
        self.require(!exempt, || format!("{id}: no ttl runs for {model}"));
    }

    /// A model that nobody asked for replaces only what is idle, not pinned and not kept.
    pub(super) fn preload_is_modest(&mut self, record: &SwapRecord, newly: &[InstanceId]) {
        if record.cause != SwapCause::Keep {
            return;
        }
        self.require(record.kind == SwapKind::Load, || format!("{} keeps by unloading", record.id));
        for victim in newly {
            let Some(known) = self.insts.get(victim).cloned() else { continue };
            let (id, model) = (record.id, &known.model);
            let idle = known.in_flight == 0 && matches!(known.told, Told::Ready | Told::Asleep);
            self.require(idle, || format!("{id} preloads in place of {model}, which is in use"));
            let kept = self.kept.contains(model);
            self.require(!kept, || format!("{id} preloads in place of {model}, kept too"));
        }
    }
}
