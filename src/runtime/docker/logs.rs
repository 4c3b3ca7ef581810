//! A container's log, followed into a [`LogTail`], over restarts of the daemon.

use std::convert::Infallible;
use std::time::Duration;

use bollard::container::LogOutput;
use bollard::errors::Error;
use bollard::query_parameters::{AttachContainerOptionsBuilder, LogsOptions, LogsOptionsBuilder};
use futures_util::StreamExt as _;

use super::client::{Client, PROMPT, epoch_seconds};
use super::{errors, events, watched};
use crate::runtime::LogTail;

/// Lines of its past that an adopted container brings along.
const PAST_LINES: &str = "500";
/// A line that does not end is cut here.
const LINE_BYTES_MAX: usize = 8 << 10;
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// When Docker is back, the ends of containers wait for this before they are told.
const RETRY_MAX: Duration = Duration::from_secs(2);

/// Follows until the container no longer runs. `after`: leave out lines up to this time.
pub async fn follow(client: Client, id: String, log: LogTail, after: Option<String>) {
    let mut last = after.as_deref().map(fixed_width).unwrap_or_default();
    let mut waits = events::delays(RETRY_FIRST, RETRY_MAX);
    loop {
        match follow_once(&client, &id, &log, &mut last).await {
            Ok(true) => return,
            Ok(false) => waits = events::delays(RETRY_FIRST, RETRY_MAX),
            Err(error) => {
                if let Some(words) = errors::words(&error) {
                    if !errors::is_missing(&error) {
                        log.push(&format!("(Docker cannot show this container's log: {words})"));
                    }
                    return;
                }
            }
        }
        tokio::time::sleep(waits.next().unwrap_or(RETRY_MAX)).await;
    }
}

/// Tells the log of lines that grow, for as long as it is polled. Docker keeps a line to itself
/// until it ends (or 16 KiB); attached, everything is seen when it is written. Only for a short
/// while, since Docker lets the engine wait for a reader that reads no further.
pub async fn follow_unfinished(client: &Client, id: &str, log: &LogTail) -> Infallible {
    let options = AttachContainerOptionsBuilder::new().stream(true).stdout(true).stderr(true);
    let options = options.build();
    loop {
        if let Ok(docker) = client.docker().await
            && let Ok(mut attached) = docker.attach_container(id, Some(options.clone())).await
        {
            let mut unfinished = Vec::new();
            while let Some(Ok(written)) = attached.output.next().await {
                grow(&mut unfinished, written.as_ref(), log);
            }
        }
        tokio::time::sleep(RETRY_MAX).await;
    }
}

fn grow(unfinished: &mut Vec<u8>, written: &[u8], log: &LogTail) {
    let rest = match written.iter().rposition(|byte| matches!(byte, b'\n' | b'\r')) {
        Some(end) => {
            unfinished.clear();
            &written[end + 1..]
        }
        None => written,
    };
    if unfinished.len() + rest.len() > LINE_BYTES_MAX {
        unfinished.clear();
    }
    unfinished.extend_from_slice(&rest[..rest.len().min(LINE_BYTES_MAX)]);
    if !unfinished.is_empty() {
        log.grow(&String::from_utf8_lossy(unfinished));
    }
}

/// `Ok(true)`: the log is complete, as the container ended.
async fn follow_once(
    client: &Client,
    id: &str,
    log: &LogTail,
    last: &mut String,
) -> Result<bool, Error> {
    let Ok(docker) = client.docker().await else { return Ok(false) };
    let mut frames = docker.logs(id, Some(options(last)));
    // Fixed for this stream: the two pipes of a container are not in one order of time.
    let seen = last.clone();
    while let Some(frame) = frames.next().await {
        push(&frame?, log, &seen, last);
    }
    let Ok(inspected) = tokio::time::timeout(PROMPT, docker.inspect_container(id, None)).await
    else {
        return Ok(false);
    };
    Ok(inspected?.state.is_some_and(|state| !watched::is_running(&state)))
}

fn options(last: &str) -> LogsOptions {
    let options = LogsOptionsBuilder::new().follow(true).stdout(true).stderr(true).timestamps(true);
    let since = last.get(..19).and_then(epoch_seconds).and_then(|s| i32::try_from(s).ok());
    match since {
        Some(since) => options.since(since).build(),
        None => options.tail(PAST_LINES).build(),
    }
}

/// One frame is `TIME TEXT`; text of progress bars holds carriage returns.
fn push(frame: &LogOutput, log: &LogTail, seen: &str, last: &mut String) {
    let frame = String::from_utf8_lossy(frame.as_ref());
    let (time, text) = frame.split_once(' ').unwrap_or((&frame, ""));
    let time = fixed_width(time);
    // `since` has a resolution of one second: what was already seen comes again.
    if time.as_str() <= seen {
        return;
    }
    if time > *last {
        *last = time;
    }
    for line in text.split(['\n', '\r']).filter(|line| !line.is_empty()) {
        log.push(line);
    }
}

/// RFC 3339 in UTC with nine digits, so that text order is time order.
fn fixed_width(time: &str) -> String {
    let (seconds, fraction) = time.trim_end_matches('Z').split_once('.').unwrap_or((time, ""));
    format!("{}.{fraction:0<9}", seconds.trim_end_matches('Z'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(text: &str) -> LogOutput {
        LogOutput::StdOut { message: text.to_owned().into() }
    }

    #[test]
    fn a_line_that_comes_again_is_left_out() {
        let (log, mut last) = (LogTail::new(), String::new());
        let (one, two) = ("2026-01-01T00:00:00.12Z one\n", "2026-01-01T00:00:00.13Z 10%\r20%\r\n");
        push(&frame(two), &log, "", &mut last);
        push(&frame(one), &log, "", &mut last);
        let seen = last.clone();
        push(&frame(one), &log, &seen, &mut last);
        push(&frame(two), &log, &seen, &mut last);
        assert_eq!(log.last(9), ["10%", "20%", "one"]);
    }

    #[test]
    fn a_line_that_grows_is_told_of_before_it_ends() {
        let (log, mut unfinished) = (LogTail::new(), Vec::new());
        let mut seen = log.unfinished();
        for (written, line) in [
            ("loading\n..", Some("..")),
            (".", Some("...")),
            ("\n", None),
            ("\rshards:  25%", Some("shards:  25%")),
            ("\rshards:  50%", Some("shards:  50%")),
            ("\r\n", None),
        ] {
            grow(&mut unfinished, written.as_bytes(), &log);
            assert_eq!(seen.has_changed().expect("a sender"), line.is_some(), "{written:?}");
            if let Some(line) = line {
                assert_eq!(&**seen.borrow_and_update(), line);
            }
        }
        for _ in 0..100 {
            grow(&mut unfinished, &[b'.'; 1000], &log);
            assert!(unfinished.len() <= LINE_BYTES_MAX, "{}", unfinished.len());
        }
    }

    #[test]
    fn docker_trims_fractions_and_order_survives() {
        assert!(
            fixed_width("2026-01-01T00:00:00.12Z") < fixed_width("2026-01-01T00:00:00.120000001Z")
        );
        assert!(fixed_width("2026-01-01T00:00:00Z") < fixed_width("2026-01-01T00:00:00.1Z"));
    }
}
