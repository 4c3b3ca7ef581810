//! A connection that became a WebSocket: bytes are copied both ways as they come, without a look at
//! frames. Whatever ends one side ends the other.

use std::io::Cursor;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, request};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

use super::answer::{Answer, named};
use super::reject::Reject;
use super::{Limits, forward};
use crate::upstream;

/// At once. They outlive the connections that the listener counts.
const SOCKETS_MAX: usize = 1024;
/// From the engine's 101 to both connections being handed over.
const HANDOVER_MAX: Duration = Duration::from_secs(10);
/// A side that said its last may hear so much longer.
const LINGER: Duration = Duration::from_secs(10);
const BUFFER_BYTES: usize = 16 << 10;

#[derive(Debug)]
pub struct Sockets(Arc<Semaphore>);

impl Default for Sockets {
    fn default() -> Sockets {
        Sockets(Arc::new(Semaphore::new(SOCKETS_MAX)))
    }
}

/// A client that asked for a WebSocket and may have one.
#[derive(Debug)]
pub struct Client {
    upgrade: OnUpgrade,
    place: OwnedSemaphorePermit,
}

impl Sockets {
    /// `None`: a request like any other.
    pub fn asked(&self, head: &mut request::Parts) -> Result<Option<Client>, Reject> {
        let Some(asked) = head.headers.get(header::UPGRADE) else { return Ok(None) };
        // Java's HTTP client asks for `h2c` with every request: whoever speaks none of it ignores it.
        if !names(&head.headers, &header::UPGRADE, "websocket") {
            return Ok(None);
        }
        if !asked.as_bytes().eq_ignore_ascii_case(b"websocket") {
            let asked = String::from_utf8_lossy(asked.as_bytes());
            let asked: String = asked.chars().take(60).collect();
            let message = format!("`Upgrade: {asked}` must name `websocket` alone");
            return Err(Reject::bad_request("upgrade_not_supported", message));
        }
        let is_handshake = head.method == Method::GET
            && head.version == Version::HTTP_11
            && names(&head.headers, &header::CONNECTION, "upgrade")
            && head.headers.contains_key(header::SEC_WEBSOCKET_KEY);
        let upgrade = head.extensions.remove::<OnUpgrade>().filter(|_| is_handshake);
        let Some(upgrade) = upgrade else {
            let message = "this is no WebSocket handshake: it takes GET over HTTP/1.1 with \
                           `Connection: Upgrade` and `Sec-WebSocket-Key`";
            return Err(Reject::bad_request("upgrade_not_supported", message));
        };
        let place = Arc::clone(&self.0).try_acquire_owned().map_err(|_| {
            let message = format!("all {SOCKETS_MAX} WebSockets are in use; try again later");
            Reject::new(StatusCode::SERVICE_UNAVAILABLE, "connections_full", message)
        })?;
        Ok(Some(Client { upgrade, place }))
    }
}

fn names(headers: &HeaderMap, name: &http::HeaderName, wanted: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|value| value.trim().eq_ignore_ascii_case(wanted))
}

/// What the engine must be asked beside the headers that are passed on.
pub fn ask(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

/// Answers the client as the engine did, and joins the two connections.
pub fn join(mut answer: Answer, client: Client, limits: &Limits) -> Response {
    let mut headers = answer.head.headers.clone();
    answer.account.answered(answer.head.status, &headers, false);
    forward::response_headers(&mut headers);
    ask(&mut headers);
    headers.extend(named(answer.account.model().as_str()));
    let idle = if answer.lease.is_visit() { limits.visit_idle } else { limits.socket_idle };
    tokio::spawn(serve(answer, client, idle));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = headers;
    response
}

async fn serve(answer: Answer, client: Client, idle: Duration) {
    let Answer { body, lease, mut account, .. } = answer;
    let Client { upgrade, place } = client;
    let (cut, cancel) = (lease.cut().clone(), account.cancel().clone());
    let joined = async {
        let Some(engine) = body.into_upgraded() else { return "upstream_error" };
        match timeout(HANDOVER_MAX, upgrade).await {
            Ok(Ok(client)) => copy_both(client, engine, idle).await,
            _ => "upstream_error",
        }
    };
    let outcome = tokio::select! {
        outcome = joined => outcome,
        () = cut.cancelled() => "cut",
        () = cancel.wished() => "cancelled",
    };
    account.end(outcome);
    drop((lease, place));
}

async fn copy_both(client: Upgraded, engine: upstream::Upgraded, idle: Duration) -> &'static str {
    let (from_client, to_client) = split(TokioIo::new(client));
    let (from_engine, to_engine) = split(engine.io);
    let from_engine = AsyncReadExt::chain(Cursor::new(engine.early), from_engine);
    let clock = Clock { began: Instant::now(), last_ms: AtomicU64::new(0) };
    let mut forth = std::pin::pin!(copy(from_client, to_engine, &clock));
    let mut back = std::pin::pin!(copy(from_engine, to_client, &clock));
    let mut silent = std::pin::pin!(clock.silent_for(idle));
    tokio::select! {
        () = &mut forth => { let _ = timeout(LINGER, back).await; }
        () = &mut back => { let _ = timeout(LINGER, forth).await; }
        () = &mut silent => return "cut",
    }
    "ok"
}

/// When bytes last moved, in either direction.
struct Clock {
    began: Instant,
    last_ms: AtomicU64,
}

impl Clock {
    fn tick(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    async fn silent_for(&self, idle: Duration) {
        loop {
            let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
            let due = self.began + last + idle;
            if Instant::now() >= due {
                return;
            }
            sleep_until(due).await;
        }
    }
}

/// To the end of `from`, which is passed on; or to the first error.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, clock: &Clock) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        clock.tick();
        if to.write_all(&buffer[..read]).await.is_err() || to.flush().await.is_err() {
            return;
        }
        clock.tick();
    }
    let _ = to.shutdown().await;
}
