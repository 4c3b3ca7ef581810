//! One file per subcommand.

pub mod check;
pub mod client;
pub mod demo;
pub mod doctor;
pub mod engine;
pub mod ensure;
pub mod import;
pub mod load;
pub mod logs;
pub mod plan;
pub mod pull;
pub mod reload;
pub mod replay;
pub mod schema;
pub mod serve;
pub mod status;
pub mod swaps;
pub mod top;
mod trust;
pub mod unload;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::runtime::docker::DockerRuntime;

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
    /// Check a configuration: every mistake at once, with line and fix
    #[command(after_help = "Example:\n  wharf check --config models.yaml\n\n\
        Exit codes: 0 it can be used, 1 it cannot, 2 the file cannot be read.")]
    Check {
        /// The configuration, as `--config`
        #[arg(conflicts_with = "config")]
        file: Option<PathBuf>,
        /// The configuration
        #[arg(long, short, env = "WHARF_CONFIG")]
        config: Option<PathBuf>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Convert the configuration of another tool
    Import(import::Args),
    /// The JSON Schema of the configuration, for editors
    Schema(schema::Args),
    /// Models, queue, swaps under way and GPUs at a glance
    Status(status::Args),
    /// The same live: a picture every second
    Top(top::Args),
    /// What a person would look at first: configuration, ports, Docker, GPUs, disk, backends
    Doctor(doctor::Args),
    /// Make a model ready, wait for it, and hold it for its caller (until its first request ends,
    /// 30 s at most); `load` does not hold
    Ensure(ensure::Args),
    /// Load a model without holding it
    Load(load::Args),
    /// Unload a model
    Unload(unload::Args),
    /// Read models.yaml again: only what changed is touched
    Reload(reload::Args),
    /// Recorded traffic against the real scheduler, on a virtual clock: who would have waited how long
    Replay(replay::Args),
    /// What a request for a model would bring about, without doing it
    Plan(plan::Args),
    /// Bring images and weights here, so that no swap has to wait for a download
    Pull {
        #[command(flatten)]
        args: pull::Args,
        /// The configuration; models.yaml by default
        #[arg(long, short, env = "WHARF_CONFIG")]
        config: Option<PathBuf>,
    },
    /// What Wharf and its engines wrote last, and what they write
    Logs(logs::Args),
    /// The ledger of swaps
    Swaps(swaps::Args),
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
    let ran = runtime.block_on(run(cli.command));
    // Blocking work under way (a file read, a hung driver call) must not hold the exit back.
    runtime.shutdown_background();
    ran.unwrap_or_else(|error| {
        // A report on the configuration says of each line what it is.
        let prefix = if error.is::<crate::config::ConfigErrors>() { "" } else { "wharf: " };
        eprintln!("{prefix}{error:#}");
        ExitCode::FAILURE
    })
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    Ok(match command {
        Command::Serve(args) => serve::run(args).await.map(|()| ExitCode::SUCCESS)?,
        Command::Demo(args) => demo::run(args).await.map(|()| ExitCode::SUCCESS)?,
        Command::Check { file, config, json } => {
            check::run(&crate::config::path(file.or(config)), json)
        }
        Command::Import(args) => import::run(&args),
        Command::Schema(args) => schema::run(&args),
        Command::Status(args) => status::run(args).await,
        Command::Top(args) => top::run(args).await,
        Command::Doctor(args) => doctor::run(args).await,
        Command::Ensure(args) => ensure::run(args).await,
        Command::Load(args) => load::run(args).await,
        Command::Unload(args) => unload::run(args).await,
        Command::Reload(args) => reload::run(args).await,
        Command::Replay(args) => replay::run(&args)?,
        Command::Plan(args) => plan::run(args).await,
        Command::Pull { args, config } => {
            let catalog = crate::config::load(&crate::config::path(config))?.catalog;
            let docker = DockerRuntime::new(catalog.settings.docker_host.clone());
            pull::run(&args, &catalog, &docker).await?
        }
        Command::Logs(args) => logs::run(args).await,
        Command::Swaps(args) => swaps::run(args).await,
        Command::Engine(args) => engine::run(args).await?,
    })
}
