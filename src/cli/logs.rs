//! `wharf logs [SOURCE]`: what Wharf and its engines wrote last, and, asked to follow, every line as
//! it comes.

use std::process::ExitCode;

use serde_json::json;

use super::client::{self, Client, Connection, Failure};

#[derive(Debug, clap::Args)]
#[command(after_help = format!(
    "Examples:\n  wharf logs\n  wharf logs mistral --follow\n  wharf logs proxy --follow --no-history\n\n{}",
    client::EXIT_CODES
))]
pub struct Args {
    /// `proxy` (Wharf itself), `upstream` (all engines) or a model; with --follow. All by default
    #[arg(requires = "follow")]
    pub source: Option<String>,
    /// Go on with every line as it comes, until Ctrl-C
    #[arg(long, short)]
    pub follow: bool,
    /// Only lines from now on
    #[arg(long, requires = "follow")]
    pub no_history: bool,
    #[command(flatten)]
    pub connection: Connection,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(logs(&args).await, args.connection.json)
}

async fn logs(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    let mut path = match (&args.source, args.follow) {
        (_, false) => "/logs".to_owned(),
        (None, true) => "/logs/stream".to_owned(),
        (Some(source), true) => format!("/logs/stream/{}", client::encode(source)),
    };
    if args.no_history {
        path.push_str("?no-history");
    }
    let as_json = args.connection.json;
    client
        .lines(&path, |line| match as_json {
            true => client::say(&json!({ "line": line }).to_string()),
            false => client::say(line),
        })
        .await
}
