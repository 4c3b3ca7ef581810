//! The ledger of swaps, and who may be evicted for what.

use std::time::Duration;

use wharf::scheduler::record::{Phase, SwapCause, SwapKind, SwapRecord};
use wharf::units::{InstanceId, SwapId};

use super::{Checker, Told};

impl Checker {
    pub(super) fn record(&mut self, now: u64, record: &SwapRecord) {
        let id = record.id;
        if self.ended.contains(&id) {
            return self.fail(format!("{id} is recorded after its end"));
        }
        self.well_formed(now, record);
        let before = self.swaps.get(&id).cloned();
        let listed = before.as_ref().map(|before| before.evicted.as_slice()).unwrap_or_default();
        let newly: Vec<InstanceId> = record
            .evicted
            .iter()
            .filter(|evicted| !listed.iter().any(|old| old.instance == evicted.instance))
            .map(|evicted| evicted.instance)
            .collect();
        match &before {
            Some(before) => self.follows(before, record),
            None => {
                self.ttl_was_over(now, record);
                self.called_off(record);
            }
        }
        self.evictions(record, &newly);
        self.preload_is_modest(record, &newly);
        let leaves = (record.kind == SwapKind::Unload).then_some(record.instance).flatten();
        let victims = record.evicted.iter().map(|evicted| evicted.instance);
        for leaver in victims.chain(leaves).collect::<Vec<_>>() {
            if let Some(known) = self.insts.get_mut(&leaver) {
                known.listed_at.get_or_insert(now);
            }
        }
        if record.ended.is_some() {
            self.swaps.remove(&id);
            self.ended.insert(id);
        } else {
            self.swaps.insert(id, record.clone());
            self.one_vacates();
        }
    }

    fn well_formed(&mut self, now: u64, record: &SwapRecord) {
        let id = record.id;
        let ended = record.ended.is_some();
        let agree = ended == record.outcome.is_some() && ended == record.phase.is_none();
        self.require(agree, || format!("{id}: end, outcome and phase do not agree: {record:?}"));
        let spent: Duration = record.phases.iter().map(|(_, took)| *took).sum();
        let end = record.ended.unwrap_or(wharf::units::Time(now));
        let whole = end.since(record.began);
        self.require(spent <= whole, || format!("{id}: phases took {spent:?} of {whole:?}"));
        self.require(end.0 <= now, || format!("{id} ends in the future"));
        self.require(!record.decision.is_empty(), || format!("{id} was decided without words"));
        let mut order: Vec<Phase> = record.phases.iter().map(|(phase, _)| *phase).collect();
        order.extend(record.phase.map(|(phase, _)| phase));
        // A start may be tried again once, from the proof of its memory on.
        let back = order.windows(2).filter(|pair| pair[1] <= pair[0]).count();
        let far = order.windows(2).any(|pair| pair[1] < pair[0] && pair[1] < Phase::Drain);
        self.require(back <= 2 && !far, || format!("{id}: phases out of order: {order:?}"));
    }

    fn follows(&mut self, before: &SwapRecord, record: &SwapRecord) {
        let id = record.id;
        let same = before.began == record.began
            && before.model == record.model
            && before.kind == record.kind
            && record.phases.len() >= before.phases.len()
            && record.phases[..before.phases.len()] == before.phases[..];
        self.require(same, || format!("{id} rewrites its past: {before:?} then {record:?}"));
    }

    /// `newly`: who was not listed before. A pin does not reach those who left already.
    fn evictions(&mut self, record: &SwapRecord, newly: &[InstanceId]) {
        let shy = matches!(record.cause, SwapCause::Warmup | SwapCause::Restore);
        let free_of_victims = record.evicted.is_empty() || !shy;
        self.require(free_of_victims, || {
            format!("{} is a {:?} but evicts {:?}", record.id, record.cause, record.evicted)
        });
        self.groups_are_kept(record);
        for evicted in &record.evicted {
            let changed = self.insts.get(&evicted.instance).is_none_or(|known| {
                self.catalog.model(&known.model).is_none_or(|spec| *spec != known.spec)
            });
            let pinned =
                newly.contains(&evicted.instance) && !changed && self.is_pinned(&evicted.model);
            self.require(!pinned, || {
                format!("{} evicts {}, which is pinned", record.id, evicted.model)
            });
            self.require(!evicted.why.is_empty(), || "an eviction without a reason".to_owned());
        }
    }

    /// At most one swap makes room on a GPU.
    fn one_vacates(&mut self) {
        let vacating: Vec<&SwapRecord> = self
            .swaps
            .values()
            .filter(|record| {
                let phase = record.phase.map(|(phase, _)| phase);
                // Chosen again, it may still name those who left for its first choice.
                let leaves = |id: &InstanceId| {
                    self.insts.get(id).is_some_and(|known| {
                        known.last_for == Some(record.id)
                            && matches!(known.told, Told::FallingAsleep | Told::Stopping)
                    })
                };
                record.kind == SwapKind::Load
                    && record.evicted.iter().any(|evicted| leaves(&evicted.instance))
                    && matches!(phase, Some(Phase::Drain | Phase::Vacate))
            })
            .collect();
        let clash = vacating.iter().enumerate().find_map(|(n, one)| {
            let other = vacating[n + 1..]
                .iter()
                .find(|other| one.gpus.iter().any(|gpu| other.gpus.contains(gpu)))?;
            Some(format!("{} and {} both make room on one GPU", one.id, other.id))
        });
        if let Some(clash) = clash {
            self.fail(clash);
        }
    }

    /// An instance that is up may be made to leave for `swap`.
    pub(super) fn may_leave(&mut self, swap: SwapId, instance: InstanceId) {
        if self.ended.contains(&swap) {
            // What could not fall asleep for a swap called off meanwhile.
            return;
        }
        let Some(record) = self.swaps.get(&swap).cloned() else {
            return self.fail(format!("{instance} leaves for {swap}, which is not recorded"));
        };
        // What is left of its own first try may go, too.
        let own = self.insts.get(&instance).is_some_and(|known| known.model == record.model);
        if record.kind != SwapKind::Load || own {
            return;
        }
        let listed = record.evicted.iter().any(|evicted| evicted.instance == instance);
        self.require(listed, || format!("{instance} leaves for {swap}, but is not its victim"));
        let target = record.instance.and_then(|id| self.insts.get(&id));
        let fetched = target.is_none_or(|known| known.fetched || known.told == Told::Asleep);
        self.require(fetched, || {
            format!("{instance} leaves for {swap} before all is fetched for it")
        });
    }
}
