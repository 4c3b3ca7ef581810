//! `wharf pull`: bring images and weights here before anybody waits for them.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::catalog::{Catalog, ModelSpec, RuntimeSpec};
use crate::runtime::docker::{DockerRuntime, Weights};
use crate::runtime::{Progress, ProgressNow};
use crate::scheduler::event::Fault;

const TICK: Duration = Duration::from_millis(100);
const BAR: &str = "{spinner} {prefix}  {bar:30} {percent:>3} %  {msg}";

/// Pull the images of models that run in Docker, and vLLM's weights into their caches.
///
/// A gated repository needs a token in HF_TOKEN, or in the file that HF_TOKEN_FILE names.
///
/// Exit code: 0 if everything is here, 1 if something is not, 2 for a usage error.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example: wharf pull mistral coder\n         wharf pull --all")]
pub struct Args {
    /// Models, by name or alias.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub models: Vec<String>,
    /// Every model of the configuration.
    #[arg(long)]
    pub all: bool,
}

/// Pulls one thing after the other: layers and files are fetched in parallel already.
pub async fn run(
    args: &Args,
    catalog: &Catalog,
    docker: &DockerRuntime,
) -> anyhow::Result<ExitCode> {
    let images = images(chosen(args, catalog)?);
    if images.is_empty() {
        println!("nothing to pull: none of these models is made from an image");
    }
    let mut failed = false;
    for (image, models) in images {
        // The first model's policy is as good as another's: the image is the same.
        let pull = async |progress: Progress| docker.fetch_image(models[0], &progress).await;
        match shown(image, pull).await {
            Ok(()) => println!("{image} is here"),
            Err(fault) => {
                failed = true;
                eprintln!("{}: {}", models[0].name, fault.message);
                continue;
            }
        }
        for model in models {
            failed |= !weights(docker, model).await;
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether the model's weights are no reason to fail.
async fn weights(docker: &DockerRuntime, model: &ModelSpec) -> bool {
    let name = model.name.as_str();
    let pull = async |progress: Progress| docker.fetch_weights(model, &progress).await;
    match shown(name, pull).await {
        Ok(Weights::Elsewhere) => {}
        Ok(Weights::Present(repo)) => println!("{name}: the weights of {repo} are here"),
        Ok(Weights::LeftToEngine(why)) => {
            eprintln!("{name}: warning: its weights are left to its start: {why}");
        }
        Err(fault) => {
            eprintln!("{name}: {}", fault.message);
            return false;
        }
    }
    true
}

fn chosen<'a>(args: &Args, catalog: &'a Catalog) -> anyhow::Result<Vec<&'a ModelSpec>> {
    if args.all {
        return Ok(catalog.models.values().map(AsRef::as_ref).collect());
    }
    let mut models = Vec::new();
    for name in &args.models {
        let Some(model) = catalog.resolve(name) else {
            let known: Vec<&str> = catalog.models.keys().map(|name| name.as_str()).collect();
            bail!("there is no model `{name}`; configured are: {}", known.join(", "));
        };
        models.push(model.as_ref());
    }
    Ok(models)
}

/// Each image once, with the models that use it.
fn images(models: Vec<&ModelSpec>) -> BTreeMap<&str, Vec<&ModelSpec>> {
    let mut images: BTreeMap<&str, Vec<&ModelSpec>> = BTreeMap::new();
    for model in models {
        if let RuntimeSpec::Docker(spec) = &model.runtime
            && let (None, Some(image)) = (&spec.container, &spec.image)
        {
            images.entry(image.as_str()).or_default().push(model);
        }
    }
    images
}

/// Runs `fetch` with its progress on the terminal.
async fn shown<T>(
    title: &str,
    fetch: impl AsyncFnOnce(Progress) -> Result<T, Fault>,
) -> Result<T, Fault> {
    let bar = ProgressBar::new(1000).with_prefix(title.to_owned());
    if let Ok(style) = ProgressStyle::with_template(BAR) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(TICK);
    let (progress, mut now) = Progress::new();
    let shown = bar.clone();
    let show = async move {
        while now.changed().await.is_ok() {
            draw(&shown, &now.borrow_and_update());
        }
    };
    // `fetch` owns the sender, so `show` ends with it.
    let (result, ()) = tokio::join!(fetch(progress), show);
    bar.finish_and_clear();
    result
}

fn draw(bar: &ProgressBar, now: &ProgressNow) {
    if let Some(fraction) = now.fraction {
        bar.set_position((fraction * 1000.0) as u64);
    }
    bar.set_message(now.detail.clone());
}
