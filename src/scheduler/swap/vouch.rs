//! Vouch: the engine answers, the listener is ours, the memory shows. Then the gate opens.

use super::super::Scheduler;
use super::super::record::{Phase, SwapOutcome};
use super::super::residency::{GateState, Move, Residency};
use crate::units::{Bytes, InstanceId, SwapId};

impl Scheduler {
    pub(in crate::scheduler) fn vouching(&mut self, id: SwapId, instance: InstanceId) {
        let matches = self.swaps.get(&id).is_some_and(|s| {
            s.instance == instance && s.started && s.phase == Phase::Start && s.is_load()
        });
        if matches {
            self.enter_phase(id, Phase::Vouch);
        }
    }

    /// The model is ready: its tenure begins.
    pub(super) fn vouched(
        &mut self,
        id: SwapId,
        instance: InstanceId,
        under_way: Move,
        measured: Option<Bytes>,
    ) {
        let now = self.now;
        let Some(target) = self.instances.get_mut(&instance) else { return };
        target.enter(Residency::Ready, now);
        target.ready_at = now;
        (target.served, target.unvouched) = (true, false);
        self.memory.host_freed += target.weights;
        (target.residue, target.awake, target.weights) = (Bytes::ZERO, Bytes::ZERO, Bytes::ZERO);
        let mut gate = GateState::default();
        // A woken instance keeps its gate, and with it the counters.
        if under_way.kind == super::super::residency::MoveKind::Wake {
            gate.count = target.gate.count;
            gate.watched = target.gate.watched;
        }
        target.gate = gate;
        target.measured = measured.or(target.measured);
        let (model, gpus) = (target.model.clone(), target.gpus.clone());
        self.memory_changed(&gpus);
        self.learn_move(&model, under_way.kind, now.since(under_way.since));
        if let Some(bytes) = measured {
            self.learn_footprint(instance, bytes);
        }
        if let Some(state) = self.models.get_mut(&model) {
            (state.failure, state.failures, state.since) = (None, 0, now);
            state.called_off = false;
        }
        self.answer_ready(&model, instance, id);
        self.end_swap(id, SwapOutcome::Ready);
    }
}
