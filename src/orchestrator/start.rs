//! Builds the owner from its parts, reconciles with what an earlier run left, and lets it run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::docker::DockerState;
use super::effects::{Effects, Slot, hung_up};
use super::handle::{Gates, Handle, Inbox, Message, Shared};
use super::journal::{Begin, Journal};
use super::keep;
use super::launch::Ports;
use super::memory_watch::{Holders, MemoryWatch};
use super::outage::Outage;
use super::preload::PreloadLog;
use super::ram_watch;
use super::reconcile::{Adopted, named_ids, reconcile, uses_docker};
use super::run::{Live, Owner};
use super::state_dir::{LastIds, StateDir, StateError};
use super::state_writer::StateWriter;
use super::view::ModelFacts;
use crate::config::catalog::{Catalog, OnExit, StopSpec};
use crate::config::peers::Discovered;
use crate::gpu::{GpuKind, Gpus};
use crate::runtime::docker::DockerRuntime;
use crate::runtime::external::ExternalRuntime;
use crate::runtime::ollama::OllamaRuntime;
use crate::runtime::process::ProcessRuntime;
use crate::runtime::{Foreign, Identity, RuntimeHandle, Runtimes};
use crate::scheduler::event::{EnsureKind, Event, MemorySample};
use crate::scheduler::{GpuInfo, NextIds, Scheduler, World};
use crate::store::{Figures, Store};
use crate::telemetry::logs::Logs;
use crate::telemetry::metrics::Metrics;
use crate::units::{ModelName, Time};

const FOREIGN_EVERY: Duration = Duration::from_secs(15);
/// What an engine gets once an operator asked a second time.
const HURRIED_GRACE: Duration = Duration::from_secs(1);
/// For containers that were stopped to be removed.
const CLEARED_WITHIN: Duration = Duration::from_secs(10);
/// Warm-up models wait this long for room before their ask is forgotten.
const WARMUP_WITHIN: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),
}

/// Starts the one owner. The task ends after [`Handle::shutdown`].
pub async fn start(
    catalog: Arc<Catalog>,
    metrics: Arc<Metrics>,
    store: Store,
) -> Result<(Handle, JoinHandle<()>), StartError> {
    let state = StateDir::open(&catalog.settings.state_dir())?;
    let gpus = Gpus::open(&catalog.settings.gpu, &state.vram_ledger()).await?;
    tracing::info!(gpus = gpus.gpus().len(), provider = gpus.describe(), "GPU memory");
    let (inbox, receiver) = Inbox::new();
    let epoch = Instant::now();
    let holders = Holders::new(&state.installation);
    let docker = DockerRuntime::new(catalog.settings.docker_host.clone());
    let effects = Effects {
        runtimes: runtimes(&docker),
        gpus: gpus.clone(),
        inbox: inbox.clone(),
        holders: holders.clone(),
        epoch,
        logs: Logs::of_this_process(),
    };
    // Also for containers of models that ran there before the configuration changed.
    let configured = uses_docker(&catalog);
    let uses_docker = configured || state.ever_used_docker();
    if uses_docker {
        docker.connect();
    }
    let before = state.last_ids();
    let named = named_ids(&catalog, before.instance);
    let reconciled = reconcile(&effects, &catalog, &state, &named).await;
    let adopted = reconciled.adopted;
    let last_id = adopted
        .iter()
        .map(|adopted| adopted.running.identity.instance.0)
        .chain(named.values().map(|id| id.0))
        .fold(before.instance, u64::max);
    let world = world_of(&gpus);
    let shared = Arc::new(Shared::new(Arc::clone(&catalog), epoch, store, Logs::of_this_process()));
    let foreign = if uses_docker {
        follow_docker(&docker, inbox.clone(), state.installation.clone())
    } else {
        watch::channel(Vec::new()).1
    };
    let learned = learned_before(&catalog, &state, &shared.store).await;
    let last_ids = LastIds { instance: last_id, swap: last_swap(before, &shared.store) };
    let next_ids = NextIds { instance: last_ids.instance + 1, swap: last_ids.swap + 1 };
    let cost = "ids may come twice after a restart";
    let outage = Outage::new("the state folder", cost, inbox.clone());
    let writer = StateWriter::open(state.path(), last_ids, configured, outage);
    let begin = begin_of(&shared, next_ids, &world, &catalog);
    let cost = "events are missing from it until then";
    let no_journal = Outage::new("the journal", cost, inbox.clone());
    let ram = ram_watch::spawn(&gpus, effects.runtimes.clone(), holders.clone());
    let mut owner = Owner {
        scheduler: Scheduler::new(Arc::clone(&catalog), world, next_ids),
        shared: Arc::clone(&shared),
        inbox: receiver,
        journal: Journal::open(state.journal(), begin, no_journal),
        writer,
        memory: MemoryWatch::spawn(gpus.clone(), holders, ram, inbox.clone(), epoch),
        ports: Ports::new(catalog.settings.engine_ports),
        effects,
        metrics,
        instances: BTreeMap::new(),
        waiting: BTreeMap::new(),
        asks: BTreeMap::new(),
        facts: facts_before(&catalog, &shared.store),
        died: BTreeSet::new(),
        state,
        ledger: Arc::new(VecDeque::new()),
        follow_up: VecDeque::new(),
        last_ids,
        docker: DockerState {
            health: uses_docker.then(|| docker.health().borrow().clone()),
            flips: 0,
            missed: reconciled.docker_missed,
            last_id: before.instance,
            named,
        },
        outages: BTreeMap::new(),
        leftovers: BTreeMap::new(),
        preload: PreloadLog::default(),
        foreign,
        peers: Discovered::default(),
        shutdown: None,
        replies: Vec::new(),
    };
    owner.begin(&gpus, adopted, learned).await;
    keep::follow(Arc::clone(&shared), inbox.clone());
    let handle = Handle { inbox, shared };
    let warmups = catalog.models.values().filter(|spec| spec.warmup);
    for spec in warmups {
        drop(handle.ensure_detached(spec.name.clone(), EnsureKind::Warmup, WARMUP_WITHIN));
    }
    Ok((handle, tokio::spawn(owner.run())))
}

fn runtimes(docker: &DockerRuntime) -> Runtimes {
    Runtimes {
        process: ProcessRuntime::default(),
        docker: docker.clone(),
        external: ExternalRuntime::default(),
        ollama: OllamaRuntime::default(),
    }
}

fn begin_of(shared: &Shared, next_ids: NextIds, world: &World, catalog: &Arc<Catalog>) -> Begin {
    Begin {
        wharf: env!("CARGO_PKG_VERSION").to_owned(),
        at: humantime::format_rfc3339_millis(shared.wall(Time::ZERO)).to_string(),
        next_ids,
        world: world.clone(),
        catalog: Arc::clone(catalog),
    }
}

fn world_of(gpus: &Gpus) -> World {
    let info = gpus.gpus().iter();
    World {
        gpus: info
            .map(|gpu| GpuInfo { id: gpu.id, uuid: gpu.uuid.clone(), total: gpu.total })
            .collect(),
        proof: gpus.kind() != GpuKind::None,
    }
}

/// The state folder may be younger than the store.
fn last_swap(before: LastIds, store: &Store) -> u64 {
    store.swaps(1).first().map_or(0, |row| row.record.id.0).max(before.swap)
}

/// Less what was learned of engines that are configured differently now.
async fn learned_before(
    catalog: &Catalog,
    state: &StateDir,
    store: &Store,
) -> BTreeMap<ModelName, Figures> {
    let (old, mut learned) = (state.old_learned(), store.learned());
    if !old.is_empty() {
        for (model, figures) in old {
            learned.entry(model).or_insert_with_key(|model| {
                store.put_learned(model, &figures);
                figures
            });
        }
        if store.is_durable() && store.flush().await.is_ok() {
            state.forget_old_learned();
        }
    }
    let fit = |model: &ModelName, figures: Figures| match catalog.model(model) {
        Some(spec) => figures.for_spec(spec),
        None => figures,
    };
    learned.into_iter().map(|(model, figures)| (model.clone(), fit(&model, figures))).collect()
}

pub(super) fn facts_before(catalog: &Catalog, store: &Store) -> BTreeMap<ModelName, ModelFacts> {
    let totals = store.totals();
    let facts = |name: &ModelName| totals.get(name).copied().map(ModelFacts::after);
    let names = catalog.models.keys();
    names.map(|name| (name.clone(), facts(name).unwrap_or_default())).collect()
}

/// Daemon health as messages, and the list of GPU containers that are none of ours.
pub(super) fn follow_docker(
    docker: &DockerRuntime,
    inbox: Inbox,
    installation: String,
) -> watch::Receiver<Vec<Foreign>> {
    let mut health = docker.health();
    tokio::spawn(async move {
        while health.changed().await.is_ok() {
            let now = health.borrow_and_update().clone();
            inbox.send(Message::DockerHealth(now));
        }
    });
    let (tx, rx) = watch::channel(Vec::new());
    let docker = docker.clone();
    tokio::spawn(async move {
        while !tx.is_closed() {
            tx.send_replace(docker.foreign(&installation).await);
            tokio::time::sleep(FOREIGN_EVERY).await;
        }
    });
    rx
}

impl Owner {
    /// What the scheduler must know before the first request.
    async fn begin(
        &mut self,
        gpus: &Gpus,
        adopted: Vec<Adopted>,
        remembered: BTreeMap<ModelName, Figures>,
    ) {
        for (model, Figures { learned, .. }) in remembered {
            self.step(Event::Remembered { model, learned });
        }
        for adopted in adopted {
            self.adopt(adopted);
        }
        let host = gpus.host_memory();
        if gpus.kind() != GpuKind::None || host.is_some() {
            let taken_at = self.effects.now();
            let mut reading = gpus.sample().await;
            if let Ok(gpus) = &mut reading {
                self.effects.holders.attribute(gpus);
            }
            let seen =
                reading.map(|gpus| MemorySample { taken_at, gpus, host, ram: BTreeMap::new() });
            self.step(Event::MemorySeen(seen));
        }
        // It may have come up between our look and now: no change of its health would tell.
        self.look_for_missed();
    }

    pub(super) fn adopt(&mut self, Adopted { spec, running, footprint, unfit }: Adopted) {
        let identity = running.identity.clone();
        let mut live = Live::new(spec, identity.gpus.clone());
        live.slot = Slot::holding(running.clone());
        self.instances.insert(identity.instance, live);
        self.ports.reserve(identity.instance, identity.port);
        let Identity { instance, model, gpus, .. } = identity;
        if let Some(why) = unfit {
            return self.step(Event::Stray { instance, model, gpus, footprint, why });
        }
        self.effects.logs.copy(&model, &running.log);
        self.became_ready(instance, &running);
        self.watch_exit(instance, &running);
        let extended = self.shared.store.ttl_until().get(&model).copied();
        let until = extended.and_then(|until| self.shared.time_of(until));
        self.step(Event::Adopted { instance, model: model.clone(), gpus, footprint });
        if let Some(until) = until.filter(|until| *until > self.effects.now()) {
            self.step(Event::TtlUntil { model, until });
        }
    }

    /// After `ShuttingDown`: ends what shall not outlive us, within `shutdown_timeout` and the time
    /// that a SIGKILL takes. Everything else is adopted next time.
    pub(super) async fn stop_everything(&mut self, hurry: CancellationToken) {
        let settings = self.shared.catalog.load_full();
        let keep_docker = settings.settings.swap.on_exit == OnExit::Keep;
        let until = Instant::now() + settings.settings.swap.shutdown_timeout;
        self.shared.gates.store(Arc::new(Gates::new()));
        self.keep_all_totals();
        let stops = std::mem::take(&mut self.instances).into_iter().map(|(instance, mut live)| {
            let task = live.task.take();
            live.prepared = None;
            let connections = live.gate.take().map(|gate| {
                gate.cancel_leases();
                gate.gone()
            });
            if let Some(task) = &task {
                task.cancel.cancel();
            }
            let (effects, hurry) = (self.effects.clone(), hurry.clone());
            async move {
                if let Some(task) = task {
                    // Soon, unless the runtime hangs; what it still creates is reaped next time.
                    tokio::select! {
                        _ = tokio::time::timeout_at(until.into(), task.join) => {}
                        () = hurry.cancelled() => {}
                    }
                }
                let Some(running) = live.slot.peek() else { return };
                let is_docker = matches!(running.handle, RuntimeHandle::Docker { .. });
                if is_docker && keep_docker && live.ready_at.is_some() {
                    tracing::info!(model = %live.spec.name, %instance, "kept running (on_exit: keep)");
                    return;
                }
                let mut stop = live.spec.stop.clone();
                stop.grace = stop.grace.min(until.saturating_duration_since(Instant::now()));
                let hurried = StopSpec { grace: HURRIED_GRACE.min(stop.grace), ..stop.clone() };
                let released = async {
                    if live.ready_at.is_some() {
                        crate::engine::release(&live.spec, &running).await;
                    }
                    hung_up(connections).await;
                    effects.stop_within(&running, &stop).await
                };
                let stopped = tokio::select! {
                    stopped = released => stopped,
                    () = hurry.cancelled() => effects.stop_within(&running, &hurried).await,
                };
                if let Err(fault) = stopped {
                    tracing::error!(model = %live.spec.name, "{}", fault.message);
                }
            }
        });
        join_all(stops).await;
        // What is left of them goes at the next start.
        let cleared = tokio::time::timeout(CLEARED_WITHIN, self.effects.runtimes.docker.cleared());
        tokio::select! {
            _ = cleared => {}
            () = hurry.cancelled() => {}
        }
    }
}
