//! What is done to requests, what of them is work, and free data: `filters`, `http`, `metadata`.

use http::Method;
use serde_json::{Map, Value};

use super::catalog::{Filters, HttpService, PathRule};
use super::decode::{At, Sink, Unread};
use super::tree::{Kind, Node, Scalar};

pub(super) fn filters(at: &At<'_>, sink: &mut Sink) -> Filters {
    let mut filters = Filters::default();
    let Some(mut table) = at.table(sink, "`strip` and `set`") else { return filters };
    if let Some(at) = table.take("strip") {
        filters.strip = strip(&at, sink);
    }
    if let Some(at) = table.take("set")
        && at.table(sink, "parameters and their values").is_some()
    {
        for (key, node) in at.node.entries() {
            if key.text == "model" {
                let message = "`model` says which model is meant: it cannot be set";
                sink.error(&at.entry(key, node).key_spot(), message, MODEL);
            }
            filters.set.insert(key.text.clone(), value(node));
        }
    }
    table.finish(
        sink,
        &[
            ("strip_params", Unread::Hint("did you mean `strip`?")),
            ("stripParams", Unread::Hint("did you mean `strip`?")),
            ("setParams", Unread::Hint("did you mean `set`?")),
            ("set_params", Unread::Hint("did you mean `set`?")),
        ],
    );
    filters
}

const MODEL: &str = "did you mean `upstream_name`, a key of the model itself?";

/// A list, or names with commas between them.
fn strip(at: &At<'_>, sink: &mut Sink) -> Vec<String> {
    let mut names = Vec::new();
    let mut add = |name: &str, at: &At<'_>, sink: &mut Sink| match name.trim() {
        "" => {}
        "model" => {
            sink.error(&at.spot, "`model` says which model is meant: it stays", "remove it");
        }
        name if names.iter().any(|known| known == name) => {
            let message = format!("`{}` is listed twice", name.escape_debug());
            sink.error(&at.spot, message, "remove one");
        }
        name => names.push(name.to_owned()),
    };
    if let Some(text) = at.node.text() {
        text.split(',').for_each(|name| add(name, at, sink));
    } else {
        let items = at.list(sink, "a list of parameters such as [temperature, top_k]");
        for item in items.unwrap_or_default() {
            if let Some(name) = item.string(sink, "a parameter's name") {
                add(&name, &item, sink);
            }
        }
    }
    names
}

pub(super) fn metadata(at: &At<'_>, sink: &mut Sink) -> Map<String, Value> {
    if at.table(sink, "data of your own").is_none() {
        return Map::new();
    }
    at.node.entries().iter().map(|(key, node)| (key.text.clone(), value(node))).collect()
}

/// The value as JSON would have it: what is not in quotes may be a number or a boolean.
fn value(node: &Node) -> Value {
    match &node.kind {
        Kind::Null => Value::Null,
        Kind::Scalar(scalar) => plain(scalar),
        Kind::List(items) => items.iter().map(value).collect(),
        Kind::Map(entries) => {
            entries.iter().map(|(key, node)| (key.text.clone(), value(node))).collect()
        }
    }
}

fn plain(scalar: &Scalar) -> Value {
    let text = scalar.text.as_str();
    // A macro alone needs its quotes in `{ … }`: its value is what counts then.
    let is_macro = |written: &String| {
        written.starts_with("${") && written.find('}').is_some_and(|end| end + 1 == written.len())
    };
    if scalar.quoted && !scalar.written.as_ref().is_some_and(is_macro) {
        return Value::from(text);
    }
    match text {
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    if let Ok(number) = text.parse::<i64>() {
        return Value::from(number);
    }
    let is_number = text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.'));
    match text.parse::<f64>().ok().filter(|number| is_number && number.is_finite()) {
        Some(number) => Value::from(number),
        None => Value::from(text),
    }
}

pub(super) fn http(at: &At<'_>, sink: &mut Sink) -> HttpService {
    let mut service = HttpService::default();
    let Some(mut table) = at.table(sink, "`activity`, `queue` and `release`") else {
        return service;
    };
    const RULE: &str = "a method and a path such as POST /prompt";
    if let Some(at) = table.take("activity") {
        let items = at.list(sink, "a list of paths such as [\"POST /prompt\"]").unwrap_or_default();
        service.activity =
            items.iter().filter_map(|item| item.parsed(sink, RULE, path_rule)).collect();
        if items.is_empty() && at.is_list() {
            sink.error(&at.spot, "no request counts as work", "expected at least one path");
        }
    }
    service.queue = table.take("queue").and_then(|at| {
        let rule = at.parsed(sink, "a path such as /queue", path_rule)?;
        if rule.method.is_some_and(|method| method != Method::GET) || rule.path.contains('*') {
            sink.error(&at.spot, "the queue is read by GET, at one path", "expected `/queue`");
            return None;
        }
        Some(rule.path)
    });
    let release = table.take("release");
    service.release = release.as_ref().and_then(|at| {
        let rule = at.parsed(sink, "a method and a path such as POST /free", path_rule)?;
        if rule.path.contains('*') {
            sink.error(&at.spot, "one call is made: `*` has no meaning here", "expected a path");
            return None;
        }
        Some(PathRule { method: rule.method.or(Some(Method::POST)), path: rule.path })
    });
    if let Some(at) = table.take("release_body") {
        service.release_body = body(&at, sink);
        if release.is_none() {
            sink.error(&at.spot, "`release_body` belongs to a call", "add `release: POST /free`");
        }
    }
    table.finish(sink, &[("paths", Unread::Hint("did you mean `activity`?"))]);
    service
}

/// JSON as text, or a mapping that becomes it.
fn body(at: &At<'_>, sink: &mut Sink) -> Option<String> {
    if at.is_map() || at.is_list() {
        return Some(value(at.node).to_string());
    }
    at.parsed(sink, "JSON such as {\"free_memory\": true}", |text| {
        match serde_json::from_str::<Value>(text) {
            Ok(_) => Ok(text.to_owned()),
            Err(error) => Err(format!("not JSON: {error}")),
        }
    })
}

/// `POST /prompt`, `/history/*`
fn path_rule(text: &str) -> Result<PathRule, String> {
    let text = text.trim();
    let (method, path) = match text.split_once(char::is_whitespace) {
        Some((method, path)) => (Some(method), path.trim()),
        None => (None, text),
    };
    if !path.starts_with('/') {
        let hint = if path.contains("://") { "only the path" } else { "a path begins with `/`" };
        return Err(hint.to_owned());
    }
    if path.contains(char::is_whitespace) || path.contains(['?', '#']) {
        return Err("expected a path alone, without query".to_owned());
    }
    let method = match method {
        None | Some("*") => None,
        Some(name) => match name.to_ascii_uppercase().parse::<Method>() {
            Ok(method) if KNOWN.contains(&method) => Some(method),
            Ok(_) | Err(_) => return Err(format!("`{}` is no method", name.escape_debug())),
        },
    };
    Ok(PathRule { method, path: path.to_owned() })
}

const KNOWN: [Method; 6] =
    [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
