//! What both sides of the data path, that of the clients and that of the engines, need for HTTP/1.1.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Of one read.
const READ_BYTES: usize = 64 << 10;
/// Parts up to this size are sent as one piece: copying them is less than a second look by the
/// kernel.
pub const JOIN_BYTES_MAX: usize = 16 << 10;

thread_local! {
    /// Shared by all connections of a thread, so that those that wait hold nothing.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// Reads once; what `use_data` gets is empty at the end.
pub fn poll_read<T>(
    stream: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    use_data: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(use_data(buffer.filled())))
    })
}

/// Takes the values out of `kept`, a copy of `text`, in which they were found.
///
/// # Errors
/// Names the header that is none.
pub fn header(
    found: &httparse::Header<'_>,
    text: &[u8],
    kept: &Bytes,
) -> Result<(HeaderName, HeaderValue), String> {
    let name = HeaderName::from_bytes(found.name.as_bytes());
    let name = name.map_err(|_| format!("the name of header {:?} is invalid", found.name))?;
    let from = found.value.as_ptr().addr() - text.as_ptr().addr();
    let value = HeaderValue::from_maybe_shared(kept.slice(from..from + found.value.len()));
    let value = value.map_err(|_| format!("the value of header {name} is invalid"))?;
    Ok((name, value))
}

/// Whether a header that is a list holds `wanted`.
pub fn names(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(wanted))
}

/// Headers as they are sent, a line each.
#[derive(Clone, Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    pub fn with_capacity(bytes: usize) -> Lines {
        Lines(Vec::with_capacity(bytes))
    }

    pub fn push(&mut self, name: &HeaderName, value: &HeaderValue) {
        push_line(&mut self.0, name.as_str(), value.as_bytes());
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Credentials may be among them.
impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lines({} bytes)", self.0.len())
    }
}

pub fn push_line(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// A stream of which some bytes were read already: they come first.
#[derive(Debug)]
pub struct Prefixed<S> {
    first: Bytes,
    stream: S,
}

impl<S> Prefixed<S> {
    pub fn new(first: Bytes, stream: S) -> Prefixed<S> {
        Prefixed { first, stream }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Prefixed { first, stream } = self.get_mut();
        if first.is_empty() {
            return Pin::new(stream).poll_read(cx, buffer);
        }
        let part = first.split_to(first.len().min(buffer.remaining()));
        buffer.put_slice(&part);
        if first.is_empty() {
            // It would keep all of the buffer that it came from.
            *first = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
