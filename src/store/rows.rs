//! What the store holds in memory: the newest rows of each kind, everything that is kept by name,
//! and how much of it is on disk. The keeper's thread writes what is not.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use tokio::sync::oneshot;

use super::{Activity, StoreFault, SwapRow};
use crate::units::{ModelName, SwapId};

const ACTIVITY_MAX: usize = 5_000;
const SWAPS_MAX: usize = 1_000;
/// Rows of one transaction.
const BATCH_MAX: usize = 1_000;
/// Changes and reads that wait for the disk.
const JOBS_MAX: usize = 64;

/// What is kept by name: one JSON text each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Registered,
    Patch,
    TtlUntil,
    Learned,
    Totals,
    Door,
}

impl Kind {
    const ALL: [Kind; 6] =
        [Kind::Registered, Kind::Patch, Kind::TtlUntil, Kind::Learned, Kind::Totals, Kind::Door];

    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Registered => "registered",
            Kind::Patch => "patch",
            Kind::TtlUntil => "ttl_until_unix_ms",
            Kind::Learned => "learned",
            Kind::Totals => "totals",
            Kind::Door => "door",
        }
    }

    pub fn parse(text: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.as_str() == text)
    }
}

pub type Key = (Kind, String);
/// `None`: gone.
pub type Entry = (Key, Option<String>);

/// A change that is answered once it is on disk.
#[derive(Clone, Debug)]
pub enum Change {
    Put(Key, String),
    Delete(Key),
    /// All of this kind.
    Replace(Kind, BTreeMap<String, String>),
    Both(Box<Change>, Box<Change>),
}

pub type Ack<T> = oneshot::Sender<Result<T, StoreFault>>;

#[derive(Debug)]
pub enum Job {
    Change(Change, Ack<()>),
    /// Swaps below a row number, the newest first.
    SwapsBelow {
        below: u64,
        model: Option<ModelName>,
        limit: usize,
        reply: oneshot::Sender<Vec<SwapRow>>,
    },
    /// A swap and its row number.
    Swap {
        id: SwapId,
        reply: oneshot::Sender<Option<(u64, SwapRow)>>,
    },
}

/// Where rows go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// Nothing is to be kept.
    #[default]
    Memory,
    Disk,
    /// The file cannot be used, and why.
    Fault(String),
}

/// Rows numbered in the order in which they came. The oldest go first, on disk or not.
#[derive(Debug)]
pub struct Ring<T> {
    rows: VecDeque<(u64, T)>,
    max: usize,
    last: u64,
    /// Up to here they are on disk.
    written: u64,
    /// That left before they were.
    pub dropped: u64,
}

impl<T: Clone> Ring<T> {
    fn new(max: usize) -> Ring<T> {
        Ring { rows: VecDeque::new(), max, last: 0, written: 0, dropped: 0 }
    }

    fn push(&mut self, row: impl FnOnce(u64) -> T, is_kept: bool) -> u64 {
        self.last += 1;
        self.rows.push_back((self.last, row(self.last)));
        while self.rows.len() > self.max {
            let gone = self.rows.pop_front();
            self.dropped += u64::from(is_kept && gone.is_some_and(|(id, _)| id > self.written));
        }
        self.last
    }

    /// The newest first.
    pub fn newest(&self) -> impl Iterator<Item = &(u64, T)> {
        self.rows.iter().rev()
    }

    /// Everything from here on is in memory.
    pub fn first(&self) -> u64 {
        self.rows.front().map_or(self.last + 1, |(id, _)| *id)
    }

    fn unwritten(&self) -> Vec<(u64, T)> {
        let from = self.rows.partition_point(|(id, _)| *id <= self.written);
        self.rows.range(from..).take(BATCH_MAX).cloned().collect()
    }

    fn has_unwritten(&self) -> bool {
        self.last > self.written && self.rows.back().is_some_and(|(id, _)| *id > self.written)
    }

    fn was_written(&mut self, rows: &[(u64, T)]) {
        if let Some((id, _)) = rows.last() {
            self.written = self.written.max(*id);
        }
    }

    /// `found`: the newest rows of the file, oldest first; `last`: the largest number it ever held.
    fn merge(&mut self, found: Vec<(u64, T)>, last: u64) {
        let first = self.rows.front().map_or(u64::MAX, |(id, _)| *id);
        for row in found.into_iter().rev().filter(|(id, _)| *id < first) {
            if self.rows.len() >= self.max {
                break;
            }
            self.rows.push_front(row);
        }
        self.last = self.last.max(last);
        self.written = last;
    }

    /// The file could not be read (or not for sure all of it): numbers that it may hold are passed
    /// over, as no file holds a row for each millisecond since 1970.
    fn skip_to(&mut self, id: u64) {
        self.last = self.last.max(id);
    }
}

/// What a file held when it was opened.
#[derive(Debug, Default)]
pub struct Loaded {
    pub kept: BTreeMap<Key, String>,
    pub activity: Vec<(u64, Activity)>,
    pub swaps: Vec<(u64, SwapRow)>,
    /// The largest numbers that rows ever had.
    pub last_activity: u64,
    pub last_swap: u64,
    /// It was made just now.
    pub is_new: bool,
}

/// Written in one transaction.
#[derive(Debug, Default)]
pub struct Batch {
    pub activity: Vec<(u64, Activity)>,
    pub swaps: Vec<(u64, SwapRow)>,
    pub entries: Vec<Entry>,
    /// Of them, those that take effect when they are on disk.
    pub change: Option<(Vec<Entry>, Ack<()>)>,
    pub reads: Vec<Job>,
    flushes: Vec<Ack<()>>,
    /// Nothing older is left to write.
    pub is_all: bool,
}

#[derive(Debug)]
pub struct Rows {
    pub activity: Ring<Activity>,
    pub swaps: Ring<SwapRow>,
    pub kept: BTreeMap<Key, String>,
    dirty: BTreeSet<Key>,
    jobs: VecDeque<Job>,
    flushes: Vec<(u64, u64, Ack<()>)>,
    pub place: Place,
    /// Since when the disk works on a transaction.
    pub busy_since: Option<Instant>,
    pub closing: bool,
}

impl Default for Rows {
    fn default() -> Rows {
        Rows {
            activity: Ring::new(ACTIVITY_MAX),
            swaps: Ring::new(SWAPS_MAX),
            kept: BTreeMap::new(),
            dirty: BTreeSet::new(),
            jobs: VecDeque::new(),
            flushes: Vec::new(),
            place: Place::Memory,
            busy_since: None,
            closing: false,
        }
    }
}

fn too_much() -> StoreFault {
    StoreFault("too much waits for its disk: try again later".to_owned())
}

impl Rows {
    pub const LOADED_MAX: (usize, usize) = (ACTIVITY_MAX, SWAPS_MAX);

    fn is_kept(&self) -> bool {
        self.place != Place::Memory
    }

    pub fn push_activity(&mut self, mut row: Activity) -> u64 {
        let numbered = |id| {
            row.id = id;
            row
        };
        self.activity.push(numbered, self.place != Place::Memory)
    }

    pub fn push_swap(&mut self, row: SwapRow) {
        self.swaps.push(|_| row, self.place != Place::Memory);
    }

    /// In force at once, and on disk soon.
    pub fn set(&mut self, key: Key, body: Option<String>) {
        if self.kept.get(&key) == body.as_ref() {
            return;
        }
        if self.is_kept() {
            self.dirty.insert(key.clone());
        }
        self.apply([(key, body)]);
    }

    fn apply(&mut self, entries: impl IntoIterator<Item = Entry>) {
        for (key, body) in entries {
            match body {
                Some(body) => self.kept.insert(key, body),
                None => self.kept.remove(&key),
            };
        }
    }

    fn entries_of(&self, change: Change) -> Vec<Entry> {
        match change {
            Change::Put(key, body) => vec![(key, Some(body))],
            Change::Delete(key) => vec![(key, None)],
            Change::Both(one, other) => {
                let mut entries = self.entries_of(*one);
                entries.extend(self.entries_of(*other));
                entries
            }
            Change::Replace(kind, wanted) => {
                let gone =
                    self.kept.keys().filter(|(k, name)| *k == kind && !wanted.contains_key(name));
                let gone: Vec<Entry> = gone.map(|key| (key.clone(), None)).collect();
                let wanted = wanted.into_iter().map(|(name, body)| ((kind, name), Some(body)));
                gone.into_iter().chain(wanted).collect()
            }
        }
    }

    /// `Ok`: it waits for its turn, or is done (nothing is kept).
    pub fn submit(&mut self, job: Job) -> Result<(), StoreFault> {
        match (&self.place, job) {
            (Place::Memory, Job::Change(change, ack)) => {
                let entries = self.entries_of(change);
                self.apply(entries);
                // Whoever left does not need it.
                let _ = ack.send(Ok(()));
            }
            // A reader finds that its reply was dropped.
            (Place::Memory | Place::Fault(_), Job::SwapsBelow { .. } | Job::Swap { .. }) => {}
            (Place::Fault(why), Job::Change(..)) => return Err(StoreFault(why.clone())),
            (Place::Disk, _) if self.jobs.len() >= JOBS_MAX => {
                return Err(too_much());
            }
            (Place::Disk, job) => self.jobs.push_back(job),
        }
        Ok(())
    }

    /// Answers when everything that is here now is on disk.
    pub fn flush(&mut self, ack: Ack<()>) {
        match &self.place {
            Place::Memory => drop(ack.send(Ok(()))),
            Place::Fault(why) => drop(ack.send(Err(StoreFault(why.clone())))),
            Place::Disk if self.flushes.len() >= JOBS_MAX => drop(ack.send(Err(too_much()))),
            Place::Disk => self.flushes.push((self.activity.last, self.swaps.last, ack)),
        }
    }

    /// Somebody waits for it.
    pub fn is_urgent(&self) -> bool {
        !self.jobs.is_empty() || !self.flushes.is_empty()
    }

    pub fn has_work(&self) -> bool {
        self.is_urgent()
            || !self.dirty.is_empty()
            || self.activity.has_unwritten()
            || self.swaps.has_unwritten()
    }

    pub fn take_batch(&mut self) -> Batch {
        let (activity, swaps) = (self.activity.unwritten(), self.swaps.unwritten());
        let dirty = std::mem::take(&mut self.dirty);
        let entries =
            dirty.into_iter().map(|key| (key.clone(), self.kept.get(&key).cloned())).collect();
        let (mut change, mut reads) = (None, Vec::new());
        while let Some(job) = self.jobs.pop_front() {
            match job {
                // Who asked was told that it could not be kept.
                Job::Change(_, ack) if ack.is_closed() => {}
                // What the next one replaces is known once this one is in force.
                Job::Change(..) if change.is_some() => {
                    self.jobs.push_front(job);
                    break;
                }
                Job::Change(wanted, ack) => change = Some((self.entries_of(wanted), ack)),
                read => reads.push(read),
            }
        }
        let is_all = activity.len() < BATCH_MAX && swaps.len() < BATCH_MAX;
        let reached = (
            activity.last().map_or(self.activity.written, |(id, _)| *id),
            swaps.last().map_or(self.swaps.written, |(id, _)| *id),
        );
        let done = |(activity, swap, _): &mut (u64, u64, Ack<()>)| {
            is_all || *activity <= reached.0 && *swap <= reached.1
        };
        let flushes = self.flushes.extract_if(.., done).map(|(_, _, ack)| ack).collect();
        Batch { activity, swaps, entries, change, reads, flushes, is_all }
    }

    /// It is on disk.
    pub fn committed(&mut self, batch: Batch) {
        self.activity.was_written(&batch.activity);
        self.swaps.was_written(&batch.swaps);
        let mut acks = batch.flushes;
        if let Some((entries, ack)) = batch.change {
            self.apply(entries);
            acks.push(ack);
        }
        // Whoever left does not need it.
        acks.into_iter().for_each(|ack| drop(ack.send(Ok(()))));
    }

    /// It is not; what was to be in force only on disk is refused.
    pub fn failed(&mut self, batch: Batch, why: &str) {
        self.dirty.extend(batch.entries.into_iter().map(|(key, _)| key));
        let refused = batch.flushes.into_iter().chain(batch.change.map(|(_, ack)| ack));
        refused.for_each(|ack| drop(ack.send(Err(StoreFault(why.to_owned())))));
    }

    /// The file cannot be used from now on: whoever waits for it hears so.
    pub fn out(&mut self, why: &str) {
        self.place = Place::Fault(why.to_owned());
        let waiting = self.flushes.drain(..).map(|(_, _, ack)| ack);
        let changes = self.jobs.drain(..).filter_map(|job| match job {
            Job::Change(_, ack) => Some(ack),
            Job::SwapsBelow { .. } | Job::Swap { .. } => None,
        });
        waiting.chain(changes).for_each(|ack| drop(ack.send(Err(StoreFault(why.to_owned())))));
    }

    /// A file was opened. What changed in memory meanwhile is newer than what it says; a new file
    /// gets everything.
    pub fn merge(&mut self, loaded: Loaded) {
        if loaded.is_new {
            self.dirty.extend(self.kept.keys().cloned());
        } else {
            self.kept.retain(|key, _| self.dirty.contains(key));
        }
        for (key, body) in loaded.kept {
            if !self.dirty.contains(&key) {
                self.kept.insert(key, body);
            }
        }
        self.activity.merge(loaded.activity, loaded.last_activity);
        self.swaps.merge(loaded.swaps, loaded.last_swap);
    }

    /// As [`Ring::skip_to`].
    pub fn skip_ids_to(&mut self, id: u64) {
        self.activity.skip_to(id);
        self.swaps.skip_to(id);
    }
}
