//! One file per subcommand.

pub mod check;
pub mod demo;
pub mod engine;
pub mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "wharf",
    version,
    about = "Run more models than your GPUs can hold",
    after_help = "Start with `wharf demo`, then `wharf check` and `wharf serve`."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the gateway and the orchestrator
    Serve(serve::ServeArgs),
    /// See it work: stand-in engines on simulated GPUs
    Demo(demo::DemoArgs),
    /// Run the stand-in engine
    Engine(engine::Args),
}

/// Flags → subcommand → exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    crate::telemetry::log::init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("wharf: failed to start its threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ran = runtime.block_on(async {
        match cli.command {
            Command::Serve(args) => serve::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::Demo(args) => demo::run(args).await.map(|()| ExitCode::SUCCESS),
            Command::Engine(args) => engine::run(args).await,
        }
    });
    // Blocking work under way (a file read, a hung driver call) must not hold the exit back.
    runtime.shutdown_background();
    ran.unwrap_or_else(|error| {
        eprintln!("wharf: {error:#}");
        ExitCode::FAILURE
    })
}
