//! `auth:` and `rate_limits:`: keys, what they may do, and how much of it.

use std::time::Duration;

use super::catalog::{ApiKey, KeyDigest, RateLimits, Scope, StartRule};
use super::decode::{At, Sink, Spot, Table, Unread};
use super::fields::PRIORITIES;
use super::settings::ReadSettings;
use super::subst::Env;
use crate::units::Priority;

/// What `auth.keys` allow, with the name of the key.
pub(super) struct Allowed {
    pub key: String,
    pub pattern: String,
    pub spot: Spot,
}

pub(super) fn auth(at: &At<'_>, read: &mut ReadSettings, env: Env<'_>, sink: &mut Sink) {
    let Some(mut table) = at.table(sink, "`keys`") else { return };
    let auth = &mut read.settings.auth;
    auth.open = table.take("open").and_then(|at| at.boolean(sink)).unwrap_or_default();
    if let Some(at) = table.take("keys") {
        for item in at.list(sink, "a list of keys").unwrap_or_default() {
            auth.keys.extend(key(&item, &auth.keys, &mut read.allowed, env, sink));
        }
    }
    table.finish(sink, &[]);
}

fn key(
    item: &At<'_>,
    others: &[ApiKey],
    allowed: &mut Vec<Allowed>,
    env: Env<'_>,
    sink: &mut Sink,
) -> Option<ApiKey> {
    let mut table = item.table(sink, "`name`, `key`, `models` and `scopes`")?;
    let name_at = table.take("name");
    let name = name_at.as_ref().and_then(|at| at.string(sink, "a name"));
    let secret = secret(item, &mut table, env, sink);
    let models = table
        .take("models")
        .map_or_else(|| vec![("*".to_owned(), Spot::default())], |at| patterns(&at, sink));
    let scopes =
        table.take("scopes").map_or_else(|| vec![Scope::Inference], |at| scopes(&at, sink));
    let starts = [("auto", StartRule::Auto), ("never", StartRule::Never)];
    let start = table.take("start").and_then(|at| at.choice(sink, &starts)).unwrap_or_default();
    let max_wait: Option<Duration> = table.take("max_wait").and_then(|at| at.duration(sink));
    let priority = table.take("priority").and_then(|at| priority(&at, sink));
    let limits = table.take("limits").map(|at| limits(&at, sink)).unwrap_or_default();
    table.finish(
        sink,
        &[
            ("waiting", Unread::Hint("how a stream waits is said per model, or for all")),
            ("rate_limits", Unread::Hint("did you mean `limits`?")),
            ("expires", Unread::LaterError),
        ],
    );
    if name_at.is_none() {
        sink.error(&item.spot, "this key has no `name`", "expected `name: …`");
    }
    let (name_at, name, (secret_spot, key)) = (name_at?, name?, secret?);
    let key = KeyDigest::from(key);
    if others.iter().any(|other| other.name == name) {
        let message = format!("two keys are called `{name}`");
        sink.error(&name_at.spot, message, "expected a name of its own");
    }
    if let Some(other) = others.iter().find(|other| other.key == key) {
        let message = format!("this key is the same as that of `{}`", other.name);
        sink.error(&secret_spot, message, "expected a key of its own");
    }
    allowed.extend(models.iter().map(|(pattern, spot)| Allowed {
        key: name.clone(),
        pattern: pattern.clone(),
        spot: spot.clone(),
    }));
    let models = models.into_iter().map(|(pattern, _)| pattern).collect();
    Some(ApiKey { name, key, models, scopes, start, max_wait, priority, limits })
}

/// The key itself: written out, or where it is: a file, or a variable of the environment.
fn secret(
    item: &At<'_>,
    table: &mut Table<'_>,
    env: Env<'_>,
    sink: &mut Sink,
) -> Option<(Spot, String)> {
    let key = table.take("key");
    let file = table.take("key_file");
    let variable = table.take("env");
    let given: Vec<&At<'_>> = [&key, &file, &variable].into_iter().flatten().collect();
    match given.as_slice() {
        [] => {
            sink.error(&item.spot, "this key has no `key`", "expected `key: …`")
                .help("or `key_file: …`, a file that holds it, or `env: …`, a variable");
            return None;
        }
        [_, second, ..] => {
            let message = "this key is given in two ways";
            sink.error(&second.spot, message, "keep one of `key`, `key_file` and `env`");
            return None;
        }
        [_] => {}
    }
    if let Some(at) = key {
        let key = at.string(sink, "a text such as ${env.WHARF_KEY}")?;
        return Some((at.spot, key));
    }
    let (at, found) = match (file, variable) {
        (Some(at), _) => {
            let path = at.string(sink, "a file with the key in it")?;
            let found = std::fs::read_to_string(&path)
                .map_err(|error| format!("the key's file cannot be read: {error}"));
            (at, found)
        }
        (None, at) => {
            let at = at?;
            let name = at.string(sink, "a variable such as WHARF_KEY")?;
            let message = format!("the environment variable `{}` is not set", name.escape_debug());
            (at, env(&name).ok_or(message))
        }
    };
    match found.map(|text| text.trim().to_owned()) {
        Ok(key) if !key.is_empty() => {
            sink.secrets.push(key.clone());
            Some((at.spot, key))
        }
        Ok(_) => {
            sink.error(&at.spot, "the key that this leads to is empty", "expected a key there");
            None
        }
        Err(message) => {
            sink.error(&at.spot, message, "expected the key there");
            None
        }
    }
}

/// One priority for all requests of the key, or the lowest and the highest.
fn priority(at: &At<'_>, sink: &mut Sink) -> Option<(Priority, Priority)> {
    if !at.is_list() {
        return at.choice(sink, &PRIORITIES).map(|one| (one, one));
    }
    let items = at.list(sink, "a list")?;
    let read: Vec<Priority> =
        items.iter().filter_map(|item| item.choice(sink, &PRIORITIES)).collect();
    match read.as_slice() {
        _ if read.len() < items.len() => None,
        [low, high] if low <= high => Some((*low, *high)),
        [low, high] => {
            let message = "the lowest priority stands first";
            let name = |p: &Priority| {
                PRIORITIES.iter().find(|(_, priority)| priority == p).map_or("", |(name, _)| name)
            };
            let expected = format!("did you mean [{}, {}]?", name(high), name(low));
            sink.error(&at.spot, message, expected);
            None
        }
        _ => {
            let message = "two bounds are needed: the lowest and the highest priority";
            sink.error(&at.spot, message, "expected one priority, or two such as [low, normal]");
            None
        }
    }
}

pub(super) fn limits(at: &At<'_>, sink: &mut Sink) -> RateLimits {
    let Some(mut table) = at.table(sink, "`requests_per_minute` and `concurrency`") else {
        return RateLimits::default();
    };
    let mut number = |key| table.take(key).and_then(|at| at.int(sink, 1..=1_000_000));
    let limits = RateLimits {
        requests_per_minute: number("requests_per_minute"),
        concurrency: number("concurrency"),
    };
    table.finish(sink, &[("rpm", Unread::Hint("did you mean `requests_per_minute`?"))]);
    limits
}

fn patterns(at: &At<'_>, sink: &mut Sink) -> Vec<(String, Spot)> {
    let items = at.list(sink, "a list of model names, `*` allowed").unwrap_or_default();
    let read = |item: At<'_>| Some((item.string(sink, "a model's name, or a pattern")?, item.spot));
    items.into_iter().filter_map(read).collect()
}

fn scopes(at: &At<'_>, sink: &mut Sink) -> Vec<Scope> {
    let choices = [("inference", Scope::Inference), ("read", Scope::Read), ("admin", Scope::Admin)];
    let items = at.list(sink, "a list of scopes such as [inference]").unwrap_or_default();
    items.iter().filter_map(|item| item.choice(sink, &choices)).collect()
}
