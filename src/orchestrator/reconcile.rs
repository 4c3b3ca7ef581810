//! At start-up: what of an earlier run still lives is adopted if it is healthy and unchanged;
//! the rest is reaped. What we did not start is never touched.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::effects::Effects;
use super::launch::spec_hash;
use crate::config::catalog::{Catalog, ModelSpec, RuntimeSpec, StopSpec};
use crate::engine;
use crate::runtime::{Found, Progress, Running};
use crate::scheduler::event::Fault;
use crate::units::Bytes;

/// An adopted engine answers at once; one that was still starting is not worth the wait.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
const REAP_GRACE: Duration = Duration::from_secs(5);

pub struct Adopted {
    pub spec: Arc<ModelSpec>,
    pub running: Running,
    pub footprint: Bytes,
}

/// Looks through every runtime that the catalog (or an earlier one) uses.
pub async fn reconcile(effects: &Effects, catalog: &Catalog, installation: &str) -> Vec<Adopted> {
    let uses_docker =
        catalog.models.values().any(|spec| matches!(spec.runtime, RuntimeSpec::Docker(_)));
    let mut found = listed("process", effects.runtimes.process.find(installation).await);
    if uses_docker {
        found.extend(listed("docker", effects.runtimes.docker.find(installation).await));
    }
    let checked = found.into_iter().map(|found| adopt_or_reap(effects, catalog, found));
    join_all(checked).await.into_iter().flatten().collect()
}

fn listed(runtime: &str, found: Result<Vec<Found>, Fault>) -> Vec<Found> {
    found.unwrap_or_else(|fault| {
        tracing::warn!(
            runtime,
            "instances of an earlier run cannot be looked up: {}",
            fault.message
        );
        Vec::new()
    })
}

async fn adopt_or_reap(effects: &Effects, catalog: &Catalog, found: Found) -> Option<Adopted> {
    let identity = &found.running.identity;
    let (model, instance) = (&identity.model, identity.instance);
    let why_not = match catalog.model(model) {
        _ if !found.alive => "it does not run any more".to_owned(),
        None => "its model is not configured any more".to_owned(),
        Some(spec) if spec_hash(spec) != identity.spec_hash => {
            "its configuration changed since".to_owned()
        }
        Some(spec) => match answers(spec, &found.running).await {
            Err(fault) => fault.message,
            Ok(()) => {
                effects.holders.register(&found.running);
                let footprint = effects.held_by(instance, &identity.gpus).await;
                tracing::info!(%model, %instance, endpoint = found.running.endpoint.base, "adopted");
                return Some(Adopted {
                    spec: Arc::clone(spec),
                    footprint: footprint.unwrap_or(Bytes::ZERO),
                    running: found.running,
                });
            }
        },
    };
    tracing::info!(%model, %instance, "reaping an instance of an earlier run: {why_not}");
    let stop = StopSpec { signal: "SIGTERM".to_owned(), grace: REAP_GRACE };
    if let Err(fault) = effects.stop_within(&found.running, &stop).await {
        tracing::error!(%model, %instance, "failed to reap: {}", fault.message);
    }
    None
}

async fn answers(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    let (progress, _) = Progress::new();
    let deadline = Instant::now() + ANSWER_WITHIN;
    engine::wait_ready(spec, running, &progress, deadline.into()).await
}
