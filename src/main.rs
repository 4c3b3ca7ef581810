use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "wharf", version)]
enum Cli {
    Engine(wharf::cli::engine::Args),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    match Cli::parse() {
        Cli::Engine(args) => wharf::cli::engine::run(args).await,
    }
}
