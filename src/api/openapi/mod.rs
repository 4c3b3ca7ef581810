//! `GET /openapi.json`: OpenAPI 3.1 of both listeners, for who has no key too (it is the same for
//! everybody).
//!
//! Written by hand, a line or two per path, and not derived from the handlers: names hold slashes, so
//! that several operations stand behind one wildcard, and answers are made from views, not from
//! types. What keeps it true: scopes and listeners are taken from the tables of routes, a route
//! without a description fails a test, and so does an answer that is not as described
//! (`tests/openapi.rs` has a fuzzer compare them).

mod config;
mod gateway;
mod llama_swap;
mod models;
mod op;
mod schemas;
mod state;

use std::sync::LazyLock;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use serde_json::{Map, Value, json};

use super::endpoint::Route;
use super::routes;
use op::Op;

static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| whole().to_string().into());

/// `GET /openapi.json`
pub async fn document() -> Response {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.clone()).into_response()
}

const ABOUT: &str = "Two listeners: the gateway (8080) for inference, the orchestrator (8888) for \
control; `x-wharf-listeners` says which has an operation. With `auth.keys` configured an operation \
needs a key of the scope in `x-wharf-scope`; `admin` includes `read`. Every 429 and 503 says in \
`Retry-After` when to try again. Front doors (`ports` in models.yaml) have /v1/chat/completions, \
/v1/completions and /health of one model each, as described here.";

const TAGS: [(&str, &str); 5] = [
    ("models", "what is loaded, and changing it"),
    ("state", "health, metrics, swaps, GPUs, queue, news"),
    ("configuration", "what is in force, and changing it"),
    ("llama-swap", "that tool's control paths, on both listeners"),
    ("inference", "the gateway: a request names its model and gets it"),
];

fn ops() -> Vec<Op> {
    [models::ops(), state::ops(), config::ops(), llama_swap::ops(), gateway::ops()].concat()
}

/// The row of each listener behind an operation.
fn rows(op: &Op) -> Vec<(&'static str, Route)> {
    let tables = [
        ("gateway", crate::gateway::routes::routes()),
        ("gateway", routes::routes_on_gateway()),
        ("orchestrator", routes::routes()),
    ];
    let is_its = |route: &Route| {
        let takes = route.methods.is_empty() || route.methods.contains(&op.method);
        route.path == op.route && takes
    };
    tables
        .into_iter()
        .filter_map(|(listener, table)| Some((listener, table.into_iter().find(is_its)?)))
        .collect()
}

fn whole() -> Value {
    let mut paths = Map::new();
    for op in ops() {
        let rows = rows(&op);
        let Some((_, row)) = rows.first() else { continue };
        let listeners: Vec<&str> = rows.iter().map(|(listener, _)| *listener).collect();
        let (needs, path, method) = (row.needs, op.path, op.method.to_ascii_lowercase());
        paths.entry(path).or_insert_with(|| json!({}))[method] = op.render(needs, &listeners);
    }
    let tags = TAGS.iter().map(|(name, about)| json!({ "name": name, "description": about }));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Wharf",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            "description": ABOUT,
        },
        "servers": [{ "url": "/", "description": "the listener that this came from" }],
        "tags": tags.collect::<Vec<_>>(),
        "paths": paths,
        "components": {
            "schemas": schemas::all(),
            "securitySchemes": {
                "bearer": { "type": "http", "scheme": "bearer" },
                "x-api-key": { "type": "apiKey", "in": "header", "name": "x-api-key" },
                "basic": {
                    "type": "http", "scheme": "basic",
                    "description": "the key is the password, or the user where there is none",
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn table() -> Vec<Route> {
        [crate::gateway::routes::routes(), routes::routes()].concat()
    }

    #[test]
    fn every_route_is_described_and_nothing_else_is() {
        let ops = ops();
        for route in table() {
            let methods = if route.methods.is_empty() { &["GET", "POST"] } else { route.methods };
            for method in methods {
                let is_its = |op: &&Op| op.route == route.path && op.method == *method;
                assert!(
                    ops.iter().any(|op| is_its(&op)),
                    "{method} {} is not described: add it under src/api/openapi/",
                    route.path
                );
            }
        }
        for op in &ops {
            assert!(!rows(op).is_empty(), "{} {} is no route", op.method, op.path);
        }
    }

    #[test]
    fn where_both_listeners_have_a_path_it_takes_the_same_scope() {
        for op in ops() {
            let scopes: Vec<_> = rows(&op).iter().map(|(_, row)| row.needs).collect();
            assert!(scopes.windows(2).all(|two| two[0] == two[1]), "{}: {scopes:?}", op.path);
        }
    }

    #[test]
    fn nothing_is_described_twice_and_every_schema_is_there() {
        let ops = ops();
        let names: BTreeSet<_> = ops.iter().map(|op| (op.path, op.method)).collect();
        assert_eq!(names.len(), ops.len());
        let document = whole();
        let text = document.to_string();
        let schemas = document["components"]["schemas"].as_object().unwrap();
        for used in text.split("\"#/components/schemas/").skip(1) {
            let name = used.split('"').next().unwrap();
            assert!(schemas.contains_key(name), "{name} is used and not there");
        }
        for name in schemas.keys() {
            assert!(text.contains(&format!("schemas/{name}\"")), "{name} is used nowhere");
        }
        let tags: BTreeSet<_> = TAGS.iter().map(|(name, _)| *name).collect();
        assert!(ops.iter().all(|op| tags.contains(op.tag)));
    }
}
