//! The rules: pure, deterministic, without IO.

pub mod action;
pub mod event;
pub mod record;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::catalog::Catalog;
use crate::units::{Bytes, GpuId, Time};
use action::Action;
use event::Event;
use record::SchedulerView;

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

/// Why `next_wake` wants to be woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WakeCause {
    MaxWait,
    QueueTimeout,
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

#[derive(Debug)]
pub struct Scheduler {
    catalog: Arc<Catalog>,
}

impl Scheduler {
    /// Ids of instances and swaps count up from `first_id`, which must be larger than any used
    /// before by this installation.
    pub fn new(catalog: Arc<Catalog>, _world: World, _first_id: u64) -> Scheduler {
        Scheduler { catalog }
    }

    pub fn handle(&mut self, _now: Time, event: Event, _out: &mut Vec<Action>) {
        if let Event::CatalogChanged(catalog) = event {
            self.catalog = catalog;
        }
    }

    /// When `Event::Woke` is due next, and why.
    pub fn next_wake(&self) -> Option<(Time, WakeCause)> {
        None
    }

    pub fn view(&self, _now: Time) -> SchedulerView {
        SchedulerView::default()
    }
}
