//! Docker without Wharf: the very container that Wharf makes, created, started and stopped by hand.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bollard::models::{ContainerCreateBody, PortBinding};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, KillContainerOptionsBuilder, ListContainersOptionsBuilder,
    RemoveContainerOptionsBuilder, WaitContainerOptionsBuilder,
};
use bollard::{API_DEFAULT_VERSION, Docker};
use futures_util::StreamExt as _;
use serde_json::json;

use super::report::Own;
use super::{EXE, raw};

const IMAGE: &str = "wharf-test/standin:1";
const CALL_SECONDS_MAX: u64 = 120;

pub fn image(host: &str) -> anyhow::Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/image.sh");
    let made = Command::new(script).args([host, IMAGE, EXE]).status()?;
    ensure!(made.success(), "the image was not made");
    Ok(())
}

/// As `docker:` of a model.
pub fn spec(name: &str) -> String {
    let args = ["engine", "--host", "0.0.0.0", "--port", "8000", "--name", name];
    json!({ "image": IMAGE, "pull": "never", "args": args }).to_string()
}

pub async fn alone(host: &str, name: &str) -> anyhow::Result<Own> {
    let docker = Docker::connect_with_unix(host, CALL_SECONDS_MAX, API_DEFAULT_VERSION)?;
    let port = raw::free_port()?;
    let body = same_as_running(&docker, name, port).await?;
    let container = format!("wharf-bench-{port}");
    let began = Instant::now();
    let options = CreateContainerOptionsBuilder::new().name(&container).build();
    let id = docker.create_container(Some(options), body).await?.id;
    let create = began.elapsed();
    let measured = run(&docker, &id, port, name).await;
    let began = Instant::now();
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    docker.remove_container(&id, Some(options)).await?;
    let remove = began.elapsed();
    let (start, stop) = measured?;
    Ok(Own { create: Some(create), start, stop, remove: Some(remove) })
}

async fn run(
    docker: &Docker,
    id: &str,
    port: u16,
    name: &str,
) -> anyhow::Result<(Duration, Duration)> {
    let began = Instant::now();
    docker.start_container(id, None).await?;
    let healthy = tokio::task::spawn_blocking(move || raw::until_healthy(port)).await??;
    let start = healthy.duration_since(began);
    let model = name.to_owned();
    tokio::task::spawn_blocking(move || raw::chat(port, &model)).await??;
    let began = Instant::now();
    let options = WaitContainerOptionsBuilder::new().condition("not-running").build();
    let mut wait = docker.wait_container(id, Some(options));
    let options = KillContainerOptionsBuilder::new().signal("SIGTERM").build();
    docker.kill_container(id, Some(options)).await?;
    // A non-zero exit is an `Err` in bollard: what it says is of no interest.
    let _ = wait.next().await;
    Ok((start, began.elapsed()))
}

/// What Wharf asked for, with another port and without the labels by which it knows its own.
async fn same_as_running(
    docker: &Docker,
    name: &str,
    port: u16,
) -> anyhow::Result<ContainerCreateBody> {
    let running = docker.list_containers(Some(ListContainersOptionsBuilder::new().build())).await?;
    let theirs = running.into_iter().find(|container| {
        let labels = container.labels.as_ref();
        labels.and_then(|labels| labels.get("wharf.model")).is_some_and(|model| model == name)
    });
    let id = theirs.and_then(|container| container.id).context("the container that Wharf made")?;
    let theirs = docker.inspect_container(&id, None).await?;
    let mut body: ContainerCreateBody =
        serde_json::from_value(serde_json::to_value(theirs.config.context("its configuration")?)?)?;
    let mut host = theirs.host_config.context("its host configuration")?;
    for bindings in host.port_bindings.iter_mut().flat_map(|ports| ports.values_mut()) {
        *bindings = Some(vec![PortBinding {
            host_ip: Some("127.0.0.1".to_owned()),
            host_port: Some(port.to_string()),
        }]);
    }
    body.hostname = None;
    body.labels = None;
    body.host_config = Some(host);
    Ok(body)
}
