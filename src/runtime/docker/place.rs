//! Where Wharf itself runs, and hence how a container is reached.
//!
//! On the host: by a port published on loopback. In a container: over a network that both share.
//! Found out, never configured.

use std::path::Path;

use bollard::models::ContainerInspectResponse;
use tokio::sync::OnceCell;

use super::client::Client;
use super::errors;
use crate::scheduler::event::{Fault, FaultKind};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Containers are published on, or share, this machine's loopback.
    Host,
    /// In a container on these networks of the same daemon, user-defined ones first.
    Networks(Vec<String>),
}

/// Found out once: Wharf does not move while it runs.
#[derive(Debug, Default)]
pub struct PlaceCell(OnceCell<Place>);

impl PlaceCell {
    pub async fn get(&self, client: &Client) -> Result<&Place, Fault> {
        self.0.get_or_try_init(|| find_out(client)).await
    }
}

async fn find_out(client: &Client) -> Result<Place, Fault> {
    if let Some(own) = own_container()
        && let Some(networks) = networks_of(client, own).await?
    {
        return match networks {
            Networks::OfHost => Ok(Place::Host),
            Networks::Named(names) => Ok(Place::Networks(names)),
        };
    }
    match client.tcp_host() {
        Some(host) if !is_local(host).await => Err(Fault::new(
            FaultKind::BadSpec,
            format!(
                "Docker at {} is on another machine, where Wharf cannot reach the engines it \
                 starts: run Wharf there, and add it here as `external`",
                client.host()
            ),
        )),
        _ => Ok(Place::Host),
    }
}

/// Only an address of this machine can be bound.
async fn is_local(host: &str) -> bool {
    tokio::net::TcpListener::bind((host, 0)).await.is_ok()
}

/// Id (or host name, which is the id unless changed) of the container that Wharf runs in.
fn own_container() -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(id) = id_in_mounts(&mounts) {
        return Some(id.to_owned());
    }
    let inside = ["/.dockerenv", "/run/.containerenv"].iter().any(|file| Path::new(file).exists());
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    inside.then(|| name.trim().to_owned())
}

/// Docker mounts `…/containers/ID/hostname` at /etc/hostname of every container.
fn id_in_mounts(mountinfo: &str) -> Option<&str> {
    let line =
        mountinfo.lines().find(|line| line.split_whitespace().nth(4) == Some("/etc/hostname"))?;
    let (_, rest) = line.split_whitespace().nth(3)?.rsplit_once("/containers/")?;
    let id = rest.split('/').next()?;
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
}

enum Networks {
    OfHost,
    Named(Vec<String>),
}

/// `None`: the daemon knows no such container, so Wharf runs in a container of another one.
async fn networks_of(client: &Client, own: String) -> Result<Option<Networks>, Fault> {
    let docker = client.docker().await?;
    let mut own = own;
    // A container may borrow the network of another one (a pod, a VPN); bounded against loops.
    for _ in 0..4 {
        let inspected = match docker.inspect_container(&own, None).await {
            Ok(inspected) => inspected,
            Err(error) if errors::is_missing(&error) => return Ok(None),
            Err(error) => return Err(errors::fault(client.host(), "inspect", &error)),
        };
        match network_mode(&inspected) {
            "host" => return Ok(Some(Networks::OfHost)),
            mode => match mode.strip_prefix("container:") {
                Some(other) => own = other.to_owned(),
                None => return Ok(Some(Networks::Named(network_names(&inspected)))),
            },
        }
    }
    Ok(None)
}

pub fn network_mode(container: &ContainerInspectResponse) -> &str {
    let config = container.host_config.as_ref();
    config.and_then(|config| config.network_mode.as_deref()).unwrap_or("default")
}

/// User-defined networks first: only they have names for containers and outlive a restart.
fn network_names(container: &ContainerInspectResponse) -> Vec<String> {
    let settings = container.network_settings.as_ref();
    let mut names: Vec<String> = settings
        .and_then(|settings| settings.networks.as_ref())
        .map(|networks| networks.keys().cloned().collect())
        .unwrap_or_default();
    names.retain(|name| name != "none");
    names.sort_by_key(|name| (name == "bridge", name.clone()));
    names
}

/// `http://…` under which the container's port is reached from here.
pub async fn endpoint(
    client: &Client,
    place: &Place,
    container: &ContainerInspectResponse,
    container_port: u16,
) -> Result<String, Fault> {
    let name = container.name.as_deref().unwrap_or_default().trim_start_matches('/');
    if network_mode(container) == "host" {
        return match place {
            Place::Host => Ok(format!("http://127.0.0.1:{container_port}")),
            Place::Networks(_) => Err(Fault::new(
                FaultKind::BadSpec,
                format!(
                    "container {name} uses the host's network, which Wharf in its own container \
                     cannot reach: give it a network of Wharf's container"
                ),
            )),
        };
    }
    match place {
        Place::Host => {
            if let Some(base) = published(container, container_port) {
                return Ok(base);
            }
            if let Some(address) = address(container, |_| true) {
                return Ok(format!("http://{address}:{container_port}"));
            }
            Err(Fault::new(
                FaultKind::BadSpec,
                format!(
                    "container {name} publishes no port for {container_port}/tcp: publish it \
                     (`-p 127.0.0.1:PORT:{container_port}`) or set `docker.port`"
                ),
            ))
        }
        Place::Networks(own) => address(container, |network| own.iter().any(|o| o == network))
            .map(|address| format!("http://{address}:{container_port}"))
            .ok_or_else(|| {
                let first = own.first().map_or("NETWORK", String::as_str);
                Fault::new(
                    FaultKind::BadSpec,
                    format!(
                        "container {name} shares no network with Wharf's own container at {}: \
                         `docker network connect {first} {name}`",
                        client.host()
                    ),
                )
            }),
    }
}

fn published(container: &ContainerInspectResponse, container_port: u16) -> Option<String> {
    let ports = container.network_settings.as_ref()?.ports.as_ref()?;
    let bindings = ports.get(&format!("{container_port}/tcp"))?.as_ref()?;
    // IPv4 first: `localhost` bindings come in pairs.
    let binding = bindings
        .iter()
        .find(|binding| !binding.host_ip.as_deref().unwrap_or_default().contains(':'))
        .or(bindings.first())?;
    let port = binding.host_port.as_deref()?;
    Some(match binding.host_ip.as_deref().unwrap_or_default() {
        "" | "0.0.0.0" => format!("http://127.0.0.1:{port}"),
        "::" => format!("http://[::1]:{port}"),
        ip if ip.contains(':') => format!("http://[{ip}]:{port}"),
        ip => format!("http://{ip}:{port}"),
    })
}

fn address(container: &ContainerInspectResponse, wanted: impl Fn(&str) -> bool) -> Option<String> {
    let networks = container.network_settings.as_ref()?.networks.as_ref()?;
    let mut found: Vec<_> = networks
        .iter()
        .filter(|(name, _)| wanted(name))
        .filter_map(|(name, end)| Some((name, end.ip_address.clone().filter(|ip| !ip.is_empty())?)))
        .collect();
    found.sort_by_key(|(name, _)| (*name == "bridge", (*name).clone()));
    found.into_iter().next().map(|(_, ip)| ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_id_is_read_from_the_mounts() {
        let id = "0123456789abcdef".repeat(4);
        let mounts = format!(
            "1 0 0:1 / / rw - overlay o rw\n\
             2 1 254:0 /var/lib/docker/containers/{id}/hostname /etc/hostname rw - ext4 /dev/v rw"
        );
        assert_eq!(id_in_mounts(&mounts), Some(id.as_str()));
        assert_eq!(id_in_mounts("1 0 0:1 / / rw - ext4 /dev/vda rw"), None);
    }
}
