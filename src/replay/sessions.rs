//! Closed loops: agents that ask, wait for the answer, think, and ask the next model.

use std::collections::VecDeque;
use std::time::Duration;

use super::Arrival;
use crate::units::{ModelName, Time};

/// One request of an agent, and how long it thinks before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub think: Duration,
    pub model: ModelName,
    pub service: Duration,
}

/// One caller: its turns, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agent {
    pub turns: VecDeque<Turn>,
}

impl Agent {
    /// The next request, if there is one, of an agent that was answered now.
    pub(super) fn next(&mut self, now: Time) -> Option<Arrival> {
        let Turn { think, model, service } = self.turns.pop_front()?;
        Some(Arrival { at: now + think, model, service })
    }
}
