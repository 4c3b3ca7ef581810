//! What goes over the wire: requests, answers, and events that carry the time at which they left.

use memchr::memmem;

/// As `user` says: the field is a client's to choose, and proxies pass it on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// A chat completion of so many bytes.
    Json { bytes: usize },
    /// So many events, each so many nanoseconds after the one before; 0: as fast as they can leave.
    Stream { events: u64, every: u64, usage: bool },
}

/// Of the usual answer.
pub const ANSWER_BYTES: usize = 1024;
const STAMP: &[u8] = b"\"T";
const STAMP_DIGITS: usize = 20;
const EVENT: &str = "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\
    \"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":\
    {\"content\":\"T00000000000000000000\"},\"finish_reason\":null}]}\n\n";
const USAGE_EVENT: &str = "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\
    \"created\":1700000000,\"model\":\"bench\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\
    \"completion_tokens\":20,\"total_tokens\":29}}\n\n";
const END: &str = "data: [DONE]\n\n";
/// How a chunked body ends.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

pub const STREAM_HEAD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
    cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";

/// Of a stream at whose end the connection is closed.
pub const LAST_STREAM_HEAD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
    cache-control: no-cache\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";

/// The body of a request for `wanted`, filled up to at least `bytes`.
pub fn body(wanted: Wanted, bytes: usize) -> String {
    let (user, rest) = match wanted {
        Wanted::Json { bytes } => (format!("size:{bytes}"), ""),
        Wanted::Stream { events, every, .. } => {
            (format!("sse:{events}:{every}"), "\"stream\":true,")
        }
    };
    let mut body = format!(
        "{{\"model\":\"bench\",\"user\":\"{user}\",{rest}\"messages\":[{{\"role\":\"user\",\
         \"content\":\"Say hello"
    );
    let tail = "\"}]}";
    body.extend(std::iter::repeat_n('x', bytes.saturating_sub(body.len() + tail.len())));
    body + tail
}

pub fn request(host: &str, body: &str) -> Vec<u8> {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// What a request's body asks for.
pub fn wanted(body: &[u8]) -> Wanted {
    let usual = Wanted::Json { bytes: ANSWER_BYTES };
    let key = b"\"user\":\"";
    let Some(at) = memmem::find(body, key) else { return usual };
    let value = &body[at + key.len()..];
    let end = memchr::memchr(b'"', value).unwrap_or_default();
    let Ok(value) = std::str::from_utf8(&value[..end]) else { return usual };
    let parts: Vec<&str> = value.split(':').collect();
    let number = |at: usize| parts.get(at).and_then(|part| part.parse::<u64>().ok());
    match (parts[0], number(1), number(2)) {
        ("size", Some(bytes), _) => Wanted::Json { bytes: bytes as usize },
        ("sse", Some(events), Some(every)) => {
            let usage = memmem::find(body, b"\"include_usage\":true").is_some();
            Wanted::Stream { events, every, usage }
        }
        _ => usual,
    }
}

/// A whole response: head, and a chat completion filled up to `bytes`.
pub fn json_answer(bytes: usize) -> Vec<u8> {
    let front = "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,\
        \"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\
        \"content\":\"";
    let back = "\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":9,\
        \"completion_tokens\":200,\"total_tokens\":209}}";
    let text = "x".repeat(bytes.saturating_sub(front.len() + back.len()));
    json(&format!("{front}{text}{back}"))
}

pub fn json(body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn chunk(body: &str) -> Vec<u8> {
    format!("{:x}\r\n{body}\r\n", body.len()).into_bytes()
}

/// Events as chunks, ready to be sent.
#[derive(Clone)]
pub struct Events {
    event: Vec<u8>,
    stamp: usize,
    end: Vec<u8>,
    end_with_usage: Vec<u8>,
}

impl Events {
    pub fn new() -> Events {
        let event = chunk(EVENT);
        let stamp = memmem::find(&event, STAMP).expect("it has a stamp") + STAMP.len();
        let end = [chunk(END), LAST_CHUNK.to_vec()].concat();
        let end_with_usage = [chunk(USAGE_EVENT), end.clone()].concat();
        Events { event, stamp, end, end_with_usage }
    }

    /// One that leaves now.
    pub fn stamped(&mut self, now: u64) -> &[u8] {
        let mut left = now;
        for digit in self.event[self.stamp..self.stamp + STAMP_DIGITS].iter_mut().rev() {
            *digit = b'0' + (left % 10) as u8;
            left /= 10;
        }
        &self.event
    }

    pub fn end(&self, usage: bool) -> &[u8] {
        if usage { &self.end_with_usage } else { &self.end }
    }
}

/// Calls `each` with the stamps in `bytes`, whose last event may be cut; says up to where all was
/// read.
pub fn stamps(bytes: &[u8], mut each: impl FnMut(u64)) -> usize {
    let mut read = 0;
    while let Some(at) = memmem::find(&bytes[read..], STAMP) {
        let from = read + at + STAMP.len();
        let Some(digits) = bytes.get(from..from + STAMP_DIGITS) else { return read + at };
        each(digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit.wrapping_sub(b'0'))));
        read = from + STAMP_DIGITS;
    }
    // Half a mark, or half of the last chunk, may be at the end.
    read.max(bytes.len().saturating_sub(LAST_CHUNK.len()))
}

/// Length of the head including its empty line, if it is whole.
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, b"\r\n\r\n").map(|at| at + 4)
}

/// `content-length` of a head; 0 without.
pub fn content_length(head: &[u8]) -> usize {
    let mut lines = head.split(|&byte| byte == b'\n');
    let length = lines.find_map(|line| {
        let (name, value) = line.split_at_checked(15)?;
        if !name.eq_ignore_ascii_case(b"content-length:") {
            return None;
        }
        std::str::from_utf8(value).ok()?.trim().parse().ok()
    });
    length.unwrap_or_default()
}

/// `HTTP/1.1 200 …` → 200; 0 for what is no answer.
pub fn status(head: &[u8]) -> u16 {
    let digits = head.get(9..12).and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or_default()
}
