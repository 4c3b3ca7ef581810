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
fn the_usage_event_goes_from_a_stream_that_is_here_whole() {
    for (remove, expected) in [(true, without_usage()), (false, STREAM.to_owned())] {
        let (all, figures) = Meter::events(remove).whole(Bytes::from_static(STREAM.as_bytes()));
        assert_eq!((all, figures), (Bytes::from(expected), counted(5, 7)));
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
    let whole = Meter::json().whole(parts.concat().into());
    assert_eq!(whole, (parts.concat().into(), meter.figures()));
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
    let head =
        br#"{"model":"m","object":"list","usage":{"prompt_tokens":6,"total_tokens":6},"data":["#;
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
