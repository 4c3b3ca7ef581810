//! LoRA adapters of one running instance: what the owner wishes, and the task that sees to it.
//!
//! To the scheduler a request for an adapter is a request for its base: they share the GPU, the
//! instance and its queue. Here is the rest. The owner alone writes the wishes, the keeper alone
//! what became of them; both are gone with the instance.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::effects::Effects;
use super::handle::{Inbox, Message, Shared};
use crate::config::catalog::Catalog;
use crate::engine::adapters as engine;
use crate::runtime::Running;
use crate::scheduler::event::Fault;
use crate::units::{ModelName, Time};

/// How long a start waits for its adapters; the rest is loaded while the base serves.
const FIRST_WITHIN: Duration = Duration::from_secs(30);
const BACKOFF_FIRST: Duration = Duration::from_secs(5);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
const DRAIN_LOOK_EVERY: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, PartialEq)]
pub enum AdapterState {
    Loading,
    Loaded,
    /// Its last requests end; nobody new is let in.
    Leaving,
    Failed {
        fault: Fault,
        retry_at: Time,
    },
}

/// What is absent is not loaded.
pub type AdapterStates = BTreeMap<ModelName, AdapterState>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Wish {
    /// As the engine shall know it.
    served: String,
    source: String,
}

type Wishes = BTreeMap<ModelName, Wish>;

/// Requests on one adapter.
#[derive(Debug, Default)]
pub struct Use {
    in_flight: AtomicU32,
    granted: AtomicU64,
}

impl Use {
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    pub fn granted(&self) -> u64 {
        self.granted.load(Ordering::Relaxed)
    }

    /// Counts as in flight until it is dropped.
    pub fn begin(self: &Arc<Self>) -> InUse {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        self.granted.fetch_add(1, Ordering::Relaxed);
        InUse(Arc::clone(self))
    }
}

#[derive(Debug)]
pub struct InUse(Arc<Use>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Of every adapter that was ever asked for: configured names only.
#[derive(Clone, Debug, Default)]
pub struct Uses(Arc<Mutex<BTreeMap<ModelName, Arc<Use>>>>);

impl Uses {
    pub fn of(&self, adapter: &ModelName) -> Arc<Use> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(adapter.clone()).or_default())
    }
}

/// The owner's side.
#[derive(Debug)]
pub(super) struct Desk {
    wishes: watch::Sender<Wishes>,
    states: watch::Receiver<AdapterStates>,
    /// Unloaded by hand, until somebody asks for them.
    off: BTreeSet<ModelName>,
}

/// What a keeper is made of, before its engine runs.
#[derive(Debug)]
pub struct Seed {
    wishes: watch::Receiver<Wishes>,
    states: watch::Sender<AdapterStates>,
}

impl Desk {
    pub fn new(catalog: &Catalog, base: &ModelName) -> (Desk, Seed) {
        let (wishes, wanted) = watch::channel(wishes(catalog, base, &BTreeSet::new()));
        let (told, states) = watch::channel(AdapterStates::new());
        (Desk { wishes, states, off: BTreeSet::new() }, Seed { wishes: wanted, states: told })
    }

    pub fn states(&self) -> &watch::Receiver<AdapterStates> {
        &self.states
    }

    /// After a reload.
    pub fn follow(&mut self, catalog: &Catalog, base: &ModelName) {
        let next = wishes(catalog, base, &self.off);
        self.wishes.send_if_modified(|now| {
            let changed = *now != next;
            *now = next;
            changed
        });
    }

    pub fn switch(&mut self, catalog: &Catalog, base: &ModelName, adapter: &ModelName, on: bool) {
        if on {
            self.off.remove(adapter);
        } else {
            self.off.insert(adapter.clone());
        }
        self.follow(catalog, base);
    }
}

fn wishes(catalog: &Catalog, base: &ModelName, off: &BTreeSet<ModelName>) -> Wishes {
    let wanted = catalog.adapters_of(base).filter(|spec| !off.contains(&spec.name));
    let wish = |spec: &Arc<crate::config::catalog::ModelSpec>| {
        let source = spec.adapter.as_ref()?.source.clone();
        Some((spec.name.clone(), Wish { served: spec.served_name().to_owned(), source }))
    };
    wanted.filter_map(wish).collect()
}

/// What a keeper shares with the rest of Wharf.
#[derive(Clone, Debug)]
pub struct Surroundings {
    pub inbox: Inbox,
    pub uses: Uses,
    pub epoch: Instant,
    pub drain_timeout: Duration,
}

impl Effects {
    pub(super) fn around_adapters(&self, shared: &Shared, catalog: &Catalog) -> Surroundings {
        Surroundings {
            inbox: self.inbox.clone(),
            uses: shared.uses.clone(),
            epoch: self.epoch,
            drain_timeout: catalog.settings.swap.drain_timeout,
        }
    }
}

impl Seed {
    /// Sees to the adapters as long as the owner has wishes. Returns once each was tried once, or
    /// a while has passed: a slow or failing adapter does not keep its base from serving.
    /// `afresh`: what the engine lists is no proof that it works (its weights were discarded).
    pub async fn keep(self, running: Running, around: Surroundings, afresh: bool) {
        let (tried, first) = tokio::sync::oneshot::channel();
        let keeper = Keeper {
            running,
            around,
            wishes: self.wishes,
            states: self.states,
            loaded: Wishes::new(),
            leaving: BTreeMap::new(),
            failures: BTreeMap::new(),
        };
        tokio::spawn(keeper.run(afresh, tried));
        // Too late, or over with the instance: either way the start goes on.
        let _ = tokio::time::timeout(FIRST_WITHIN, first).await;
    }
}

struct Keeper {
    running: Running,
    around: Surroundings,
    wishes: watch::Receiver<Wishes>,
    states: watch::Sender<AdapterStates>,
    /// What the engine holds of ours.
    loaded: Wishes,
    /// Since when their last requests are waited for.
    leaving: BTreeMap<ModelName, Instant>,
    failures: BTreeMap<ModelName, (Wish, u32, Instant)>,
}

impl Keeper {
    async fn run(mut self, afresh: bool, tried: tokio::sync::oneshot::Sender<()>) {
        self.look(afresh).await;
        let mut tried = Some(tried);
        loop {
            let next = self.pass().await;
            if let Some(tried) = tried.take() {
                let _ = tried.send(());
            }
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.wishes.changed() => if changed.is_err() { return },
                () = due => {}
            }
        }
    }

    /// An engine that runs already may hold adapters of an earlier run.
    async fn look(&mut self, afresh: bool) {
        let wishes = self.wishes.borrow().clone();
        if wishes.is_empty() {
            return;
        }
        let Ok(served) = engine::served(&self.running).await else { return };
        for (name, wish) in wishes {
            match served.get(&wish.served) {
                Some(root) if *root == wish.source && !afresh => {
                    self.loaded.insert(name.clone(), wish);
                    self.tell(&name, Some(AdapterState::Loaded));
                }
                Some(_) => {
                    // Loaded from elsewhere, or in vain: what remains is told by the load.
                    let _ = engine::unload(&self.running, &wish.served).await;
                }
                None => {}
            }
        }
    }

    /// Everything that can be done now; answers when to look again.
    async fn pass(&mut self) -> Option<Instant> {
        let wishes = self.wishes.borrow_and_update().clone();
        let mut next = None;
        for (name, had) in self.loaded.clone() {
            if wishes.get(&name) == Some(&had) {
                self.leaving.remove(&name);
                self.tell(&name, Some(AdapterState::Loaded));
            } else if let Some(again) = self.let_go(&name, &had).await {
                next = earlier(next, again);
            }
        }
        self.failures.retain(|name, (wish, ..)| wishes.get(name) == Some(wish));
        let stale: Vec<ModelName> = self.states.borrow().keys().cloned().collect();
        for name in stale {
            if !wishes.contains_key(&name) && !self.loaded.contains_key(&name) {
                self.tell(&name, None);
            }
        }
        for (name, wish) in wishes {
            if self.loaded.contains_key(&name) {
                continue;
            }
            match self.failures.get(&name) {
                Some((_, _, retry)) if *retry > Instant::now() => next = earlier(next, *retry),
                Some(_) | None => {
                    if let Some(retry) = self.load(&name, wish).await {
                        next = earlier(next, retry);
                    }
                }
            }
        }
        next
    }

    async fn load(&mut self, name: &ModelName, wish: Wish) -> Option<Instant> {
        self.tell(name, Some(AdapterState::Loading));
        match engine::load(&self.running, &wish.served, &wish.source).await {
            Ok(()) => {
                tracing::info!(adapter = %name, "adapter loaded");
                self.failures.remove(name);
                self.loaded.insert(name.clone(), wish);
                self.tell(name, Some(AdapterState::Loaded));
                None
            }
            Err(fault) => {
                tracing::warn!(adapter = %name, "{}", fault.message);
                let before = self.failures.get(name).map_or(0, |(_, tries, _)| *tries);
                let pause = (BACKOFF_FIRST * 2_u32.saturating_pow(before.min(6))).min(BACKOFF_MAX);
                let retry = Instant::now() + pause;
                self.failures.insert(name.clone(), (wish, before.saturating_add(1), retry));
                let retry_at = Time::ZERO + retry.saturating_duration_since(self.around.epoch);
                self.tell(name, Some(AdapterState::Failed { fault, retry_at }));
                Some(retry)
            }
        }
    }

    /// Unloads one, once nobody uses it any more; else answers when to look again.
    async fn let_go(&mut self, name: &ModelName, had: &Wish) -> Option<Instant> {
        self.tell(name, Some(AdapterState::Leaving));
        let since = *self.leaving.entry(name.clone()).or_insert_with(Instant::now);
        let busy = self.around.uses.of(name).in_flight() > 0;
        if busy && since.elapsed() < self.around.drain_timeout {
            return Some(Instant::now() + DRAIN_LOOK_EVERY);
        }
        if let Err(fault) = engine::unload(&self.running, &had.served).await {
            tracing::warn!(adapter = %name, "{}", fault.message);
            return Some(Instant::now() + BACKOFF_FIRST);
        }
        tracing::info!(adapter = %name, "adapter unloaded");
        self.leaving.remove(name);
        self.loaded.remove(name);
        self.tell(name, None);
        None
    }

    fn tell(&self, name: &ModelName, state: Option<AdapterState>) {
        let changed = self.states.send_if_modified(|states| {
            let before = states.get(name);
            if before == state.as_ref() {
                return false;
            }
            match state {
                Some(state) => states.insert(name.clone(), state),
                None => states.remove(name),
            };
            true
        });
        if changed {
            self.around.inbox.send(Message::AdaptersChanged);
        }
    }
}

fn earlier(one: Option<Instant>, other: Instant) -> Option<Instant> {
    Some(one.map_or(other, |one| one.min(other)))
}
