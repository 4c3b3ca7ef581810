//! GPUs, host RAM and queue as JSON.

use serde_json::{Value, json};

use super::render::{Snapshot, seconds};
use crate::orchestrator::view::GpuFacts;
use crate::scheduler::event::Holder;
use crate::units::{GpuId, ModelName};

/// `GET /gpus`
pub fn gpus(at: &Snapshot<'_>) -> Value {
    let gpus: Vec<Value> = at.view.gpus.iter().map(|facts| gpu(at, facts)).collect();
    json!({
        "provider": at.view.gpu_health.detail,
        "ok": at.view.gpu_health.ok && at.view.scheduler.no_proof.is_none(),
        "no_proof": at.view.scheduler.no_proof,
        "reserve_bytes": at.catalog.settings.gpu.reserve,
        "gpus": gpus,
        "host_memory": host_memory(at),
        "foreign": at.view.foreign,
    })
}

/// Host RAM; what is not known is null.
pub(super) fn host_memory(at: &Snapshot<'_>) -> Value {
    let ram = &at.view.scheduler.ram;
    json!({
        "total_bytes": ram.total,
        "available_bytes": ram.available,
        "reserve_bytes": at.catalog.settings.ram.reserve,
        "promised_bytes": ram.promised,
        "promised_to": ram.promised_to,
    })
}

fn gpu(at: &Snapshot<'_>, facts: &GpuFacts) -> Value {
    let scheduled = at.view.scheduler.gpus.iter().find(|gpu| gpu.gpu == facts.id);
    let memory = facts.memory.as_ref();
    let total = memory.map(|m| m.total).or(scheduled.map(|gpu| gpu.total));
    let holders = memory.map_or(&[][..], |memory| &memory.holders);
    json!({
        "gpu": facts.id,
        "uuid": facts.uuid,
        "name": facts.name,
        "total_bytes": total,
        "free_bytes": memory.map(|memory| memory.free),
        "used_bytes": memory.map(|memory| memory.total.saturating_sub(memory.free)),
        "promised_bytes": scheduled.map(|gpu| gpu.promised),
        "promised_to": promised_to(at, facts.id),
        "utilization": facts.utilization,
        "holders": holders.iter().map(|each| holder(at, each)).collect::<Vec<_>>(),
    })
}

fn holder(at: &Snapshot<'_>, holder: &Holder) -> Value {
    let mut models = at.view.scheduler.models.iter();
    let model = models.find(|model| holder.instance.is_some() && model.instance == holder.instance);
    json!({
        "pid": holder.pid,
        "label": holder.label,
        "mib": holder.bytes.as_mib(),
        "bytes": holder.bytes,
        "instance": holder.instance.map(|id| id.to_string()),
        "model": model.map(|model| &model.name),
    })
}

fn promised_to<'a>(at: &'a Snapshot<'_>, gpu: GpuId) -> Vec<&'a ModelName> {
    let models = at.view.scheduler.models.iter();
    models
        .filter(|model| model.instance.is_some() && model.gpus.contains(&gpu))
        .map(|model| &model.name)
        .collect()
}

/// `GET /queue`: models for which requests wait, the oldest waiter first.
pub fn queue(at: &Snapshot<'_>) -> Value {
    let mut waiting: Vec<_> =
        at.view.scheduler.models.iter().filter(|model| !model.queue.is_empty()).collect();
    waiting.sort_by_key(|model| model.oldest);
    let rows = waiting.iter().map(|model| {
        let requests: Vec<String> = model.queue.iter().map(ToString::to_string).collect();
        json!({
            "model": model.name,
            "queued": model.queue.len(),
            "requests": requests,
            "oldest_seconds": model.oldest.map(|arrived| seconds(at.now.since(arrived))),
            "ready_in_seconds": model.ready_in.map(seconds),
            "residency": model.residency.as_str(),
            "waiting_for": model.waiting_for,
            "swap_id": model.swap.map(|id| id.to_string()),
        })
    });
    json!({
        "queued": at.view.scheduler.queued,
        "limit": at.catalog.settings.queue.limit,
        "per_model_limit": at.catalog.settings.queue.per_model,
        "models": rows.collect::<Vec<_>>(),
    })
}
