//! `wharf swaps [ID]`: the ledger of swaps, or all of one.

use std::process::ExitCode;

use serde_json::Value;

use super::client::{self, Client, Connection, Failure, seconds, table, text};
use super::ensure::phases;

#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples: wharf swaps --model mistral --limit 5\n          wharf swaps s12\n\n{}", client::EXIT_CODES))]
pub struct Args {
    /// One swap, with its decision, phases, and what went wrong
    pub id: Option<String>,
    /// Only swaps of this model
    #[arg(long, conflicts_with = "id")]
    pub model: Option<String>,
    /// Show at most this many, the newest first
    #[arg(long, default_value_t = 20, conflicts_with = "id")]
    pub limit: usize,
    #[command(flatten)]
    pub connection: Connection,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(swaps(&args).await, args.connection.json)
}

async fn swaps(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    let path = match (&args.id, &args.model) {
        (Some(id), _) => format!("/swaps/{}", client::encode(id)),
        (None, Some(model)) => {
            format!("/swaps?limit={}&model={}", args.limit, client::encode(model))
        }
        (None, None) => format!("/swaps?limit={}", args.limit),
    };
    let answer = client.get(&path).await?;
    let describe = if args.id.is_some() { one } else { list };
    client::show(&answer, args.connection.json, describe);
    Ok(())
}

/// The answer of `/swaps`, for people.
pub fn list(answer: &Value) -> String {
    let rows: Vec<Vec<String>> = answer["swaps"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|swap| {
            vec![
                text(&swap["id"]),
                text(&swap["began"]),
                text(&swap["model"]),
                text(&swap["cause"]),
                result(swap),
                seconds(&swap["seconds"]),
                victims(swap),
                phases(&swap["phases"]),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "no swaps yet".to_owned();
    }
    table(&["ID", "BEGAN", "MODEL", "CAUSE", "RESULT", "TOOK", "EVICTED", "PHASES"], &rows)
}

/// The answer of `/swaps/{id}`, for people.
pub fn one(swap: &Value) -> String {
    let mut lines = vec![
        format!(
            "{} {} {}: {} after {}",
            text(&swap["id"]),
            text(&swap["kind"]),
            text(&swap["model"]),
            result(swap),
            seconds(&swap["seconds"]),
        ),
        format!("began    {} (cause: {})", text(&swap["began"]), text(&swap["cause"])),
        format!("decision {}", text(&swap["decision"])),
    ];
    for victim in swap["evicted"].as_array().into_iter().flatten() {
        lines.push(format!("evicted  {}: {}", text(&victim["model"]), text(&victim["why"])));
    }
    lines.push(format!("phases   {}", phases(&swap["phases"])));
    if swap["message"].is_string() {
        lines.push(format!("why      {}", text(&swap["message"])));
    }
    for line in swap["log"].as_array().into_iter().flatten() {
        lines.push(format!("  | {}", text(line)));
    }
    lines.join("\n")
}

/// `ready`, `failed`, …; of a swap under way its phase.
fn result(swap: &Value) -> String {
    match swap["result"].as_str() {
        Some(result) => result.to_owned(),
        None => format!("{} …", text(&swap["phase"])),
    }
}

fn victims(swap: &Value) -> String {
    let evicted = swap["evicted"].as_array().into_iter().flatten();
    let names: Vec<String> = evicted.map(|victim| text(&victim["model"])).collect();
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}
