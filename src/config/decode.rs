//! Typed reading of the tree: each reader reports what it finds wrong and goes on.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use super::problem::{Place, Problem, Severity, nearest};
use super::subst::Env;
use super::tree::{Flaw, Key, Kind, Node, join};
use super::values;
use crate::units::Bytes;

/// Where something was said, for problems found later.
#[derive(Clone, Debug, Default)]
pub(super) struct Spot {
    pub place: Place,
    pub path: String,
}

/// Collects problems.
#[derive(Default)]
pub(super) struct Sink {
    pub problems: Vec<Problem>,
    /// Values that no message may contain.
    pub secrets: Vec<String>,
}

impl Sink {
    /// `message` says what is wrong, `expected` (shown under the place) what would be right.
    pub(super) fn error(
        &mut self,
        spot: &Spot,
        message: impl Into<String>,
        expected: impl Into<String>,
    ) -> &mut Problem {
        self.push(Severity::Error, spot, message.into(), expected.into())
    }

    pub(super) fn warning(
        &mut self,
        spot: &Spot,
        message: impl Into<String>,
        expected: impl Into<String>,
    ) -> &mut Problem {
        self.push(Severity::Warning, spot, message.into(), expected.into())
    }

    pub(super) fn flaw(&mut self, flaw: Flaw) {
        let spot = Spot { place: flaw.place, path: flaw.path };
        self.push(Severity::Error, &spot, flaw.message, flaw.expected).help = flaw.help;
    }

    fn push(
        &mut self,
        severity: Severity,
        spot: &Spot,
        message: String,
        expected: String,
    ) -> &mut Problem {
        let at = self.problems.len();
        self.problems.push(Problem {
            severity,
            place: spot.place,
            path: spot.path.clone(),
            message,
            expected,
            help: None,
            source: String::new(),
            shown: (0, 0),
        });
        &mut self.problems[at]
    }
}

impl Problem {
    pub(super) fn help(&mut self, help: impl Into<String>) {
        self.help = Some(help.into());
    }
}

/// A value with its way from the root.
#[derive(Clone, Debug)]
pub(super) struct At<'n> {
    pub node: &'n Node,
    pub spot: Spot,
    /// Its key: where to say that something is missing. A list's item has itself.
    pub key: Place,
}

impl<'n> At<'n> {
    pub(super) fn root(node: &'n Node) -> At<'n> {
        At { node, spot: Spot { place: node.place, path: String::new() }, key: node.place }
    }

    pub(super) fn item(&self, index: usize, node: &'n Node) -> At<'n> {
        let path = join(&self.spot.path, &format!("[{index}]"));
        At { node, spot: Spot { place: node.place, path }, key: node.place }
    }

    pub(super) fn entry(&self, key: &Key, node: &'n Node) -> At<'n> {
        let path = join(&self.spot.path, &key.text);
        At { node, spot: Spot { place: node.place, path }, key: key.place }
    }

    pub(super) fn key_spot(&self) -> Spot {
        Spot { place: self.key, path: self.spot.path.clone() }
    }

    fn wrong(&self, sink: &mut Sink, what: &str) {
        if matches!(self.node.kind, Kind::Null) {
            sink.error(&self.key_spot(), "this has no value", expected_text(what));
            return;
        }
        let message = format!("{} is not {}", self.found(), article(what));
        sink.error(&self.spot, message, expected_text(what));
    }

    /// The value as a message may show it: what the file says, cut short.
    pub(super) fn found(&self) -> String {
        match &self.node.kind {
            Kind::Null => "nothing".to_owned(),
            Kind::List(_) => "a list".to_owned(),
            Kind::Map(_) => "a mapping".to_owned(),
            Kind::Scalar(scalar) => {
                let text = scalar.written.as_ref().unwrap_or(&scalar.text);
                let short: String = text.chars().take(60).collect();
                let dots = if text.chars().count() > 60 { "…" } else { "" };
                format!("`{}{dots}`", short.escape_debug())
            }
        }
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.node.kind, Kind::Map(_))
    }

    pub(super) fn is_list(&self) -> bool {
        matches!(self.node.kind, Kind::List(_))
    }

    pub(super) fn string(&self, sink: &mut Sink, what: &str) -> Option<String> {
        match self.node.text() {
            Some(text) if !text.trim().is_empty() => Some(text.to_owned()),
            _ => {
                self.wrong(sink, what);
                None
            }
        }
    }

    /// Text that may be empty.
    pub(super) fn free_text(&self, sink: &mut Sink, what: &str) -> Option<String> {
        match &self.node.kind {
            Kind::Scalar(scalar) => Some(scalar.text.clone()),
            Kind::Null | Kind::List(_) | Kind::Map(_) => {
                self.wrong(sink, what);
                None
            }
        }
    }

    pub(super) fn boolean(&self, sink: &mut Sink) -> Option<bool> {
        match self.node.text() {
            Some("true" | "True" | "TRUE") => Some(true),
            Some("false" | "False" | "FALSE") => Some(false),
            _ => {
                self.wrong(sink, "`true` or `false`");
                None
            }
        }
    }

    pub(super) fn int<T>(&self, sink: &mut Sink, range: RangeInclusive<T>) -> Option<T>
    where
        T: FromStr + PartialOrd + Display + Copy,
    {
        let value = self.node.text().and_then(|text| text.replace('_', "").parse().ok());
        match value {
            Some(value) if range.contains(&value) => Some(value),
            _ => {
                let what = format!("a whole number from {} to {}", range.start(), range.end());
                self.wrong(sink, &what);
                None
            }
        }
    }

    pub(super) fn number(&self, sink: &mut Sink) -> Option<f64> {
        let value = self.node.text().and_then(|text| text.parse::<f64>().ok());
        match value {
            Some(value) if value.is_finite() && value >= 0.0 => Some(value),
            _ => {
                self.wrong(sink, "a number such as 13.5");
                None
            }
        }
    }

    pub(super) fn size(&self, sink: &mut Sink) -> Option<Bytes> {
        self.parsed(sink, "a size such as 22GiB", values::size)
    }

    pub(super) fn duration(&self, sink: &mut Sink) -> Option<Duration> {
        self.parsed(sink, "a duration such as 30s or 5m", values::duration)
    }

    /// A duration that has to be more than nothing.
    pub(super) fn some_duration(&self, sink: &mut Sink) -> Option<Duration> {
        let duration = self.duration(sink)?;
        if duration.is_zero() {
            self.wrong(sink, "a duration above zero");
            return None;
        }
        Some(duration)
    }

    /// Reads a scalar with `read`, whose error is a hint at what was meant, or empty.
    pub(super) fn parsed<T>(
        &self,
        sink: &mut Sink,
        what: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let Some(text) = self.node.text() else {
            self.wrong(sink, what);
            return None;
        };
        match read(text) {
            Ok(value) => Some(value),
            Err(hint) => {
                let expected = if hint.is_empty() { expected_text(what) } else { hint };
                let message = format!("{} is not {}", self.found(), article(what));
                sink.error(&self.spot, message, expected);
                None
            }
        }
    }

    pub(super) fn choice<T: Copy>(&self, sink: &mut Sink, choices: &[(&str, T)]) -> Option<T> {
        let text = self.node.text().unwrap_or_default();
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return Some(*value);
        }
        let names = choices.iter().map(|(name, _)| *name);
        let all: Vec<String> = names.clone().map(|name| format!("`{name}`")).collect();
        let expected = match nearest(text, names) {
            Some(name) => format!("did you mean `{name}`?"),
            None => "expected one of these".to_owned(),
        };
        let message = format!("{} is not one of {}", self.found(), all.join(", "));
        sink.error(&self.spot, message, expected);
        None
    }

    /// The items of a list; a single scalar is no list.
    pub(super) fn list(&self, sink: &mut Sink, what: &str) -> Option<Vec<At<'n>>> {
        match &self.node.kind {
            Kind::List(items) => {
                Some(items.iter().enumerate().map(|(i, node)| self.item(i, node)).collect())
            }
            Kind::Null | Kind::Scalar(_) | Kind::Map(_) => {
                self.wrong(sink, what);
                None
            }
        }
    }

    pub(super) fn strings(&self, sink: &mut Sink, what: &str) -> Option<Vec<String>> {
        let items = self.list(sink, what)?;
        Some(items.iter().filter_map(|item| item.free_text(sink, "a text")).collect())
    }

    /// A command line: a list, or one text that is split as a shell would.
    pub(super) fn words(&self, sink: &mut Sink) -> Option<Vec<String>> {
        if self.is_list() {
            return self.strings(sink, "a list of arguments");
        }
        let Some(text) = self.node.text() else {
            self.wrong(sink, "a command line or a list of arguments");
            return None;
        };
        match shell_words::split(text) {
            Ok(words) => Some(words),
            Err(_) => {
                sink.error(&self.spot, "this command line has a quote that is never closed", "")
                    .help("close the quote, or write a list: one argument per item");
                None
            }
        }
    }

    /// A mapping of texts, or a list of `NAME=value`. A bare `NAME` takes the value from `outer`.
    pub(super) fn pairs(
        &self,
        sink: &mut Sink,
        outer: Option<Env<'_>>,
    ) -> Option<BTreeMap<String, String>> {
        let mut pairs = BTreeMap::new();
        if let Kind::Map(entries) = &self.node.kind {
            for (key, node) in entries {
                let value = self.entry(key, node).free_text(sink, "a text");
                pairs.insert(key.text.clone(), value.unwrap_or_default());
            }
            return Some(pairs);
        }
        for item in self.list(sink, "a mapping, or a list of NAME=value")? {
            let Some(text) = item.string(sink, "NAME=value") else { continue };
            let (name, value) = match (text.split_once('='), outer) {
                (Some((name, value)), _) => (name.to_owned(), Some(value.to_owned())),
                (None, Some(outer)) => (text.clone(), outer(&text)),
                (None, None) => (text.clone(), None),
            };
            match value {
                Some(value) if !name.is_empty() => {
                    if pairs.insert(name.clone(), value).is_some() {
                        sink.error(&item.spot, format!("`{name}` is given twice"), "");
                    }
                }
                _ if outer.is_some() && !name.is_empty() => {
                    sink.error(
                        &item.spot,
                        format!("the environment variable `{name}` is not set"),
                        format!("expected {name}=value, or {name} in Wharf's own environment"),
                    );
                }
                _ => item.wrong(sink, "NAME=value"),
            }
        }
        Some(pairs)
    }

    pub(super) fn table(&self, sink: &mut Sink, what: &str) -> Option<Table<'n>> {
        match &self.node.kind {
            Kind::Map(entries) => Some(Table { at: self.clone(), entries, taken: Vec::new() }),
            Kind::Null | Kind::Scalar(_) | Kind::List(_) => {
                self.wrong(sink, &format!("a mapping with {what}"));
                None
            }
        }
    }
}

/// A mapping whose keys are taken one after the other; what is left is unknown.
pub(super) struct Table<'n> {
    pub at: At<'n>,
    entries: &'n [(Key, Node)],
    taken: Vec<&'static str>,
}

/// What is said about a key that is not read.
pub(super) enum Unread {
    /// Belongs to a later version; ignoring it would do something else than asked.
    LaterError,
    /// A wrong name or place; the text says the right one.
    Hint(&'static str),
}

impl<'n> Table<'n> {
    pub(super) fn take(&mut self, name: &'static str) -> Option<At<'n>> {
        self.taken.push(name);
        let (key, node) = self.entries.iter().find(|(key, _)| key.text == name)?;
        Some(self.at.entry(key, node))
    }

    /// The place of a key itself, for problems with its being there.
    pub(super) fn key_spot(&self, name: &str) -> Option<Spot> {
        let (key, _) = self.entries.iter().find(|(key, _)| key.text == name)?;
        Some(Spot { place: key.place, path: join(&self.at.spot.path, name) })
    }

    /// Whether a key stands here that was probably meant to be `name`.
    pub(super) fn has_slip_of(&self, name: &str) -> bool {
        let near = |key: &Key| nearest(&key.text, [name]).is_some();
        self.entries.iter().any(|(key, _)| !self.taken.contains(&&*key.text) && near(key))
    }

    /// Reports every key that was not taken.
    pub(super) fn finish(self, sink: &mut Sink, unread: &[(&str, Unread)]) {
        for (key, _) in self.entries.iter().filter(|(k, _)| !self.taken.contains(&&*k.text)) {
            let spot = Spot { place: key.place, path: join(&self.at.spot.path, &key.text) };
            let name = key.text.as_str();
            match unread.iter().find(|(known, _)| *known == name).map(|(_, unread)| unread) {
                Some(Unread::LaterError) => {
                    sink.error(&spot, format!("`{name}` is not supported yet"), "remove it")
                        .help("ignoring it would not do what the file asks for");
                }
                Some(Unread::Hint(hint)) => {
                    sink.error(&spot, format!("unknown key `{name}`"), *hint);
                }
                None => self.unknown(sink, &spot, name),
            }
        }
    }

    fn unknown(&self, sink: &mut Sink, spot: &Spot, name: &str) {
        let expected = match nearest(name, self.taken.iter().copied()) {
            Some(key) => format!("did you mean `{key}`?"),
            None => "no key has this or a similar name".to_owned(),
        };
        let owner = match self.at.spot.path.as_str() {
            "" => "the file".to_owned(),
            path => format!("`{path}`"),
        };
        let known = self.taken.join(", ");
        let name = if name.is_empty() { "(empty)" } else { name };
        sink.error(spot, format!("unknown key `{}`", name.escape_debug()), expected)
            .help(format!("{owner} takes: {known}"));
    }
}

/// "a size such as 22GiB" → "a size": the example belongs to what is expected.
fn article(what: &str) -> &str {
    what.split(" such as ").next().unwrap_or(what)
}

fn expected_text(what: &str) -> String {
    format!("expected {what}")
}
