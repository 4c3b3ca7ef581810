//! `wharf pull`: bring images here before anybody waits for them.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::catalog::{Catalog, ModelSpec, RuntimeSpec};
use crate::runtime::docker::DockerRuntime;
use crate::runtime::{Progress, ProgressNow};
use crate::scheduler::event::Fault;

const TICK: Duration = Duration::from_millis(100);
const BAR: &str = "{spinner} {prefix}  {bar:30} {percent:>3} %  {msg}";

/// Pull the images of models that run in Docker.
///
/// Exit code: 0 if every image is here, 1 if one is not, 2 for a usage error.
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

/// Pulls one image after the other: Docker fetches the layers of one in parallel already.
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
    for (image, model) in images {
        match pull(docker, image, model).await {
            Ok(()) => println!("{image} is here"),
            Err(fault) => {
                failed = true;
                eprintln!("{}: {}", model.name, fault.message);
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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

/// Each image once, with the first model that uses it.
fn images(models: Vec<&ModelSpec>) -> BTreeMap<&str, &ModelSpec> {
    let mut images = BTreeMap::new();
    for model in models {
        if let RuntimeSpec::Docker(spec) = &model.runtime
            && let (None, Some(image)) = (&spec.container, &spec.image)
        {
            images.entry(image.as_str()).or_insert(model);
        }
    }
    images
}

async fn pull(docker: &DockerRuntime, image: &str, model: &ModelSpec) -> Result<(), Fault> {
    let bar = ProgressBar::new(1000).with_prefix(image.to_owned());
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
    let fetch = async move { docker.fetch_model(model, &progress).await };
    // `fetch` owns the sender, so `show` ends with it.
    let (result, ()) = tokio::join!(fetch, show);
    bar.finish_and_clear();
    result
}

fn draw(bar: &ProgressBar, now: &ProgressNow) {
    if let Some(fraction) = now.fraction {
        bar.set_position((fraction * 1000.0) as u64);
    }
    bar.set_message(now.detail.clone());
}
