//! One model's queue, with the sums that decisions ask for: nothing walks a queue to be ranked.
//!
//! Every change goes through [`Queue`], which keeps each sum and order beside the waiters
//! themselves; `check` says whether they still agree.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::event::Request;
use crate::units::{Priority, RequestId, Time};

/// Head start of one priority class over the next within a model's queue: bounded, so that a
/// stream of urgent requests cannot starve the others.
const CLASS_HEAD_START: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub(super) struct Waiter {
    pub request: Request,
    pub enqueued: Time,
    /// From here `max_wait` counts: the arrival, or the end of the tenure that left it behind.
    pub overdue_from: Time,
}

type Place = (Time, RequestId);

impl Waiter {
    pub fn order(&self) -> Place {
        let handicap = match self.request.priority {
            Priority::High => Duration::ZERO,
            Priority::Normal => CLASS_HEAD_START,
            Priority::Low => CLASS_HEAD_START * 2,
        };
        (self.enqueued + handicap, self.request.id)
    }

    fn patience(&self) -> Patience {
        match self.request.max_wait {
            None => Patience::Configured,
            Some(asked) if self.request.may_hurry => Patience::Exactly(asked),
            Some(asked) => Patience::AtLeast(asked),
        }
    }
}

/// How long a request waits before notice falls due, where the configured time may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Patience {
    Configured,
    AtLeast(Duration),
    Exactly(Duration),
}

impl Patience {
    fn with(self, configured: Duration) -> Duration {
        match self {
            Patience::Configured => configured,
            Patience::AtLeast(asked) => asked.max(configured),
            Patience::Exactly(asked) => asked,
        }
    }
}

/// The waiters of one priority class.
#[derive(Clone, Debug, Default, PartialEq)]
struct Class {
    /// Sum of the arrivals, in ms.
    arrived_ms: u128,
    /// Sum of their squares.
    arrived_ms2: u128,
    by_arrival: BTreeSet<Place>,
}

/// In the order in which they will be granted.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    waiters: BTreeMap<Place, Waiter>,
    places: BTreeMap<RequestId, Place>,
    classes: BTreeMap<Priority, Class>,
    by_entry: BTreeSet<Place>,
    by_overdue: BTreeMap<Patience, BTreeSet<Place>>,
}

fn square(time: Time) -> u128 {
    u128::from(time.0) * u128::from(time.0)
}

impl Queue {
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Waiter> + Clone {
        self.waiters.values()
    }

    pub fn insert(&mut self, waiter: Waiter) {
        let (place, request) = (waiter.order(), &waiter.request);
        let class = self.classes.entry(request.priority).or_default();
        class.arrived_ms += u128::from(request.arrived.0);
        class.arrived_ms2 += square(request.arrived);
        class.by_arrival.insert((request.arrived, request.id));
        self.by_entry.insert((waiter.enqueued, request.id));
        let overdue = self.by_overdue.entry(waiter.patience()).or_default();
        overdue.insert((waiter.overdue_from, request.id));
        self.places.insert(request.id, place);
        self.waiters.insert(place, waiter);
    }

    pub fn remove(&mut self, id: RequestId) -> Option<Waiter> {
        let waiter = self.waiters.remove(&self.places.remove(&id)?)?;
        let request = &waiter.request;
        if let Some(class) = self.classes.get_mut(&request.priority) {
            class.arrived_ms -= u128::from(request.arrived.0);
            class.arrived_ms2 -= square(request.arrived);
            class.by_arrival.remove(&(request.arrived, id));
            if class.by_arrival.is_empty() {
                self.classes.remove(&request.priority);
            }
        }
        self.by_entry.remove(&(waiter.enqueued, id));
        let patience = waiter.patience();
        if let Some(overdue) = self.by_overdue.get_mut(&patience) {
            overdue.remove(&(waiter.overdue_from, id));
            if overdue.is_empty() {
                self.by_overdue.remove(&patience);
            }
        }
        Some(waiter)
    }

    /// Takes everyone out, in order.
    pub fn take(&mut self) -> Vec<Waiter> {
        std::mem::take(self).waiters.into_values().collect()
    }

    /// Takes out, in order, who has waited for `timeout`.
    pub fn take_late(&mut self, now: Time, timeout: Duration) -> Vec<Waiter> {
        let late = |w: &&Waiter| w.enqueued + timeout <= now;
        let ids: Vec<RequestId> = self.iter().filter(late).map(|w| w.request.id).collect();
        ids.into_iter().filter_map(|id| self.remove(id)).collect()
    }

    /// `max_wait` counts from `now` for all of them.
    pub fn restart_overdue(&mut self, now: Time) {
        self.by_overdue.clear();
        for waiter in self.waiters.values_mut() {
            waiter.overdue_from = now;
            let overdue = self.by_overdue.entry(waiter.patience()).or_default();
            overdue.insert((now, waiter.request.id));
        }
    }

    /// Sum of the weights of those who wait.
    pub fn weight_x4(&self) -> u64 {
        let weight = |(priority, class): (&Priority, &Class)| {
            priority.weight_x4() * class.by_arrival.len() as u64
        };
        self.classes.iter().map(weight).sum()
    }

    /// Weighted ages, each at least 1 ms: their sum in ms, and that of their squares in ms².
    pub fn suffered(&self, now: Time) -> (u128, u128) {
        let at = u128::from(now.0) + 1;
        let (mut ages, mut squares) = (0, 0);
        for (priority, class) in &self.classes {
            let weight = u128::from(priority.weight_x4());
            let count = class.by_arrival.len() as u128;
            ages += weight * (at * count).saturating_sub(class.arrived_ms);
            let square = at * at * count + class.arrived_ms2;
            squares += weight * square.saturating_sub(2 * at * class.arrived_ms);
        }
        (ages, squares)
    }

    /// How many are granted before a newcomer.
    pub fn ahead_of(&self, waiter: &Waiter) -> usize {
        let newest = self.waiters.last_key_value();
        if newest.is_none_or(|(last, _)| *last <= waiter.order()) {
            return self.waiters.len();
        }
        self.waiters.range(..=waiter.order()).count()
    }

    pub fn first(&self) -> Option<&Waiter> {
        self.waiters.values().next()
    }

    /// The highest class of anybody here.
    pub fn top(&self) -> Option<Priority> {
        self.classes.keys().next_back().copied()
    }

    /// The earliest arrival.
    pub fn oldest(&self) -> Option<Time> {
        self.classes.values().filter_map(|class| Some(class.by_arrival.first()?.0)).min()
    }

    /// When the first of those still here entered the queue.
    pub fn first_entry(&self) -> Option<Time> {
        Some(self.by_entry.first()?.0)
    }

    /// When notice fell (or falls) due first, where nobody asked otherwise after `configured`.
    pub fn overdue_since(&self, configured: Duration) -> Option<Time> {
        let first = |(patience, waiters): (&Patience, &BTreeSet<Place>)| {
            Some(waiters.first()?.0 + patience.with(configured))
        };
        self.by_overdue.iter().filter_map(first).min()
    }

    /// Whether sums and orders are those of the waiters.
    pub fn check(&self) -> bool {
        let mut again = Queue::default();
        for waiter in self.iter() {
            again.insert(waiter.clone());
        }
        again.places == self.places
            && again.classes == self.classes
            && again.by_entry == self.by_entry
            && again.by_overdue == self.by_overdue
    }
}
