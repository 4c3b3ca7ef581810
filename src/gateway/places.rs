//! How many connections may be open at once (`listen.connections`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::resource::{Resource, getrlimit};

/// More than anyone needs of one machine; each takes a few KiB.
const USUAL_MAX: usize = 16_384;
/// Descriptors for engines' logs, the store, the runtime's own and a reload's.
const RESERVE_MAX: usize = 2048;
/// Where the limit of open files cannot be read.
const UNKNOWN: usize = 1024;

/// One bound for all listeners of a kind. Cheap to clone; all clones are one bound.
#[derive(Clone, Debug)]
pub struct Places(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    max: AtomicUsize,
    taken: AtomicUsize,
}

/// One connection's share, given back when dropped.
#[derive(Debug)]
pub struct Place(Arc<Inner>);

impl Places {
    pub fn new(max: usize) -> Places {
        Places(Arc::new(Inner { max: AtomicUsize::new(max), taken: AtomicUsize::new(0) }))
    }

    pub fn max(&self) -> usize {
        self.0.max.load(Ordering::Relaxed)
    }

    /// Whoever has a place keeps it, even if there are fewer from now on.
    pub fn set_max(&self, max: usize) {
        self.0.max.store(max, Ordering::Relaxed);
    }

    pub fn taken(&self) -> usize {
        self.0.taken.load(Ordering::Relaxed)
    }

    /// `None`: all are taken.
    pub fn take(&self) -> Option<Place> {
        if self.0.taken.fetch_add(1, Ordering::Relaxed) >= self.max() {
            self.0.taken.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Place(Arc::clone(&self.0)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Each request takes two descriptors: the client's connection and the engine's.
pub fn usual() -> usize {
    let open_files = getrlimit(Resource::RLIMIT_NOFILE)
        .map_or(UNKNOWN, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX));
    of_open_files(open_files)
}

fn of_open_files(limit: usize) -> usize {
    let reserve = (limit / 4).min(RESERVE_MAX);
    ((limit - reserve) / 2).clamp(1, USUAL_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_comes_back_and_the_bound_may_change() {
        let places = Places::new(2);
        let (first, _second) = (places.take().unwrap(), places.take().unwrap());
        assert!(places.take().is_none());
        drop(first);
        let third = places.take();
        assert!(third.is_some() && places.taken() == 2);
        places.set_max(1);
        drop(third);
        assert!(places.take().is_none(), "one is still taken");
        places.set_max(3);
        assert!(places.take().is_some());
    }

    #[test]
    fn two_descriptors_for_each_connection_leave_some_for_the_rest() {
        assert_eq!(of_open_files(1024), 384);
        assert_eq!(of_open_files(20_000), 8976);
        assert_eq!(of_open_files(1 << 20), USUAL_MAX);
        assert_eq!(of_open_files(usize::MAX), USUAL_MAX);
        assert_eq!(of_open_files(0), 1);
    }
}
