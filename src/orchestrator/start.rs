//! Builds the owner from its parts, reconciles with what an earlier run left, and lets it run.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::docker::DockerState;
use super::effects::{Effects, Slot};
use super::handle::{Gates, Handle, Inbox, Message, Shared};
use super::journal::Journal;
use super::launch::Ports;
use super::memory_watch::{Holders, MemoryWatch};
use super::reconcile::{Adopted, named_ids, reconcile, uses_docker};
use super::run::{Live, Owner};
use super::state_dir::{Figures, StateDir, StateError};
use super::view::View;
use crate::config::catalog::{Catalog, OnExit};
use crate::gpu::{GpuKind, Gpus};
use crate::runtime::docker::DockerRuntime;
use crate::runtime::external::ExternalRuntime;
use crate::runtime::process::ProcessRuntime;
use crate::runtime::{Foreign, Identity, RuntimeHandle, Runtimes};
use crate::scheduler::event::{EnsureKind, Event, MemorySample};
use crate::scheduler::{GpuInfo, NextIds, Scheduler, World};
use crate::telemetry::metrics::Metrics;

const FOREIGN_EVERY: Duration = Duration::from_secs(15);
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
) -> Result<(Handle, JoinHandle<()>), StartError> {
    let state = StateDir::open(&catalog.settings.state_dir())?;
    let gpus = Gpus::open(&catalog.settings.gpu, &state.vram_ledger()).await?;
    tracing::info!(gpus = gpus.gpus().len(), provider = gpus.describe(), "GPU memory");
    let (inbox, receiver) = Inbox::new();
    let epoch = Instant::now();
    let holders = Holders::new(&state.installation);
    let docker = DockerRuntime::new(catalog.settings.docker_host.clone());
    let effects = Effects {
        runtimes: Runtimes {
            process: ProcessRuntime::default(),
            docker: docker.clone(),
            external: ExternalRuntime,
        },
        gpus: gpus.clone(),
        inbox: inbox.clone(),
        holders: holders.clone(),
        epoch,
    };
    if uses_docker(&catalog) {
        state.note_docker();
    }
    // Also containers of models that ran there before the configuration changed.
    let uses_docker = state.ever_used_docker();
    if uses_docker {
        docker.connect();
    }
    let (before, last_swap) = (state.last_id(), state.last_swap());
    let named = named_ids(&catalog, before);
    let reconciled = reconcile(&effects, &catalog, &state, &named).await;
    let adopted = reconciled.adopted;
    let last_id = adopted
        .iter()
        .map(|adopted| adopted.running.identity.instance.0)
        .chain(named.values().map(|id| id.0))
        .fold(before, u64::max);
    let world = World {
        gpus: gpus
            .gpus()
            .iter()
            .map(|gpu| GpuInfo { id: gpu.id, uuid: gpu.uuid.clone(), total: gpu.total })
            .collect(),
        proof: gpus.kind() != GpuKind::None,
    };
    let shared = Arc::new(Shared {
        epoch,
        epoch_wall: SystemTime::now(),
        catalog: ArcSwap::new(Arc::clone(&catalog)),
        gates: ArcSwap::new(Arc::new(Gates::new())),
        view: ArcSwap::new(Arc::new(View::default())),
        next_request: AtomicU64::new(1),
        next_ask: AtomicU64::new(1),
    });
    let foreign = if uses_docker {
        follow_docker(&docker, inbox.clone(), state.installation.clone())
    } else {
        watch::channel(Vec::new()).1
    };
    let next_ids = NextIds { instance: last_id + 1, swap: last_swap + 1 };
    let mut owner = Owner {
        scheduler: Scheduler::new(Arc::clone(&catalog), world, next_ids),
        shared: Arc::clone(&shared),
        inbox: receiver,
        journal: Journal::open(state.journal()),
        memory: MemoryWatch::spawn(gpus.clone(), holders, inbox.clone(), epoch),
        ports: Ports::new(catalog.settings.engine_ports),
        effects,
        metrics,
        instances: BTreeMap::new(),
        waiting: BTreeMap::new(),
        asks: BTreeMap::new(),
        facts: catalog.models.keys().map(|name| (name.clone(), Default::default())).collect(),
        learned: state.learned(&catalog),
        state,
        ledger: Arc::new(VecDeque::new()),
        follow_up: VecDeque::new(),
        last_id,
        last_swap,
        docker: DockerState {
            health: uses_docker.then(|| docker.health().borrow().clone()),
            flips: 0,
            missed: reconciled.docker_missed,
            last_id: before,
            named,
        },
        leftovers: BTreeMap::new(),
        foreign,
        shutdown: None,
        replies: Vec::new(),
    };
    owner.begin(&gpus, adopted).await;
    let handle = Handle { inbox, shared };
    let warmups = catalog.models.values().filter(|spec| spec.warmup);
    for spec in warmups {
        drop(handle.ensure_detached(spec.name.clone(), EnsureKind::Warmup, WARMUP_WITHIN));
    }
    Ok((handle, tokio::spawn(owner.run())))
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
    async fn begin(&mut self, gpus: &Gpus, adopted: Vec<Adopted>) {
        let remembered = self.learned.clone();
        for (model, Figures { learned, .. }) in remembered {
            self.step(Event::Remembered { model, learned });
        }
        for adopted in adopted {
            self.adopt(adopted);
        }
        if gpus.kind() != GpuKind::None {
            let taken_at = self.effects.now();
            let mut reading = gpus.sample().await;
            if let Ok(gpus) = &mut reading {
                self.effects.holders.attribute(gpus);
            }
            let seen = reading.map(|gpus| MemorySample { taken_at, gpus });
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
        self.became_ready(instance, &running);
        self.watch_exit(instance, &running);
        self.step(Event::Adopted { instance, model, gpus, footprint });
    }

    /// After `ShuttingDown`: ends what shall not outlive us. Everything else is adopted next time.
    pub(super) async fn stop_everything(&mut self) {
        let settings = self.shared.catalog.load_full();
        let keep_docker = settings.settings.swap.on_exit == OnExit::Keep;
        let limit = settings.settings.swap.shutdown_timeout;
        self.shared.gates.store(Arc::new(Gates::new()));
        let mut stops = Vec::new();
        for (instance, live) in std::mem::take(&mut self.instances) {
            if let Some(task) = &live.task {
                task.cancel.cancel();
            }
            let effects = self.effects.clone();
            stops.push(async move {
                if let Some(task) = live.task {
                    // Soon, unless the runtime hangs; what it still creates is reaped next time.
                    let _ = tokio::time::timeout(limit, task.join).await;
                }
                let Some(running) = live.slot.peek() else { return };
                let is_docker = matches!(running.handle, RuntimeHandle::Docker { .. });
                if is_docker && keep_docker && live.ready_at.is_some() {
                    tracing::info!(model = %live.spec.name, %instance, "kept running (on_exit: keep)");
                    return;
                }
                let mut stop = live.spec.stop.clone();
                stop.grace = stop.grace.min(limit);
                if let Err(fault) = effects.stop_within(&running, &stop).await {
                    tracing::error!(model = %live.spec.name, "{}", fault.message);
                }
            });
        }
        join_all(stops).await;
        if let Some(reply) = self.shutdown.take() {
            // Nobody may be waiting any more.
            let _ = reply.send(());
        }
    }
}
