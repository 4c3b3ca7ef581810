//! Reads what each instance takes of the host's RAM, now and then, beside the memory readings: a
//! container runtime may take a while to answer, and those must not wait for it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;

use super::memory_watch::Holders;
use crate::gpu::Gpus;
use crate::runtime::Runtimes;
use crate::scheduler::event::HostUse;
use crate::units::InstanceId;

const INTERVAL: Duration = Duration::from_secs(2);

/// The last reading of every instance that has one. On simulated GPUs none has: they belong to a
/// simulated machine.
pub fn spawn(
    gpus: &Gpus,
    runtimes: Runtimes,
    holders: Holders,
) -> watch::Receiver<BTreeMap<InstanceId, HostUse>> {
    let (seen, latest) = watch::channel(BTreeMap::new());
    if gpus.host_memory().is_some() {
        tokio::spawn(run(seen, runtimes, holders));
    }
    latest
}

async fn run(
    seen: watch::Sender<BTreeMap<InstanceId, HostUse>>,
    runtimes: Runtimes,
    holders: Holders,
) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = seen.closed() => return,
        }
        let mut reading = BTreeMap::new();
        for (instance, handle) in holders.handles() {
            if let Some(used) = runtimes.host_use(&handle).await {
                reading.insert(instance, used);
            }
        }
        seen.send_replace(reading);
    }
}
