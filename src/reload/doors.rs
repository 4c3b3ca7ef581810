//! Front doors (`ports`): which model has which port, and the listeners there.
//!
//! Warm-up models come first, then the others, each in the order of models.yaml, and registered ones
//! last: what a user wrote down of ports stays true. Whoever has a port keeps it as long as Wharf
//! runs, and a registered model, which has no place in the file, over restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::listeners::{Listeners, occupant};
use crate::config::catalog::{Catalog, ModelSpec};
use crate::gateway::{self, Gateway};
use crate::orchestrator::Handle;
use crate::units::ModelName;

#[derive(Debug)]
pub struct FrontDoors {
    gateway: Arc<Gateway>,
    handle: Handle,
    open: BTreeMap<ModelName, Door>,
}

#[derive(Debug)]
struct Door {
    address: SocketAddr,
    stop: CancellationToken,
}

impl FrontDoors {
    pub fn new(gateway: Arc<Gateway>, handle: Handle) -> FrontDoors {
        FrontDoors { gateway, handle, open: BTreeMap::new() }
    }

    /// Opens and closes doors, and publishes where they are.
    pub async fn follow(&mut self, catalog: &Catalog, listeners: &mut Listeners) {
        let settings = &catalog.settings;
        let (first, last) = settings.front_doors.unwrap_or((1, 0));
        let ours = [settings.gateway.port(), settings.orchestrator.port()];
        let fits = |address: SocketAddr| {
            (first..=last).contains(&address.port())
                && !ours.contains(&address.port())
                && address.ip() == settings.gateway.ip()
        };
        // A port that is just given back is not taken again at once: its listener may still close.
        let mut taken: BTreeSet<u16> = ours.into_iter().collect();
        let mut preferred = BTreeMap::new();
        self.open.retain(|model, door| {
            taken.insert(door.address.port());
            let stays = catalog.models.contains_key(model) && fits(door.address);
            if !stays {
                door.stop.cancel();
                if door.address.ip() != settings.gateway.ip() {
                    taken.remove(&door.address.port());
                    preferred.insert(model.clone(), door.address.port());
                }
            }
            stays
        });
        let kept = self.handle.store().doors();
        for (model, port) in &kept {
            let is_open = self.open.contains_key(model) || !catalog.models.contains_key(model);
            if !is_open && (first..=last).contains(port) {
                preferred.entry(model.clone()).or_insert(*port);
            }
        }
        let wishes: BTreeSet<u16> = preferred.values().copied().collect();
        let mut doorless = Vec::new();
        if settings.front_doors.is_some() {
            for spec in in_order(catalog) {
                if self.open.contains_key(&spec.name) {
                    continue;
                }
                let wish = preferred.get(&spec.name).copied();
                let others = (first..=last).filter(|port| !wishes.contains(port));
                let ports = wish.into_iter().chain(others);
                match self.door(spec, ports, &mut taken, catalog, listeners).await {
                    Some(door) => drop(self.open.insert(spec.name.clone(), door)),
                    None => doorless.push(spec.name.as_str()),
                }
            }
        }
        if !doorless.is_empty() {
            tracing::warn!(
                "ports {first}-{last} are too few: {} have no front door",
                doorless.join(", ")
            );
        }
        self.keep(catalog, &kept);
        let doors = self.open.iter().map(|(model, door)| (model.clone(), door.address));
        self.handle.publish_front_doors(doors.collect());
    }

    /// Keeps the ports of registered models, and none of those that are registered no more.
    fn keep(&self, catalog: &Catalog, kept: &BTreeMap<ModelName, u16>) {
        let store = self.handle.store();
        for spec in catalog.models.values().filter(|spec| spec.registered) {
            let port = self.open.get(&spec.name).map(|door| door.address.port());
            if port.is_some() && kept.get(&spec.name) != port.as_ref() {
                store.put_door(&spec.name, port);
            }
        }
        let registered = store.registered();
        for model in kept.keys() {
            if !registered.iter().any(|one| one.model_id == model.as_str()) {
                store.put_door(model, None);
            }
        }
    }

    /// The first of `ports` that is free.
    async fn door(
        &self,
        spec: &ModelSpec,
        ports: impl Iterator<Item = u16>,
        taken: &mut BTreeSet<u16>,
        catalog: &Catalog,
        listeners: &mut Listeners,
    ) -> Option<Door> {
        for port in ports {
            if !taken.insert(port) {
                continue;
            }
            let address = SocketAddr::new(catalog.settings.gateway.ip(), port);
            let listener = match TcpListener::bind(address).await {
                Ok(listener) => listener,
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                    let who = occupant(port).await;
                    tracing::warn!("front door {address} is skipped: it is taken by {who}");
                    continue;
                }
                Err(error) => {
                    tracing::warn!("front door {address} is skipped: {error}");
                    continue;
                }
            };
            let stop = listeners.child_token();
            let router = gateway::door(Arc::clone(&self.gateway), spec.name.clone(), port);
            listeners.spawn(listener, listeners.site(router), stop.clone(), true);
            return Some(Door { address, stop });
        }
        None
    }
}

fn in_order(catalog: &Catalog) -> Vec<&Arc<ModelSpec>> {
    let mut models: Vec<_> = catalog.models.values().collect();
    // By name already, which decides between registered ones: they have no place in the file.
    models.sort_by_key(|spec| {
        (spec.registered, !spec.warmup, if spec.registered { 0 } else { spec.line })
    });
    models
}
