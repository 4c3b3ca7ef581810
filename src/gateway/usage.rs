//! Token counts, read in passing: from the last part of a JSON answer, or from the events of a
//! stream. Also takes out of a stream the usage event that only Wharf asked for.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;

/// Engines write usage near the end of an answer.
const TAIL_BYTES: usize = 4096;
/// An event longer than this is passed on in parts and not looked into.
const EVENT_BYTES_MAX: usize = 1 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    pub prompt: u64,
    pub completion: u64,
}

/// The names of the OpenAI API, old and new.
#[derive(Deserialize)]
struct Usage {
    #[serde(alias = "input_tokens")]
    prompt_tokens: Option<u64>,
    #[serde(alias = "output_tokens")]
    completion_tokens: Option<u64>,
}

/// llama.cpp's own figures, in the last event of every stream.
#[derive(Deserialize)]
struct Timings {
    prompt_n: Option<u64>,
    cache_n: Option<u64>,
    predicted_n: Option<u64>,
}

impl From<Usage> for Tokens {
    fn from(usage: Usage) -> Tokens {
        Tokens {
            prompt: usage.prompt_tokens.unwrap_or(0),
            completion: usage.completion_tokens.unwrap_or(0),
        }
    }
}

impl From<Timings> for Tokens {
    fn from(timings: Timings) -> Tokens {
        Tokens {
            prompt: timings.prompt_n.unwrap_or(0) + timings.cache_n.unwrap_or(0),
            completion: timings.predicted_n.unwrap_or(0),
        }
    }
}

/// Finds the token counts of an answer that passes through.
#[derive(Debug)]
pub enum Meter {
    /// Not looked into (compressed).
    Blind,
    Json(Tail),
    Events(Events),
}

impl Meter {
    pub fn json() -> Meter {
        Meter::Json(Tail::default())
    }

    /// `remove`: the usage event is ours and must not reach the client.
    pub fn events(remove: bool) -> Meter {
        Meter::Events(Events { remove, ..Events::default() })
    }

    /// Passes `data` on to `out`, as it came wherever possible.
    pub fn feed(&mut self, data: Bytes, out: &mut VecDeque<Bytes>) {
        match self {
            Meter::Blind => out.push_back(data),
            Meter::Json(tail) => {
                tail.keep(&data);
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

    pub fn tokens(&self) -> Option<Tokens> {
        match self {
            Meter::Blind => None,
            Meter::Json(tail) => tail.tokens(),
            Meter::Events(events) => events.tokens,
        }
    }
}

/// The last bytes of an answer.
#[derive(Debug, Default)]
pub struct Tail(Vec<u8>);

impl Tail {
    fn keep(&mut self, data: &[u8]) {
        if data.len() >= TAIL_BYTES {
            self.0.clear();
            self.0.extend_from_slice(&data[data.len() - TAIL_BYTES..]);
            return;
        }
        let surplus = (self.0.len() + data.len()).saturating_sub(TAIL_BYTES);
        self.0.drain(..surplus);
        self.0.extend_from_slice(data);
    }

    fn tokens(&self) -> Option<Tokens> {
        last_value::<Usage>(&self.0, b"\"usage\"")
            .map(Tokens::from)
            .or_else(|| last_value::<Timings>(&self.0, b"\"timings\"").map(Tokens::from))
    }
}

/// The value after the last `"key":` that parses. Text inside of JSON strings cannot be mistaken
/// for it: there every quote is escaped.
fn last_value<T: serde::de::DeserializeOwned>(text: &[u8], key: &[u8]) -> Option<T> {
    let mut end = text.len();
    while let Some(at) = rfind(&text[..end], key) {
        let rest = text[at + key.len()..].trim_ascii_start();
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

fn rfind(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).rposition(|window| window == part)
}

/// Cuts a stream into events. A frame that ends with an event (the usual case) passes uncopied;
/// the beginning of an event waits for its end, so that one can be taken out whole.
#[derive(Debug, Default)]
pub struct Events {
    remove: bool,
    partial: BytesMut,
    /// Inside an event that is too long to be held.
    overlong: bool,
    tokens: Option<Tokens>,
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
        while let Some(end) = event_end(&data, from) {
            if self.is_ours(&data[from..end]) {
                push(out, data.slice(keep_from..from));
                keep_from = end;
            }
            from = end;
        }
        push(out, data.slice(keep_from..from));
        if from < data.len() {
            self.partial.extend_from_slice(&data[from..]);
            self.release_overlong(out);
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
        let event = self.partial.split().freeze();
        if self.overlong || !self.is_ours(&event) {
            push(out, event);
        }
        self.overlong = false;
        Some(data.split_off(used))
    }

    fn release_overlong(&mut self, out: &mut VecDeque<Bytes>) {
        if self.partial.len() > EVENT_BYTES_MAX {
            // Three bytes stay: the blank line that ends the event may be half there.
            let pass = self.partial.len() - 3;
            push(out, self.partial.split_to(pass).freeze());
            self.overlong = true;
        }
    }

    fn flush(&mut self, out: &mut VecDeque<Bytes>) {
        let rest = self.partial.split().freeze();
        if self.overlong || !self.is_ours(&rest) {
            push(out, rest);
        }
        self.overlong = false;
    }

    /// Reads the event's usage; true if the event is to be taken out.
    fn is_ours(&mut self, event: &[u8]) -> bool {
        let usage = rfind(event, b"\"usage\"").is_some();
        if !usage && rfind(event, b"\"timings\"").is_none() {
            return false;
        }
        let Some(data) = event_data(event) else { return false };
        let Ok(chunk) = serde_json::from_slice::<Chunk>(data) else { return false };
        let usage = chunk.usage.or(chunk.response.and_then(|response| response.usage));
        let found = usage.is_some();
        let tokens = usage.map(Tokens::from).or(chunk.timings.map(Tokens::from));
        self.tokens = tokens.or(self.tokens);
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
}

#[derive(Deserialize)]
struct Whole {
    usage: Option<Usage>,
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
    while let Some(offset) = data[at..].iter().position(|&byte| byte == b'\n' || byte == b'\r') {
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
            prop_assert_eq!(meter.tokens(), Some(Tokens { prompt: 5, completion: 7 }));

            let mut meter = Meter::events(false);
            prop_assert_eq!(pass(&mut meter, &parts), STREAM);
            prop_assert_eq!(meter.tokens(), Some(Tokens { prompt: 5, completion: 7 }));
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

    #[test]
    fn tokens_of_json_answers() {
        let tokens = |parts: &[&[u8]]| {
            let mut meter = Meter::json();
            pass(&mut meter, parts);
            meter.tokens()
        };
        let found = Some(Tokens { prompt: 3, completion: 4 });
        let body =
            br#"{"x":"\"usage\": {}","usage": {"prompt_tokens":3,"completion_tokens":4},"y":null}"#;
        assert_eq!(tokens(&[body]), found);
        assert_eq!(tokens(&[&vec![b' '; 5000], &body[..30], &body[30..]]), found);
        assert_eq!(tokens(&[br#"{"usage":{"input_tokens":3,"output_tokens":4}}"#]), found);
        assert_eq!(tokens(&[br#"{"timings":{"cache_n":1,"prompt_n":2,"predicted_n":4}}"#]), found);
        assert_eq!(tokens(&[br#"{"usage":{"prompt_tokens":3,"comp"#]), None);
        assert_eq!(tokens(&[br#"{"choices":[]}"#]), None);
    }

    #[test]
    fn tokens_of_other_streams() {
        for event in [
            r#"data: {"choices":[{"finish_reason":"stop"}],"timings":{"prompt_n":5,"predicted_n":7}}"#,
            r#"data: {"type":"response.completed","response":{"usage":{"input_tokens":5,"output_tokens":7}}}"#,
        ] {
            let mut meter = Meter::events(true);
            let text = format!("event: x\n{event}\n\n");
            assert_eq!(pass(&mut meter, &[text.as_bytes()]), text);
            assert_eq!(meter.tokens(), Some(Tokens { prompt: 5, completion: 7 }), "{event}");
        }
    }
}
