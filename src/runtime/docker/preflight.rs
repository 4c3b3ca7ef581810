//! What can be told before anything is touched.

use super::registry::Reference;
use super::{DockerRuntime, errors, fetch, start};
use crate::config::catalog::{DockerSpec, PullPolicy};
use crate::runtime::LaunchSpec;
use crate::scheduler::event::{Fault, FaultKind};

/// Asks Docker only what it answers at once.
pub async fn preflight(runtime: &DockerRuntime, spec: &LaunchSpec) -> Result<(), Fault> {
    let docker_spec = super::docker_spec(&spec.model)?;
    let client = &runtime.client;
    let daemon = client.daemon().await?;
    runtime.place.get(client).await?;
    if let Some(name) = &docker_spec.container {
        return start::inspect_named(client, name).await.map(drop);
    }
    let image = docker_spec.image.as_deref().unwrap_or_default();
    Reference::parse(image).map_err(|why| fetch::bad_image(image, &why))?;
    check_volumes(docker_spec)?;
    if let Some(name) = &docker_spec.runtime
        && !daemon.runtimes.contains(name)
    {
        return Err(Fault::new(FaultKind::BadSpec, errors::unknown_runtime(name)));
    }
    if docker_spec.pull == PullPolicy::Never && !fetch::is_present(client, image).await? {
        return Err(fetch::missing(&spec.model, image));
    }
    check_network(runtime, docker_spec).await
}

/// `SOURCE:TARGET[:OPTIONS]`: a folder by absolute path or a volume by name.
fn check_volumes(spec: &DockerSpec) -> Result<(), Fault> {
    for volume in &spec.volumes {
        let mut parts = volume.split(':');
        let (source, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let is_name = source.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
            && source.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !target.starts_with('/') || !(source.starts_with('/') || is_name) {
            return Err(Fault::new(
                FaultKind::BadSpec,
                format!(
                    "volume `{volume}` must read SOURCE:/TARGET[:ro], SOURCE an absolute path or \
                     the name of a volume"
                ),
            ));
        }
    }
    Ok(())
}

async fn check_network(runtime: &DockerRuntime, spec: &DockerSpec) -> Result<(), Fault> {
    let Some(network) = spec.network.as_deref().filter(|name| !name.starts_with("container:"))
    else {
        return Ok(());
    };
    let docker = runtime.client.docker().await?;
    match docker.inspect_network(network, None).await {
        Ok(_) => Ok(()),
        Err(error) if errors::is_missing(&error) => Err(Fault::new(
            FaultKind::BadSpec,
            format!("Docker has no network `{network}`: `docker network create {network}`"),
        )),
        Err(error) => Err(errors::fault(runtime.client.host(), "inspect a network", &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_need_a_source_and_an_absolute_target() {
        let check = |volume: &str| {
            let volumes = vec![volume.to_owned()];
            check_volumes(&DockerSpec { volumes, ..DockerSpec::default() }).is_ok()
        };
        assert!(check("hf-cache:/root/.cache/huggingface"));
        assert!(check("/models:/models:ro"));
        assert!(!check("models:relative"));
        assert!(!check("./models:/models"));
        assert!(!check("/models"));
    }
}
