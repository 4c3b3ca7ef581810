//! Waiting: the response head is held for a while, so that a refusal keeps its status; then a
//! streaming client is told what happens, until its answer begins.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, Interval, interval, sleep_until, timeout};

use super::answer::{Answer, Reply, named, outcome};
use super::infer::{Job, Stage};
use super::notes::Notes;
use super::reject::Reject;
use super::relay::Relay;
use crate::config::catalog::WaitingStyle;

/// How often the view is looked at for something new to tell.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Of an upstream error that must be told inside a stream.
const ERROR_BYTES_MAX: usize = 64 << 10;
const ERROR_TIME_MAX: Duration = Duration::from_secs(30);

type Work = Pin<Box<dyn Future<Output = Result<Answer, Reject>> + Send>>;

pub async fn respond(job: Box<Job>) -> Reply {
    let Some(waiting) = job.waiting else {
        return direct(job.run(None).await);
    };
    let (tell, stage) = watch::channel(Stage::Admitted);
    let handle = job.gateway.handle.clone();
    let keep_alive = job.gateway.limits.keep_alive;
    let notes = Notes::new(handle, Arc::clone(&job.spec), job.api, waiting.style, keep_alive);
    let model = job.sole_model();
    let mut work: Work = Box::pin(job.run(Some(tell)));
    tokio::select! {
        biased;
        answer = &mut work => direct(answer),
        () = held_long_enough(waiting.after, stage.clone()) => {
            let opened = Opened {
                work: Some(work),
                stage,
                notes,
                look: interval(LOOK_EVERY),
                relay: None,
            };
            Reply::from(event_stream(opened, model.as_deref()))
        }
    }
}

fn direct(answer: Result<Answer, Reject>) -> Reply {
    match answer {
        Ok(answer) if answer.head.status == StatusCode::SWITCHING_PROTOCOLS => {
            answer.switched_unasked().into_response().into()
        }
        Ok(answer) => answer.into_reply(),
        Err(reject) => reject.into_response().into(),
    }
}

/// Once a request is with its engine, the engine's own head is worth waiting for. Most never wait,
/// and need no clock.
async fn held_long_enough(after: Duration, mut stage: watch::Receiver<Stage>) {
    let held_until = Instant::now() + after;
    let waits = |stage: &Stage| matches!(stage, Stage::Waiting(..));
    while stage.wait_for(waits).await.is_ok() {
        sleep_until(held_until).await;
        if waits(&stage.borrow()) {
            return;
        }
    }
    std::future::pending::<()>().await;
}

/// `model`: where it is known already who will answer.
fn event_stream(opened: Opened, model: Option<&str>) -> Response {
    let mut response = Response::new(Body::from_stream(stream::unfold(opened, step)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.extend(model.and_then(named));
    response
}

/// A stream whose head was sent before its request was served.
struct Opened {
    work: Option<Work>,
    stage: watch::Receiver<Stage>,
    notes: Notes,
    look: Interval,
    relay: Option<Relay>,
}

async fn step(mut opened: Opened) -> Option<(Result<Bytes, axum::BoxError>, Opened)> {
    loop {
        if let Some(relay) = &mut opened.relay {
            let frame = relay.frame().await?;
            let data = frame.map(|frame| frame.into_data().unwrap_or_default());
            return Some((data, opened));
        }
        let work = opened.work.as_mut()?;
        tokio::select! {
            biased;
            answer = work => {
                opened.work = None;
                let epilogue_wanted = opened.notes.style == WaitingStyle::Comment;
                match begin(answer, epilogue_wanted).await {
                    Ok(relay) => opened.relay = Some(relay),
                    Err(event) => return Some((Ok(event), opened)),
                }
            }
            _ = opened.look.tick() => {
                let stage = opened.stage.borrow().clone();
                if let Some(line) = opened.notes.next(&stage, Instant::now()) {
                    return Some((Ok(line), opened));
                }
            }
        }
    }
}

/// What follows the notes: the answer's events, or one last event with the error.
async fn begin(answer: Result<Answer, Reject>, epilogue: bool) -> Result<Relay, Bytes> {
    let answer = answer.map_err(|reject| reject.event())?;
    if answer.head.status == StatusCode::OK && answer.head.is_event_stream {
        let epilogue =
            epilogue.then(|| Bytes::from(format!(": server-timing {}\n\n", answer.timing.text())));
        return Ok(answer.into_relay(epilogue));
    }
    Err(error_of(answer).await)
}

/// An upstream answer that is no stream, as the event that SDKs raise.
async fn error_of(answer: Answer) -> Bytes {
    let Answer { head, body, lease, mut account, .. } = answer;
    account.answered(&head);
    let cancel = account.cancel().clone();
    let collected = tokio::select! {
        collected = timeout(ERROR_TIME_MAX, Limited::new(body, ERROR_BYTES_MAX).collect()) => collected,
        () = cancel.wished() => {
            let reject = Reject::cancelled(account.model());
            account.refused(&reject, reject.code());
            return reject.event();
        }
    };
    drop(lease);
    account.end(outcome(head.status));
    let text = match collected {
        Ok(Ok(body)) => body.to_bytes(),
        _ => Bytes::new(),
    };
    match serde_json::from_slice::<Value>(&text) {
        // One line: a line end inside would end the event's data.
        Ok(value) if value.get("error").is_some_and(|error| !error.is_null()) => {
            Bytes::from(format!("data: {value}\n\n"))
        }
        _ => {
            let shown: String = String::from_utf8_lossy(&text).chars().take(500).collect();
            let model = account.model();
            let message = format!(
                "the engine of model \"{model}\" answered a streaming request with {}: {shown}",
                head.status
            );
            Reject::new(StatusCode::BAD_GATEWAY, "upstream_error", message).model(model).event()
        }
    }
}
