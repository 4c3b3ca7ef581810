//! A handle without an owner, for tests that play the owner themselves.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::gate::{self, Gate, Lease};
use super::handle::{Gates, Handle, Inbox, Message, Shared};
use super::view::View;
use crate::config::catalog::Catalog;
use crate::scheduler::event::GateCount;
use crate::store::Store;
use crate::telemetry::logs::Logs;
use crate::units::{InstanceId, ModelName};

/// For tests of the gateway and the API, which play the owner themselves: nothing here runs in the
/// product.
#[doc(hidden)]
impl Handle {
    /// A handle whose messages arrive at the returned receiver.
    pub fn for_tests(catalog: Arc<Catalog>) -> (Handle, mpsc::UnboundedReceiver<Message>) {
        let (inbox, messages) = Inbox::new();
        let store = Store::in_memory();
        let shared = Shared::new(catalog, Instant::now(), store, Logs::default());
        (Handle { inbox, shared: Arc::new(shared) }, messages)
    }

    pub fn publish_for_tests(&self, view: View) {
        self.shared.view.store(Arc::new(view));
        self.shared.published.send_replace(());
    }

    pub fn catalog_for_tests(&self, catalog: Catalog) {
        self.shared.catalog.store(Arc::new(catalog));
    }

    /// A gate of one instance, published; open if `permits` is not zero.
    pub fn gate_for_tests(
        &self,
        instance: InstanceId,
        model: &ModelName,
        endpoint: crate::runtime::Endpoint,
        permits: u32,
    ) -> Arc<Gate> {
        let gate = Arc::new(Gate::new(
            instance,
            model.clone(),
            endpoint,
            self.inbox.clone(),
            self.shared.epoch,
        ));
        if permits > 0 {
            gate.open(permits);
        }
        let mut gates = Gates::clone(&self.shared.gates.load());
        gates.insert(model.clone(), Arc::clone(&gate));
        self.shared.gates.store(Arc::new(gates));
        gate
    }

    /// The owner's grant, also through a closed gate.
    pub fn grant_for_tests(gate: &Arc<Gate>) -> Lease {
        gate.grant(gate::StartKind::Cold)
    }

    pub fn close_for_tests(gate: &Gate) {
        gate.close();
    }

    /// What the scheduler is told of a gate.
    pub fn demand_for_tests(gate: &Gate) -> GateCount {
        gate.read()
    }
}
