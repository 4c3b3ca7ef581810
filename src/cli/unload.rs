//! `wharf unload MODEL`: takes a model off its GPUs once its requests ended.

use std::process::ExitCode;

use serde_json::json;

use super::client::{self, Client, Connection, Failure, text};

#[derive(Debug, clap::Args)]
#[command(after_help = format!("Example: wharf unload mistral --force\n\n{}", client::EXIT_CODES))]
pub struct Args {
    /// Name or alias of the model
    pub model: String,
    /// End the requests that it still serves
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub connection: Connection,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(unload(&args).await, args.connection.json)
}

async fn unload(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    let path = format!("/models/{}/unload", client::encode(&args.model));
    let answer = client.post(&path, &json!({ "force": args.force }), client::WAIT_TIMEOUT).await?;
    client::show(&answer, args.connection.json, |answer| text(&answer["message"]));
    Ok(())
}
