//! One scrape: drop the series of models that left the configuration, give every configured one
//! its series, read the gauges from the orchestrator's view, write the text.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::{Encoder, TextEncoder};

use super::metrics::{Metrics, NO_MODEL};
use crate::config::catalog::Catalog;
use crate::gateway::reject::REFUSAL_CODES;
use crate::orchestrator::{Handle, StartKind, View};
use crate::scheduler::record::{Phase, ResidencyView, SwapCause, SwapOutcome};
use crate::units::ModelName;

/// Labels whose value is the name of a model.
const MODEL_LABELS: [&str; 3] = ["model", "from", "to"];
const STATES: [&str; 10] = [
    "stopped",
    "starting",
    "ready",
    "draining",
    "stopping",
    "falling_asleep",
    "sleeping",
    "waking",
    "failed",
    "lost",
];
const LOAD_CAUSES: [SwapCause; 7] = [
    SwapCause::Request,
    SwapCause::Ensure,
    SwapCause::Load,
    SwapCause::Keep,
    SwapCause::Warmup,
    SwapCause::Restore,
    SwapCause::Group,
];
/// Causes of a swap that may evict another model.
const EVICTING_CAUSES: [SwapCause; 5] =
    [SwapCause::Request, SwapCause::Ensure, SwapCause::Load, SwapCause::Keep, SwapCause::Group];

pub(super) fn render(metrics: &Metrics, handle: &Handle) -> String {
    let _one_at_a_time = metrics.scrape.lock().unwrap_or_else(PoisonError::into_inner);
    let (catalog, view) = (handle.catalog(), handle.view());
    forget_removed(metrics, &catalog);
    for model in catalog.models.keys() {
        begin_series(metrics, model);
    }
    for reason in REFUSAL_CODES {
        metrics.requests.refusals.with_label_values(&[reason]);
    }
    read_models(metrics, handle, &catalog, &view);
    read_gpus(metrics, &view);
    read_host(metrics, &view);
    read_components(metrics, &view);

    let mut text = Vec::new();
    match TextEncoder::new().encode(&metrics.registry.gather(), &mut text) {
        Ok(()) => String::from_utf8_lossy(&text).into_owned(),
        Err(error) => {
            tracing::error!(%error, "failed to write the metrics");
            String::new()
        }
    }
}

/// A counter that first appears with 1 loses that 1 in `increase()`: so all begin at 0.
fn begin_series(metrics: &Metrics, model: &ModelName) {
    let model = model.as_str();
    metrics.swaps.ended.with_label_values(&[NO_MODEL, model, SwapOutcome::Ready.as_str()]);
    for cause in LOAD_CAUSES {
        for result in [SwapOutcome::Ready.as_str(), FAILED] {
            metrics.swaps.causes.with_label_values(&[model, cause.as_str(), result]);
        }
    }
    for cause in EVICTING_CAUSES {
        metrics.swaps.evictions.with_label_values(&[model, cause.as_str()]);
    }
    metrics.swaps.duration.with_label_values(&[model]);
    for phase in Phase::ALL {
        metrics.swaps.phase_duration.with_label_values(&[phase.as_str(), model]);
    }
    metrics.requests.ended.with_label_values(&[model, "ok"]);
    metrics.requests.duration.with_label_values(&[model]);
    metrics.requests.queue_wait.with_label_values(&[model]);
    for start in [StartKind::Hot, StartKind::Warm, StartKind::Cold] {
        metrics.requests.first_token.with_label_values(&[model, start.as_str()]);
    }
    for kind in ["prompt", "completion"] {
        metrics.requests.tokens.with_label_values(&[model, kind]);
    }
    metrics.swaps.restarts.with_label_values(&[model]);
}

/// `SwapOutcome::Failed(_).as_str()`, without a fault at hand.
const FAILED: &str = "failed";

fn forget_removed(metrics: &Metrics, catalog: &Catalog) {
    prune(&metrics.swaps.ended, catalog);
    prune(&metrics.swaps.causes, catalog);
    prune(&metrics.swaps.duration, catalog);
    prune(&metrics.swaps.phase_duration, catalog);
    prune(&metrics.swaps.evictions, catalog);
    prune(&metrics.requests.ended, catalog);
    prune(&metrics.requests.duration, catalog);
    prune(&metrics.requests.queue_wait, catalog);
    prune(&metrics.requests.first_token, catalog);
    prune(&metrics.requests.tokens, catalog);
    prune(&metrics.swaps.restarts, catalog);
    metrics.forget_handles();
}

/// Removes every series that names a model which is not configured.
fn prune<T: MetricVecBuilder>(vec: &MetricVec<T>, catalog: &Catalog) {
    let order: Vec<String> =
        vec.desc().iter().flat_map(|desc| desc.variable_labels.iter().cloned()).collect();
    for family in vec.collect() {
        for series in family.get_metric() {
            let labels: BTreeMap<&str, &str> =
                series.get_label().iter().map(|label| (label.name(), label.value())).collect();
            let gone = MODEL_LABELS
                .iter()
                .filter_map(|label| labels.get(label))
                .any(|&name| name != NO_MODEL && !catalog.models.contains_key(name));
            if gone {
                let values: Vec<&str> = order
                    .iter()
                    .map(|label| labels.get(label.as_str()).copied().unwrap_or_default())
                    .collect();
                // It was just listed; gone already is as good.
                let _ = vec.remove_label_values(&values);
            }
        }
    }
}

fn read_models(metrics: &Metrics, handle: &Handle, catalog: &Catalog, view: &View) {
    metrics.models.current.reset();
    metrics.models.state.reset();
    metrics.models.queue_depth.reset();
    metrics.models.inflight.reset();
    metrics.models.swapper_active.reset();
    metrics.models.swapper_uptime.reset();
    metrics.models.swapper_requests.reset();
    let (gates, now) = (handle.gates(), handle.now());
    for name in catalog.models.keys() {
        let model = view.model(name);
        let (gate, label) = (gates.get(name), [name.as_str()]);
        let state = model.map_or(ResidencyView::Stopped.as_str(), |m| m.residency.as_str());
        for each in STATES {
            metrics
                .models
                .state
                .with_label_values(&[name.as_str(), each])
                .set(i64::from(each == state));
        }
        let ready = i64::from(state == ResidencyView::Ready.as_str());
        metrics.models.current.with_label_values(&label).set(ready);
        metrics.models.swapper_active.with_label_values(&label).set(ready);
        let queued = model.map_or(0, |model| model.queue.len());
        metrics
            .models
            .queue_depth
            .with_label_values(&label)
            .set(i64::try_from(queued).unwrap_or(i64::MAX));
        let adapter = handle.adapter_use(name);
        let in_flight = match &adapter {
            Some(adapter) => adapter.in_flight(),
            None => gate.map_or(0, |gate| gate.in_flight()),
        };
        metrics.models.inflight.with_label_values(&label).set(i64::from(in_flight));
        let facts = view.models.get(name);
        metrics
            .models
            .swapper_uptime
            .with_label_values(&label)
            .set(facts.map_or(0.0, |facts| facts.uptime(now).as_secs_f64()));
        let requests = match &adapter {
            Some(adapter) => adapter.granted(),
            None => {
                facts.map_or(0, |facts| facts.requests_before)
                    + gate.map_or(0, |gate| gate.granted())
            }
        };
        metrics.models.swapper_requests.with_label_values(&label).inc_by(requests as f64);
    }
}

fn read_gpus(metrics: &Metrics, view: &View) {
    metrics.machine.memory_used.reset();
    metrics.machine.memory_total.reset();
    metrics.machine.memory_promised.reset();
    metrics.machine.utilization.reset();
    for gpu in &view.scheduler.gpus {
        let label = [gpu.gpu.to_string()];
        metrics.machine.memory_total.with_label_values(&label).set(gpu.total.0 as f64);
        metrics.machine.memory_promised.with_label_values(&label).set(gpu.promised.0 as f64);
    }
    for gpu in &view.gpus {
        let label = [gpu.id.to_string()];
        if let Some(memory) = &gpu.memory {
            let used = memory.total.saturating_sub(memory.free);
            metrics.machine.memory_used.with_label_values(&label).set(used.0 as f64);
            metrics.machine.memory_total.with_label_values(&label).set(memory.total.0 as f64);
        }
        if let Some(utilization) = gpu.utilization {
            metrics.machine.utilization.with_label_values(&label).set(f64::from(utilization));
        }
    }
}

fn read_host(metrics: &Metrics, view: &View) {
    let (machine, ram) = (&metrics.machine, &view.scheduler.ram);
    let known = [
        (&machine.host_total, ram.total),
        (&machine.host_available, ram.available),
        (&machine.host_promised, Some(ram.promised)),
    ];
    for (gauge, bytes) in known {
        gauge.reset();
        if let Some(bytes) = bytes {
            gauge.with_label_values::<&str>(&[]).set(bytes.0 as f64);
        }
    }
}

fn read_components(metrics: &Metrics, view: &View) {
    metrics.machine.component_up.reset();
    let gpu_up = view.gpu_health.ok && view.scheduler.no_proof.is_none();
    metrics.machine.component_up.with_label_values(&["gpu"]).set(i64::from(gpu_up));
    if let Some(docker) = &view.docker_health {
        metrics.machine.component_up.with_label_values(&["docker"]).set(i64::from(docker.ok));
    }
}
