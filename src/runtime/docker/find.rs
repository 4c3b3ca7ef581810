//! Which containers are ours, which of them run, and which strangers hold a GPU.

use std::collections::HashMap;

use bollard::models::{ContainerInspectResponse, HostConfig};
use bollard::query_parameters::{ListContainersOptionsBuilder, StatsOptionsBuilder};
use futures_util::TryStreamExt as _;
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::timeout;

use super::client::{Client, PROMPT};
use super::{DockerRuntime, errors, labels, place, start, watched};
use crate::runtime::host_use::of_counters;
use crate::runtime::redact::Secrets;
use crate::runtime::{Endpoint, Foreign, Found, Given, Identity, LogTail, Running, RuntimeHandle};
use crate::scheduler::event::{Fault, HostUse};
use crate::units::InstanceId;

/// A container named in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedContainer {
    pub id: String,
    pub name: String,
    pub alive: bool,
}

/// What a look through all containers brought.
#[derive(Debug)]
pub struct FoundAll {
    pub found: Vec<Found>,
    pub silent: Vec<Silent>,
}

/// A container of ours that Docker lists but could not say more of.
#[derive(Debug)]
pub struct Silent {
    pub id: String,
    pub instance: Option<InstanceId>,
    pub fault: Fault,
}

/// Every container with this installation's label, running or not. A fetch of weights that an
/// earlier run left behind is removed.
pub async fn find(runtime: &DockerRuntime, installation: &str) -> Result<FoundAll, Fault> {
    let client = &runtime.client;
    let docker = client.docker().await?;
    let label = format!("{}={installation}", labels::INSTALLATION);
    let filters = HashMap::from([("label", vec![label])]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    let ours = client.within(PROMPT, docker.list_containers(Some(options))).await?;
    let (mut ids, mut left) = (Vec::new(), Vec::new());
    for summary in ours {
        let (Some(id), Some(labels)) = (summary.id, summary.labels) else { continue };
        if !labels::is_errand(&labels) {
            ids.push((id, labels::instance(&labels)));
        } else if !labels::is_of_run(&labels, &runtime.run) {
            left.push(id);
        }
    }
    // At once, and each for itself: one that Docker holds locked must not delay or hide the others.
    join_all(left.iter().map(|id| remove_errand(client, id))).await;
    let looks = join_all(ids.iter().map(|(id, _)| look(runtime, id))).await;
    let (mut found, mut silent) = (Vec::new(), Vec::new());
    for ((id, instance), look) in ids.into_iter().zip(looks) {
        match look {
            Ok(one) => found.extend(one),
            Err(fault) => silent.push(Silent { id, instance, fault }),
        }
    }
    found.sort_by_key(|found: &Found| found.running.identity.instance);
    Ok(FoundAll { found, silent })
}

async fn remove_errand(client: &Client, id: &str) {
    tracing::info!(container = id, "removing a fetch of weights of an earlier run");
    match timeout(PROMPT, start::remove(client, id)).await {
        Ok(Ok(())) => {}
        Ok(Err(fault)) => tracing::warn!(container = id, reason = fault.message, "not removed"),
        Err(_) => tracing::warn!(container = id, "not removed within {PROMPT:?}"),
    }
}

/// `None`: gone meanwhile, or not really ours.
async fn look(runtime: &DockerRuntime, id: &str) -> Result<Option<Found>, Fault> {
    let client = &runtime.client;
    let docker = client.docker().await?;
    match timeout(PROMPT, docker.inspect_container(id, None)).await {
        Ok(Ok(container)) => adopt(runtime, container).await,
        Ok(Err(error)) if errors::is_missing(&error) => Ok(None),
        Ok(Err(error)) => Err(errors::fault(client.host(), "inspect", &error)),
        Err(_) => Err(errors::silent(client.host(), PROMPT)),
    }
}

async fn adopt(
    runtime: &DockerRuntime,
    container: ContainerInspectResponse,
) -> Result<Option<Found>, Fault> {
    let client = &runtime.client;
    let id = container.id.clone().unwrap_or_default();
    let name = container.name.clone().unwrap_or_default().trim_start_matches('/').to_owned();
    let labels = container.config.as_ref().and_then(|config| config.labels.as_ref());
    let Some((identity, container_port)) = labels.and_then(labels::read) else {
        tracing::warn!(container = name, "has our label but not all of them: left alone");
        return Ok(None);
    };
    let ended = container.state.as_ref().and_then(watched::ended);
    let alive = ended.is_none();
    let (log, exit) = if alive {
        runtime.watched.watch(client, &id, None, secrets(&container))
    } else {
        // The sender is dropped: nothing more will happen to it.
        (LogTail::new(), watch::channel(ended).1)
    };
    let place = runtime.place.get(client).await?;
    let base = match place::endpoint(client, place, &container, container_port).await {
        Ok(base) => base,
        // What cannot be reached is found all the same, so that it can be stopped.
        Err(_) => format!("http://127.0.0.1:{}", identity.port),
    };
    let handle = RuntimeHandle::Docker { id, name, named: false };
    let endpoint = Endpoint::new(base, None);
    Ok(Some(Found { running: Running { identity, endpoint, handle, log, exit }, alive }))
}

/// `None`: no such container.
pub async fn find_named(client: &Client, name: &str) -> Result<Option<NamedContainer>, Fault> {
    let docker = client.docker().await?;
    match timeout(PROMPT, docker.inspect_container(name, None)).await {
        Ok(Ok(container)) => Ok(Some(NamedContainer {
            id: container.id.unwrap_or_default(),
            name: name.to_owned(),
            alive: container.state.as_ref().is_some_and(watched::is_running),
        })),
        Ok(Err(error)) if errors::is_missing(&error) => Ok(None),
        Ok(Err(error)) => Err(errors::fault(client.host(), "inspect a container", &error)),
        Err(_) => Err(errors::silent(client.host(), PROMPT)),
    }
}

/// A named container that runs already, as an instance of ours. `None`: it does not run.
pub async fn adopt_named(
    runtime: &DockerRuntime,
    name: &str,
    identity: Identity,
    container_port: u16,
) -> Result<Option<Running>, Fault> {
    let client = &runtime.client;
    let docker = client.docker().await?;
    let container = match timeout(PROMPT, docker.inspect_container(name, None)).await {
        Ok(Ok(container)) => container,
        Ok(Err(error)) if errors::is_missing(&error) => return Ok(None),
        Ok(Err(error)) => return Err(errors::fault(client.host(), "inspect a container", &error)),
        Err(_) => return Err(errors::silent(client.host(), PROMPT)),
    };
    if !container.state.as_ref().is_some_and(watched::is_running) {
        return Ok(None);
    }
    let earlier_run = container.state.as_ref().and_then(|state| state.finished_at.as_deref());
    let id = container.id.clone().unwrap_or_default();
    let (log, exit) = runtime.watched.watch(client, &id, earlier_run, secrets(&container));
    let place = runtime.place.get(client).await?;
    let base = place::endpoint(client, place, &container, container_port).await?;
    Ok(Some(Running {
        identity,
        endpoint: Endpoint::new(base, None),
        handle: RuntimeHandle::Docker { id, name: name.to_owned(), named: true },
        log,
        exit,
    }))
}

/// What of a container's environment its log must not show.
pub fn secrets(container: &ContainerInspectResponse) -> Secrets {
    let env = container.config.iter().flat_map(|config| config.env.iter().flatten());
    Secrets::of_env(env.filter_map(|entry| entry.split_once('=')))
}

/// What a container was given; nothing where it cannot be looked at.
pub async fn given(client: &Client, id: &str) -> Given {
    let Some(container) = inspect_patiently(client, id).await else { return Given::default() };
    let args = container.path.into_iter().chain(container.args.into_iter().flatten()).collect();
    let env = container.config.and_then(|config| config.env).unwrap_or_default();
    let pair = |entry: &String| {
        let (name, value) = entry.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    Given { args, env: env.iter().filter_map(pair).collect() }
}

/// Without its key a healthy engine would look as if it refused us: worth more than one attempt.
async fn inspect_patiently(client: &Client, id: &str) -> Option<ContainerInspectResponse> {
    const ATTEMPTS: usize = 3;
    for _ in 0..ATTEMPTS {
        let docker = client.docker().await.ok()?;
        match client.within(PROMPT, docker.inspect_container(id, None)).await {
            Ok(container) => return Some(container),
            Err(fault) => tracing::warn!(container = id, "its key is not known: {}", fault.message),
        }
    }
    None
}

/// Host pids of a running container; empty where they cannot be read.
pub async fn pids(client: &Client, id: &str) -> Vec<u32> {
    let Ok(docker) = client.docker().await else { return Vec::new() };
    let Ok(top) = client.within(PROMPT, docker.top_processes(id, None)).await else {
        return Vec::new();
    };
    let titles = top.titles.unwrap_or_default();
    let Some(column) = titles.iter().position(|title| title == "PID") else { return Vec::new() };
    let rows = top.processes.unwrap_or_default();
    rows.iter().filter_map(|row| row.get(column)?.parse().ok()).collect()
}

pub async fn host_use(client: &Client, id: &str) -> Option<HostUse> {
    let docker = client.docker().await.ok()?;
    let once = StatsOptionsBuilder::new().stream(false).one_shot(true).build();
    let mut readings = std::pin::pin!(docker.stats(id, Some(once)));
    let memory = client.within(PROMPT, readings.try_next()).await.ok()??.memory_stats?;
    let counters = memory.stats.unwrap_or_default();
    Some(of_counters(memory.usage?, |name| counters.get(name).copied()))
}

/// Running containers with a GPU that this installation did not start and does not manage.
pub async fn foreign(runtime: &DockerRuntime, installation: &str) -> Vec<Foreign> {
    let client = &runtime.client;
    let Ok(docker) = client.docker().await else { return Vec::new() };
    let Ok(running) = client.within(PROMPT, docker.list_containers(None)).await else {
        return Vec::new();
    };
    let mut foreign = Vec::new();
    for summary in running {
        let ours = summary.labels.as_ref().is_some_and(|labels| {
            let label = labels.get(labels::INSTALLATION);
            label.is_some_and(|label| label == installation) || labels::is_errand(labels)
        });
        let Some(id) = summary.id.filter(|id| !ours && !runtime.watched.is_watched(id)) else {
            continue;
        };
        let Ok(container) = client.within(PROMPT, docker.inspect_container(&id, None)).await else {
            continue;
        };
        if container.host_config.as_ref().is_some_and(has_gpu) {
            foreign.push(Foreign {
                name: container.name.unwrap_or_default().trim_start_matches('/').to_owned(),
                image: summary.image.unwrap_or_default(),
                pids: pids(client, &id).await,
            });
        }
    }
    foreign
}

fn has_gpu(config: &HostConfig) -> bool {
    let requested = config.device_requests.iter().flatten().any(|request| {
        matches!(request.driver.as_deref(), Some("nvidia" | "cdi"))
            || request.capabilities.iter().flatten().flatten().any(|cap| cap == "gpu")
    });
    let mapped = config.devices.iter().flatten().any(|device| {
        device.path_on_host.as_deref().is_some_and(|path| path.starts_with("/dev/nvidia"))
    });
    requested || mapped || config.runtime.as_deref().is_some_and(|name| name.contains("nvidia"))
}
