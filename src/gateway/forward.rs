//! Sending the request to its instance, and judging why that failed.

use std::error::Error;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::orchestrator::Lease;
use crate::runtime::tls_trouble;

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
    let mut request = Request::new(Full::new(outgoing.body.clone()));
    let uri = format!("{}{}", gate.endpoint.base, outgoing.path_and_query);
    *request.uri_mut() =
        uri.parse().map_err(|error| Failure::Broken(format!("URL {uri}: {error}")))?;
    *request.method_mut() = outgoing.method.clone();
    *request.headers_mut() = outgoing.headers.clone();
    if gate.endpoint.circuit.is_some() {
        request.headers_mut().insert(HOPS, HeaderValue::from(outgoing.hops + 1));
    }
    if let Some(key) = &gate.endpoint.api_key {
        request.headers_mut().insert(header::AUTHORIZATION, key.bearer());
    }
    tokio::select! {
        answer = timeout(silence_max, gate.client.request(request)) => match answer {
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

fn judge(error: &hyper_util::client::legacy::Error, authority: &str) -> Failure {
    if let Some(why) = tls_trouble(error, authority) {
        return Failure::Broken(why);
    }
    let text = describe(error);
    if error.is_connect() {
        // "Connect" is also hyper's word for a URL that its connector does not support.
        return match find_io(error) {
            Some(_) => Failure::Lost(text),
            None => Failure::Broken(text),
        };
    }
    let closed = find::<hyper::Error>(error).is_some_and(|error| {
        error.is_incomplete_message() || error.is_canceled() || error.is_closed()
    });
    let reset = find_io(error).is_some_and(|kind| {
        matches!(
            kind,
            io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::NotConnected
                | io::ErrorKind::UnexpectedEof
        )
    });
    if closed || reset { Failure::Lost(text) } else { Failure::Broken(text) }
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
    strip_hop_by_hop(&mut headers);
    for name in &NOT_FORWARDED {
        headers.remove(name);
    }
    headers.insert("x-request-id", request_id.clone());
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
    strip_hop_by_hop(headers);
    // Another Wharf's word for its model: ours follows.
    headers.remove("x-wharf-model");
    let cors: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("access-control-"))
        .cloned()
        .collect();
    for name in cors {
        headers.remove(name);
    }
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
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
