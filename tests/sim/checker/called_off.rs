//! Starts that are called off for a higher class.

use wharf::scheduler::event::EnsureKind;
use wharf::scheduler::record::{SwapCause, SwapKind, SwapRecord};
use wharf::units::{ModelName, Priority};

use super::asks::Wish;
use super::{Checker, Told};

impl Checker {
    /// A new row: does it take away what is still starting, for want of its memory?
    pub(super) fn called_off(&mut self, record: &SwapRecord) {
        let starting = record.instance.and_then(|id| self.insts.get(&id));
        let starting = starting.is_some_and(|known| known.told == Told::Starting);
        if record.kind != SwapKind::Unload || record.cause != SwapCause::Evict || !starting {
            return;
        }
        self.counts.called_off += 1;
        let model = &record.model;
        let first = self.called_off.insert(model.clone());
        self.require(first, || format!("{model} is called off again and was not ready since"));
        let own = self.highest(|other| other == model);
        let outranked = self.highest(|other| other != model) > own;
        let asked = self.is_asked_for(|other| other != model);
        self.require(outranked || asked, || {
            format!("{model} ({own:?}) is called off and nobody of a higher class waits")
        });
        let ensured = self.is_asked_for(|other| other == model);
        self.require(!ensured, || format!("{model} is called off though an ensure wants it"));
        let pinned = self.is_pinned(model);
        self.require(!pinned, || format!("{model} is called off though it is pinned"));
    }

    fn highest(&self, of: impl Fn(&ModelName) -> bool) -> Option<Priority> {
        let waiting = self.waiting.values().filter(|waiting| of(&waiting.model));
        waiting.map(|waiting| waiting.priority).max()
    }

    fn is_asked_for(&self, of: impl Fn(&ModelName) -> bool) -> bool {
        self.asks.values().any(|asked| {
            let ready = match asked.wish {
                Wish::Ready(kind) => kind != EnsureKind::Warmup,
                Wish::Gone | Wish::Asleep | Wish::Extended | Wish::Pinned(_) => false,
            };
            ready && !asked.gone && of(&asked.model)
        })
    }
}
