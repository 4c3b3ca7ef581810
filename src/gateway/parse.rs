//! What of a JSON body decides the way of a request, and the few bytes that may be rewritten.
//!
//! The body is never re-serialised: edits replace spans, every other byte stays as the client
//! wrote it.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::de::{self, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::reject::Reject;

/// Longer names are cut in messages.
pub const NAME_SHOWN_MAX: usize = 128;

#[derive(Debug)]
pub struct Asked<'a> {
    pub model: Cow<'a, str>,
    pub stream: bool,
    /// Where the name stands in the body.
    model_at: Range<usize>,
    spelling: Spelling,
    is_text: bool,
    stream_options: Option<&'a RawValue>,
}

/// How a name is written in the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    Json,
    Plain,
    /// Nowhere: the field is added, with a comma if others follow.
    Absent {
        alone: bool,
    },
}

/// Only these fields are read; a second one of the same name is refused.
#[derive(Default)]
struct Fields<'a> {
    model: Option<&'a RawValue>,
    stream: Option<bool>,
    stream_options: Option<&'a RawValue>,
}

enum Field {
    Model,
    Stream,
    StreamOptions,
    Other,
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Field, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Field;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Field, E> {
                match name {
                    "model" => Ok(Field::Model),
                    "stream" => Ok(Field::Stream),
                    "stream_options" => Ok(Field::StreamOptions),
                    // Servers written in Go take it for `model`, and of two the last one.
                    name if name.eq_ignore_ascii_case("model") => {
                        Err(E::custom(format!("the field `{name}` must be written `model`")))
                    }
                    _ => Ok(Field::Other),
                }
            }
        }
        source.deserialize_identifier(Name)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Fields<'a>, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Fields::default();
                let mut has_stream = false;
                // `null` counts as present: an edit must not add the key a second time.
                while let Some(field) = map.next_key()? {
                    let twice = match field {
                        Field::Model => fields.model.replace(map.next_value()?).map(|_| "model"),
                        Field::Stream => {
                            fields.stream = map.next_value()?;
                            std::mem::replace(&mut has_stream, true).then_some("stream")
                        }
                        Field::StreamOptions => fields
                            .stream_options
                            .replace(map.next_value()?)
                            .map(|_| "stream_options"),
                        Field::Other => {
                            map.next_value::<IgnoredAny>()?;
                            None
                        }
                    };
                    if let Some(name) = twice {
                        return Err(de::Error::duplicate_field(name));
                    }
                }
                Ok(fields)
            }
        }
        source.deserialize_map(Object)
    }
}

#[derive(Deserialize)]
struct StreamOptions<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    include_usage: Option<&'a RawValue>,
}

/// `null` counts as present: an edit must not add the key a second time.
fn present<'de, D: Deserializer<'de>>(source: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(source).map(Some)
}

pub fn parse(body: &[u8]) -> Result<Asked<'_>, Reject> {
    let asked = parse_any(body)?;
    match asked.spelling {
        Spelling::Absent { .. } => Err(model_missing()),
        _ if asked.model.is_empty() && !asked.is_text => {
            let message = "the field \"model\" must be a string";
            Err(Reject::bad_request("model_invalid", message).param("model"))
        }
        _ if asked.model.is_empty() => Err(model_missing()),
        _ => Ok(asked),
    }
}

/// Where the model is known beforehand: the field may be missing or hold anything.
pub fn parse_any(body: &[u8]) -> Result<Asked<'_>, Reject> {
    // serde would also fill the struct from an array.
    match body.trim_ascii_start().first() {
        Some(b'{') => {}
        Some(_) => return Err(invalid("the request body must be a JSON object")),
        None => return Err(invalid("the request body is empty; send a JSON object")),
    }
    let fields: Fields =
        serde_json::from_slice(body).map_err(|e| invalid(format!("the body is not valid: {e}")))?;
    let stream = fields.stream.unwrap_or(false);
    let mut asked = match fields.model {
        Some(raw) => {
            let name = string(raw);
            let is_text = name.is_some();
            let asked =
                Asked::new(name.unwrap_or_default(), stream, span(body, raw), Spelling::Json);
            Asked { is_text, ..asked }
        }
        None => {
            let open = body.iter().position(|&byte| byte == b'{').map_or(0, |at| at + 1);
            let alone = body[open..].trim_ascii_start().starts_with(b"}");
            Asked::new(Cow::Borrowed(""), stream, open..open, Spelling::Absent { alone })
        }
    };
    asked.stream_options = fields.stream_options;
    Ok(asked)
}

pub fn model_missing() -> Reject {
    let message = "the field \"model\" is missing or empty; GET /v1/models lists the names";
    Reject::bad_request("model_missing", message).param("model")
}

pub fn invalid(message: impl Into<String>) -> Reject {
    Reject::bad_request("invalid_json", message)
}

/// Borrowed where nothing is escaped.
fn string(raw: &RawValue) -> Option<Cow<'_, str>> {
    let inside = raw.get().strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    if let Some(plain) = inside.filter(|text| !text.contains('\\')) {
        return Some(Cow::Borrowed(plain));
    }
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    serde_json::from_str::<Text>(raw.get()).ok().map(|text| text.0)
}

#[derive(Debug, PartialEq)]
pub struct Edit {
    pub at: Range<usize>,
    pub with: String,
}

impl<'a> Asked<'a> {
    pub fn new(
        model: Cow<'a, str>,
        stream: bool,
        model_at: Range<usize>,
        spelling: Spelling,
    ) -> Asked<'a> {
        Asked { model, stream, model_at, spelling, is_text: true, stream_options: None }
    }

    /// Replaces the value of `model` if the engine knows the model under another name.
    pub fn rename(&self, served: &str) -> Option<Edit> {
        let with = || match self.spelling {
            Spelling::Json => serde_json::Value::from(served).to_string(),
            Spelling::Plain => served.to_owned(),
            Spelling::Absent { alone } => {
                let comma = if alone { "" } else { "," };
                format!("\"model\":{}{comma}", serde_json::Value::from(served))
            }
        };
        (self.model != served).then(|| Edit { at: self.model_at.clone(), with: with() })
    }

    /// Asks for the usage chunk at the end of a stream; `None` if the client did so itself, or
    /// sent something the engine shall judge.
    pub fn include_usage(&self, body: &[u8]) -> Option<Edit> {
        let Some(options) = self.stream_options else {
            let open = body.iter().position(|&byte| byte == b'{')? + 1;
            // `model` is there, so the object is not empty and the comma is right.
            let with = r#""stream_options":{"include_usage":true},"#.to_owned();
            return Some(Edit { at: open..open, with });
        };
        let at = span(body, options);
        if options.get() == "null" {
            return Some(Edit { at, with: r#"{"include_usage":true}"#.to_owned() });
        }
        let parsed: StreamOptions = serde_json::from_str(options.get()).ok()?;
        if !options.get().starts_with('{') {
            return None;
        }
        match parsed.include_usage {
            Some(value) if matches!(value.get(), "false" | "null") => {
                Some(Edit { at: span(body, value), with: "true".to_owned() })
            }
            Some(_) => None,
            None => {
                let empty = options.get()[1..].trim_start().starts_with('}');
                let comma = if empty { "" } else { "," };
                let open = at.start + 1;
                Some(Edit { at: open..open, with: format!(r#""include_usage":true{comma}"#) })
            }
        }
    }
}

/// Where a value borrowed from `body` lies in it.
pub fn span(body: &[u8], raw: &RawValue) -> Range<usize> {
    let start = raw.get().as_ptr().addr() - body.as_ptr().addr();
    start..start + raw.get().len()
}

/// Applies edits that do not overlap.
pub fn apply(body: Bytes, mut edits: Vec<Edit>) -> Bytes {
    if edits.is_empty() {
        return body;
    }
    // What is inserted at the beginning of a replaced span comes before it.
    edits.sort_by_key(|edit| (edit.at.start, edit.at.end));
    let added: usize = edits.iter().map(|edit| edit.with.len()).sum();
    let mut out = Vec::with_capacity(body.len() + added);
    let mut from = 0;
    for edit in edits {
        out.extend_from_slice(&body[from..edit.at.start]);
        out.extend_from_slice(edit.with.as_bytes());
        from = edit.at.end;
    }
    out.extend_from_slice(&body[from..]);
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renamed(body: &'static str, served: &str) -> String {
        let asked = parse(body.as_bytes()).unwrap();
        let edits = asked.rename(served).into_iter().collect();
        String::from_utf8(apply(Bytes::from_static(body.as_bytes()), edits).to_vec()).unwrap()
    }

    fn with_usage(body: &'static str) -> Option<String> {
        let asked = parse(body.as_bytes()).unwrap();
        let edit = asked.include_usage(body.as_bytes())?;
        let bytes = apply(Bytes::from_static(body.as_bytes()), vec![edit]);
        // It must still be what it was, plus usage.
        let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["stream_options"]["include_usage"], true, "{body}");
        Some(String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[test]
    fn escaped_names_are_read_as_what_they_mean() {
        let asked = parse(br#"{"model":"mis\u0074ral","stream":true}"#).unwrap();
        assert_eq!(asked.model, "mistral");
        assert!(asked.stream);
        let plain = parse(br#" {"stream":null,"model":"a/b:c"}"#).unwrap();
        assert!(matches!(plain.model, Cow::Borrowed("a/b:c")));
        assert!(!plain.stream);
    }

    #[test]
    fn only_the_value_of_model_is_replaced() {
        assert_eq!(
            renamed("{ \"x\": 1.50,\n \"model\" : \"gp\\u0074\" , \"y\":\"model\"}", "a\"b"),
            "{ \"x\": 1.50,\n \"model\" : \"a\\\"b\" , \"y\":\"model\"}"
        );
        let same = r#"{"model":"mis\u0074ral", "n":1e2}"#;
        assert_eq!(renamed(same, "mistral"), same);
    }

    #[test]
    fn bad_bodies_say_what_and_where() {
        for (body, code, part) in [
            ("", "invalid_json", "empty"),
            ("[\"m\",true]", "invalid_json", "object"),
            ("\"m\"", "invalid_json", "object"),
            ("{\"model\":\"a\"", "invalid_json", "line 1 column 12"),
            ("{\"model\":\"a\",\"model\":\"b\"}", "invalid_json", "duplicate field `model`"),
            ("{\"model\":\"a\",\"mod\\u0065l\":\"b\"}", "invalid_json", "duplicate field `model`"),
            ("{\"model\":\"a\",\"Model\":\"b\"}", "invalid_json", "written `model`"),
            ("{\"MOD\\u0045L\":\"b\"}", "invalid_json", "written `model`"),
            ("{\"model\":\"a\"} x", "invalid_json", "trailing"),
            ("{\"model\":\"a\",\"stream\":\"yes\"}", "invalid_json", "line 1 column"),
            ("{\"messages\":[]}", "model_missing", "GET /v1/models"),
            ("{\"model\":\"\"}", "model_missing", "empty"),
            ("{\"model\":null}", "model_invalid", "string"),
            ("{\"model\":7}", "model_invalid", "string"),
        ] {
            let reject = parse(body.as_bytes()).unwrap_err();
            assert_eq!(reject.code(), code, "{body}");
            let message = &reject.problem().message;
            assert!(message.contains(part), "{body}: {message}");
            assert_eq!(reject.problem().status, 400);
        }
    }

    #[test]
    fn usage_is_asked_for_without_a_second_key() {
        assert_eq!(
            with_usage(r#"{"model":"a","stream":true}"#).unwrap(),
            r#"{"stream_options":{"include_usage":true},"model":"a","stream":true}"#
        );
        assert_eq!(
            with_usage(r#"{"model":"a","stream_options":{ } }"#).unwrap(),
            r#"{"model":"a","stream_options":{"include_usage":true } }"#
        );
        assert_eq!(
            with_usage(r#"{"model":"a","stream_options":{"k":1}}"#).unwrap(),
            r#"{"model":"a","stream_options":{"include_usage":true,"k":1}}"#
        );
        assert_eq!(
            with_usage(r#"{"stream_options":null,"model":"a"}"#).unwrap(),
            r#"{"stream_options":{"include_usage":true},"model":"a"}"#
        );
        assert_eq!(
            with_usage(r#"{"stream_options":{"include_usage":false},"model":"a"}"#).unwrap(),
            r#"{"stream_options":{"include_usage":true},"model":"a"}"#
        );
    }

    #[test]
    fn a_client_that_asked_itself_is_left_alone() {
        for body in [
            r#"{"model":"a","stream_options":{"include_usage":true}}"#,
            r#"{"model":"a","stream_options":7}"#,
            r#"{"model":"a","stream_options":[]}"#,
            r#"{"model":"a","stream_options":{"include_usage":"maybe"}}"#,
        ] {
            let asked = parse(body.as_bytes()).unwrap();
            assert_eq!(asked.include_usage(body.as_bytes()), None, "{body}");
        }
    }
}
