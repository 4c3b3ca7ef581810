//! When models come and go by themselves, and which of them belong together.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::ModelName;

/// `None`: no bound on that side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtlBounds {
    pub min: Option<Duration>,
    pub max: Option<Duration>,
}

/// `Mon-Fri 08:00-18:00`, in the machine's own time zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepWindow {
    /// Monday first.
    pub days: [bool; 7],
    /// Minutes since midnight; an end at or before the start lies on the next day.
    pub from_min: u16,
    pub to_min: u16,
}

/// Models that belong together, or exclude others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    pub models: Vec<ModelName>,
    /// Loading one loads all; they leave together. Else the members take turns: one at a time.
    pub together: bool,
    /// While one of them is loaded, no model outside the group is.
    pub exclusive: bool,
    /// Its members are not evicted for others.
    pub persistent: bool,
}
