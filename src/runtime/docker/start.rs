//! Create and start, all or nothing: what fails or is no longer wanted leaves nothing behind.

use bollard::Docker;
use bollard::models::{
    ContainerInspectResponse, NetworkConnectRequest, RestartPolicyNameEnum as Restart,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
};
use tokio::sync::oneshot;

use super::client::{Client, PROMPT};
use super::errors::{self, Subject};
use super::{DockerRuntime, create, find, labels, place, stop, watched};
use crate::config::catalog::{DockerSpec, StopSpec};
use crate::runtime::{Endpoint, LaunchSpec, Running, RuntimeHandle};
use crate::scheduler::event::{Fault, FaultKind};

/// Undoes a start unless it was handed over.
struct Undo {
    runtime: DockerRuntime,
    id: String,
    /// `Some`: a named container, which is stopped, never removed.
    named: Option<StopSpec>,
    armed: bool,
}

impl Undo {
    async fn run(runtime: DockerRuntime, id: String, named: Option<StopSpec>) {
        let result = match &named {
            Some(stop) => stop::stop(&runtime, &id, true, stop).await,
            None => remove(&runtime.client, &id).await,
        };
        if let Err(fault) = result {
            // Its labels lead the next reconciliation to it.
            tracing::warn!(container = id, reason = fault.message, "left a container behind");
        }
    }

    async fn now(mut self) {
        self.armed = false;
        Undo::run(self.runtime.clone(), self.id.clone(), self.named.take()).await;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.armed {
            tokio::spawn(Undo::run(self.runtime.clone(), self.id.clone(), self.named.take()));
        }
    }
}

/// The work goes on in a task of its own, since a request to Docker that is dropped half-way may
/// still be carried out: whoever drops this future leaves a task that undoes what it did.
pub async fn start(runtime: &DockerRuntime, spec: &LaunchSpec) -> Result<Running, Fault> {
    let (mut reply, result) = oneshot::channel::<Result<(Running, Undo), Fault>>();
    let (runtime, spec) = (runtime.clone(), spec.clone());
    tokio::spawn(async move {
        let outcome = prepare(&runtime, &spec).await;
        let outcome = match outcome {
            Err(fault) => Err(fault),
            Ok(undo) => {
                let begun = tokio::select! {
                    begun = begin(&runtime, &spec, &undo) => begun,
                    () = reply.closed() => Err(Fault::new(FaultKind::Cancelled, "not wanted any more")),
                };
                match begun {
                    Ok(running) => Ok((running, undo)),
                    Err(fault) => {
                        undo.now().await;
                        Err(fault)
                    }
                }
            }
        };
        // Nobody there: the value is dropped, and `Undo` with it.
        drop(reply.send(outcome));
    });
    let lost = || Fault::new(FaultKind::Internal, "the task that starts a container ended early");
    let (running, mut undo) = result.await.map_err(|_| lost())??;
    undo.armed = false;
    Ok(running)
}

/// Creates the container, or finds the named one.
async fn prepare(runtime: &DockerRuntime, spec: &LaunchSpec) -> Result<Undo, Fault> {
    let docker_spec = super::docker_spec(&spec.model)?;
    let (id, named) = match &docker_spec.container {
        Some(name) => {
            let container = inspect_named(&runtime.client, name).await?;
            (container.id.unwrap_or_default(), Some(spec.model.stop.clone()))
        }
        None => (create(runtime, spec, docker_spec).await?, None),
    };
    Ok(Undo { runtime: runtime.clone(), id, named, armed: true })
}

/// The container named in the configuration, if Wharf may manage it.
pub async fn inspect_named(client: &Client, name: &str) -> Result<ContainerInspectResponse, Fault> {
    let docker = client.docker().await?;
    let container = match docker.inspect_container(name, None).await {
        Ok(container) => container,
        Err(error) if errors::is_missing(&error) => {
            return Err(Fault::new(
                FaultKind::BadSpec,
                format!(
                    "there is no container `{name}`: create it without starting it \
                     (`docker compose up --no-start {name}`), or correct the name"
                ),
            ));
        }
        Err(error) => return Err(errors::fault(client.host(), "inspect a container", &error)),
    };
    let config = container.host_config.as_ref();
    let policy = config.and_then(|config| config.restart_policy.as_ref()?.name);
    if let Some(policy) = policy.filter(|policy| !matches!(policy, Restart::EMPTY | Restart::NO)) {
        return Err(Fault::new(
            FaultKind::BadSpec,
            format!(
                "container `{name}` has restart policy `{policy}`, so Docker would start it when \
                 Wharf has stopped it: `docker update --restart=no {name}`"
            ),
        ));
    }
    if config.and_then(|config| config.auto_remove) == Some(true) {
        return Err(Fault::new(
            FaultKind::BadSpec,
            format!(
                "container `{name}` was made with --rm and would be gone after its first stop: \
                     create it without --rm"
            ),
        ));
    }
    Ok(container)
}

async fn create(
    runtime: &DockerRuntime,
    spec: &LaunchSpec,
    docker_spec: &DockerSpec,
) -> Result<String, Fault> {
    let client = &runtime.client;
    let docker = client.docker().await?;
    let daemon = client.daemon().await?;
    let place = runtime.place.get(client).await?;
    let name = create::container_name(&spec.identity);
    let body = create::body(spec, docker_spec, &daemon, place);
    let options = CreateContainerOptionsBuilder::new().name(&name).build();
    let mut created = docker.create_container(Some(options.clone()), body.clone()).await;
    if let Err(error) = &created
        && is_name_conflict(error)
    {
        clear_name(client, &docker, spec, &name).await?;
        created = docker.create_container(Some(options), body).await;
    }
    let id = created.map_err(|error| refused(client, spec, docker_spec, &error))?.id;
    if let Some(second) = create::networks(docker_spec, place).second {
        let request = NetworkConnectRequest { container: id.clone(), endpoint_config: None };
        if let Err(error) = docker.connect_network(&second, request).await {
            let fault = refused(client, spec, docker_spec, &error);
            remove(client, &id).await?;
            return Err(fault);
        }
    }
    Ok(id)
}

fn is_name_conflict(error: &bollard::errors::Error) -> bool {
    errors::status(error) == Some(409)
        && errors::words(error).is_some_and(|words| words.contains("already in use"))
}

/// The name is taken: by a leftover of ours, which goes, or by a stranger, who stays.
async fn clear_name(
    client: &Client,
    docker: &Docker,
    spec: &LaunchSpec,
    name: &str,
) -> Result<(), Fault> {
    let occupant = client.within(PROMPT, docker.inspect_container(name, None)).await?;
    let labels = occupant.config.as_ref().and_then(|config| config.labels.as_ref());
    if labels::belong_to(labels, &spec.identity) {
        return remove(client, &occupant.id.unwrap_or_default()).await;
    }
    let image = occupant.config.and_then(|config| config.image).unwrap_or_default();
    Err(Fault::new(
        FaultKind::NameConflict,
        format!(
            "a container named `{name}` (image {image}) exists and is not Wharf's: rename or \
             remove it (`docker rename {name} NEW`)"
        ),
    ))
}

fn subject<'a>(spec: &'a LaunchSpec, docker_spec: &'a DockerSpec) -> Subject<'a> {
    Subject {
        model: spec.model.name.as_str(),
        image: docker_spec.image.as_deref().or(docker_spec.container.as_deref()).unwrap_or("?"),
        port: spec.port,
        runtime: docker_spec.runtime.as_deref().unwrap_or("?"),
    }
}

fn refused(
    client: &Client,
    spec: &LaunchSpec,
    docker_spec: &DockerSpec,
    error: &bollard::errors::Error,
) -> Fault {
    errors::start_fault(client.host(), subject(spec, docker_spec), error)
}

/// Starts what `prepare` made, and finds out where it is reached.
async fn begin(runtime: &DockerRuntime, spec: &LaunchSpec, undo: &Undo) -> Result<Running, Fault> {
    let client = &runtime.client;
    let docker_spec = super::docker_spec(&spec.model)?;
    let docker = client.docker().await?;
    let place = runtime.place.get(client).await?;
    let before = client.within(PROMPT, docker.inspect_container(&undo.id, None)).await?;
    let secrets = find::secrets(&before).and(spec.api_key.key());
    let earlier_run = before.state.and_then(|state| state.finished_at);
    if let Err(error) = docker.start_container(&undo.id, None).await {
        let mut fault = refused(client, spec, docker_spec, &error);
        if fault.kind == FaultKind::PortTaken
            && let Some(name) = publisher(&docker, spec.port).await
        {
            fault.message = format!("{}: container `{name}` publishes it", fault.message);
        }
        return Err(fault);
    }
    // Watched only now: a container that was not yet started looks like one that ended.
    let (log, exit) = runtime.watched.watch(client, &undo.id, earlier_run.as_deref(), secrets);
    let container = client.within(PROMPT, docker.inspect_container(&undo.id, None)).await?;
    let base = match container.state.as_ref().and_then(watched::ended) {
        None => place::endpoint(client, place, &container, spec.container_port).await?,
        // Ended at once, and so has no address; its exit and its log tell why.
        Some(report) => {
            runtime.watched.ended(&undo.id, report).await;
            format!("http://127.0.0.1:{}", spec.port)
        }
    };
    let name = container.name.unwrap_or_default().trim_start_matches('/').to_owned();
    Ok(Running {
        identity: spec.identity.clone(),
        endpoint: Endpoint::new(base, spec.api_key.key()),
        handle: RuntimeHandle::Docker { id: undo.id.clone(), name, named: undo.named.is_some() },
        log,
        exit,
    })
}

/// Name of the running container that publishes a host port.
pub async fn publisher(docker: &Docker, port: u16) -> Option<String> {
    let options = ListContainersOptionsBuilder::new().build();
    let running = docker.list_containers(Some(options)).await.ok()?;
    let holder = running.into_iter().find(|container| {
        container.ports.iter().flatten().any(|published| published.public_port == Some(port))
    })?;
    Some(holder.names?.first()?.trim_start_matches('/').to_owned())
}

/// Removes a container whatever it does. Gone already is fine.
pub async fn remove(client: &Client, id: &str) -> Result<(), Fault> {
    let docker = client.docker().await?;
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    match docker.remove_container(id, Some(options)).await {
        Ok(()) => Ok(()),
        Err(error) if errors::is_missing(&error) => Ok(()),
        // Somebody else is at it.
        Err(error) if errors::words(&error).is_some_and(|w| w.contains("already in progress")) => {
            Ok(())
        }
        Err(error) => Err(errors::fault(client.host(), "remove a container", &error)),
    }
}
