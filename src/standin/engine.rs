//! The state of one stand-in: what it holds, whether it sleeps, who is being served.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::ledger::{Ledger, Shortage};
use super::options::Options;
use crate::units::Bytes;

/// A line of the engine's log. A log that nobody reads any more is no reason to stop.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// What of the engine is awake; vLLM wakes its parts one by one if asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wakefulness {
    pub weights: bool,
    pub cache: bool,
    /// 0 while awake.
    pub level: u8,
    /// After level 2 the weights are garbage until they were reloaded.
    pub stale: bool,
    /// Counts the sleeps, so that a reply knows that one came in between.
    pub sleeps: u64,
}

impl Wakefulness {
    pub fn is_awake(self) -> bool {
        self.weights && self.cache
    }
}

#[derive(Debug)]
pub struct Engine {
    pub options: Options,
    vram: Bytes,
    ledger: Mutex<Option<Ledger>>,
    pub ready: watch::Sender<bool>,
    pub wakefulness: watch::Sender<Wakefulness>,
    /// One change of sleep at a time.
    pub sleep_change: tokio::sync::Mutex<()>,
    /// Workers are dead: replies under way get no more tokens.
    pub frozen: watch::Sender<bool>,
    /// Requests whose reply has not ended.
    pub replies: watch::Sender<u32>,
    pub requests: AtomicU64,
    pub waiting: AtomicU32,
    pub running: AtomicU32,
    slots: Arc<Semaphore>,
    /// LoRA adapters: name → where it was loaded from.
    pub adapters: Mutex<BTreeMap<String, String>>,
}

/// A request's place in the engine, until the end of its reply.
#[derive(Debug)]
pub struct Place {
    engine: Arc<Engine>,
    slot: Option<OwnedSemaphorePermit>,
}

impl Engine {
    /// `owner` is the process that holds the simulated memory.
    pub fn new(options: Options, owner: u32) -> Engine {
        let name = options.names.first().map_or("", String::as_str);
        let ledger = Ledger::from_env(owner, &format!("wharf engine {name}"));
        let total = ledger.as_ref().and_then(Ledger::total);
        let share = options.real.gpu_memory_utilization.zip(total);
        let share = share.map(|(share, total)| Bytes((total.0 as f64 * share) as u64));
        let vram = options.load.vram.or(share).unwrap_or_default();
        let awake = Wakefulness { weights: true, cache: true, level: 0, stale: false, sleeps: 0 };
        Engine {
            adapters: Mutex::default(),
            vram,
            ledger: Mutex::new(ledger),
            ready: watch::Sender::new(false),
            wakefulness: watch::Sender::new(awake),
            sleep_change: tokio::sync::Mutex::new(()),
            frozen: watch::Sender::new(false),
            replies: watch::Sender::new(0),
            requests: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            running: AtomicU32::new(0),
            slots: Arc::new(Semaphore::new(options.speed.slots.max(1) as usize)),
            options,
        }
    }

    /// Memory on each GPU while awake.
    pub fn vram(&self) -> Bytes {
        self.vram
    }

    pub fn room_for(&self, bytes: Bytes) -> Result<(), Shortage> {
        self.with_ledger(|ledger| ledger.room_for(bytes))
    }

    pub fn hold(&self, bytes: Bytes) -> Result<(), Shortage> {
        self.with_ledger(|ledger| {
            ledger.hold(bytes).unwrap_or_else(|error| {
                say(&format!("the memory ledger cannot be written: {error}"));
                std::process::exit(1)
            })
        })
    }

    fn with_ledger(
        &self,
        run: impl FnOnce(&mut Ledger) -> Result<(), Shortage>,
    ) -> Result<(), Shortage> {
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.as_mut().map_or(Ok(()), run)
    }

    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Waits for a slot, and for as long as the engine sleeps (as vLLM does: without an answer).
    pub async fn enter(self: &Arc<Self>) -> Place {
        self.replies.send_modify(|replies| *replies += 1);
        // Made before the first await: a client that leaves meanwhile is uncounted by its drop.
        let mut place = Place { engine: Arc::clone(self), slot: None };
        let waiting = Counted::new(&self.waiting);
        let mut wakefulness = self.wakefulness.subscribe();
        // Neither channel nor semaphore is ever closed: the engine owns both.
        let _ = wakefulness.wait_for(|now| now.is_awake()).await;
        let slot = Arc::clone(&self.slots).acquire_owned().await.ok();
        drop(waiting);
        self.running.fetch_add(1, Ordering::SeqCst);
        place.slot = slot;
        place
    }

    pub fn is_frozen(&self) -> bool {
        *self.frozen.borrow()
    }

    pub async fn frozen(&self) {
        let mut frozen = self.frozen.subscribe();
        let _ = frozen.wait_for(|frozen| *frozen).await;
    }

    /// Waits until no reply is under way.
    pub async fn all_replied(&self) {
        let mut replies = self.replies.subscribe();
        let _ = replies.wait_for(|replies| *replies == 0).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.slot.is_some() {
            self.engine.running.fetch_sub(1, Ordering::SeqCst);
        }
        self.engine.replies.send_modify(|replies| *replies -= 1);
    }
}

struct Counted<'a>(&'a AtomicU32);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicU32) -> Counted<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
