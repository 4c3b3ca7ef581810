//! Servers that Wharf uses and does not start: Ollamas, external models, peers.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;

use super::Check;
use crate::config::catalog::{Catalog, ExternalSpec, PullPolicy, RuntimeSpec};
use crate::engine::request::{self, Answer};
use crate::runtime::external;

const ASK_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Ollama,
    External,
    Peer,
}

struct Backend<'a> {
    kind: Kind,
    at: &'a ExternalSpec,
    /// Who needs it: models, or the peer's own name.
    users: Vec<&'a str>,
    /// Of an Ollama: what it should have, unless it may pull it.
    wanted: Vec<&'a str>,
}

/// Each server once, all asked at the same time.
pub(super) async fn all(catalog: &Catalog) -> Vec<Check> {
    let mut backends: BTreeMap<(Kind, &str), Backend<'_>> = BTreeMap::new();
    for spec in catalog.models.values() {
        let (kind, at) = match &spec.runtime {
            RuntimeSpec::Ollama(ollama) => (Kind::Ollama, &ollama.at),
            RuntimeSpec::External(external) => (Kind::External, external),
            RuntimeSpec::Docker(_) | RuntimeSpec::Process(_) => continue,
        };
        let new = || Backend { kind, at, users: Vec::new(), wanted: Vec::new() };
        let backend = backends.entry((kind, &at.url)).or_insert_with(new);
        backend.users.push(spec.name.as_str());
        if matches!(&spec.runtime, RuntimeSpec::Ollama(ollama) if ollama.pull == PullPolicy::Never)
        {
            backend.wanted.push(spec.served_name());
        }
    }
    for peer in catalog.peers.values() {
        let (at, users) = (&peer.at, vec![peer.name.as_str()]);
        let backend = Backend { kind: Kind::Peer, at, users, wanted: Vec::new() };
        backends.insert((Kind::Peer, &at.url), backend);
    }
    join_all(backends.values().map(check)).await
}

async fn check(backend: &Backend<'_>) -> Check {
    let (name, path, start) = match backend.kind {
        Kind::Ollama => ("ollama", "/api/tags", "start it (`ollama serve`)"),
        Kind::External => ("external", "/v1/models", "start it"),
        Kind::Peer => ("peers", "/v1/models", "start it"),
    };
    let url = &backend.at.url;
    let users = backend.users.join(", ");
    let endpoint = match external::endpoint(&users, backend.at).await {
        Ok(endpoint) => endpoint,
        Err(fault) => return Check::failed(name, fault.message),
    };
    let answer = match request::get(&endpoint, path, ASK_MAX).await {
        Ok(answer) => answer,
        Err(error) => {
            let fix = format!("{start}, or correct its address: {users} cannot be served");
            return Check::fail(name, format!("{url}: {error}"), fix);
        }
    };
    match answer.status.as_u16() {
        401 | 403 => {
            let told = format!("{url} refuses the key: {}", answer.excerpt());
            Check::fail(name, told, format!("correct the `api_key` of {users}"))
        }
        200..=299 if backend.kind == Kind::Ollama => models_of(backend, &answer),
        200..=299 => Check::ok(name, format!("{url} answers ({users})")),
        _ => Check::warn(
            name,
            format!("{url}{path} answers {}", answer.excerpt()),
            format!("is its address right? {users} are asked for there"),
        ),
    }
}

fn models_of(backend: &Backend<'_>, answer: &Answer) -> Check {
    let (url, tags) = (&backend.at.url, answer.json());
    let Some(models) = tags["models"].as_array() else {
        let told = format!("{url} answers, but not as an Ollama does: {}", answer.excerpt());
        return Check::fail(
            "ollama",
            told,
            "correct its address: `external.url` or OLLAMA_BASE_URL",
        );
    };
    let has = |wanted: &str| {
        let latest = format!("{wanted}:latest");
        let named = |row: &Value| row["name"] == wanted || row["name"] == latest.as_str();
        models.iter().any(named)
    };
    let missing: Vec<&str> = backend.wanted.iter().copied().filter(|name| !has(name)).collect();
    if missing.is_empty() {
        return Check::ok("ollama", format!("{url} has {} models", models.len()));
    }
    let fix = missing.iter().map(|name| format!("`ollama pull {name}`")).collect::<Vec<_>>();
    let told = format!("{url} lacks {}, and may not pull them", missing.join(", "));
    Check::fail("ollama", told, fix.join(", "))
}
