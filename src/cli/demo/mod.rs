//! `wharf demo`: the product on a machine that is not there. No Docker, no GPU, no network.
//!
//! `server` and `talk` serve the end-to-end tests too.

mod exercise;
mod guests;
mod screen;
pub mod server;
pub mod talk;
mod tour;
mod worlds;

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::units::Bytes;

use guests::Guests;
use screen::Screen;
use server::Server;
use talk::Talk;
use worlds::{Llama, Stage, World};

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  wharf demo\n  wharf demo --world team\n  wharf demo --exercise\n\n\
    Exit codes: 0 every answer came from the right model, 1 otherwise."
)]
pub struct DemoArgs {
    /// The machine to pretend.
    #[arg(long, value_enum, default_value_t)]
    pub world: World,
    /// Run the scripted session, print the table of swaps, and exit.
    #[arg(long)]
    pub exercise: bool,
    /// Show the world's tour and exit instead of serving on until Ctrl-C.
    #[arg(long)]
    pub once: bool,
    /// Use this real llama-server instead of stand-in engines.
    #[arg(long, requires = "gguf", value_name = "PATH")]
    pub llama_server: Option<PathBuf>,
    /// Models for it; the file name is the model's name.
    #[arg(long, value_delimiter = ',', value_name = "FILES")]
    pub gguf: Vec<PathBuf>,
    /// The files are the project's own tiny ones, whose replies name the model.
    #[arg(long, hide = true)]
    pub gguf_names_itself: bool,
}

pub async fn run(args: DemoArgs) -> anyhow::Result<()> {
    if args.llama_server.is_some() && args.world != World::Laptop {
        bail!("--llama-server has one world, laptop: leave --world out");
    }
    let exe = std::env::current_exe().context("where is this program?")?;
    let llama = match args.llama_server {
        Some(server) => Some(Llama {
            server: server.canonicalize().with_context(|| server.display().to_string())?,
            ggufs: args
                .gguf
                .iter()
                .map(|file| file.canonicalize().with_context(|| file.display().to_string()))
                .collect::<anyhow::Result<_>>()?,
        }),
        None => None,
    };
    let names_itself = llama.is_none() || args.gguf_names_itself;
    let stage = args.world.stage(&exe, llama.as_ref());
    let dir = std::env::temp_dir().join(format!("wharf-demo-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let screen = Screen::new();
    let ended = told_to_end()?;
    let env = [("WHARF_LOG", guests::LOG_FILTER)];
    let mut server = Server::start(&exe, &dir, (8080, 8888), &env, |gateway, orchestrator| {
        stage.yaml(gateway, orchestrator)
    })
    .await?;
    introduce(&screen, args.world, &server.talk, &stage);
    let follow = screen.follow(server.talk.clone(), Guests::new(dir.join("wharf.log")));
    let shown = async {
        if args.exercise {
            return exercise::run(&screen, &server.talk.clone(), &stage, names_itself).await;
        }
        tour::run(args.world, &screen, &mut server, &stage).await?;
        if !args.once {
            screen.plain(format!("\nStill serving; Ctrl-C ends. {}", to_try(&server.talk, &stage)));
            std::future::pending::<()>().await;
        }
        Ok(())
    };
    let result = tokio::select! {
        result = shown => result,
        () = ended => Ok(()),
    };
    follow.abort();
    server.stop().await?;
    if result.is_ok() {
        std::fs::remove_dir_all(&dir)?;
    } else {
        screen.plain(format!("the log is kept: {}", dir.join("wharf.log").display()));
    }
    result
}

/// Ctrl-C, SIGTERM, or the terminal was closed: the server and its engines end in each case. Caught
/// from the call on, not from the first poll.
fn told_to_end() -> std::io::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    })
}

fn introduce(screen: &Screen, world: World, talk: &Talk, stage: &Stage) {
    let wanted: Bytes = stage.models.iter().map(|model| model.vram).sum();
    let there: Bytes = stage.gpus.iter().copied().sum();
    let kind = if stage.simulated { "simulated" } else { "declared" };
    let gpus = match stage.gpus.len() {
        1 => format!("1 {kind} GPU"),
        n => format!("{n} {kind} GPUs"),
    };
    screen.plain(format!(
        "gateway      {}   (inference: point an OpenAI client at {}/v1)\n\
         orchestrator {}   (control: status, swaps, load, unload)\n\
         {} models that want {wanted}, on {gpus} with {there}; {}\n\n{}\n",
        talk.gateway,
        talk.gateway,
        talk.orchestrator,
        stage.models.len(),
        world.about(),
        to_try(talk, stage),
    ));
}

/// Lines to copy. Their models are not loaded after the tour, so that trying them swaps.
fn to_try(talk: &Talk, stage: &Stage) -> String {
    let (asked, ensured) = stage.to_try();
    format!(
        "Try in another terminal:\n  \
         curl {}/v1/chat/completions -d '{{\"model\":\"{asked}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"hi\"}}]}}'\n  \
         curl -X POST {}/ensure_model -d '{{\"model\":\"{ensured}\"}}'\n  \
         curl {}/status",
        talk.gateway, talk.orchestrator, talk.orchestrator,
    )
}
