//! Adapters as the rest of Wharf asks for them: by their own names, on the instance of their base.

use std::sync::Arc;
use std::time::Duration;

use super::adapters::{AdapterState, Use};
use super::gate::Gate;
use super::handle::{Handle, Message};
use crate::scheduler::action::{Answer, Refusal};
use crate::units::{ModelName, Time};

impl Handle {
    /// The model whose instance serves `model`: itself, or an adapter's base.
    pub fn serving(&self, model: &ModelName) -> ModelName {
        let catalog = self.shared.catalog.load();
        catalog.serving(model).map_or_else(|| model.clone(), |spec| spec.name.clone())
    }

    /// Requests on an adapter; of other models their gate counts.
    pub fn adapter_use(&self, model: &ModelName) -> Option<Arc<Use>> {
        (self.serving(model) != *model).then(|| self.shared.uses.of(model))
    }

    /// Waits until the adapter is loaded on this instance. `start`: it may be loaded for that.
    pub async fn adapter_on(
        &self,
        gate: &Gate,
        adapter: &ModelName,
        start: bool,
        within: Duration,
    ) -> Result<(), Refusal> {
        if self.shared.catalog.load().model(adapter).is_none() {
            return Err(Refusal::Removed);
        }
        let mut states = gate.adapters.clone();
        let decided = |state: Option<&AdapterState>| match state {
            Some(AdapterState::Loaded) => Some(Ok(())),
            Some(AdapterState::Failed { fault, retry_at }) => Some(Err(Refusal::StartFailed {
                swap: None,
                fault: fault.clone(),
                retry_at: *retry_at,
            })),
            Some(AdapterState::Loading | AdapterState::Leaving) | None => None,
        };
        if let Some(decided) = decided(states.borrow().get(adapter)) {
            return decided;
        }
        if !start {
            return Err(Refusal::NotLoaded);
        }
        self.inbox.send(Message::Adapter { adapter: adapter.clone(), on: true });
        let waited = states.wait_for(|states| decided(states.get(adapter)).is_some());
        match tokio::time::timeout(within, waited).await {
            Ok(Ok(states)) => decided(states.get(adapter)).unwrap_or(Ok(())),
            Ok(Err(_)) => Err(Refusal::InstanceLost {
                message: "it ended before the adapter was loaded".to_owned(),
            }),
            Err(_) => Err(Refusal::QueueTimeout {
                waited_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
                waiting_for: "its adapter to be loaded".to_owned(),
            }),
        }
    }

    /// A ready base is a ready adapter once that is loaded, too.
    pub(super) async fn with_adapter(
        &self,
        model: &ModelName,
        base: &ModelName,
        answer: Answer,
        deadline: Time,
    ) -> Answer {
        if model == base || !matches!(answer, Answer::Ready { .. }) {
            return answer;
        }
        let Some(gate) = self.gate(base) else { return Answer::TimedOut { swap: None } };
        let left = deadline.since(self.now());
        match self.adapter_on(&gate, model, true, left).await {
            Ok(()) => answer,
            Err(Refusal::QueueTimeout { .. }) => Answer::TimedOut { swap: None },
            Err(refusal) => Answer::Refused(refusal),
        }
    }

    /// The caller bounds the wait; the adapter's last requests have `drain_timeout`.
    pub(super) async fn unload_adapter(&self, adapter: &ModelName) -> Answer {
        let Some(gate) = self.gate(adapter) else {
            return Answer::Unloaded { was_loaded: false };
        };
        let mut states = gate.adapters.clone();
        let was_loaded = matches!(states.borrow().get(adapter), Some(AdapterState::Loaded));
        self.inbox.send(Message::Adapter { adapter: adapter.clone(), on: false });
        // Gone with its instance is gone, too.
        let _ = states.wait_for(|states| !states.contains_key(adapter)).await;
        Answer::Unloaded { was_loaded }
    }
}
