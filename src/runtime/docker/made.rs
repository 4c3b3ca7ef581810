//! A container that is made and not started: removed again unless it is.

use bollard::models::ContainerCreateBody;

use super::{DockerRuntime, start, stop};
use crate::config::catalog::StopSpec;
use crate::runtime::redact::Secrets;

/// No `Debug` of its body: it holds secrets.
pub struct Made {
    pub undo: Undo,
    /// What was asked for; `None`: a container that somebody else made.
    pub body: Option<ContainerCreateBody>,
    pub secrets: Secrets,
    /// When an earlier run of it ended.
    pub earlier_run: Option<String>,
}

impl std::fmt::Debug for Made {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Made({})", self.undo.id)
    }
}

/// Undoes a start unless it was handed over.
pub struct Undo {
    pub runtime: DockerRuntime,
    pub id: String,
    /// `Some`: a named container, which is stopped, never removed.
    pub named: Option<StopSpec>,
    pub armed: bool,
}

impl Undo {
    async fn run(runtime: DockerRuntime, id: String, named: Option<StopSpec>) {
        let result = match &named {
            Some(stop) => stop::stop(&runtime, &id, true, stop).await,
            None => start::remove(&runtime.client, &id).await,
        };
        if let Err(fault) = result {
            // Its labels lead the next reconciliation to it.
            tracing::warn!(container = id, reason = fault.message, "left a container behind");
        }
    }

    pub async fn now(mut self) {
        self.armed = false;
        Undo::run(self.runtime.clone(), self.id.clone(), self.named.take()).await;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.armed {
            let undo = Undo::run(self.runtime.clone(), self.id.clone(), self.named.take());
            self.runtime.clearing.spawn(undo);
        }
    }
}
