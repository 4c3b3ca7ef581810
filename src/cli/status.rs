//! `wharf status`: models, queue, swaps under way and GPUs at a glance.

use std::process::ExitCode;

use serde_json::Value;

use super::client::{self, Client, Connection, Failure, seconds, table, text};

/// Cells of a memory bar.
const BAR_CELLS: u64 = 24;

#[derive(Debug, clap::Args)]
#[command(after_help = format!("Example: wharf status --json | jq .current_models\n\n{}", client::EXIT_CODES))]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,
    /// Only ask whether Wharf can serve; needs no key. Exit code 0 if so, else 5
    #[arg(long)]
    pub health: bool,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(status(&args).await, args.connection.json)
}

async fn status(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    if args.health {
        return health(&client, args.connection.json).await;
    }
    let status = client.get("/status").await?;
    let gpus = match args.connection.json {
        true => Value::Null,
        false => client.get("/gpus").await?,
    };
    client::show(&status, args.connection.json, |status| describe(client.base(), status, &gpus));
    Ok(())
}

/// The answers of `/status` and `/gpus`, for people.
pub fn describe(base: &str, status: &Value, gpus: &Value) -> String {
    let mut told = format!(
        "Wharf at {base}: {}, {}; {} of {} models ready, {} in flight, {} waiting",
        text(&status["status"]),
        text(&status["mode"]),
        status["loaded_models"].as_array().map_or(0, Vec::len),
        text(&status["total_models"]),
        text(&status["in_flight"]),
        text(&status["queued"]),
    );
    if let Some(why) = status["no_proof"].as_str() {
        told.push_str(&format!("\nnothing starts: {why}"));
    }
    for left in status["leftovers"].as_array().into_iter().flatten() {
        told.push_str(&leftover(left));
    }
    let swaps: Vec<String> = status["swaps"].as_array().into_iter().flatten().map(swap).collect();
    let mut bars: Vec<String> = gpus["gpus"].as_array().into_iter().flatten().map(gpu).collect();
    bars.extend(ram(&gpus["host_memory"]));
    for block in [models(status), swaps.join("\n"), bars.join("\n")] {
        if !block.is_empty() {
            told.push_str(&format!("\n\n{block}"));
        }
    }
    told
}

/// For health checks of containers and load balancers.
async fn health(client: &Client, json: bool) -> Result<(), Failure> {
    match client.get("/health").await {
        Ok(body) => {
            client::show(&body, json, |body| text(&body["status"]));
            Ok(())
        }
        Err(Failure::Refused { status, body, .. }) => {
            let failed = body.as_object().into_iter().flatten();
            let failed = failed.filter(|(_, part)| part["status"] == "failed");
            let parts: Vec<String> =
                failed.map(|(name, part)| format!("{name}: {}", text(&part["detail"]))).collect();
            let message = format!("{}: {}", text(&body["status"]), parts.join("; "));
            Err(Failure::Refused { status, message, body })
        }
        Err(failure) => Err(failure),
    }
}

fn models(status: &Value) -> String {
    let rows: Vec<Vec<String>> = status["models"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, model)| {
            vec![
                name.clone(),
                state(model),
                text(&model["gpus"]),
                text(&model["in_flight"]),
                text(&model["queued"]),
                seconds(&model["ready_in_seconds"]),
                note(model),
            ]
        })
        .collect();
    table(&["MODEL", "STATE", "GPUS", "IN FLIGHT", "WAITING", "READY IN", "NOTE"], &rows)
}

pub(super) fn state(model: &Value) -> String {
    match model["phase"].as_str() {
        Some(phase) => format!("{} ({phase})", text(&model["state"])),
        None => text(&model["state"]),
    }
}

/// Why it is not ready, or what it waits for.
pub(super) fn note(model: &Value) -> String {
    if model["state"] == "failed" {
        let retry = seconds(&model["retry_in_seconds"]);
        return format!("{}; next attempt in {retry}", text(&model["message"]));
    }
    text(&model["waiting_for"])
}

/// `leftover container wharf-ada-7 (ada, i7): … ; next attempt in 5.0 s`
fn leftover(left: &Value) -> String {
    format!(
        "\nleftover {} ({}, {}): {}; next attempt in {}",
        text(&left["what"]),
        text(&left["model"]),
        text(&left["instance"]),
        text(&left["message"]),
        seconds(&left["retry_in_seconds"]),
    )
}

/// `s9 org/coder:7b: start for 3.2 s, load_weights 40 %, about 9.0 s left`
pub(super) fn swap(swap: &Value) -> String {
    let mut line = format!(
        "swap {} {}: {} for {}",
        text(&swap["id"]),
        text(&swap["model"]),
        text(&swap["phase"]),
        seconds(&swap["phase_seconds"]),
    );
    let progress = &swap["progress"];
    if let Some(stage) = progress["stage"].as_str().filter(|stage| !stage.is_empty()) {
        line.push_str(&format!(", {stage}"));
        if let Some(fraction) = progress["fraction"].as_f64() {
            line.push_str(&format!(" {:.0} %", fraction * 100.0));
        }
    }
    if swap["estimate_seconds"].is_number() {
        line.push_str(&format!(", about {} left", seconds(&swap["estimate_seconds"])));
    }
    line
}

/// `GPU 0 ██████░░░░ 18.0 of 24.0 GiB used, 20.0 promised (mistral, coder)`
pub(super) fn gpu(gpu: &Value) -> String {
    let memory = bar(gpu["used_bytes"].as_u64(), gpu["total_bytes"].as_u64());
    format!("GPU {} {memory}, {}", text(&gpu["gpu"]), promised(gpu))
}

/// `Host RAM ██████░░░░ 18.0 of 64.0 GiB used, 20.0 GiB promised (mistral, coder)`, where
/// something of it is known or promised.
pub(super) fn ram(ram: &Value) -> Option<String> {
    let total = ram["total_bytes"].as_u64();
    let available = ram["available_bytes"].as_u64();
    let used = total.zip(available).map(|(total, available)| total.saturating_sub(available));
    let known = total.is_some() || ram["promised_bytes"].as_u64().is_some_and(|bytes| bytes > 0);
    known.then(|| format!("Host RAM {}, {}", bar(used, total), promised(ram)))
}

fn gib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1u32 << 30))
}

fn promised(place: &Value) -> String {
    let bytes = place["promised_bytes"].as_u64().unwrap_or_default();
    let to = text(&place["promised_to"]).replace(',', ", ");
    format!("{} GiB promised ({to})", gib(bytes))
}

fn bar(used: Option<u64>, total: Option<u64>) -> String {
    match (used, total) {
        (Some(used), Some(total)) if total > 0 => {
            let full = usize::try_from((used * BAR_CELLS).div_ceil(total).min(BAR_CELLS));
            let full = full.unwrap_or_default();
            let empty = usize::try_from(BAR_CELLS).unwrap_or_default() - full;
            let bar = "█".repeat(full) + &"░".repeat(empty);
            format!("{bar} {} of {} GiB used", gib(used), gib(total))
        }
        (_, Some(total)) => format!("{} GiB, use unknown", gib(total)),
        (_, None) => "memory unknown".to_owned(),
    }
}
