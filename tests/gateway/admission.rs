//! What never gets as far as a lease: bad input, unknown names, keys, foreign pages. And the
//! gateway's own pages.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::Full;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wharf::config::catalog::{ApiKey, Catalog, GpuRequest, Group, Scope};
use wharf::gateway::{Limits, browser};
use wharf::orchestrator::View;
use wharf::orchestrator::view::Health;
use wharf::scheduler::action::Refusal;
use wharf::units::{self, ModelName};

use crate::support::{World, settings, timely};

const CHAT: &str = "/v1/chat/completions";
const ASK: &str = r#"{"model":"mistral"}"#;

async fn error(world: &World, request: Request<Full<Bytes>>) -> (u16, String, String) {
    world.send(request).await.error().await
}

#[tokio::test]
async fn bad_bodies_are_400_and_say_where() {
    let world = World::new().await;
    for (body, code, part) in [
        ("{\"model\":\"mistral\",}", "invalid_json", "line 1 column 20"),
        ("{\"model\":\"mistral\",\"model\":\"mistral\"}", "invalid_json", "duplicate"),
        ("{\"model\":\"mistral\",\"Model\":\"x\"}", "invalid_json", "written `model`"),
        ("[1]", "invalid_json", "object"),
        ("", "invalid_json", "empty"),
        ("{\"messages\":[]}", "model_missing", "\"model\""),
        ("{\"model\":3}", "model_invalid", "string"),
    ] {
        let (status, found, message) = error(&world, world.post(CHAT, body)).await;
        assert_eq!((status, found.as_str()), (400, code), "{body}");
        assert!(message.contains(part), "{body}: {message}");
    }
    let reply = world.send(world.post(CHAT, "{}")).await;
    assert_eq!(reply.json().await["error"]["param"], "model");
    let mut request = world.post(CHAT, ASK);
    request.headers_mut().insert("x-wharf-priority", "urgent".parse().unwrap());
    assert_eq!(error(&world, request).await.0, 400);
}

#[tokio::test]
async fn unknown_models_are_404_with_the_nearest_names() {
    let world = World::new().await;
    let unknown = |name: &str| world.post(CHAT, format!("{{\"model\":\"{name}\"}}"));
    let (status, code, message) = error(&world, unknown("mistrl")).await;
    assert_eq!((status, code.as_str()), (404, "model_not_found"));
    assert!(message.contains("did you mean \"mistral\""), "{message}");
    assert!(error(&world, unknown("gpt-4")).await.2.contains("\"gpt-4o\""), "aliases too");
    assert!(error(&world, unknown("zzzzzzzz")).await.2.contains("known are"));
    assert!(error(&world, unknown(&"x".repeat(100_000))).await.2.len() < 1000);
}

// contract: RULE errors have one shape, unknown paths are JSON 404
#[tokio::test]
async fn unlisted_models_are_not_told_to_who_guesses() {
    let change = |to: &mut Catalog| {
        let mut spec = to.models["mistral"].as_ref().clone();
        spec.unlisted = true;
        to.models.insert("mistral".into(), Arc::new(spec));
    };
    let world = World::with(change, Limits::default()).await;
    for name in ["mistrl", "gpt-4", "zzzzzzzz"] {
        let request = world.post(CHAT, format!("{{\"model\":\"{name}\"}}"));
        let (status, _, message) = error(&world, request).await;
        assert_eq!(status, 404);
        assert!(!message.contains("mistral") && !message.contains("gpt-4o"), "{message}");
    }
}

#[tokio::test]
async fn unknown_paths_and_methods_are_json() {
    let world = World::new().await;
    let (status, code, _) = world.get("/nothing").await.error().await;
    assert_eq!((status, code.as_str()), (404, "path_not_found"));
    let (status, _, message) = error(&world, world.post("/embeddings", ASK)).await;
    assert_eq!(status, 404);
    assert!(message.contains("/v1/embeddings"), "{message}");
    let (_, _, message) = world.get("/gpus").await.error().await;
    let told =
        "this is the gateway; the orchestrator (listen.orchestrator) listens on 127.0.0.1:8888";
    assert!(message.contains(told), "{message}");
    let reply = world.get(CHAT).await;
    assert_eq!(reply.headers()["allow"], "POST");
    let (status, code, _) = reply.error().await;
    assert_eq!((status, code.as_str()), (405, "method_not_allowed"));
}

fn small_bodies(catalog: &mut Catalog) {
    catalog.settings.queue.body_limit = units::Bytes(1000);
}

#[tokio::test]
async fn too_large_bodies_are_413_with_both_sizes() {
    let world = World::with(small_bodies, Limits::default()).await;
    let (status, code, message) = error(&world, world.post(CHAT, vec![b'x'; 5000])).await;
    assert_eq!((status, code.as_str()), (413, "body_too_large"));
    assert!(message.contains("4.9 KiB") && message.contains("1000 B"), "{message}");

    // Chunked: known only when it is too late.
    let mut client = TcpStream::connect(world.address).await.unwrap();
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n");
    let chunk = format!("{:x}\r\n{}\r\n", 800, "x".repeat(800));
    client.write_all(format!("{head}{chunk}{chunk}0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = timely(client.read(&mut answer)).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
}

#[tokio::test]
async fn a_slow_body_is_408() {
    let limits = Limits { body_idle: Duration::from_millis(50), ..Limits::default() };
    let world = World::with(|_| {}, limits).await;
    let mut client = TcpStream::connect(world.address).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{{");
    client.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = timely(client.read(&mut answer)).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("1 B of 100 B"), "{answer}");
}

#[tokio::test]
async fn all_waiting_bodies_together_are_bounded() {
    let change = |catalog: &mut Catalog| catalog.settings.queue.total_bodies = units::Bytes(1500);
    let mut world = World::with(change, Limits::default()).await;
    let body = format!("{{\"model\":\"mistral\",\"x\":\"{}\"}}", "x".repeat(1000));
    let first = world.spawn(world.post(CHAT, body.clone()));
    let waiting = world.arrived().await;
    let (status, code, message) = error(&world, world.post(CHAT, body.clone())).await;
    assert_eq!((status, code.as_str()), (429, "bodies_full"));
    assert!(message.contains("queue.total_bodies"), "{message}");
    waiting.refuse(Refusal::Unloaded);
    assert_eq!(first.await.unwrap().status(), 503);
    // What the first held is free again.
    let third = world.spawn(world.post(CHAT, body));
    world.arrived().await.refuse(Refusal::Unloaded);
    assert_eq!(third.await.unwrap().status(), 503);
}

fn keys(catalog: &mut Catalog) {
    let key = |name: &str, models: &[&str], scopes: &[Scope]| ApiKey {
        name: name.into(),
        key: format!("sk-{name}").into(),
        models: models.iter().map(|model| (*model).to_owned()).collect(),
        scopes: scopes.to_vec(),
        ..ApiKey::default()
    };
    catalog.settings.auth.keys = vec![
        key("all", &["*"], &[Scope::Inference]),
        key("qwen", &["org/*"], &[Scope::Inference]),
        key("reader", &["*"], &[Scope::Read]),
    ];
}

// contract: RULE a key has scopes and models
#[tokio::test]
async fn keys_decide_who_may_ask_for_what() {
    let mut world = World::with(keys, Limits::default()).await;
    let with = |key: &str| {
        let mut request = world.post(CHAT, ASK);
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        request
    };
    let reply = world.send(world.post(CHAT, ASK)).await;
    assert_eq!(reply.headers()["www-authenticate"], "Bearer");
    assert_eq!(reply.error().await.0, 401);
    let (status, code, _) = error(&world, with("sk-nobody")).await;
    assert_eq!((status, code.as_str()), (401, "invalid_api_key"));
    let (status, code, _) = error(&world, with("sk-reader")).await;
    assert_eq!((status, code.as_str()), (403, "scope_missing"));
    let (status, code, message) = error(&world, with("sk-qwen")).await;
    assert_eq!((status, code.as_str()), (403, "model_not_allowed"));
    assert!(message.contains("mistral"), "{message}");
    let mut unknown = with("sk-qwen");
    *unknown.body_mut() = Full::from("{\"model\":\"mistrl\"}");
    assert!(!error(&world, unknown).await.2.contains("mistral\""), "not disclosed");

    // No log lines for inference keys, and no raised priority.
    let mut request = with("sk-all");
    request.headers_mut().insert("x-wharf-priority", "high".parse().unwrap());
    let reply = world.spawn(request);
    let arrived = world.arrived().await;
    assert_eq!(arrived.request.priority, units::Priority::Normal);
    arrived.refuse(Refusal::Unloaded);
    reply.await.unwrap();

    for (path, key, status) in [
        ("/v1/models", "sk-all", 200),
        ("/v1/models", "sk-reader", 403),
        ("/status", "sk-reader", 200),
        ("/status", "sk-all", 403),
        ("/metrics", "sk-reader", 200),
        ("/health", "none", 200),
    ] {
        let request = Request::get(format!("http://{}{path}", world.address))
            .header("x-api-key", key)
            .body(Full::default())
            .unwrap();
        assert_eq!(world.send(request).await.status(), status, "{path} {key}");
    }
}

/// `group/model` is one more name of the model: a key may use it by the model's own name, or by the
/// name that was asked for. What comes along with the group is loaded, not served to that key.
// contract: RULE group/model is a name
// contract: RULE a key has scopes and models
#[tokio::test]
async fn a_groups_name_for_a_model_opens_what_the_key_may_use_and_no_more() {
    let world = World::with(
        |catalog| {
            keys(catalog);
            let key = |name: &str, models: &str| ApiKey {
                name: name.into(),
                key: format!("sk-{name}").into(),
                models: vec![models.into()],
                scopes: vec![Scope::Inference],
                ..ApiKey::default()
            };
            catalog.settings.auth.keys.extend([
                key("own", "org/qwen:7b"),
                key("profile", "coding/*"),
                key("member", "coding/mistral"),
            ]);
            let models = ["org/qwen:7b", "mistral"].map(ModelName::new).into();
            catalog.groups.insert("coding".into(), group(models));
        },
        Limits::default(),
    )
    .await;
    let mut world = world;
    let ask = |world: &World, key: &str, model: &str| {
        let mut request = world.post(CHAT, format!("{{\"model\":\"{model}\",\"messages\":[]}}"));
        request.headers_mut().insert("authorization", format!("Bearer sk-{key}").parse().unwrap());
        request
    };
    for (key, model) in [
        ("own", "coding/org/qwen:7b"),
        ("own", "org/qwen:7b"),
        ("profile", "coding/org/qwen:7b"),
        ("profile", "coding/mistral"),
        ("member", "coding/mistral"),
        ("all", "coding/mistral"),
    ] {
        let reply = world.spawn(ask(&world, key, model));
        let arrived = world.arrived().await;
        assert!(model.ends_with(arrived.request.model.as_str()), "{key} {model}");
        arrived.refuse(Refusal::Unloaded);
        assert_eq!(reply.await.unwrap().status(), 503, "{key} {model}");
        let with_company = world.messages.try_recv().is_ok();
        assert_eq!(with_company, model.starts_with("coding/"), "{key} {model}");
    }
    for (key, model, status) in [
        ("own", "coding/mistral", 403),
        ("qwen", "coding/mistral", 403),
        ("profile", "mistral", 403),
        ("profile", "org/qwen:7b", 403),
        ("member", "mistral", 403),
        ("member", "coding/org/qwen:7b", 403),
        ("reader", "coding/mistral", 403),
        ("all", "coding/nobody", 404),
        ("all", "writing/mistral", 404),
    ] {
        let reply = world.send(ask(&world, key, model)).await;
        assert_eq!(reply.status().as_u16(), status, "{key} {model}");
    }
    assert!(world.messages.try_recv().is_err(), "a refused request moves nothing");
}

fn group(models: Vec<ModelName>) -> Group {
    Group { models, together: true, exclusive: false, persistent: false }
}

/// Names that nobody configured leave no series behind.
// contract: RULE metric labels are configured names
#[tokio::test]
async fn a_client_cannot_make_series() {
    let world = World::new().await;
    for name in ["invented-1", "coding/invented-2", "org/invented-3"] {
        let body = format!("{{\"model\":\"{name}\",\"messages\":[]}}");
        assert_eq!(world.send(world.post(CHAT, body)).await.status(), 404, "{name}");
        let path = format!("/upstream/{name}/v1/models");
        assert_eq!(world.get(&path).await.status(), 404, "{name}");
    }
    let text = world.get("/metrics").await.text().await;
    assert!(text.contains("model=\"mistral\""), "{text}");
    assert!(!text.contains("invented"), "{text}");
}

// contract: GET /v1/models
// contract: GET /v1/models/{id}
#[tokio::test]
async fn the_list_of_models() {
    let world = World::with(keys, Limits::default()).await;
    let list = |path: &str, key: &str| {
        Request::get(format!("http://{}{path}", world.address))
            .header("authorization", format!("Bearer {key}"))
            .body(Full::default())
            .unwrap()
    };
    let ids = |body: serde_json::Value| -> Vec<String> {
        let rows = body["data"].as_array().unwrap().clone();
        rows.iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect()
    };
    let all = world.send(list("/v1/models", "sk-all")).await.json().await;
    assert_eq!(all["object"], "list");
    assert_eq!(all["data"][0]["object"], "model");
    assert_eq!(all["data"][0]["meta"]["state"], "stopped");
    assert!(all["data"][0]["created"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(ids(all), ["mistral", "org/qwen:7b"]);
    let aliases = world.send(list("/v1/models?aliases=true", "sk-all")).await.json().await;
    assert_eq!(ids(aliases), ["mistral", "gpt-4o", "org/qwen:7b"]);
    let own = world.send(list("/v1/models", "sk-qwen")).await.json().await;
    assert_eq!(ids(own), ["org/qwen:7b"]);
    for path in ["/v1/models/org/qwen:7b", "/v1/models/org%2Fqwen%3A7b"] {
        let row = world.send(list(path, "sk-qwen")).await.json().await;
        assert_eq!(row["id"], "org/qwen:7b");
    }
    let row = world.send(list("/v1/models/gpt-4o", "sk-all")).await.json().await;
    assert_eq!(row["meta"]["model"], "mistral");
    assert_eq!(world.send(list("/v1/models/no", "sk-all")).await.error().await.0, 404);
}

// contract: GET /health
#[tokio::test]
async fn health_is_200_only_if_it_can_serve() {
    // Port 0: whoever asks here has the listener already.
    let change = |catalog: &mut Catalog| {
        catalog.settings.gateway.set_port(0);
        for spec in catalog.models.values_mut() {
            Arc::make_mut(spec).gpus = GpuRequest::Count(1);
        }
    };
    let world = World::with(change, Limits::default()).await;
    let mut view =
        View { gpu_health: Health { ok: true, detail: "none".into() }, ..View::default() };
    world.handle.publish_for_tests(view.clone());
    let reply = world.get("/health").await;
    assert_eq!(reply.status(), 200);
    assert_eq!(reply.json().await["status"], "healthy");
    view.scheduler.no_proof = Some("NVML: Unknown Error".into());
    view.gpu_health.ok = false;
    world.handle.publish_for_tests(view);
    let reply = world.get("/health").await;
    assert_eq!(reply.status(), 503);
    assert!(reply.headers().contains_key("retry-after"));
    assert_eq!(reply.json().await["gpu"]["status"], "failed");
}

fn judged(
    change: impl FnOnce(&mut wharf::config::catalog::Settings),
    method: &str,
    path: &str,
    pairs: &[(&'static str, &str)],
) -> &'static str {
    let mut settings = settings();
    change(&mut settings);
    let mut headers = HeaderMap::new();
    for &(name, value) in pairs {
        headers.insert(name, value.parse().unwrap());
    }
    match browser::check(&settings, &method.parse().unwrap(), &path.parse().unwrap(), &headers) {
        Ok(()) => "ok",
        Err(reject) => reject.code(),
    }
}

// contract: RULE foreign hosts and origins are refused
#[test]
fn only_our_own_host_names_are_answered() {
    for (host, expected) in [
        ("localhost:8080", "ok"),
        ("LocalHost", "ok"),
        ("127.8.8.8", "ok"),
        ("[::1]:8080", "ok"),
        ("wharf:8080", "ok"),
        ("gpu.LAN", "ok"),
        ("192.168.1.5:8080", "host_not_allowed"),
        ("evil.example", "host_not_allowed"),
        ("localhost.evil.example", "host_not_allowed"),
    ] {
        let hosts = |settings: &mut wharf::config::catalog::Settings| {
            settings.hosts = vec!["wharf".into(), "*.lan".into()];
        };
        assert_eq!(judged(hosts, "GET", "/status", &[("host", host)]), expected, "{host}");
    }
    let any = |settings: &mut wharf::config::catalog::Settings| {
        settings.gateway = "0.0.0.0:8080".parse().unwrap();
    };
    assert_eq!(judged(any, "GET", "/", &[("host", "192.168.1.5:8080")]), "ok");
    assert_eq!(judged(any, "GET", "/", &[("host", "evil.example")]), "host_not_allowed");
}

// contract: RULE foreign hosts and origins are refused
#[test]
fn foreign_pages_change_nothing() {
    let host = ("host", "127.0.0.1:8080");
    for (method, path, name, value, expected) in [
        ("POST", CHAT, "origin", "https://evil.example", false),
        ("POST", CHAT, "origin", "null", false),
        ("POST", CHAT, "origin", "http://127.0.0.1:3000", false),
        ("POST", CHAT, "origin", "http://127.0.0.1:8080", true),
        ("DELETE", "/models/x", "origin", "https://evil.example", false),
        ("GET", "/status", "origin", "https://evil.example", true),
        ("GET", "/unload", "origin", "https://evil.example", false),
        ("GET", "/unload", "sec-fetch-site", "cross-site", false),
        ("GET", "/unload", "sec-fetch-site", "same-site", false),
        ("GET", "/unload", "sec-fetch-site", "none", true),
        ("GET", "/upstream/mistral/x", "sec-fetch-site", "cross-site", false),
        ("POST", CHAT, "sec-fetch-site", "same-origin", true),
    ] {
        let found = judged(|_| {}, method, path, &[host, (name, value)]);
        let expected = if expected { "ok" } else { "origin_not_allowed" };
        assert_eq!(found, expected, "{method} {path} {name}: {value}");
    }
    let socket = [host, ("origin", "https://evil.example"), ("upgrade", "websocket")];
    assert_eq!(judged(|_| {}, "GET", "/any", &socket), "origin_not_allowed");
    let cors = |settings: &mut wharf::config::catalog::Settings| {
        settings.cors = vec!["https://chat.example".into()];
    };
    let chat = [host, ("origin", "https://chat.example"), ("sec-fetch-site", "cross-site")];
    assert_eq!(judged(cors, "POST", CHAT, &chat), "ok");
}

#[tokio::test]
async fn configured_origins_get_cors_headers() {
    let cors = |catalog: &mut Catalog| catalog.settings.cors = vec!["https://chat.example".into()];
    let world = World::with(cors, Limits::default()).await;
    let from = |method: &str, origin: &str| {
        Request::builder()
            .method(method)
            .uri(format!("http://{}{CHAT}", world.address))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization, content-type")
            .body(Full::from("{}"))
            .unwrap()
    };
    let reply = world.send(from("OPTIONS", "https://chat.example")).await;
    assert_eq!(reply.status(), 204);
    assert_eq!(reply.headers()["access-control-allow-origin"], "https://chat.example");
    assert_eq!(reply.headers()["access-control-allow-headers"], "authorization, content-type");
    let reply = world.send(from("POST", "https://chat.example")).await;
    assert_eq!(reply.status(), 400);
    assert_eq!(reply.headers()["access-control-allow-origin"], "https://chat.example");
    let reply = world.send(from("OPTIONS", "https://evil.example")).await;
    assert!(!reply.headers().contains_key("access-control-allow-origin"));
    assert_eq!(reply.status(), 405);
    assert_eq!(world.send(from("POST", "https://evil.example")).await.error().await.0, 403);
}
