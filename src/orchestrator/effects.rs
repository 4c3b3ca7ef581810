//! What is done for the owner outside its task: each effect runs alone and comes back as an event.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::handle::{Inbox, Message};
use super::memory_watch::Holders;
use crate::config::catalog::{ModelSpec, StopSpec, Vram};
use crate::engine;
use crate::gpu::{GpuKind, Gpus};
use crate::runtime::{LaunchSpec, Progress, Running, Runtimes};
use crate::scheduler::event::{Done, Event, Fault, FaultKind, GpuMemory};
use crate::units::{Bytes, GpuId, InstanceId, SwapId, Time};

/// A stop that takes longer than its grace by this much has failed.
const STOP_MARGIN: Duration = Duration::from_secs(30);
/// Grace of an engine that failed to start or that nobody wants any more.
const FAILED_START_GRACE: Duration = Duration::from_secs(5);
/// Engines show their memory in the driver's list a little after they answer.
const VRAM_VISIBLE_WITHIN: Duration = Duration::from_secs(3);

/// The running engine of an instance, shared between the owner and the effect under way.
#[derive(Clone, Debug, Default)]
pub struct Slot {
    running: Arc<Mutex<Option<Running>>>,
    /// Held while a runtime creates the engine: until then nobody can say what there is to stop.
    launching: Arc<tokio::sync::Mutex<()>>,
}

impl Slot {
    pub fn holding(running: Running) -> Slot {
        Slot { running: Arc::new(Mutex::new(Some(running))), launching: Arc::default() }
    }

    pub fn peek(&self) -> Option<Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, running: Option<Running>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = running;
    }
}

/// An effect that can be called off.
#[derive(Debug)]
pub struct Task {
    pub cancel: CancellationToken,
    pub join: JoinHandle<()>,
}

#[derive(Clone, Debug)]
pub struct Effects {
    pub runtimes: Runtimes,
    pub gpus: Gpus,
    pub inbox: Inbox,
    pub holders: Holders,
    pub epoch: Instant,
}

impl Effects {
    pub fn now(&self) -> Time {
        Time::ZERO + self.epoch.elapsed()
    }

    fn done(&self, swap: SwapId, instance: InstanceId, done: Done) {
        self.inbox.send(Message::Effect(Event::MoveDone { swap, instance, done }));
    }

    /// Runs `work` until it ends or is called off; only a result that was not called off is told.
    fn spawn<F>(&self, swap: SwapId, instance: InstanceId, work: F) -> Task
    where
        F: Future<Output = Done> + Send + 'static,
    {
        let (effects, cancel) = (self.clone(), CancellationToken::new());
        let cancelled = cancel.clone();
        let join = tokio::spawn(async move {
            tokio::select! {
                biased;
                () = cancelled.cancelled() => {}
                done = work => effects.done(swap, instance, done),
            }
        });
        Task { cancel, join }
    }

    pub fn preflight(
        &self,
        swap: SwapId,
        launch: Result<LaunchSpec, Fault>,
        id: InstanceId,
    ) -> Task {
        let runtimes = self.runtimes.clone();
        self.spawn(swap, id, async move {
            Done::Preflight(match launch {
                Ok(launch) => runtimes.preflight(&launch).await,
                Err(fault) => Err(fault),
            })
        })
    }

    pub fn fetch(&self, swap: SwapId, launch: LaunchSpec, progress: Progress) -> Task {
        let runtimes = self.runtimes.clone();
        self.spawn(swap, launch.identity.instance, async move {
            Done::Fetch(runtimes.fetch(&launch, &progress).await)
        })
    }

    pub fn start(
        &self,
        swap: SwapId,
        launch: LaunchSpec,
        slot: Slot,
        progress: Progress,
        deadline: Time,
    ) -> Task {
        let (effects, cancel) = (self.clone(), CancellationToken::new());
        let cancelled = cancel.clone();
        let join = tokio::spawn(async move {
            let instance = launch.identity.instance;
            let deadline = effects.epoch + Duration::from_millis(deadline.0);
            // Called off while it is being created, it is created first and then stopped: a call to
            // Docker that is cut half-way is carried out all the same, when nobody looks any more.
            let launching = slot.launching.lock().await;
            if cancelled.is_cancelled() {
                return;
            }
            let before = effects.read_memory().await;
            progress.set("launch", None, "");
            let mut launched = effects.runtimes.start(&launch).await;
            if let Ok(running) = &mut launched {
                effects.learn_key(&launch.model, running).await;
                effects.holders.register(running);
                slot.put(Some(running.clone()));
            }
            drop(launching);
            let rest = async {
                let brought = match launched {
                    Ok(running) => {
                        let before = before.as_deref();
                        effects.bring_up(swap, &launch, &running, before, &progress, deadline).await
                    }
                    Err(fault) => Err(fault),
                };
                Done::Start(match brought {
                    Ok(footprint) => Ok(footprint),
                    Err(fault) => Err(effects.clear_failed_start(&slot, fault).await),
                })
            };
            tokio::select! {
                biased;
                () = cancelled.cancelled() => {}
                done = rest => effects.done(swap, instance, done),
            }
        });
        Task { cancel, join }
    }

    async fn bring_up(
        &self,
        swap: SwapId,
        launch: &LaunchSpec,
        running: &Running,
        before: Option<&[GpuMemory]>,
        progress: &Progress,
        deadline: Instant,
    ) -> Result<Option<Bytes>, Fault> {
        let (spec, instance) = (&launch.model, launch.identity.instance);
        engine::wait_ready(spec, running, progress, deadline.into()).await?;
        self.inbox.send(Message::Effect(Event::Vouching { swap, instance }));
        let mut exit = running.exit.clone();
        let gpus = &launch.identity.gpus;
        let vouch = async {
            let footprint = self.vouch_memory(spec, gpus, instance, before).await?;
            if spec.canary {
                engine::canary(spec, running).await?;
            }
            Ok(footprint)
        };
        tokio::select! {
            vouched = vouch => vouched,
            report = ended(&mut exit) => Err(Fault::new(
                FaultKind::Exited,
                format!("{}: the engine {report} right after it became ready", spec.name),
            )
            .with_log(running.log.last(20))),
        }
    }

    async fn clear_failed_start(&self, slot: &Slot, mut fault: Fault) -> Fault {
        let Some(running) = slot.peek() else { return fault };
        if fault.log_tail.is_empty() {
            fault.log_tail = running.log.last(20);
        }
        let stop = StopSpec { signal: "SIGTERM".to_owned(), grace: FAILED_START_GRACE };
        match self.stop_within(&running, &stop).await {
            Ok(()) => slot.put(None),
            Err(stuck) => {
                fault
                    .message
                    .push_str(&format!("; and it could not be stopped: {}", stuck.message));
            }
        }
        fault
    }

    /// Calls off what is under way for the instance, then ends it.
    pub fn stop(
        &self,
        swap: SwapId,
        instance: InstanceId,
        under_way: Option<Task>,
        slot: Slot,
        spec: Arc<ModelSpec>,
    ) {
        let effects = self.clone();
        tokio::spawn(async move {
            let was_starting = under_way.is_some();
            if let Some(task) = under_way {
                task.cancel.cancel();
                // Soon: a start under way gets its engine created first. A panic is as good as an end.
                let _ = task.join.await;
            }
            // A second attempt to stop it finds no task, but perhaps the same creation under way.
            drop(slot.launching.lock().await);
            let mut stop = spec.stop.clone();
            if was_starting {
                stop.grace = stop.grace.min(FAILED_START_GRACE);
            }
            let stopped = match slot.peek() {
                Some(running) => effects.stop_within(&running, &stop).await,
                None => Ok(()),
            };
            if stopped.is_ok() {
                slot.put(None);
                effects.holders.forget(instance);
            }
            effects.done(swap, instance, Done::Stop(stopped));
        });
    }

    /// Stops one engine within its grace and a margin.
    pub async fn stop_within(&self, running: &Running, stop: &StopSpec) -> Result<(), Fault> {
        let limit = stop.grace + STOP_MARGIN;
        match tokio::time::timeout(limit, self.runtimes.stop(running, stop)).await {
            Ok(stopped) => stopped,
            Err(_) => Err(Fault::new(
                FaultKind::StopFailed,
                format!(
                    "{} did not end within {limit:?}, SIGKILL included",
                    running.identity.model
                ),
            )),
        }
    }

    pub fn sleep(
        &self,
        swap: SwapId,
        instance: InstanceId,
        slot: Slot,
        spec: Arc<ModelSpec>,
    ) -> Task {
        let effects = self.clone();
        self.spawn(swap, instance, async move {
            let Some(running) = slot.peek() else {
                return Done::Sleep(Err(gone(&spec)));
            };
            Done::Sleep(match engine::sleep(&spec, &running).await {
                Ok(()) => Ok(effects.held_by(instance, &running.identity.gpus).await),
                Err(fault) => Err(fault),
            })
        })
    }

    pub fn wake(
        &self,
        swap: SwapId,
        instance: InstanceId,
        slot: Slot,
        spec: Arc<ModelSpec>,
        deadline: Time,
    ) -> Task {
        let effects = self.clone();
        self.spawn(swap, instance, async move {
            let Some(running) = slot.peek() else {
                return Done::Wake(Err(gone(&spec)));
            };
            let left = deadline.since(effects.now());
            Done::Wake(match tokio::time::timeout(left, engine::wake(&spec, &running)).await {
                Ok(Ok(())) => Ok(effects.held_by(instance, &running.identity.gpus).await),
                Ok(Err(fault)) => Err(fault),
                Err(_) => Err(Fault::new(
                    FaultKind::TimedOut,
                    format!("{} did not wake within {left:?}", spec.name),
                )),
            })
        })
    }

    async fn read_memory(&self) -> Option<Vec<GpuMemory>> {
        if self.gpus.kind() == GpuKind::None {
            return None;
        }
        let mut gpus = self.gpus.sample().await.ok()?;
        self.holders.attribute(&mut gpus);
        Some(gpus)
    }

    /// The largest number of bytes that the instance holds on one of its GPUs, where visible.
    pub async fn held_by(&self, instance: InstanceId, gpus: &[GpuId]) -> Option<Bytes> {
        held(&self.read_memory().await?, instance, gpus)
    }

    /// GPUs on which the instance is seen to hold memory.
    pub async fn gpus_held_by(&self, instance: InstanceId) -> Vec<GpuId> {
        let memory = self.read_memory().await.unwrap_or_default();
        let holds =
            |gpu: &&GpuMemory| gpu.holders.iter().any(|holder| holder.instance == Some(instance));
        memory.iter().filter(holds).map(|gpu| gpu.gpu).collect()
    }

    /// An engine that declared VRAM and holds none runs on the CPU: not what was promised.
    async fn vouch_memory(
        &self,
        spec: &ModelSpec,
        gpus: &[GpuId],
        instance: InstanceId,
        before: Option<&[GpuMemory]>,
    ) -> Result<Option<Bytes>, Fault> {
        let Some(before) = before else { return Ok(None) };
        let declared = match spec.vram {
            Vram::Declared(bytes) => bytes,
            Vram::Unknown | Vram::Rest => Bytes::mib(1),
        };
        if gpus.is_empty() || declared == Bytes::ZERO {
            return Ok(None);
        }
        let until = Instant::now() + VRAM_VISIBLE_WITHIN;
        loop {
            let now = self.read_memory().await;
            if let Some(now) = &now {
                if let Some(bytes) = held(now, instance, gpus) {
                    return Ok(Some(bytes));
                }
                // Host pids are invisible under WSL and in containers: then bytes must have moved.
                if fell_by(before, now, gpus) >= Bytes(declared.0 / 4) {
                    return Ok(None);
                }
            }
            if Instant::now() >= until {
                return Err(Fault::new(
                    FaultKind::RunsOnCpu,
                    format!(
                        "{}: the engine runs on the CPU: it answers, but holds no memory on GPU {} \
                         where {declared} are declared; check its GPU build and driver, or set \
                         `gpus: 0`",
                        spec.name,
                        gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                    ),
                ));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn gone(spec: &ModelSpec) -> Fault {
    Fault::new(FaultKind::Exited, format!("{}: its engine is gone", spec.name))
}

fn held(memory: &[GpuMemory], instance: InstanceId, gpus: &[GpuId]) -> Option<Bytes> {
    memory
        .iter()
        .filter(|gpu| gpus.contains(&gpu.gpu))
        .map(|gpu| {
            gpu.holders
                .iter()
                .filter(|holder| holder.instance == Some(instance))
                .map(|holder| holder.bytes)
                .sum::<Bytes>()
        })
        .max()
        .filter(|bytes| *bytes > Bytes::ZERO)
}

fn fell_by(before: &[GpuMemory], now: &[GpuMemory], gpus: &[GpuId]) -> Bytes {
    let free = |memory: &[GpuMemory]| {
        memory.iter().filter(|gpu| gpus.contains(&gpu.gpu)).map(|gpu| gpu.free).sum::<Bytes>()
    };
    free(before) - free(now)
}

/// Resolves when the engine ended.
pub async fn ended(
    exit: &mut tokio::sync::watch::Receiver<Option<crate::runtime::ExitReport>>,
) -> crate::runtime::ExitReport {
    let report = match exit.wait_for(Option::is_some).await {
        Ok(report) => report.clone(),
        Err(_) => None,
    };
    match report {
        Some(report) => report,
        // Nobody watches this engine (external): its end is never seen.
        None => std::future::pending().await,
    }
}
