//! YAML text → a tree in which every key and value knows its place.
//!
//! The parser's events are read directly instead of through serde, because serde stops at the
//! first error and a person wants to see all of them.

use std::collections::BTreeMap;

use serde_yaml::granit_parser::{self, Event, Parser, ScalarStyle, ScanError, Span};

use super::problem::Place;

/// Nodes that one file may expand to; a bound against aliases of aliases of aliases.
const MAX_NODES: usize = 200_000;

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub place: Place,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Null,
    Scalar(Scalar),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Clone, Debug)]
pub(super) struct Scalar {
    pub text: String,
    /// What the file says where `text` came out of `${…}`: messages show this.
    pub written: Option<String>,
    /// In quotes: a text, whatever it looks like.
    pub quoted: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Key {
    pub text: String,
    pub place: Place,
}

impl Node {
    pub(super) fn null(place: Place) -> Node {
        Node { place, kind: Kind::Null }
    }

    /// The value under `key`, if this is a mapping that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        match &self.kind {
            Kind::Map(entries) => entries.iter().find(|(k, _)| k.text == key).map(|(_, node)| node),
            Kind::Null | Kind::Scalar(_) | Kind::List(_) => None,
        }
    }

    pub(super) fn entries(&self) -> &[(Key, Node)] {
        match &self.kind {
            Kind::Map(entries) => entries,
            Kind::Null | Kind::Scalar(_) | Kind::List(_) => &[],
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar(scalar) => Some(&scalar.text),
            Kind::Null | Kind::List(_) | Kind::Map(_) => None,
        }
    }
}

/// Something wrong with the YAML itself, before any key has a meaning.
#[derive(Debug)]
pub(super) struct Flaw {
    pub place: Place,
    pub path: String,
    pub message: String,
    pub expected: String,
    pub help: Option<String>,
}

/// Reads one document. The flaws do not stop the reading, except for broken syntax.
pub(super) fn parse(text: &str) -> (Node, Vec<Flaw>) {
    let mut options = granit_parser::options! { flow_nesting_limit: 64, block_nesting_limit: 64 };
    options.set_emit_comments(false);
    let mut builder = Builder {
        text,
        parser: Parser::new_from_str_with_options(text, options),
        anchors: BTreeMap::new(),
        flaws: Vec::new(),
        nodes: 0,
    };
    let root = match builder.document() {
        Ok(root) => root,
        Err(stop) => {
            builder.flaws.push(*stop);
            Node::null(Place { line: 1, column: 1, width: 1 })
        }
    };
    (root, builder.flaws)
}

struct Builder<'t> {
    text: &'t str,
    parser: Parser<'t, granit_parser::StrInput<'t>>,
    anchors: BTreeMap<usize, Node>,
    flaws: Vec<Flaw>,
    nodes: usize,
}

type Stop = Box<Flaw>;

impl<'t> Builder<'t> {
    fn document(&mut self) -> Result<Node, Stop> {
        let mut root = Node::null(Place { line: 1, column: 1, width: 1 });
        let mut documents = 0;
        while let Some((event, span)) = self.next()? {
            match event {
                Event::DocumentStart(..) => {
                    documents += 1;
                    if documents > 1 {
                        return Err(flaw(
                            place(&span),
                            "a second document begins here",
                            "expected one document in the file",
                        ));
                    }
                }
                Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
                event => root = self.node(event, span, "")?,
            }
        }
        Ok(root)
    }

    fn next(&mut self) -> Result<Option<(Event<'t>, Span)>, Stop> {
        self.parser.next_event().transpose().map_err(|error| syntax(&error, self.text))
    }

    fn node(&mut self, event: Event<'t>, span: Span, path: &str) -> Result<Node, Stop> {
        let place = place(&span);
        self.spend(1, place)?;
        let (anchor, kind) = match event {
            Event::Scalar(text, style, anchor, _) => (anchor, scalar(text.into_owned(), style)),
            Event::SequenceStart(_, anchor, _) => (anchor, self.list(path)?),
            Event::MappingStart(_, anchor, _) => (anchor, self.map(path)?),
            Event::Alias(id) => {
                let node = self.anchors.get(&id).cloned().unwrap_or_else(|| Node::null(place));
                self.spend(size(&node), place)?;
                return Ok(node);
            }
            other => {
                let message = format!("unexpected YAML event {other:?}");
                return Err(flaw(place, &message, "expected a value"));
            }
        };
        let node = Node { place, kind };
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn list(&mut self, path: &str) -> Result<Kind, Stop> {
        let mut items = Vec::new();
        while let Some((event, span)) = self.next()? {
            if matches!(event, Event::SequenceEnd) {
                break;
            }
            let item = join(path, &format!("[{}]", items.len()));
            items.push(self.node(event, span, &item)?);
        }
        Ok(Kind::List(items))
    }

    fn map(&mut self, path: &str) -> Result<Kind, Stop> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        let mut merged = Vec::new();
        while let Some((event, span)) = self.next()? {
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let key_node = self.node(event, span, path)?;
            let key = Key {
                place: key_node.place,
                text: match &key_node.kind {
                    Kind::Scalar(scalar) => scalar.text.clone(),
                    Kind::Null => String::new(),
                    Kind::List(_) | Kind::Map(_) => {
                        self.flaws.push(*flaw(
                            key_node.place,
                            "a key must be a plain word",
                            "expected `key: value`",
                        ));
                        String::new()
                    }
                },
            };
            let Some((event, span)) = self.next()? else { break };
            let value_path = join(path, &key.text);
            let value = self.node(event, span, &value_path)?;
            if key.text == "<<" {
                merged.push(value);
            } else if let Some((first, _)) = entries.iter().find(|(k, _)| k.text == key.text) {
                self.flaws.push(Flaw {
                    place: key.place,
                    path: value_path,
                    message: format!("key `{}` is given twice", key.text),
                    expected: format!("first given on line {}", first.place.line),
                    help: Some("remove one of the two; which one counts is not guessed".to_owned()),
                });
            } else {
                entries.push((key, value));
            }
        }
        for node in merged {
            self.merge(&mut entries, node);
        }
        Ok(Kind::Map(entries))
    }

    /// `<<: *base`: keys of the base that the mapping does not have itself.
    fn merge(&mut self, entries: &mut Vec<(Key, Node)>, node: Node) {
        match node.kind {
            Kind::Map(base) => {
                for (key, value) in base {
                    if entries.iter().all(|(k, _)| k.text != key.text) {
                        entries.push((key, value));
                    }
                }
            }
            Kind::List(bases) => {
                for base in bases {
                    self.merge(entries, base);
                }
            }
            Kind::Null | Kind::Scalar(_) => self.flaws.push(*flaw(
                node.place,
                "`<<` merges a mapping",
                "expected an alias such as `*base`",
            )),
        }
    }

    fn spend(&mut self, nodes: usize, place: Place) -> Result<(), Stop> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            let message = format!("the file expands to more than {MAX_NODES} values");
            return Err(flaw(place, &message, "expected fewer YAML aliases"));
        }
        Ok(())
    }
}

fn scalar(text: String, style: ScalarStyle) -> Kind {
    let null = style == ScalarStyle::Plain && matches!(text.as_str(), "" | "~" | "null" | "Null");
    if null {
        return Kind::Null;
    }
    Kind::Scalar(Scalar { text, written: None, quoted: style != ScalarStyle::Plain })
}

fn size(node: &Node) -> usize {
    1 + match &node.kind {
        Kind::Null | Kind::Scalar(_) => 0,
        Kind::List(items) => items.iter().map(size).sum(),
        Kind::Map(entries) => entries.iter().map(|(_, value)| 1 + size(value)).sum(),
    }
}

pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() || key.starts_with('[') {
        format!("{path}{key}")
    } else {
        format!("{path}.{key}")
    }
}

fn place(span: &Span) -> Place {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let width = if span.start.line() == span.end.line() {
        number(span.end.col().saturating_sub(span.start.col())).max(1)
    } else {
        1
    };
    Place { line: number(span.start.line()), column: number(span.start.col()) + 1, width }
}

fn flaw(place: Place, message: &str, expected: &str) -> Stop {
    Box::new(Flaw {
        place,
        path: String::new(),
        message: message.to_owned(),
        expected: expected.to_owned(),
        help: None,
    })
}

/// The parser's terms are YAML's; the frequent mistakes are said in plain words.
fn syntax(error: &ScanError, text: &str) -> Stop {
    use granit_parser::ErrorKind as E;
    let (message, help) = match error.kind() {
        E::TabNotAllowed | E::TabInBlockIndentation | E::TabInIndentation | E::TabInPlainScalar => {
            (
                "a tab is used for indentation".to_owned(),
                Some("YAML allows only spaces there; two per level is usual"),
            )
        }
        E::UnclosedFlowCollection { open } => {
            (format!("this `{open}` is never closed"), Some(UNCLOSED))
        }
        E::UnclosedQuotedScalar => {
            ("this quote is never closed".to_owned(), Some("add the closing quote"))
        }
        E::MappingValueNotAllowed => (
            "a `:` does not fit here".to_owned(),
            Some("quote values that contain `: `, and check the indentation of this line"),
        ),
        E::UnknownAnchor => {
            ("this alias names no anchor".to_owned(), Some("define it before with `&name`"))
        }
        E::SimpleKeyExpected | E::ExpectedBlockMappingKey => (
            "a `key: value` is expected here".to_owned(),
            Some("check the `:` after the key and the indentation of this line"),
        ),
        _ => (format!("not valid YAML: {}", error.info()), None),
    };
    let is_at_its_place = matches!(
        error.kind(),
        E::TabNotAllowed
            | E::TabInBlockIndentation
            | E::TabInIndentation
            | E::TabInPlainScalar
            | E::UnclosedFlowCollection { .. }
            | E::UnclosedQuotedScalar
            | E::UnknownAnchor
            | E::RecursionLimitExceeded
    );
    let mark = error.marker();
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let place =
        Place { line: number(mark.line()).max(1), column: number(mark.col()) + 1, width: 1 };
    let mut stop = flaw(place, &message, "");
    stop.help = help.map(str::to_owned);
    if !is_at_its_place {
        blame_bracket(text, &mut stop);
    }
    stop
}

/// A forgotten bracket shows only lines later, as something that does not fit: says which one.
fn blame_bracket(text: &str, stop: &mut Flaw) {
    let before = text.lines().zip(1_u32..).take_while(|(_, line)| *line < stop.place.line);
    let mut open: Vec<(char, Place)> = Vec::new();
    for (line, number) in before {
        let (mut quote, mut previous) = (None, ' ');
        for (c, column) in line.chars().zip(1_u32..) {
            match (quote, c) {
                (Some(q), c) if q == c => quote = None,
                (Some(_), _) => {}
                (None, '#') if previous.is_whitespace() => break,
                (None, '"' | '\'') if !previous.is_alphanumeric() => quote = Some(c),
                (None, '[' | '{') if previous != '$' => {
                    open.push((c, Place { line: number, column, width: 1 }));
                }
                (None, ']' | '}') => {
                    open.pop();
                }
                (None, _) => {}
            }
            previous = c;
        }
    }
    if let Some((bracket, place)) = open.last() {
        stop.message = format!("this `{bracket}` is never closed");
        stop.expected = format!("line {} does not fit into it", stop.place.line);
        stop.help = Some(UNCLOSED.to_owned());
        stop.place = *place;
    }
}

const UNCLOSED: &str = "add the closing bracket, or write the block form, one entry per line";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_from_one() {
        let (root, flaws) = parse("a: 1\nb:\n  c: [x, yy]\n");
        assert!(flaws.is_empty());
        let list = root.get("b").and_then(|b| b.get("c")).expect("b.c");
        let Kind::List(items) = &list.kind else { panic!("a list") };
        assert_eq!(items[1].place, Place { line: 3, column: 10, width: 2 });
    }

    #[test]
    fn aliases_and_merges_are_expanded() {
        let (root, flaws) = parse("base: &b { x: 1, y: 2 }\nm: { <<: *b, y: 3 }\n");
        assert!(flaws.is_empty());
        let m = root.get("m").expect("m");
        assert_eq!(m.get("x").and_then(Node::text), Some("1"));
        assert_eq!(m.get("y").and_then(Node::text), Some("3"));
    }

    #[test]
    fn all_duplicates_are_told() {
        let (_, flaws) = parse("a: 1\na: 2\nb: { c: 1, c: 2 }\n");
        let paths: Vec<&str> = flaws.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(paths, ["a", "b.c"]);
    }

    #[test]
    fn alias_bombs_are_bounded() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..12 {
            let refs = vec![format!("*a{}", i - 1); 10].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
        }
        let (_, flaws) = parse(&text);
        assert!(flaws.iter().any(|f| f.message.contains("expands to more than")), "{flaws:?}");
    }
}
