//! One HTTP request to an engine, on a connection of its own.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::runtime::Endpoint;

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

pub async fn connect(endpoint: &Endpoint, limit: Duration) -> Result<TcpStream, HttpError> {
    within(limit, async {
        let (_, host, port) = address(endpoint)?;
        TcpStream::connect((host.as_str(), port)).await.map_err(HttpError::Connect)
    })
    .await
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, HttpError>>,
) -> Result<T, HttpError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(HttpError::TooSlow(limit)))
}

/// Authority, host without brackets, port.
fn address(endpoint: &Endpoint) -> Result<(String, String, u16), HttpError> {
    let bad = || HttpError::BadUrl(format!("{} is no URL such as http://host:8000", endpoint.base));
    let uri: Uri = endpoint.base.parse().map_err(|_| bad())?;
    if uri.scheme_str() == Some("https") {
        let message = format!("{}: engines are reached by http only, not yet https", endpoint.base);
        return Err(HttpError::BadUrl(message));
    }
    let authority = uri.authority().ok_or_else(bad)?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    Ok((authority.to_string(), host.to_owned(), authority.port_u16().unwrap_or(80)))
}

async fn exchange(
    endpoint: &Endpoint,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<Answer, HttpError> {
    let (authority, host, port) = address(endpoint)?;
    let broken = |error: &dyn std::fmt::Display| HttpError::Broken(error.to_string());
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, authority)
        .header(header::CONNECTION, "close");
    if let Some(key) = &endpoint.api_key {
        request = request.header(header::AUTHORIZATION, key.bearer());
    }
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = request
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| HttpError::BadUrl(format!("path {path}: {error}")))?;

    let stream = TcpStream::connect((host.as_str(), port)).await.map_err(HttpError::Connect)?;
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
