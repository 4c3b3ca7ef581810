//! `POST /plan {"model"}`: what a request would bring about now, without doing it.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Api;
use super::error::{bad, refused, unknown_model};
use super::extract::Body;
use super::render::{Snapshot, seconds};
use crate::config::catalog::ModelSpec;
use crate::gateway::reject::Reject;
use crate::scheduler::plan::{Evicted, Forecast, RoomView, Verdict};

#[derive(Debug, Deserialize)]
pub struct PlanBody {
    model: Option<String>,
}

pub async fn plan(State(api): State<Api>, Body(body): Body<PlanBody>) -> Result<Response, Reject> {
    let catalog = api.handle.catalog();
    let Some(wanted) = body.model.filter(|model| !model.is_empty()) else {
        return Err(bad("model", "the body must name a model: {\"model\":\"…\"}"));
    };
    let asked = catalog.asked(&wanted).ok_or_else(|| unknown_model(&catalog, &wanted))?;
    let spec = asked.spec;
    match api.handle.forecast(spec.name.clone()).await {
        Some(forecast) => Ok(Json(forecast_json(&api, spec, &forecast)).into_response()),
        None => Err(unknown_model(&catalog, &wanted)),
    }
}

fn forecast_json(api: &Api, spec: &ModelSpec, forecast: &Forecast) -> Value {
    let at = Snapshot::of(&api.handle);
    let (verdict, refusal) = match &forecast.verdict {
        Verdict::Ready => ("ready", None),
        Verdict::Begins => ("begins", None),
        Verdict::Waits => ("waits", None),
        Verdict::Refused(refusal) => ("refused", Some(refused(refusal, &spec.name, api).body())),
    };
    json!({
        "model": spec.name,
        "state": at.residency(&spec.name).as_str(),
        // `ready`: served at once; `begins`: a swap would; `waits`: for `waits_for`, and then
        // `evicts` is who gives way; `refused`: with the error that a client would get.
        "verdict": verdict,
        "fits": refusal.is_none(),
        "gpus": forecast.gpus,
        "vram_bytes_per_gpu": forecast.footprint,
        "vram": {
            "declared_bytes": forecast.need.declared,
            "peak_bytes": forecast.need.peak,
            "seasoned": forecast.need.seasoned,
        },
        "host_ram": {
            "bytes": forecast.need.ram,
            "declared_bytes": forecast.need.ram_declared,
            "peak_bytes": forecast.need.ram_peak,
        },
        "rooms": forecast.rooms.iter().map(room).collect::<Vec<_>>(),
        "evicts": forecast.evicts.iter().map(evicted).collect::<Vec<_>>(),
        "waits_for": (!forecast.waits_for.is_empty()).then_some(&forecast.waits_for),
        "estimate_seconds": forecast.ready_in.map(seconds),
        "decision": (!forecast.decision.is_empty()).then_some(&forecast.decision),
        "error": refusal.map(|body| body["error"].clone()),
    })
}

fn room(room: &RoomView) -> Value {
    let promised = room.promised.iter();
    json!({
        "gpu": room.gpu,
        "capacity_bytes": room.capacity,
        "promised": promised
            .map(|(model, bytes)| json!({ "model": model, "bytes": bytes }))
            .collect::<Vec<_>>(),
        "strangers_bytes": room.strangers,
        "room_bytes": room.room,
        "need_bytes": room.need,
    })
}

fn evicted(evicted: &Evicted) -> Value {
    json!({
        "model": evicted.model,
        "why": evicted.why,
        "sleeps": evicted.sleeps,
        "busy": evicted.busy,
    })
}
