//! An orchestrator without an owner: the caller plays it. For tests of what talks to a `Handle`.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::sync::mpsc;

use super::gate::Gate;
use super::handle::{Gates, Handle, Inbox, Message, Shared};
use super::view::View;
use crate::config::catalog::Catalog;
use crate::runtime::Endpoint;
use crate::units::{InstanceId, ModelName};

#[derive(Debug)]
pub struct Puppet {
    pub handle: Handle,
    /// What the owner would receive.
    pub inbox: mpsc::UnboundedReceiver<Message>,
}

impl Puppet {
    /// The orchestrator's time zero lies `age` in the past.
    pub fn new(catalog: Catalog, age: Duration) -> Puppet {
        let (sender, inbox) = Inbox::new();
        let shared = Shared {
            epoch: Instant::now().checked_sub(age).unwrap_or_else(Instant::now),
            epoch_wall: SystemTime::now() - age,
            catalog: ArcSwap::from_pointee(catalog),
            gates: ArcSwap::from_pointee(Gates::new()),
            view: ArcSwap::from_pointee(View::default()),
            next_request: AtomicU64::new(1),
            next_ask: AtomicU64::new(1),
        };
        Puppet { handle: Handle { inbox: sender, shared: Arc::new(shared) }, inbox }
    }

    pub fn publish(handle: &Handle, view: View) {
        handle.shared.view.store(Arc::new(view));
    }

    pub fn replace_catalog(handle: &Handle, catalog: Catalog) {
        handle.shared.catalog.store(Arc::new(catalog));
    }

    /// An open gate for `model`, whose engine answers at `base`.
    pub fn open_gate(
        handle: &Handle,
        model: &ModelName,
        instance: InstanceId,
        base: &str,
        permits: u32,
    ) -> Arc<Gate> {
        let gate = Arc::new(Gate::new(
            instance,
            model.clone(),
            Endpoint { base: base.to_owned(), api_key: None },
            Client::builder(TokioExecutor::new()).build_http(),
            handle.inbox.clone(),
            handle.shared.epoch,
        ));
        gate.open(permits);
        let mut gates = Gates::clone(&handle.shared.gates.load());
        gates.insert(model.clone(), Arc::clone(&gate));
        handle.shared.gates.store(Arc::new(gates));
        gate
    }
}
