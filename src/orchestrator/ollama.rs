//! What is different for models inside a running Ollama: how one becomes ready, and how those that
//! are loaded already are found.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use futures_util::future::join_all;

use super::effects::Effects;
use super::handle::Message;
use super::reconcile::{Adopted, all_wanted};
use crate::config::catalog::{Catalog, RuntimeSpec, Vram};
use crate::engine;
use crate::runtime::{Identity, LaunchSpec, Progress, Running};
use crate::scheduler::event::{Event, Fault, FaultKind};
use crate::units::{Bytes, InstanceId, ModelName, SwapId};

impl Effects {
    /// Ollama tells itself what a model takes of the GPUs, over all of them.
    pub(super) async fn bring_up_in_ollama(
        &self,
        swap: SwapId,
        launch: &LaunchSpec,
        running: &Running,
        progress: &Progress,
        deadline: Instant,
    ) -> Result<Option<Bytes>, Fault> {
        let (spec, identity) = (&launch.model, &launch.identity);
        let vram = self.runtimes.ollama.load(spec, running, progress, deadline.into()).await?;
        let instance = identity.instance;
        self.inbox.send(Message::Effect(Event::Vouching { swap, instance }));
        engine::first_request(spec, running).await?;
        let gpus = identity.gpus.len() as u64;
        if vram == Bytes::ZERO && gpus > 0 && matches!(spec.vram, Vram::Declared(_)) {
            let message = format!(
                "{}: Ollama runs it on the CPU, where `vram` is declared: see its log for why, or \
                 set `gpus: 0`",
                spec.name
            );
            return Err(Fault::new(FaultKind::RunsOnCpu, message));
        }
        Ok((gpus > 0).then(|| Bytes(vram.0.div_ceil(gpus))))
    }
}

/// Models that Ollama has loaded are taken over as they are.
pub async fn adopt_in_ollama(
    effects: &Effects,
    catalog: &Catalog,
    installation: &str,
    named: &BTreeMap<ModelName, InstanceId>,
) -> Vec<Adopted> {
    let looked = catalog.models.values().map(async |spec| {
        if !matches!(spec.runtime, RuntimeSpec::Ollama(_)) {
            return None;
        }
        let identity = Identity {
            installation: installation.to_owned(),
            instance: *named.get(&spec.name)?,
            model: spec.name.clone(),
            spec_hash: spec.shape_hash(),
            gpus: all_wanted(spec, &effects.gpus),
            port: 0,
        };
        let gpus = identity.gpus.len().max(1) as u64;
        let (running, vram) = effects.runtimes.ollama.adopt(spec, identity).await?;
        tracing::info!(model = %spec.name, ollama = running.endpoint.base, "adopted");
        let footprint = Bytes(vram.0.div_ceil(gpus));
        Some(Adopted { spec: Arc::clone(spec), running, footprint, unfit: None })
    });
    join_all(looked).await.into_iter().flatten().collect()
}
