//! The head of an engine's answer, on its way to the client.

use std::collections::VecDeque;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};

use super::account::Account;
use super::forward;
use super::relay::{Relay, Source};
use super::timing::Timing;
use super::usage::Meter;
use crate::http1::{Fields, Headers as _, Lines, names};
use crate::orchestrator::Lease;
use crate::upstream::Incoming;

/// What the client is told.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    /// But for how the body is framed, the date, and whether the connection stays.
    pub headers: Lines,
    pub body: Body,
    /// As the head says; of an answer to `HEAD` there is nothing else to know it by.
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
}

impl Answer {
    pub fn is_event_stream(&self) -> bool {
        is(&self.head.headers, "content-type", "text/event-stream")
    }

    /// As a whole response: the usual way.
    pub fn into_reply(mut self) -> Reply {
        let events = self.is_event_stream();
        let (mut meter, plain_events) = self.begin();
        let mut headers = forward::answer_lines(&self.head.headers);
        if events && self.head.headers.first("x-accel-buffering").is_none() {
            // Proxies before us must not collect any.
            headers.push_raw("x-accel-buffering", b"no");
        }
        headers.extend(named(self.account.model().as_str()));
        headers.push_raw(Timing::HEADER, self.timing.text().as_bytes());
        // An event may be taken out, and where a coding tells the end the length is a mistake.
        let chunked = self.head.headers.first("transfer-encoding").is_some();
        let length = self.head.headers.first("content-length").filter(|_| !events && !chunked);
        let length = length.and_then(|length| HeaderValue::from_bytes(length).ok());
        let status = self.head.status;
        let body = match self.body.whole().cloned() {
            Some(all) => self.whole(all, &mut meter),
            None => Body::new(self.relay(meter, plain_events, None)),
        };
        Reply { status, headers, body, length, close: false }
    }

    pub fn into_relay(mut self, epilogue: Option<Bytes>) -> Relay {
        let (meter, events) = self.begin();
        self.relay(meter, events, epilogue)
    }

    /// The head goes on; how its body is read in passing, and whether an error can be told in it.
    fn begin(&mut self) -> (Meter, bool) {
        let plain = self.head.headers.first("content-encoding").is_none();
        let events = plain && self.is_event_stream();
        self.account.answered(self.head.status, &self.head.headers, self.is_event_stream());
        let meter = match (plain, events) {
            (false, _) => Meter::Blind,
            (true, true) => Meter::events(self.remove_usage),
            (true, false) => Meter::json(),
        };
        (meter, events)
    }

    /// The engine said everything already: the lease ends here, and nobody has to watch.
    fn whole(mut self, all: Bytes, meter: &mut Meter) -> Body {
        drop(self.lease);
        self.account.came_whole();
        let mut parts = VecDeque::new();
        if !all.is_empty() {
            self.account.arrived(all.len());
            meter.feed(all, &mut parts);
        }
        meter.finish(&mut parts);
        self.account.counted(meter.figures());
        self.account.relayed(&parts);
        self.account.end(outcome(self.head.status));
        match parts.len() {
            0 | 1 => Body::from(parts.pop_front().unwrap_or_default()),
            _ => Body::from(parts.iter().flatten().copied().collect::<Bytes>()),
        }
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

fn is(headers: &Fields, name: &str, start: &str) -> bool {
    let start_of = |value: &str| value.get(..start.len()).map(|s| s.eq_ignore_ascii_case(start));
    headers.text(name).and_then(start_of).unwrap_or(false)
}
