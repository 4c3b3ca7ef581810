//! The metrics: names and labels of the contract, values of the world, and nothing that a client
//! could invent.

#[path = "support/control/mod.rs"]
mod control;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use control::*;
use wharf::orchestrator::StartKind;
use wharf::scheduler::record::{SwapKind, SwapOutcome, SwapRecord};
use wharf::telemetry::metrics::{Metrics, Tokens};
use wharf::units::ModelName;

/// Value of the series with exactly these labels, in whatever order they are written.
fn value(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let mut wanted: Vec<String> =
        labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
    wanted.sort();
    text.lines().find_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (found, inside) = series.split_once('{').unwrap_or((series, "}"));
        let mut labels: Vec<&str> =
            inside.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).collect();
        labels.sort_unstable();
        (found == name && labels == wanted).then(|| value.parse().expect("a number"))
    })
}

fn exercised(metrics: &Metrics) {
    let mistral = ModelName::new(MISTRAL);
    metrics.swap_ended(&ended_swap(1, MISTRAL, &[TINY, CODER], SwapOutcome::Ready));
    metrics.swap_ended(&ended_swap(2, TINY, &[], SwapOutcome::Failed(fault())));
    metrics.swap_ended(&SwapRecord {
        kind: SwapKind::Unload,
        ..ended_swap(3, MISTRAL, &[], SwapOutcome::Unloaded)
    });
    let tokens = Tokens { prompt: 7, completion: 42 };
    metrics.request_ended(&mistral, "ok", Duration::from_millis(30), tokens);
    metrics.queue_waited(&mistral, Duration::from_secs(9));
    metrics.first_token(&mistral, StartKind::Cold, Duration::from_secs(9));
    metrics.refused("queue_full");
    metrics.instance_restarted(&mistral);
}

// contract: METRIC orchestrator_model_swaps_total
// contract: METRIC orchestrator_swap_duration_seconds
// contract: METRIC orchestrator_current_model
// contract: METRIC swapper_active_model
// contract: METRIC swapper_model_uptime_seconds
// contract: METRIC swapper_model_requests_total
// contract: METRIC orchestrator_swap_phase_duration_seconds
// contract: METRIC orchestrator_queue_depth
// contract: METRIC orchestrator_queue_wait_seconds
// contract: METRIC orchestrator_requests_total
// contract: METRIC orchestrator_request_duration_seconds
// contract: METRIC orchestrator_time_to_first_token_seconds
// contract: METRIC orchestrator_inflight_requests
// contract: METRIC orchestrator_tokens_total
// contract: METRIC orchestrator_gpu_memory_used_bytes
// contract: METRIC orchestrator_gpu_memory_total_bytes
// contract: METRIC orchestrator_gpu_memory_promised_bytes
// contract: METRIC orchestrator_gpu_utilization_ratio
// contract: METRIC orchestrator_model_state
// contract: METRIC orchestrator_evictions_total
// contract: METRIC orchestrator_refusals_total
// contract: METRIC orchestrator_instance_restarts_total
// contract: METRIC orchestrator_build_info
#[test]
fn the_names_types_and_labels_of_the_contract_are_there() {
    const SWAP: &[&str] = &["from", "to", "result"];
    const MODEL: &[&str] = &["model"];
    const GPU: &[&str] = &["gpu"];
    let (puppet, _leases) = world();
    let metrics = Metrics::new();
    exercised(&metrics);
    let text = metrics.render(&puppet.handle);
    for (name, kind, labels) in [
        ("orchestrator_model_swaps_total", "counter", SWAP),
        ("orchestrator_swap_duration_seconds", "histogram", MODEL),
        ("orchestrator_current_model", "gauge", MODEL),
        ("swapper_active_model", "gauge", MODEL),
        ("swapper_model_uptime_seconds", "gauge", MODEL),
        ("swapper_model_requests_total", "counter", MODEL),
        ("orchestrator_swap_phase_duration_seconds", "histogram", &["phase", "model"]),
        ("orchestrator_queue_depth", "gauge", MODEL),
        ("orchestrator_queue_wait_seconds", "histogram", MODEL),
        ("orchestrator_requests_total", "counter", &["model", "outcome"]),
        ("orchestrator_request_duration_seconds", "histogram", MODEL),
        ("orchestrator_time_to_first_token_seconds", "histogram", &["model", "start"]),
        ("orchestrator_inflight_requests", "gauge", MODEL),
        ("orchestrator_tokens_total", "counter", &["model", "kind"]),
        ("orchestrator_gpu_memory_used_bytes", "gauge", GPU),
        ("orchestrator_gpu_memory_total_bytes", "gauge", GPU),
        ("orchestrator_gpu_memory_promised_bytes", "gauge", GPU),
        ("orchestrator_gpu_utilization_ratio", "gauge", GPU),
        ("orchestrator_model_state", "gauge", &["model", "state"]),
        ("orchestrator_evictions_total", "counter", &["model", "cause"]),
        ("orchestrator_refusals_total", "counter", &["reason"]),
        ("orchestrator_instance_restarts_total", "counter", MODEL),
        ("orchestrator_build_info", "gauge", &["version"]),
    ] {
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name} is no {kind}");
        let sample = match kind {
            "histogram" => format!("{name}_bucket{{"),
            _ => format!("{name}{{"),
        };
        let series = text.lines().find_map(|line| line.strip_prefix(&sample));
        let series = series.unwrap_or_else(|| panic!("{name} has no series"));
        let (inside, _) = series.rsplit_once('}').expect("labels");
        let mut found: Vec<&str> =
            inside.split(',').filter_map(|label| label.split('=').next()).collect();
        found.retain(|label| *label != "le");
        found.sort_unstable();
        let mut wanted = labels.to_vec();
        wanted.sort_unstable();
        assert_eq!(found, wanted, "{name}");
    }
}

#[test]
fn a_swap_is_counted_by_who_left_who_came_and_why() {
    let (puppet, _leases) = world();
    let metrics = Metrics::new();
    exercised(&metrics);
    let text = metrics.render(&puppet.handle);
    let swaps = |from, to, result| {
        value(
            &text,
            "orchestrator_model_swaps_total",
            &[("from", from), ("to", to), ("result", result)],
        )
    };
    assert_eq!(swaps(TINY, MISTRAL, "ready"), Some(1.0));
    assert_eq!(swaps("none", TINY, "failed"), Some(1.0));
    assert_eq!(swaps(MISTRAL, "none", "unloaded"), Some(1.0));
    for victim in [TINY, CODER] {
        let labels = [("model", victim), ("cause", "request")];
        assert_eq!(value(&text, "orchestrator_evictions_total", &labels), Some(1.0), "{victim}");
    }
    let duration = |name, model| value(&text, name, &[("model", model)]);
    assert_eq!(duration("orchestrator_swap_duration_seconds_sum", MISTRAL), Some(9.0));
    assert_eq!(duration("orchestrator_swap_duration_seconds_count", TINY), Some(0.0), "failed");
    let prove = [("phase", "prove"), ("model", MISTRAL)];
    assert_eq!(
        value(&text, "orchestrator_swap_phase_duration_seconds_sum", &prove),
        Some(1.2),
        "the unload's phases are not a load's"
    );
    let buckets = |le| {
        let labels = [("model", MISTRAL), ("le", le)];
        value(&text, "orchestrator_swap_duration_seconds_bucket", &labels)
    };
    assert_eq!((buckets("0.05"), buckets("10"), buckets("600")), (Some(0.0), Some(1.0), Some(1.0)));
}

#[test]
fn gauges_show_the_world_at_the_scrape() {
    let (puppet, leases) = world();
    let metrics = Metrics::new();
    let text = metrics.render(&puppet.handle);
    let of = |name, model| value(&text, name, &[("model", model)]);
    assert_eq!(of("orchestrator_current_model", MISTRAL), Some(1.0));
    assert_eq!(of("orchestrator_current_model", CODER), Some(0.0));
    assert_eq!(of("orchestrator_queue_depth", CODER), Some(2.0));
    assert_eq!(of("orchestrator_inflight_requests", MISTRAL), Some(2.0));
    assert_eq!(of("swapper_model_requests_total", MISTRAL), Some(42.0));
    assert!(of("swapper_model_uptime_seconds", MISTRAL).expect("there") >= 3600.0);
    assert_eq!(of("swapper_model_uptime_seconds", TINY), Some(300.0), "it does not grow");
    for (state, expected) in [("starting", 1.0), ("ready", 0.0), ("stopped", 0.0)] {
        let labels = [("model", CODER), ("state", state)];
        assert_eq!(value(&text, "orchestrator_model_state", &labels), Some(expected), "{state}");
    }
    let gib = |n: u64| Some((n << 30) as f64);
    let gpu = |name| value(&text, name, &[("gpu", "0")]);
    assert_eq!(gpu("orchestrator_gpu_memory_used_bytes"), gib(18));
    assert_eq!(gpu("orchestrator_gpu_memory_total_bytes"), gib(24));
    assert_eq!(gpu("orchestrator_gpu_memory_promised_bytes"), gib(20));
    assert_eq!(gpu("orchestrator_gpu_utilization_ratio"), Some(0.25));
    let host = |what| value(&text, &format!("orchestrator_host_memory_{what}_bytes"), &[]);
    assert_eq!((host("total"), host("available")), (gib(64), gib(40)));
    assert_eq!(host("promised"), gib(12));

    drop(leases);
    let text = metrics.render(&puppet.handle);
    let in_flight = value(&text, "orchestrator_inflight_requests", &[("model", MISTRAL)]);
    assert_eq!(in_flight, Some(0.0));
    let requests = value(&text, "swapper_model_requests_total", &[("model", MISTRAL)]);
    assert_eq!(requests, Some(42.0), "a counter never falls");
}

#[test]
fn every_configured_model_has_its_series_from_the_start() {
    let (puppet, _leases) = world();
    let text = Metrics::new().render(&puppet.handle);
    for model in [MISTRAL, CODER, TINY] {
        let zero = |name, more: &[(&str, &str)]| {
            let labels = [&[("model", model)], more].concat();
            assert_eq!(value(&text, name, &labels), Some(0.0), "{name} {labels:?}");
        };
        zero("orchestrator_swap_duration_seconds_count", &[]);
        zero("orchestrator_swap_phase_duration_seconds_count", &[("phase", "prove")]);
        zero("orchestrator_queue_wait_seconds_count", &[]);
        zero("orchestrator_requests_total", &[("outcome", "ok")]);
        zero("orchestrator_request_duration_seconds_count", &[]);
        zero("orchestrator_time_to_first_token_seconds_count", &[("start", "warm")]);
        zero("orchestrator_tokens_total", &[("kind", "completion")]);
        zero("orchestrator_evictions_total", &[("cause", "request")]);
        zero("orchestrator_instance_restarts_total", &[]);
        zero("orchestrator_swap_causes_total", &[("cause", "ensure"), ("result", "ready")]);
    }
    for reason in ["queue_full", "overloaded", "start_failed", "vram_not_freed"] {
        let labels = [("reason", reason)];
        assert_eq!(value(&text, "orchestrator_refusals_total", &labels), Some(0.0), "{reason}");
    }
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    assert_eq!(value(&text, "orchestrator_build_info", &version), Some(1.0));
    drop(puppet.inbox);
    assert!(!Metrics::new().render(&puppet.handle).is_empty(), "also after the owner ended");
}

// contract: RULE metric labels are configured names
#[test]
fn a_model_that_left_the_configuration_leaves_no_series() {
    let (puppet, _leases) = world();
    let metrics = Metrics::new();
    exercised(&metrics);
    assert!(metrics.render(&puppet.handle).contains("\"mistral\""));

    puppet.handle.catalog_for_tests(catalog([model(CODER), model(TINY)]));
    let text = metrics.render(&puppet.handle);
    let left: Vec<&str> = text.lines().filter(|line| line.contains("\"mistral\"")).collect();
    assert!(left.is_empty(), "{left:#?}");
    let tiny = [("from", "none"), ("to", TINY), ("result", "failed")];
    assert_eq!(value(&text, "orchestrator_model_swaps_total", &tiny), Some(1.0), "others stay");

    let late = || {
        metrics.request_ended(&ModelName::new(MISTRAL), "ok", Duration::ZERO, Tokens::default());
    };
    late();
    assert!(!metrics.render(&puppet.handle).contains("\"mistral\""), "a late event revives none");
    puppet.handle.catalog_for_tests(catalog([model(MISTRAL), model(TINY)]));
    late();
    let text = metrics.render(&puppet.handle);
    let ok = [("model", MISTRAL), ("outcome", "ok")];
    assert_eq!(value(&text, "orchestrator_requests_total", &ok), Some(1.0), "and counts when back");
}

/// What Prometheus itself thinks of the names, types and help texts.
#[test]
fn promtool_finds_nothing_to_say() {
    let (puppet, _leases) = world();
    let metrics = Metrics::new();
    exercised(&metrics);
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("skipped: promtool is not installed (Debian: prometheus)");
        return;
    };
    let mut stdin = promtool.stdin.take().expect("piped");
    stdin.write_all(metrics.render(&puppet.handle).as_bytes()).expect("written");
    drop(stdin);
    let output = promtool.wait_with_output().expect("promtool ends");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.is_empty(), "{}: {said}", output.status);
}
