//! The head of an engine's answer, on its way to the client.

use std::collections::VecDeque;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header, response};

use super::account::Account;
use super::forward;
use super::relay::{Relay, Source};
use super::timing::Timing;
use super::usage::Meter;
use crate::orchestrator::Lease;
use crate::upstream::Incoming;

/// The head of an upstream answer, its body still to come.
pub struct Answer {
    pub head: response::Parts,
    pub body: Incoming,
    pub lease: Lease,
    pub timing: Timing,
    pub account: Account,
    pub remove_usage: bool,
    pub first_within: Option<Duration>,
    pub limits: super::Limits,
}

impl Answer {
    pub fn is_event_stream(&self) -> bool {
        is(&self.head.headers, header::CONTENT_TYPE, "text/event-stream")
    }

    /// As a whole response: the usual way.
    pub fn into_response(mut self) -> Response {
        let events = self.is_event_stream();
        let (mut meter, plain_events) = self.begin();
        let mut headers = std::mem::take(&mut self.head.headers);
        forward::response_headers(&mut headers);
        if events {
            // An event may be taken out, and proxies before us must not collect any.
            headers.remove(header::CONTENT_LENGTH);
            headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        }
        headers.extend(named(self.account.model().as_str()));
        headers.extend(self.timing.header().map(|value| (Timing::HEADER, value)));
        let status = self.head.status;
        let body = match self.body.whole().cloned() {
            Some(all) => self.whole(all, &mut meter),
            None => Body::new(self.relay(meter, plain_events, None)),
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    pub fn into_relay(mut self, epilogue: Option<Bytes>) -> Relay {
        let (meter, events) = self.begin();
        self.relay(meter, events, epilogue)
    }

    /// The head goes on; how its body is read in passing, and whether an error can be told in it.
    fn begin(&mut self) -> (Meter, bool) {
        let plain = !self.head.headers.contains_key(header::CONTENT_ENCODING);
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

fn is(headers: &HeaderMap, name: http::HeaderName, start: &str) -> bool {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok()?.get(..start.len()))
        .is_some_and(|value| value.eq_ignore_ascii_case(start))
}
