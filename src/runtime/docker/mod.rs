//! Engines as Docker containers.
//!
//! Reading order: `preflight`, `fetch` (images), `weights`, `create` (pure) and `start`, `stop`; `events` follows the
//! daemon and `watched` tells who waits for a container that it ended; `find` is for adoption.
//! bollard logs whole requests, environments included, at debug: keep it at `bollard=info`.

mod client;
mod create;
mod errors;
mod events;
mod fetch;
mod find;
mod labels;
mod logs;
mod made;
mod pace;
mod place;
mod preflight;
mod registry;
mod start;
mod stop;
mod watched;
mod weights;
mod weights_report;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Arc, OnceLock};

use tokio::sync::watch;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::{Foreign, Given, Identity, LaunchSpec, LogTail, Progress, Running, RuntimeHandle};
use crate::config::catalog::{DockerSpec, ModelSpec, RuntimeSpec, StopSpec};
use crate::orchestrator::view::Health;
use crate::scheduler::event::{Fault, FaultKind, HostUse};

pub use client::Daemon;
pub use find::{FoundAll, NamedContainer, Silent};
pub use made::Made;
pub use weights::Weights;

/// Cheap to clone; connects lazily, so that a machine without Docker costs nothing.
#[derive(Clone, Debug)]
pub struct DockerRuntime {
    client: client::Client,
    watched: Arc<watched::Watched>,
    place: Arc<place::PlaceCell>,
    follower: Arc<OnceLock<AbortOnDropHandle<()>>>,
    weights: Arc<weights::Known>,
    /// Removals that nobody has to wait for.
    clearing: TaskTracker,
    /// Tells what this run of Wharf sent out from what an earlier one left.
    run: Arc<str>,
}

impl DockerRuntime {
    /// `host`: `unix:///run/docker.sock`, `tcp://127.0.0.1:2375`; `None`: DOCKER_HOST or default.
    pub fn new(host: Option<String>) -> DockerRuntime {
        DockerRuntime {
            client: client::Client::new(host),
            watched: Arc::new(watched::Watched::new()),
            place: Arc::default(),
            follower: Arc::default(),
            weights: Arc::default(),
            clearing: TaskTracker::new(),
            run: format!("{:016x}", RandomState::new().hash_one(std::process::id())).into(),
        }
    }

    /// Begins to follow the daemon's events and health (only called if a model uses Docker).
    /// Also done by the first start or find; must be called within a tokio runtime.
    pub fn connect(&self) {
        self.follower.get_or_init(|| {
            let follow = events::follow(self.client.clone(), Arc::clone(&self.watched));
            AbortOnDropHandle::new(tokio::spawn(follow))
        });
    }

    /// `ok` flips when the daemon goes away or comes back.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.watched.health()
    }

    /// `unix:///var/run/docker.sock`, for messages.
    pub fn host(&self) -> &str {
        self.client.host()
    }

    /// What the daemon says about itself; asked once per connection.
    pub async fn about(&self) -> Result<Arc<Daemon>, Fault> {
        self.client.daemon().await
    }

    /// Daemon reachable; image name, volumes, network and runtime valid; a named container exists
    /// and is not restarted by Docker itself.
    pub async fn preflight(&self, spec: &LaunchSpec) -> Result<(), Fault> {
        preflight::preflight(self, spec).await
    }

    /// Makes the image present, as the pull policy says, and the weights of a model from the hub.
    /// A named container that somebody else started is stopped: its memory is nobody's otherwise.
    /// Cancel by dropping the future.
    pub async fn fetch(&self, spec: &LaunchSpec, progress: &Progress) -> Result<(), Fault> {
        if let Some(name) = &docker_spec(&spec.model)?.container {
            return stop::stop_named(self, name, &spec.model.stop).await;
        }
        fetch::fetch(self, &spec.model, progress).await?;
        let installation = Some(spec.identity.installation.as_str());
        weights::fetch(self, &spec.model, installation, progress).await.map(drop)
    }

    /// The image of a model that is not about to start (`wharf pull`).
    pub async fn fetch_image(&self, model: &ModelSpec, progress: &Progress) -> Result<(), Fault> {
        fetch::fetch(self, model, progress).await
    }

    /// The weights of a model that is not about to start. Its image must be here.
    pub async fn fetch_weights(
        &self,
        model: &ModelSpec,
        progress: &Progress,
    ) -> Result<Weights, Fault> {
        weights::fetch(self, model, None, progress).await
    }

    /// Creates the container ahead of its start, which is given it; dropped, it is removed again.
    /// `None`: it is a named one.
    pub async fn make(&self, spec: &LaunchSpec) -> Result<Option<Made>, Fault> {
        start::make(self, spec).await
    }

    /// Creates and starts the container, or starts the named one (its `fetch` stopped it if it ran).
    pub async fn start(&self, spec: &LaunchSpec) -> Result<Running, Fault> {
        self.start_made(spec, None).await
    }

    /// As `start`, of what was made ahead, if that still fits.
    pub async fn start_made(
        &self,
        spec: &LaunchSpec,
        ahead: Option<Made>,
    ) -> Result<Running, Fault> {
        self.connect();
        start::start(self, spec, ahead).await
    }

    /// Runs beside the way, but [`DockerRuntime::cleared`] waits for it.
    pub fn track(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.clearing.spawn(work);
    }

    /// Waits until what was stopped or given up is removed.
    pub async fn cleared(&self) {
        self.clearing.close();
        self.clearing.wait().await;
    }

    /// `Ok`: it does not run any more, and is being removed unless named (see `cleared`). Gone
    /// already is `Ok`.
    pub async fn stop(&self, running: &Running, stop: &StopSpec) -> Result<(), Fault> {
        match &running.handle {
            RuntimeHandle::Docker { id, named, .. } => stop::stop(self, id, *named, stop).await,
            RuntimeHandle::Process { .. }
            | RuntimeHandle::External
            | RuntimeHandle::Ollama { .. } => Ok(()),
        }
    }

    /// Every container of this installation by label, running or not, as far as each can be
    /// looked at.
    pub async fn find(&self, installation: &str) -> Result<FoundAll, Fault> {
        self.connect();
        find::find(self, installation).await
    }

    /// The container named in the configuration; `None`: there is none of that name.
    pub async fn find_named(&self, name: &str) -> Result<Option<NamedContainer>, Fault> {
        find::find_named(&self.client, name).await
    }

    /// A named container that runs already, as an instance; `None`: it does not run.
    pub async fn adopt_named(
        &self,
        name: &str,
        identity: Identity,
        container_port: u16,
    ) -> Result<Option<Running>, Fault> {
        self.connect();
        find::adopt_named(self, name, identity, container_port).await
    }

    /// Which of these containers (still) run, by id. Used when the daemon came back.
    pub async fn running_of(&self, ids: &[String]) -> Result<BTreeSet<String>, Fault> {
        events::running_of(&self.client, ids).await
    }

    /// Tells the log of lines that grow before they end, for as long as it is polled.
    pub async fn follow_unfinished(&self, id: &str, log: &LogTail) -> Infallible {
        logs::follow_unfinished(&self.client, id, log).await
    }

    /// What the container was given; nothing where it cannot be looked at.
    pub async fn given(&self, id: &str) -> Given {
        find::given(&self.client, id).await
    }

    /// Host pids of the container; empty where they cannot be read.
    pub async fn pids(&self, id: &str) -> Vec<u32> {
        find::pids(&self.client, id).await
    }

    /// Host RAM of a container, as the daemon tells it.
    pub async fn host_use(&self, id: &str) -> Option<HostUse> {
        find::host_use(&self.client, id).await
    }

    /// Running containers with a GPU that are none of ours.
    pub async fn foreign(&self, installation: &str) -> Vec<Foreign> {
        find::foreign(self, installation).await
    }
}

fn docker_spec(model: &ModelSpec) -> Result<&DockerSpec, Fault> {
    match &model.runtime {
        RuntimeSpec::Docker(spec) => Ok(spec),
        RuntimeSpec::Process(_) | RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => {
            let message = format!("{} does not run in Docker", model.name);
            Err(Fault::new(FaultKind::Internal, message))
        }
    }
}
