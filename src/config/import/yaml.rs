//! Writing YAML that a person goes on with: comments, block form, quotes only where needed.

use std::fmt::Write as _;

pub(super) struct Entry {
    pub key: String,
    pub value: Out,
    /// Lines above it, without `#`.
    pub comments: Vec<String>,
}

pub(super) enum Out {
    /// A scalar, rendered.
    Scalar(String),
    List(Vec<Out>),
    Map(Vec<Entry>),
}

impl Entry {
    pub(super) fn new(key: &str, value: Out) -> Entry {
        Entry { key: key.to_owned(), value, comments: Vec::new() }
    }

    pub(super) fn said(key: &str, value: Out, comment: &str) -> Entry {
        Entry { comments: vec![comment.to_owned()], ..Entry::new(key, value) }
    }
}

impl Out {
    /// A text, in quotes if it would be read as something else.
    pub(super) fn text(text: impl AsRef<str>) -> Out {
        Out::Scalar(text_of(text.as_ref()))
    }

    /// A number, a boolean, a duration: written as it is.
    pub(super) fn plain(text: impl Into<String>) -> Out {
        Out::Scalar(text.into())
    }

    pub(super) fn quoted(text: impl AsRef<str>) -> Out {
        Out::Scalar(quoted(text.as_ref()))
    }

    /// What stood without quotes: a number stays one, a text is quoted if it has to be.
    pub(super) fn as_written(text: String) -> Out {
        if is_special(&text) { Out::Scalar(text) } else { Out::text(text) }
    }

    pub(super) fn texts<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> Out {
        Out::List(texts.into_iter().map(Out::text).collect())
    }

    fn flow(&self) -> Option<String> {
        match self {
            Out::Scalar(text) => Some(text.clone()),
            Out::List(items) => {
                let items: Option<Vec<String>> = items.iter().map(Out::flow).collect();
                Some(format!("[{}]", items?.join(", ")))
            }
            Out::Map(entries) if entries.iter().all(|entry| entry.comments.is_empty()) => {
                let parts: Option<Vec<String>> = entries
                    .iter()
                    .map(|e| Some(format!("{}: {}", text_of(&e.key), e.value.flow()?)))
                    .collect();
                let parts = parts?;
                Some(if parts.is_empty() {
                    "{}".into()
                } else {
                    format!("{{ {} }}", parts.join(", "))
                })
            }
            Out::Map(_) => None,
        }
    }
}

/// `head` as comments, then the entries.
pub(super) fn render(head: &[String], entries: &[Entry]) -> String {
    let mut out = String::new();
    head.iter().for_each(|line| comment(line, 0, &mut out));
    for entry in entries {
        out.push('\n');
        entry_in(entry, 0, &mut out);
    }
    out
}

fn comment(line: &str, indent: usize, out: &mut String) {
    let text = format!("{:indent$}# {line}", "");
    out.push_str(text.trim_end());
    out.push('\n');
}

const WIDTH: usize = 100;

fn entry_in(entry: &Entry, indent: usize, out: &mut String) {
    entry.comments.iter().for_each(|line| comment(line, indent, out));
    let key = text_of(&entry.key);
    // Models stand in block form, one key per line.
    let is_deep = indent >= 4 || matches!(entry.value, Out::Scalar(_) | Out::List(_));
    let flow = entry.value.flow().filter(|flow| {
        is_deep && (indent + key.len() + flow.len() + 2 <= WIDTH)
            || matches!(entry.value, Out::Scalar(_))
    });
    // Writing to a String cannot fail.
    match (flow, &entry.value) {
        (Some(flow), _) => {
            let _ = writeln!(out, "{:indent$}{key}: {flow}", "");
        }
        (None, Out::Map(entries)) => {
            let _ = writeln!(out, "{:indent$}{key}:", "");
            entries.iter().for_each(|entry| entry_in(entry, indent + 2, out));
        }
        (None, Out::List(items)) => {
            let _ = writeln!(out, "{:indent$}{key}:", "");
            for item in items {
                // Items without a flow form (comments inside) do not occur.
                let _ = writeln!(out, "{:indent$}  - {}", "", item.flow().unwrap_or_default());
            }
        }
        (None, Out::Scalar(_)) => {}
    }
}

fn quoted(text: &str) -> String {
    // JSON is YAML. A string can always be serialised.
    serde_json::to_string(text).unwrap_or_default()
}

/// Numbers, booleans and null, as YAML reads them.
fn is_special(text: &str) -> bool {
    let words = ["true", "false", "null", "~", "yes", "no", "on", "off"];
    text.parse::<f64>().is_ok() || words.contains(&text.to_ascii_lowercase().as_str())
}

fn text_of(text: &str) -> String {
    let safe = |c: char| {
        c.is_alphanumeric()
            || matches!(
                c,
                ' ' | '_' | '-' | '.' | '/' | ':' | '+' | '=' | '$' | '@' | '(' | ')' | '\'' | ';'
            )
    };
    let first =
        |c: char| c.is_alphanumeric() || matches!(c, '/' | '.' | '_' | '$' | '(') || c == '-';
    let plain = text.chars().all(safe)
        && text.starts_with(first)
        && !text.starts_with("- ")
        && !text.starts_with("---")
        && !text.contains(": ")
        && !text.ends_with([':', ' '])
        && !is_special(text)
        // 8051-8099 and 10:30 are read as something else by some.
        && !(text.contains(':') && text.starts_with(|c: char| c.is_ascii_digit()));
    if plain { text.to_owned() } else { quoted(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_quoted_where_they_have_to_be() {
        for plain in ["llama", "qwen2.5-coder:7b", "/srv/a b", "org/model", "--port=1", "15m"] {
            assert_eq!(text_of(plain), plain);
        }
        for other in
            ["", "true", "7", "a: b", "a #b", "- a", "*", "{a}", "a\nb", "${PORT}", "a,b", "10:30"]
        {
            assert_eq!(text_of(other), quoted(other), "{other}");
        }
    }
}
