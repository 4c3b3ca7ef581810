//! The one owner: select → journal → handle → perform, and nothing is awaited in between.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::adapters::Desk;
use super::docker::DockerState;
use super::effects::{Effects, Slot, Task};
use super::gate::{Gate, Lease, StartKind};
use super::handle::{Message, Shared};
use super::journal::Journal;
use super::launch::Ports;
use super::memory_watch::MemoryWatch;
use super::outage::OutageNews;
use super::preload::PreloadLog;
use super::prepare::Prepared;
use super::start::facts_before;
use super::state_dir::{LastIds, StateDir};
use super::state_writer::StateWriter;
use super::view::{Leftover, ModelFacts};
use crate::config::catalog::ModelSpec;
use crate::config::diff::changes;
use crate::config::peers::Discovered;
use crate::runtime::{Foreign, LaunchSpec, Progress, ProgressNow};
use crate::scheduler::Scheduler;
use crate::scheduler::action::{Answer, Refusal};
use crate::scheduler::event::{Event, GateCount};
use crate::scheduler::record::SwapRecord;
use crate::telemetry::feed::News;
use crate::telemetry::metrics::Metrics;
use crate::units::{AskId, GpuId, InstanceId, ModelName, RequestId, Time};

/// Messages handled before the view is published again.
const BATCH_MAX: usize = 256;

pub(super) struct Owner {
    pub scheduler: Scheduler,
    pub shared: Arc<Shared>,
    pub inbox: mpsc::UnboundedReceiver<Message>,
    pub effects: Effects,
    pub state: StateDir,
    pub writer: StateWriter,
    pub journal: Journal,
    pub metrics: Arc<Metrics>,
    pub memory: MemoryWatch,
    pub ports: Ports,
    pub instances: BTreeMap<InstanceId, Live>,
    pub waiting: BTreeMap<RequestId, WaitingRequest>,
    pub asks: BTreeMap<AskId, oneshot::Sender<Answer>>,
    pub facts: BTreeMap<ModelName, ModelFacts>,
    /// Models whose last instance ended by itself: their next start is a restart.
    pub died: BTreeSet<ModelName>,
    pub ledger: Arc<VecDeque<Arc<SwapRecord>>>,
    /// Events that an action produced at once; handled before anything else.
    pub follow_up: VecDeque<Event>,
    pub last_ids: LastIds,
    pub docker: DockerState,
    /// Files that cannot be written now, and why.
    pub outages: BTreeMap<&'static str, String>,
    pub leftovers: BTreeMap<InstanceId, Leftover>,
    pub preload: PreloadLog,
    pub foreign: watch::Receiver<Vec<Foreign>>,
    /// Models of peers that no file names.
    pub peers: Discovered,
    pub shutdown: Option<(CancellationToken, oneshot::Sender<()>)>,
    /// Sent once the view is published: who is told of a change can read it.
    pub replies: Vec<Reply>,
}

/// An answer that somebody waits for. Whoever left meanwhile does not get it, which is all there
/// is to do: a lease that is dropped is released.
pub(super) enum Reply {
    Request(oneshot::Sender<Result<Lease, Refusal>>, Result<Lease, Refusal>),
    Ask(oneshot::Sender<Answer>, Answer),
    Reloaded(oneshot::Sender<()>),
}

impl Reply {
    fn send(self) {
        match self {
            Reply::Request(to, decision) => drop(to.send(decision)),
            Reply::Ask(to, answer) => drop(to.send(answer)),
            Reply::Reloaded(to) => drop(to.send(())),
        }
    }
}

pub(super) struct WaitingRequest {
    /// As asked for: perhaps an adapter.
    pub model: ModelName,
    pub arrived: Time,
    pub reply: oneshot::Sender<Result<Lease, Refusal>>,
}

/// One instance, from the first effect for it until it is gone.
pub(super) struct Live {
    pub spec: Arc<ModelSpec>,
    pub gpus: Vec<GpuId>,
    pub launch: Option<LaunchSpec>,
    pub slot: Slot,
    /// What was begun ahead of its start.
    pub prepared: Option<Prepared>,
    /// The effect under way, if it can be called off.
    pub task: Option<Task>,
    pub gate: Option<Arc<Gate>>,
    /// Once it was told to start.
    pub adapters: Option<Desk>,
    /// The counters the scheduler was last told.
    pub told: Option<GateCount>,
    pub progress: Progress,
    pub progress_now: watch::Receiver<ProgressNow>,
    pub stopping: bool,
    /// How requests that waited for it were served.
    pub started: StartKind,
    pub ready_at: Option<Time>,
}

impl Live {
    pub fn new(spec: Arc<ModelSpec>, gpus: Vec<GpuId>) -> Live {
        let (progress, progress_now) = Progress::new();
        Live {
            spec,
            gpus,
            launch: None,
            slot: Slot::default(),
            prepared: None,
            task: None,
            gate: None,
            adapters: None,
            told: None,
            progress,
            progress_now,
            stopping: false,
            started: StartKind::Cold,
            ready_at: None,
        }
    }
}

impl Owner {
    pub(super) async fn run(mut self) {
        self.publish();
        loop {
            let wake = self.scheduler.next_wake();
            let due = wake.map(|(at, _)| self.shared.epoch + Duration::from_millis(at.0));
            let first = tokio::select! {
                message = self.inbox.recv() => match message {
                    Some(message) => message,
                    None => return,
                },
                () = sleep_until(due) => Message::Effect(Event::Woke),
            };
            let mut next = Some(first);
            for _ in 0..BATCH_MAX {
                let Some(message) = next.take().or_else(|| self.inbox.try_recv().ok()) else {
                    break;
                };
                self.receive(message);
            }
            self.publish();
            self.replies.drain(..).for_each(Reply::send);
            if let Some((hurry, reply)) = self.shutdown.take() {
                self.stop_everything(hurry).await;
                self.publish();
                self.writer.close(self.last_ids).await;
                // Nobody may be waiting any more.
                let _ = reply.send(());
                return;
            }
        }
    }

    fn receive(&mut self, message: Message) {
        match message {
            Message::Request { request, asked, reply } => {
                if reply.is_closed() {
                    return;
                }
                let (model, arrived) = (asked, request.arrived);
                self.waiting.insert(request.id, WaitingRequest { model, arrived, reply });
                self.step(Event::RequestArrived(request));
            }
            Message::RequestGone(request) => {
                if self.waiting.remove(&request).is_some() {
                    self.step(Event::RequestGone { request });
                }
            }
            Message::GatePing(instance) => self.tell_gate(instance, true),
            Message::Ask { event, ask, reply } => {
                self.asks.insert(ask, reply);
                self.step(event);
            }
            Message::Effect(Event::AskGone { ask }) => {
                if self.asks.remove(&ask).is_some() {
                    self.step(Event::AskGone { ask });
                }
            }
            Message::Effect(event) => self.effect(event),
            Message::FoundInDocker(adopted) => self.found_in_docker(adopted),
            Message::Leftover(news) => self.leftover(news),
            Message::Outage(OutageNews { what, why: Some(why) }) => {
                self.outages.insert(what, why);
            }
            Message::Outage(OutageNews { what, why: None }) => {
                self.outages.remove(what);
            }
            Message::WhoLives(answer) => self.who_lives(answer),
            Message::DockerHealth(health) => self.docker_health(health),
            Message::Adapter { adapter, on } => self.switch_adapter(&adapter, on),
            Message::AdaptersChanged => {}
            Message::PeerModels { peer, models } => {
                if self.peers.learn(peer, models) {
                    let (reply, _) = oneshot::channel();
                    self.receive(Message::Reload {
                        catalog: self.shared.catalog.load_full(),
                        reply,
                    });
                }
            }
            Message::Reload { catalog, reply } => {
                let catalog = self.peers.merged(catalog);
                let before = self.shared.catalog.swap(Arc::clone(&catalog));
                let changes = changes(&before, &catalog).to_string();
                self.shared.logs.keep_only(&catalog);
                // What is counted of models that are gone is in the store.
                self.facts.retain(|name, _| {
                    catalog.models.contains_key(name)
                        || self.instances.values().any(|live| live.spec.name == *name)
                });
                for (name, facts) in facts_before(&catalog, &self.shared.store) {
                    self.facts.entry(name).or_insert(facts);
                }
                self.follow_docker_if_used(&catalog);
                for live in self.instances.values_mut() {
                    let spec = catalog.model(&live.spec.name);
                    if let Some(spec) = spec.filter(|spec| spec.runs_like(&live.spec)) {
                        live.spec = Arc::clone(spec);
                    }
                    if let Some(desk) = &mut live.adapters {
                        desk.follow(&catalog, &live.spec.name);
                    }
                }
                self.step(Event::CatalogChanged(catalog));
                self.shared.feed.publish(News::Reloaded { changes });
                self.replies.push(Reply::Reloaded(reply));
            }
            Message::Forecast { model, reply } => {
                self.tell_gates();
                let forecast = self.scheduler.forecast(self.effects.now(), &model);
                // Whoever left does not want to know any more.
                let _ = reply.send(forecast);
            }
            Message::RefuseNew => self.step(Event::ShuttingDown),
            Message::Shutdown { hurry, reply } => {
                self.step(Event::ShuttingDown);
                self.shutdown = Some((hurry, reply));
            }
        }
    }

    /// Hands one event to the scheduler, with fresh gate counters before it.
    pub(super) fn step(&mut self, event: Event) {
        self.tell_gates();
        self.handle(event);
    }

    fn tell_gates(&mut self) {
        let changed: Vec<InstanceId> = self.instances.keys().copied().collect();
        for instance in changed {
            self.tell_gate(instance, false);
        }
    }

    /// `always`: also when nothing changed (a ping, or the answer to `CloseGate`).
    pub(super) fn tell_gate(&mut self, instance: InstanceId, always: bool) {
        let Some(live) = self.instances.get_mut(&instance) else { return };
        let Some(gate) = &live.gate else { return };
        let count = gate.read();
        if always || live.told != Some(count) {
            live.told = Some(count);
            self.handle(Event::GateSeen { instance, gate: count });
        }
    }

    fn handle(&mut self, event: Event) {
        let mut out = Vec::new();
        let mut next = Some(event);
        while let Some(event) = next {
            let now = self.effects.now();
            self.journal.append(now, &event);
            tracing::trace!(?event, "event");
            self.scheduler.handle(now, event, &mut out);
            for action in out.drain(..) {
                tracing::trace!(?action, "action");
                self.perform(now, action);
            }
            next = self.follow_up.pop_front();
        }
    }
}

async fn sleep_until(due: Option<std::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
