//! Reads GPU memory and host RAM now and then, and quickly while a swap waits for proof.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::handle::{Inbox, Message};
use crate::engine::{sleep_finely, until_next_look};
use crate::gpu::{GpuKind, Gpus};
use crate::runtime::{Running, RuntimeHandle};
use crate::scheduler::event::{Event, GpuMemory, HostUse, MemorySample};
use crate::units::{GpuId, InstanceId, SwapId, Time};

const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// Tells which process on a GPU belongs to which instance.
#[derive(Clone, Debug)]
pub struct Holders {
    installation: Arc<str>,
    handles: Arc<Mutex<BTreeMap<InstanceId, RuntimeHandle>>>,
}

impl Holders {
    pub fn new(installation: &str) -> Holders {
        Holders { installation: Arc::from(installation), handles: Arc::default() }
    }

    pub fn register(&self, running: &Running) {
        self.lock().insert(running.identity.instance, running.handle.clone());
    }

    pub fn forget(&self, instance: InstanceId) {
        self.lock().remove(&instance);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<InstanceId, RuntimeHandle>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How every instance runs.
    pub fn handles(&self) -> BTreeMap<InstanceId, RuntimeHandle> {
        self.lock().clone()
    }

    pub fn attribute(&self, gpus: &mut [GpuMemory]) {
        for holder in gpus.iter_mut().flat_map(|gpu| &mut gpu.holders) {
            holder.instance = self.instance_of(holder.pid);
        }
    }

    fn instance_of(&self, pid: u32) -> Option<InstanceId> {
        if let Some(instance) = instance_in_environment(pid, &self.installation) {
            return Some(instance);
        }
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        self.lock()
            .iter()
            .find(|(_, handle)| match handle {
                RuntimeHandle::Docker { id, .. } => cgroup.contains(id.as_str()),
                RuntimeHandle::Process { .. }
                | RuntimeHandle::External
                | RuntimeHandle::Ollama { .. } => false,
            })
            .map(|(instance, _)| *instance)
    }
}

fn instance_in_environment(pid: u32, installation: &str) -> Option<InstanceId> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value = |name: &str| {
        environment
            .split(|byte| *byte == 0)
            .find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
    };
    if value("WHARF_INSTALLATION")? != installation.as_bytes() {
        return None;
    }
    std::str::from_utf8(value("WHARF_INSTANCE")?)
        .ok()?
        .trim_start_matches('i')
        .parse()
        .ok()
        .map(InstanceId)
}

/// The last reading, for views.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub gpus: Vec<GpuMemory>,
    pub utilization: BTreeMap<GpuId, f32>,
    pub error: Option<String>,
}

#[derive(Debug)]
pub struct MemoryWatch {
    wanted: watch::Sender<BTreeSet<SwapId>>,
    pub latest: watch::Receiver<Reading>,
}

impl MemoryWatch {
    pub fn spawn(
        gpus: Gpus,
        holders: Holders,
        ram: watch::Receiver<BTreeMap<InstanceId, HostUse>>,
        inbox: Inbox,
        epoch: Instant,
    ) -> MemoryWatch {
        let (wanted, wanted_rx) = watch::channel(BTreeSet::new());
        let (latest_tx, latest) = watch::channel(Reading::default());
        if gpus.kind() != GpuKind::None || gpus.host_memory().is_some() {
            let reader = Reader { gpus, holders, ram, inbox, epoch, latest: latest_tx };
            tokio::spawn(reader.run(wanted_rx));
        }
        MemoryWatch { wanted, latest }
    }

    pub fn watch(&self, swap: SwapId) {
        self.wanted.send_modify(|wanted| {
            wanted.insert(swap);
        });
    }

    /// An engine is gone or asleep: what it held may show at once.
    pub fn look_again(&self) {
        self.wanted.send_modify(|_| {});
    }

    pub fn unwatch(&self, swap: SwapId) {
        self.wanted.send_modify(|wanted| {
            wanted.remove(&swap);
        });
    }
}

struct Reader {
    gpus: Gpus,
    holders: Holders,
    ram: watch::Receiver<BTreeMap<InstanceId, HostUse>>,
    inbox: Inbox,
    epoch: Instant,
    latest: watch::Sender<Reading>,
}

impl Reader {
    async fn run(mut self, mut wanted: watch::Receiver<BTreeSet<SwapId>>) {
        let mut watched_since = Instant::now();
        loop {
            let watched = !wanted.borrow_and_update().is_empty();
            self.read(watched).await;
            let interval = match watched {
                true => until_next_look(watched_since.elapsed()),
                false => IDLE_INTERVAL,
            };
            tokio::select! {
                () = tokio::time::sleep(interval) => continue,
                changed = wanted.changed() => if changed.is_err() { return },
            }
            // Dense again. Times are whole milliseconds, and a sample counts only if it is younger
            // than the stop before it: one taken at once would be for nothing.
            watched_since = Instant::now();
            sleep_finely(until_next_millisecond(self.epoch)).await;
        }
    }

    async fn read(&mut self, watched: bool) {
        // Before the reading: a sample must never look newer than it is.
        let taken_at = Time::ZERO + self.epoch.elapsed();
        let mut reading = self.gpus.sample().await;
        if let Ok(gpus) = &mut reading {
            self.holders.attribute(gpus);
        }
        let utilization = if watched { None } else { Some(self.gpus.utilization().await) };
        self.latest.send_modify(|latest| {
            match &reading {
                Ok(gpus) => (latest.gpus, latest.error) = (gpus.clone(), None),
                Err(no_proof) => latest.error = Some(no_proof.message.clone()),
            }
            if let Some(utilization) = utilization {
                latest.utilization = utilization;
            }
        });
        let host = self.gpus.host_memory();
        let ram = self.ram.borrow().clone();
        let seen = reading.map(|gpus| MemorySample { taken_at, gpus, host, ram });
        self.inbox.send(Message::Effect(Event::MemorySeen(seen)));
    }
}

/// Until `Time` counts one more.
fn until_next_millisecond(epoch: Instant) -> Duration {
    let gone = epoch.elapsed().subsec_nanos() % 1_000_000;
    Duration::from_nanos(u64::from(1_000_000 - gone))
}
