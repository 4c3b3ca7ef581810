//! Sending the request to its instance, and judging why that failed.

use std::error::Error;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, header};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::answer;
use crate::orchestrator::Lease;
use crate::runtime::tls_trouble;
use crate::upstream::{Call, CallError, Incoming};

/// Named by RFC 9110 as belonging to one connection, and what old proxies add to them.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What an engine must not see: credentials for Wharf, and what hyper or Wharf sets anew.
/// Accept-Encoding, because a compressed answer could not be read in passing.
const NOT_FORWARDED: [HeaderName; 12] = [
    header::AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    header::COOKIE,
    header::HOST,
    header::CONTENT_LENGTH,
    header::EXPECT,
    header::ACCEPT_ENCODING,
    HeaderName::from_static("x-wharf-start"),
    HeaderName::from_static("x-wharf-max-wait"),
    HeaderName::from_static("x-wharf-priority"),
    HOPS,
];
/// Told to servers elsewhere, which may be Wharfs that lead back to this one.
const HOPS: HeaderName = HeaderName::from_static("x-wharf-hops");

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

const CONNECT_MAX: Duration = Duration::from_millis(200);

/// A request as every attempt sends it.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub method: Method,
    pub path_and_query: String,
    pub headers: HeaderMap,
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

pub async fn send(
    lease: &Lease,
    outgoing: &Outgoing,
    silence_max: Duration,
) -> Result<Response<Incoming>, Failure> {
    let gate = lease.gate();
    let mut more = Vec::new();
    if gate.endpoint.circuit.is_some() {
        more.push((HOPS, HeaderValue::from(outgoing.hops + 1)));
    }
    if let Some(key) = &gate.endpoint.api_key {
        more.push((header::AUTHORIZATION, key.bearer()));
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
        answer = timeout(silence_max, gate.client.request(call)) => match answer {
            Ok(Ok(response)) => {
                if let Some(circuit) = &gate.endpoint.circuit {
                    circuit.answered();
                }
                Ok(response)
            }
            // The engine is stopped by cancelling first: its closing connections are no accident.
            Ok(Err(_)) if lease.cut().is_cancelled() => Err(Failure::Cancelled),
            Ok(Err(error)) => {
                let failure = judge(&error, authority(&gate.endpoint.base).0);
                if let (Some(circuit), Failure::Lost(why)) = (&gate.endpoint.circuit, &failure) {
                    circuit.failed(why);
                }
                Err(failure)
            }
            Err(_) => Err(Failure::Silent(silence_max)),
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
        CallError::Invalid(_) => false,
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
pub fn request_headers(mut headers: HeaderMap, request_id: &HeaderValue) -> HeaderMap {
    strip(&mut headers, |name| NOT_FORWARDED.contains(name));
    headers.insert(REQUEST_ID, request_id.clone());
    headers
}

/// As [`request_headers`], of a request that is passed on as it came. Its `Origin` was judged here
/// and means nothing at the engine, whose host is another one.
pub fn passed_headers(headers: HeaderMap, request_id: &HeaderValue) -> HeaderMap {
    let mut headers = request_headers(headers, request_id);
    headers.remove(header::ORIGIN);
    for name in ["sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user"] {
        headers.remove(name);
    }
    headers
}

/// Headers of the answer as the client gets them. Whom browsers may tell is ours to say.
pub fn response_headers(headers: &mut HeaderMap) {
    // The model: another Wharf's word for it; ours follows.
    strip(headers, |name| *name == answer::MODEL || name.as_str().starts_with("access-control-"));
}

/// Takes out what belongs to the connection, and what is `unwanted`.
fn strip(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    let named = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok());
    // Few of them are there: one look at each header is less than a search for each name.
    let there = headers.keys().filter(|name| HOP_BY_HOP.contains(name) || unwanted(name)).cloned();
    let gone: Vec<HeaderName> = named.chain(there).collect();
    for name in gone {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_the_connection_or_to_wharf_stays_here() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
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
            ("x-wharf-start", "never"),
            ("x-wharf-hops", "1"),
            ("content-type", "application/json"),
            ("traceparent", "00-1-2-01"),
        ] {
            headers.append(name, value.parse().unwrap());
        }
        let headers = request_headers(headers, &HeaderValue::from_static("id-1"));
        let mut names: Vec<&str> = headers.keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "traceparent", "x-request-id"]);
    }
    #[test]
    fn the_name_that_a_peer_has_for_its_model_is_not_told() {
        let mut headers = HeaderMap::new();
        headers.insert("x-wharf-model", HeaderValue::from_static("ada"));
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        response_headers(&mut headers);
        assert_eq!(headers.keys().map(|name| name.as_str()).collect::<Vec<_>>(), ["content-type"]);
    }
}
