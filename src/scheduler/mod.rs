//! The rules: pure, deterministic, without IO.
//!
//! [`Scheduler::handle`] takes one event and appends what is to be done. After every event it
//! *settles*: deadlines first, then the swaps under way, then grants, then new decisions, until
//! nothing changes; last the gates follow. Nothing else has state, so what happens can be read
//! from the events alone, and replayed.
//!
//! | file | what it decides |
//! |---|---|
//! | `queue` | who may wait, in which order, for how long |
//! | `overload` | who is refused at arrival, as its turn would come too late |
//! | `ask`, `sleep` | ensure, load, unload, sleep, wake: one answer each |
//! | `stay` | how long a model stays that nobody pushes out: ttl, grace, pins, times of day |
//! | `turn`, `policy`, `baseline` | whose turn it is; who may be asked to leave |
//! | `preempt` | which starts are called off for a higher class |
//! | `bound` | who need not be planned for, where hundreds wait |
//! | `quiet` | which events leave everything else as it was |
//! | `groups` | who is loaded together, and who is never up beside whom |
//! | `placement` | on which GPUs, and who has to leave for it |
//! | `plan` | a dry run of all this |
//! | `footing` | which of equally good places leaves most room for others |
//! | `footprint` | what a model takes: as declared, then as measured |
//! | `memory`, `proof` | promises, samples; when a release counts as proven |
//! | `host_use` | what a model takes of the host's RAM: as declared, then as measured |
//! | `ram` | the same for host RAM, where the end of a process is the proof |
//! | `swap/` | the way of a swap, phase by phase |
//! | `gates` | when the gateway may serve by itself |
#![deny(clippy::wildcard_enum_match_arm)]

pub mod action;
mod ask;
mod attempt;
mod baseline;
mod bound;
mod cost;
pub mod event;
mod fingerprint;
mod footing;
mod footprint;
mod gates;
mod groups;
mod host_use;
mod invariants;
mod lifecycle;
mod memory;
mod overload;
mod placement;
pub mod plan;
mod policy;
mod preempt;
mod proof;
mod queue;
mod quiet;
mod ram;
pub mod record;
mod residency;
mod sleep;
mod stay;
mod swap;
mod table;
#[cfg(test)]
mod tests;
mod timers;
mod turn;
mod view;
mod waiters;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::baseline::Policy;
use crate::config::catalog::Catalog;
use crate::units::{AskId, Bytes, GpuId, InstanceId, ModelName, RequestId, SwapId, Time};
use action::Action;
use ask::Ask;
use event::Event;
use memory::Memory;
use queue::Model;
use quiet::{Standing, Touched};
use record::SchedulerView;
use residency::Instance;
use swap::Swap;
use table::Table;

/// More rounds than any settling needs; a bound against a rule that contradicts another.
const ROUNDS_MAX: usize = 64;

/// What the scheduler is told about the machine at its creation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct World {
    pub gpus: Vec<GpuInfo>,
    /// Memory can be read: releases must be proven. Else the end of the process is the proof.
    pub proof: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuInfo {
    pub id: GpuId,
    pub uuid: String,
    pub total: Bytes,
}

/// The next id of each kind: larger than any used before by this installation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextIds {
    pub instance: u64,
    pub swap: u64,
}

/// Why `next_wake` wants to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WakeCause {
    MaxWait,
    QueueTimeout,
    RuntimeWait,
    DrainDeadline,
    VramDeadline,
    StartDeadline,
    AskDeadline,
    EnsureHold,
    MinResidency,
    RetryAt,
    Linger,
    Ttl,
    Restore,
}

#[derive(Clone, Debug)]
pub struct Scheduler {
    catalog: Arc<Catalog>,
    world: World,
    policy: Policy,
    now: Time,
    next_ids: NextIds,
    models: BTreeMap<ModelName, Model>,
    instances: Table<InstanceId, Instance>,
    /// By model: those that make it ready.
    swaps: Table<SwapId, Swap>,
    /// Whose queue each waiting request is in.
    waiting: BTreeMap<RequestId, ModelName>,
    asks: BTreeMap<AskId, Ask>,
    memory: Memory,
    /// Why a model that waits for room does not get any yet, in words.
    blocked: BTreeMap<ModelName, String>,
    /// Models to be loaded for the sake of their group, and which.
    company: BTreeMap<ModelName, String>,
    /// When somebody last wanted anything: restores wait for quiet.
    last_demand: Time,
    shutting_down: bool,
    /// Why the runtime of lost instances does not answer, as told last.
    runtime_fault: String,
    /// A reload (or the host) left less to promise than was promised already.
    capacity_cut: bool,
    /// A reload set models apart that were up together: it stops neither.
    apart_cut: bool,
    /// Counts changes of state, so that settling knows when it is done.
    changes: u64,
    /// Of these, what bears on decisions (see `quiet`).
    room: u64,
    standing: Standing,
    touched: Touched,
    out: Vec<Action>,
}

impl Scheduler {
    /// Ids of instances and swaps count up from `next_ids`, each by itself.
    pub fn new(catalog: Arc<Catalog>, world: World, next_ids: NextIds) -> Scheduler {
        let models = catalog.models.keys().map(|name| (name.clone(), Model::default())).collect();
        Scheduler {
            catalog,
            world,
            policy: Policy::default(),
            now: Time::ZERO,
            next_ids,
            models,
            instances: Table::default(),
            swaps: Table::default(),
            waiting: BTreeMap::new(),
            asks: BTreeMap::new(),
            memory: Memory::default(),
            blocked: BTreeMap::new(),
            company: BTreeMap::new(),
            last_demand: Time::ZERO,
            shutting_down: false,
            runtime_fault: String::new(),
            capacity_cut: false,
            apart_cut: false,
            changes: 0,
            room: 1,
            standing: Standing::default(),
            touched: Touched::default(),
            out: Vec::new(),
        }
    }

    /// Takes one event and appends what is to be done, in order. `now` never runs backwards.
    pub fn handle(&mut self, now: Time, event: Event, out: &mut Vec<Action>) {
        self.now = self.now.max(now);
        if self.is_due() {
            self.changed();
        }
        self.take_in(event);
        if !self.settle_quietly() {
            self.settle();
        }
        out.append(&mut self.out);
        if cfg!(debug_assertions)
            && let Err(broken) = self.check_invariants()
        {
            panic!("invariant broken: {broken}");
        }
    }

    fn take_in(&mut self, event: Event) {
        if !event.is_of_a_request() {
            self.changed();
        }
        match event {
            Event::RequestArrived(request) => self.arrived(request),
            Event::RequestGone { request } => self.gone(request),
            Event::GateSeen { instance, gate } => self.gate_seen(instance, gate),
            Event::EnsureAsked { ask, model, kind, deadline } => {
                self.ensure_asked(ask, model, kind, deadline);
            }
            Event::AskGone { ask } => self.ask_gone(ask),
            Event::UnloadAsked { ask, model, force } => self.unload_asked(ask, model, force),
            Event::SleepAsked { ask, model } => self.sleep_asked(ask, model),
            Event::ExtendAsked { ask, model, by } => self.extend_asked(ask, &model, by),
            Event::PinAsked { ask, model, pinned } => self.pin_asked(ask, &model, pinned),
            Event::TtlUntil { model, until } => self.ttl_until(&model, until),
            Event::KeepChanged { model, kept } => self.keep_changed(&model, kept),
            Event::CompanyAsked { group } => {
                self.last_demand = self.now;
                self.company_asked(&group);
            }
            Event::MoveDone { swap, instance, done } => self.move_done(swap, instance, done),
            Event::Vouching { swap, instance } => self.vouching(swap, instance),
            Event::MemorySeen(result) => self.memory_seen(result),
            Event::InstanceDied { instance, fault } => self.died(instance, fault),
            Event::Adopted { instance, model, gpus, footprint } => {
                self.adopted(instance, &model, gpus, footprint);
            }
            Event::Stray { instance, model, gpus, footprint, why } => {
                self.stray(instance, &model, gpus, footprint, why);
            }
            Event::Remembered { model, learned } => {
                if let Some(state) = self.models.get_mut(&model) {
                    state.learned = learned;
                }
                self.standing.fit.clear();
            }
            Event::CatalogChanged(catalog) => {
                self.catalog_changed(catalog);
                self.note_capacity_cut();
                self.apart_cut |= self.up_against_a_rule().is_some();
            }
            Event::RuntimeLost { instances, why } => self.runtime_lost(&instances, why),
            Event::RuntimeBack { alive, dead } => self.runtime_back(&alive, &dead),
            Event::ShuttingDown => self.shut_down(),
            Event::Woke => {}
        }
    }

    fn settle(&mut self) {
        let mut settled = self.standing.room;
        for _ in 0..ROUNDS_MAX {
            let before = self.changes;
            self.expire();
            self.answer_rescued();
            self.answer_asleep();
            self.begin_unloads();
            self.emit_wanted_stops();
            self.advance_swaps();
            self.grant_waiting();
            if self.must_look(settled) {
                settled = self.room;
                self.choose();
            }
            if self.changes == before {
                break;
            }
        }
        self.sync_gates();
        self.take_standing();
    }

    /// Everything whose time has come.
    fn expire(&mut self) {
        self.expire_moves();
        self.expire_releases();
        self.expire_failures();
        self.retry_stops();
        self.expire_waiters();
        self.expire_lost();
        self.expire_asks();
        self.expire_holds();
        self.forget_company();
        self.renew_claims();
    }

    /// When `Event::Woke` is due next, and why.
    pub fn next_wake(&self) -> Option<(Time, WakeCause)> {
        self.standing.due
    }

    /// As it is at `now`, which no event need have told yet.
    pub fn view(&self, now: Time) -> SchedulerView {
        if now <= self.now {
            return self.build_view();
        }
        self.clone().view_in_passing(now)
    }

    /// The same for its owner, without a copy of everything. Leaves no trace: what is decided
    /// depends on events alone.
    pub fn view_in_passing(&mut self, now: Time) -> SchedulerView {
        let told = self.now;
        self.now = told.max(now);
        let view = self.build_view();
        self.now = told;
        view
    }

    /// The instance that is (or becomes) the model's, not one that is on its way out.
    fn current(&self, model: &ModelName) -> Option<&Instance> {
        self.instances.of(model).find(|i| !i.is_stopping())
    }

    fn note_capacity_cut(&mut self) {
        self.standing.fit.clear();
        let over = |g: &GpuInfo| self.promised(g.id) > self.capacity(g.id);
        self.capacity_cut |= self.world.gpus.iter().any(over)
            || self.ram_capacity().is_some_and(|capacity| self.ram_promised() > capacity);
    }

    fn take_instance_id(&mut self) -> InstanceId {
        let id = InstanceId(self.next_ids.instance);
        self.next_ids.instance += 1;
        id
    }

    fn take_swap_id(&mut self) -> SwapId {
        let id = SwapId(self.next_ids.swap);
        self.next_ids.swap += 1;
        id
    }

    fn emit(&mut self, action: Action) {
        self.out.push(action);
    }
}
