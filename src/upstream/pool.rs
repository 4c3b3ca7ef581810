//! Idle connections, apart for each thread that serves: what one of them opened is woken there.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::connection::Connection;

/// vLLM keeps idle connections 120 s (we set it so); uvicorn's own default would be 5 s.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// Idle for so long, the socket itself is asked whether the engine closed it: while a thread is busy
/// it hears of that late.
const LOOK_AFTER: Duration = Duration::from_millis(100);
/// Of one lane.
const IDLE_COUNT_MAX: usize = 1024;

thread_local! {
    static LANE: Cell<usize> = const { Cell::new(0) };
}

/// This thread serves connections by itself and keeps its idle ones in a lane of its own; 0 is
/// everybody else's.
pub fn set_lane(lane: usize) {
    LANE.set(lane);
}

/// How many threads may serve with a lane of their own.
pub fn lanes() -> usize {
    static LANES: OnceLock<usize> = OnceLock::new();
    *LANES.get_or_init(|| available_parallelism().map_or(1, usize::from))
}

#[derive(Debug)]
pub struct Pool {
    lanes: Box<[Mutex<Vec<Idle>>]>,
    swept: AtomicBool,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

impl Default for Pool {
    fn default() -> Pool {
        let lanes = (0..=lanes()).map(|_| Mutex::default()).collect();
        Pool { lanes, swept: AtomicBool::new(false) }
    }
}

impl Pool {
    fn lane(&self, lane: usize) -> MutexGuard<'_, Vec<Idle>> {
        self.lanes[lane % self.lanes.len()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that was used last; those that the engine closed meanwhile are dropped.
    pub fn take(&self) -> Option<Connection> {
        let own = LANE.get();
        self.take_from(own).or_else(|| (own != 0).then(|| self.take_from(0)).flatten())
    }

    fn take_from(&self, lane: usize) -> Option<Connection> {
        let mut idle = self.lane(lane);
        while let Some(Idle { mut connection, since }) = idle.pop() {
            let idle = since.elapsed();
            if idle < IDLE_MAX && connection.is_silent(idle >= LOOK_AFTER) {
                return Some(connection);
            }
        }
        None
    }

    /// To the lane of the thread that opened it.
    pub fn give_back(pool: &Arc<Pool>, connection: Connection) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let mut idle = pool.lane(connection.lane);
        if idle.len() < IDLE_COUNT_MAX {
            idle.push(Idle { connection, since: Instant::now() });
        }
        drop(idle);
        if !pool.swept.load(Ordering::Relaxed) && !pool.swept.swap(true, Ordering::AcqRel) {
            runtime.spawn(sweep(Arc::downgrade(pool)));
        }
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        (0..self.lanes.len()).map(|lane| self.lane(lane).len()).sum()
    }

    pub fn clear(&self) {
        for lane in 0..self.lanes.len() {
            let idle = std::mem::take(&mut *self.lane(lane));
            drop(idle);
        }
    }

    /// Whether any is left.
    fn drop_old(&self) -> bool {
        let mut any = false;
        for lane in 0..self.lanes.len() {
            let mut idle = self.lane(lane);
            let old = idle.iter().take_while(|idle| idle.since.elapsed() >= IDLE_MAX).count();
            let old: Vec<Idle> = idle.drain(..old).collect();
            any |= !idle.is_empty();
            drop(idle);
            drop(old);
        }
        any
    }
}

/// Until nothing is idle; who puts the next one there begins anew.
async fn sweep(pool: std::sync::Weak<Pool>) {
    loop {
        sleep(IDLE_MAX / 2).await;
        let Some(pool) = pool.upgrade() else { return };
        if !pool.drop_old() {
            pool.swept.store(false, Ordering::Release);
            // One that came in between would otherwise never be looked at.
            if !pool.drop_old() || pool.swept.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    }
}

/// The lane of this thread.
pub fn own_lane() -> usize {
    LANE.get()
}
