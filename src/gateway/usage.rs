//! Token counts, read in passing: from the last part of a JSON answer, or from the events of a
//! stream. Also takes out of a stream the usage event that only Wharf asked for.

use std::collections::VecDeque;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;
use serde::Deserialize;

use super::figures::{Figures, Timings, Usage, figures};

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));
static TIMINGS: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"timings\""));

/// Engines write usage near the end of an answer.
const TAIL_BYTES: usize = 4096;
/// Of the beginning, which is looked at where the end of an answer is not all of it.
const HEAD_BYTES: usize = 1024;
/// Of an event that has not ended: every stream may hold so much,
const EVENT_BYTES_USUAL: usize = 16 << 10;
/// and this many streams at once so much (the last event of `/v1/responses` holds the whole
/// answer). What is longer is passed on in parts and not looked into.
const EVENT_BYTES_MAX: usize = 1 << 20;
const LONG_EVENTS_MAX: usize = 32;

/// Long events that are held now, by all streams: without a common bound each of thousands of
/// streams could hold its maximum.
static LONG_EVENTS: AtomicUsize = AtomicUsize::new(0);

/// Leave to hold a long event.
#[derive(Debug)]
struct LongEvent;

impl LongEvent {
    fn begin() -> Option<LongEvent> {
        if LONG_EVENTS.fetch_add(1, Ordering::Relaxed) >= LONG_EVENTS_MAX {
            LONG_EVENTS.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(LongEvent)
    }
}

impl Drop for LongEvent {
    fn drop(&mut self) {
        LONG_EVENTS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Finds the token counts of an answer that passes through.
#[derive(Debug)]
pub enum Meter {
    /// Not looked into (compressed).
    Blind,
    Json(Ends),
    Events(Events),
}

impl Meter {
    pub fn json() -> Meter {
        Meter::Json(Ends::default())
    }

    /// `remove`: the usage event is ours and must not reach the client.
    pub fn events(remove: bool) -> Meter {
        Meter::Events(Events { remove, ..Events::default() })
    }

    /// Passes `data` on to `out`, as it came wherever possible.
    pub fn feed(&mut self, data: Bytes, out: &mut VecDeque<Bytes>) {
        match self {
            Meter::Blind => out.push_back(data),
            Meter::Json(ends) => {
                ends.keep(&data);
                out.push_back(data);
            }
            Meter::Events(events) => events.feed(data, out),
        }
    }

    /// As `feed` and `finish`, of an answer that is here whole: what passes on, and its figures.
    pub fn whole(mut self, all: Bytes) -> (Bytes, Option<Figures>) {
        match &mut self {
            Meter::Blind => (all, None),
            Meter::Json(_) => {
                let early = (all.len() > TAIL_BYTES)
                    .then(|| last_value(&all[..HEAD_BYTES], &USAGE, read_usage))
                    .flatten();
                let figures = figures_in(&all[all.len().saturating_sub(TAIL_BYTES)..], early);
                (all, figures)
            }
            Meter::Events(events) => {
                let mut parts = VecDeque::new();
                events.feed(all, &mut parts);
                events.flush(&mut parts);
                (joined(parts), self.figures())
            }
        }
    }

    /// The stream ended by itself.
    pub fn finish(&mut self, out: &mut VecDeque<Bytes>) {
        if let Meter::Events(events) = self {
            events.flush(out);
        }
    }

    pub fn figures(&self) -> Option<Figures> {
        match self {
            Meter::Blind => None,
            Meter::Json(ends) => ends.figures(),
            Meter::Events(events) => figures(events.usage, events.timings),
        }
    }
}

/// The last bytes of an answer, and what its first ones told.
#[derive(Debug, Default)]
pub struct Ends {
    /// Of an answer in one piece, that piece.
    tail: Bytes,
    /// llama.cpp writes the usage of embeddings and rankings before their numbers.
    early: Option<Usage>,
    looked: bool,
}

impl Ends {
    fn keep(&mut self, data: &Bytes) {
        let surplus = (self.tail.len() + data.len()).saturating_sub(TAIL_BYTES);
        if surplus > 0 && !self.looked {
            self.looked = true;
            let first: Vec<u8> =
                self.tail.iter().chain(data.iter()).copied().take(HEAD_BYTES).collect();
            self.early = last_value(&first, &USAGE, read_usage);
        }
        self.tail = if surplus == 0 && self.tail.is_empty() {
            data.clone()
        } else {
            let from = surplus.min(self.tail.len());
            let (before, now) = (&self.tail[from..], &data[surplus - from..]);
            [before, now].concat().into()
        };
    }

    fn figures(&self) -> Option<Figures> {
        figures_in(&self.tail, self.early)
    }
}

/// `early`: what the first bytes of the answer told, if `tail` is not all of it.
fn figures_in(tail: &[u8], early: Option<Usage>) -> Option<Figures> {
    let usage = last_value(tail, &USAGE, read_usage).or(early);
    figures(usage, last_value(tail, &TIMINGS, first_value))
}

fn joined(mut parts: VecDeque<Bytes>) -> Bytes {
    if parts.len() <= 1 {
        return parts.pop_front().unwrap_or_default();
    }
    let mut all = Vec::with_capacity(parts.iter().map(Bytes::len).sum());
    parts.iter().for_each(|part| all.extend_from_slice(part));
    all.into()
}

/// The value after the last `"key":` that parses. Text inside of JSON strings cannot be mistaken
/// for it: there every quote is escaped.
fn last_value<T>(text: &[u8], key: &Finder<'_>, read: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    let mut end = text.len();
    // Forward, as that is many times as fast a search: there are few of them.
    while let Some(at) = key.find_iter(&text[..end]).last() {
        let rest = text[at + key.needle().len()..].trim_ascii_start();
        if let Some(value) = rest.strip_prefix(b":").and_then(|rest| read(rest.trim_ascii_start()))
        {
            return Some(value);
        }
        end = at;
    }
    None
}

fn read_usage(text: &[u8]) -> Option<Usage> {
    Usage::usual(text).or_else(|| first_value(text))
}

fn first_value<T: serde::de::DeserializeOwned>(text: &[u8]) -> Option<T> {
    serde_json::Deserializer::from_slice(text).into_iter().next()?.ok()
}

/// Cuts a stream into events. A frame that ends with an event (the usual case) passes uncopied;
/// the beginning of an event waits for its end, so that one can be taken out whole.
#[derive(Debug, Default)]
pub struct Events {
    remove: bool,
    partial: BytesMut,
    /// Inside an event that is too long to be held.
    overlong: bool,
    /// While `partial` is longer than usual.
    long: Option<LongEvent>,
    usage: Option<Usage>,
    timings: Option<Timings>,
}

impl Events {
    fn feed(&mut self, mut data: Bytes, out: &mut VecDeque<Bytes>) {
        if !self.partial.is_empty() || self.overlong {
            data = match self.complete(data, out) {
                Some(rest) => rest,
                None => return,
            };
        }
        let mut from = 0;
        let mut keep_from = 0;
        // Most events hold neither word, and are searched in one go.
        let mut words = [&*USAGE, &*TIMINGS].map(|word| (word, next(word, &data, 0)));
        while let Some(end) = event_end(&data, from) {
            let mut tells = false;
            for (word, at) in words.iter_mut().filter(|(_, at)| *at < end) {
                tells = true;
                *at = next(word, &data, end);
            }
            if tells && self.is_ours(&data[from..end]) {
                push(out, data.slice(keep_from..from));
                keep_from = end;
            }
            from = end;
        }
        if from < data.len() {
            push(out, data.slice(keep_from..from));
            self.partial.extend_from_slice(&data[from..]);
            self.release_overlong(out);
        } else {
            push(out, data.split_off(keep_from));
        }
    }

    /// Adds to the event under way; what is left of `data` after its end.
    fn complete(&mut self, mut data: Bytes, out: &mut VecDeque<Bytes>) -> Option<Bytes> {
        // The blank line may lie across the border of two frames: look again at the last bytes.
        let from = self.partial.len().saturating_sub(3);
        let before = self.partial.len();
        self.partial.extend_from_slice(&data);
        let Some(end) = event_end(&self.partial, from) else {
            self.release_overlong(out);
            return None;
        };
        // `end` lies in the new part: else the event had ended before.
        let used = end.saturating_sub(before).min(data.len());
        self.partial.truncate(end);
        let event = self.take_partial();
        if self.overlong || !self.is_ours(&event) {
            push(out, event);
        }
        self.overlong = false;
        Some(data.split_off(used))
    }

    fn release_overlong(&mut self, out: &mut VecDeque<Bytes>) {
        let length = self.partial.len();
        if length <= EVENT_BYTES_USUAL {
            return;
        }
        if !self.overlong && self.long.is_none() {
            self.long = LongEvent::begin();
        }
        if self.long.is_none() || length > EVENT_BYTES_MAX {
            // Three bytes stay: the blank line that ends the event may be half there.
            let event = self.take_partial();
            self.partial.extend_from_slice(&event[length - 3..]);
            push(out, event.slice(..length - 3));
            self.overlong = true;
        }
    }

    /// With its memory, which a part of it would keep.
    fn take_partial(&mut self) -> Bytes {
        self.long = None;
        std::mem::take(&mut self.partial).freeze()
    }

    fn flush(&mut self, out: &mut VecDeque<Bytes>) {
        let rest = self.take_partial();
        if self.overlong || !self.is_ours(&rest) {
            push(out, rest);
        }
        self.overlong = false;
    }

    /// Reads the event's usage; true if the event is to be taken out.
    fn is_ours(&mut self, event: &[u8]) -> bool {
        if USAGE.find(event).is_none() && TIMINGS.find(event).is_none() {
            return false;
        }
        let Some(data) = event_data(event) else { return false };
        let Ok(chunk) = serde_json::from_slice::<Chunk>(data) else { return false };
        let wrapped = chunk.response.or(chunk.message.and_then(Message::whole));
        let usage = chunk.usage.or(wrapped.and_then(|whole| whole.usage));
        let found = usage.is_some();
        if let Some(usage) = usage {
            self.usage.get_or_insert_default().absorb(usage);
        }
        self.timings = chunk.timings.or(self.timings);
        self.remove && found && chunk.choices.is_some_and(|choices| choices.is_empty())
    }
}

#[derive(Deserialize)]
struct Chunk {
    choices: Option<Vec<serde::de::IgnoredAny>>,
    usage: Option<Usage>,
    timings: Option<Timings>,
    /// `/v1/responses` wraps the whole answer in its last event.
    response: Option<Whole>,
    /// And so does `/v1/messages` in its first.
    message: Option<Message>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Whole(Whole),
    Other(serde::de::IgnoredAny),
}

impl Message {
    fn whole(self) -> Option<Whole> {
        match self {
            Message::Whole(whole) => Some(whole),
            Message::Other(_) => None,
        }
    }
}

#[derive(Deserialize)]
struct Whole {
    usage: Option<Usage>,
}

/// Where a word is next; the end of `data` if it is not there.
fn next(word: &Finder<'_>, data: &[u8], from: usize) -> usize {
    word.find(&data[from..]).map_or(data.len(), |at| from + at)
}

fn push(out: &mut VecDeque<Bytes>, data: Bytes) {
    if !data.is_empty() {
        out.push_back(data);
    }
}

/// End (exclusive) of the first event at or after `from`: behind its blank line, of which a part
/// may lie at `from`.
fn event_end(data: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    while let Some(offset) = memchr::memchr2(b'\n', b'\r', &data[at..]) {
        let line_end = at + offset;
        let rest = &data[line_end..];
        for blank in [&b"\n\n"[..], b"\r\n\r\n", b"\r\r"] {
            if rest.starts_with(blank) {
                return Some(line_end + blank.len());
            }
        }
        at = line_end + 1;
    }
    None
}

/// The content of the event's one `data:` line; events of several are not ours.
fn event_data(event: &[u8]) -> Option<&[u8]> {
    let mut lines = event.split(|&byte| byte == b'\n' || byte == b'\r');
    let first = lines.by_ref().find_map(|line| line.strip_prefix(b"data:"))?;
    lines.all(|line| !line.starts_with(b"data:")).then_some(first.trim_ascii())
}

#[cfg(test)]
mod tests;
