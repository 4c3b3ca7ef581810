//! Clients of streams, and of one request after the other.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::clock;
use super::wire::{self, Wanted};

/// Streams that are being opened at once.
const OPENING_MAX: usize = 128;
/// For all streams to be open, and for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of streams that stayed open together.
#[derive(Default)]
pub struct Held {
    pub open: usize,
    /// From an event's leaving the upstream to its receipt, in nanoseconds, in order.
    pub delays: Vec<u32>,
}

/// One thread: its own work stays on one core, and no worker waits for another.
fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// How many streams, of how many nanoseconds between two events, and for how long they are
/// listened to.
#[derive(Clone, Copy)]
pub struct Paced {
    pub streams: usize,
    pub every: u64,
    pub listen: Duration,
}

/// When all streams are open.
#[derive(Clone, Copy, PartialEq)]
pub enum Moment {
    /// From now on delays are noted.
    Begin,
    /// No longer.
    Full,
}

/// Opens `paced.streams` streams and listens to them.
pub fn hold(target: SocketAddr, paced: Paced, mut look: impl FnMut(Moment)) -> io::Result<Held> {
    runtime()?.block_on(async {
        let body =
            wire::body(Wanted::Stream { events: 1 << 40, every: paced.every, usage: false }, 0);
        let request = Arc::new(wire::request(&target.to_string(), &body));
        let (listening, opening) =
            (Arc::new(AtomicBool::new(false)), Arc::new(Semaphore::new(OPENING_MAX)));
        let (open, failed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let done = Arc::new(AtomicBool::new(false));
        let mut readers = JoinSet::new();
        for _ in 0..paced.streams {
            let (request, opening) = (Arc::clone(&request), Arc::clone(&opening));
            let (open, failed) = (Arc::clone(&open), Arc::clone(&failed));
            let (listening, done) = (Arc::clone(&listening), Arc::clone(&done));
            readers.spawn(async move {
                let place = opening.acquire_owned().await;
                let Ok((stream, rest)) = open_stream(target, &request).await else {
                    failed.fetch_add(1, Ordering::Relaxed);
                    return Vec::new();
                };
                drop(place);
                open.fetch_add(1, Ordering::Relaxed);
                listen(stream, rest, &listening, &done).await
            });
        }
        let began = Instant::now();
        let settled = || open.load(Ordering::Relaxed) + failed.load(Ordering::Relaxed);
        while settled() < paced.streams && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Every stream has had its first event, and what the opening took is over.
        tokio::time::sleep(Duration::from_nanos(paced.every).max(Duration::from_secs(1))).await;
        look(Moment::Begin);
        listening.store(true, Ordering::Relaxed);
        tokio::time::sleep(paced.listen).await;
        listening.store(false, Ordering::Relaxed);
        look(Moment::Full);
        let mut held = Held { open: open.load(Ordering::Relaxed), ..Held::default() };
        done.store(true, Ordering::Relaxed);
        let last = tokio::time::Instant::now() + PATIENCE;
        while let Ok(Some(delays)) = tokio::time::timeout_at(last, readers.join_next()).await {
            held.delays.extend(delays.unwrap_or_default());
        }
        held.delays.sort_unstable();
        Ok(held)
    })
}

async fn open_stream(target: SocketAddr, request: &[u8]) -> io::Result<(TcpStream, Vec<u8>)> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    stream.write_all(request).await?;
    let mut buffer = Vec::with_capacity(1024);
    loop {
        if let Some(end) = wire::head_end(&buffer) {
            if wire::status(&buffer) != 200 {
                return Err(ErrorKind::ConnectionRefused.into());
            }
            buffer.drain(..end);
            return Ok((stream, buffer));
        }
        let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut buffer)).await??;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Delays of the events that come while `listening`; leaves at the first event after `done`.
async fn listen(
    mut stream: TcpStream,
    mut buffer: Vec<u8>,
    listening: &AtomicBool,
    done: &AtomicBool,
) -> Vec<u32> {
    let mut delays = Vec::new();
    while !done.load(Ordering::Relaxed) {
        match stream.read_buf(&mut buffer).await {
            Ok(1..) => {}
            _ => break,
        }
        let now = clock::now();
        let note = listening.load(Ordering::Relaxed);
        let read = wire::stamps(&buffer, |sent| {
            if note {
                delays.push(u32::try_from(now.saturating_sub(sent)).unwrap_or(u32::MAX));
            }
        });
        buffer.drain(..read);
    }
    delays
}

/// How many streams of `events` events, each as fast as it comes, end in a second: `clients` at
/// once, spread over `threads`.
pub fn short_streams(
    target: SocketAddr,
    (clients, threads): (usize, usize),
    events: u64,
    time: Duration,
) -> io::Result<f64> {
    let body = wire::body(Wanted::Stream { events, every: 0, usage: false }, 0);
    let request = Arc::new(wire::request(&target.to_string(), &body));
    let until = Instant::now() + time;
    let began = Instant::now();
    let mut working = Vec::new();
    for thread in 0..threads {
        let request = Arc::clone(&request);
        let clients = clients / threads + usize::from(thread < clients % threads);
        working.push(thread::spawn(move || -> io::Result<u64> {
            runtime()?.block_on(async move {
                let mut tasks = JoinSet::new();
                for _ in 0..clients {
                    let request = Arc::clone(&request);
                    tasks.spawn(one_after_the_other(target, request, events, until));
                }
                let mut ended = 0;
                while let Some(count) = tasks.join_next().await {
                    ended += count.map_err(io::Error::other)??;
                }
                Ok(ended)
            })
        }));
    }
    let mut ended = 0;
    for thread in working {
        ended += thread.join().map_err(|_| io::Error::other("a client panicked"))??;
    }
    Ok(ended as f64 / began.elapsed().as_secs_f64())
}

async fn one_after_the_other(
    target: SocketAddr,
    request: Arc<Vec<u8>>,
    events: u64,
    until: Instant,
) -> io::Result<u64> {
    let mut ended = 0;
    let (mut stream, mut rest) = (TcpStream::connect(target).await?, Vec::with_capacity(8192));
    stream.set_nodelay(true)?;
    while Instant::now() < until {
        stream.write_all(&request).await?;
        let (mut seen, mut head) = (0, false);
        loop {
            if stream.read_buf(&mut rest).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if !head && let Some(end) = wire::head_end(&rest) {
                if wire::status(&rest) != 200 {
                    return Err(io::Error::other(String::from_utf8_lossy(&rest).into_owned()));
                }
                rest.drain(..end);
                head = true;
            }
            if head {
                let whole = rest.ends_with(wire::LAST_CHUNK);
                let read = wire::stamps(&rest, |_| seen += 1);
                rest.drain(..read);
                if whole {
                    break;
                }
            }
        }
        if seen != events {
            return Err(io::Error::other(format!("{seen} events of {events}")));
        }
        rest.clear();
        ended += 1;
    }
    Ok(ended)
}

/// One connection that sends one request after the other, for instruction counts.
pub struct Sequence {
    stream: std::net::TcpStream,
    buffer: Vec<u8>,
}

impl Sequence {
    pub fn connect(target: SocketAddr) -> io::Result<Sequence> {
        let stream = std::net::TcpStream::connect_timeout(&target, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Sequence { stream, buffer: vec![0; 64 * 1024] })
    }

    /// Sends `request`; the status of the answer, which is read to its end.
    pub fn ask(&mut self, request: &[u8]) -> io::Result<u16> {
        self.stream.write_all(request)?;
        let mut have = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[have..])?;
            have += read;
            let Some(head) = wire::head_end(&self.buffer[..have]) else {
                if read == 0 || have == self.buffer.len() {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                continue;
            };
            let status = wire::status(&self.buffer);
            let mut left = (head + wire::content_length(&self.buffer[..head])).saturating_sub(have);
            while left > 0 {
                let most = left.min(self.buffer.len());
                let read = self.stream.read(&mut self.buffer[..most])?;
                if read == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                left -= read;
            }
            return Ok(status);
        }
    }
}

/// Asks until the answer is 200; how long that took, counted from `began`.
pub fn first_answer(target: SocketAddr, request: &[u8], began: Instant) -> io::Result<Duration> {
    loop {
        let asked = Sequence::connect(target).and_then(|mut one| one.ask(request));
        match asked {
            Ok(200) => return Ok(began.elapsed()),
            _ if began.elapsed() < PATIENCE => thread::sleep(Duration::from_micros(500)),
            Ok(status) => return Err(io::Error::other(format!("{target} answers {status}"))),
            Err(error) => return Err(error),
        }
    }
}
