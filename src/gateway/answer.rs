//! The head of an engine's answer, on its way to the client.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, header, response};
use hyper::body::Incoming;

use super::account::Account;
use super::forward;
use super::relay::{Relay, Source};
use super::timing::Timing;
use super::usage::Meter;
use crate::orchestrator::Lease;

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
    pub fn into_response(self) -> Response {
        let mut headers = self.head.headers.clone();
        forward::response_headers(&mut headers);
        if self.is_event_stream() {
            // An event may be taken out, and proxies before us must not collect any.
            headers.remove(header::CONTENT_LENGTH);
            headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        }
        headers.extend(named(self.account.model().as_str()));
        headers.extend(self.timing.header().map(|value| (Timing::HEADER, value)));
        let status = self.head.status;
        let mut response = Response::new(Body::new(self.into_relay(None)));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    pub fn into_relay(mut self, epilogue: Option<bytes::Bytes>) -> Relay {
        let plain = !self.head.headers.contains_key(header::CONTENT_ENCODING);
        let events = plain && self.is_event_stream();
        self.account.answered(self.head.status, &self.head.headers, self.is_event_stream());
        let meter = match (plain, events) {
            (false, _) => Meter::Blind,
            (true, true) => Meter::events(self.remove_usage),
            (true, false) => Meter::json(),
        };
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

/// `X-Wharf-Model`, where the name can be a header value.
pub fn named(model: &str) -> Option<(http::HeaderName, HeaderValue)> {
    let value = HeaderValue::from_bytes(model.as_bytes()).ok()?;
    Some((http::HeaderName::from_static("x-wharf-model"), value))
}

fn is(headers: &HeaderMap, name: http::HeaderName, start: &str) -> bool {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok()?.get(..start.len()))
        .is_some_and(|value| value.eq_ignore_ascii_case(start))
}
