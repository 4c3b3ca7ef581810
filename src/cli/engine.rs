//! `wharf engine`: the stand-in engine.

use std::process::ExitCode;

/// Run the stand-in engine: a process that speaks the OpenAI API, for demos and tests
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Example: wharf engine --name coder --port 18051 --style vllm --load 3s --vram 9GiB"
)]
pub struct Args {
    #[command(flatten)]
    options: crate::standin::Options,
}

/// Exit code 0 after a signal, 1 after a failed load, `--exit-code` after a crash.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    Ok(crate::standin::run(args.options).await?)
}
