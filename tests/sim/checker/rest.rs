//! At rest: nothing goes wrong any more and nobody asks, so nothing may be left undone.

use wharf::scheduler::record::{ResidencyView, SchedulerView};
use wharf::units::Bytes;

use super::Checker;

impl Checker {
    /// Nothing goes wrong any more and nobody asks: nothing may be left undone.
    pub fn at_rest(&mut self, now: u64, view: &SchedulerView) {
        let waits = self.waiting.len();
        self.require(waits == 0, || format!("at rest, but {waits} requests wait"));
        let asks: Vec<String> = self
            .asks
            .iter()
            .filter(|(_, asked)| !asked.gone)
            .map(|(ask, asked)| format!("{ask} ({})", asked.model))
            .collect();
        self.require(asks.is_empty(), || format!("at rest, but not answered: {asks:?}"));
        let stale = self.swaps.values().find(|record| record.began.0 + 200_000 < now);
        let stale = stale.map(|record| (record.id, record.model.clone(), record.phase));
        self.require(stale.is_none(), || format!("at rest, but a swap is under way: {stale:?}"));
        let queued = view.queued;
        self.require(queued == 0, || format!("at rest, but the view says {queued} queued"));
        self.view_at_rest(now, view);
    }

    /// The view agrees with what was told, and no promise outlives its instance.
    fn view_at_rest(&mut self, now: u64, view: &SchedulerView) {
        for model in &view.models {
            let settled = matches!(
                model.residency,
                ResidencyView::Stopped
                    | ResidencyView::Ready
                    | ResidencyView::Sleeping { .. }
                    | ResidencyView::Failed { .. }
            );
            let name = &model.name;
            let state = model.residency.as_str();
            self.require(settled || model.since.0 + 200_000 > now, || {
                format!("at rest, but {name} is {state} since {}", model.since.0)
            });
            let ready = self.ready(name).is_some();
            self.require(ready == (state == "ready"), || {
                format!("the view says {name} is {state}; told ready: {ready}")
            });
        }
        let leaked = self.live.is_empty() && view.ram.promised > Bytes::ZERO;
        self.require(!leaked, || format!("nothing runs, but of host RAM {:?}", view.ram));
        for gpu in &view.gpus {
            let on = self.live.iter().filter(|id| self.insts[id].gpus.contains(&gpu.gpu)).count();
            let leaked = on == 0 && gpu.promised > Bytes::ZERO;
            self.require(!leaked, || {
                format!("nothing runs on GPU {}, but {} are promised", gpu.gpu, gpu.promised)
            });
        }
    }
}
