//! What the rest of Wharf holds of the orchestrator: a handle to ask, and views to read.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::adapters::Uses;
use super::docker::WhoLives;
use super::gate::{Gate, Lease};
use super::leftovers::LeftoverNews;
use super::outage::OutageNews;
use super::reconcile::InDocker;
use super::view::{Health, View};
use crate::config::catalog::{Catalog, Peer};
use crate::reload::Reloads;
use crate::scheduler::action::{Answer, Refusal};
use crate::scheduler::event::{EnsureKind, Event, Request};
use crate::scheduler::plan::Forecast;
use crate::store::{Activity, Store};
use crate::telemetry::feed::{Feed, News};
use crate::telemetry::logs::Logs;
use crate::telemetry::performance::Performance;
use crate::units::{AskId, InstanceId, ModelName, Priority, RequestId, Time};

/// What the one owner receives.
#[derive(Debug)]
pub enum Message {
    Request {
        request: Request,
        /// As asked for: an adapter, where `request` names its base.
        asked: ModelName,
        reply: oneshot::Sender<Result<Lease, Refusal>>,
    },
    RequestGone(RequestId),
    GatePing(InstanceId),
    Ask {
        event: Event,
        ask: AskId,
        reply: oneshot::Sender<Answer>,
    },
    /// An effect reports.
    Effect(Event),
    /// Docker answers for the first time: what an earlier run left there; `None`: it did not say.
    FoundInDocker(Option<InDocker>),
    /// An instance of an earlier run does not go, or went after all.
    Leftover(LeftoverNews),
    /// The state folder cannot be written, or can again.
    Outage(OutageNews),
    /// Docker is back: which of its instances still live.
    WhoLives(WhoLives),
    /// A runtime went away or came back.
    DockerHealth(Health),
    /// An adapter is wanted on the running instance of its base, or shall leave it.
    Adapter {
        adapter: ModelName,
        on: bool,
    },
    /// The adapters of some instance changed: worth a new view.
    AdaptersChanged,
    /// A new configuration, already validated.
    Reload {
        catalog: Arc<Catalog>,
        reply: oneshot::Sender<()>,
    },
    /// What a peer with `models: "*"` has.
    PeerModels {
        peer: Arc<Peer>,
        models: Vec<String>,
    },
    /// Refuse what waits and start nothing more; what runs goes on.
    RefuseNew,
    /// A dry run; changes nothing. `None`: the model is not configured.
    Forecast {
        model: ModelName,
        reply: oneshot::Sender<Option<Forecast>>,
    },
    Shutdown {
        /// Cancelled: engines get no grace any more.
        hurry: CancellationToken,
        reply: oneshot::Sender<()>,
    },
}

/// Sending side of the owner's inbox. Unbounded by type, bounded by use: every sender is a
/// connection, an effect or a gate, each with a small constant of messages under way, and a
/// `Drop` must be able to send.
#[derive(Clone, Debug)]
pub struct Inbox(mpsc::UnboundedSender<Message>);

impl Inbox {
    pub(super) fn new() -> (Inbox, mpsc::UnboundedReceiver<Message>) {
        let (tx, rx) = mpsc::unbounded_channel();
        (Inbox(tx), rx)
    }

    /// Returns when the owner has ended.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }

    /// After the owner ended nobody needs the message.
    pub fn send(&self, message: Message) {
        let _ = self.0.send(message);
    }
}

const CLOCK_STEP_MS: u64 = 1000;

pub type Gates = BTreeMap<ModelName, Arc<Gate>>;

#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) inbox: Inbox,
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(super) struct Shared {
    /// The owner's time zero.
    pub epoch: Instant,
    /// What the wall clock said then; set anew when that clock was stepped.
    pub epoch_unix_ms: AtomicU64,
    pub catalog: ArcSwap<Catalog>,
    /// Gates of ready instances by model; adapters share one instance.
    pub gates: ArcSwap<Gates>,
    pub view: ArcSwap<View>,
    pub store: Store,
    pub feed: Feed,
    pub logs: Logs,
    pub performance: Performance,
    /// Requests on adapters.
    pub uses: Uses,
    pub next_request: AtomicU64,
    pub next_ask: AtomicU64,
    /// Context lengths as engines told them when they were ready last.
    pub contexts: Mutex<BTreeMap<ModelName, u64>>,
    /// Where front doors are.
    pub front_doors: ArcSwap<FrontDoors>,
    /// Who changes the configuration; set once it can be asked.
    pub reloads: OnceLock<Reloads>,
    /// Marked when a new view is there.
    pub published: watch::Sender<()>,
}

pub type FrontDoors = BTreeMap<ModelName, SocketAddr>;

/// How a request asks for its model.
#[derive(Clone, Debug)]
pub struct RequestOptions {
    pub model: ModelName,
    pub priority: Priority,
    pub max_wait: Option<Duration>,
    pub may_hurry: bool,
    pub never_start: bool,
    /// Set on the one safe retry: the first arrival.
    pub retry_of: Option<Time>,
}

impl Shared {
    pub(super) fn contexts(&self) -> MutexGuard<'_, BTreeMap<ModelName, u64>> {
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wall(&self, time: Time) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.wall_ms(time))
    }

    pub(super) fn wall_ms(&self, time: Time) -> u64 {
        self.epoch_unix_ms.load(Ordering::Relaxed) + time.0
    }

    pub(super) fn new(catalog: Arc<Catalog>, epoch: Instant, store: Store, logs: Logs) -> Shared {
        let shared = Shared {
            epoch,
            epoch_unix_ms: AtomicU64::new(0),
            catalog: ArcSwap::from(catalog),
            gates: ArcSwap::default(),
            view: ArcSwap::default(),
            store,
            feed: Feed::default(),
            logs,
            performance: Performance::default(),
            uses: Uses::default(),
            next_request: AtomicU64::new(1),
            next_ask: AtomicU64::new(1),
            contexts: Mutex::default(),
            front_doors: ArcSwap::default(),
            reloads: OnceLock::new(),
            published: watch::Sender::default(),
        };
        shared.follow_wall_clock();
        shared
    }

    /// The owner's time of a wall-clock time; `None`: before this run.
    pub(super) fn time_of(&self, unix_ms: u64) -> Option<Time> {
        unix_ms.checked_sub(self.epoch_unix_ms.load(Ordering::Relaxed)).map(Time)
    }

    /// Boards without a battery start in the past until NTP answers.
    pub(super) fn follow_wall_clock(&self) {
        let elapsed = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        let epoch = unix_ms().saturating_sub(elapsed);
        // Small differences are noise: times shown once must not wobble.
        if epoch.abs_diff(self.epoch_unix_ms.load(Ordering::Relaxed)) >= CLOCK_STEP_MS {
            self.epoch_unix_ms.store(epoch, Ordering::Relaxed);
        }
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl Handle {
    pub fn catalog(&self) -> Arc<Catalog> {
        self.shared.catalog.load_full()
    }

    /// As [`Handle::catalog`], for a look that ends at once: cheaper, as nothing is counted.
    pub fn catalog_now(&self) -> arc_swap::Guard<Arc<Catalog>> {
        self.shared.catalog.load()
    }

    /// State of models, queue, swaps and GPUs; a few milliseconds old at most.
    pub fn view(&self) -> Arc<View> {
        self.shared.view.load_full()
    }

    /// What outlives a restart.
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// What happens, for `/events`.
    pub fn feed(&self) -> &Feed {
        &self.shared.feed
    }

    /// Wharf's own lines and its engines'.
    pub fn logs(&self) -> &Logs {
        &self.shared.logs
    }

    pub fn performance(&self) -> &Performance {
        &self.shared.performance
    }

    /// Keeps the row of a finished request and tells of it.
    pub fn record_activity(&self, row: Activity) -> u64 {
        let id = self.shared.store.record_activity(row);
        self.shared.feed.publish(News::Activity { id });
        id
    }

    /// Where front doors (`ports`) are; empty where there are none.
    pub fn front_doors(&self) -> Arc<FrontDoors> {
        self.shared.front_doors.load_full()
    }

    pub fn publish_front_doors(&self, doors: FrontDoors) {
        self.shared.front_doors.store(Arc::new(doors));
    }

    /// Who changes the configuration; `None` until Wharf serves.
    pub fn reloads(&self) -> Option<&Reloads> {
        self.shared.reloads.get()
    }

    /// The first one counts.
    pub fn set_reloads(&self, reloads: Reloads) {
        let _ = self.shared.reloads.set(reloads);
    }

    /// Changes when a new view is published.
    pub fn published(&self) -> watch::Receiver<()> {
        self.shared.published.subscribe()
    }

    pub fn now(&self) -> Time {
        Time::ZERO + self.shared.epoch.elapsed()
    }

    /// The owner runs.
    pub fn is_alive(&self) -> bool {
        !self.inbox.0.is_closed()
    }

    /// Tokens of prompt and answer that a model's engine takes, as it said when it was ready last.
    pub fn context_length(&self, model: &ModelName) -> Option<u64> {
        self.shared.contexts().get(model).copied()
    }

    /// Wall-clock time of one of the owner's times.
    pub fn wall(&self, time: Time) -> SystemTime {
        self.shared.wall(time)
    }

    pub fn gates(&self) -> arc_swap::Guard<Arc<Gates>> {
        self.shared.gates.load()
    }

    /// The hot path: a lease on a ready model, without asking the owner.
    pub fn try_lease(&self, model: &ModelName) -> Option<Lease> {
        self.gate(model)?.try_lease()
    }

    /// The gate of the instance that serves the model: its base's, if it is an adapter.
    pub fn gate(&self, model: &ModelName) -> Option<Arc<Gate>> {
        let gates = self.shared.gates.load();
        gates.get(model).or_else(|| gates.get(&self.serving(model))).cloned()
    }

    /// The waiting path. Dropping the result takes the request out of the queue.
    pub fn request(&self, options: RequestOptions) -> Waiting {
        let id = RequestId(self.shared.next_request.fetch_add(1, Ordering::Relaxed));
        let (reply, answer) = oneshot::channel();
        let asked = options.model;
        let request = Request {
            id,
            model: self.serving(&asked),
            priority: options.priority,
            max_wait: options.max_wait,
            may_hurry: options.may_hurry,
            never_start: options.never_start,
            attempt: if options.retry_of.is_some() { 2 } else { 1 },
            arrived: options.retry_of.unwrap_or_else(|| self.now()),
        };
        self.inbox.send(Message::Request { request, asked, reply });
        Waiting { id, answer, inbox: self.inbox.clone(), decided: false }
    }

    /// `group/model` was asked for: the members that are not ready are loaded, too. Ask for the
    /// model first: nobody is company to nobody.
    pub fn call_company(&self, group: &str) {
        let catalog = self.shared.catalog.load();
        let Some(members) = catalog.groups.get(group).filter(|group| group.together) else {
            return;
        };
        let gates = self.shared.gates.load();
        if catalog.members(members).iter().any(|name| !gates.contains_key(name)) {
            let group = group.to_owned();
            self.inbox.send(Message::Effect(Event::CompanyAsked { group }));
        }
    }

    /// Makes a model ready (or joins a swap that does).
    pub async fn ensure(&self, model: ModelName, kind: EnsureKind, timeout: Duration) -> Answer {
        let deadline = self.now() + timeout;
        let base = self.serving(&model);
        let asked = base.clone();
        let answer = self.ask(|ask| Event::EnsureAsked { ask, model: asked, kind, deadline }).await;
        self.with_adapter(&model, &base, answer, deadline).await
    }

    /// Begins an ensure that goes on whether or not its answer is waited for.
    pub fn ensure_detached(
        &self,
        model: ModelName,
        kind: EnsureKind,
        timeout: Duration,
    ) -> oneshot::Receiver<Answer> {
        let deadline = self.now() + timeout;
        let (ask, (reply, answer)) = (self.next_ask(), oneshot::channel());
        let base = self.serving(&model);
        if base != model {
            self.inbox.send(Message::Adapter { adapter: model, on: true });
        }
        let model = base;
        let event = Event::EnsureAsked { ask, model, kind, deadline };
        self.inbox.send(Message::Ask { event, ask, reply });
        answer
    }

    /// Of an adapter: that alone, its base goes on.
    pub async fn unload(&self, model: ModelName, force: bool) -> Answer {
        if self.serving(&model) != model {
            return self.unload_adapter(&model).await;
        }
        self.ask(|ask| Event::UnloadAsked { ask, model, force }).await
    }

    /// Drains a model and puts it to sleep at its configured level.
    pub async fn sleep(&self, model: ModelName) -> Answer {
        self.ask(|ask| Event::SleepAsked { ask, model }).await
    }

    /// Adds `by` (or the model's own ttl) to what is left of its ttl.
    pub async fn extend_ttl(&self, model: ModelName, by: Option<Duration>) -> Answer {
        self.ask(|ask| Event::ExtendAsked { ask, model, by }).await
    }

    /// Pins or unpins a model until the next such call, whatever a reload says.
    pub async fn pin(&self, model: ModelName, pinned: bool) -> Answer {
        self.ask(|ask| Event::PinAsked { ask, model, pinned }).await
    }

    /// What a request for the model would bring about now; `None`: it is not configured.
    pub async fn forecast(&self, model: ModelName) -> Option<Forecast> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Message::Forecast { model, reply });
        answer.await.ok().flatten()
    }

    /// Replaces the configuration: unchanged models are not touched.
    pub async fn reload(&self, catalog: Arc<Catalog>) {
        let (reply, done) = oneshot::channel();
        self.inbox.send(Message::Reload { catalog, reply });
        let _ = done.await;
    }

    /// Refuses what waits and what comes from now on; requests that hold a lease go on. Streams of
    /// news and logs end: nobody could wait for their end else.
    pub fn refuse_new(&self) {
        self.shared.feed.close();
        self.inbox.send(Message::RefuseNew);
    }

    /// Stops taking work, ends what `on_exit` says, and returns when that is done. Engines have
    /// `swap.shutdown_timeout`, and no time at all once `hurry` is cancelled.
    pub async fn shutdown(&self, hurry: CancellationToken) {
        let (reply, done) = oneshot::channel();
        self.inbox.send(Message::Shutdown { hurry, reply });
        let _ = done.await;
    }

    async fn ask(&self, event: impl FnOnce(AskId) -> Event) -> Answer {
        let ask = self.next_ask();
        let (reply, answer) = oneshot::channel();
        let mut gone = AskGuard { ask: Some(ask), inbox: &self.inbox };
        self.inbox.send(Message::Ask { event: event(ask), ask, reply });
        let answer = answer.await.unwrap_or(Answer::Refused(Refusal::ShuttingDown));
        gone.ask = None;
        answer
    }

    fn next_ask(&self) -> AskId {
        AskId(self.shared.next_ask.fetch_add(1, Ordering::Relaxed))
    }
}

/// Tells the owner when a caller goes away before its answer.
struct AskGuard<'a> {
    ask: Option<AskId>,
    inbox: &'a Inbox,
}

impl Drop for AskGuard<'_> {
    fn drop(&mut self) {
        if let Some(ask) = self.ask {
            self.inbox.send(Message::Effect(Event::AskGone { ask }));
        }
    }
}

/// A request in the queue.
#[derive(Debug)]
pub struct Waiting {
    pub id: RequestId,
    answer: oneshot::Receiver<Result<Lease, Refusal>>,
    inbox: Inbox,
    decided: bool,
}

impl Waiting {
    /// Resolves once; cancel-safe, so it can be polled in a `select!` loop.
    pub async fn decision(&mut self) -> Result<Lease, Refusal> {
        let decision = (&mut self.answer).await;
        self.decided = true;
        decision.unwrap_or(Err(Refusal::ShuttingDown))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.decided {
            self.inbox.send(Message::RequestGone(self.id));
        }
    }
}
