//! How fast bytes arrive.

use std::time::{Duration, Instant};

use crate::units::Bytes;

/// The rate is taken over this long, so that it neither jumps nor lags.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// A shorter time tells no rate.
const RATE_TIME_MIN: f64 = 0.2;

#[derive(Debug, Default)]
pub struct Pace {
    /// (when, bytes done), oldest first.
    samples: Vec<(Instant, u64)>,
}

impl Pace {
    pub fn note(&mut self, done: u64, now: Instant) {
        self.samples.push((now, done));
        let keep = self.samples.iter().position(|(at, _)| now.duration_since(*at) <= RATE_WINDOW);
        self.samples.drain(..keep.unwrap_or_default().saturating_sub(1));
    }

    /// Bytes per second; `None`: too early to tell.
    fn rate(&self) -> Option<Bytes> {
        let ((first, before), (last, after)) = (self.samples.first()?, self.samples.last()?);
        let seconds = last.duration_since(*first).as_secs_f64();
        let bytes = after.saturating_sub(*before) as f64;
        (seconds > RATE_TIME_MIN).then(|| Bytes((bytes / seconds) as u64))
    }

    /// `1.2 GiB of 9.1 GiB, 85.0 MiB/s`
    pub fn detail(&self, done: Bytes, total: Bytes) -> String {
        match self.rate() {
            Some(rate) => format!("{done} of {total}, {rate}/s"),
            None => format!("{done} of {total}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_stay_bounded() {
        let (start, mut pace) = (Instant::now(), Pace::default());
        for n in 0..10_000 {
            pace.note(n << 20, start + Duration::from_millis(10 * n));
        }
        assert!(pace.samples.len() < 600, "{}", pace.samples.len());
        let (done, total) = (Bytes::mib(5), Bytes::mib(9));
        assert_eq!(pace.detail(done, total), "5.0 MiB of 9.0 MiB, 100.0 MiB/s");
    }
}
