//! `adapter_of`: models that are served by the instance of another one.

use std::sync::Arc;

use super::catalog::{Adapter, EngineKind, GpuRequest, ModelSpec, ProcessSpec, Vram};
use super::decode::{Sink, Spot};
use super::fields::Fields;
use super::models::Read;
use super::problem::nearest;
use crate::units::ModelName;

/// Keys that say how an engine runs: an adapter has them from its base.
pub(super) const OF_THE_BASE: [&str; 14] = [
    "engine", "docker", "process", "external", "env", "pull", "gpus", "vram", "ram", "port",
    "stop", "sleep", "http", "health",
];

/// What `adapter_of` and `adapter` say. The outer `None`: they are wrong, which was told.
///
/// The engine and the way it is run are filled in by [`attach`], when every model is known.
pub(super) fn of(
    name: &str,
    spot: &Spot,
    fields: &mut Fields,
    sink: &mut Sink,
) -> Option<Option<Adapter>> {
    let Some((base, at)) = fields.adapter_of.take() else {
        if let Some(at) = fields.spot("adapter") {
            sink.error(at, "`adapter` belongs to a base model", "add `adapter_of: …`");
            return None;
        }
        return Some(None);
    };
    for key in OF_THE_BASE {
        let Some(spot) = fields.spot(key) else { continue };
        let message = format!("`{key}` has no effect on an adapter: `{base}` runs it");
        sink.error(spot, message, "remove it");
    }
    if base == name {
        sink.error(&at, "a model cannot be its own adapter", "expected another model");
        return None;
    }
    let Some(source) = fields.adapter.take() else {
        if fields.spot("adapter").is_none() {
            let message = format!("the adapter `{name}` does not say what is loaded");
            sink.error(spot, message, "expected `adapter: …`, a path or repository");
        }
        return None;
    };
    fields.engine = Some(EngineKind::Vllm);
    fields.docker = None;
    fields.external = None;
    fields.env.clear();
    fields.pull = None;
    fields.process = Some(ProcessSpec::default());
    for key in OF_THE_BASE {
        fields.spots.remove(key);
    }
    fields.spots.insert("process", at);
    fields.vram = None;
    fields.gpus = None;
    Some(Some(Adapter { of: ModelName::new(base), source }))
}

/// Gives every adapter the engine of its base; those whose base is wrong are told and left out.
pub(super) fn attach(read: &mut Read, sink: &mut Sink) {
    let mut wrong = Vec::new();
    for at in 0..read.models.len() {
        let model = &read.models[at];
        let Some(adapter) = model.spec.adapter.clone() else { continue };
        match base(read, adapter.of.as_str()) {
            Ok(base) => {
                let spec = like(&model.spec, &base);
                read.models[at].spec = Arc::new(spec);
            }
            Err(message) => {
                if let Some((message, expected)) = message {
                    sink.error(model.spot_of("adapter_of"), message, expected);
                }
                wrong.push(at);
            }
        }
    }
    for at in wrong.into_iter().rev() {
        read.models.remove(at);
    }
}

/// The inner `None`: there is such a model, but it is wrong itself.
fn base(read: &Read, name: &str) -> Result<Arc<ModelSpec>, Option<(String, String)>> {
    let Some(model) = read.get(name) else {
        if read.names.iter().any(|known| known == name) {
            return Err(None);
        }
        let alias = read.models.iter().find(|m| m.spec.aliases.iter().any(|a| a == name));
        let known = alias.map(|model| model.spec.name.as_str());
        let expected = match known.or_else(|| nearest(name, read.names.iter().map(|n| &**n))) {
            Some(known) => format!("did you mean `{known}`?"),
            None => "expected the name of a model".to_owned(),
        };
        return Err(Some((format!("no model is called `{}`", name.escape_debug()), expected)));
    };
    if let Some(adapter) = &model.spec.adapter {
        let message = format!("`{name}` is an adapter itself");
        return Err(Some((message, format!("did you mean `{}`?", adapter.of))));
    }
    if model.spec.engine != EngineKind::Vllm {
        let message = format!("`{name}` cannot load adapters");
        let expected = "expected a base with `engine: vllm`".to_owned();
        return Err(Some((message, expected)));
    }
    Ok(Arc::clone(&model.spec))
}

fn like(adapter: &ModelSpec, base: &ModelSpec) -> ModelSpec {
    ModelSpec {
        engine: base.engine,
        runtime: base.runtime.clone(),
        gpus: GpuRequest::None,
        vram: Vram::Unknown,
        health: base.health.clone(),
        stop: base.stop.clone(),
        ..adapter.clone()
    }
}
