//! Preflight: is there anything that makes this start hopeless? Nobody has been disturbed yet.

use std::time::Duration;

use super::super::Scheduler;
use super::super::action::Action;
use super::super::event::Fault;
use super::super::memory::UNSEEN;
use super::super::record::Phase;
use super::super::residency::MoveKind;
use crate::units::SwapId;

const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(60);

impl Scheduler {
    pub(super) fn emit_preflight(&mut self, id: SwapId) {
        let Some(swap) = self.swaps.get(&id) else { return };
        let (instance, model) = (swap.instance, swap.model.clone());
        let gpus = swap.gpus.iter().copied().filter(|&g| g != UNSEEN).collect();
        self.set_moving(instance, MoveKind::Preflight, id, self.now + PREFLIGHT_TIMEOUT);
        self.emit(Action::Preflight { swap: id, instance, model, gpus });
    }

    pub(super) fn preflight_done(&mut self, id: SwapId, result: Result<(), Fault>) {
        match result {
            Ok(()) => {
                self.enter_phase(id, Phase::Fetch);
                self.emit_fetch(id);
            }
            Err(fault) if fault.kind.is_transient() && self.use_retry(id) => {
                self.emit_preflight(id);
            }
            Err(fault) => self.fail_load(id, fault),
        }
    }

    /// Takes the one retry, if it is left.
    pub(super) fn use_retry(&mut self, id: SwapId) -> bool {
        self.swaps.get_mut(&id).is_some_and(|s| !std::mem::replace(&mut s.retried, true))
    }
}
