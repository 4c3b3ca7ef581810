//! What callers must see: a reference that shares nothing with the scheduler but its events and
//! actions, and looks at the machine as it really is.

mod actions;
mod asks;
mod called_off;
mod groups;
mod host;
mod known;
mod memory;
mod moves;
mod queue;
mod refusals;
mod rest;
mod stay;
mod swaps;
mod waits;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use wharf::config::catalog::Catalog;
use wharf::scheduler::event::{Event, HostMemory};
use wharf::scheduler::record::SwapRecord;
use wharf::units::{AskId, Bytes, InstanceId, ModelName, RequestId, SwapId};

use crate::scenario::Scenario;
use asks::{Asked, Wish};
use known::{Known, Move, Told};
use queue::Waiting;

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
    /// Models whose start was called off for a higher class, and that were not ready since.
    called_off: BTreeSet<ModelName>,
    /// Operators' pins; `None`: forgotten, or not.
    pins: BTreeMap<ModelName, Option<bool>>,
    /// Models whose keep window is open.
    kept: BTreeSet<ModelName>,
    /// Strangers' bytes in the newest sample that was told, per GPU.
    foreign_seen: Vec<Bytes>,
    sampled_at: u64,
    /// Host RAM in the newest sample that was told.
    host_seen: Option<HostMemory>,
    /// Something was there before the scheduler.
    adopts: bool,
    no_proof: bool,
    ever_lost: bool,
    shutting_down: bool,
    stalled: BTreeMap<ModelName, u64>,
    bounds: BTreeMap<ModelName, waits::Bound>,
    longest: BTreeMap<ModelName, refusals::Longest>,
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
    pub called_off: u64,
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
            called_off: BTreeSet::new(),
            pins: BTreeMap::new(),
            kept: BTreeSet::new(),
            foreign_seen: scenario.gpus.iter().map(crate::machine::Gpu::foreign_bytes).collect(),
            sampled_at: 0,
            host_seen: None,
            adopts: !scenario.adopted.is_empty(),
            no_proof: false,
            ever_lost: false,
            shutting_down: false,
            stalled: BTreeMap::new(),
            bounds: waits::bounds(scenario),
            longest: refusals::longest(scenario),
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
                    known.last_used = gate.last_used.0;
                }
            }
            Event::EnsureAsked { ask, model, kind, deadline } => {
                let deadline = deadline.0.max(now);
                self.asked(*ask, model, Wish::Ready(*kind), deadline);
            }
            Event::UnloadAsked { ask, model, force } => {
                self.asked(*ask, model, Wish::Gone, u64::MAX);
                if *force {
                    self.forced.insert(model.clone());
                }
            }
            Event::SleepAsked { ask, model } => {
                self.asked(*ask, model, Wish::Asleep, u64::MAX);
            }
            Event::ExtendAsked { ask, model, .. } => {
                self.asked(*ask, model, Wish::Extended, u64::MAX);
            }
            Event::PinAsked { ask, model, pinned } => {
                self.asked(*ask, model, Wish::Pinned(*pinned), u64::MAX);
                if self.catalog.model(model).is_some() {
                    self.pin(model, *pinned);
                }
            }
            Event::KeepChanged { model, kept: true } if self.catalog.model(model).is_some() => {
                self.kept.insert(model.clone());
            }
            Event::KeepChanged { model, .. } => {
                self.kept.remove(model);
            }
            Event::TtlUntil { .. } => {}
            Event::AskGone { ask } => {
                if let Some(asked) = self.asks.get_mut(ask) {
                    asked.gone = true;
                }
            }
            Event::MoveDone { swap, instance, done } => {
                let told = |checker: &Self| checker.insts.get(instance).map(|known| known.told);
                let before = told(self);
                self.move_done(*swap, *instance, done);
                let came_up = before != told(self) && told(self) == Some(Told::Ready);
                let up = self.insts.get_mut(instance).filter(|_| came_up);
                if let Some(known) = up {
                    known.ready_at = now;
                    self.called_off.remove(&known.model);
                }
            }
            Event::Vouching { instance, .. } => {
                if let Some(known) = self.insts.get_mut(instance) {
                    known.profiling = false;
                }
            }
            Event::MemorySeen(Ok(sample)) => self.sampled(sample),
            Event::MemorySeen(Err(_)) => self.no_proof = true,
            Event::InstanceDied { instance, .. } => {
                self.told_dead(*instance);
            }
            Event::Adopted { instance, model, gpus, footprint } => {
                self.adopted(now, *instance, model, gpus, *footprint);
            }
            Event::Stray { .. } => {}
            Event::CatalogChanged(catalog) => {
                self.catalog = Arc::clone(catalog);
                self.forget_removed();
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
                // Whoever went down with its runtime died like any other.
                dead.iter().for_each(|&instance| self.told_dead(instance));
            }
            Event::ShuttingDown => (self.shutting_down, self.queue_changed) = (true, true),
            Event::Remembered { .. } | Event::CompanyAsked { .. } | Event::Woke => {}
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
}
