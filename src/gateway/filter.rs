//! `filters`: parameters that a model's requests must not carry, or must carry with one value.
//!
//! Edits of spans, like the rename in [`parse`](super::parse): what is not named stays byte for
//! byte as the client wrote it. Only top-level parameters of JSON bodies; `model` is never touched.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;

use super::ollama;
use super::parse::{Edit, apply as apply_edits, invalid, span};
use super::reject::Reject;
use crate::config::catalog::{EngineKind, Filters, ModelSpec};

/// The body as this model's engine shall get it on `path`; `None`: as it came.
pub fn shaped(body: &Bytes, spec: &ModelSpec, path: &str) -> Result<Option<Bytes>, Reject> {
    let is_ollama = spec.engine == EngineKind::Ollama;
    if spec.filters.is_empty() && !is_ollama {
        return Ok(None);
    }
    let body = apply(body.clone(), &spec.filters)?;
    if !is_ollama {
        return Ok(Some(body));
    }
    let guarded = ollama::guarded(body, path, spec.served_name());
    guarded.map(Some).map_err(|reject| reject.model(&spec.name))
}

/// The body as the engine shall get it. It is known to be a JSON object with a `model`.
pub fn apply(body: Bytes, filters: &Filters) -> Result<Bytes, Reject> {
    let edits = edits(&body, filters)?;
    Ok(apply_edits(body, edits))
}

/// One `"name": value` of the body.
struct Entry<'a> {
    name: Cow<'a, str>,
    name_raw: &'a RawValue,
    value: &'a RawValue,
}

struct Entries<'a>(Vec<Entry<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Entries<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Entries<'a>, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some(name_raw) = map.next_key::<&'de RawValue>()? {
                    let value = map.next_value::<&'de RawValue>()?;
                    let name = text(name_raw).map_err(serde::de::Error::custom)?;
                    entries.push(Entry { name, name_raw, value });
                }
                Ok(Entries(entries))
            }
        }
        from.deserialize_map(All)
    }
}

/// What a name means: `"mod\u0065l"` is `model`.
fn text(raw: &RawValue) -> serde_json::Result<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    serde_json::from_str::<Text>(raw.get()).map(|text| text.0)
}

/// Names and values of a JSON object, as often as they stand there.
pub fn fields(body: &[u8]) -> Result<Vec<(Cow<'_, str>, &RawValue)>, Reject> {
    let Entries(entries) = read(body)?;
    Ok(entries.into_iter().map(|entry| (entry.name, entry.value)).collect())
}

fn read(body: &[u8]) -> Result<Entries<'_>, Reject> {
    serde_json::from_slice(body).map_err(|e| invalid(format!("the body is not valid: {e}")))
}

fn edits(body: &[u8], filters: &Filters) -> Result<Vec<Edit>, Reject> {
    let Entries(entries) = read(body)?;
    let stripped = |name: &str| {
        name != "model"
            && !filters.set.contains_key(name)
            && filters.strip.iter().any(|strip| strip == name)
    };
    let mut edits = Vec::new();
    let mut seen = HashSet::new();
    // A stripped entry takes the comma before it along, those before the first kept one the comma
    // behind them.
    let mut kept_one = false;
    let mut leading: Option<usize> = None;
    let mut previous_end = 0;
    for entry in &entries {
        let (name, value) = (entry.name.as_ref(), span(body, entry.value));
        let filtered = name != "model" && filters.touch(name);
        if filtered && !seen.insert(name) {
            // Whichever an engine takes, it must be the one that was looked at.
            return Err(invalid(format!("the body is not valid: duplicate field `{name}`")));
        }
        let start = span(body, entry.name_raw).start;
        match (stripped(name), kept_one) {
            (true, true) => edits.push(cut(previous_end..value.end)),
            (true, false) => leading = leading.or(Some(start)),
            (false, _) => {
                if let Some(from) = leading.take() {
                    edits.push(cut(from..start));
                }
                kept_one = true;
                if filtered && let Some(set) = filters.set.get(name) {
                    edits.push(Edit { at: value.clone(), with: set.to_string() });
                }
            }
        }
        previous_end = value.end;
    }
    edits.extend(added(body, filters, &seen));
    Ok(edits)
}

fn cut(at: Range<usize>) -> Edit {
    Edit { at, with: String::new() }
}

/// What the client did not send is put first: the object holds `model`, so the comma is right.
fn added(body: &[u8], filters: &Filters, seen: &HashSet<&str>) -> Option<Edit> {
    let missing =
        filters.set.iter().filter(|(name, _)| *name != "model" && !seen.contains(name.as_str()));
    let with: String = missing
        .map(|(name, value)| format!("{}:{value},", serde_json::Value::from(name.as_str())))
        .collect();
    let open = body.iter().position(|&byte| byte == b'{')? + 1;
    (!with.is_empty()).then_some(Edit { at: open..open, with })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    fn filters(strip: &[&str], set: Value) -> Filters {
        Filters {
            strip: strip.iter().map(|name| (*name).to_owned()).collect(),
            set: serde_json::from_value(set).unwrap(),
        }
    }

    fn filtered(body: &str, filters: &Filters) -> String {
        let bytes = apply(Bytes::copy_from_slice(body.as_bytes()), filters).unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn only_what_is_named_changes() {
        let body = "{ \"temperature\" : 1.50,\n \"model\":\"a\", \"top_k\":5 , \"x\":1e2}";
        assert_eq!(
            filtered(body, &filters(&["temperature", "top_k"], json!({}))),
            "{ \"model\":\"a\" , \"x\":1e2}"
        );
        assert_eq!(
            filtered(body, &filters(&[], json!({"top_k": 9, "seed": 7}))),
            "{\"seed\":7, \"temperature\" : 1.50,\n \"model\":\"a\", \"top_k\":9 , \"x\":1e2}"
        );
        assert_eq!(
            filtered(body, &filters(&["temperature", "absent"], json!({"temperature": 0.2}))),
            "{ \"temperature\" : 0.2,\n \"model\":\"a\", \"top_k\":5 , \"x\":1e2}",
            "what is set is not stripped"
        );
        assert_eq!(filtered(body, &filters(&["absent"], json!({}))), body);
    }

    #[test]
    fn the_model_is_never_touched() {
        let body = r#"{"model":"a","x":1}"#;
        assert_eq!(filtered(body, &filters(&["model"], json!({"model": "b"}))), body);
    }

    #[test]
    fn escaped_names_mean_what_they_say_and_duplicates_are_refused() {
        let strip = filters(&["top_k"], json!({}));
        assert_eq!(filtered(r#"{"top\u005fk":1,"model":"a"}"#, &strip), r#"{"model":"a"}"#);
        let twice = br#"{"model":"a","top_k":1,"top\u005fk":2}"#;
        let reject = apply(Bytes::from_static(twice), &strip).unwrap_err();
        assert!(reject.problem().message.contains("duplicate field `top_k`"));
    }

    proptest! {
        #[test]
        fn the_result_is_the_object_less_and_plus_what_the_filters_say(
            names in prop::collection::btree_set("[a-f]", 0..6),
            strip in prop::collection::btree_set("[a-h]", 0..6),
            set in prop::collection::btree_map("[a-h]", any::<u8>(), 0..4),
            model_at in 0..6_usize,
            gap in "[ \n]{0,2}",
        ) {
            let mut fields: Vec<(String, Value)> =
                names.iter().map(|name| (name.clone(), json!({"n": [name, "}\","]}))).collect();
            fields.insert(model_at.min(fields.len()), ("model".into(), json!("m")));
            let written: Vec<String> =
                fields.iter().map(|(name, value)| format!("{gap}\"{name}\"{gap}:{gap}{value}{gap}")).collect();
            let body = format!("{gap}{{{}}}{gap}", written.join(","));
            let mut expected: Map<String, Value> = fields.into_iter().collect();
            expected.retain(|name, _| !strip.contains(name) || set.contains_key(name));
            expected.extend(set.iter().map(|(name, value)| (name.clone(), json!(value))));
            let filters = Filters {
                strip: strip.into_iter().collect(),
                set: set.into_iter().map(|(name, value)| (name, json!(value))).collect(),
            };
            let result: Value = serde_json::from_str(&filtered(&body, &filters)).unwrap();
            prop_assert_eq!(result, Value::Object(expected));
        }
    }
}
