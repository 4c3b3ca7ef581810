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
    poll_read_some(stream, cx, READ_BYTES, use_data)
}

/// As [`poll_read`], at most so many bytes, which must not be none.
pub fn poll_read_some<T>(
    stream: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
    most: usize,
    use_data: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(&mut scratch[..most.clamp(1, READ_BYTES)]);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(use_data(buffer.filled())))
    })
}

/// What is asked of the headers of a message, however they are kept. Names are given in lower case.
pub trait Headers {
    /// The first of that name.
    fn first(&self, name: &str) -> Option<&[u8]>;

    fn any_begins_with(&self, start: &str) -> bool;

    /// As [`Headers::first`], where it is text.
    fn text(&self, name: &str) -> Option<&str> {
        self.first(name).and_then(|value| std::str::from_utf8(value).ok())
    }
}

impl Headers for HeaderMap {
    fn first(&self, name: &str) -> Option<&[u8]> {
        self.get(name).map(HeaderValue::as_bytes)
    }

    fn any_begins_with(&self, start: &str) -> bool {
        self.keys().any(|name| name.as_str().starts_with(start))
    }
}

/// Headers as they came: only where each of them lies is known. Nearly all of them are passed on
/// and looked at by nobody.
#[derive(Clone, Default)]
pub struct Fields {
    text: Bytes,
    /// Where names and values begin, and end.
    places: Vec<[(u32, u32); 2]>,
    /// Of all names: most that are asked for are not there.
    marks: u64,
}

impl Fields {
    /// `kept`: a copy of `text`, in which they were found.
    pub fn new(found: &[httparse::Header<'_>], text: &[u8], kept: Bytes) -> Fields {
        let start = text.as_ptr().addr();
        // Heads are bounded far below.
        let offset = |at: usize| u32::try_from(at - start).unwrap_or(u32::MAX);
        let place = |part: &[u8]| {
            let at = part.as_ptr().addr();
            (offset(at), offset(at + part.len()))
        };
        let places =
            found.iter().map(|header| [place(header.name.as_bytes()), place(header.value)]);
        let marks = marks(found.iter().map(|header| header.name.as_bytes()));
        Fields { places: places.collect(), text: kept, marks }
    }

    fn part(&self, (from, to): (u32, u32)) -> &[u8] {
        self.text.get(from as usize..to as usize).unwrap_or_default()
    }

    /// In the order in which they came, names as they were written.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.places.iter().map(|[name, value]| (self.part(*name), self.part(*value)))
    }

    /// All of one name.
    pub fn all(&self, name: &str) -> impl DoubleEndedIterator<Item = &[u8]> {
        let is_it = move |[at, _]: &&[(u32, u32); 2]| {
            (at.1 - at.0) as usize == name.len() && is_same(self.part(*at), name.as_bytes())
        };
        let may_be = self.marks & mark(name.as_bytes()) != 0;
        let places = if may_be { &self.places[..] } else { &[] };
        places.iter().filter(is_it).map(|[_, value]| self.part(*value))
    }

    /// The parts of a header that is a list.
    pub fn list(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.all(name).flat_map(parts)
    }

    /// Whether a header that is a list holds `wanted`.
    pub fn lists(&self, name: &str, wanted: &[u8]) -> bool {
        self.list(name).any(|part| part.eq_ignore_ascii_case(wanted))
    }

    /// What cannot be told by the library is left out.
    pub fn to_map(&self) -> HeaderMap {
        let pair = |(name, value): (&[u8], &[u8])| {
            Some((HeaderName::from_bytes(name).ok()?, HeaderValue::from_bytes(value).ok()?))
        };
        let mut map = HeaderMap::with_capacity(self.places.len());
        for (name, value) in self.iter().filter_map(pair) {
            map.append(name, value);
        }
        map
    }
}

impl Headers for Fields {
    fn first(&self, name: &str) -> Option<&[u8]> {
        self.all(name).next()
    }

    fn any_begins_with(&self, start: &str) -> bool {
        self.iter().any(|(name, _)| begins_with(name, start))
    }
}

impl From<&HeaderMap> for Fields {
    fn from(headers: &HeaderMap) -> Fields {
        let mut text = Vec::new();
        let mut put = |part: &[u8]| {
            let from = u32::try_from(text.len()).unwrap_or(u32::MAX);
            text.extend_from_slice(part);
            (from, u32::try_from(text.len()).unwrap_or(u32::MAX))
        };
        let places = headers.iter();
        let places =
            places.map(|(name, value)| [put(name.as_str().as_bytes()), put(value.as_bytes())]);
        let marks = marks(headers.keys().map(|name| name.as_str().as_bytes()));
        Fields { places: places.collect(), text: text.into(), marks }
    }
}

/// Credentials may be among them.
impl std::fmt::Debug for Fields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fields({} headers)", self.places.len())
    }
}

/// As [`Fields::lists`], of headers in a map.
pub fn names(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    let mut parts = values.flat_map(|value| parts(value.as_bytes()));
    parts.any(|part| part.eq_ignore_ascii_case(wanted.as_bytes()))
}

fn parts(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}

/// One bit of 64, by what most names differ in: their length and their first letter.
fn mark(name: &[u8]) -> u64 {
    let first = name.first().map_or(0, |first| usize::from(first | CASE));
    1 << ((name.len() * 5 + first) % 64)
}

fn marks<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    names.fold(0, |marks, name| marks | mark(name))
}

/// Of the two cases of a letter. Other bytes that differ in nothing else are not in names, but for
/// `^` and `~`, which are in none that is known.
const CASE: u8 = 0x20;

/// Names of one length, eight letters at a time.
fn is_same(name: &[u8], known: &[u8]) -> bool {
    let fold = |letters: &[u8; 8]| u64::from_ne_bytes(*letters) | u64::from_ne_bytes([CASE; 8]);
    let pair = (name.last_chunk::<8>(), known.last_chunk::<8>());
    let (Some(end), Some(known_end)) = pair else {
        return name.iter().zip(known).all(|(one, other)| one | CASE == other | CASE);
    };
    let (eights, _) = name.as_chunks::<8>();
    let (known_eights, _) = known.as_chunks::<8>();
    fold(end) == fold(known_end)
        && eights.iter().zip(known_eights).all(|(one, other)| fold(one) == fold(other))
}

/// A length as it is written in headers: digits and nothing else.
pub fn length(digits: &[u8]) -> Option<u64> {
    let add = |sum: u64, digit: &u8| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    };
    digits.iter().try_fold(0, add).filter(|_| !digits.is_empty())
}

/// Whether a name or a value, as it was written, begins with `start`.
pub fn begins_with(name: &[u8], start: &str) -> bool {
    name.get(..start.len()).is_some_and(|part| part.eq_ignore_ascii_case(start.as_bytes()))
}

/// Names of headers, by their length: of most others nothing need be compared.
#[derive(Debug)]
pub struct Names {
    by_length: Vec<Vec<&'static str>>,
    marks: u64,
}

impl Names {
    pub fn new(names: &[&'static str]) -> Names {
        let mut by_length: Vec<Vec<_>> = Vec::new();
        for name in names {
            by_length.resize_with(by_length.len().max(name.len() + 1), Vec::new);
            by_length[name.len()].push(*name);
        }
        let marks = marks(names.iter().map(|name| name.as_bytes()));
        Names { by_length, marks }
    }

    pub fn contains(&self, name: &[u8]) -> bool {
        if self.marks & mark(name) == 0 {
            return false;
        }
        let same_length = self.by_length.get(name.len()).map(Vec::as_slice).unwrap_or_default();
        same_length.iter().any(|known| is_same(name, known.as_bytes()))
    }
}

/// Headers as they are sent, a line each.
#[derive(Clone, Default)]
pub struct Lines(Vec<u8>);

impl Lines {
    pub fn with_capacity(bytes: usize) -> Lines {
        Lines(Vec::with_capacity(bytes))
    }

    pub fn push(&mut self, name: &HeaderName, value: &HeaderValue) {
        push_line(&mut self.0, name.as_str().as_bytes(), value.as_bytes());
    }

    /// Of a name and a value that were headers before, or are known to be sound.
    pub fn push_raw(&mut self, name: impl AsRef<[u8]>, value: &[u8]) {
        push_line(&mut self.0, name.as_ref(), value);
    }

    /// As [`Lines::push_raw`]; left out where it can be no header's value.
    pub fn push_fit(&mut self, name: &HeaderName, value: &[u8]) {
        // RFC 9110, 5.5.
        if value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..)) {
            self.push_raw(name, value);
        }
    }

    /// Of a value that `write` adds.
    pub fn push_with(&mut self, name: &str, write: impl FnOnce(&mut Vec<u8>)) {
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b": ");
        write(&mut self.0);
        self.0.extend_from_slice(b"\r\n");
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn iter(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let lines = self.0.split_inclusive(|byte| *byte == b'\n');
        lines.filter_map(|line| {
            let colon = memchr::memchr(b':', line)?;
            let name = HeaderName::from_bytes(&line[..colon]).ok()?;
            Some((name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?))
        })
    }
}

/// Credentials may be among them.
impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lines({} bytes)", self.0.len())
    }
}

pub fn push_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name);
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

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 7] = [
        "te",
        "host",
        "cookie",
        "x-api-key",
        "accept-encoding",
        "x-wharf-max-wait",
        "access-control-allow-private-network",
    ];

    #[test]
    fn names_are_found_in_any_case_and_no_other_ones() {
        let names = Names::new(&NAMES);
        for name in NAMES {
            assert!(names.contains(name.as_bytes()), "{name}");
            assert!(names.contains(name.to_uppercase().as_bytes()), "{name}");
            for at in 0..name.len() {
                let mut other = name.as_bytes().to_vec();
                other[at] = if other[at] == b'z' { b'y' } else { b'z' };
                assert!(!names.contains(&other), "{}", String::from_utf8_lossy(&other));
            }
        }
        for other in ["", "t", "hosts", "x-wharf-max-wai", "Z-wharf-max-wait"] {
            assert!(!names.contains(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn fields_are_found_however_they_came() {
        let text = b"POST / HTTP/1.1\r\nHost: a\r\nACCEPT-ENCODING: b\r\nx-Api-Key: c\r\nX-API-KEY: d\r\n\r\n";
        let mut headers = [httparse::EMPTY_HEADER; 8];
        let mut head = httparse::Request::new(&mut headers);
        assert!(head.parse(text).unwrap().is_complete());
        let raw = Fields::new(head.headers, text, Bytes::copy_from_slice(text));
        for fields in [Fields::from(&raw.to_map()), raw] {
            let found: Vec<Option<&str>> = NAMES.iter().map(|name| fields.text(name)).collect();
            assert_eq!(found, [None, Some("a"), None, Some("c"), Some("b"), None, None]);
            assert_eq!(fields.all("x-api-key").collect::<Vec<_>>(), [b"c", b"d"]);
        }
    }

    #[test]
    fn a_length_is_digits_and_no_more_than_there_can_be() {
        assert_eq!(length(b"0"), Some(0));
        assert_eq!(length(b"0012"), Some(12));
        assert_eq!(length(b"18446744073709551615"), Some(u64::MAX));
        for bad in ["", "+5", "-1", " 5", "5,5", "0x5", "18446744073709551616", "\u{665}"] {
            assert_eq!(length(bad.as_bytes()), None, "{bad}");
        }
    }
}
