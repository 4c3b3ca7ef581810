//! Form bodies (`multipart/form-data`, RFC 7578): the `model` field may follow a large file, so the
//! body is read whole like any other; only where the value lies is looked up.

use std::borrow::Cow;
use std::ops::Range;

use super::parse::{self, Asked, Spelling};
use super::reject::Reject;
use crate::http1::Headers;

const FORM: &str = "multipart/form-data";
/// Of one part; browsers and SDKs send two or three lines.
const PART_HEAD_MAX: usize = 16 << 10;
/// A form of an inference call has a dozen fields.
const PARTS_MAX: usize = 256;
/// RFC 2046.
const BOUNDARY_MAX: usize = 70;

pub fn parse<'a>(body: &'a [u8], headers: &impl Headers) -> Result<Asked<'a>, Reject> {
    let boundary = boundary(headers)?;
    let (mut model, mut stream) = (None, false);
    for part in Parts::new(body, &boundary) {
        let part = part?;
        match part.name.as_deref() {
            Some("model") if !part.is_file => {
                let earlier = model.replace(part.value.clone());
                if earlier.is_some() {
                    return Err(invalid("the field `model` is given twice"));
                }
            }
            Some("stream") if !part.is_file => {
                stream = body[part.value].eq_ignore_ascii_case(b"true");
            }
            _ => {}
        }
    }
    let Some(at) = model else { return Err(parse::model_missing()) };
    let name = std::str::from_utf8(&body[at.clone()])
        .map_err(|_| invalid("the field `model` is not UTF-8"))?;
    if name.is_empty() {
        return Err(parse::model_missing());
    }
    Ok(Asked::new(Cow::Borrowed(name), stream, at, Spelling::Plain))
}

fn invalid(message: impl Into<String>) -> Reject {
    Reject::bad_request("invalid_form", message)
}

fn boundary(headers: &impl Headers) -> Result<String, Reject> {
    let kind = headers.text("content-type").unwrap_or_default();
    let is_form = kind.get(..FORM.len()).is_some_and(|k| k.eq_ignore_ascii_case(FORM));
    if !is_form {
        let shown: String = kind.chars().take(100).collect();
        return Err(invalid(format!(
            "the content type is `{shown}`; expected {FORM} with a boundary"
        )));
    }
    parameter(&kind[FORM.len()..], "boundary")
        .filter(|boundary| (1..=BOUNDARY_MAX).contains(&boundary.len()))
        .ok_or_else(|| invalid("the content type has no boundary of 1 to 70 characters"))
}

/// `; name=value` or `; name="va\"lue"` of a header, names in any case.
fn parameter(rest: &str, wanted: &str) -> Option<String> {
    let mut rest = rest;
    loop {
        rest = rest[rest.find(';')? + 1..].trim_start();
        let (name, after) = rest.split_once('=')?;
        let (value, left) = match after.strip_prefix('"') {
            Some(quoted) => unquote(quoted)?,
            None => {
                let end = after.find(';').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        if name.trim().eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        rest = left;
    }
}

/// What stands before the closing quote, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, next)) = chars.next() {
        match next {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            other => value.push(other),
        }
    }
    None
}

struct Part {
    name: Option<String>,
    is_file: bool,
    value: Range<usize>,
}

/// The parts of a form, one after the other; ends after the closing delimiter.
struct Parts<'a> {
    body: &'a [u8],
    /// CRLF, two dashes and the boundary: what ends a part.
    delimiter: Vec<u8>,
    /// After a delimiter; `None`: at the end.
    at: Option<usize>,
    left: usize,
    is_first: bool,
}

impl<'a> Parts<'a> {
    fn new(body: &'a [u8], boundary: &str) -> Parts<'a> {
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        Parts { body, delimiter, at: Some(0), left: PARTS_MAX, is_first: true }
    }

    fn first(&self) -> Option<usize> {
        let bare = &self.delimiter[2..];
        if self.body.starts_with(bare) {
            return Some(bare.len());
        }
        Some(find(self.body, &self.delimiter)? + self.delimiter.len())
    }

    fn part(&mut self, at: usize) -> Result<Option<Part>, Reject> {
        let rest = &self.body[at..];
        if rest.starts_with(b"--") {
            return Ok(None);
        }
        // Padding is allowed between the boundary and the line's end.
        let padding = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        if !rest[padding..].starts_with(b"\r\n") {
            return Err(invalid("a delimiter of the form is not followed by a line end"));
        }
        // A part without headers begins with the empty line itself.
        let head_at = at + padding;
        let window = &self.body[head_at..self.body.len().min(head_at + PART_HEAD_MAX)];
        let head = find(window, b"\r\n\r\n")
            .ok_or_else(|| invalid("a part of the form has no end of its headers"))?;
        let value_at = head_at + head + 4;
        let length = find(&self.body[value_at..], &self.delimiter)
            .ok_or_else(|| invalid("the form ends in the middle of a part"))?;
        let (name, is_file) = disposition(&String::from_utf8_lossy(&window[..head]));
        self.at = Some(value_at + length + self.delimiter.len());
        Ok(Some(Part { name, is_file, value: value_at..value_at + length }))
    }
}

impl Iterator for Parts<'_> {
    type Item = Result<Part, Reject>;

    fn next(&mut self) -> Option<Result<Part, Reject>> {
        let mut at = self.at.take()?;
        if std::mem::take(&mut self.is_first) {
            match self.first() {
                Some(first) => at = first,
                None => return Some(Err(invalid("the form does not contain its boundary"))),
            }
        }
        let Some(left) = self.left.checked_sub(1) else {
            return Some(Err(invalid(format!("the form has more than {PARTS_MAX} parts"))));
        };
        self.left = left;
        self.part(at).transpose()
    }
}

/// The field's name, and whether the part is a file.
fn disposition(head: &str) -> (Option<String>, bool) {
    for line in head.split("\r\n") {
        let Some((name, value)) = line.split_once(':') else { continue };
        if name.trim().eq_ignore_ascii_case("content-disposition") {
            let is_file = parameter(value, "filename").or(parameter(value, "filename*")).is_some();
            return (parameter(value, "name"), is_file);
        }
    }
    (None, false)
}

fn find(within: &[u8], what: &[u8]) -> Option<usize> {
    memchr::memmem::find(within, what)
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, header};

    use super::*;
    use bytes::Bytes;

    fn headers(kind: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_TYPE, kind.parse().unwrap())])
    }

    fn form(parts: &[&str]) -> String {
        parts.iter().map(|part| format!("--xYz\r\n{part}\r\n")).collect::<String>() + "--xYz--\r\n"
    }

    const MODEL: &str = "Content-Disposition: form-data; name=\"model\"\r\n\r\nwhisper";
    const FILE: &str = "Content-Disposition: form-data; name=\"file\"; filename=\"model\"\r\n\
         Content-Type: audio/wav\r\n\r\n\r\n--xY\r\nname=\"model\"\r\n\r\nno";

    #[test]
    fn the_model_is_found_before_and_after_a_file() {
        let kind = headers("multipart/form-data; charset=x; boundary=\"xYz\"");
        for parts in [[MODEL, FILE], [FILE, MODEL]] {
            let body = form(&parts);
            let asked = parse(body.as_bytes(), &kind).unwrap();
            assert_eq!((asked.model.as_ref(), asked.stream), ("whisper", false));
            let edits = asked.rename("w-3").into_iter().collect();
            let changed = parse::apply(Bytes::from(body.clone()), edits);
            assert_eq!(changed, body.replace("whisper", "w-3"));
        }
    }

    #[test]
    fn odd_but_valid_forms_are_read() {
        let kind = headers("Multipart/Form-Data; BOUNDARY=xYz");
        for body in [
            "preamble\r\n--xYz\r\ncontent-disposition:form-data;name=model\r\n\r\nwhisper\r\n--xYz--",
            "--xYz \t\r\nContent-Disposition: form-data; x=\"a;name=\\\"no\\\"\"; name=\"model\"\r\n\r\nwhisper\r\n--xYz--\r\nepilogue",
            "--xYz\r\n\r\nno name\r\n--xYz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--xYz--",
        ] {
            assert_eq!(parse(body.as_bytes(), &kind).unwrap().model, "whisper", "{body:?}");
        }
        let stream = form(&[MODEL, "Content-Disposition: form-data; name=\"stream\"\r\n\r\nTrue"]);
        assert!(parse(stream.as_bytes(), &kind).unwrap().stream);
    }

    #[test]
    fn bad_forms_say_what_is_wrong() {
        let kind = "multipart/form-data; boundary=xYz";
        let whole = form(&[MODEL]);
        for (kind, body, code, word) in [
            ("application/json", whole.clone(), "invalid_form", "application/json"),
            ("multipart/form-data", whole.clone(), "invalid_form", "boundary"),
            ("multipart/form-data; boundary=\"\"", whole.clone(), "invalid_form", "boundary"),
            ("multipart/form-data; boundary=other", whole.clone(), "invalid_form", "boundary"),
            (kind, String::new(), "invalid_form", "boundary"),
            (kind, form(&[FILE]), "model_missing", "model"),
            (kind, form(&[MODEL, MODEL]), "invalid_form", "twice"),
            (kind, whole.replace("--xYz--", ""), "invalid_form", "middle"),
            (kind, "--xYz\r\nContent-Disp".to_owned(), "invalid_form", "headers"),
            (kind, "--xYzabc\r\n\r\n".to_owned(), "invalid_form", "line end"),
        ] {
            let reject = parse(body.as_bytes(), &headers(kind)).unwrap_err();
            assert_eq!(reject.code(), code, "{kind} {body:?}");
            assert!(reject.problem().message.contains(word), "{}", reject.problem().message);
        }
        let many = form(&["\r\nx"; PARTS_MAX + 1]);
        let reject = parse(many.as_bytes(), &headers(kind)).unwrap_err();
        assert!(reject.problem().message.contains("256"));
    }
}
