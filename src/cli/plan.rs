//! `wharf plan MODEL`: what a request for a model would bring about, without doing it.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::client::{self, Client, Connection, Failure, seconds, text};
use crate::units::Bytes;

#[derive(Debug, clap::Args)]
#[command(after_help = format!("Example: wharf plan org/coder:7b --json | jq .evicts\n\n{}", client::EXIT_CODES))]
pub struct Args {
    /// Name or alias of the model
    pub model: String,
    #[command(flatten)]
    pub connection: Connection,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(plan(&args).await, args.connection.json)
}

async fn plan(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    let answer =
        client.post("/plan", &json!({ "model": args.model }), client::READ_TIMEOUT).await?;
    client::show(&answer, args.connection.json, describe);
    Ok(())
}

/// The answer of `/plan`, for people.
fn describe(plan: &Value) -> String {
    let model = text(&plan["model"]);
    let mut told = match plan["verdict"].as_str() {
        Some("ready") => format!("{model} is ready: a request is served at once"),
        Some("begins") => format!("{model} would be loaded at once"),
        Some("waits") => format!("{model} would wait for {}", text(&plan["waits_for"])),
        _ => format!("{model} would be refused: {}", text(&plan["error"]["message"])),
    };
    let gpus: Vec<String> = plan["gpus"].as_array().into_iter().flatten().map(text).collect();
    if plan["fits"] == true && !gpus.is_empty() {
        told.push_str(&format!("\non GPU {}", gpus.join(", ")));
    }
    if plan["estimate_seconds"].as_f64().is_some_and(|left| left > 0.0) {
        told.push_str(&format!(", ready in about {}", seconds(&plan["estimate_seconds"])));
    }
    for evicted in plan["evicts"].as_array().into_iter().flatten() {
        told.push_str(&format!(
            "\nleaves: {} ({})",
            text(&evicted["model"]),
            text(&evicted["why"])
        ));
    }
    told.push_str(&rooms(plan));
    told
}

/// What it needs and how that is known, and what each GPU has left.
fn rooms(plan: &Value) -> String {
    let bytes = |value: &Value| value.as_u64().map(Bytes);
    let mut told = String::new();
    if let Some(need) = bytes(&plan["vram_bytes_per_gpu"]) {
        told.push_str(&format!("\nneeds {need} on each GPU"));
        let declared = bytes(&plan["vram"]["declared_bytes"]);
        match bytes(&plan["vram"]["peak_bytes"]) {
            Some(peak) if declared != Some(need) => {
                told.push_str(&format!(": its peak was {peak}"));
            }
            Some(_) | None => {}
        }
        if let Some(declared) = declared.filter(|&declared| declared != need) {
            told.push_str(&format!(" ({declared} declared)"));
        }
    }
    if let Some(ram) = bytes(&plan["host_ram"]["bytes"]).filter(|&ram| ram > Bytes::ZERO) {
        told.push_str(&format!("\nneeds {ram} of host RAM"));
    }
    for room in plan["rooms"].as_array().into_iter().flatten() {
        let left = bytes(&room["room_bytes"]).unwrap_or_default();
        told.push_str(&format!("\nGPU {}: {left} left", text(&room["gpu"])));
        let mut holders: Vec<String> = Vec::new();
        for of in room["promised"].as_array().into_iter().flatten() {
            let promised = bytes(&of["bytes"]).unwrap_or_default();
            holders.push(format!("{} has {promised}", text(&of["model"])));
        }
        if let Some(foreign) = bytes(&room["strangers_bytes"]).filter(|&held| held > Bytes::ZERO) {
            holders.push(format!("others hold {foreign}"));
        }
        if !holders.is_empty() {
            told.push_str(&format!(" ({})", holders.join(", ")));
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_where_when_and_instead_of_whom() {
        let plan = json!({
            "model": "coder", "verdict": "begins", "fits": true, "gpus": [0, 1],
            "estimate_seconds": 9.5,
            "evicts": [{ "model": "mistral", "why": "idle 41 s" }],
        });
        assert_eq!(
            describe(&plan),
            "coder would be loaded at once\non GPU 0, 1, ready in about 9.5 s\n\
             leaves: mistral (idle 41 s)"
        );
        let known = json!({
            "model": "coder", "verdict": "begins", "fits": true, "gpus": [1], "evicts": [],
            "vram_bytes_per_gpu": 9_u64 << 30,
            "vram": { "declared_bytes": 20_u64 << 30, "peak_bytes": 8_u64 << 30 },
            "host_ram": { "bytes": 4_u64 << 30 },
            "rooms": [
                { "gpu": 0, "room_bytes": 2_u64 << 30, "strangers_bytes": 3_u64 << 30,
                    "promised": [{ "model": "mistral", "bytes": 18_u64 << 30 }] },
                { "gpu": 1, "room_bytes": 23_u64 << 30, "strangers_bytes": 0, "promised": [] },
            ],
        });
        assert_eq!(
            describe(&known),
            "coder would be loaded at once\non GPU 1\n\
             needs 9.0 GiB on each GPU: its peak was 8.0 GiB (20.0 GiB declared)\n\
             needs 4.0 GiB of host RAM\n\
             GPU 0: 2.0 GiB left (mistral has 18.0 GiB, others hold 3.0 GiB)\n\
             GPU 1: 23.0 GiB left"
        );
        let refused = json!({ "model": "big", "verdict": "refused", "fits": false, "gpus": [],
            "error": { "message": "it needs 30 GiB" } });
        assert_eq!(describe(&refused), "big would be refused: it needs 30 GiB");
    }
}
