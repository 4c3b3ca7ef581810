//! How often to look at something that takes nobody knows how long.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;

use crate::runtime::process::register;

/// What is noticed late is at most this part of the time waited so far.
const PART: u32 = 50;
const FIRST: Duration = Duration::from_micros(500);
/// Also an engine that takes minutes is not noticed later than this.
const LAST: Duration = Duration::from_millis(100);

/// Until the next look, after so long a wait: dense at first, then in proportion. So a start of one
/// second is prolonged by 10 ms on average, and one of a minute costs no more than 900 questions.
pub fn until_next_look(waited: Duration) -> Duration {
    (waited / PART).clamp(FIRST, LAST)
}

/// Sleeps as long as was said. The runtime's own timer counts whole milliseconds and ends up to two
/// late, which between dense looks is most of the wait.
pub async fn sleep_finely(time: Duration) {
    const COARSE: Duration = Duration::from_millis(10);
    // Zero would stop the timer instead of ending it.
    let time = time.max(Duration::from_micros(1));
    if time < COARSE
        && let Ok(timer) = timer(time)
        && timer.readable().await.is_ok()
    {
        return;
    }
    tokio::time::sleep(time).await;
}

fn timer(time: Duration) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
    let once = Expiration::OneShot(TimeSpec::from_duration(time));
    timer.set(once, TimerSetTimeFlags::empty())?;
    register(timer.into())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_fine_sleep_is_never_shorter_than_was_said() {
        for micros in [0, 1, 300, 4000, 12_000] {
            let (began, time) = (Instant::now(), Duration::from_micros(micros));
            sleep_finely(time).await;
            assert!(began.elapsed() >= time, "{time:?}: {:?}", began.elapsed());
        }
    }

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
