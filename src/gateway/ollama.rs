//! What clients may tell an Ollama. Wharf alone says which of its models are loaded and for how long,
//! so a client's `keep_alive` is taken out, calls that only load or unload are refused, and `model`
//! becomes the name that Ollama knows. It reads the names of fields in any case (it is written in
//! Go): a second spelling would be another model than the one that was checked.

use bytes::Bytes;
use serde_json::value::RawValue;

use super::filter;
use super::parse;
use super::reject::Reject;
use crate::config::catalog::Filters;

const KEEP_ALIVE: &str = "keep_alive";
/// Paths of which a call without this field (or with an empty one) only loads or unloads.
const SAYS_SOMETHING: [(&str, &str); 2] = [("/api/generate", "prompt"), ("/api/chat", "messages")];

/// The body of a request to `path`, as Ollama shall get it.
pub fn guarded(body: Bytes, path: &str, served: &str) -> Result<Bytes, Reject> {
    if body.is_empty() {
        return Ok(body);
    }
    let asked = parse::parse_any(&body)?;
    let fields = filter::fields(&body)?;
    for (name, _) in &fields {
        let read_as = folded(name);
        if matches!(read_as.as_str(), "model" | KEEP_ALIVE) && *name != read_as {
            let message = format!("the field \"{name}\" must be written \"{read_as}\"");
            return Err(Reject::bad_request("invalid_json", message));
        }
    }
    let says = SAYS_SOMETHING.iter().find(|(known, _)| *known == path).map(|(_, field)| *field);
    if let Some(field) = says
        && !fields.iter().any(|(name, value)| name == field && !is_empty(value))
    {
        let message = format!(
            "without a \"{field}\" this only loads or unloads; Wharf does that itself: use \
             POST /models/{{name}}/load and /unload"
        );
        return Err(Reject::bad_request("field_missing", message).param(field));
    }
    // The name first: where it is missing (front doors), it is put in, and the rest can be stripped.
    let named = parse::apply(body.clone(), asked.rename(served).into_iter().collect());
    let strip = Filters { strip: vec![KEEP_ALIVE.to_owned()], ..Filters::default() };
    filter::apply(named, &strip)
}

/// As Go compares names of fields: two letters beyond ASCII are `k` and `s` in another case.
fn folded(name: &str) -> String {
    name.to_lowercase().replace('ſ', "s")
}

fn is_empty(value: &RawValue) -> bool {
    matches!(value.get(), "null" | "\"\"")
        || value.get().replace([' ', '\t', '\r', '\n'], "") == "[]"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(path: &str, body: &str) -> Result<String, String> {
        guarded(Bytes::copy_from_slice(body.as_bytes()), path, "qwen:7b")
            .map(|body| String::from_utf8(body.to_vec()).unwrap())
            .map_err(|reject| reject.problem().message.clone())
    }

    #[test]
    fn how_long_a_model_stays_is_not_the_clients_affair() {
        for (path, body, expected) in [
            (
                "/api/generate",
                r#"{"model":"qwen","prompt":"x","keep_alive":0}"#,
                r#"{"model":"qwen:7b","prompt":"x"}"#,
            ),
            (
                "/api/chat",
                r#"{"keep_alive":-1,"model":"qwen","messages":[{"role":"user"}]}"#,
                r#"{"model":"qwen:7b","messages":[{"role":"user"}]}"#,
            ),
            (
                "/api/embed",
                r#"{"model":"qwen:7b","keep\u005falive":"1h"}"#,
                r#"{"model":"qwen:7b"}"#,
            ),
            ("/api/embed", r#"{"keep_alive":0}"#, r#"{"model":"qwen:7b"}"#),
            ("/api/tags", "", ""),
        ] {
            assert_eq!(sent(path, body).as_deref(), Ok(expected), "{body}");
        }
    }

    #[test]
    fn a_call_that_only_loads_or_unloads_is_refused() {
        for (path, body) in [
            ("/api/generate", r#"{"model":"qwen","keep_alive":0}"#),
            ("/api/generate", r#"{"model":"qwen","prompt":"","keep_alive":0}"#),
            ("/api/generate", r#"{"model":"qwen","prompt":null}"#),
            ("/api/chat", r#"{"model":"qwen","messages":[ ]}"#),
            ("/api/chat", r#"{"model":"qwen"}"#),
        ] {
            let why = sent(path, body).unwrap_err();
            assert!(why.contains("POST /models/{name}/load"), "{body}: {why}");
        }
    }

    #[test]
    fn no_other_spelling_gets_past_the_check() {
        for body in [
            r#"{"model":"qwen","MODEL":"secret","prompt":"x"}"#,
            r#"{"model":"qwen","Keep_Alive":0,"prompt":"x"}"#,
            "{\"model\":\"qwen\",\"\u{212a}eep_alive\":0,\"prompt\":\"x\"}",
            r#"{"model":"qwen","\u212aeep_alive":0,"prompt":"x"}"#,
            r#"{"model":"qwen","keep_alive":0,"keep_alive":0,"prompt":"x"}"#,
            r#"[{"model":"qwen"}]"#,
            "\u{28}\u{b5}\u{2f}\u{fd}",
        ] {
            assert!(sent("/api/generate", body).is_err(), "{body}");
        }
    }
}
