//! One HTTP request to an engine, on a connection of its own.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::runtime::redact::Secrets;
use crate::runtime::{Endpoint, Tls, tls_trouble};

/// Answers to the questions asked here are small.
const BODY_BYTES_MAX: usize = 1024 * 1024;
const EXCERPT_CHARS_MAX: usize = 160;

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// The status, and the beginning of the body on one line.
    pub fn excerpt(&self) -> String {
        let body = String::from_utf8_lossy(&self.body);
        let words = body.split_whitespace().collect::<Vec<_>>().join(" ");
        let words = Secrets::default().redact(&words);
        let body: String = words.chars().take(EXCERPT_CHARS_MAX).collect();
        match body.as_str() {
            "" => self.status.to_string(),
            body => format!("{}: {body}", self.status),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("{0}")]
    BadUrl(String),
    /// As bad as a bad URL: it will not get better by asking again.
    #[error("{0}")]
    Tls(String),
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    #[error("the connection failed: {0}")]
    Broken(String),
    #[error("no answer within {}", humantime::format_duration(*.0))]
    TooSlow(Duration),
}

pub async fn get(endpoint: &Endpoint, path: &str, limit: Duration) -> Result<Answer, HttpError> {
    within(limit, exchange(endpoint, Method::GET, path, None)).await
}

pub async fn post(
    endpoint: &Endpoint,
    path: &str,
    body: Option<&Value>,
    limit: Duration,
) -> Result<Answer, HttpError> {
    within(limit, exchange(endpoint, Method::POST, path, body)).await
}

/// An answer that comes line by line and may take its time; `stall`: the longest without a byte.
/// Lines longer than what any answer here may have are cut.
pub async fn post_lines(
    endpoint: &Endpoint,
    path: &str,
    body: &Value,
    stall: Duration,
    mut on_line: impl FnMut(&str),
) -> Result<StatusCode, HttpError> {
    let address = Address::of(endpoint)?;
    let request = request(endpoint, &address, Method::POST, path, Some(body))?;
    match &endpoint.tls {
        None => {
            let stream = within(stall, address.connected()).await?;
            lines(stream, request, stall, &mut on_line).await
        }
        Some(tls) => {
            let stream = within(stall, address.secured(tls)).await?;
            lines(stream, request, stall, &mut on_line).await
        }
    }
}

/// The bare connection; over https its handshake is tried as well, on one of its own.
pub async fn connect(endpoint: &Endpoint, limit: Duration) -> Result<TcpStream, HttpError> {
    within(limit, async {
        let address = Address::of(endpoint)?;
        if let Some(tls) = &endpoint.tls {
            address.secured(tls).await?;
        }
        address.connected().await
    })
    .await
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, HttpError>>,
) -> Result<T, HttpError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(HttpError::TooSlow(limit)))
}

/// An endpoint's URL, taken apart.
struct Address {
    authority: String,
    /// Without brackets.
    host: String,
    port: u16,
    /// What precedes every path; no slash at its end.
    prefix: String,
}

impl Address {
    fn of(endpoint: &Endpoint) -> Result<Address, HttpError> {
        let bad =
            || HttpError::BadUrl(format!("{} is no URL such as http://host:8000", endpoint.base));
        let uri: Uri = endpoint.base.parse().map_err(|_| bad())?;
        let port = match (uri.scheme_str(), &endpoint.tls) {
            (Some("http"), None) => 80,
            (Some("https"), Some(_)) => 443,
            _ => return Err(bad()),
        };
        let authority = uri.authority().ok_or_else(bad)?;
        Ok(Address {
            authority: authority.to_string(),
            host: authority.host().trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: authority.port_u16().unwrap_or(port),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }

    async fn connected(&self) -> Result<TcpStream, HttpError> {
        TcpStream::connect((self.host.as_str(), self.port)).await.map_err(HttpError::Connect)
    }

    async fn secured(&self, tls: &Tls) -> Result<TlsStream<TcpStream>, HttpError> {
        let name = ServerName::try_from(self.host.clone())
            .map_err(|_| HttpError::BadUrl(format!("{} is no server's name", self.host)))?;
        let stream = self.connected().await?;
        TlsConnector::from(tls.config()).connect(name, stream).await.map_err(|error| {
            match tls_trouble(&error, &self.authority) {
                Some(why) => HttpError::Tls(why),
                None => HttpError::Broken(error.to_string()),
            }
        })
    }
}

async fn exchange(
    endpoint: &Endpoint,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Answer, HttpError> {
    let address = Address::of(endpoint)?;
    let request = request(endpoint, &address, method, path, body)?;
    match &endpoint.tls {
        None => answer(address.connected().await?, request).await,
        Some(tls) => answer(address.secured(tls).await?, request).await,
    }
}

fn request(
    endpoint: &Endpoint,
    address: &Address,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Request<Full<Bytes>>, HttpError> {
    let mut request = Request::builder()
        .method(method)
        .uri(format!("{}{path}", address.prefix))
        .header(header::HOST, &address.authority)
        .header(header::CONNECTION, "close");
    if let Some(key) = &endpoint.api_key {
        request = request.header(header::AUTHORIZATION, key.bearer());
    }
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let body = body.map(Value::to_string).unwrap_or_default();
    request
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| HttpError::BadUrl(format!("path {path}: {error}")))
}

async fn lines(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Full<Bytes>>,
    stall: Duration,
    on_line: &mut impl FnMut(&str),
) -> Result<StatusCode, HttpError> {
    let broken = |error: &dyn std::fmt::Display| HttpError::Broken(error.to_string());
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    let read = async {
        let sent = within(stall, async {
            sender.send_request(request).await.map_err(|error| broken(&error))
        });
        let response = sent.await?;
        let status = response.status();
        let mut body = response.into_body();
        let mut line = Vec::new();
        while let Some(frame) = within(stall, async { Ok(body.frame().await) }).await? {
            let frame = frame.map_err(|error| broken(&error))?;
            for &byte in frame.data_ref().into_iter().flatten() {
                if byte == b'\n' {
                    on_line(&String::from_utf8_lossy(&line));
                    line.clear();
                } else if line.len() < BODY_BYTES_MAX {
                    line.push(byte);
                }
            }
        }
        on_line(&String::from_utf8_lossy(&line));
        Ok(status)
    };
    let mut read = std::pin::pin!(read);
    tokio::select! {
        read = &mut read => return read,
        _ = connection => {}
    }
    read.await
}

async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Full<Bytes>>,
) -> Result<Answer, HttpError> {
    let broken = |error: &dyn std::fmt::Display| HttpError::Broken(error.to_string());
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| broken(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|error| broken(&error))?.to_bytes();
        Ok(Answer { status, body })
    };
    // Driven here and not in a task, so that dropping this future closes the connection.
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        answer = &mut answer => return answer,
        // The connection may be done before its last bytes are read.
        _ = connection => {}
    }
    answer.await
}
