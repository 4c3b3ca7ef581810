//! llama-swap's logs: the last 100 KiB of each source, and every line as it comes, as text or SSE.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderName, StatusCode, Uri};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt as _};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use super::extract::PathText;
use super::{Api, events};
use crate::telemetry::logs::{Line, Wanted, left_out};

const TEXT: &str = "text/plain; charset=utf-8";
/// nginx would hold streams back otherwise.
pub(super) const UNBUFFERED: (HeaderName, &str) =
    (HeaderName::from_static("x-accel-buffering"), "no");

/// `GET /logs`, `/log`
pub async fn all(State(api): State<Api>) -> Response {
    let lines = api.handle.logs().history(&Wanted::All);
    let text: String = lines.iter().flat_map(|line| [line.text.as_str(), "\n"]).collect();
    ([(CONTENT_TYPE, TEXT), (X_CONTENT_TYPE_OPTIONS, "nosniff")], text).into_response()
}

/// `GET /logs/stream`
pub async fn stream_all(State(api): State<Api>, uri: Uri) -> Response {
    text_stream(&api, Wanted::All, &uri)
}

/// `GET /logs/stream/{proxy, upstream or a model}`
pub async fn stream(State(api): State<Api>, PathText(source): PathText, uri: Uri) -> Response {
    match wanted(&api, &source) {
        Some(wanted) => text_stream(&api, wanted, &uri),
        None => unknown_source(),
    }
}

/// `GET /logs/streamSSE`
pub async fn stream_sse_all(State(api): State<Api>, uri: Uri) -> Response {
    sse_stream(&api, Wanted::All, &uri)
}

/// `GET /logs/streamSSE/{proxy, upstream or a model}`
pub async fn stream_sse(State(api): State<Api>, PathText(source): PathText, uri: Uri) -> Response {
    match wanted(&api, &source) {
        Some(wanted) => sse_stream(&api, wanted, &uri),
        None => unknown_source(),
    }
}

/// A model that is called `proxy` is reached by an alias only.
fn wanted(api: &Api, source: &str) -> Option<Wanted> {
    match source {
        "proxy" => Some(Wanted::Proxy),
        "upstream" => Some(Wanted::Upstream),
        name => Some(Wanted::Model(api.handle.catalog().resolve(name)?.name.clone())),
    }
}

fn unknown_source() -> Response {
    let text = "invalid logger. Use 'proxy', 'upstream' or the name of a model\n";
    (StatusCode::BAD_REQUEST, [(CONTENT_TYPE, TEXT)], text).into_response()
}

fn text_stream(api: &Api, wanted: Wanted, uri: &Uri) -> Response {
    let lines = follow(api, wanted, uri);
    let chunks = lines.map(|line| Ok::<_, Infallible>(Bytes::from(format!("{line}\n"))));
    let headers =
        [(CONTENT_TYPE, TEXT), (X_CONTENT_TYPE_OPTIONS, "nosniff"), (CACHE_CONTROL, "no-cache")];
    (headers, [UNBUFFERED], Body::from_stream(chunks)).into_response()
}

fn sse_stream(api: &Api, wanted: Wanted, uri: &Uri) -> Response {
    let lines = follow(api, wanted, uri);
    // A progress bar's carriage return would end the SSE line.
    let event = |line: String| Event::default().event("message").data(line.replace('\r', " "));
    let events = lines.map(move |line| Ok::<_, Infallible>(event(line)));
    let sse = Sse::new(events).keep_alive(KeepAlive::new().interval(events::HEARTBEAT));
    ([UNBUFFERED], sse).into_response()
}

/// Lines as a slow reader can take them: it skips some, and holds nobody up.
fn follow(api: &Api, wanted: Wanted, uri: &Uri) -> impl Stream<Item = String> + use<> {
    let (history, live) = api.handle.logs().follow(&wanted);
    let history = if has_flag(uri, "no-history") { Vec::new() } else { history };
    let closed = api.handle.feed().closed();
    let tail = Tail { history: history.into(), live, wanted, closed };
    stream::unfold(tail, |mut tail| async {
        let line = tail.next().await?;
        Some((line, tail))
    })
}

/// `?no-history`, `?no-history=1`, `?a=b&no-history`
fn has_flag(uri: &Uri, flag: &str) -> bool {
    let mut names = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
    names.any(|name| name == flag)
}

struct Tail {
    history: VecDeque<Arc<Line>>,
    live: Receiver<Arc<Line>>,
    wanted: Wanted,
    closed: CancellationToken,
}

impl Tail {
    async fn next(&mut self) -> Option<String> {
        if let Some(line) = self.history.pop_front() {
            return Some(line.text.clone());
        }
        loop {
            let line = tokio::select! {
                biased;
                () = self.closed.cancelled() => return None,
                line = self.live.recv() => line,
            };
            match line {
                Ok(line) if self.wanted.takes(&line.source) => return Some(line.text.clone()),
                Ok(_) => {}
                Err(RecvError::Lagged(lines)) => return Some(left_out(lines)),
                Err(RecvError::Closed) => return None,
            }
        }
    }
}
