//! Receiving the request: its body whole, once, and bounded in size, time and sum.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::StatusCode;
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::Limits;
use super::reject::Reject;
use crate::config::catalog::QueueSettings;
use crate::http1::{self, Headers};
use crate::units;

/// How much, and how long, is read on after a refusal.
const DISCARD_MAX: u64 = 16 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(2);
/// First allocation for a declared length: the client may not mean it.
const ALLOCATE_FIRST_MAX: usize = 64 << 10;

/// Bytes of all bodies held in memory (`queue.total_bodies`).
#[derive(Debug, Default)]
pub struct BodyBudget(AtomicU64);

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub struct Held {
    budget: Arc<BodyBudget>,
    bytes: u64,
}

impl BodyBudget {
    pub fn in_use(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Held {
    fn grow(&mut self, bytes: u64, limit: units::Bytes) -> bool {
        let before = self.budget.0.fetch_add(bytes, Ordering::Relaxed);
        self.bytes += bytes;
        before + bytes <= limit.0
    }

    /// Counts what is held from now on.
    fn shrink_to(&mut self, bytes: u64) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.budget.0.fetch_sub(surplus, Ordering::Relaxed);
        self.bytes -= surplus;
    }

    /// Counts what is held beside the body as it came: a rewritten one.
    pub fn also(&mut self, bytes: usize, queue: &QueueSettings) -> Result<(), Reject> {
        if self.grow(bytes as u64, queue.total_bodies) { Ok(()) } else { Err(no_room(queue)) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The body of a request.
#[derive(Debug)]
pub enum Content {
    Whole {
        body: Bytes,
        /// Bytes of memory that it keeps, with the head that it came with.
        kept: usize,
    },
    Coming(Body),
}

impl From<Body> for Content {
    fn from(body: Body) -> Content {
        Content::Coming(body)
    }
}

#[derive(Debug)]
pub struct Received {
    pub bytes: Bytes,
    pub held: Held,
}

pub async fn receive(
    content: impl Into<Content>,
    headers: &impl Headers,
    queue: &QueueSettings,
    budget: &Arc<BodyBudget>,
    limits: &Limits,
) -> Result<Received, Reject> {
    let held = Held { budget: Arc::clone(budget), bytes: 0 };
    match content.into() {
        Content::Whole { body, kept } => whole(body, kept, held, queue),
        Content::Coming(body) => gathered(body, held, headers, queue, limits).await,
    }
}

fn whole(
    bytes: Bytes,
    kept: usize,
    mut held: Held,
    queue: &QueueSettings,
) -> Result<Received, Reject> {
    let length = bytes.len() as u64;
    if length > queue.body_limit.0 {
        return Err(too_large(units::Bytes(length).to_string(), queue));
    }
    if !held.grow(kept as u64, queue.total_bodies) {
        return Err(no_room(queue));
    }
    Ok(Received { bytes, held })
}

async fn gathered(
    mut body: Body,
    mut held: Held,
    headers: &impl Headers,
    queue: &QueueSettings,
    limits: &Limits,
) -> Result<Received, Reject> {
    let declared = declared(headers);
    if let Some(length) = declared
        && length > queue.body_limit.0
    {
        discard(body, headers).await;
        return Err(too_large(units::Bytes(length).to_string(), queue));
    }
    let mut received = Gathered::default();
    let mut deadline = None;
    while !body.is_end_stream() {
        // Small bodies came with their head: nobody has to be waited for.
        let frame = match body.frame().now_or_never() {
            Some(frame) => Ok(frame),
            None => {
                let now = Instant::now();
                let until = *deadline.get_or_insert(now + limits.body_total);
                timeout_at(until.min(now + limits.body_idle), body.frame()).await
            }
        };
        let frame = match frame {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => {
                let message = format!("the request body broke off: {error}");
                return Err(Reject::bad_request("body_incomplete", message));
            }
            Ok(None) => break,
            Err(_) => return Err(too_slow(&received, declared, limits)),
        };
        let Ok(data) = frame.into_data() else { continue };
        if received.length + data.len() as u64 > queue.body_limit.0 {
            discard(body, headers).await;
            return Err(too_large(format!("more than {}", queue.body_limit), queue));
        }
        let more = received.will_take(data.len(), declared);
        if more > 0 && !held.grow(more as u64, queue.total_bodies) {
            // What came of it takes no more room than it has to.
            drop((received, held));
            discard(body, headers).await;
            return Err(no_room(queue));
        }
        received.push(data, declared);
    }
    held.shrink_to(received.length);
    Ok(Received { bytes: received.finish(), held })
}

/// One frame is kept as it is; only further ones are copied together. `Bytes` made of a `Vec` gives
/// back what it has too much.
#[derive(Default)]
struct Gathered {
    first: Bytes,
    all: Vec<u8>,
    length: u64,
}

impl Gathered {
    /// Room for `data` more bytes: doubled, but no more than was declared.
    fn capacity(&self, data: usize, declared: Option<u64>) -> usize {
        let needed = self.first.len().max(self.all.len()) + data;
        if self.length == 0 || needed <= self.all.capacity() {
            return needed.max(self.all.capacity());
        }
        let declared = usize::try_from(declared.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
        let wanted = (self.all.capacity() * 2).max(ALLOCATE_FIRST_MAX);
        wanted.min(declared).max(needed)
    }

    /// How much memory `data` bytes more will take.
    fn will_take(&self, data: usize, declared: Option<u64>) -> usize {
        let now = self.all.capacity().max(self.first.len());
        self.capacity(data, declared).saturating_sub(now)
    }

    fn push(&mut self, data: Bytes, declared: Option<u64>) {
        if self.length == 0 {
            self.length = data.len() as u64;
            self.first = data;
            return;
        }
        let capacity = self.capacity(data.len(), declared);
        self.all.reserve_exact(capacity - self.all.len());
        self.all.extend_from_slice(&std::mem::take(&mut self.first));
        self.length += data.len() as u64;
        self.all.extend_from_slice(&data);
    }

    fn finish(self) -> Bytes {
        if self.all.is_empty() { self.first } else { Bytes::from(self.all) }
    }
}

fn declared(headers: &impl Headers) -> Option<u64> {
    http1::length(headers.first("content-length")?)
}

/// Reads what a refused client still sends, within reason: closing at once would reset the
/// connection and lose the answer. A client that asked first (`Expect`) has sent nothing.
pub async fn discard(content: impl Into<Content>, headers: &impl Headers) {
    let Content::Coming(mut body) = content.into() else { return };
    if declared(headers).unwrap_or(0) > DISCARD_MAX || headers.first("expect").is_some() {
        return;
    }
    let read = async {
        let mut left = DISCARD_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, |data| data.len() as u64);
            let Some(less) = left.checked_sub(length) else { return };
            left = less;
        }
    };
    let _ = timeout(DISCARD_TIME, read).await;
}

fn too_large(size: String, queue: &QueueSettings) -> Reject {
    let message = format!(
        "the request body has {size}, allowed are {}; raise queue.body_limit in models.yaml or \
         send less",
        queue.body_limit
    );
    Reject::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

fn no_room(queue: &QueueSettings) -> Reject {
    let message = format!(
        "the bodies of waiting requests already take {} (queue.total_bodies); send again later",
        queue.total_bodies
    );
    Reject::new(StatusCode::TOO_MANY_REQUESTS, "bodies_full", message)
}

fn too_slow(received: &Gathered, declared: Option<u64>, limits: &Limits) -> Reject {
    let of = declared.map_or(String::new(), |length| format!(" of {}", units::Bytes(length)));
    let message = format!(
        "the request body came too slowly: {}{of} so far; at most {} s may pass between two parts \
         and {} s in all",
        units::Bytes(received.length),
        limits.body_idle.as_secs(),
        limits.body_total.as_secs()
    );
    Reject::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_counted_before_it_is_taken() {
        for declared in [None, Some(300_000), Some(7)] {
            let (mut gathered, mut counted) = (Gathered::default(), 0);
            for _ in 0..30 {
                let data = Bytes::from(vec![b'x'; 10_000]);
                counted += gathered.will_take(data.len(), declared);
                gathered.push(data, declared);
                let taken = gathered.all.capacity().max(gathered.first.len());
                assert!(taken <= counted, "{taken} bytes taken, {counted} counted");
            }
            assert!((300_000..=600_000).contains(&counted), "{declared:?}: {counted}");
            assert!(declared != Some(300_000) || counted == 300_000, "no more than declared");
            assert_eq!(gathered.finish().len(), 300_000);
        }
    }
}
