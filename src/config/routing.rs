//! Names that lead elsewhere than to one model of this file: `peers`, `routes`, and which templates
//! registrations may name.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::catalog::{ExternalSpec, Group, Peer, Route, RouteKind};
use super::decode::{At, Sink, Spot, Table, Unread};
use super::groups::{self, GroupAt};
use super::models::{self, check_name};
use super::problem::nearest;
use super::settings::ReadSettings;
use super::tree::Node;
use super::{launch, rules};
use crate::units::ModelName;

#[derive(Default)]
pub(super) struct Routing {
    pub groups: BTreeMap<String, Group>,
    pub groups_at: BTreeMap<String, GroupAt>,
    pub routes: BTreeMap<String, Route>,
    pub peers: BTreeMap<String, Arc<Peer>>,
    pub registrable: Vec<String>,
}

type Aliases = BTreeMap<String, ModelName>;

pub(super) fn read(
    top: &mut Table<'_>,
    models: &models::Read,
    aliases: &Aliases,
    templates: Option<&Node>,
    settings: &ReadSettings,
    sink: &mut Sink,
) -> Routing {
    let mut routing = Routing::default();
    // What each name is, so that none means two things.
    let mut taken: BTreeMap<String, String> = BTreeMap::new();
    for name in &models.names {
        taken.insert(name.clone(), "a model".to_owned());
    }
    for (alias, model) in aliases {
        taken.insert(alias.clone(), format!("an alias of `{model}`"));
    }
    if let Some(at) = top.take("groups") {
        for (name, group) in groups::read(&at, models, aliases, sink) {
            claim(&mut taken, &name, "group", &group.spot, sink);
            routing.groups.insert(name.clone(), group.group.clone());
            routing.groups_at.insert(name, group);
        }
    }
    let peers_at = top.take("peers");
    if let Some(at) = &peers_at
        && at.table(sink, "one server per name").is_some()
    {
        for (key, node) in at.node.entries() {
            let at = at.entry(key, node);
            prefix_name(&key.text, "peer", &at.key_spot(), sink);
            claim(&mut taken, &key.text, "peer", &at.key_spot(), sink);
            if let Some(peer) = peer(&key.text, &at, sink) {
                listed(&peer, &at, sink);
                routing.peers.insert(key.text.clone(), Arc::new(peer));
            }
        }
    }
    if let Some(at) = top.take("routes")
        && at.table(sink, "one route per name").is_some()
    {
        let names: Vec<&str> = at.node.entries().iter().map(|(key, _)| key.text.as_str()).collect();
        let known = Known { models, aliases, peers: &routing.peers, routes: &names };
        let mut routes = BTreeMap::new();
        for (key, node) in at.node.entries() {
            let at = at.entry(key, node);
            check_name(&key.text, "route", &at.key_spot(), sink);
            claim(&mut taken, &key.text, "route", &at.key_spot(), sink);
            if let Some(route) = route(&at, &known, sink) {
                routes.insert(key.text.clone(), route);
            }
        }
        routing.routes = routes;
    }
    hidden(&taken, &routing, peers_at.as_ref(), sink);
    if let Some(at) = top.take("registration") {
        routing.registrable = registration(&at, templates, sink);
    }
    let names: Vec<&str> = taken.keys().map(String::as_str).collect();
    let leads_on = |pattern: &str| {
        let first = pattern.split_once('/').map(|(first, _)| first);
        first.is_some_and(|first| {
            routing.peers.contains_key(first) || routing.groups.contains_key(first)
        })
    };
    rules::keys(&names, leads_on, settings, sink);
    routing
}

fn claim(
    taken: &mut BTreeMap<String, String>,
    name: &str,
    what: &str,
    spot: &Spot,
    sink: &mut Sink,
) {
    if let Some(owner) = taken.get(name) {
        let message = format!("`{name}` is the name of {owner} already");
        sink.error(spot, message, "expected a name of its own");
        return;
    }
    taken.insert(name.to_owned(), format!("a {what}"));
}

/// `peer/model`: a slash in the first part could not be told from the one behind it.
pub(super) fn prefix_name(name: &str, what: &str, spot: &Spot, sink: &mut Sink) {
    if name.contains('/') {
        let message = format!("the name of a {what} precedes a `/`: `{name}` has one itself");
        let expected = format!("did you mean `{}`?", name.replace('/', "-"));
        sink.error(spot, message, expected);
        return;
    }
    check_name(name, what, spot, sink);
}

/// The longest name wins, so a model called `gpu2/llama` would hide that of the peer `gpu2`.
fn hidden(
    taken: &BTreeMap<String, String>,
    routing: &Routing,
    peers_at: Option<&At<'_>>,
    sink: &mut Sink,
) {
    for (name, what) in taken {
        let Some((first, rest)) = name.split_once('/') else { continue };
        if routing.peers.contains_key(first)
            && let Some(at) = peers_at
            && let Some((key, node)) = at.node.entries().iter().find(|(k, _)| k.text == first)
        {
            let message = format!("`{name}` is {what}: it hides the model `{rest}` of this peer");
            let spot = at.entry(key, node).key_spot();
            sink.error(&spot, message, "expected another name for the peer");
        }
        if let Some(group) = routing.groups_at.get(first)
            && group.group.models.iter().any(|model| model.as_str() == rest)
        {
            let message = format!("`{name}` is {what}: it hides `{rest}` of this group");
            sink.error(&group.spot, message, "expected another name for the group");
        }
    }
}

fn peer(name: &str, at: &At<'_>, sink: &mut Sink) -> Option<Peer> {
    let mut table = at.table(sink, "`url`, `api_key` and `models`")?;
    let url = table.take("url");
    if url.is_none() && !table.has_slip_of("url") && table.key_spot("proxy").is_none() {
        let message = format!("the peer `{name}` has no `url`");
        sink.error(&at.key_spot(), message, "expected `url: http://host:port`");
    }
    let url = url.and_then(|at| at.parsed(sink, "a URL such as http://10.0.0.2:8080", launch::url));
    let api_key =
        table.take("api_key").and_then(|at| at.string(sink, "a text such as ${env.NAME}"));
    let ca = table.take("ca").and_then(|at| at.string(sink, "a PEM file")).map(Into::into);
    if let Some(spot) = table.key_spot("ca")
        && url.as_ref().is_some_and(|url| url.starts_with("http://"))
    {
        sink.error(&spot, "`ca` is for https", "expected `url: https://host:port`");
    }
    let models = match table.take("models") {
        None => vec!["*".to_owned()],
        Some(at) if at.node.text() == Some("*") => vec!["*".to_owned()],
        Some(at) => {
            let items = at.list(sink, "`*`, or a list of models such as [llama, qwen]")?;
            if items.is_empty() {
                sink.error(&at.spot, "no model of this peer can be used", "expected names, or `*`");
            }
            items.iter().filter_map(|item| item.string(sink, "a model's name there")).collect()
        }
    };
    table.finish(
        sink,
        &[
            ("proxy", Unread::Hint("did you mean `url`?")),
            ("apiKey", Unread::Hint("did you mean `api_key`?")),
            ("key", Unread::Hint("did you mean `api_key`?")),
        ],
    );
    Some(Peer { name: name.to_owned(), at: ExternalSpec { url: url?, ca, api_key }, models })
}

/// The names of models that a peer lists become names of models here.
fn listed(peer: &Peer, at: &At<'_>, sink: &mut Sink) {
    for model in peer.listed() {
        check_name(&format!("{}/{model}", peer.name), "peer's model", &at.key_spot(), sink);
    }
}

/// What a route may lead to.
struct Known<'k> {
    models: &'k models::Read,
    aliases: &'k Aliases,
    peers: &'k BTreeMap<String, Arc<Peer>>,
    routes: &'k [&'k str],
}

fn route(at: &At<'_>, known: &Known<'_>, sink: &mut Sink) -> Option<Route> {
    let mut table = at.table(sink, "`any_of` or `failover`")?;
    let (any_of, failover) = (table.take("any_of"), table.take("failover"));
    let within = table.take("within");
    let within_for = within.as_ref().and_then(|at| at.some_duration(sink));
    table.finish(sink, &[("models", Unread::Hint("did you mean `any_of` or `failover`?"))]);
    let (kind, list) = match (any_of, failover) {
        (Some(_), Some(second)) => {
            sink.error(&second.key_spot(), "a route has one order", "keep `any_of` or `failover`");
            return None;
        }
        (Some(list), None) => (RouteKind::AnyOf, list),
        (None, Some(list)) => (RouteKind::Failover, list),
        (None, None) => {
            let expected = "expected `any_of: [a, b]` or `failover: [a, b]`";
            sink.error(&at.key_spot(), "this route leads nowhere", expected);
            return None;
        }
    };
    if let (Some(at), RouteKind::AnyOf) = (&within, kind) {
        let message = "`within` is how long `failover` waits for the first";
        sink.error(&at.spot, message, "remove it, or use `failover`");
    }
    let items = list.list(sink, "a list of models, best first")?;
    let mut models: Vec<String> = Vec::new();
    for item in &items {
        let Some(name) = item.string(sink, "a model's name") else { continue };
        match member(&name, known) {
            Ok(name) if models.contains(&name) => {
                sink.error(&item.spot, format!("`{name}` is listed twice"), "remove one");
            }
            Ok(name) => models.push(name),
            Err((message, expected)) => {
                sink.error(&item.spot, message, expected);
            }
        }
    }
    match items.len() {
        0 => {
            sink.error(&list.spot, "this route leads nowhere", "expected names of models");
        }
        // A peer's model can have another name only in this way.
        1 if models.iter().any(|model| known.models.names.contains(model)) => {
            sink.warning(&list.spot, "this route leads to one model", "an alias does the same");
        }
        _ => {}
    }
    Some(Route { kind, models, within: within_for })
}

fn member(name: &str, known: &Known<'_>) -> Result<String, (String, String)> {
    if known.models.names.iter().any(|model| model == name) {
        return Ok(name.to_owned());
    }
    if let Some(model) = known.aliases.get(name) {
        return Ok(model.to_string());
    }
    if known.routes.contains(&name) {
        let message = format!("`{name}` is a route itself");
        return Err((message, "expected names of models".to_owned()));
    }
    if let Some((first, rest)) = name.split_once('/')
        && let Some(peer) = known.peers.get(first)
    {
        if peer.models.iter().any(|model| model == "*" || model == rest) {
            return Ok(name.to_owned());
        }
        let message = format!("the peer `{first}` lists no model `{rest}`");
        let expected = match nearest(rest, peer.models.iter().map(String::as_str)) {
            Some(known) => format!("did you mean `{first}/{known}`?"),
            None => format!("add it to `peers.{first}.models`"),
        };
        return Err((message, expected));
    }
    let names = known.models.names.iter().chain(known.aliases.keys()).map(String::as_str);
    let expected = match nearest(name, names) {
        Some(known) => format!("did you mean `{known}`?"),
        None => "expected a name from `models:`, or `peer/model`".to_owned(),
    };
    Err((format!("no model is called `{}`", name.escape_debug()), expected))
}

fn registration(at: &At<'_>, templates: Option<&Node>, sink: &mut Sink) -> Vec<String> {
    let mut allowed: Vec<String> = Vec::new();
    let Some(mut table) = at.table(sink, "`templates`") else { return allowed };
    let list = table.take("templates");
    let items = list.and_then(|at| at.list(sink, "a list of templates such as [qwen-ft]"));
    table.finish(sink, &[("template", Unread::Hint("did you mean `templates`?"))]);
    let names = || templates.iter().flat_map(|node| node.entries()).map(|(k, _)| k.text.as_str());
    for item in items.unwrap_or_default() {
        let Some(name) = item.string(sink, "a template's name") else { continue };
        if !names().any(|known| known == name) {
            let expected = match nearest(&name, names()) {
                Some(known) => format!("did you mean `{known}`?"),
                None => "expected a name from `templates:`".to_owned(),
            };
            let message = format!("no template is called `{}`", name.escape_debug());
            sink.error(&item.spot, message, expected);
        } else if allowed.contains(&name) {
            sink.error(&item.spot, format!("`{name}` is listed twice"), "remove one");
        } else {
            allowed.push(name);
        }
    }
    allowed
}
