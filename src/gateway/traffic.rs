//! What is known of requests, for whoever shows it.

use super::captures::Captures;
use super::in_flight::InFlight;

/// Cheap to clone; the gateway and the control API share one.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    pub in_flight: InFlight,
    pub captures: Captures,
}
