//! `wharf ensure MODEL`: makes a model ready, and says what that took.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{self, Client, Connection, Failure, text};
use crate::scheduler::record::Phase;

#[derive(Debug, clap::Args)]
#[command(after_help = format!("Example: wharf ensure mistral --timeout 2m\n\n{}", client::EXIT_CODES))]
pub struct Args {
    /// Name or alias of the model
    pub model: String,
    #[command(flatten)]
    pub wait: Wait,
    #[command(flatten)]
    pub connection: Connection,
}

/// How long a caller waits for a model.
#[derive(Debug, clap::Args)]
pub struct Wait {
    /// Give up waiting after this time (the swap goes on): 90s, 2m
    #[arg(long, value_name = "TIME")]
    pub timeout: Option<humantime::Duration>,
    /// Begin, and do not wait
    #[arg(long, conflicts_with = "timeout")]
    pub no_wait: bool,
}

impl Wait {
    /// For how long the answer may take: the orchestrator keeps the caller's own limit.
    pub fn limit(&self) -> Duration {
        self.timeout.map_or(client::WAIT_TIMEOUT, |timeout| *timeout + client::READ_TIMEOUT)
    }

    pub fn body(&self) -> Value {
        let mut body = json!({});
        if let Some(timeout) = self.timeout {
            body["timeout"] = json!(timeout.as_secs_f64());
        }
        if self.no_wait {
            body["wait"] = json!(false);
        }
        body
    }
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(ensure(&args).await, args.connection.json)
}

async fn ensure(args: &Args) -> Result<(), Failure> {
    let mut body = args.wait.body();
    body["model"] = json!(args.model);
    let client = Client::new(&args.connection)?;
    let answer = client.post("/ensure_model", &body, args.wait.limit()).await?;
    client::show(&answer, args.connection.json, describe);
    Ok(())
}

/// The answer of ensure or load, for people.
pub fn describe(answer: &Value) -> String {
    let model = text(&answer["model"]);
    if answer["status"] == "accepted" {
        return match (answer["swap_id"].as_str(), answer["state"].as_str()) {
            (_, Some("ready")) => format!("{model} is ready"),
            (Some(id), _) => format!("{model}: starting; swap {id}; watch with `wharf swaps {id}`"),
            (None, _) => format!("{model}: queued until there is room; watch with `wharf status`"),
        };
    }
    if answer["swapped"] != true {
        return format!("{model} is ready (it was already)");
    }
    let mut told = format!(
        "{model} is ready after {} (swap {}){}",
        client::seconds(&answer["seconds"]),
        text(&answer["swap_id"]),
        evicted(&answer["evicted"]),
    );
    let phases = phases(&answer["phases"]);
    if !phases.is_empty() {
        told.push_str(&format!("\n  {phases}"));
    }
    told
}

/// `drain 500 ms, prove 1.2 s, start 7.0 s`, in the order of a swap.
pub fn phases(phases: &Value) -> String {
    let each = Phase::ALL.iter().filter_map(|phase| {
        let took = phases.get(phase.as_str())?;
        Some(format!("{} {}", phase.as_str(), client::seconds(took)))
    });
    each.collect::<Vec<_>>().join(", ")
}

/// ` in place of coder, tiny`, or nothing.
fn evicted(evicted: &Value) -> String {
    let victims: Vec<String> =
        evicted.as_array().into_iter().flatten().map(|victim| text(&victim["model"])).collect();
    if victims.is_empty() { String::new() } else { format!(" in place of {}", victims.join(", ")) }
}
