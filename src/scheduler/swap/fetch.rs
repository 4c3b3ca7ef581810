//! Fetch: image and weights are brought here before anybody is asked to leave. It may take as
//! long as a download takes (the effect itself gives up when no bytes come any more); after a
//! second its GPUs are free for others.

use super::super::Scheduler;
use super::super::action::Action;
use super::super::event::Fault;
use super::super::record::Phase;
use super::super::residency::MoveKind;
use crate::units::{SwapId, Time};

impl Scheduler {
    pub(super) fn emit_fetch(&mut self, id: SwapId) {
        let Some(swap) = self.swaps.get(&id) else { return };
        let (instance, model) = (swap.instance, swap.model.clone());
        self.set_moving(instance, MoveKind::Fetch, id, Time::MAX);
        self.emit(Action::Fetch { swap: id, instance, model });
    }

    pub(super) fn fetch_done(&mut self, id: SwapId, result: Result<(), Fault>) {
        match result {
            Ok(()) => {
                // The plan made at the beginning may be stale: `choose` makes a new one, in rank.
                self.enter_phase(id, Phase::Drain);
                if let Some(swap) = self.swaps.get_mut(&id) {
                    swap.victims.clear();
                }
            }
            Err(fault) if fault.kind.is_transient() && self.use_retry(id) => self.emit_fetch(id),
            Err(fault) => self.fail_load(id, fault),
        }
    }
}
