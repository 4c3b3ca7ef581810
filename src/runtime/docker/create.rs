//! From a [`LaunchSpec`] to the container that Docker is asked for. Pure.

use std::collections::{BTreeMap, HashMap};

use bollard::models::{
    ContainerCreateBody, DeviceRequest, HealthConfig, HostConfig, HostConfigLogConfig, PortBinding,
    ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
};

use super::client::Daemon;
use super::labels;
use super::place::Place;
use super::weights;
use crate::config::catalog::{DockerSpec, EngineKind};
use crate::runtime::{Identity, LaunchSpec};

/// Docker's own log files of a container, if the daemon keeps them in `json-file`.
const LOG_FILE_MAX: &str = "16m";
const LOG_FILES_MAX: &str = "2";
/// Longest part of a container's name that comes from the model's.
const NAME_PART_MAX: usize = 40;
/// Passed on to vLLM, which asks the hub at every start.
const HF_TOKEN: &str = "HF_TOKEN";

/// `wharf-<model>-<instance>-<installation>`: readable, and two Wharfs on one daemon never meet.
pub fn container_name(identity: &Identity) -> String {
    let clean = |text: &str, max: usize| -> String {
        let keep = |c: char| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '-' };
        text.chars().map(keep).take(max).collect()
    };
    format!(
        "wharf-{}-{}-{}",
        clean(identity.model.as_str(), NAME_PART_MAX),
        identity.instance,
        clean(&identity.installation, 8)
    )
}

/// The network to create the container in, and one to connect it to before it starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    pub first: Option<String>,
    pub second: Option<String>,
}

pub fn networks(spec: &DockerSpec, place: &Place) -> Networks {
    let own = match place {
        Place::Host => None,
        Place::Networks(names) => names.first().cloned(),
    };
    match (&spec.network, place) {
        (None, _) => Networks { first: own, second: None },
        (Some(wanted), Place::Networks(names)) if !names.contains(wanted) => {
            let joinable = !wanted.starts_with("container:") && wanted != "host";
            Networks { first: Some(wanted.clone()), second: own.filter(|_| joinable) }
        }
        (Some(wanted), _) => Networks { first: Some(wanted.clone()), second: None },
    }
}

/// What to create. It may hold secrets in its environment: never log it.
pub fn body(
    spec: &LaunchSpec,
    docker: &DockerSpec,
    daemon: &Daemon,
    place: &Place,
) -> ContainerCreateBody {
    let port = format!("{}/tcp", spec.container_port);
    let networks = networks(docker, place);
    let shares_host = networks.first.as_deref() == Some("host");
    let publish = *place == Place::Host && !shares_host;
    let binding = PortBinding {
        host_ip: Some("127.0.0.1".to_owned()),
        host_port: Some(spec.port.to_string()),
    };
    let host_config = HostConfig {
        binds: non_empty(docker.volumes.clone()),
        network_mode: networks.first,
        port_bindings: publish.then(|| HashMap::from([(port.clone(), Some(vec![binding]))])),
        // A container that Docker restarts by itself would take memory that was given away.
        restart_policy: Some(RestartPolicy {
            name: Some(RestartPolicyNameEnum::NO),
            maximum_retry_count: None,
        }),
        init: Some(docker.init.unwrap_or(true)),
        ipc_mode: docker.ipc.clone(),
        shm_size: docker.shm_size.map(|bytes| signed(bytes.0)),
        memory: docker.memory.map(|bytes| signed(bytes.0)),
        // Without this Docker allows as much swap again, and an engine that swaps serves nobody.
        memory_swap: docker.memory.map(|bytes| signed(bytes.0)),
        ulimits: non_empty(ulimits(&docker.ulimits)),
        runtime: docker.runtime.clone(),
        device_requests: non_empty(device_requests(spec, docker)),
        log_config: (daemon.logging_driver == "json-file").then(log_config),
        ..HostConfig::default()
    };
    ContainerCreateBody {
        image: docker.image.clone(),
        entrypoint: docker.entrypoint.clone(),
        cmd: non_empty(docker.args.iter().chain(&spec.args).cloned().collect()),
        env: non_empty(environment(spec, docker, daemon)),
        user: docker.user.clone(),
        labels: Some(labels_of(spec, docker)),
        exposed_ports: publish.then(|| vec![port]),
        stop_signal: Some(spec.model.stop.signal.clone()),
        // Wharf asks the engine itself. An image's own check would go on beside it, and tools that
        // restart what is "unhealthy" would take the engine out of Wharf's hands.
        healthcheck: Some(HealthConfig {
            test: Some(vec!["NONE".to_owned()]),
            ..HealthConfig::default()
        }),
        host_config: Some(host_config),
        ..ContainerCreateBody::default()
    }
}

fn labels_of(spec: &LaunchSpec, docker: &DockerSpec) -> labels::Labels {
    let mut all: labels::Labels = docker.labels.clone().into_iter().collect();
    labels::write(&spec.identity, spec.container_port, &mut all);
    all
}

/// Derived values first, configured ones over them.
fn environment(spec: &LaunchSpec, docker: &DockerSpec, daemon: &Daemon) -> Vec<String> {
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    if spec.model.engine == EngineKind::Vllm
        && let Ok(Some(token)) = weights::hub_token()
    {
        env.insert(HF_TOKEN.to_owned(), token);
    }
    let runtime = docker.runtime.as_deref().unwrap_or(&daemon.default_runtime);
    if runtime.contains("nvidia") {
        // CUDA images ask that runtime for every GPU unless told otherwise.
        let uuids = devices(spec);
        let visible = if uuids.is_empty() { "void".to_owned() } else { uuids.join(",") };
        env.insert("NVIDIA_VISIBLE_DEVICES".to_owned(), visible);
    }
    env.extend(spec.env.clone());
    env.extend(spec.api_key.env());
    env.extend(docker.env.clone());
    env.into_iter().map(|(key, value)| format!("{key}={value}")).collect()
}

/// Ids of the instance's real GPUs: simulated ones have nothing to pass on.
fn devices(spec: &LaunchSpec) -> Vec<String> {
    spec.gpus
        .iter()
        .filter_map(|gpu| match gpu.uuid.as_str() {
            "" => Some(gpu.id.to_string()),
            uuid if uuid.starts_with("GPU-") => Some(uuid.to_owned()),
            _ => None,
        })
        .collect()
}

fn device_requests(spec: &LaunchSpec, docker: &DockerSpec) -> Vec<DeviceRequest> {
    let devices = devices(spec);
    // The nvidia runtime gives devices by environment and needs no device driver in the daemon.
    if devices.is_empty() || (!docker.cdi && docker.runtime.as_deref() == Some("nvidia")) {
        return Vec::new();
    }
    let request = if docker.cdi {
        let names = devices.iter().map(|device| format!("nvidia.com/gpu={device}")).collect();
        DeviceRequest {
            driver: Some("cdi".to_owned()),
            device_ids: Some(names),
            ..DeviceRequest::default()
        }
    } else {
        DeviceRequest {
            driver: Some("nvidia".to_owned()),
            device_ids: Some(devices),
            capabilities: Some(vec![vec!["gpu".to_owned()]]),
            ..DeviceRequest::default()
        }
    };
    vec![request]
}

fn ulimits(configured: &BTreeMap<String, (i64, i64)>) -> Vec<ResourcesUlimits> {
    configured
        .iter()
        .map(|(name, &(soft, hard))| ResourcesUlimits {
            name: Some(name.clone()),
            soft: Some(soft),
            hard: Some(hard),
        })
        .collect()
}

fn log_config() -> HostConfigLogConfig {
    let options = [("max-size", LOG_FILE_MAX), ("max-file", LOG_FILES_MAX)];
    HostConfigLogConfig {
        typ: Some("json-file".to_owned()),
        config: Some(options.map(|(k, v)| (k.to_owned(), v.to_owned())).into()),
    }
}

fn non_empty<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{InstanceId, ModelName};

    #[test]
    fn names_are_valid_and_tell_installations_apart() {
        let identity = |installation: &str| Identity {
            installation: installation.to_owned(),
            instance: InstanceId(7),
            model: ModelName::new("org/model:7b"),
            spec_hash: String::new(),
            gpus: Vec::new(),
            port: 0,
        };
        assert_eq!(container_name(&identity("a1b2c3d4e5")), "wharf-org-model-7b-i7-a1b2c3d4");
        assert_ne!(container_name(&identity("a")), container_name(&identity("b")));
    }

    #[test]
    fn a_container_joins_a_network_on_which_wharf_reaches_it() {
        let wanted = |network: Option<&str>, place: &Place| {
            let network = network.map(str::to_owned);
            networks(&DockerSpec { network, ..DockerSpec::default() }, place)
        };
        let inside = Place::Networks(vec!["stack".to_owned(), "bridge".to_owned()]);
        let pair = |first: &str, second: Option<&str>| Networks {
            first: Some(first.to_owned()),
            second: second.map(str::to_owned),
        };
        assert_eq!(wanted(None, &Place::Host), Networks::default());
        assert_eq!(wanted(Some("lan"), &Place::Host), pair("lan", None));
        assert_eq!(wanted(None, &inside), pair("stack", None));
        assert_eq!(wanted(Some("stack"), &inside), pair("stack", None));
        assert_eq!(wanted(Some("lan"), &inside), pair("lan", Some("stack")));
        assert_eq!(wanted(Some("host"), &inside), pair("host", None));
    }
}
