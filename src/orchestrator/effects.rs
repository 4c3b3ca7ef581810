//! What is done for the owner outside its task: each effect runs alone and comes back as an event.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::adapters::{Seed, Surroundings};
use super::handle::{Inbox, Message};
use super::memory_watch::Holders;
use super::prepare::Prepared;
use crate::config::catalog::{ModelSpec, StopSpec};
use crate::engine;
use crate::gpu::Gpus;
use crate::runtime::{LaunchSpec, Progress, Running, RuntimeHandle, Runtimes};
use crate::scheduler::event::{Done, Event, Fault, FaultKind, GpuMemory};
use crate::telemetry::logs::Logs;
use crate::units::{Bytes, InstanceId, SwapId, Time};
use crate::upstream::UpstreamClient;

/// A stop that takes longer than its grace by this much has failed.
const STOP_MARGIN: Duration = Duration::from_secs(30);
/// Once leases were cut, their connections close at once; an engine is not made to wait for a
/// straggler among them.
const HANG_UP_WITHIN: Duration = Duration::from_millis(250);
/// Grace of an engine that failed to start or that nobody wants any more.
const FAILED_START_GRACE: Duration = Duration::from_secs(5);

/// The running engine of an instance, shared between the owner and the effect under way.
#[derive(Clone, Debug, Default)]
pub struct Slot {
    running: Arc<Mutex<Option<Running>>>,
    /// Held while a runtime creates the engine: until then nobody can say what there is to stop.
    launching: Arc<tokio::sync::Mutex<()>>,
    /// Connections that were opened before the first lease.
    opened: Arc<Mutex<Option<UpstreamClient>>>,
}

impl Slot {
    pub fn holding(running: Running) -> Slot {
        Slot { running: Arc::new(Mutex::new(Some(running))), ..Slot::default() }
    }

    pub fn peek(&self) -> Option<Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn take_opened(&self) -> Option<UpstreamClient> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).take()
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
    /// Where engines' lines are copied to.
    pub logs: Logs,
}

impl Effects {
    pub fn now(&self) -> Time {
        Time::ZERO + self.epoch.elapsed()
    }

    fn done(&self, swap: SwapId, instance: InstanceId, done: Done) {
        self.inbox.send(Message::Effect(Event::MoveDone { swap, instance, done }));
    }

    /// Runs `work` until it ends or is called off; only a result that was not called off is told.
    fn spawn<T, F>(
        &self,
        swap: SwapId,
        instance: InstanceId,
        done: fn(Result<T, Fault>) -> Done,
        work: F,
    ) -> Task
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        let (effects, cancel) = (self.clone(), CancellationToken::new());
        let cancelled = cancel.clone();
        let join = tokio::spawn(async move {
            tokio::select! {
                biased;
                () = cancelled.cancelled() => {}
                result = unpanicked(work) => effects.done(swap, instance, done(result)),
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
        self.spawn(swap, id, Done::Preflight, async move { runtimes.preflight(&launch?).await })
    }

    pub fn fetch(&self, swap: SwapId, launch: LaunchSpec, progress: Progress) -> Task {
        let runtimes = self.runtimes.clone();
        self.spawn(swap, launch.identity.instance, Done::Fetch, async move {
            runtimes.fetch(&launch, &progress).await
        })
    }

    pub fn start(
        &self,
        swap: SwapId,
        launch: LaunchSpec,
        slot: Slot,
        prepared: Prepared,
        deadline: Time,
        adapters: (Seed, Surroundings),
    ) -> Task {
        let (effects, cancel) = (self.clone(), CancellationToken::new());
        let cancelled = cancel.clone();
        let join = tokio::spawn(async move {
            let Prepared { made, reading, progress } = prepared;
            let instance = launch.identity.instance;
            let deadline = effects.epoch + Duration::from_millis(deadline.0);
            // Called off while it is being created, it is created first and then stopped: a call to
            // Docker that is cut half-way is carried out all the same, when nobody looks any more.
            let launching = slot.launching.lock().await;
            if cancelled.is_cancelled() {
                return;
            }
            let before = unpanicked(async { Ok(effects.read_memory().await) });
            let before = before.await.ok().flatten();
            let made = made.take().await;
            progress.set("launch", None, "");
            let launched = unpanicked(effects.runtimes.start(&launch, made)).await;
            if let Ok(running) = &launched {
                effects.holders.register(running);
                effects.logs.copy(&running.identity.model, &running.log);
                slot.put(Some(running.clone()));
            }
            drop(launching);
            let rest = async {
                let brought = match launched {
                    Ok(mut running) => {
                        let before = before.as_deref();
                        let up = async {
                            effects.learn_key(&launch.model, &mut running).await;
                            slot.put(Some(running.clone()));
                            effects
                                .bring_up(swap, &launch, &running, before, &progress, deadline)
                                .await
                                .map(|footprint| (footprint, running))
                        };
                        unpanicked(up).await
                    }
                    Err(fault) => Err(fault),
                };
                match brought {
                    Ok((footprint, running)) => {
                        // What is read by now is all that the engine wants.
                        drop(reading);
                        let (seed, around) = adapters;
                        let client = UpstreamClient::to(&running.endpoint);
                        // Should it fail, the first request tries again and says why.
                        let (_, ()) = tokio::join!(
                            client.open_ahead(),
                            seed.keep(running.clone(), around, false)
                        );
                        slot.opened.lock().unwrap_or_else(PoisonError::into_inner).replace(client);
                        Ok(footprint)
                    }
                    Err(fault) => Err(effects.clear_failed_start(&slot, fault).await),
                }
            };
            tokio::select! {
                biased;
                () = cancelled.cancelled() => {}
                result = unpanicked(rest) => effects.done(swap, instance, Done::Start(result)),
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
        if let RuntimeHandle::Ollama { .. } = running.handle {
            return self.bring_up_in_ollama(swap, launch, running, progress, deadline).await;
        }
        tokio::select! {
            ready = engine::wait_ready(spec, running, progress, deadline.into()) => ready?,
            never = self.runtimes.follow_unfinished(running) => match never {},
        }
        self.inbox.send(Message::Effect(Event::Vouching { swap, instance }));
        let mut exit = running.exit.clone();
        let gpus = &launch.identity.gpus;
        let vouch = async {
            let footprint = self.vouch_memory(spec, gpus, instance, before).await?;
            engine::first_request(spec, running).await?;
            Ok(footprint)
        };
        tokio::select! {
            vouched = vouch => vouched,
            Some(report) = ended(&mut exit) => Err(Fault::new(
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
                let why = stuck.public_message();
                fault = fault.and(&format!("; and it could not be stopped: {why}"));
            }
        }
        fault
    }

    /// Calls off what is under way for the instance, then ends it, after our own `connections` to it
    /// are closed: many a server waits for those before it exits.
    pub fn stop(
        &self,
        swap: SwapId,
        instance: InstanceId,
        under_way: Option<Task>,
        slot: Slot,
        spec: Arc<ModelSpec>,
        connections: Option<CancellationToken>,
    ) {
        let effects = self.clone();
        tokio::spawn(async move {
            let was_starting = under_way.is_some();
            if let Some(task) = under_way {
                task.cancel.cancel();
                // Soon: a start under way gets its engine created first. A panic is as good as an end.
                let _ = task.join.await;
            }
            // Opened for a first request that does not come.
            drop(slot.take_opened());
            // A second attempt to stop it finds no task, but perhaps the same creation under way.
            drop(slot.launching.lock().await);
            let mut stop = spec.stop.clone();
            if was_starting {
                stop.grace = stop.grace.min(FAILED_START_GRACE);
            }
            let stopped = match slot.peek() {
                Some(running) => {
                    if !was_starting {
                        engine::release(&spec, &running).await;
                    }
                    hung_up(connections).await;
                    unpanicked(effects.stop_within(&running, &stop)).await
                }
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
        self.spawn(swap, instance, Done::Sleep, async move {
            let running = slot.peek().ok_or_else(|| gone(&spec))?;
            engine::sleep(&spec, &running).await?;
            Ok(effects.held_by(instance, &running.identity.gpus).await)
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
        self.spawn(swap, instance, Done::Wake, async move {
            let running = slot.peek().ok_or_else(|| gone(&spec))?;
            let left = deadline.since(effects.now());
            match tokio::time::timeout(left, engine::wake(&spec, &running)).await {
                Ok(woken) => woken?,
                Err(_) => {
                    let message = format!("{} did not wake within {left:?}", spec.name);
                    return Err(Fault::new(FaultKind::TimedOut, message));
                }
            }
            Ok(effects.held_by(instance, &running.identity.gpus).await)
        })
    }
}

/// A swap must not wait for ever for an effect that panicked.
async fn unpanicked<T>(work: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    match AssertUnwindSafe(work).catch_unwind().await {
        Ok(result) => result,
        Err(panic) => {
            let said = panic.downcast_ref::<&str>().map(ToString::to_string);
            let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
            let said = said.unwrap_or_else(|| "no message".to_owned());
            let message = format!("a fault in Wharf itself, please report it: {said}");
            Err(Fault::new(FaultKind::Internal, message))
        }
    }
}

/// Waits until our connections to an engine are closed.
pub async fn hung_up(connections: Option<CancellationToken>) {
    let Some(closed) = connections else { return };
    let began = Instant::now();
    // The engine's grace is worth more than a straggler.
    let _ = tokio::time::timeout(HANG_UP_WITHIN, closed.cancelled()).await;
    tracing::debug!(ms = began.elapsed().as_millis() as u64, "connections to the engine closed");
}

fn gone(spec: &ModelSpec) -> Fault {
    Fault::new(FaultKind::Exited, format!("{}: its engine is gone", spec.name))
}

/// Resolves when the engine ended. `None`: nobody watches it any more, its end is never seen.
pub async fn ended(
    exit: &mut tokio::sync::watch::Receiver<Option<crate::runtime::ExitReport>>,
) -> Option<crate::runtime::ExitReport> {
    exit.wait_for(Option::is_some).await.ok()?.clone()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::runtime::docker::DockerRuntime;
    use crate::runtime::external::ExternalRuntime;
    use crate::runtime::ollama::OllamaRuntime;
    use crate::runtime::process::ProcessRuntime;

    #[tokio::test]
    async fn an_effect_that_panics_ends_as_an_internal_fault_of_its_swap() {
        let yaml = "gpu: { provider: none }\nmodels: { a: { engine: openai, process: { cmd: x }, port: 9001, gpus: 0 } }";
        let catalog = config::parse(yaml, "models.yaml", &|_| None).unwrap().catalog;
        let dir = tempfile::tempdir().unwrap();
        let (inbox, mut messages) = Inbox::new();
        let effects = Effects {
            runtimes: Runtimes {
                process: ProcessRuntime::default(),
                docker: DockerRuntime::new(None),
                external: ExternalRuntime::default(),
                ollama: OllamaRuntime::default(),
            },
            gpus: Gpus::open(&catalog.settings.gpu, dir.path()).await.unwrap(),
            inbox,
            holders: Holders::new("here"),
            epoch: Instant::now(),
            logs: Logs::default(),
        };
        effects.spawn(SwapId(3), InstanceId(4), Done::Fetch, async { panic!("out of {}", "luck") });
        let Some(Message::Effect(Event::MoveDone { swap, instance, done })) = messages.recv().await
        else {
            panic!("the end of the effect");
        };
        let Done::Fetch(Err(fault)) = done else { panic!("{done:?}") };
        assert_eq!((swap, instance, fault.kind), (SwapId(3), InstanceId(4), FaultKind::Internal));
        assert!(fault.message.contains("out of luck"), "{}", fault.message);
    }

    #[tokio::test]
    async fn neither_closed_connections_nor_a_straggler_hold_up_a_stop() {
        let connections = CancellationToken::new();
        let ends = async |connections| {
            let patience = Duration::from_secs(30);
            tokio::time::timeout(patience, hung_up(connections)).await.expect("it goes on");
        };
        ends(Some(connections.clone())).await;
        connections.cancel();
        ends(Some(connections)).await;
        ends(None).await;
    }
}
