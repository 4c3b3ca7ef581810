//! A connection that became a WebSocket: bytes are copied both ways as they come, without a look at
//! frames. Whatever ends one side ends the other.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderName, HeaderValue, Method, StatusCode, Version, header, request};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout};

use super::answer::{Answer, named};
use super::reject::Reject;
use super::{Limits, forward};
use crate::http1::{Lines, names};
use crate::upstream;

mod way;

use way::Way;

/// At once. They outlive the connections that the listener counts.
const SOCKETS_MAX: usize = 1024;
/// From the engine's 101 to both connections being handed over.
const HANDOVER_MAX: Duration = Duration::from_secs(10);
/// A side that said its last may hear so much longer.
const LINGER: Duration = Duration::from_secs(10);

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

/// What the engine must be asked beside the headers that are passed on.
pub fn ask(headers: &mut Lines) {
    UPGRADE.iter().for_each(|(name, value)| headers.push(name, value));
}

const UPGRADE: [(HeaderName, HeaderValue); 2] = [
    (header::CONNECTION, HeaderValue::from_static("Upgrade")),
    (header::UPGRADE, HeaderValue::from_static("websocket")),
];

/// Answers the client as the engine did, and joins the two connections.
pub fn join(mut answer: Answer, client: Client, limits: &Limits) -> Response {
    answer.account.answered(&answer.head);
    let headers = forward::answer_lines(&answer.head.headers);
    let named = named(answer.account.model().as_str());
    let headers = headers.iter().chain(UPGRADE).chain(named).collect();
    let idle = if answer.lease.is_visit() { limits.visit_idle } else { limits.socket_idle };
    tokio::spawn(serve(answer, client, idle));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = headers;
    response
}

async fn serve(answer: Answer, client: Client, idle: Duration) {
    let Answer { lease, mut account, head, body, .. } = answer;
    // Nobody needs it any more, and a socket may be open for days.
    drop(head);
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
    let (mut client, mut engine) = (TokioIo::new(client), engine);
    let clock = Clock { began: Instant::now(), last_ms: AtomicU64::new(0) };
    let (mut forth, mut back) = (Way::default(), Way::default());
    let mut both = |cx: &mut Context<'_>| {
        [
            forth.poll(cx, &mut client, &mut engine, &clock).is_ready(),
            back.poll(cx, &mut engine, &mut client, &clock).is_ready(),
        ]
    };
    let one_ended = poll_fn(|cx| if both(cx).contains(&true) { Poll::Ready(()) } else { PENDING });
    tokio::select! {
        () = one_ended => {}
        () = clock.silent_for(idle) => return "cut",
    }
    let other_ended = poll_fn(|cx| if both(cx) == [true; 2] { Poll::Ready(()) } else { PENDING });
    let _ = timeout(LINGER, other_ended).await;
    "ok"
}

const PENDING: Poll<()> = Poll::Pending;

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
