//! Sends events of thousands of streams at their due times, evenly spread: one thread of its own,
//! so that no runtime's timer, which counts in milliseconds, sends them in bursts.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{ErrorKind, Write as _};
use std::net::TcpStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use super::clock;
use super::wire::Events;

/// New streams are looked for so often.
const LOOK_EVERY: u64 = 1_000_000;
/// The golden ratio's fraction: whatever the number of streams, their phases are spread evenly.
const SPREAD: f64 = 0.618_033_988_749_895;

struct Paced {
    due: u64,
    left: u64,
    every: u64,
    usage: bool,
    stream: TcpStream,
}

pub struct Pacer {
    new: Sender<Paced>,
}

impl Pacer {
    pub fn start() -> Pacer {
        let (new, streams) = channel();
        thread::spawn(move || run(&streams));
        Pacer { new }
    }

    /// The stream is not blocking, and its head has been sent.
    pub fn add(&self, stream: TcpStream, events: u64, every: u64, usage: bool) {
        let paced = Paced { due: 0, left: events, every, usage, stream };
        // The thread ends with the process.
        let _ = self.new.send(paced);
    }
}

fn run(new: &Receiver<Paced>) {
    let mut streams: Vec<Option<Paced>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut due: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut events = Events::new();
    let mut phase = 0.0_f64;
    loop {
        // Without streams there is nothing to do until one comes.
        let first = if due.is_empty() { new.recv().ok() } else { None };
        for mut paced in first.into_iter().chain(new.try_iter()) {
            phase = (phase + SPREAD).fract();
            paced.due = clock::now() + (phase * paced.every as f64) as u64;
            let place = free.pop().unwrap_or_else(|| {
                streams.push(None);
                streams.len() - 1
            });
            due.push(Reverse((paced.due, place)));
            streams[place] = Some(paced);
        }
        let now = clock::now();
        while let Some(&Reverse((time, place))) = due.peek()
            && time <= now
        {
            due.pop();
            match streams[place].as_mut().and_then(|paced| step(paced, &mut events)) {
                Some(next) => due.push(Reverse((next, place))),
                None => {
                    streams[place] = None;
                    free.push(place);
                }
            }
        }
        let next = due.peek().map_or(now, |Reverse((time, _))| *time).min(now + LOOK_EVERY);
        let wait = next.saturating_sub(clock::now());
        if wait > 0 {
            thread::sleep(Duration::from_nanos(wait));
        }
    }
}

/// Sends one event, or the end; says when the next is due.
fn step(paced: &mut Paced, events: &mut Events) -> Option<u64> {
    if paced.left == 0 {
        // The last words of a stream that is closed right after; nobody counts them.
        let _ = paced.stream.write_all(events.end(paced.usage));
        return None;
    }
    let event = events.stamped(clock::now());
    match paced.stream.write(event) {
        // Half an event would break the stream.
        Ok(written) if written < event.len() => return None,
        Ok(_) => {}
        // Its reader is slow: this event is left out.
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        Err(_) => return None,
    }
    paced.left -= 1;
    paced.due += paced.every;
    Some(paced.due)
}
