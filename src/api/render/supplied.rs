//! Figures of the pool manager's shapes that other parts of Wharf decide.

use std::net::SocketAddr;

use super::Snapshot;
use crate::api::health::reachable;
use crate::config::catalog::ModelSpec;
use crate::orchestrator::view::ModelFacts;

/// Where clients reach this model: its own front door, else the gateway.
pub fn address(at: &Snapshot<'_>, spec: &ModelSpec) -> SocketAddr {
    front_door(at, spec).unwrap_or_else(|| reachable(at.catalog.settings.gateway))
}

/// The listener bound to this model alone.
fn front_door(at: &Snapshot<'_>, spec: &ModelSpec) -> Option<SocketAddr> {
    at.handle.front_doors().get(&spec.name).map(|address| reachable(*address))
}

/// Ports that no model has: of front doors, or of engines where there are no front doors.
pub fn available_ports(at: &Snapshot<'_>) -> usize {
    let settings = &at.catalog.settings;
    let models = at.catalog.models.values();
    let listeners = [settings.gateway.port(), settings.orchestrator.port()];
    let ((first, last), taken): (_, Vec<u16>) = match settings.front_doors {
        Some(range) => {
            let doors = models.filter_map(|spec| Some(front_door(at, spec)?.port()));
            (range, doors.chain(listeners).collect())
        }
        None => (settings.engine_ports, at.view.models.values().filter_map(engine_port).collect()),
    };
    let taken = taken.into_iter().filter(|port| (first..=last).contains(port)).count();
    (first..=last).len().saturating_sub(taken)
}

/// `http://127.0.0.1:18051` → 18051
fn engine_port(facts: &ModelFacts) -> Option<u16> {
    facts.endpoint.as_deref()?.parse::<http::Uri>().ok()?.port_u16()
}
