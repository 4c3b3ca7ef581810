//! Who may call what: every route of both tables, by every kind of key, in every way to present one.
//! `cargo test --test authorization -- --nocapture` prints the matrix.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;

use http::Method;
use http_body_util::Full;
use hyper::Request;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use support::{EXE, serve};
use wharf::api::endpoint::Route;
use wharf::api::guard::Needs;

const INFERENCE: &str = "key-for-inference-0001";
const READ: &str = "key-for-reading-000002";
const ADMIN: &str = "key-for-an-admin-00003";
const BOTH: &str = "key-for-everything-004";

/// What a caller is, and the key that it shows.
const CALLERS: [(&str, Option<&str>); 6] = [
    ("no key", None),
    ("unknown", Some("key-that-nobody-gave-0")),
    ("inference", Some(INFERENCE)),
    ("read", Some(READ)),
    ("admin", Some(ADMIN)),
    ("inference+admin", Some(BOTH)),
];

const WAYS: [&str; 4] = ["Bearer", "x-api-key", "Basic", "Basic, as user"];

/// What the scopes mean, said once more and independently of the product: 401, 403 or "passes".
fn expected(needs: Needs, caller: &str) -> &'static str {
    let passes: &[&str] = match needs {
        Needs::Nothing => return "passes",
        Needs::Read => &["read", "admin", "inference+admin"],
        Needs::Admin => &["admin", "inference+admin"],
        Needs::Inference => &["inference", "inference+admin"],
        Needs::InferenceOrAdmin => &["inference", "admin", "inference+admin"],
    };
    match caller {
        "no key" | "unknown" => "401",
        caller if passes.contains(&caller) => "passes",
        _ => "403",
    }
}

struct Caller {
    client: Client<HttpConnector, Full<bytes::Bytes>>,
}

impl Caller {
    fn new() -> Caller {
        Caller { client: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// The status, without the body: streams do not end.
    async fn ask(&self, method: &str, url: &str, way: &str, key: Option<&str>, body: &str) -> u16 {
        let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).unwrap());
        request = request.uri(url).header("content-type", "application/json");
        if let Some(key) = key {
            use base64::Engine as _;
            let basic = |pair: String| {
                format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            };
            request = match way {
                "Bearer" => request.header("authorization", format!("Bearer {key}")),
                "x-api-key" => request.header("x-api-key", key),
                "Basic" => request.header("authorization", basic(format!("anybody:{key}"))),
                _ => request.header("authorization", basic(format!("{key}:"))),
            };
        }
        let request = request.body(Full::from(body.to_owned())).unwrap();
        let asked = self.client.request(request);
        let patience = std::time::Duration::from_secs(60);
        tokio::time::timeout(patience, asked)
            .await
            .expect("an answer in time")
            .unwrap()
            .status()
            .as_u16()
    }
}

/// A path of a row, with something unknown where a name stands: nothing is loaded by asking.
fn concrete(path: &str) -> String {
    path.split('/')
        .map(|part| if part.starts_with('{') { "1" } else { part })
        .collect::<Vec<_>>()
        .join("/")
}

fn word(status: u16) -> &'static str {
    match status {
        401 => "401",
        403 => "403",
        _ => "passes",
    }
}

fn models() -> String {
    format!(
        "  ada:\n    engine: vllm\n    gpus: 0\n    process:\n      cmd: >-\n        {EXE} engine \
         --style vllm --host 127.0.0.1 --port ${{PORT}} --name ada\n"
    )
}

fn keys() -> String {
    let key = |name: &str, key: &str, scopes: &str| {
        format!("    - {{ name: {name}, key: {key}, models: [\"*\"], scopes: [{scopes}] }}\n")
    };
    format!(
        "gpu: {{ provider: none }}\nswap: {{ mode: single-active }}\nauth:\n  keys:\n{}{}{}{}",
        key("infers", INFERENCE, "inference"),
        key("reads", READ, "read"),
        key("administers", ADMIN, "admin"),
        key("both", BOTH, "inference, admin"),
    )
}

/// Statuses of one route for every caller, all ways agreeing.
async fn row(caller: &Caller, base: &str, method: &str, route: &Route) -> Vec<(String, u16)> {
    let url = format!("{base}{}", concrete(route.path));
    let mut row = Vec::new();
    for (who, key) in CALLERS {
        let mut statuses = Vec::new();
        for way in WAYS {
            statuses.push(caller.ask(method, &url, way, key, "{}").await);
            if key.is_none() {
                break;
            }
        }
        assert!(
            statuses.iter().all(|status| word(*status) == word(statuses[0])),
            "{method} {url} as {who}: {WAYS:?} gave {statuses:?}"
        );
        row.push((who.to_owned(), statuses[0]));
    }
    row
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_is_for_those_keys_that_its_row_in_the_table_names() {
    let world = serve(&keys(), &models(), &[]).await;
    let talk = &world.server.talk;
    let on_gateway = [wharf::gateway::routes::routes(), wharf::api::routes_on_gateway()].concat();
    let tables = [
        ("gateway", &talk.gateway, on_gateway),
        ("orchestrator", &talk.orchestrator, wharf::api::routes()),
    ];
    let caller = Caller::new();
    let mut wrong = Vec::new();
    let mut asked = 0;
    println!("{:13}{:8}{:36}{:20}{}", "listener", "method", "path", "needs", header());
    for (listener, base, table) in tables {
        for route in &table {
            let methods = if route.methods.is_empty() { &["GET", "POST"] } else { route.methods };
            for method in methods {
                let row = row(&caller, base, method, route).await;
                let (path, needs) = (route.path, route.needs);
                let shown: String = row.iter().map(|(_, status)| format!("{status:<17}")).collect();
                println!("{listener:13}{method:8}{path:36}{:20}{shown}", needs.as_str());
                for (who, status) in row {
                    asked += 1;
                    let expected = expected(needs, &who);
                    if word(status) != expected || status == 405 {
                        wrong.push(format!("{method} {path} as {who}: {status}, not {expected}"));
                    }
                }
            }
        }
    }
    println!("{asked} cells, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(asked > 300, "the tables are not all here: {asked}");
    world.stop().await;
}

fn header() -> String {
    CALLERS.iter().map(|(who, _)| format!("{who:<17}")).collect()
}

/// Paths of a vLLM behind `/upstream/ada`: what is served, what only an admin gets, what nobody gets.
const ENGINE_PATHS: [(&str, &str, &str); 8] = [
    ("GET", "/v1/models", "inference"),
    ("POST", "/v1/chat/completions", "inference"),
    ("POST", "/collective_rpc", "development"),
    ("POST", "/reset_prefix_cache", "development"),
    ("GET", "/server_info", "development"),
    ("POST", "/sleep", "nobody"),
    ("POST", "/v1/load_lora_adapter", "nobody"),
    ("GET", "/docs", "nobody"),
];

fn expected_of_engine(class: &str, caller: &str) -> &'static str {
    match (class, caller) {
        (_, "no key" | "unknown") => "401",
        ("inference", "inference" | "inference+admin") => "passes",
        ("development", "admin" | "inference+admin") => "passes",
        _ => "403",
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engines_development_paths_are_for_admins_and_for_no_one_where_there_are_no_keys() {
    let world = serve(&keys(), &models(), &[]).await;
    let caller = Caller::new();
    println!("{:8}{:26}{:14}{}", "method", "engine path", "class", header());
    for (method, path, class) in ENGINE_PATHS {
        let url = format!("{}/upstream/ada{path}", world.server.talk.gateway);
        let mut statuses = BTreeMap::new();
        for (who, key) in CALLERS {
            let status = caller.ask(method, &url, "Bearer", key, "{}").await;
            assert_eq!(word(status), expected_of_engine(class, who), "{method} {path} as {who}");
            statuses.insert(who, status);
        }
        let shown: String =
            CALLERS.iter().map(|(who, _)| format!("{:<17}", statuses[who])).collect();
        println!("{method:8}{path:26}{class:14}{shown}");
    }
    world.stop().await;

    let world =
        serve("gpu: { provider: none }\nswap: { mode: single-active }", &models(), &[]).await;
    for (method, path, class) in ENGINE_PATHS {
        let url = format!("{}/upstream/ada{path}", world.server.talk.gateway);
        for key in [None, Some(ADMIN)] {
            let status = caller.ask(method, &url, "Bearer", key, "{}").await;
            let expected = if class == "inference" { "passes" } else { "403" };
            assert_eq!(word(status), expected, "{method} {path}, no keys configured");
        }
    }
    world.stop().await;
}
