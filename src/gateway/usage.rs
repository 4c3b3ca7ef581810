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
            self.early = last_value(&first, &USAGE);
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
        let usage = last_value(&self.tail, &USAGE).or(self.early);
        figures(usage, last_value(&self.tail, &TIMINGS))
    }
}

/// The value after the last `"key":` that parses. Text inside of JSON strings cannot be mistaken
/// for it: there every quote is escaped.
fn last_value<T: serde::de::DeserializeOwned>(text: &[u8], key: &Finder<'_>) -> Option<T> {
    let mut end = text.len();
    // Forward, as that is many times as fast a search: there are few of them.
    while let Some(at) = key.find_iter(&text[..end]).last() {
        let rest = text[at + key.needle().len()..].trim_ascii_start();
        if let Some(value) = rest.strip_prefix(b":") {
            let parsed = serde_json::Deserializer::from_slice(value).into_iter::<T>().next();
            if let Some(Ok(value)) = parsed {
                return Some(value);
            }
        }
        end = at;
    }
    None
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &str = ": ping\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"say \\\"usage\\\": 1\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{}}],\"usage\":null}\r\n\r\n\
        data: {\"id\":1,\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":7}}\n\n\
        data: [DONE]\n\n";

    fn pass(meter: &mut Meter, parts: &[&[u8]]) -> String {
        let mut out = VecDeque::new();
        for part in parts {
            meter.feed(Bytes::copy_from_slice(part), &mut out);
        }
        meter.finish(&mut out);
        let all: Vec<u8> = out.into_iter().flatten().collect();
        String::from_utf8(all).unwrap()
    }

    fn counted(prompt: u64, completion: u64) -> Option<Figures> {
        let (prompt, completion) = (Some(prompt), Some(completion));
        Some(Figures { prompt, completion, ..Figures::default() })
    }

    fn without_usage() -> String {
        let from = STREAM.find("data: {\"id\"").unwrap();
        let to = STREAM.find("data: [DONE]").unwrap();
        format!("{}{}", &STREAM[..from], &STREAM[to..])
    }

    proptest! {
        #[test]
        fn the_usage_event_goes_however_the_stream_is_cut(cuts in prop::collection::vec(0..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.sort_unstable();
            let mut parts = Vec::new();
            let mut from = 0;
            for cut in cuts {
                parts.push(&STREAM.as_bytes()[from..cut]);
                from = cut;
            }
            parts.push(&STREAM.as_bytes()[from..]);

            let mut meter = Meter::events(true);
            prop_assert_eq!(pass(&mut meter, &parts), without_usage());
            prop_assert_eq!(meter.figures(), counted(5, 7));

            let mut meter = Meter::events(false);
            prop_assert_eq!(pass(&mut meter, &parts), STREAM);
            prop_assert_eq!(meter.figures(), counted(5, 7));
        }
    }

    #[test]
    fn a_frame_of_whole_events_passes_uncopied() {
        let frame = Bytes::from_static(b"data: {\"choices\":[1]}\n\ndata: x\n\n");
        let mut out = VecDeque::new();
        Meter::events(true).feed(frame.clone(), &mut out);
        assert_eq!(out.len(), 1);
        assert_eq!(out[0].as_ptr(), frame.as_ptr());
    }

    #[test]
    fn events_beyond_the_bound_pass_in_parts() {
        let long = format!("data: {}", "x".repeat(EVENT_BYTES_MAX + 10));
        let mut meter = Meter::events(true);
        let mut out = VecDeque::new();
        meter.feed(Bytes::from(long.clone()), &mut out);
        assert!(!out.is_empty(), "nothing is held for ever");
        meter.feed(Bytes::from_static(b"yy\n"), &mut out);
        meter.feed(Bytes::from_static(b"\ndata: b\n\n"), &mut out);
        meter.finish(&mut out);
        let all: Vec<u8> = out.into_iter().flatten().collect();
        assert_eq!(all, format!("{long}yy\n\ndata: b\n\n").into_bytes());
    }

    fn of_json(parts: &[&[u8]]) -> Option<Figures> {
        let mut meter = Meter::json();
        pass(&mut meter, parts);
        meter.figures()
    }

    #[test]
    fn tokens_of_json_answers() {
        let found = counted(3, 4);
        let body =
            br#"{"x":"\"usage\": {}","usage": {"prompt_tokens":3,"completion_tokens":4},"y":null}"#;
        assert_eq!(of_json(&[body]), found);
        assert_eq!(of_json(&[&vec![b' '; 5000], &body[..30], &body[30..]]), found);
        assert_eq!(of_json(&[br#"{"usage":{"input_tokens":3,"output_tokens":4}}"#]), found);
        assert_eq!(of_json(&[br#"{"usage":{"prompt_tokens":3,"comp"#]), None);
        assert_eq!(of_json(&[br#"{"choices":[]}"#]), None);
        let embeddings = Figures { completion: None, ..found.unwrap() };
        assert_eq!(of_json(&[br#"{"data":[],"usage":{"prompt_tokens":3}}"#]), Some(embeddings));
    }

    #[test]
    fn usage_before_a_long_list_of_numbers_is_found() {
        // As llama.cpp answers /v1/embeddings.
        let head = br#"{"model":"m","object":"list","usage":{"prompt_tokens":6,"total_tokens":6},"data":["#;
        let numbers = b"0.12345678,".repeat(1000);
        let expected = Some(Figures { prompt: Some(6), ..Figures::default() });
        let whole = [head.as_slice(), &numbers].concat();
        assert_eq!(of_json(&[&whole]), expected);
        let parts: Vec<&[u8]> = whole.chunks(1500).collect();
        assert_eq!(of_json(&parts), expected);
    }

    #[test]
    fn tokens_of_other_streams() {
        for event in [
            r#"data: {"choices":[{"finish_reason":"stop"}],"timings":{"prompt_n":5,"predicted_n":7}}"#,
            r#"data: {"type":"response.completed","response":{"usage":{"input_tokens":5,"output_tokens":7}}}"#,
            r#"data: {"message":"done","usage":{"input_tokens":5,"output_tokens":7}}"#,
        ] {
            let mut meter = Meter::events(true);
            let text = format!("event: x\n{event}\n\n");
            assert_eq!(pass(&mut meter, &[text.as_bytes()]), text);
            assert_eq!(meter.figures(), counted(5, 7), "{event}");
        }
    }

    /// As recorded from the Anthropic API.
    const MESSAGES: &str = r#"event: message_start
data: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","content":[],"model":"m","stop_reason":null,"usage":{"input_tokens":25,"cache_creation_input_tokens":5,"cache_read_input_tokens":10,"output_tokens":1}}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":15}}

event: message_stop
data: {"type":"message_stop"}

"#;

    #[test]
    fn anthropic_streams_are_counted_from_their_first_and_last_events() {
        for size in [1, 7, 100, MESSAGES.len()] {
            let mut meter = Meter::events(false);
            let parts: Vec<&[u8]> = MESSAGES.as_bytes().chunks(size).collect();
            assert_eq!(pass(&mut meter, &parts), MESSAGES);
            let expected = Figures {
                prompt: Some(40),
                cached: Some(10),
                completion: Some(15),
                ..Figures::default()
            };
            assert_eq!(meter.figures(), Some(expected));
        }
    }
}
