//! `wharf load MODEL`: loads a model, without holding it for a first request as `ensure` does.

use std::process::ExitCode;

use super::client::{self, Client, Connection, Failure};
use super::ensure::{self, Wait};

#[derive(Debug, clap::Args)]
#[command(after_help = format!("Example: wharf load org/coder:7b --no-wait\n\n{}", client::EXIT_CODES))]
pub struct Args {
    /// Name or alias of the model
    pub model: String,
    #[command(flatten)]
    pub wait: Wait,
    #[command(flatten)]
    pub connection: Connection,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(load(&args).await, args.connection.json)
}

async fn load(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    let path = format!("/models/{}/load", client::encode(&args.model));
    let answer = client.post(&path, &args.wait.body(), args.wait.limit()).await?;
    client::show(&answer, args.connection.json, ensure::describe);
    Ok(())
}
