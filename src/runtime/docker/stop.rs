//! Signal, grace, kill, remove.

use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;
use bollard::query_parameters::{
    KillContainerOptions, KillContainerOptionsBuilder, WaitContainerOptionsBuilder,
};
use futures_util::StreamExt as _;
use tokio::time::{Instant, timeout, timeout_at};

use super::client::{Client, PROMPT};
use super::{DockerRuntime, errors, find, start, watched};
use crate::config::catalog::StopSpec;
use crate::scheduler::event::{Fault, FaultKind};

/// From SIGKILL until the kernel has torn a process with a GPU context down.
const DEATH: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(100);

/// `Ok`: the container does not run (any more), and is being removed unless it is a named one.
///
/// Docker's own stop call is not used: before API 1.42 it cannot be told the signal, and its
/// answer comes only after the whole grace.
pub async fn stop(
    runtime: &DockerRuntime,
    id: &str,
    named: bool,
    stop: &StopSpec,
) -> Result<(), Fault> {
    let client = &runtime.client;
    if signal(client, id, &stop.signal).await? && !ended_within(client, id, stop.grace).await? {
        tracing::warn!(container = id, grace = ?stop.grace, "did not stop in time: killed");
        signal(client, id, "SIGKILL").await?;
        if !ended_within(client, id, DEATH).await? {
            return Err(Fault::new(
                FaultKind::StopFailed,
                format!(
                    "container {} still runs {} s after SIGKILL: its process hangs in the kernel \
                     (a GPU driver fault, see `dmesg`), or Docker is stuck (restart it)",
                    short(id),
                    DEATH.as_secs()
                ),
            ));
        }
    }
    if named {
        // Its id stays: nothing that is told of this run may come after the next one's begin.
        runtime.watched.look(client, id, None).await;
        return Ok(());
    }
    // It does not run, so its memory is on its way: nobody has to wait for the rest.
    let (runtime, id) = (runtime.clone(), id.to_owned());
    let clearing = runtime.clearing.clone();
    clearing.spawn(async move {
        // Before the removal, while the exit code can still be read.
        runtime.watched.look(&runtime.client, &id, None).await;
        if let Err(fault) = start::remove(&runtime.client, &id).await {
            // The leftover goes at the next start.
            tracing::warn!(container = id, reason = fault.message, "stopped but not removed");
        }
    });
    Ok(())
}

/// Stops a named container that runs without being an instance of ours.
pub async fn stop_named(runtime: &DockerRuntime, name: &str, how: &StopSpec) -> Result<(), Fault> {
    let Some(found) = find::find_named(&runtime.client, name).await? else { return Ok(()) };
    if !found.alive {
        return Ok(());
    }
    tracing::warn!(
        container = name,
        "runs though Wharf did not start it: stopped, to start it anew"
    );
    stop(runtime, &found.id, true, how).await
}

pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// `false`: nothing runs that could be signalled.
async fn signal(client: &Client, id: &str, signal: &str) -> Result<bool, Fault> {
    let docker = client.docker().await?;
    let options = KillContainerOptionsBuilder::new().signal(signal).build();
    let sent = kill(&docker, id, options.clone()).await;
    let sent = match sent {
        // A paused container takes no signal.
        Err(error) if errors::words(&error).is_some_and(|words| words.contains("is paused")) => {
            client.within(PROMPT, docker.unpause_container(id)).await?;
            kill(&docker, id, options).await
        }
        sent => sent,
    };
    match sent {
        Ok(()) => Ok(true),
        Err(error) if errors::is_missing(&error) => Ok(false),
        Err(error) => {
            if !running(client, &docker, id).await? {
                return Ok(false);
            }
            let fault = errors::fault(client.host(), &format!("signal {}", short(id)), &error);
            match fault.kind {
                FaultKind::RuntimeUnreachable => Err(fault),
                _ => Err(Fault { kind: FaultKind::StopFailed, ..fault }),
            }
        }
    }
}

async fn kill(docker: &Docker, id: &str, options: KillContainerOptions) -> Result<(), Error> {
    timeout(PROMPT, docker.kill_container(id, Some(options)))
        .await
        .unwrap_or(Err(Error::RequestTimeoutError))
}

/// Missing counts as not running; no answer is an error.
pub async fn running(client: &Client, docker: &Docker, id: &str) -> Result<bool, Fault> {
    match timeout(PROMPT, docker.inspect_container(id, None)).await {
        Ok(Ok(container)) => Ok(container.state.as_ref().is_some_and(watched::is_running)),
        Ok(Err(error)) if errors::is_missing(&error) => Ok(false),
        Ok(Err(error)) => Err(errors::fault(client.host(), "inspect a container", &error)),
        Err(_) => Err(errors::silent(client.host(), PROMPT)),
    }
}

/// Waits until the container does not run, at most `limit`.
async fn ended_within(client: &Client, id: &str, limit: Duration) -> Result<bool, Fault> {
    let deadline = Instant::now() + limit;
    loop {
        let docker = client.docker().await?;
        let options = WaitContainerOptionsBuilder::new().condition("not-running").build();
        let mut wait = docker.wait_container(id, Some(options));
        // What it says is of no interest (a non-zero exit is an `Err` in bollard): look ourselves.
        let _ = timeout_at(deadline, wait.next()).await;
        if !running(client, &docker, id).await? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        // The wait broke off early.
        tokio::time::sleep(RETRY).await;
    }
}
