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

/// A minute of the week, where the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalTime {
    /// 0..7, Monday first.
    pub weekday: usize,
    /// Since midnight, 0..1440.
    pub minute: u16,
}

impl KeepWindow {
    pub fn is_open(&self, now: LocalTime) -> bool {
        let begins = |weekday: usize| self.days.get(weekday % 7).copied().unwrap_or_default();
        let (from, to) = (self.from_min, self.to_min);
        if from < to {
            return begins(now.weekday) && (from..to).contains(&now.minute);
        }
        // Over midnight: the rest of yesterday's window, or the begin of today's.
        (begins(now.weekday) && now.minute >= from) || (begins(now.weekday + 6) && now.minute < to)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_on_which_it_begins() {
        let friday = [false, false, false, false, true, false, false];
        let night = KeepWindow { days: friday, from_min: 22 * 60, to_min: 6 * 60 };
        let at = |weekday, hour: u16| LocalTime { weekday, minute: hour * 60 };
        let open: Vec<(usize, u16)> = (0..7)
            .flat_map(|day| (0..24).map(move |hour| (day, hour)))
            .filter(|&(day, hour)| night.is_open(at(day, hour)))
            .collect();
        assert_eq!(open.first(), Some(&(4, 22)));
        assert_eq!(open.last(), Some(&(5, 5)));
        assert_eq!(open.len(), 8);
        let whole_day = KeepWindow { days: [true; 7], from_min: 0, to_min: 0 };
        assert!((0..24).all(|hour| whole_day.is_open(at(6, hour))));
    }
}
