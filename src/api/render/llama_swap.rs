//! llama-swap's words: its control paths, byte for byte where scripts read them.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::Snapshot;
use crate::config::catalog::{ModelSpec, RuntimeSpec};
use crate::orchestrator::view::GpuFacts;
use crate::runtime::redact::Secrets;
use crate::scheduler::record::ResidencyView;
use crate::store::Activity;
use crate::telemetry::performance::{Sample, SystemLoad};

const KIB_PER_MIB: u64 = 1024;

/// `unknown` is its word for a model whose process it cannot find.
pub fn state(residency: &ResidencyView) -> &'static str {
    match residency {
        ResidencyView::Stopped | ResidencyView::Sleeping { .. } | ResidencyView::Failed { .. } => {
            "stopped"
        }
        ResidencyView::Starting { .. } | ResidencyView::Waking => "starting",
        ResidencyView::Ready => "ready",
        ResidencyView::Draining | ResidencyView::Stopping | ResidencyView::FallingAsleep => {
            "stopping"
        }
        ResidencyView::Lost => "unknown",
    }
}

/// Data of its `modelStatus` events: models by name, then those of peers.
pub fn model_status(at: &Snapshot<'_>) -> Value {
    let (of_peers, own): (Vec<_>, Vec<_>) =
        at.catalog.models.values().partition(|spec| spec.peer.is_some());
    let models = own.into_iter().map(|spec| {
        let mut row = json!({
            "id": spec.name,
            "name": spec.display_name.as_deref().unwrap_or_default(),
            "description": spec.description.as_deref().unwrap_or_default(),
            "state": state(at.residency(&spec.name)),
            "unlisted": spec.unlisted,
            "peerID": "",
        });
        // It leaves the field out where there are none.
        if !spec.aliases.is_empty() {
            row["aliases"] = json!(spec.aliases);
        }
        row
    });
    // By the names that requests may carry here.
    let peers = of_peers.into_iter().map(|spec| {
        json!({
            "id": spec.name,
            "name": "",
            "description": "",
            "state": "",
            "unlisted": spec.unlisted,
            "peerID": spec.peer,
        })
    });
    models.chain(peers).collect()
}

/// `GET /running`: every model that is not stopped; those of peers run elsewhere.
pub fn running(at: &Snapshot<'_>) -> Value {
    let own = at.catalog.models.values().filter(|spec| spec.peer.is_none());
    let rows = own.filter_map(|spec| {
        let state = state(at.residency(&spec.name));
        (state != "stopped").then(|| {
            let facts = at.view.models.get(&spec.name);
            json!({
                "model": spec.name,
                "state": state,
                "cmd": command(spec),
                "proxy": facts.and_then(|facts| facts.endpoint.as_deref()).unwrap_or_default(),
                "ttl": spec.ttl.map_or(0, |ttl| ttl.as_secs()),
                "name": spec.display_name.as_deref().unwrap_or_default(),
                "description": spec.description.as_deref().unwrap_or_default(),
            })
        })
    });
    json!({ "running": rows.collect::<Vec<_>>() })
}

/// As configured, secrets masked.
fn command(spec: &ModelSpec) -> String {
    let (text, secrets) = match &spec.runtime {
        RuntimeSpec::Process(process) => {
            (shell_words::join(&process.argv), Secrets::of_env(texts(&process.env)))
        }
        RuntimeSpec::Docker(docker) => {
            let what = docker.container.as_ref().or(docker.image.as_ref());
            let words = what.into_iter().chain(&docker.args);
            (shell_words::join(words), Secrets::of_env(texts(&docker.env)))
        }
        RuntimeSpec::External(_) | RuntimeSpec::Ollama(_) => (String::new(), Secrets::default()),
    };
    secrets.redact(&text).into_owned()
}

fn texts(env: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    env.iter().map(|(name, value)| (name.as_str(), value.as_str()))
}

/// A row of `GET /api/metrics`. -1 is its word for what an engine did not tell.
pub fn activity(row: &Activity) -> Value {
    let arrived = UNIX_EPOCH + Duration::from_millis(row.arrived_unix_ms);
    let count = |tokens: Option<u64>| tokens.unwrap_or(0);
    json!({
        "id": row.id,
        // Its rows carry the time at which they were written: the request's end.
        "timestamp": wall(arrived + Duration::from_millis(row.duration_ms)),
        "model": row.model,
        "req_path": row.path,
        "resp_content_type": row.content_type,
        "resp_status_code": row.status,
        "tokens": {
            "cache_tokens": row.cached_tokens.map_or(json!(-1), |tokens| json!(tokens)),
            "input_tokens": count(row.prompt_tokens),
            "output_tokens": count(row.completion_tokens),
            "prompt_per_second": row.prompt_per_second.unwrap_or(-1.0),
            "tokens_per_second": row.tokens_per_second.unwrap_or(-1.0),
        },
        "duration_ms": row.duration_ms,
        // Ours: of the duration, the time before the engine got it. `wharf replay` needs it.
        "queue_ms": row.queue_ms,
        "has_capture": row.has_capture,
    })
}

/// `GET /api/performance` of samples, oldest first.
pub fn performance<'a>(samples: impl Iterator<Item = &'a Sample> + Clone) -> Value {
    let system = samples.clone().map(|sample| system(sample.at, &sample.system));
    let gpus = samples.flat_map(|sample| sample.gpus.iter().map(|facts| gpu(sample.at, facts)));
    json!({
        "enabled": true,
        "sys_stats": system.collect::<Vec<_>>(),
        "gpu_stats": gpus.collect::<Vec<_>>(),
    })
}

fn system(at: SystemTime, load: &SystemLoad) -> Value {
    let memory = load.memory;
    let [one, five, fifteen] = load.load_average;
    let network = load.network.iter().map(|interface| {
        json!({
            "name": interface.name,
            "bytes_recv": interface.received_bytes,
            "bytes_sent": interface.sent_bytes,
        })
    });
    json!({
        "timestamp": wall(at),
        "cpu_util_per_core": load.cpu_percent,
        "mem_total_mb": memory.total_kib / KIB_PER_MIB,
        "mem_used_mb": memory.total_kib.saturating_sub(memory.available_kib) / KIB_PER_MIB,
        "mem_free_mb": memory.free_kib / KIB_PER_MIB,
        "swap_total_mb": memory.swap_total_kib / KIB_PER_MIB,
        "swap_used_mb": memory.swap_total_kib.saturating_sub(memory.swap_free_kib) / KIB_PER_MIB,
        "load_avg_1": one,
        "load_avg_5": five,
        "load_avg_15": fifteen,
        "net_io": network.collect::<Vec<_>>(),
    })
}

/// Temperatures, fan and power are not read: 0, as it has it for cards that do not tell.
fn gpu(at: SystemTime, facts: &GpuFacts) -> Value {
    let memory = facts.memory.as_ref();
    let total = memory.map_or(0, |memory| memory.total.as_mib());
    let used = memory.map_or(0, |memory| memory.total.saturating_sub(memory.free).as_mib());
    let percent = if total == 0 { 0.0 } else { used as f64 * 100.0 / total as f64 };
    json!({
        "timestamp": wall(at),
        "id": facts.id,
        "name": facts.name,
        "uuid": facts.uuid,
        "temp_c": 0,
        "vram_temp_c": 0,
        "gpu_util_pct": f64::from(facts.utilization.unwrap_or(0.0)) * 100.0,
        "mem_util_pct": percent,
        "mem_used_mb": used,
        "mem_total_mb": total,
        "fan_speed_pct": 0.0,
        "power_draw_w": 0.0,
    })
}

fn wall(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
