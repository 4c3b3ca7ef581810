//! The head of an engine's answer, on its way to the client.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};

use super::account::Account;
use super::forward;
use super::reject::Reject;
use super::relay::{Relay, Source};
use super::timing::Timing;
use super::usage::Meter;
use crate::http1::{Fields, Headers as _, Lines, begins_with, names};
use crate::orchestrator::Lease;
use crate::upstream::Incoming;

/// What the client is told.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    /// But for how the body is framed, the date, and whether the connection stays.
    pub headers: Lines,
    pub body: Body,
    /// As the head says, where no body follows: of an answer to `HEAD` nothing else tells it.
    length: Option<HeaderValue>,
    /// The connection ends with it.
    pub close: bool,
}

impl From<Response> for Reply {
    fn from(response: Response) -> Reply {
        let (head, body) = response.into_parts();
        let mut headers = Lines::default();
        let framing = [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION];
        for (name, value) in head.headers.iter().filter(|(name, _)| !framing.contains(name)) {
            headers.push(name, value);
        }
        let length = head.headers.get(header::CONTENT_LENGTH).cloned();
        let close = names(&head.headers, &header::CONNECTION, "close");
        Reply { status: head.status, headers, body, length, close }
    }
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        let mut response = Response::new(self.body);
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        for (name, value) in self.headers.iter() {
            headers.append(name, value);
        }
        headers.extend(self.length.map(|length| (header::CONTENT_LENGTH, length)));
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// The head of an upstream answer, its body still to come.
pub struct Answer {
    pub head: Head,
    pub body: Incoming,
    pub lease: Lease,
    pub timing: Timing,
    pub account: Account,
    pub remove_usage: bool,
    pub first_within: Option<Duration>,
    pub limits: super::Limits,
}

#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    pub headers: Fields,
    pub is_event_stream: bool,
}

impl Head {
    pub fn new(status: StatusCode, headers: Fields) -> Head {
        let begins = |kind: &[u8]| begins_with(kind, "text/event-stream");
        let is_event_stream = headers.first("content-type").is_some_and(begins);
        Head { status, headers, is_event_stream }
    }
}

impl Answer {
    /// As a whole response: the usual way.
    pub fn into_reply(mut self) -> Reply {
        let (meter, plain_events) = self.begin();
        let Head { status, is_event_stream, .. } = self.head;
        let mut headers = forward::answer_lines(&self.head.headers);
        if is_event_stream {
            // Proxies before us must not collect any.
            headers.push_raw("x-accel-buffering", b"no");
        }
        headers.push_fit(&MODEL, self.account.model().as_str().as_bytes());
        headers.push_with(Timing::HEADER, |line| self.timing.write(line));
        let whole = self.body.take_whole();
        let is_bodiless = whole.as_ref().is_some_and(Bytes::is_empty)
            && self.head.headers.first("transfer-encoding").is_none();
        let length = self.head.headers.first("content-length").filter(|_| is_bodiless);
        let length = length.and_then(|length| HeaderValue::from_bytes(length).ok());
        let body = match whole {
            Some(all) => self.whole(all, meter),
            None => Body::new(self.relay(meter, plain_events, None)),
        };
        Reply { status, headers, body, length, close: false }
    }

    /// What is told of an engine that speaks another protocol, though nobody asked it to.
    pub fn switched_unasked(mut self) -> Reject {
        let model = self.account.model();
        let message = format!("the engine of model \"{model}\" switched protocols unasked");
        let reject = Reject::new(StatusCode::BAD_GATEWAY, "upstream_error", message).model(model);
        self.account.refused(&reject, "upstream_error");
        reject
    }

    pub fn into_relay(mut self, epilogue: Option<Bytes>) -> Relay {
        let (meter, events) = self.begin();
        self.relay(meter, events, epilogue)
    }

    /// The head goes on; how its body is read in passing, and whether an error can be told in it.
    fn begin(&mut self) -> (Meter, bool) {
        let plain = self.head.headers.first("content-encoding").is_none();
        let events = plain && self.head.is_event_stream;
        self.account.answered(&self.head);
        let meter = match (plain, events) {
            (false, _) => Meter::Blind,
            (true, true) => Meter::events(self.remove_usage),
            (true, false) => Meter::json(),
        };
        (meter, events)
    }

    /// The engine said everything already: the lease ends here, and nobody has to watch.
    fn whole(mut self, all: Bytes, meter: Meter) -> Body {
        drop(self.lease);
        self.account.came_whole();
        if !all.is_empty() {
            self.account.arrived(all.len());
        }
        let (all, figures) = meter.whole(all);
        self.account.counted(figures);
        self.account.relayed([&all]);
        self.account.end(outcome(self.head.status));
        Body::from(all)
    }

    fn relay(self, meter: Meter, events: bool, epilogue: Option<Bytes>) -> Relay {
        let source = Source {
            status: self.head.status,
            body: self.body,
            lease: self.lease,
            account: self.account,
            meter,
            events,
            epilogue,
            first_within: self.first_within,
        };
        Relay::new(source, &self.limits)
    }
}

/// Of an answer that came to its end.
pub fn outcome(status: StatusCode) -> &'static str {
    if status.is_server_error() { "upstream_error" } else { "ok" }
}

/// `X-Wharf-Model`, where the name can be a header value.
pub fn named(model: &str) -> Option<(http::HeaderName, HeaderValue)> {
    HeaderValue::from_bytes(model.as_bytes()).ok().map(|value| (MODEL, value))
}

pub const MODEL: http::HeaderName = http::HeaderName::from_static("x-wharf-model");
