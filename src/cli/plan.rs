//! `wharf plan MODEL`: what a request for a model would bring about, without doing it.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::client::{self, Client, Connection, Failure, seconds, text};

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
        let refused = json!({ "model": "big", "verdict": "refused", "fits": false, "gpus": [],
            "error": { "message": "it needs 30 GiB" } });
        assert_eq!(describe(&refused), "big would be refused: it needs 30 GiB");
    }
}
