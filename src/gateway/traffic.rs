//! What is known of requests, for whoever shows it.

use tokio::sync::watch;

use super::captures::Captures;
use super::in_flight::InFlight;

/// Cheap to clone; the gateway's front doors and the control API share one.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    pub in_flight: InFlight,
    pub captures: Captures,
    /// Id of the newest row of activity.
    newest: watch::Sender<u64>,
}

impl Traffic {
    /// Changes when there is a new row: read the store for those after the last one seen.
    pub fn rows(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    pub(super) fn recorded(&self, id: u64) {
        // Two requests that end at once may report in the other order.
        self.newest.send_if_modified(|newest| {
            let newer = id > *newest;
            *newest = id.max(*newest);
            newer
        });
    }
}
