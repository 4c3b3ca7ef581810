//! Sending the request to its instance, and judging why that failed.

use std::borrow::Cow;
use std::error::Error;
use std::io;
use std::sync::LazyLock;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, header};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::http1::{Fields, Lines, Names, begins_with};
use crate::orchestrator::Lease;
use crate::runtime::tls_trouble;
use crate::upstream::{Answer, Call, CallError};

/// Named by RFC 9110 as belonging to one connection, and what old proxies add to them.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// What an engine must not see: what belongs to the client's connection, credentials for Wharf, and
/// what is set anew. Accept-Encoding, because a compressed answer could not be read in passing.
static KEPT_HERE: LazyLock<Names> =
    LazyLock::new(|| Names::new(&[&HOP_BY_HOP[..], &OF_WHARF].concat()));

/// Of a request that is passed on as it came. Its `Origin` was judged here and means nothing at the
/// engine, whose host is another one.
static NOT_PASSED: LazyLock<Names> =
    LazyLock::new(|| Names::new(&[&HOP_BY_HOP[..], &OF_WHARF, &["origin"]].concat()));

const OF_WHARF: [&str; 13] = [
    "authorization",
    "x-api-key",
    "api-key",
    "cookie",
    "host",
    "content-length",
    "expect",
    "accept-encoding",
    "x-request-id",
    "x-wharf-start",
    "x-wharf-max-wait",
    "x-wharf-priority",
    "x-wharf-hops",
];

/// What a client does not see: what belongs to the engine's connection, and what is set anew. The
/// model: another Wharf's word for it.
static ANSWERED_HERE: LazyLock<Names> = LazyLock::new(|| {
    let ours = ["content-length", "date", "x-request-id", "x-wharf-model", "x-accel-buffering"];
    Names::new(&[&HOP_BY_HOP[..], &ours].concat())
});

/// Told to servers elsewhere, which may be Wharfs that lead back to this one.
const HOPS: &str = "x-wharf-hops";

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Of the names in `Connection`; nobody has so many headers for it.
const LISTED_MAX: usize = 64;
/// What is no name of a header.
static USUALLY_LISTED: LazyLock<Names> = LazyLock::new(|| Names::new(&["keep-alive", "close"]));

/// Room for the headers of most clients.
const LINES_BYTES: usize = 512;

const CONNECT_MAX: Duration = Duration::from_millis(200);

/// A request as every attempt sends it.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub method: Method,
    pub path_and_query: Cow<'static, str>,
    pub headers: Lines,
    pub body: Bytes,
    /// How many Wharfs it came through.
    pub hops: u32,
}

/// Why no response head arrived.
#[derive(Debug)]
pub enum Failure {
    /// The owner ended the lease: the instance is stopping or dead.
    Cancelled,
    /// Refused, reset or closed before any answer: a pooled connection that the engine had closed,
    /// or an engine that died. Safe to try once more.
    Lost(String),
    Silent(Duration),
    /// Not HTTP, a URL that cannot be reached by design, …: another attempt would fail alike.
    Broken(String),
}

/// `sent`: now.
pub async fn send(
    lease: &Lease,
    outgoing: &Outgoing,
    sent: Instant,
    silence_max: Duration,
) -> Result<Answer, Failure> {
    let gate = lease.gate();
    let mut more = Lines::default();
    if gate.endpoint.circuit.is_some() {
        let hops = outgoing.hops.saturating_add(1);
        more.push_raw(HOPS, itoa::Buffer::new().format(hops).as_bytes());
    }
    if let Some(key) = &gate.endpoint.api_key {
        more.push(&header::AUTHORIZATION, &key.bearer());
    }
    let call = Call {
        method: &outgoing.method,
        path_and_query: &outgoing.path_and_query,
        headers: &outgoing.headers,
        more: &more,
        body: &outgoing.body,
    };
    tokio::select! {
        biased;
        answer = gate.client.request(call, sent + silence_max) => match answer {
            Ok(response) => {
                if let Some(circuit) = &gate.endpoint.circuit {
                    circuit.answered();
                }
                Ok(response)
            }
            Err(CallError::Silent) => Err(Failure::Silent(silence_max)),
            // The engine is stopped by cancelling first: its closing connections are no accident.
            Err(_) if lease.cut().is_cancelled() => Err(Failure::Cancelled),
            Err(error) => {
                let failure = judge(&error, authority(&gate.endpoint.base).0);
                if let (Some(circuit), Failure::Lost(why)) = (&gate.endpoint.circuit, &failure) {
                    circuit.failed(why);
                }
                Err(failure)
            }
        },
        () = lease.cut().cancelled() => Err(Failure::Cancelled),
    }
}

fn judge(error: &CallError, authority: &str) -> Failure {
    if let Some(why) = tls_trouble(error, authority) {
        return Failure::Broken(why);
    }
    let text = describe(error);
    let is_lost = match error {
        // Without one the connector does not know what to do with such a URL.
        CallError::Connect(_) => find_io(error).is_some(),
        CallError::ConnectTimeout(_) | CallError::Closed => true,
        CallError::Broken(error) => matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::NotConnected
                | io::ErrorKind::UnexpectedEof
        ),
        CallError::Silent | CallError::Invalid(_) => false,
    };
    if is_lost { Failure::Lost(text) } else { Failure::Broken(text) }
}

fn find_io(error: &(dyn Error + 'static)) -> Option<io::ErrorKind> {
    find::<io::Error>(error).map(io::Error::kind)
}

fn find<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// Host and port of a URL, and the port where it names none.
fn authority(base: &str) -> (&str, u16) {
    let (scheme, rest) = base.split_once("://").unwrap_or(("http", base));
    let authority = rest.split('/').next().unwrap_or(rest);
    (authority, if scheme == "https" { 443 } else { 80 })
}

/// Whether anything still listens at an endpoint.
pub async fn accepts(base: &str) -> bool {
    let (authority, usual_port) = authority(base);
    let address = match authority.rsplit_once(':') {
        Some((_, port)) if port.parse::<u16>().is_ok() => authority.to_owned(),
        _ => format!("{authority}:{usual_port}"),
    };
    matches!(timeout(CONNECT_MAX, TcpStream::connect(address)).await, Ok(Ok(_)))
}

/// The error and its causes in one line.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// Headers of the request as the engine gets them.
pub fn request_lines(headers: &Fields, request_id: &HeaderValue) -> Lines {
    let mut lines = lines(headers, &KEPT_HERE, &[]);
    lines.push(&REQUEST_ID, request_id);
    lines
}

/// As [`request_lines`], of a request that is passed on as it came.
pub fn passed_lines(headers: &Fields, request_id: &HeaderValue) -> Lines {
    let mut lines = lines(headers, &NOT_PASSED, &["sec-fetch-"]);
    lines.push(&REQUEST_ID, request_id);
    lines
}

/// Headers of the answer as the client gets them. Whom browsers may tell is ours to say.
pub fn answer_lines(headers: &Fields) -> Lines {
    lines(headers, &ANSWERED_HERE, &["access-control-"])
}

/// Without what is `unwanted`, begins with one of `prefixes`, or is named by `Connection`.
fn lines(headers: &Fields, unwanted: &Names, prefixes: &[&str]) -> Lines {
    let mut lines = Lines::with_capacity(LINES_BYTES);
    let listed = headers.list("connection").take(LISTED_MAX);
    let listed: Vec<&[u8]> = listed.filter(|name| !USUALLY_LISTED.contains(name)).collect();
    for (name, value) in headers.iter() {
        let gone = unwanted.contains(name)
            || prefixes.iter().any(|prefix| begins_with(name, prefix))
            || listed.iter().any(|listed| name.eq_ignore_ascii_case(listed));
        if !gone {
            lines.push_raw(name, value);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(headers: &[(&'static str, &'static str)]) -> Fields {
        let mut map = http::HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        Fields::from(&map)
    }

    fn sorted(lines: &Lines) -> Vec<String> {
        let text = String::from_utf8(lines.as_bytes().to_vec()).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    }

    #[test]
    fn what_belongs_to_the_connection_or_to_wharf_stays_here() {
        let headers = fields(&[
            ("connection", "keep-alive, X-Hop"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("authorization", "Bearer k"),
            ("x-api-key", "k"),
            ("cookie", "a=b"),
            ("host", "wharf"),
            ("content-length", "5"),
            ("x-request-id", "another"),
            ("x-wharf-start", "never"),
            ("x-wharf-hops", "1"),
            ("content-type", "application/json"),
            ("origin", "http://a"),
            ("originator", "b"),
            ("sec-fetch-mode", "cors"),
            ("traceparent", "00-1-2-01"),
        ]);
        let id = HeaderValue::from_static("id-1");
        let kept = [
            "content-type: application/json",
            "originator: b",
            "traceparent: 00-1-2-01",
            "x-request-id: id-1",
        ];
        assert_eq!(sorted(&passed_lines(&headers, &id)), kept);
        let web = ["origin: http://a", "sec-fetch-mode: cors"];
        let mut all = [&kept[..], &web].concat();
        all.sort_unstable();
        assert_eq!(sorted(&request_lines(&headers, &id)), all);
    }

    #[test]
    fn the_name_that_a_peer_has_for_its_model_is_not_told() {
        let headers = fields(&[
            ("x-wharf-model", "ada"),
            ("access-control-allow-origin", "*"),
            ("content-type", "application/json"),
        ]);
        assert_eq!(sorted(&answer_lines(&headers)), ["content-type: application/json"]);
    }
}
