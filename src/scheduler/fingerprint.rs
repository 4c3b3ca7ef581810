//! A digest of the state, for a search that must know whether it was here before.
//!
//! Times count as distances from now, ids by the order in which they are met, texts for people not
//! at all: so two states with one digest behave alike, but for what lies below the grain. Every
//! list below names all fields of its type: a new one does not compile until somebody has said
//! whether it is state (`counts`) or can be computed from, or says in words, what is (`skips`).

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Write};
use std::hash::Hasher;
use std::time::Duration;

use super::Scheduler;
use super::ask::{Ask, AskKind};
use super::baseline::Policy;
use super::event::{
    Fault, GateCount, GpuMemory, Holder, HostMemory, HostUse, Learned, MemorySample, NoProof,
    Request,
};
use super::memory::Memory;
use super::overload::Service;
use super::placement::Victim;
use super::queue::{Failure, Model};
use super::record::{Eviction, Phase, SwapCause, SwapKind};
use super::residency::{Drain, GateState, Hold, Instance, Move, MoveKind, Release, Residency};
use super::stay::Stay;
use super::swap::Swap;
use super::turn::Claim;
use super::waiters::{Queue, Waiter};
use crate::units::{AskId, Bytes, GpuId, InstanceId, ModelName, Priority, RequestId, SwapId, Time};

impl Scheduler {
    /// Two states that will act alike have the same. Times that differ by less than `grain` are
    /// one. What a reload can change (the catalog) is not part of it, nor are the next ids.
    pub fn fingerprint(&self, grain: Duration) -> u64 {
        let grain = u64::try_from(grain.as_millis()).unwrap_or(u64::MAX).max(1);
        let mut digest =
            Digest { hasher: DefaultHasher::new(), now: self.now, grain, met: Default::default() };
        self.counts(&mut digest);
        // The grain must not hide whether a sample is newer than the last change.
        for gpu in &self.world.gpus {
            self.fresh_free(gpu.id).is_some().counts(&mut digest);
        }
        digest.hasher.finish()
    }
}

impl Counts for Queue {
    fn counts(&self, to: &mut Digest) {
        self.iter().for_each(|waiter| waiter.counts(to));
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Instance,
    Swap,
    Request,
    Ask,
    Process,
}

struct Digest {
    hasher: DefaultHasher,
    now: Time,
    grain: u64,
    /// Ids of each kind, in the order in which they were met.
    met: [BTreeMap<u64, u64>; 5],
}

impl Digest {
    fn number(&mut self, number: u64) {
        self.hasher.write_u64(number);
    }

    fn id(&mut self, kind: Kind, id: u64) {
        let met = &mut self.met[kind as usize];
        let next = met.len() as u64;
        let renamed = *met.entry(id).or_insert(next);
        self.number(renamed);
    }

    /// Of an enum without times and ids.
    fn word(&mut self, word: &dyn Debug) {
        // Writing into a hasher cannot fail.
        let _ = write!(self, "{word:?};");
    }
}

impl Write for Digest {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.hasher.write(text.as_bytes());
        Ok(())
    }
}

trait Counts {
    fn counts(&self, to: &mut Digest);
}

impl Counts for Time {
    fn counts(&self, to: &mut Digest) {
        let ahead = self.0 > to.now.0;
        let apart = self.0.abs_diff(to.now.0);
        match *self {
            // Never, or not yet.
            Time::ZERO | Time::MAX => to.number(u64::MAX),
            _ => to.number((apart + to.grain / 2) / to.grain * 2 + u64::from(ahead)),
        }
    }
}

impl Counts for Duration {
    fn counts(&self, to: &mut Digest) {
        let ms = u64::try_from(self.as_millis()).unwrap_or(u64::MAX);
        to.number(ms.saturating_add(to.grain / 2) / to.grain);
    }
}

impl<T: Counts> Counts for Option<T> {
    fn counts(&self, to: &mut Digest) {
        to.number(u64::from(self.is_some()));
        if let Some(some) = self {
            some.counts(to);
        }
    }
}

impl<T: Counts> Counts for Vec<T> {
    fn counts(&self, to: &mut Digest) {
        to.number(self.len() as u64);
        for one in self {
            one.counts(to);
        }
    }
}

impl<K: Counts, V: Counts> Counts for BTreeMap<K, V> {
    fn counts(&self, to: &mut Digest) {
        to.number(self.len() as u64);
        for (key, value) in self {
            key.counts(to);
            value.counts(to);
        }
    }
}

impl Counts for ModelName {
    fn counts(&self, to: &mut Digest) {
        to.word(&self.as_str());
    }
}

/// Names of groups; texts for people are skipped.
impl Counts for String {
    fn counts(&self, to: &mut Digest) {
        to.word(self);
    }
}

/// Process ids.
impl Counts for BTreeSet<u32> {
    fn counts(&self, to: &mut Digest) {
        to.number(self.len() as u64);
        for &pid in self {
            to.id(Kind::Process, u64::from(pid));
        }
    }
}

impl Counts for AskKind {
    fn counts(&self, to: &mut Digest) {
        match self {
            AskKind::Ready(kind) => to.word(kind),
            AskKind::Gone { instance } => {
                to.word(&"gone");
                instance.counts(to);
            }
            AskKind::Asleep { instance } => {
                to.word(&"asleep");
                instance.counts(to);
            }
        }
    }
}

impl Counts for Fault {
    fn counts(&self, to: &mut Digest) {
        to.word(&self.kind);
    }
}

/// There is none: why is for people.
impl Counts for NoProof {
    fn counts(&self, _: &mut Digest) {}
}

macro_rules! numbers {
    ($($type:ty: $one:ident => $number:expr),* $(,)?) => {
        $(impl Counts for $type {
            fn counts(&self, to: &mut Digest) {
                let $one = *self;
                to.number($number);
            }
        })*
    };
}

macro_rules! ids {
    ($($type:ty => $kind:ident),* $(,)?) => {
        $(impl Counts for $type {
            fn counts(&self, to: &mut Digest) {
                to.id(Kind::$kind, self.0);
            }
        })*
    };
}

macro_rules! words {
    ($($type:ty),* $(,)?) => {
        $(impl Counts for $type {
            fn counts(&self, to: &mut Digest) {
                to.word(self);
            }
        })*
    };
}

/// All fields of a type: those that count, and those that do not.
macro_rules! fields {
    ($($type:ident { $($field:ident),* $(,)? } skips { $($skipped:ident),* $(,)? })*) => {
        $(impl Counts for $type {
            fn counts(&self, to: &mut Digest) {
                let $type { $($field,)* $($skipped: _,)* } = self;
                $($field.counts(to);)*
            }
        })*
    };
}

numbers! {
    bool: one => u64::from(one),
    u8: one => u64::from(one),
    u32: one => u64::from(one),
    u64: one => one,
    Bytes: one => one.0,
    GpuId: one => u64::from(one.0),
}

ids! { InstanceId => Instance, SwapId => Swap, RequestId => Request, AskId => Ask }

words! { Policy, Phase, SwapCause, SwapKind, MoveKind, Residency, Priority }

fields! {
    Scheduler {
        models, instances, swaps, asks, memory, company, last_demand, shutting_down, capacity_cut,
        apart_cut, policy,
    } skips { waiting, room, standing, touched, catalog, world, now, next_ids, blocked, runtime_fault, changes, out }

    Model {
        queue, learned, service, failure, failures, deaths, unloaded, stay, kept_from, gap, since,
        called_off, claim, visit,
    } skips {}
    Service { held_ms, ended } skips {}
    Claim { since, due } skips {}
    Waiter { request, enqueued, overdue_from } skips {}
    Request { id, model, priority, max_wait, may_hurry, never_start, attempt, arrived } skips {}
    Failure { retry_at } skips { fault, refusal }
    Learned {
        footprint, asleep, seasoned, ram_held, ram_resident, start, stop, sleep, wake,
    } skips { phases }
    Stay { pinned, kept } skips {}

    Instance {
        id, model, gpus, promise, residue, weights, residency, since, moving, stop_wanted, release,
        trouble, stopped_by, stop_retry, stop_tries, gate, ready_at, launched, unvouched, awake,
        served, drain, hold, unload, sleep_wanted, ttl_until, adopted, pids, measured, ram_own,
        slept,
    } skips { spec }
    Move { kind, swap, since, deadline } skips {}
    GateState { open, permits, unconfirmed, watched, count, counted_at } skips {}
    GateCount { in_flight, granted, last_used } skips {}
    Drain { swap, deadline, notice, cancelled_at } skips {}
    Release { since, keep, keep_guessed, free_before, began } skips {}
    Hold { until, ended_before } skips {}

    Swap {
        id, model, kind, cause, instance, gpus, victims, evicted, evicted_before, phase, since,
        planned, placed, urgent, started, vacated, retried, rethought, memory_wait, watching, death,
        instead_of,
    } skips { decision, began, phases }
    Victim { instance, asleep, busy } skips { why }
    Eviction { model, instance } skips { why }
    Ask { model, kind, deadline } skips {}

    Memory {
        sample, no_proof, changed_at, changed_last, host_total, host_freed, host_others, unlisted,
    } skips {}
    MemorySample { taken_at, gpus, host, ram } skips {}
    HostUse { held, resident } skips {}
    GpuMemory { gpu, total, free, holders } skips { uuid }
    HostMemory { total, available } skips {}
    Holder { pid, bytes, instance } skips { label }
}
