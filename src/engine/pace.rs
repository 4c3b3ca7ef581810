//! How often to look at something that takes nobody knows how long.

use std::time::Duration;

/// What is noticed late is at most this part of the time waited so far.
const PART: u32 = 50;
const FIRST: Duration = Duration::from_millis(1);
/// Also an engine that takes minutes is not noticed later than this.
const LAST: Duration = Duration::from_millis(100);

/// Until the next look, after so long a wait: dense at first, then in proportion. So a start of one
/// second is prolonged by 10 ms on average, and one of a minute costs no more than 700 questions.
pub fn until_next_look(waited: Duration) -> Duration {
    (waited / PART).clamp(FIRST, LAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_late_is_a_small_part_of_the_wait() {
        for took in [10, 300, 1000, 4000, 60_000_u64].map(Duration::from_millis) {
            let (mut waited, mut looks) = (Duration::ZERO, 0);
            while waited < took {
                waited += until_next_look(waited);
                looks += 1;
            }
            let late = waited - took;
            assert!(late <= (took / 50).max(FIRST).min(LAST), "{took:?}: {late:?} late");
            assert!(looks <= 900, "{took:?}: {looks} looks");
        }
    }
}
