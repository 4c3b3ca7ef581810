//! A reply as bytes: its head, and its body as the parts come.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Body;
use bytes::Bytes;
use http::StatusCode;
use http_body::Body as _;
use tokio::io::AsyncWrite;

use super::super::answer::Reply;
use crate::http1::{JOIN_BYTES_MAX, Lines, push_line};

thread_local! {
    /// What is being written; shared, so that connections that wait hold nothing.
    static OUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static DATE: RefCell<Date> = const { RefCell::new(Date { second: 0, text: String::new() }) };
}

/// What is to be sent at once.
pub struct Parts<'a> {
    front: &'a [u8],
    /// Too large to be copied, or empty.
    data: Bytes,
    tail: &'static [u8],
}

/// What of it the socket did not take yet.
#[derive(Debug, Default)]
pub struct Left {
    front: Vec<u8>,
    data: Bytes,
    tail: &'static [u8],
    sent: usize,
    unflushed: bool,
    failure: Option<io::Error>,
}

impl Left {
    pub fn is_empty(&self) -> bool {
        self.total() == 0 && !self.unflushed && self.failure.is_none()
    }

    fn total(&self) -> usize {
        self.front.len() + self.data.len() + self.tail.len()
    }

    /// Sends what the socket takes, and keeps the rest. Only while nothing is left.
    pub fn begin<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        Parts { front, data, tail }: Parts<'_>,
    ) {
        self.unflushed = true;
        let written = match data.is_empty() {
            true => Pin::new(stream).poll_write(cx, front),
            false => {
                let slices = [IoSlice::new(front), IoSlice::new(&data), IoSlice::new(tail)];
                Pin::new(stream).poll_write_vectored(cx, &slices)
            }
        };
        let sent = match written {
            Poll::Ready(Ok(sent)) => sent,
            Poll::Ready(Err(error)) => {
                self.failure = Some(error);
                return;
            }
            Poll::Pending => 0,
        };
        if sent < front.len() + data.len() + tail.len() {
            (self.front, self.data, self.tail, self.sent) = (front.to_vec(), data, tail, sent);
        }
    }

    /// Until all is sent.
    pub fn poll<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(failure) = self.failure.take() {
            return Poll::Ready(Err(failure));
        }
        let total = self.total();
        while self.sent < total {
            let mut slices =
                [IoSlice::new(&self.front), IoSlice::new(&self.data), IoSlice::new(self.tail)];
            let mut slices = &mut slices[..];
            IoSlice::advance_slices(&mut slices, self.sent);
            match ready!(Pin::new(&mut *stream).poll_write_vectored(cx, slices))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.sent += sent,
            }
        }
        if total > 0 {
            (self.front, self.data, self.tail, self.sent) = (Vec::new(), Bytes::new(), &[], 0);
        }
        if self.unflushed {
            // TLS keeps records back until it is asked.
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// How the client knows where the body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// It has none, whatever the head says.
    None,
    /// So many bytes are still to come.
    Length(u64),
    Chunked,
}

/// A reply on its way to the client.
pub struct Writer {
    status: StatusCode,
    /// Until the head is sent.
    headers: Option<Lines>,
    body: Body,
    framing: Framing,
    over: bool,
    /// The body broke off: only the connection's end can tell.
    broken: bool,
    close: bool,
}

impl Writer {
    pub fn new(reply: Reply) -> Writer {
        let Reply { status, headers, body, close, .. } = reply;
        let framing = match (status, body.size_hint().exact()) {
            (StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED, _) => Framing::None,
            (_, Some(length)) => Framing::Length(length),
            (_, None) => Framing::Chunked,
        };
        let headers = Some(headers);
        Writer { status, headers, body, framing, over: false, broken: false, close }
    }

    pub fn is_over(&self) -> bool {
        self.over
    }

    pub fn keeps_alive(&self) -> bool {
        !self.close
    }

    /// Hands the next bytes to `send`, if there are any; whether the body must be waited for.
    pub fn poll_parts(
        &mut self,
        cx: &mut Context<'_>,
        closing: bool,
        send: impl FnOnce(Parts<'_>, &mut Context<'_>),
    ) -> io::Result<bool> {
        if self.broken {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the answer broke off"));
        }
        // Not borrowed: what is polled in between is anybody's code.
        let mut out = OUT.take();
        out.clear();
        if let Some(headers) = self.headers.take() {
            self.close |= closing;
            write_head(&mut out, self.status, &headers, self.framing, self.close);
        }
        let mut data = Bytes::new();
        let waits = loop {
            // A body of known length is not asked for its end: it closes its books with its last
            // byte.
            if matches!(self.framing, Framing::None | Framing::Length(0)) {
                self.over = true;
            }
            if self.over || self.broken || !data.is_empty() || out.len() >= JOIN_BYTES_MAX {
                break false;
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => break true,
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(part) = frame.into_data() {
                        data = self.put(&mut out, part);
                    }
                }
                Poll::Ready(None) if self.framing == Framing::Chunked => {
                    out.extend_from_slice(b"0\r\n\r\n");
                    self.over = true;
                }
                Poll::Ready(None | Some(Err(_))) => self.broken = true,
            }
        };
        if !out.is_empty() || !data.is_empty() {
            let chunked = self.framing == Framing::Chunked && !data.is_empty();
            let tail: &[u8] = if chunked { b"\r\n" } else { b"" };
            send(Parts { front: &out, data, tail }, cx);
        }
        OUT.set(out);
        Ok(waits)
    }

    /// Adds a part of the body to `out`; a large one is given back to be sent behind it.
    fn put(&mut self, out: &mut Vec<u8>, mut part: Bytes) -> Bytes {
        if let Framing::Length(left) = &mut self.framing {
            // More than was announced would be taken for the next answer.
            part.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= part.len() as u64;
        }
        if part.is_empty() {
            return part;
        }
        if self.framing == Framing::Chunked {
            put_size(out, part.len());
        }
        if out.len() + part.len() > JOIN_BYTES_MAX {
            return part;
        }
        out.extend_from_slice(&part);
        if self.framing == Framing::Chunked {
            out.extend_from_slice(b"\r\n");
        }
        Bytes::new()
    }
}

/// Of a chunk, in hexadecimal digits, and its line's end.
fn put_size(out: &mut Vec<u8>, size: usize) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let significant = (usize::BITS - size.leading_zeros()).div_ceil(4).max(1);
    out.extend((0..significant).rev().map(|digit| DIGITS[(size >> (4 * digit)) & 15]));
    out.extend_from_slice(b"\r\n");
}

fn write_head(
    out: &mut Vec<u8>,
    status: StatusCode,
    headers: &Lines,
    framing: Framing,
    close: bool,
) {
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(headers.as_bytes());
    match framing {
        Framing::None => {}
        Framing::Length(length) => {
            push_line(out, b"content-length", itoa::Buffer::new().format(length).as_bytes());
        }
        Framing::Chunked => push_line(out, b"transfer-encoding", b"chunked"),
    }
    if close {
        push_line(out, b"connection", b"close");
    }
    DATE.with_borrow_mut(|date| push_line(out, b"date", date.now().as_bytes()));
    out.extend_from_slice(b"\r\n");
}

/// The time in the format of HTTP; new every second only.
struct Date {
    second: u64,
    text: String,
}

impl Date {
    fn now(&mut self) -> &str {
        let now = SystemTime::now();
        let second = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if second != self.second || self.text.is_empty() {
            (self.second, self.text) = (second, httpdate::fmt_http_date(now));
        }
        &self.text
    }
}
