//! The body of an answer: where it ends, and what becomes of its connection then.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use http::{Method, StatusCode};
use http_body::{Body, Frame, SizeHint};

use super::connection::{Connection, Sending};
use super::head::Head;
use super::pool::Pool;
use super::{Answer, CallError, Upgraded};
use crate::http1::{self, Fields};

thread_local! {
    /// The data of the chunks of one read.
    static DECODED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Of a chunk's extensions, and of all trailers: read over, so bounded.
const LINE_BYTES_MAX: usize = 16 << 10;

/// The body of an answer, as its bytes come. Trailers are dropped.
#[derive(Debug)]
pub struct Incoming(State);

#[derive(Debug)]
enum State {
    /// Nothing more comes from the engine; the connection is another's already.
    Whole(Bytes),
    Live(Box<Live>),
    Upgraded(Box<Upgraded>),
}

#[derive(Debug)]
struct Live {
    connection: Connection,
    /// Of the request, which the server answers before it has read it all.
    unsent: Option<Sending>,
    frames: Frames,
    pool: Arc<Pool>,
}

/// What comes of the connection's bytes.
#[derive(Debug)]
struct Frames {
    /// Came already.
    ready: Bytes,
    framing: Framing,
    keep_alive: bool,
}

/// How the end of a body is known.
#[derive(Debug)]
enum Framing {
    /// So many bytes are still to come.
    Length(u64),
    Chunked(Chunks),
    /// With the connection.
    Close,
}

pub fn answer(
    head: Head,
    mut rest: Bytes,
    unsent: Option<Sending>,
    connection: Connection,
    method: &Method,
    pool: &Arc<Pool>,
) -> Result<Answer, CallError> {
    let Head { status, headers, mut keep_alive } = head;
    let bodiless = *method == Method::HEAD
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let state = if status == StatusCode::SWITCHING_PROTOCOLS {
        State::Upgraded(Box::new(connection.into_upgraded(rest)))
    } else {
        let framing = match bodiless {
            true => Framing::Length(0),
            false => framing(&headers, &mut keep_alive).map_err(CallError::Invalid)?,
        };
        let mut frames = Frames { ready: Bytes::new(), framing, keep_alive };
        let used = frames.receive(&rest);
        if let Some(used) = used.map_err(|error| CallError::Invalid(error.to_string()))? {
            rest.truncate(used);
            frames.ready = rest;
        }
        Live { connection, unsent, frames, pool: Arc::clone(pool) }.settled()
    };
    Ok(Answer { status, headers, body: Incoming(state) })
}

/// RFC 9112, 6.3.
fn framing(headers: &Fields, keep_alive: &mut bool) -> Result<Framing, String> {
    let mut lengths = headers.all("content-length");
    if let Some(coding) = headers.all("transfer-encoding").next_back() {
        let coding = coding.rsplit(|byte| *byte == b',').next().unwrap_or_default();
        let chunked = coding.trim_ascii().eq_ignore_ascii_case(b"chunked");
        // Both headers: somebody is mistaken, or wants to smuggle.
        *keep_alive &= lengths.next().is_none();
        return Ok(if chunked { Framing::Chunked(Chunks::default()) } else { Framing::Close });
    }
    let Some(first) = lengths.next() else { return Ok(Framing::Close) };
    if lengths.any(|other| other != first) {
        return Err("its answer names two lengths".to_owned());
    }
    let shown = || String::from_utf8_lossy(first);
    let length = http1::length(first);
    length.map(Framing::Length).ok_or_else(|| format!("the length {:?} is no number", shown()))
}

impl Frames {
    /// Takes bytes of the connection. So many of them are data as they came; `None`: they were
    /// chunks, and their data are ready.
    fn receive(&mut self, raw: &[u8]) -> io::Result<Option<usize>> {
        let (used, as_it_came) = match &mut self.framing {
            Framing::Length(left) => {
                let used = raw.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= used as u64;
                (used, Some(used))
            }
            Framing::Chunked(chunks) => {
                let mut data = DECODED.take();
                data.clear();
                let used = chunks.decode(raw, &mut data);
                self.ready = Bytes::copy_from_slice(&data);
                DECODED.set(data);
                (used?, None)
            }
            Framing::Close => (raw.len(), Some(raw.len())),
        };
        // A server that goes on talking is out of step.
        self.keep_alive &= used == raw.len();
        Ok(as_it_came)
    }

    fn is_at_end(&self) -> bool {
        match &self.framing {
            Framing::Length(left) => *left == 0,
            Framing::Chunked(chunks) => chunks.is_done(),
            Framing::Close => false,
        }
    }
}

impl Live {
    /// The connection is free as soon as the last byte is here.
    fn settled(self) -> State {
        if !self.frames.is_at_end() {
            return State::Live(Box::new(self));
        }
        if self.frames.keep_alive && self.unsent.is_none() {
            Pool::give_back(&self.pool, self.connection);
        }
        State::Whole(self.frames.ready)
    }

    /// False: the body is over.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if let Some(unsent) = &mut self.unsent
            && self.connection.poll_send(unsent, cx)
        {
            self.unsent = None;
        }
        // An empty chunk, or a part of a chunk's head, is no frame.
        let Live { connection, frames, .. } = self;
        while frames.ready.is_empty() && !frames.is_at_end() {
            let took = connection.poll_read(cx, |raw| {
                if let Some(used) = frames.receive(raw)? {
                    frames.ready = Bytes::copy_from_slice(&raw[..used]);
                }
                io::Result::Ok(raw.len())
            });
            if ready!(took)?? == 0 {
                return Poll::Ready(match frames.framing {
                    Framing::Close => Ok(false),
                    _ => Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the connection was closed before the end of the answer",
                    )),
                });
            }
        }
        Poll::Ready(Ok(true))
    }
}

impl Incoming {
    /// Takes all bytes that are left, where the engine has sent its last one.
    pub fn take_whole(&mut self) -> Option<Bytes> {
        match &mut self.0 {
            State::Whole(bytes) => Some(std::mem::take(bytes)),
            _ => None,
        }
    }

    /// After a 101.
    pub fn into_upgraded(self) -> Option<Upgraded> {
        match self.0 {
            State::Upgraded(upgraded) => Some(*upgraded),
            _ => None,
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let state = &mut self.0;
        if let State::Live(live) = state {
            match ready!(live.poll_receive(cx)) {
                Ok(true) => {}
                Ok(false) => *state = State::Whole(Bytes::new()),
                Err(error) => {
                    *state = State::Whole(Bytes::new());
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        let data = match state {
            State::Live(live) => std::mem::take(&mut live.frames.ready),
            State::Whole(left) => std::mem::take(left),
            State::Upgraded(_) => Bytes::new(),
        };
        if let State::Live(live) = state
            && live.frames.is_at_end()
        {
            let State::Live(live) = std::mem::replace(state, State::Whole(Bytes::new())) else {
                return Poll::Ready(None);
            };
            *state = live.settled();
        }
        Poll::Ready((!data.is_empty()).then(|| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            State::Whole(left) => left.is_empty(),
            State::Live(_) => false,
            State::Upgraded(_) => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            State::Whole(left) => SizeHint::with_exact(left.len() as u64),
            State::Live(live) => match live.frames.framing {
                Framing::Length(left) => {
                    SizeHint::with_exact(left + live.frames.ready.len() as u64)
                }
                _ => SizeHint::default(),
            },
            State::Upgraded(_) => SizeHint::with_exact(0),
        }
    }
}

/// Where in a chunked body the last byte was.
#[derive(Debug, Default)]
struct Chunks {
    at: At,
    /// Of the line or the trailers under way.
    seen: usize,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum At {
    #[default]
    SizeFirst,
    Size(u64),
    /// Behind the size, up to the line's end.
    Extension(u64),
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// A line of a trailer: nothing in it yet, or something.
    TrailerFirst,
    Trailer,
    TrailerLf {
        last: bool,
    },
    Done,
}

impl Chunks {
    fn is_done(&self) -> bool {
        self.at == At::Done
    }

    /// Adds the data in `raw` to `out`; how much of `raw` belongs to this body.
    fn decode(&mut self, mut raw: &[u8], out: &mut Vec<u8>) -> io::Result<usize> {
        let length = raw.len();
        while let Some(&byte) = raw.first() {
            if let At::Data(left) = self.at {
                let here = raw.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                out.extend_from_slice(&raw[..here]);
                raw.advance(here);
                let left = left - here as u64;
                self.at = if left == 0 { At::DataCr } else { At::Data(left) };
                continue;
            }
            if self.at == At::Done {
                break;
            }
            self.at = self.next(byte)?;
            raw.advance(1);
        }
        Ok(length - raw.len())
    }

    fn next(&mut self, byte: u8) -> io::Result<At> {
        let next = match (self.at, byte) {
            (At::SizeFirst, _) => At::Size(digit(byte).ok_or_else(malformed)?),
            (At::Size(size), b'\r') => At::SizeLf(size),
            (At::Size(size), b'\n') => self.sized(size),
            (At::Size(size), b';' | b' ' | b'\t') => At::Extension(size),
            (At::Size(size), _) => {
                let digit = digit(byte).ok_or_else(malformed)?;
                let size = size.checked_mul(16).and_then(|size| size.checked_add(digit));
                At::Size(size.ok_or_else(malformed)?)
            }
            (At::Extension(size), b'\r') => At::SizeLf(size),
            (At::Extension(size), b'\n') => self.sized(size),
            (At::SizeLf(size), b'\n') => self.sized(size),
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataCr | At::DataLf, b'\n') => self.line(At::SizeFirst),
            (At::TrailerFirst, b'\r') => At::TrailerLf { last: true },
            (At::TrailerFirst, b'\n') | (At::TrailerLf { last: true }, b'\n') => At::Done,
            (At::Trailer, b'\r') => At::TrailerLf { last: false },
            (At::Trailer, b'\n') | (At::TrailerLf { last: false }, b'\n') => At::TrailerFirst,
            (At::TrailerFirst | At::Trailer, _) => At::Trailer,
            (At::Extension(size), _) => At::Extension(size),
            _ => return Err(malformed()),
        };
        self.seen += 1;
        if self.seen > LINE_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a line between the chunks has more than {LINE_BYTES_MAX} bytes"),
            ));
        }
        Ok(next)
    }

    fn sized(&mut self, size: u64) -> At {
        if size == 0 { At::TrailerFirst } else { self.line(At::Data(size)) }
    }

    /// A line ended well.
    fn line(&mut self, next: At) -> At {
        self.seen = 0;
        next
    }
}

fn digit(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(16).map(u64::from)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the chunks of the answer are malformed")
}
