//! At start-up: what of an earlier run still lives is adopted if it is healthy and unchanged;
//! the rest is reaped. What we did not start is never touched.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::effects::Effects;
use super::leftovers::reap;
use super::ollama::adopt_in_ollama;
use super::state_dir::StateDir;
use crate::config::catalog::{Catalog, GpuRequest, ModelSpec, RuntimeSpec};
use crate::engine;
use crate::gpu::Gpus;
use crate::runtime::docker::{FoundAll, Silent};
use crate::runtime::{Found, Identity, Progress, Running};
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::{Bytes, GpuId, InstanceId, ModelName};

/// An adopted engine answers at once, or as soon as a busy machine lets it; one that was still
/// starting is not worth a longer wait.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Adopted {
    pub spec: Arc<ModelSpec>,
    pub running: Running,
    pub footprint: Bytes,
    /// It is ours and cannot be left to somebody else, but has to be stopped, and why.
    pub unfit: Option<String>,
}

/// What a look through Docker brought.
#[derive(Debug)]
pub struct InDocker {
    pub adopted: Vec<Adopted>,
    /// Containers of an earlier run were there when it looked.
    pub any_left: bool,
    /// Some of them could not be looked at: look again.
    pub any_missed: bool,
}

pub struct Reconciled {
    pub adopted: Vec<Adopted>,
    /// Docker did not answer, or not for all: what runs there is looked up when it does.
    pub docker_missed: bool,
}

/// Looks through the processes, and through Docker if it was ever used.
pub async fn reconcile(
    effects: &Effects,
    catalog: &Catalog,
    state: &StateDir,
    named: &BTreeMap<ModelName, InstanceId>,
) -> Reconciled {
    let installation = &state.installation;
    let mut adopted = match effects.runtimes.process.find(installation).await {
        Ok(found) => adopt_or_reap_all(effects, catalog, found).await,
        Err(fault) => {
            tracing::warn!("processes of an earlier run cannot be looked up: {}", fault.message);
            Vec::new()
        }
    };
    adopted.extend(adopt_in_ollama(effects, catalog, installation, named).await);
    if !uses_docker(catalog) && !state.ever_used_docker() {
        return Reconciled { adopted, docker_missed: false };
    }
    let none_known = BTreeSet::new();
    match reconcile_docker(effects, catalog, installation, 0..=u64::MAX, &none_known, named).await {
        Some(in_docker) => {
            if !in_docker.any_left && !uses_docker(catalog) {
                state.forget_docker();
            }
            adopted.extend(in_docker.adopted);
            Reconciled { adopted, docker_missed: in_docker.any_missed }
        }
        None => Reconciled { adopted, docker_missed: true },
    }
}

pub fn uses_docker(catalog: &Catalog) -> bool {
    catalog.models.values().any(|spec| matches!(spec.runtime, RuntimeSpec::Docker(_)))
}

/// Containers named in the configuration, and models of Ollama, carry no id: each gets one that was
/// never used.
pub fn named_ids(catalog: &Catalog, last_id: u64) -> BTreeMap<ModelName, InstanceId> {
    let is_named = |spec: &ModelSpec| {
        named_container(spec).is_some() || matches!(spec.runtime, RuntimeSpec::Ollama(_))
    };
    let named = catalog.models.values().filter(|spec| is_named(spec));
    named.zip(last_id + 1..).map(|(spec, id)| (spec.name.clone(), InstanceId(id))).collect()
}

fn named_container(spec: &ModelSpec) -> Option<&str> {
    match &spec.runtime {
        // An adapter carries its base's runtime, and no instance of its own.
        RuntimeSpec::Docker(_) if spec.adapter.is_some() => None,
        RuntimeSpec::Docker(docker) => docker.container.as_deref(),
        RuntimeSpec::Process(_) | RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => None,
    }
}

/// Containers by label, then those that the configuration names; `None`: Docker does not answer.
/// `earlier`: ids of earlier runs, so that what this run is just starting is left alone. `known`:
/// what was adopted or is being reaped already.
pub async fn reconcile_docker(
    effects: &Effects,
    catalog: &Catalog,
    installation: &str,
    earlier: RangeInclusive<u64>,
    known: &BTreeSet<InstanceId>,
    named: &BTreeMap<ModelName, InstanceId>,
) -> Option<InDocker> {
    let is_sought = |id: InstanceId| earlier.contains(&id.0) && !known.contains(&id);
    let (mut adopted, any_left, any_missed) = match effects.runtimes.docker.find(installation).await
    {
        Ok(FoundAll { mut found, mut silent }) => {
            found.retain(|found| is_sought(found.running.identity.instance));
            silent.retain(|silent| silent.instance.is_none_or(is_sought));
            for Silent { id, fault, .. } in &silent {
                tracing::warn!(
                    container = id,
                    "of an earlier run, is looked at again: {}",
                    fault.message
                );
            }
            let any_left = !(found.is_empty() && silent.is_empty());
            (adopt_or_reap_all(effects, catalog, found).await, any_left, !silent.is_empty())
        }
        Err(fault) => {
            // Whoever follows the daemon has said that it does not answer.
            if fault.kind != FaultKind::RuntimeUnreachable {
                let why = &fault.message;
                tracing::warn!("containers of an earlier run cannot be looked up: {why}");
            }
            return None;
        }
    };
    let by_name = catalog.models.values().filter_map(|spec| {
        let (name, &id) = (named_container(spec)?, named.get(&spec.name)?);
        (!known.contains(&id)).then(|| adopt_named(effects, spec, name, installation, id))
    });
    // Side by side: each may take its whole time to answer.
    adopted.extend(join_all(by_name).await.into_iter().flatten());
    Some(InDocker { adopted, any_left, any_missed })
}

/// At most one instance per model: the newest that is fit.
async fn adopt_or_reap_all(
    effects: &Effects,
    catalog: &Catalog,
    found: Vec<Found>,
) -> Vec<Adopted> {
    let checked = found.into_iter().map(|found| adopt_or_reap(effects, catalog, found));
    let mut adopted: Vec<Adopted> = join_all(checked).await.into_iter().flatten().collect();
    adopted.sort_by_key(|adopted| std::cmp::Reverse(adopted.running.identity.instance));
    let mut kept: Vec<Adopted> = Vec::new();
    for each in adopted {
        if kept.iter().any(|other| other.spec.name == each.spec.name) {
            reap(effects, &each.running, "a newer instance of its model runs").await;
        } else {
            kept.push(each);
        }
    }
    kept
}

/// A container that compose (say) made and that runs already. One that does not answer (it may
/// still load) is stopped like any other of ours: nothing else can wait for its memory.
async fn adopt_named(
    effects: &Effects,
    spec: &Arc<ModelSpec>,
    name: &str,
    installation: &str,
    instance: InstanceId,
) -> Option<Adopted> {
    let mut identity = Identity {
        installation: installation.to_owned(),
        instance,
        model: spec.name.clone(),
        spec_hash: spec.shape_hash(),
        gpus: all_wanted(spec, &effects.gpus),
        port: 0,
    };
    let container_port = engine::derive(spec, 0, identity.gpus.len(), None, None).container_port;
    let docker = &effects.runtimes.docker;
    let mut running = match docker.adopt_named(name, identity.clone(), container_port).await {
        Ok(running) => running?,
        Err(fault) => {
            tracing::warn!(model = %spec.name, "{}", fault.message);
            return None;
        }
    };
    effects.learn_key(spec, &mut running).await;
    let unfit = answers(spec, &running).await.err().map(|fault| fault.message);
    effects.holders.register(&running);
    let held = effects.gpus_held_by(instance).await;
    if !held.is_empty() {
        identity.gpus = held;
    }
    running.identity.gpus.clone_from(&identity.gpus);
    let footprint = effects.held_by(instance, &identity.gpus).await;
    match &unfit {
        None => tracing::info!(model = %spec.name, container = name, "adopted a named container"),
        Some(why) => tracing::warn!(
            model = %spec.name,
            container = name,
            "runs and is not adopted, so it is stopped: {why}"
        ),
    }
    let footprint = footprint.unwrap_or(Bytes::ZERO);
    Some(Adopted { spec: Arc::clone(spec), running, footprint, unfit })
}

/// The GPUs that the model would take if all were free: what is known before memory was read.
pub fn all_wanted(spec: &ModelSpec, gpus: &Gpus) -> Vec<GpuId> {
    let known = gpus.gpus();
    match &spec.gpus {
        GpuRequest::None => Vec::new(),
        GpuRequest::Count(count) => {
            known.iter().take(usize::from(*count)).map(|gpu| gpu.id).collect()
        }
        GpuRequest::Explicit(wanted) => known
            .iter()
            .filter(|gpu| {
                wanted.iter().any(|name| *name == gpu.uuid || *name == gpu.id.to_string())
            })
            .map(|gpu| gpu.id)
            .collect(),
    }
}

async fn adopt_or_reap(effects: &Effects, catalog: &Catalog, mut found: Found) -> Option<Adopted> {
    if let Some(spec) = catalog.model(&found.running.identity.model).filter(|_| found.alive) {
        effects.learn_key(spec, &mut found.running).await;
    }
    let identity = &found.running.identity;
    let (model, instance) = (&identity.model, identity.instance);
    let why_not = match catalog.model(model) {
        _ if !found.alive => "it does not run any more".to_owned(),
        None => "its model is not configured any more".to_owned(),
        Some(spec) if spec.shape_hash() != identity.spec_hash => {
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
                    unfit: None,
                });
            }
        },
    };
    reap(effects, &found.running, &why_not).await;
    None
}

impl Effects {
    /// An engine that Wharf did not start just now tells its key by what it was given.
    pub(super) async fn learn_key(&self, spec: &ModelSpec, running: &mut Running) {
        if running.endpoint.api_key.is_none() {
            let given = self.runtimes.given(running).await;
            running.endpoint.api_key = engine::running_key(spec, &given);
        }
    }
}

async fn answers(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    let (progress, _) = Progress::new();
    let deadline = Instant::now() + ANSWER_WITHIN;
    engine::wait_ready(spec, running, &progress, deadline.into()).await?;
    if spec.sleep.is_some() && engine::is_asleep(running).await {
        // Adopted as ready it would let every request hang.
        return Err(Fault::new(FaultKind::Cancelled, "it sleeps"));
    }
    Ok(())
}
