//! What is told about one request, whatever way it ends: its figures in the metrics, its row of
//! activity, its place in the in-flight list, and its capture where captures are on.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::Gateway;
use super::answer::Head;
use super::captures::Draft;
use super::figures::Figures;
use super::in_flight::{Cancel, Ticket, Who};
use super::limits::Permit;
use super::parse::NAME_SHOWN_MAX;
use super::reject::{CLIENT_CLOSED, Reject};
use crate::config::catalog::{ApiKey, Catalog};
use crate::http1::Headers as _;
use crate::orchestrator::StartKind;
use crate::store::Activity;
use crate::telemetry::metrics::Tokens;
use crate::units::{ModelName, Time};

/// A request whose model is not known yet.
#[derive(Debug)]
pub struct Arrival(Option<Box<Record>>);

impl Arrival {
    /// `id`: as in `X-Request-Id`.
    pub fn open(
        gateway: &Arc<Gateway>,
        method: &Method,
        path: impl Into<Cow<'static, str>>,
        id: &HeaderValue,
    ) -> Arrival {
        Arrival(Some(Box::new(Record {
            gateway: Arc::clone(gateway),
            method: method.clone(),
            path: path.into(),
            request_id: id.clone(),
            entitled: false,
            is_visit: false,
            key: None,
            permit: Permit::default(),
            requested: String::new(),
            arrived: gateway.handle.now(),
            began: Instant::now(),
            ticket: None,
            waited: Duration::ZERO,
            start: None,
            sent: None,
            first: None,
            status: None,
            content_type: Cow::Borrowed(""),
            streamed: false,
            figures: Figures::default(),
            capture: None,
        })))
    }

    /// From here on the request gives a row: strangers cannot fill the store.
    pub fn entitled(&mut self, key: Option<&ApiKey>) {
        if let Some(record) = &mut self.0 {
            record.entitled = true;
            record.key = key.map(|key| key.name.clone());
        }
    }

    /// No work, but a look at a page: nothing is told of it.
    pub fn visits(&mut self) {
        if let Some(record) = &mut self.0 {
            (record.entitled, record.is_visit) = (false, true);
        }
    }

    /// The share of its key's limits, to the end of the answer.
    pub fn hold(&mut self, permit: Permit) {
        if let Some(record) = &mut self.0 {
            record.permit = permit;
        }
    }

    pub fn arrived(&self) -> Time {
        self.0.as_ref().map_or(Time::ZERO, |record| record.arrived)
    }

    /// `headers` are asked for where captures are on.
    pub fn received(
        &mut self,
        catalog: &Catalog,
        headers: impl FnOnce() -> HeaderMap,
        body: &[u8],
    ) {
        let Some(record) = &mut self.0 else { return };
        let settings = catalog.settings.captures;
        record.capture = record.gateway.traffic.captures.begin(settings, &record.path);
        if let Some(capture) = &mut record.capture {
            capture.request(&headers(), body);
        }
    }

    pub fn asked(&mut self, requested: &str) {
        if let Some(record) = &mut self.0 {
            record.requested = match requested.len() {
                0..=NAME_SHOWN_MAX => requested.to_owned(),
                _ => requested.chars().take(NAME_SHOWN_MAX).collect(),
            };
        }
    }

    /// The request is one of `model` now, and in the in-flight list.
    pub fn admitted(&mut self, model: ModelName) -> Account {
        let mut record = self.0.take();
        let mut cancel = Cancel::default();
        if let Some(record) = &mut record {
            tracing::debug!(request = record.id(), %model, "request arrived");
            let ticket = record.gateway.traffic.in_flight.enter(Who {
                request_id: record.request_id.clone(),
                model: model.clone(),
                requested: record.requested.clone(),
                key: record.key.clone(),
                path: record.path.clone(),
                arrived: record.arrived,
            });
            cancel = ticket.cancel();
            record.ticket = Some(ticket);
        }
        Account { model, cancel, record }
    }

    /// It never came as far as an account; answers with what its client is told.
    pub fn turned_away(mut self, gateway: &Gateway, reject: Reject) -> Response {
        if let Some(mut record) = self.0.take() {
            tracing::debug!(request = record.id(), code = reject.code(), "request refused");
            record.refused(&reject);
            record.close(None, reject.code());
        }
        gateway.metrics.refused(reject.code());
        reject.into_response()
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if let Some(record) = self.0.take() {
            record.close(None, CLIENT_GONE);
        }
    }
}

const CLIENT_GONE: &str = "client_gone";

/// An admitted request. Reports its end exactly once: a client that leaves drops this unended.
#[derive(Debug)]
pub struct Account {
    model: ModelName,
    cancel: Cancel,
    /// `None`: its end is reported.
    record: Option<Box<Record>>,
}

impl Account {
    pub fn model(&self) -> &ModelName {
        &self.model
    }

    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// The next model of a route is asked instead.
    pub fn moved(&mut self, model: ModelName) {
        if let Some(record) = &mut self.record {
            (record.start, record.sent) = (None, None);
            if let Some(ticket) = &record.ticket {
                ticket.moved(model.clone());
            }
        }
        self.model = model;
    }

    pub fn granted(&mut self, start: StartKind, waited: Duration, now: Instant) {
        let Some(record) = &mut self.record else { return };
        record.start = Some(start);
        record.waited = waited;
        record.sent = Some(now);
        if let Some(ticket) = &record.ticket {
            ticket.forwarded();
        }
        record.gateway.metrics.queue_waited(&self.model, waited);
    }

    /// The head of the answer.
    pub fn answered(&mut self, head: &Head) {
        let Some(record) = &mut self.record else { return };
        let Head { status, headers, is_event_stream } = head;
        record.status = Some(*status);
        record.content_type = headers.first("content-type").map(content_type).unwrap_or_default();
        record.streamed = *is_event_stream;
        if let Some(capture) = &mut record.capture {
            capture.response_head(&headers.to_map());
        }
    }

    /// Its last byte came with its first: the time between them tells no speed.
    pub fn came_whole(&mut self) {
        if let Some(record) = &mut self.record {
            record.streamed = false;
        }
    }

    /// A part of the answer came.
    pub fn arrived(&mut self, bytes: usize) {
        let Some(record) = &mut self.record else { return };
        if record.first.is_none() {
            let took = record.began.elapsed();
            record.first = Some(took);
            if let Some(start) = record.start.take() {
                record.gateway.metrics.first_token(&self.model, start, took);
            }
        }
        if let Some(ticket) = &record.ticket {
            ticket.sent(bytes);
        }
    }

    /// Parts of the answer leave for the client.
    pub fn relayed<'a>(&mut self, parts: impl IntoIterator<Item = &'a Bytes>) {
        let capture = self.record.as_mut().and_then(|record| record.capture.as_mut());
        if let Some(capture) = capture {
            parts.into_iter().for_each(|part| capture.response_data(part));
        }
    }

    pub fn counted(&mut self, figures: Option<Figures>) {
        if let (Some(record), Some(figures)) = (&mut self.record, figures) {
            record.figures = figures;
        }
    }

    /// The engine's answer is over.
    pub fn end(&mut self, outcome: &'static str) {
        if let Some(record) = self.record.take() {
            record.close(Some(&self.model), outcome);
        }
    }

    /// The request gets an error instead of an answer.
    pub fn refused(&mut self, reject: &Reject, outcome: &'static str) {
        if let Some(mut record) = self.record.take() {
            record.refused(reject);
            record.close(Some(&self.model), outcome);
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.end(CLIENT_GONE);
    }
}

#[derive(Debug)]
struct Record {
    gateway: Arc<Gateway>,
    method: Method,
    path: Cow<'static, str>,
    request_id: HeaderValue,
    entitled: bool,
    is_visit: bool,
    key: Option<String>,
    permit: Permit,
    requested: String,
    arrived: Time,
    began: Instant,
    ticket: Option<Ticket>,
    waited: Duration,
    /// Set while the first byte of the answer is awaited.
    start: Option<StartKind>,
    /// When it went to the engine.
    sent: Option<Instant>,
    /// From the arrival to the first byte of the answer.
    first: Option<Duration>,
    status: Option<StatusCode>,
    content_type: Cow<'static, str>,
    streamed: bool,
    figures: Figures,
    capture: Option<Draft>,
}

impl Record {
    fn id(&self) -> &str {
        self.request_id.to_str().unwrap_or_default()
    }

    fn refused(&mut self, reject: &Reject) {
        self.status = Some(reject.problem().status);
        self.content_type = "application/json".into();
        if let Some(capture) = &mut self.capture {
            capture.response_data(reject.body().to_string().as_bytes());
        }
    }

    fn close(mut self: Box<Record>, model: Option<&ModelName>, outcome: &'static str) {
        let took = self.began.elapsed();
        // The client that sees its end may ask again at once.
        self.ticket = None;
        self.permit = Permit::default();
        if let Some(model) = model.filter(|_| !self.is_visit) {
            let (request, seconds) = (self.id(), took.as_secs_f64());
            tracing::debug!(request, %model, outcome, seconds, "request ended");
            let tokens = Tokens {
                prompt: self.figures.prompt.unwrap_or(0),
                completion: self.figures.completion.unwrap_or(0),
            };
            self.gateway.metrics.request_ended(model, outcome, took, tokens);
        }
        if !self.entitled {
            return;
        }
        let capture = self.capture.take();
        let gateway = Arc::clone(&self.gateway);
        let row = self.row(model, outcome, took);
        let handle = &gateway.handle;
        match capture {
            None => handle.record_activity(row),
            Some(capture) => capture.keep(handle, |has_capture| {
                handle.record_activity(Activity { has_capture, ..row })
            }),
        };
    }

    fn row(
        mut self: Box<Record>,
        model: Option<&ModelName>,
        outcome: &'static str,
        took: Duration,
    ) -> Activity {
        let arrived = self.gateway.handle.wall(self.arrived);
        let arrived = arrived.duration_since(UNIX_EPOCH).unwrap_or_default();
        let sent = self.sent.map(|sent| sent.duration_since(self.began));
        let (prompt_speed, speed) = speeds(&self.figures, sent, self.first, took, self.streamed);
        Activity {
            id: 0,
            arrived_unix_ms: millis(arrived),
            model: model.cloned().unwrap_or_default(),
            method: method(&self.method),
            path: std::mem::take(&mut self.path),
            status: self.status.map_or(CLIENT_CLOSED, |status| status.as_u16()),
            content_type: std::mem::take(&mut self.content_type),
            request_id: self.id().to_owned(),
            outcome: outcome.into(),
            prompt_tokens: self.figures.prompt,
            cached_tokens: self.figures.cached,
            completion_tokens: self.figures.completion,
            queue_ms: millis(self.waited),
            first_token_ms: self.first.map(millis),
            duration_ms: millis(took),
            prompt_per_second: prompt_speed,
            tokens_per_second: speed,
            has_capture: false,
            requested: self.requested,
            key: self.key,
        }
    }
}

/// Nearly all are one of two, which take no memory.
fn method(method: &Method) -> Cow<'static, str> {
    match *method {
        Method::POST => "POST".into(),
        Method::GET => "GET".into(),
        _ => method.as_str().to_owned().into(),
    }
}

fn content_type(value: &[u8]) -> Cow<'static, str> {
    match value {
        b"application/json" => "application/json".into(),
        b"text/event-stream" => "text/event-stream".into(),
        other => std::str::from_utf8(other).unwrap_or_default().to_owned().into(),
    }
}

/// Tokens per second of prompt and generation: the engine's word, else from the times. All times
/// are from the arrival.
fn speeds(
    figures: &Figures,
    sent: Option<Duration>,
    first: Option<Duration>,
    took: Duration,
    streamed: bool,
) -> (Option<f64>, Option<f64>) {
    let per_second = |tokens: Option<u64>, from: Duration, to: Duration| {
        let seconds = to.checked_sub(from)?.as_secs_f64();
        let tokens = tokens.filter(|tokens| *tokens > 0)?;
        (seconds > 0.0).then(|| tokens as f64 / seconds)
    };
    let fresh = |prompt: u64| prompt.saturating_sub(figures.cached.unwrap_or(0));
    let (prompt, generated) = match (sent, first) {
        // The first token comes with the prompt; the others follow it.
        (Some(sent), Some(first)) if streamed => (
            per_second(figures.prompt.map(fresh), sent, first),
            per_second(figures.completion.map(|all| all.saturating_sub(1)), first, took),
        ),
        // Both in one: told of the larger part.
        (Some(sent), Some(_)) => (None, per_second(figures.completion, sent, took)),
        _ => (None, None),
    };
    (figures.prompt_per_second.or(prompt), figures.tokens_per_second.or(generated))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn speeds_come_from_the_engine_else_from_the_times() {
        let figures = Figures {
            prompt: Some(110),
            cached: Some(10),
            completion: Some(21),
            ..Figures::default()
        };
        let (sent, first, took) = (Some(at(1000)), Some(at(1500)), at(2500));
        assert_eq!(speeds(&figures, sent, first, took, true), (Some(200.0), Some(20.0)));
        assert_eq!(speeds(&figures, sent, first, took, false), (None, Some(14.0)));
        assert_eq!(speeds(&figures, None, None, took, true), (None, None));
        assert_eq!(speeds(&Figures::default(), sent, first, took, true), (None, None));
        let told = Figures { tokens_per_second: Some(7.5), ..figures };
        assert_eq!(speeds(&told, sent, first, took, true).1, Some(7.5));
    }
}
