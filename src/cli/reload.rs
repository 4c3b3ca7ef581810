//! `wharf reload`: reads models.yaml again.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::client::{self, Client, Connection, Failure, text};

#[derive(Debug, clap::Args)]
#[command(after_help = format!(
    "Example: wharf reload\n\nA file with errors changes nothing.\n\n{}",
    client::EXIT_CODES
))]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(reload(&args).await, args.connection.json)
}

async fn reload(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    let answer = client.post("/config/reload", &json!({}), client::WAIT_TIMEOUT).await?;
    client::show(&answer, args.connection.json, said);
    Ok(())
}

fn said(answer: &Value) -> String {
    let mut lines = vec![text(&answer["message"])];
    for left in answer["left_out"].as_array().into_iter().flatten() {
        lines.push(format!("left out: {}: {}", text(&left["what"]), text(&left["why"])));
    }
    for key in answer["needs_restart"].as_array().into_iter().flatten() {
        lines.push(format!("needs a restart: {}", text(key)));
    }
    lines.join("\n")
}
