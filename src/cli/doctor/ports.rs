//! Listeners, front doors, engine ports: free, ours, or somebody else's.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use super::{Check, Running};
use crate::api::reachable;
use crate::cli::trust;
use crate::config::catalog::{Catalog, Settings};
use crate::engine::request;
use crate::reload::occupant;
use crate::runtime::{Endpoint, Tls};

/// For a listener of this machine, which may be busy.
const ASK_MAX: Duration = Duration::from_secs(5);

pub(super) async fn listeners(settings: &Settings) -> Vec<Check> {
    let wanted =
        BTreeSet::from([("gateway", settings.gateway), ("orchestrator", settings.orchestrator)]);
    let mut checks = Vec::new();
    for (what, address) in wanted {
        checks.push(listener(what, address, settings).await);
    }
    checks
}

async fn listener(what: &str, address: SocketAddr, settings: &Settings) -> Check {
    const NAME: &str = "listeners";
    match TcpListener::bind(address) {
        Ok(_) => Check::ok(NAME, format!("{what} {address} is free")),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if is_wharf(address, settings).await {
                return Check::ok(NAME, format!("{what} {address}: Wharf answers there"));
            }
            let who = occupant(address.port()).await;
            let fix = format!("stop it, or choose another port: `listen.{what}`");
            Check::fail(NAME, format!("{what} {address} is taken by {who}"), fix)
        }
        Err(error) => {
            let fix = match error.kind() {
                ErrorKind::PermissionDenied => {
                    "ports below 1024 need privileges: choose a higher one"
                }
                _ => "use an address of this machine, 127.0.0.1 or 0.0.0.0",
            };
            Check::fail(NAME, format!("{what} cannot listen on {address}: {error}"), fix)
        }
    }
}

/// Its `/health` has parts that no other server's has.
async fn is_wharf(address: SocketAddr, settings: &Settings) -> bool {
    let base = format!("{}://{}", settings.scheme(), reachable(address));
    let mut endpoint = Endpoint::new(base, None);
    if let Some(files) = &settings.tls {
        endpoint.tls = trust::config(Some(&files.cert_file)).ok().map(Tls::of);
    }
    let answer = request::get(&endpoint, "/health", ASK_MAX).await;
    answer.is_ok_and(|answer| {
        let body = answer.json();
        body["gateway"].is_object() && body["orchestrator"].is_object()
    })
}

fn is_free(address: SocketAddr) -> bool {
    TcpListener::bind(address).is_ok()
}

pub(super) async fn front_doors(catalog: &Catalog, running: Option<&Running>) -> Option<Check> {
    const NAME: &str = "front doors";
    let settings = &catalog.settings;
    let (first, last) = settings.front_doors?;
    let models = catalog.models.len();
    if let Some(running) = running {
        let left = running.health["available_ports"].as_u64().unwrap_or_default();
        return Some(Check::ok(NAME, format!("{first}-{last}: {left} left at the running Wharf")));
    }
    let ours = [settings.gateway.port(), settings.orchestrator.port()];
    let ports = (first..=last).filter(|port| !ours.contains(port));
    let (free, taken): (Vec<u16>, Vec<u16>) =
        ports.partition(|port| is_free(SocketAddr::new(settings.gateway.ip(), *port)));
    if free.len() < models {
        let told = format!("{first}-{last}: {} ports are free for {models} models", free.len());
        return Some(Check::fail(NAME, told, "widen `ports`, or end what holds them"));
    }
    // Those that the first models would have.
    let asked_for = taken.iter().find(|port| usize::from(**port - first) < models);
    Some(match asked_for {
        None => Check::ok(NAME, format!("{first}-{last}: {} are free", free.len())),
        Some(port) => Check::warn(
            NAME,
            format!("port {port} is taken by {}: models move on by one", occupant(*port).await),
            "end it before Wharf starts, or begin `ports` behind it",
        ),
    })
}

pub(super) async fn engines(catalog: &Catalog, running: Option<&Running>) -> Vec<Check> {
    const NAME: &str = "engine ports";
    let (first, last) = catalog.settings.engine_ports;
    let specs = || catalog.models.values().filter(|spec| spec.takes_a_port());
    let models = specs().filter(|spec| spec.port.is_none()).count();
    let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let free = (first..=last).filter(|port| is_free(loopback(*port))).count();
    let told = format!("{first}-{last}: {free} of {} are free", last - first + 1);
    let mut checks = vec![if free == 0 || (running.is_none() && free < models) {
        Check::fail(NAME, told, format!("{models} models want one: widen `engine_ports`"))
    } else {
        Check::ok(NAME, told)
    }];
    // While Wharf runs, its own engines hold them.
    for spec in specs().filter(|_| running.is_none()) {
        if let Some(port) = spec.port.filter(|port| !is_free(loopback(*port))) {
            let who = occupant(port).await;
            let told = format!("port {port} of {} is taken by {who}", spec.name);
            checks.push(Check::warn(NAME, told, "end it; an engine that Wharf left is adopted"));
        }
    }
    checks
}
