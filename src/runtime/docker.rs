//! Engines as Docker containers.

use tokio::sync::watch;

use super::{Foreign, Found, LaunchSpec, Progress, Running};
use crate::config::catalog::StopSpec;
use crate::orchestrator::view::Health;
use crate::scheduler::event::{Fault, FaultKind};

/// Cheap to clone; connects lazily, so that a machine without Docker costs nothing.
#[derive(Clone, Debug)]
pub struct DockerRuntime {
    health: watch::Receiver<Health>,
}

impl DockerRuntime {
    /// `host`: `unix:///run/docker.sock`, `tcp://127.0.0.1:2375`; `None`: DOCKER_HOST or default.
    pub fn new(_host: Option<String>) -> DockerRuntime {
        DockerRuntime { health: watch::channel(Health::default()).1 }
    }

    /// Begins to follow the daemon's events and health (only called if a model uses Docker).
    pub fn connect(&self) {}

    /// `ok` flips when the daemon goes away or comes back.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    pub async fn preflight(&self, _spec: &LaunchSpec) -> Result<(), Fault> {
        Ok(())
    }

    pub async fn fetch(&self, _spec: &LaunchSpec, _progress: &Progress) -> Result<(), Fault> {
        Ok(())
    }

    pub async fn start(&self, _spec: &LaunchSpec) -> Result<Running, Fault> {
        Err(Fault::new(FaultKind::Internal, "not yet"))
    }

    pub async fn stop(&self, _running: &Running, _stop: &StopSpec) -> Result<(), Fault> {
        Ok(())
    }

    /// Every container of this installation by label, and the named ones in the catalog.
    pub async fn find(&self, _installation: &str) -> Result<Vec<Found>, Fault> {
        Ok(Vec::new())
    }

    /// Is it (still) running? Used when the daemon came back.
    pub async fn is_alive(&self, _running: &Running) -> Result<bool, Fault> {
        Ok(false)
    }

    pub async fn pids(&self, _id: &str) -> Vec<u32> {
        Vec::new()
    }

    /// Running containers with a GPU that are none of ours.
    pub async fn foreign(&self, _installation: &str) -> Vec<Foreign> {
        Vec::new()
    }
}
