//! What callers must see: a reference that shares nothing with the scheduler but its events and
//! actions, and looks at the machine as it really is.

mod actions;
mod memory;
mod swaps;
mod waits;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::{Catalog, GpuRequest, ModelSpec, SwapMode};
use wharf::scheduler::event::{Done, EnsureKind, Event, FaultKind, Request};
use wharf::scheduler::record::{ResidencyView, SchedulerView, SwapRecord};
use wharf::units::{AskId, Bytes, GpuId, InstanceId, ModelName, RequestId, SwapId};

use crate::scenario::{Scenario, fits};

/// What the scheduler was told of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Preparing,
    Starting,
    Ready,
    FallingAsleep,
    Asleep,
    Waking,
    Stopping,
    /// A stop failed: it may still be there.
    StopFailed,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    Preflight,
    Fetch,
    Start,
    Stop,
    Sleep,
    Wake,
}

#[derive(Clone, Debug)]
pub struct Known {
    pub model: ModelName,
    pub spec: Arc<ModelSpec>,
    pub gpus: Vec<GpuId>,
    pub told: Told,
    /// Set by the start action.
    pub footprint: Option<Bytes>,
    pub under_way: Option<(Move, SwapId)>,
    pub preflight: bool,
    pub fetched: bool,
    pub open: bool,
    pub closed_at: Option<u64>,
    /// First named as the one that leaves.
    pub listed_at: Option<u64>,
    /// The swap of its last move.
    pub last_for: Option<SwapId>,
    pub launched: bool,
    /// Of unknown size, beside a pinned one: nobody can say what it will take.
    pub gamble: bool,
    pub cancelled: bool,
    pub lost: bool,
    /// vLLM between start and the end of its profiling.
    pub profiling: bool,
    /// Told leases in flight.
    pub in_flight: u32,
}

#[derive(Clone, Debug)]
pub struct Waiting {
    pub model: ModelName,
    pub never_start: bool,
    pub max_wait: Option<Duration>,
    /// `queue.timeout` passes.
    pub due: u64,
    /// Since when its turn is awaited.
    pub clock: u64,
    /// Arrived just now: must be decided at once if it can never be served.
    pub at: u64,
}

#[derive(Clone, Debug)]
pub struct Asked {
    pub model: ModelName,
    /// `None`: unload.
    pub kind: Option<EnsureKind>,
    pub deadline: u64,
    /// The newest instance there was.
    pub newest: InstanceId,
    pub gone: bool,
}

pub struct Checker {
    pub failure: Option<String>,
    catalog: Arc<Catalog>,
    gpus: Vec<crate::machine::Gpu>,
    proof: bool,
    calm: bool,
    waiting: BTreeMap<RequestId, Waiting>,
    /// (queue.timeout passes, request)
    due: BTreeSet<(u64, RequestId)>,
    decided: BTreeSet<RequestId>,
    asks: BTreeMap<AskId, Asked>,
    answered: BTreeSet<AskId>,
    insts: BTreeMap<InstanceId, Known>,
    /// Instances not told gone.
    live: BTreeSet<InstanceId>,
    swaps: BTreeMap<SwapId, SwapRecord>,
    /// Who was made to leave for which swap, in the breath under way.
    leaving: Vec<(SwapId, InstanceId)>,
    /// Something arrived, or what may wait changed.
    queue_changed: bool,
    ended: BTreeSet<SwapId>,
    watches: BTreeSet<SwapId>,
    /// Models to be unloaded by force: until they are gone, their leases may be cancelled.
    forced: BTreeSet<ModelName>,
    failed_models: BTreeSet<ModelName>,
    /// Strangers' bytes in the newest sample that was told, per GPU.
    foreign_seen: Vec<Bytes>,
    sampled_at: u64,
    no_proof: bool,
    ever_lost: bool,
    shutting_down: bool,
    stalled: BTreeMap<ModelName, u64>,
    bounds: BTreeMap<ModelName, waits::Bound>,
    /// Longest not-ready wait seen, as a share of its bound (per mille).
    pub tightest: u64,
    pub counts: Counts,
}

#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub grants: u64,
    pub refusals: BTreeMap<&'static str, u64>,
    pub starts: u64,
    pub stops: u64,
    pub sleeps: u64,
    pub wakes: u64,
}

impl Checker {
    pub fn new(scenario: &Scenario) -> Checker {
        Checker {
            failure: None,
            catalog: Arc::clone(&scenario.catalog),
            gpus: scenario.told_gpus().to_vec(),
            proof: scenario.proof,
            calm: scenario.calm,
            waiting: BTreeMap::new(),
            due: BTreeSet::new(),
            decided: BTreeSet::new(),
            asks: BTreeMap::new(),
            answered: BTreeSet::new(),
            insts: BTreeMap::new(),
            live: BTreeSet::new(),
            swaps: BTreeMap::new(),
            leaving: Vec::new(),
            queue_changed: false,
            ended: BTreeSet::new(),
            watches: BTreeSet::new(),
            forced: BTreeSet::new(),
            failed_models: BTreeSet::new(),
            foreign_seen: scenario.gpus.iter().map(crate::machine::Gpu::foreign_bytes).collect(),
            sampled_at: 0,
            no_proof: false,
            ever_lost: false,
            shutting_down: false,
            stalled: BTreeMap::new(),
            bounds: waits::bounds(scenario),
            tightest: 0,
            counts: Counts::default(),
        }
    }

    pub fn fail(&mut self, message: impl Into<String>) {
        self.failure.get_or_insert(message.into());
    }

    /// `false`, and the run is over, unless `holds`.
    fn require(&mut self, holds: bool, message: impl FnOnce() -> String) -> bool {
        if !holds {
            self.fail(message());
        }
        holds
    }

    pub fn on_event(&mut self, now: u64, event: &Event) {
        match event {
            Event::RequestArrived(request) => self.arrived(now, request),
            Event::RequestGone { request } => {
                self.forget(*request);
            }
            Event::GateSeen { instance, gate } => {
                if let Some(known) = self.insts.get_mut(instance) {
                    known.in_flight = gate.in_flight;
                }
            }
            Event::EnsureAsked { ask, model, kind, deadline } => {
                let deadline = deadline.0.max(now);
                self.asked(*ask, model, Some(*kind), deadline);
            }
            Event::UnloadAsked { ask, model, force } => {
                self.asked(*ask, model, None, u64::MAX);
                if *force {
                    self.forced.insert(model.clone());
                }
            }
            Event::AskGone { ask } => {
                if let Some(asked) = self.asks.get_mut(ask) {
                    asked.gone = true;
                }
            }
            Event::MoveDone { swap, instance, done } => self.move_done(*swap, *instance, done),
            Event::Vouching { instance, .. } => {
                if let Some(known) = self.insts.get_mut(instance) {
                    known.profiling = false;
                }
            }
            Event::MemorySeen(Ok(sample)) => self.sampled(sample),
            Event::MemorySeen(Err(_)) => self.no_proof = true,
            Event::InstanceDied { instance, .. } => {
                if let Some(known) = self.insts.get(instance) {
                    self.failed_models.insert(known.model.clone());
                }
                self.told_gone(*instance);
            }
            Event::Adopted { instance, model, gpus, footprint } => {
                self.adopted(*instance, model, gpus, *footprint);
            }
            Event::Stray { .. } => {}
            Event::CatalogChanged(catalog) => {
                self.catalog = Arc::clone(catalog);
                self.queue_changed = true;
                for known in self.insts.values_mut() {
                    let spec = catalog.model(&known.model);
                    if let Some(spec) = spec.filter(|spec| spec.runs_like(&known.spec)) {
                        // In force at once on what goes on running.
                        Arc::make_mut(&mut known.spec).concurrency = spec.concurrency;
                    }
                }
            }
            Event::RuntimeLost { instances, .. } => {
                self.ever_lost = true;
                for instance in instances {
                    if let Some(known) = self.insts.get_mut(instance) {
                        known.lost = true;
                    }
                }
            }
            Event::RuntimeBack { alive, dead } => {
                for instance in alive {
                    if let Some(known) = self.insts.get_mut(instance) {
                        known.lost = false;
                    }
                }
                dead.iter().for_each(|&instance| self.told_gone(instance));
            }
            Event::ShuttingDown => (self.shutting_down, self.queue_changed) = (true, true),
            Event::Remembered { .. } | Event::Woke => {}
        }
    }

    fn arrived(&mut self, now: u64, request: &Request) {
        let timeout = self.catalog.settings.queue.timeout.as_millis() as u64;
        let due = now.max(request.arrived.0) + timeout;
        let waiting = Waiting {
            model: request.model.clone(),
            never_start: request.never_start,
            max_wait: request.max_wait,
            due,
            clock: now,
            at: now,
        };
        self.queue_changed = true;
        self.due.insert((due, request.id));
        self.waiting.insert(request.id, waiting);
    }

    /// Out of the queue, if it was there.
    fn forget(&mut self, request: RequestId) -> Option<Waiting> {
        let waiting = self.waiting.remove(&request)?;
        self.due.remove(&(waiting.due, request));
        self.decided.insert(request);
        Some(waiting)
    }

    fn asked(&mut self, ask: AskId, model: &ModelName, kind: Option<EnsureKind>, deadline: u64) {
        let newest = self.insts.keys().next_back().copied().unwrap_or(InstanceId(0));
        let asked = Asked { model: model.clone(), kind, deadline, newest, gone: false };
        self.asks.insert(ask, asked);
    }

    fn adopted(
        &mut self,
        instance: InstanceId,
        model: &ModelName,
        gpus: &[GpuId],
        footprint: Bytes,
    ) {
        let Some(spec) = self.catalog.model(model).cloned() else { return };
        let known = Known {
            footprint: Some(footprint),
            told: Told::Ready,
            preflight: true,
            fetched: true,
            launched: true,
            ..Known::new(model, spec, gpus)
        };
        self.insts.insert(instance, known);
        self.live.insert(instance);
    }

    fn told_gone(&mut self, instance: InstanceId) {
        if let Some(known) = self.insts.get_mut(&instance) {
            known.told = Told::Gone;
            (known.profiling, known.lost) = (false, false);
            self.live.remove(&instance);
            self.forced.remove(&known.model);
            if matches!(known.under_way, Some((Move::Start | Move::Wake | Move::Sleep, _))) {
                known.under_way = None;
            }
        }
    }

    fn move_done(&mut self, swap: SwapId, instance: InstanceId, done: &Done) {
        let Some(known) = self.insts.get_mut(&instance) else { return };
        let ended = match done {
            Done::Preflight(_) => Move::Preflight,
            Done::Fetch(_) => Move::Fetch,
            Done::Start(_) => Move::Start,
            Done::Stop(_) => Move::Stop,
            Done::Sleep(_) => Move::Sleep,
            Done::Wake(_) => Move::Wake,
        };
        if known.under_way != Some((ended, swap)) {
            return;
        }
        known.under_way = None;
        let failed = known.model.clone();
        match done {
            Done::Preflight(result) => known.preflight = result.is_ok(),
            Done::Fetch(result) => known.fetched = result.is_ok(),
            // It answers, whatever its runtime does.
            Done::Start(Ok(_)) | Done::Wake(Ok(_)) => {
                (known.told, known.lost) = (Told::Ready, false);
            }
            Done::Sleep(Ok(_)) => (known.told, known.lost) = (Told::Asleep, false),
            Done::Sleep(Err(_)) => known.told = Told::Ready,
            Done::Wake(Err(_)) => known.told = Told::Asleep,
            Done::Stop(Err(_)) if known.told != Told::Gone => known.told = Told::StopFailed,
            Done::Stop(_) | Done::Start(Err(_)) => known.told = Told::Gone,
        }
        if ended == Move::Start {
            known.profiling = false;
        }
        if known.told == Told::Gone {
            self.live.remove(&instance);
            self.forced.remove(&failed);
        }
        let fault = match done {
            Done::Preflight(Err(fault))
            | Done::Fetch(Err(fault))
            | Done::Start(Err(fault))
            | Done::Wake(Err(fault)) => Some(fault),
            _ => None,
        };
        if fault.is_some_and(|fault| fault.kind != FaultKind::Cancelled) {
            self.failed_models.insert(failed);
        }
    }

    pub fn after_event(&mut self, now: u64) {
        for (swap, instance) in std::mem::take(&mut self.leaving) {
            self.may_leave(swap, instance);
        }
        let stale = self.watches.iter().find(|swap| self.ended.contains(swap)).copied();
        self.require(stale.is_none(), || format!("memory is watched for {stale:?}, which ended"));
        if std::mem::take(&mut self.queue_changed) {
            self.check_queue(now);
        }
        self.check_due(now);
        self.check_asks(now);
        self.check_waits(now);
    }

    fn check_due(&mut self, now: u64) {
        if let Some(&(due, request)) = self.due.first()
            && due < now
        {
            let model = self.waiting[&request].model.clone();
            self.fail(format!("{request} for {model} still waits past queue.timeout ({due})"));
        }
    }

    fn check_queue(&mut self, now: u64) {
        let limit = self.catalog.settings.queue.limit as usize;
        let waits = self.waiting.len();
        self.require(waits <= limit, || format!("{waits} wait, queue.limit is {limit}"));
        let mut per_model: BTreeMap<&ModelName, u32> = BTreeMap::new();
        let mut wrong = None;
        for (request, waiting) in &self.waiting {
            let count = per_model.entry(&waiting.model).or_default();
            *count += 1;
            if *count > self.catalog.settings.queue.per_model {
                wrong = Some(format!("{count} wait for {}: over per_model", waiting.model));
            }
            wrong = wrong.or_else(|| self.undecidable(now, *request, waiting));
        }
        if let Some(wrong) = wrong {
            self.fail(wrong);
        }
    }

    /// Why this request must have been decided at once.
    fn undecidable(&self, now: u64, request: RequestId, waiting: &Waiting) -> Option<String> {
        let Some(spec) = self.catalog.model(&waiting.model) else {
            return Some(format!("{request} waits for {}, which is unknown", waiting.model));
        };
        if self.shutting_down {
            return Some(format!("{request} waits though all is shutting down"));
        }
        if waiting.at == now && fits(&self.catalog, &self.gpus, spec) == Some(false) {
            let fitting = self.ready(&waiting.model).is_some();
            return (!fitting)
                .then(|| format!("{request} waits for {}, which never fits", waiting.model));
        }
        (waiting.never_start && waiting.at == now && self.ready(&waiting.model).is_none())
            .then(|| format!("{request} waits though it must not start {}", waiting.model))
    }

    /// The instance of `model` that the scheduler was told is ready.
    fn ready(&self, model: &ModelName) -> Option<InstanceId> {
        let ready = |id: &&InstanceId| {
            let known = &self.insts[id];
            known.model == *model && known.told == Told::Ready && !known.lost
        };
        self.live.iter().find(ready).copied()
    }

    fn check_asks(&mut self, now: u64) {
        let late = self.asks.iter().find(|(_, asked)| asked.deadline < now && !asked.gone);
        if let Some((ask, asked)) = late {
            let message = format!("{ask} for {} got no answer by its deadline", asked.model);
            self.fail(message);
        }
    }

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
        for gpu in &view.gpus {
            let on = self.live.iter().filter(|id| self.insts[id].gpus.contains(&gpu.gpu)).count();
            let leaked = on == 0 && gpu.promised > Bytes::ZERO;
            self.require(!leaked, || {
                format!("nothing runs on GPU {}, but {} are promised", gpu.gpu, gpu.promised)
            });
        }
    }

    /// How many instances may be up at once.
    fn models_max(&self) -> Option<usize> {
        let swap = &self.catalog.settings.swap;
        match (swap.mode, swap.max_concurrent_models) {
            (SwapMode::SingleActive, _) => Some(1),
            (SwapMode::MultiActive, _) if self.gpus.is_empty() => Some(1),
            (SwapMode::MultiActive, 0) => None,
            (SwapMode::MultiActive, n) => Some(n as usize),
        }
    }
}

impl Known {
    pub fn wants_gpu(&self) -> bool {
        !self.spec.is_external() && self.spec.gpus != GpuRequest::None
    }

    pub fn new(model: &ModelName, spec: Arc<ModelSpec>, gpus: &[GpuId]) -> Known {
        Known {
            model: model.clone(),
            spec,
            gpus: gpus.to_vec(),
            told: Told::Preparing,
            footprint: None,
            under_way: None,
            preflight: false,
            fetched: false,
            open: false,
            closed_at: None,
            listed_at: None,
            last_for: None,
            launched: false,
            gamble: false,
            cancelled: false,
            lost: false,
            profiling: false,
            in_flight: 0,
        }
    }
}
