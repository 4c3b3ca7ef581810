//! Every metric name in one place.
//!
//! Label values come from the configuration and from closed sets only, so that no client can
//! create series. Counters and histograms are written where things happen; gauges (and counters
//! that somebody else keeps) are read from the orchestrator's view when a scrape asks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use prometheus::core::Collector;
use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGaugeVec, Opts, Registry,
};

use crate::orchestrator::{Handle, StartKind};
use crate::scheduler::record::{SwapKind, SwapOutcome, SwapRecord};
use crate::units::ModelName;

/// `from` of a swap that evicted nothing, `to` of a swap that only took a model away.
pub(super) const NO_MODEL: &str = "none";

/// A swap takes from 50 ms (wake of a small model) to 10 min (cold start of a large one).
const SWAP_BUCKETS_SECONDS: &[f64] =
    &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// A phase may also take next to nothing.
const PHASE_BUCKETS_SECONDS: &[f64] =
    &[0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// From an answer of a tiny model that is ready to a wait through several swaps.
const REQUEST_BUCKETS_SECONDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
];

#[derive(Debug)]
pub struct Metrics {
    pub(super) registry: Registry,
    /// One scrape at a time: gauges are cleared and set again before they are gathered.
    pub(super) scrape: Mutex<()>,
    pub(super) swaps: Swaps,
    pub(super) requests: Requests,
    pub(super) models: Models,
    pub(super) machine: Machine,
    /// From one scrape to the next.
    known: ArcSwap<BTreeMap<ModelName, Arc<OfModel>>>,
}

/// The outcome of nearly all requests.
const OK: &str = "ok";

/// As the engine counted them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tokens {
    pub prompt: u64,
    pub completion: u64,
}

/// The series that nearly every request of a model adds to: finding one by its labels costs more
/// than adding to it.
#[derive(Debug)]
struct OfModel {
    ok: IntCounter,
    duration: Histogram,
    queue_wait: Histogram,
    first_token_hot: Histogram,
    prompt: IntCounter,
    completion: IntCounter,
}

impl OfModel {
    fn begun(all: &Requests, model: &str) -> OfModel {
        OfModel {
            ok: all.ended.with_label_values(&[model, OK]),
            duration: all.duration.with_label_values(&[model]),
            queue_wait: all.queue_wait.with_label_values(&[model]),
            first_token_hot: all.first_token.with_label_values(&[model, StartKind::Hot.as_str()]),
            prompt: all.tokens.with_label_values(&[model, "prompt"]),
            completion: all.tokens.with_label_values(&[model, "completion"]),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    pub fn new() -> Metrics {
        let registry = Registry::new();
        let metrics = Metrics {
            swaps: Swaps::new(&registry),
            requests: Requests::new(&registry),
            models: Models::new(&registry),
            machine: Machine::new(&registry),
            scrape: Mutex::new(()),
            known: ArcSwap::default(),
            registry,
        };
        metrics.build_info();
        metrics
    }

    fn build_info(&self) {
        let opts = Opts::new("orchestrator_build_info", "1; the version of Wharf is in the label.")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        registered(&self.registry, Gauge::with_opts(opts)).set(1.0);
    }

    /// A swap ended (`outcome` is set).
    pub fn swap_ended(&self, swap: &SwapRecord) {
        let Some(outcome) = &swap.outcome else { return };
        let (model, result) = (swap.model.as_str(), outcome.as_str());
        let (from, to) = match swap.kind {
            SwapKind::Load => {
                (swap.evicted.first().map_or(NO_MODEL, |first| first.model.as_str()), model)
            }
            SwapKind::Unload => (model, NO_MODEL),
        };
        self.swaps.ended.with_label_values(&[from, to, result]).inc();
        self.swaps.causes.with_label_values(&[model, swap.cause.as_str(), result]).inc();
        for victim in &swap.evicted {
            let labels = [victim.model.as_str(), swap.cause.as_str()];
            self.swaps.evictions.with_label_values(&labels).inc();
        }
        if swap.kind == SwapKind::Unload {
            return;
        }
        for (phase, took) in &swap.phases {
            let labels = [phase.as_str(), model];
            self.swaps.phase_duration.with_label_values(&labels).observe(took.as_secs_f64());
        }
        if let (SwapOutcome::Ready, Some(ended)) = (outcome, swap.ended) {
            let took = ended.since(swap.began);
            self.swaps.duration.with_label_values(&[model]).observe(took.as_secs_f64());
        }
    }

    /// A request ended. `outcome`: `ok`, `client_gone`, `upstream_error`, `cut`, or the refusal's code.
    pub fn request_ended(&self, model: &ModelName, outcome: &str, took: Duration, tokens: Tokens) {
        self.with_series_of(model, |of| {
            match outcome {
                OK => of.ok.inc(),
                _ => self.requests.ended.with_label_values(&[model.as_str(), outcome]).inc(),
            }
            of.duration.observe(took.as_secs_f64());
            of.prompt.inc_by(tokens.prompt);
            of.completion.inc_by(tokens.completion);
        });
    }

    pub fn queue_waited(&self, model: &ModelName, waited: Duration) {
        self.with_series_of(model, |of| of.queue_wait.observe(waited.as_secs_f64()));
    }

    pub fn first_token(&self, model: &ModelName, start: StartKind, took: Duration) {
        let seconds = took.as_secs_f64();
        if start == StartKind::Hot {
            return self.with_series_of(model, |of| of.first_token_hot.observe(seconds));
        }
        let labels = [model.as_str(), start.as_str()];
        self.requests.first_token.with_label_values(&labels).observe(seconds);
    }

    fn with_series_of(&self, model: &ModelName, tell: impl FnOnce(&OfModel)) {
        let known = self.known.load();
        if let Some(of) = known.get(model) {
            return tell(of);
        }
        drop(known);
        // Found inside: if the others are forgotten meanwhile, as some are gone, so is this one.
        self.known.rcu(|known| {
            let mut known = BTreeMap::clone(known);
            let found = || Arc::new(OfModel::begun(&self.requests, model.as_str()));
            known.entry(model.clone()).or_insert_with(found);
            known
        });
        match self.known.load().get(model) {
            Some(of) => tell(of),
            None => tell(&OfModel::begun(&self.requests, model.as_str())),
        }
    }

    /// Some may be of series that are gone.
    pub(super) fn forget_handles(&self) {
        self.known.store(Arc::default());
    }

    pub fn refused(&self, reason: &str) {
        self.requests.refusals.with_label_values(&[reason]).inc();
    }

    pub fn instance_restarted(&self, model: &ModelName) {
        self.swaps.restarts.with_label_values(&[model.as_str()]).inc();
    }

    /// Prometheus text; gauges are read from the handle's view at this moment.
    pub fn render(&self, handle: &Handle) -> String {
        super::scrape::render(self, handle)
    }
}

/// What swaps did.
#[derive(Debug)]
pub(super) struct Swaps {
    pub ended: IntCounterVec,
    pub causes: IntCounterVec,
    pub duration: HistogramVec,
    pub phase_duration: HistogramVec,
    pub evictions: IntCounterVec,
    pub restarts: IntCounterVec,
}

impl Swaps {
    fn new(r: &Registry) -> Swaps {
        Swaps {
            ended: counter(
                r,
                "orchestrator_model_swaps_total",
                "Swaps that ended, by first evicted model (from), loaded model (to) and result.",
                &["from", "to", "result"],
            ),
            causes: counter(
                r,
                "orchestrator_swap_causes_total",
                "Swaps that ended, by the model they were for, what caused them, and result.",
                &["model", "cause", "result"],
            ),
            duration: histogram(
                r,
                "orchestrator_swap_duration_seconds",
                "Time from the decision to the ready model; only swaps that made one ready.",
                &["model"],
                SWAP_BUCKETS_SECONDS,
            ),
            phase_duration: histogram(
                r,
                "orchestrator_swap_phase_duration_seconds",
                "Time of each finished phase of the swaps that load a model.",
                &["phase", "model"],
                PHASE_BUCKETS_SECONDS,
            ),
            evictions: counter(
                r,
                "orchestrator_evictions_total",
                "Models taken off their GPUs to make room, by what wanted the room.",
                &["model", "cause"],
            ),
            restarts: counter(
                r,
                "orchestrator_instance_restarts_total",
                "Starts that ended ready after the instance before had died by itself.",
                &["model"],
            ),
        }
    }
}

/// What became of requests.
#[derive(Debug)]
pub(super) struct Requests {
    pub ended: IntCounterVec,
    pub duration: HistogramVec,
    pub queue_wait: HistogramVec,
    pub first_token: HistogramVec,
    pub tokens: IntCounterVec,
    pub refusals: IntCounterVec,
}

impl Requests {
    fn new(r: &Registry) -> Requests {
        Requests {
            ended: counter(
                r,
                "orchestrator_requests_total",
                "Requests that ended: ok, client_gone, upstream_error, cut, or the refusal's code.",
                &["model", "outcome"],
            ),
            duration: histogram(
                r,
                "orchestrator_request_duration_seconds",
                "Time from a request's arrival to its last byte, waiting included.",
                &["model"],
                REQUEST_BUCKETS_SECONDS,
            ),
            queue_wait: histogram(
                r,
                "orchestrator_queue_wait_seconds",
                "Time that requests waited for a lease on their model.",
                &["model"],
                REQUEST_BUCKETS_SECONDS,
            ),
            first_token: histogram(
                r,
                "orchestrator_time_to_first_token_seconds",
                "Time from arrival to the first byte of the answer, by how the model was met.",
                &["model", "start"],
                REQUEST_BUCKETS_SECONDS,
            ),
            tokens: counter(
                r,
                "orchestrator_tokens_total",
                "Tokens as the engines counted them, by kind (prompt, completion).",
                &["model", "kind"],
            ),
            refusals: counter(
                r,
                "orchestrator_refusals_total",
                "Requests refused, by the code that the client got.",
                &["reason"],
            ),
        }
    }
}

/// Gauges of models, and counters that the orchestrator keeps, set at each scrape.
#[derive(Debug)]
pub(super) struct Models {
    pub current: IntGaugeVec,
    pub state: IntGaugeVec,
    pub queue_depth: IntGaugeVec,
    pub inflight: IntGaugeVec,
    pub swapper_active: IntGaugeVec,
    pub swapper_uptime: GaugeVec,
    pub swapper_requests: CounterVec,
}

impl Models {
    fn new(r: &Registry) -> Models {
        Models {
            current: gauge(
                r,
                "orchestrator_current_model",
                "1 for each model that is ready, 0 for every other configured one.",
                &["model"],
            ),
            state: gauge(
                r,
                "orchestrator_model_state",
                "1 for the state that the model is in, 0 for every other state.",
                &["model", "state"],
            ),
            queue_depth: gauge(
                r,
                "orchestrator_queue_depth",
                "Requests that wait for the model now.",
                &["model"],
            ),
            inflight: gauge(
                r,
                "orchestrator_inflight_requests",
                "Requests that the model is serving now.",
                &["model"],
            ),
            swapper_active: gauge(
                r,
                "swapper_active_model",
                "1 for each active model, 0 for every other (name of the swapper service).",
                &["model"],
            ),
            swapper_uptime: gauge_f64(
                r,
                "swapper_model_uptime_seconds",
                "Time that the model was loaded, summed (name of the swapper service).",
                &["model"],
            ),
            swapper_requests: registered(
                r,
                CounterVec::new(
                    Opts::new(
                        "swapper_model_requests_total",
                        "Requests given to the model (name of the swapper service).",
                    ),
                    &["model"],
                ),
            ),
        }
    }
}

/// Gauges of GPUs, of host RAM and of what Wharf needs, set at each scrape.
#[derive(Debug)]
pub(super) struct Machine {
    pub memory_used: GaugeVec,
    pub memory_total: GaugeVec,
    pub memory_promised: GaugeVec,
    pub utilization: GaugeVec,
    pub host_total: GaugeVec,
    pub host_available: GaugeVec,
    pub host_promised: GaugeVec,
    pub component_up: IntGaugeVec,
}

impl Machine {
    fn new(r: &Registry) -> Machine {
        Machine {
            memory_used: gauge_f64(
                r,
                "orchestrator_gpu_memory_used_bytes",
                "GPU memory in use by anybody, as last read.",
                &["gpu"],
            ),
            memory_total: gauge_f64(
                r,
                "orchestrator_gpu_memory_total_bytes",
                "Memory of the GPU.",
                &["gpu"],
            ),
            memory_promised: gauge_f64(
                r,
                "orchestrator_gpu_memory_promised_bytes",
                "GPU memory promised to instances until their release is proven.",
                &["gpu"],
            ),
            utilization: gauge_f64(
                r,
                "orchestrator_gpu_utilization_ratio",
                "Share of time in which the GPU was busy, 0 to 1.",
                &["gpu"],
            ),
            host_total: gauge_f64(
                r,
                "orchestrator_host_memory_total_bytes",
                "Host RAM, declared or as the kernel says; absent where it is not known.",
                &[],
            ),
            host_available: gauge_f64(
                r,
                "orchestrator_host_memory_available_bytes",
                "Host RAM that programs can still get, as last read; absent where it is not.",
                &[],
            ),
            host_promised: gauge_f64(
                r,
                "orchestrator_host_memory_promised_bytes",
                "Host RAM promised to instances until their end.",
                &[],
            ),
            component_up: gauge(
                r,
                "orchestrator_component_up",
                "1 while the component (gpu, docker) answers; absent where it is not used.",
                &["component"],
            ),
        }
    }
}

/// Every metric is made once, from constants in this file: a failure is a typing error here.
const BAD_METRIC: &str = "metric names, labels and buckets in this file are valid and unique";

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    metric: Result<C, prometheus::Error>,
) -> C {
    let metric = metric.expect(BAD_METRIC);
    registry.register(Box::new(metric.clone())).expect(BAD_METRIC);
    metric
}

fn counter(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(r, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    registered(r, IntGaugeVec::new(Opts::new(name, help), labels))
}

fn gauge_f64(r: &Registry, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    registered(r, GaugeVec::new(Opts::new(name, help), labels))
}

fn histogram(
    r: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets_seconds: &[f64],
) -> HistogramVec {
    let opts = HistogramOpts::new(name, help).buckets(buckets_seconds.to_vec());
    registered(r, HistogramVec::new(opts, labels))
}
