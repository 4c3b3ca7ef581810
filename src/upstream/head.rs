//! The head of a request as bytes, and of an answer from them (RFC 9112).

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode};

use super::Call;
use super::connection::Connector;
use crate::http1::{Fields, JOIN_BYTES_MAX, push_line};

/// Of an answer. Engines send a few hundred bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 128;
/// Interim answers (100, 103) before the real one.
const INTERIM_MAX: usize = 16;
/// Room for what every request says beside its own words.
const FIXED_BYTES: usize = 96;

pub fn written(connector: &Connector, call: &Call<'_>) -> Result<Vec<u8>, String> {
    let target = connector.target()?;
    let path = call.path_and_query;
    // Whoever built it took care; a space or a line end would make another request of it.
    if !path.starts_with('/') || !path.bytes().all(|byte| matches!(byte, b'!'..=b'~' | 0x80..)) {
        return Err(format!("the path {path:?} cannot be sent"));
    }
    let joined = if call.body.len() <= JOIN_BYTES_MAX { call.body.len() } else { 0 };
    let words = target.path.len() + path.len() + target.authority.len() + FIXED_BYTES;
    let headers_bytes = call.headers.as_bytes().len() + call.more.as_bytes().len();
    let mut out = Vec::with_capacity(words + headers_bytes + joined);
    let method = call.method.as_str().as_bytes();
    for part in [method, b" ", target.path.as_bytes(), path.as_bytes(), b" HTTP/1.1\r\n"] {
        out.extend_from_slice(part);
    }
    push_line(&mut out, b"host", target.authority.as_bytes());
    out.extend_from_slice(call.headers.as_bytes());
    out.extend_from_slice(call.more.as_bytes());
    if !call.body.is_empty() || !matches!(*call.method, Method::GET | Method::HEAD) {
        let mut digits = itoa::Buffer::new();
        push_line(&mut out, b"content-length", digits.format(call.body.len()).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    Ok(out)
}

/// What an answer's head says.
#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    pub headers: Fields,
    /// The server keeps the connection, as far as its head says.
    pub keep_alive: bool,
}

/// With `data` behind `partial`: the head and what follows it; or `None`, and `partial` has grown.
pub fn read(partial: &mut BytesMut, data: &[u8]) -> Result<Option<(Head, Bytes)>, String> {
    if !partial.is_empty() {
        let looked = partial.len().saturating_sub(3);
        partial.extend_from_slice(data);
        if !has_empty_line(&partial[looked..]) {
            return bounded(partial).map(|()| None);
        }
    }
    let gathered = std::mem::take(partial);
    let mut rest = if gathered.is_empty() { data } else { &gathered };
    for _ in 0..=INTERIM_MAX {
        let Some((answer, length)) = parse(rest)? else {
            partial.extend_from_slice(rest);
            return bounded(partial).map(|()| None);
        };
        rest = &rest[length..];
        if !answer.status.is_informational() || answer.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some((answer, Bytes::copy_from_slice(rest))));
        }
    }
    Err(format!("it sent more than {INTERIM_MAX} interim answers"))
}

/// Without one the head is not whole, and need not be parsed again for every few bytes.
fn has_empty_line(text: &[u8]) -> bool {
    let after_line_end = |at: usize| matches!(&text[at + 1..], [b'\n', ..] | [b'\r', b'\n', ..]);
    memchr::memchr_iter(b'\n', text).any(after_line_end)
}

fn bounded(partial: &BytesMut) -> Result<(), String> {
    if partial.len() > HEAD_BYTES_MAX {
        return Err(format!("the head of its answer has more than {HEAD_BYTES_MAX} bytes"));
    }
    Ok(())
}

fn parse(text: &[u8]) -> Result<Option<(Head, usize)>, String> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut []);
    let parser = httparse::ParserConfig::default();
    let length = match parser.parse_response_with_uninit_headers(&mut head, text, &mut headers) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(format!("its answer has more than {HEADERS_MAX} headers"));
        }
        Err(error) => return Err(format!("it does not speak HTTP/1.1: {error}")),
    };
    let status = head.code.and_then(|code| StatusCode::from_u16(code).ok());
    let status = status.ok_or("its answer has no status of HTTP")?;
    // Apart from the body's first bytes, which would stay in memory as long as one header does.
    let kept = Bytes::copy_from_slice(&text[..length]);
    let headers = Fields::new(head.headers, text, kept);
    let keep_alive = (head.version != Some(0) || headers.lists("connection", b"keep-alive"))
        && !headers.lists("connection", b"close");
    Ok(Some((Head { status, headers, keep_alive }, length)))
}
