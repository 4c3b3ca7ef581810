//! The head of a request as bytes, and of an answer from them (RFC 9112).

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode, header};

use super::Call;
use super::connection::Connector;
use crate::http1::{self, JOIN_BYTES_MAX, names, push_line};

/// Of an answer. Engines send a few hundred bytes.
const HEAD_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 128;
/// Interim answers (100, 103) before the real one.
const INTERIM_MAX: usize = 16;
/// Room for what every request says beside its own words, and a short key.
const FIXED_BYTES: usize = 192;

pub fn written(connector: &Connector, call: &Call<'_>) -> Result<Vec<u8>, String> {
    let target = connector.target()?;
    let path = call.path_and_query;
    // Whoever built it took care; a space or a line end would make another request of it.
    if !path.starts_with('/') || !path.bytes().all(|byte| matches!(byte, b'!'..=b'~' | 0x80..)) {
        return Err(format!("the path {path:?} cannot be sent"));
    }
    let joined = if call.body.len() <= JOIN_BYTES_MAX { call.body.len() } else { 0 };
    let headers = call.headers.as_bytes();
    let fixed = target.path.len() + path.len() + target.authority.len() + FIXED_BYTES;
    let mut out = Vec::with_capacity(fixed + headers.len() + joined);
    let method = call.method.as_str().as_bytes();
    for part in [method, b" ", target.path.as_bytes(), path.as_bytes(), b" HTTP/1.1\r\n"] {
        out.extend_from_slice(part);
    }
    push_line(&mut out, "host", target.authority.as_bytes());
    out.extend_from_slice(headers);
    for (name, value) in call.more {
        push_line(&mut out, name.as_str(), value.as_bytes());
    }
    if !call.body.is_empty() || !matches!(*call.method, Method::GET | Method::HEAD) {
        let mut digits = itoa::Buffer::new();
        push_line(&mut out, "content-length", digits.format(call.body.len()).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    Ok(out)
}

/// What an answer's head says.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// The server keeps the connection, as far as its head says.
    pub keep_alive: bool,
}

/// With `data` behind `partial`: the head and what follows it; or `None`, and `partial` has grown.
pub fn read(partial: &mut BytesMut, data: Bytes) -> Result<Option<(Answer, Bytes)>, String> {
    let mut rest = if partial.is_empty() {
        data
    } else {
        let looked = partial.len().saturating_sub(3);
        partial.extend_from_slice(&data);
        if !has_empty_line(&partial[looked..]) {
            return bounded(partial).map(|()| None);
        }
        partial.split().freeze()
    };
    for _ in 0..=INTERIM_MAX {
        let Some((answer, length)) = parse(&rest)? else {
            partial.extend_from_slice(&rest);
            return bounded(partial).map(|()| None);
        };
        rest = rest.split_off(length);
        if !answer.status.is_informational() || answer.status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(Some((answer, rest)));
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

fn parse(text: &Bytes) -> Result<Option<(Answer, usize)>, String> {
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
    let mut found = HeaderMap::with_capacity(head.headers.len() + 4);
    let (mut keep_alive, mut close) = (head.version != Some(0), false);
    for header in head.headers.iter() {
        // Nearly every answer says one of them, and it concerns nobody else.
        if header.name.eq_ignore_ascii_case("connection") {
            let word = header.value.trim_ascii();
            if word.eq_ignore_ascii_case(b"keep-alive") {
                keep_alive = true;
                continue;
            }
            if word.eq_ignore_ascii_case(b"close") {
                close = true;
                continue;
            }
        }
        let (name, value) = http1::header(header, text, &kept)?;
        found.append(name, value);
    }
    // Where it names more, it is left for whoever takes out what it names.
    if found.contains_key(header::CONNECTION) {
        let names = |wanted| names(&found, &header::CONNECTION, wanted);
        (keep_alive, close) = (keep_alive || names("keep-alive"), close || names("close"));
    }
    let keep_alive = keep_alive && !close;
    Ok(Some((Answer { status, headers: found, keep_alive }, length)))
}
