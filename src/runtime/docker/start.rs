//! Create and start, all or nothing: what fails or is no longer wanted leaves nothing behind.

use std::sync::Arc;

use bollard::Docker;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, NetworkConnectRequest,
    RestartPolicyNameEnum as Restart,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
};
use tokio::sync::{mpsc, oneshot};

use super::client::{Client, PROMPT};
use super::create::Networks;
use super::errors::{self, Subject};
use super::made::{Made, Undo};
use super::place::Place;
use super::{DockerRuntime, create, find, labels, place, watched};
use crate::config::catalog::DockerSpec;
use crate::runtime::{Endpoint, LaunchSpec, Running, RuntimeHandle};
use crate::scheduler::event::{Fault, FaultKind};

/// Creates the container ahead of its start. Named ones are there already.
pub async fn make(runtime: &DockerRuntime, spec: &LaunchSpec) -> Result<Option<Made>, Fault> {
    if super::docker_spec(&spec.model)?.container.is_some() {
        return Ok(None);
    }
    let (runtime, spec) = (runtime.clone(), spec.clone());
    in_a_task(|_| async move { made(&runtime, &spec).await.map(Some) }).await
}

/// Starts the container: the one that was made ahead, if it still is what is wanted.
pub async fn start(
    runtime: &DockerRuntime,
    spec: &LaunchSpec,
    ahead: Option<Made>,
) -> Result<Running, Fault> {
    let (runtime, spec) = (runtime.clone(), spec.clone());
    let started = in_a_task(|waiting| async move {
        let made = match ahead {
            Some(ahead) => fitting(&runtime, &spec, ahead).await?,
            None => made(&runtime, &spec).await?,
        };
        let begun = tokio::select! {
            begun = begin(&runtime, &spec, &made) => begun,
            () = waiting.closed() => {
                Err(Fault::new(FaultKind::Cancelled, "not wanted any more"))
            }
        };
        match begun {
            Ok(running) => Ok((running, made.undo)),
            Err(fault) => {
                made.undo.now().await;
                Err(fault)
            }
        }
    });
    let (running, mut undo) = started.await?;
    undo.armed = false;
    Ok(running)
}

/// The work goes on in a task of its own, since a request to Docker that is dropped half-way may
/// still be carried out: whoever drops this future leaves a task that undoes what it did. `work`
/// gets what tells whether anybody waits still.
async fn in_a_task<T, W>(work: impl FnOnce(mpsc::Sender<()>) -> W) -> Result<T, Fault>
where
    T: Send + 'static,
    W: Future<Output = Result<T, Fault>> + Send + 'static,
{
    let (wanted, _waiting) = mpsc::channel(1);
    let work = work(wanted);
    let (reply, result) = oneshot::channel();
    // Nobody there: the value is dropped, and `Undo` with it.
    tokio::spawn(async move { drop(reply.send(work.await)) });
    let lost = |_| Fault::new(FaultKind::Internal, "the task of a container ended early");
    result.await.map_err(lost)?
}

/// Between its creation and its start the model's place may have changed.
async fn fitting(runtime: &DockerRuntime, spec: &LaunchSpec, ahead: Made) -> Result<Made, Fault> {
    let (body, _) = wanted(runtime, spec).await?;
    if ahead.body.as_ref() == Some(&body) {
        return Ok(ahead);
    }
    ahead.undo.now().await;
    made(runtime, spec).await
}

/// Creates the container, or finds the named one.
async fn made(runtime: &DockerRuntime, spec: &LaunchSpec) -> Result<Made, Fault> {
    let docker_spec = super::docker_spec(&spec.model)?;
    let undo = |id, named| Undo { runtime: runtime.clone(), id, named, armed: true };
    let Some(name) = &docker_spec.container else {
        let (body, networks) = wanted(runtime, spec).await?;
        let id = create(runtime, spec, docker_spec, &body, networks).await?;
        let undo = undo(id, None);
        let docker = runtime.client.docker().await?;
        // Its image may bring an environment, too.
        let container =
            runtime.client.within(PROMPT, docker.inspect_container(&undo.id, None)).await?;
        let secrets = find::secrets(&container).and(spec.api_key.key());
        return Ok(Made { undo, body: Some(body), secrets, earlier_run: None });
    };
    let container = inspect_named(&runtime.client, name).await?;
    let secrets = find::secrets(&container).and(spec.api_key.key());
    let earlier_run = container.state.and_then(|state| state.finished_at);
    let undo = undo(container.id.unwrap_or_default(), Some(spec.model.stop.clone()));
    Ok(Made { undo, body: None, secrets, earlier_run })
}

async fn wanted(
    runtime: &DockerRuntime,
    spec: &LaunchSpec,
) -> Result<(ContainerCreateBody, Networks), Fault> {
    let docker_spec = super::docker_spec(&spec.model)?;
    let daemon = runtime.client.daemon().await?;
    let place = runtime.place.get(&runtime.client).await?;
    let body = create::body(spec, docker_spec, &daemon, place);
    Ok((body, create::networks(docker_spec, place)))
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
    body: &ContainerCreateBody,
    networks: Networks,
) -> Result<String, Fault> {
    let client = &runtime.client;
    let docker = client.docker().await?;
    let name = create::container_name(&spec.identity);
    let options = CreateContainerOptionsBuilder::new().name(&name).build();
    let mut created = docker.create_container(Some(options.clone()), body.clone()).await;
    if let Err(error) = &created
        && is_name_conflict(error)
    {
        clear_name(client, &docker, spec, &name).await?;
        created = docker.create_container(Some(options), body.clone()).await;
    }
    let id = created.map_err(|error| refused(client, spec, docker_spec, &error))?.id;
    if let Some(second) = networks.second {
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

/// Starts what was made, and finds out where it is reached.
async fn begin(runtime: &DockerRuntime, spec: &LaunchSpec, made: &Made) -> Result<Running, Fault> {
    let (client, id) = (&runtime.client, &made.undo.id);
    let docker_spec = super::docker_spec(&spec.model)?;
    let docker = client.docker().await?;
    let place = runtime.place.get(client).await?;
    if let Err(error) = docker.start_container(id, None).await {
        let mut fault = refused(client, spec, docker_spec, &error);
        if fault.kind == FaultKind::PortTaken
            && let Some(name) = publisher(&docker, spec.port).await
        {
            fault.message = format!("{}: container `{name}` publishes it", fault.message);
        }
        return Err(fault);
    }
    // Watched only now: a container that was not yet started looks like one that ended.
    let earlier_run = made.earlier_run.as_deref();
    let (log, exit) = runtime.watched.watch(client, id, earlier_run, made.secrets.clone());
    let running = |base: String, name: String| Running {
        identity: spec.identity.clone(),
        endpoint: Endpoint::new(base, spec.api_key.key()),
        handle: RuntimeHandle::Docker { id: id.clone(), name, named: made.undo.named.is_some() },
        log: log.clone(),
        exit: exit.clone(),
    };
    if published_by_us(made, place) {
        // Known without another question to Docker; should it have ended at once, this look tells.
        let (watched, client, id) = (Arc::clone(&runtime.watched), client.clone(), id.clone());
        tokio::spawn(async move { watched.look(&client, &id, None).await });
        let base = format!("http://127.0.0.1:{}", spec.port);
        return Ok(running(base, create::container_name(&spec.identity)));
    }
    let container = client.within(PROMPT, docker.inspect_container(id, None)).await?;
    let base = match container.state.as_ref().and_then(watched::ended) {
        None => place::endpoint(client, place, &container, spec.container_port).await?,
        // Ended at once, and so has no address; its exit and its log tell why.
        Some(report) => {
            runtime.watched.ended(id, report).await;
            format!("http://127.0.0.1:{}", spec.port)
        }
    };
    let name = container.name.unwrap_or_default().trim_start_matches('/').to_owned();
    Ok(running(base, name))
}

/// On this machine's loopback, by the port that we chose.
fn published_by_us(made: &Made, place: &Place) -> bool {
    let ours = made.body.as_ref().and_then(|body| body.host_config.as_ref());
    *place == Place::Host && ours.is_some_and(|host| host.port_bindings.is_some())
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
