//! `/upstream/{model}/{path…}`: what reaches the engine, and what never does.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wharf::config::catalog::*;
use wharf::gateway::Limits;
use wharf::scheduler::action::Refusal;
use wharf::units::InstanceId;

use crate::support::{World, catalog, model, settings, timely, until};

pub fn comfyui() -> ModelSpec {
    let rule = |method: Method, path: &str| PathRule { method: Some(method), path: path.into() };
    ModelSpec {
        engine: EngineKind::Http,
        http: Some(Arc::new(HttpService {
            activity: vec![rule(Method::POST, "/prompt"), rule(Method::POST, "/api/prompt")],
            queue: Some("/queue".into()),
            ..HttpService::default()
        })),
        ..model("painter", &["comfyui"])
    }
}

/// One model of every engine, all of them ready at the scripted engine.
async fn every_engine(keys: Vec<ApiKey>) -> World {
    let engine = |engine, name| ModelSpec { engine, ..model(name, &[]) };
    let models = vec![
        model("mistral", &["gpt-4o"]),
        model("org/qwen:7b", &[]),
        model("org", &[]),
        engine(EngineKind::Llamacpp, "llama"),
        engine(EngineKind::Openai, "remote"),
        engine(EngineKind::Ollama, "ollama"),
        ModelSpec { upstream_name: Some("sql-lora".into()), ..model("sql", &[]) },
        comfyui(),
    ];
    let change = |to: &mut Catalog| {
        let listen = to.settings.gateway;
        *to = catalog(models, settings());
        to.settings.gateway = listen;
        to.settings.auth.keys = keys;
    };
    let world = World::with(change, Limits::default()).await;
    for (at, name) in (1..).zip(world.handle.catalog().models.keys()) {
        world.handle.gate_for_tests(InstanceId(at), name, world.engine.endpoint(), 8);
    }
    world
}

fn ask(world: &World, method: &str, path: &str) -> Request<Full<Bytes>> {
    let request = Request::builder().method(method);
    request.uri(format!("http://{}{path}", world.address)).body(Full::default()).unwrap()
}

/// Sent as written: no client library touches the path.
async fn raw(world: &World, method: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timely(stream.read_to_string(&mut answer)).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer)
}

// contract: RULE names with slashes and colons work in every path
// contract: RULE the longest configured name wins
// contract: any /upstream/{model}/{path…}
#[tokio::test]
async fn a_request_goes_on_as_it_came_under_every_spelling_of_the_name() {
    let mut world = every_engine(Vec::new()).await;
    for (path, sent) in [
        ("/upstream/mistral/v1/models?a=b%20c&d", "get /v1/models?a=b%20c&d "),
        ("/upstream/gpt-4o/health", "get /health "),
        ("/upstream/org/qwen:7b/v1/models", "get /v1/models "),
        ("/upstream/org%2Fqwen%3A7b/v1/models", "get /v1/models "),
        ("/upstream/org%2fqwen:7b/v1/models/org%20x", "get /v1/models/org%20x "),
        ("/upstream/org/health", "get /health "),
        ("/upstream/llama/", "get / "),
        ("/upstream/llama//_app/./x/../immutable/%61.js", "get /_app/immutable/a.js "),
        ("/upstream/painter/view?filename=a%2Fb.png", "get /view?filename=a%2fb.png "),
        ("/upstream/painter/userdata/workflows%2Fone.json", "get /userdata/workflows%2fone.json "),
        ("/comfyui/", "get / "),
        ("/comfyui/object_info?x", "get /object_info?x "),
        ("/v1/audio/voices?model=remote", "get /v1/audio/voices?model=remote "),
        ("/sdapi/v1/loras?model=remote", "get /sdapi/v1/loras?model=remote "),
    ] {
        let reply = world.spawn(ask(&world, "GET", path));
        let exchange = world.engine.request().await;
        assert!(exchange.head.starts_with(sent), "{path}: {}", exchange.head);
        assert!(exchange.body.is_empty());
        exchange.answer("418 Teapot", "x-kept: 1\r\n", "{ \"as\":1 }").await;
        let reply = reply.await.unwrap();
        assert_eq!(
            (reply.status().as_u16(), &reply.headers()["x-kept"]),
            (418, &"1".parse().unwrap())
        );
        assert!(reply.headers().contains_key("x-wharf-model"), "{path}");
        assert!(reply.headers().contains_key("x-request-id"), "{path}");
        assert_eq!(reply.text().await, "{ \"as\":1 }");
    }
}

#[tokio::test]
async fn method_headers_and_a_large_body_arrive_and_credentials_do_not() {
    let mut world = every_engine(Vec::new()).await;
    let body = "0123456789abcdef".repeat(250_000);
    let mut request = ask(&world, "PATCH", "/upstream/painter/anything");
    *request.body_mut() = Full::from(body.clone());
    for (name, value) in [
        ("authorization", "Bearer client-secret"),
        ("cookie", "session=client-secret"),
        ("origin", "http://localhost:8080"),
        ("host", "localhost:8080"),
        ("sec-fetch-site", "same-origin"),
        ("connection", "keep-alive, x-private"),
        ("x-private", "client-secret"),
        ("x-wharf-priority", "low"),
        ("x-custom", "kept"),
    ] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let reply = world.spawn(request);
    let exchange = world.engine.request().await;
    assert!(exchange.head.starts_with("patch /anything http/1.1\r\n"), "{}", exchange.head);
    assert!(exchange.body == body.as_bytes(), "4 MB unchanged");
    assert!(exchange.head.contains("x-custom: kept\r\n"));
    for gone in ["client-secret", "x-wharf", "origin:", "sec-fetch", "localhost:8080"] {
        assert!(!exchange.head.contains(gone), "{gone}: {}", exchange.head);
    }
    exchange.answer("201 Created", "set-cookie: a=b\r\n", "").await;
    assert_eq!(reply.await.unwrap().status(), 201);
}

#[tokio::test]
async fn an_answer_is_relayed_as_it_comes_and_frees_its_lease_when_the_client_leaves() {
    let mut world = every_engine(Vec::new()).await;
    let gate = world.handle.gates().get("mistral").cloned().unwrap();
    let mut request = ask(&world, "POST", "/upstream/mistral/v1/completions");
    *request.body_mut() = Full::from(r#"{"model":"gpt-4o","stream":true}"#);
    let reply = world.spawn(request);
    let mut exchange = world.engine.request().await;
    assert_eq!(exchange.body, br#"{"model":"gpt-4o","stream":true}"#, "as it came");
    exchange.stream().await;
    exchange.chunk("data: 1\n\n").await;
    let mut reply = reply.await.unwrap();
    assert_eq!(reply.part().await.unwrap(), "data: 1\n\n");
    assert_eq!(gate.in_flight(), 1);
    exchange.chunk("data: 2\n\n").await;
    assert_eq!(reply.part().await.unwrap(), "data: 2\n\n");
    drop(reply);
    world.client =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
            .build_http();
    until("the lease ends", || gate.in_flight() == 0).await;
}

#[tokio::test]
async fn a_model_that_is_not_ready_is_waited_for_unless_never_is_asked() {
    let mut world = World::new().await;
    let mut never = ask(&world, "GET", "/upstream/mistral/health");
    never.headers_mut().insert("x-wharf-start", "never".parse().unwrap());
    let reply = world.spawn(never);
    let arrived = world.arrived().await;
    assert!(arrived.request.never_start);
    arrived.refuse(Refusal::NotLoaded);
    let (status, code, _) = reply.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (503, "model_not_loaded"));
    let mut request = ask(&world, "GET", "/upstream/mistral/health");
    request.headers_mut().insert("x-wharf-max-wait", "7s".parse().unwrap());
    let reply = world.spawn(request);
    let arrived = world.arrived().await;
    assert_eq!(arrived.request.max_wait, Some(Duration::from_secs(7)));
    arrived.grant(&world.ready());
    world.engine.request().await.answer_json("{}").await;
    assert_eq!(reply.await.unwrap().status(), 200);
}

// contract: RULE /upstream is an allow-list per engine
#[tokio::test]
async fn paths_outside_of_an_engines_list_are_refused_however_they_are_spelt() {
    let mut world = every_engine(Vec::new()).await;
    for line in [
        "POST /upstream/mistral/sleep",
        "POST /upstream/mistral/sleep?level=2",
        "POST /upstream/mistral/Sleep",
        "POST /upstream/mistral/sleep/",
        "POST /upstream/mistral//sleep",
        "POST /upstream/mistral/v1/../sleep",
        "POST /upstream/mistral/v1/%2e%2e/sleep",
        "POST /upstream/mistral/%73leep",
        "POST /upstream/mistral/sleep.",
        "POST /upstream/org%2Fqwen:7b/wake_up",
        "POST /upstream/mistral/v1/load_lora_adapter",
        "POST /upstream/mistral/v1/%6coad_lora_adapter",
        "POST /upstream/remote/v1/load_lora_adapter",
        "POST /upstream/remote/V1/LOAD_LORA_ADAPTER",
        "POST /upstream/mistral/collective_rpc",
        "POST /upstream/mistral/reset_prefix_cache",
        "POST /upstream/mistral/start_profile",
        "GET /upstream/mistral/server_info",
        "GET /upstream/mistral/is_sleeping",
        "POST /upstream/mistral/abort_requests",
        "GET /upstream/mistral/docs",
        "GET /upstream/mistral/",
        "DELETE /upstream/mistral/v1/models/x",
        "POST /upstream/llama/props",
        "POST /upstream/llama/slots/0?action=erase",
        "POST /upstream/llama/models/load",
        "GET /upstream/llama/cors-proxy?url=http://169.254.169.254/",
        "DELETE /upstream/ollama/api/delete",
        "POST /upstream/ollama/api/pull",
        "POST /upstream/ollama/api/blobs/sha256:0",
        "POST /upstream/remote/sdapi/v1/server-kill",
        "POST /sdapi/v1/server-kill?model=remote",
        "GET /sdapi/v1/loras?model=mistral",
        "TRACE /upstream/painter/x",
    ] {
        let (method, path) = line.split_once(' ').unwrap();
        let (status, answer) = raw(&world, method, path).await;
        assert_eq!(status, 403, "{line}: {answer}");
        assert!(answer.contains("\"path_not_allowed\"") && answer.contains("engine"), "{answer}");
    }
    for path in [
        "/upstream/mistral/..",
        "/upstream/mistral/../sleep",
        "/upstream/mistral/%2e%2e/org/sleep",
        "/upstream/mistral/v1%2fmodels",
        "/upstream/mistral/v1/..%2fsleep",
        "/upstream/mistral/%2573leep",
        "/upstream/mistral/v1/..;/sleep",
        "/upstream/mistral/v1/models;x",
        "/upstream/mistral/v1%5csleep",
        "/upstream/mistral/v1/models%00",
        "/upstream/mistral/v1/%zz",
        "/upstream/painter/a%2f..%2fb",
    ] {
        let (status, answer) = raw(&world, "GET", path).await;
        assert_eq!(status, 400, "{path}: {answer}");
        assert!(answer.contains("\"path_invalid\""), "{answer}");
    }
    let (status, answer) = raw(&world, "POST", "/upstream/mistral/sleep").await;
    assert_eq!(status, 403);
    assert!(answer.contains("POST /models/{name}/sleep"), "{answer}");
    assert_eq!(raw(&world, "GET", "/upstream/nothing/v1/models").await.0, 404);
    assert_eq!(raw(&world, "GET", "/upstream//mistral/health").await.0, 404);
    assert!(world.engine.has_none(), "nothing reached an engine");
}

/// For every model.
fn key(name: &str, scopes: &[Scope]) -> ApiKey {
    ApiKey {
        name: name.into(),
        key: format!("{name}-key-0123456789").into(),
        models: vec!["*".into()],
        scopes: scopes.to_vec(),
        ..ApiKey::default()
    }
}

// contract: RULE development endpoints want an admin key
#[tokio::test]
async fn development_paths_take_an_admin_key_and_what_wharf_owns_takes_none() {
    let keys = vec![
        key("user", &[Scope::Inference]),
        key("reader", &[Scope::Inference, Scope::Read]),
        key("root", &[Scope::Inference, Scope::Admin]),
        key("ops", &[Scope::Admin]),
    ];
    let mut world = every_engine(keys).await;
    let with = |world: &World, name: &str, method: &str, path: &str| {
        let mut request = ask(world, method, path);
        let key = format!("Bearer {name}-key-0123456789");
        request.headers_mut().insert("authorization", key.parse().unwrap());
        request
    };
    for (name, path, status) in [
        ("user", "/upstream/mistral/reset_prefix_cache", 403),
        ("reader", "/upstream/mistral/reset_prefix_cache", 403),
        ("root", "/upstream/mistral/sleep", 403),
        ("root", "/upstream/mistral/v1/unload_lora_adapter", 403),
        ("root", "/upstream/mistral/something_new", 403),
        ("ops", "/upstream/mistral/v1/completions", 403),
        ("nobody", "/upstream/mistral/v1/completions", 401),
        ("nobody", "/upstream", 405),
    ] {
        let reply = world.send(with(&world, name, "POST", path)).await;
        assert_eq!(reply.status().as_u16(), status, "{name} {path}");
    }
    assert_eq!(world.send(with(&world, "nobody", "GET", "/upstream")).await.status(), 401);
    assert!(world.engine.has_none());
    for (name, path) in [
        ("root", "/upstream/mistral/reset_prefix_cache"),
        ("ops", "/upstream/mistral/collective_rpc"),
        ("user", "/upstream/mistral/v1/completions"),
    ] {
        let reply = world.spawn(with(&world, name, "POST", path));
        let exchange = world.engine.request().await;
        assert!(!exchange.head.contains("-key-0123456789"), "{}", exchange.head);
        exchange.answer_json("{}").await;
        assert_eq!(reply.await.unwrap().status(), 200, "{name} {path}");
    }
}

/// The endpoints that load and unload adapters are Wharf's alone: by no path, with no key.
#[tokio::test]
async fn no_client_reaches_an_engines_adapter_endpoints() {
    let everything = [Scope::Inference, Scope::Read, Scope::Admin];
    let keyed = vec![key("user", &[Scope::Inference]), key("root", &everything)];
    for (keys, callers) in [(Vec::new(), &[""][..]), (keyed, &["user", "root"])] {
        let mut world = every_engine(keys).await;
        for caller in callers {
            for verb in ["load", "unload"] {
                for (before, status) in [
                    ("/upstream/mistral/v1/", 403),
                    ("/upstream/gpt-4o/v1/", 403),
                    ("/upstream/org%2Fqwen:7b//v1/", 403),
                    ("/upstream/sql/v1/", 403),
                    ("/upstream/llama/v1/", 403),
                    ("/upstream/remote/v1/./", 403),
                    ("/upstream/ollama/v1/", 403),
                    ("/upstream/mistral/v1/x/%2e%2e/", 403),
                    ("/v1/", 404),
                    ("/", 404),
                    ("/v1/chat/completions/../", 404),
                    ("/v1/models/../", 405),
                ] {
                    let path = format!("{before}{verb}_lora_adapter");
                    let mut request = ask(&world, "POST", &path);
                    let key = format!("Bearer {caller}-key-0123456789");
                    request.headers_mut().insert("authorization", key.parse().unwrap());
                    *request.body_mut() =
                        Full::from(r#"{"model":"mistral","lora_name":"x","lora_path":"/etc"}"#);
                    let reply = world.send(request).await;
                    assert_eq!(reply.status().as_u16(), status, "{caller} {path}");
                }
            }
        }
        let (status, answer) =
            raw(&world, "POST", "/sdapi/v1/../load_lora_adapter?model=remote").await;
        assert!(matches!(status, 400..=405), "{answer}");
        assert!(world.engine.has_none(), "nothing reached an engine");
    }
}

#[tokio::test]
async fn a_body_may_name_no_other_model_than_the_path() {
    let mut world = every_engine(Vec::new()).await;
    for body in [
        r#"{"model":"sql-lora"}"#,
        r#"{"model":"sql"}"#,
        r#"{"mod\u0065l":"sql"}"#,
        r#"{"model":"mistral","model":"sql"}"#,
        r#" {"model":["sql"]}"#,
    ] {
        let mut request = ask(&world, "POST", "/upstream/mistral/v1/completions");
        *request.body_mut() = Full::from(body);
        assert_eq!(world.send(request).await.status(), 400, "{body}");
    }
    let form = "--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nsql\r\n--b--\r\n";
    let mut request = ask(&world, "POST", "/upstream/mistral/v1/audio/transcriptions");
    *request.body_mut() = Full::from(form);
    let kind = "multipart/form-data; boundary=b".parse().unwrap();
    request.headers_mut().insert("content-type", kind);
    let (status, code, _) = world.send(request).await.error().await;
    assert_eq!((status, code.as_str()), (400, "model_mismatch"));
    for query in ["model=sql", "model=mistral&model=sql", "mod%65l=s%71l"] {
        let request = ask(&world, "GET", &format!("/upstream/mistral/v1/audio/voices?{query}"));
        let (status, code, _) = world.send(request).await.error().await;
        assert_eq!((status, code.as_str()), (400, "model_mismatch"), "{query}");
    }
    assert!(world.engine.has_none());
    for (path, body) in [
        ("/upstream/sql/v1/completions", r#"{"model":"sql-lora"}"#),
        ("/upstream/sql/v1/completions", r#"{"model":"sql"}"#),
        ("/upstream/sql/tokenize", r#"{"prompt":"x"}"#),
        ("/upstream/llama/completion", r#"{"model":"gpt-3.5-turbo"}"#),
        ("/upstream/mistral/v1/completions", "not json"),
    ] {
        let mut request = ask(&world, "POST", path);
        *request.body_mut() = Full::from(body);
        let reply = world.spawn(request);
        world.engine.request().await.answer_json("{}").await;
        assert_eq!(reply.await.unwrap().status(), 200, "{path} {body}");
    }
}

/// What is no UTF-8 here is JSON to Python's servers.
#[tokio::test]
async fn a_body_is_read_here_as_the_engine_reads_it() {
    let mut world = every_engine(Vec::new()).await;
    let body = r#"{"model":"sql"}"#;
    let wide = |bytes: fn(u16) -> [u8; 2]| body.encode_utf16().flat_map(bytes).collect::<Vec<u8>>();
    let bodies = [
        ("utf-8 with a mark", [b"\xef\xbb\xbf", body.as_bytes()].concat(), None),
        ("utf-16le", wide(u16::to_le_bytes), None),
        ("utf-16be", wide(u16::to_be_bytes), None),
        ("gzip", b"\x1f\x8b\x08".to_vec(), Some("gzip")),
    ];
    for (what, body, coding) in bodies {
        let mut request = ask(&world, "POST", "/upstream/mistral/v1/completions");
        *request.body_mut() = Full::from(body);
        if let Some(coding) = coding {
            request.headers_mut().insert("content-encoding", coding.parse().unwrap());
        }
        let (status, code, _) = world.send(request).await.error().await;
        assert_eq!((status, code.as_str()), (415, "body_encoding"), "{what}");
    }
    assert!(world.engine.has_none());
}

/// Ollama's `/api/show` has an older field for it.
#[tokio::test]
async fn who_leaves_out_the_model_gets_no_other_one() {
    let mut world = every_engine(Vec::new()).await;
    let mut request = ask(&world, "POST", "/upstream/ollama/api/show");
    *request.body_mut() = Full::from(r#"{"name":"other"}"#);
    let (status, code, _) = world.send(request).await.error().await;
    assert_eq!((status, code.as_str()), (400, "model_missing"));
    assert!(world.engine.has_none());
}

#[tokio::test]
async fn upstream_alone_lists_what_there_is() {
    let world = every_engine(Vec::new()).await;
    for path in ["/upstream", "/upstream/"] {
        let list = world.get(path).await.json().await;
        let rows = list["data"].as_array().unwrap();
        assert_eq!(rows.len(), 8);
        let qwen = rows.iter().find(|row| row["id"] == "org/qwen:7b").unwrap();
        assert_eq!(qwen["url"], "/upstream/org/qwen:7b/");
        assert_eq!(qwen["engine"], "vllm");
    }
}

#[tokio::test]
async fn redirects_stay_below_the_models_path() {
    let mut world = every_engine(Vec::new()).await;
    let reply = world.get("/upstream/org%2Fqwen:7b?x=1").await;
    assert_eq!(reply.status(), 301);
    assert_eq!(reply.headers()["location"], "/upstream/org%2Fqwen:7b/?x=1");
    let reply = world.send(ask(&world, "POST", "/comfyui?x")).await;
    assert_eq!(
        (reply.status().as_u16(), &reply.headers()["location"]),
        (308, &"/comfyui/?x".parse().unwrap())
    );
    for (path, to, seen) in [
        ("/upstream/painter/old", "/new", "/upstream/painter/new"),
        ("/comfyui/old", "/new?a", "/comfyui/new?a"),
        ("/comfyui/old", "http://elsewhere/", "http://elsewhere/"),
        ("/comfyui/old", "//elsewhere/", "//elsewhere/"),
    ] {
        let reply = world.spawn(ask(&world, "GET", path));
        let exchange = world.engine.request().await;
        exchange.answer("302 Found", &format!("location: {to}\r\n"), "").await;
        assert_eq!(reply.await.unwrap().headers()["location"], seen);
    }
}

// contract: RULE foreign hosts and origins are refused
#[tokio::test]
async fn foreign_pages_may_use_none_of_the_ways_to_an_engine() {
    let mut world = every_engine(Vec::new()).await;
    for path in [
        "/upstream/mistral/health",
        "/upstream",
        "/comfyui/",
        "/sdapi/v1/loras?model=remote",
        "/v1/audio/voices?model=remote",
    ] {
        for (name, value) in [
            ("origin", "https://evil.example"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            let mut request = ask(&world, "GET", path);
            request.headers_mut().insert(name, value.parse().unwrap());
            let (status, code, _) = world.send(request).await.error().await;
            assert_eq!((status, code.as_str()), (403, "origin_not_allowed"), "{path} {name}");
        }
        let mut request = ask(&world, "GET", path);
        request.headers_mut().insert("host", "evil.example".parse().unwrap());
        let (status, code, _) = world.send(request).await.error().await;
        assert_eq!((status, code.as_str()), (403, "host_not_allowed"), "{path}");
    }
    assert!(world.engine.has_none());
}

#[tokio::test]
async fn looking_at_a_server_that_is_no_llms_neither_starts_nor_counts() {
    let mut world = World::with(
        |catalog| *catalog = crate::support::catalog(vec![comfyui()], settings()),
        Limits::default(),
    )
    .await;
    let (status, code, message) = world.get("/comfyui/queue").await.error().await;
    assert_eq!((status, code.as_str()), (503, "model_not_loaded"));
    assert!(message.contains("http.activity"), "{message}");
    let mut request = ask(&world, "GET", "/upstream/painter/");
    request.headers_mut().insert("accept", "text/html,*/*;q=0.8".parse().unwrap());
    let reply = world.send(request).await;
    assert_eq!(reply.status(), 503);
    assert!(reply.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
    assert!(reply.headers().contains_key("retry-after"));
    let page = reply.text().await;
    assert!(
        page.contains("painter is not loaded") && page.contains("wharf load painter"),
        "{page}"
    );
    assert!(world.messages.try_recv().is_err(), "the owner heard nothing of it");
    let reply = world.spawn(ask(&world, "POST", "/comfyui/prompt"));
    let arrived = world.arrived().await;
    assert_eq!(arrived.request.model.as_str(), "painter");
    let gate =
        world.handle.gate_for_tests(InstanceId(1), &"painter".into(), world.engine.endpoint(), 1);
    arrived.grant(&gate);
    // With its one place taken, and even closed, it is looked at as before.
    let prompt = world.engine.request().await;
    assert!(prompt.head.starts_with("post /prompt "));
    wharf::orchestrator::Handle::close_for_tests(&gate);
    let before = (gate.in_flight(), gate.granted(), gate.last_used());
    let seen = world.spawn(ask(&world, "GET", "/comfyui/index.html"));
    let page = loop {
        let exchange = world.engine.request().await;
        match exchange.head.starts_with("get /queue ") {
            true => exchange.answer_json("{}").await,
            false => break exchange,
        }
    };
    assert!(page.head.starts_with("get /index.html "), "{}", page.head);
    assert_eq!((gate.in_flight(), gate.granted(), gate.last_used()), before);
    page.answer("200 OK", "", "page").await;
    assert_eq!(seen.await.unwrap().text().await, "page");
    prompt.answer_json("{}").await;
    assert_eq!(reply.await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_queue_that_is_not_empty_is_work_under_way() {
    let mut world = World::with(
        |catalog| *catalog = crate::support::catalog(vec![comfyui()], settings()),
        Limits::default(),
    )
    .await;
    let gate =
        world.handle.gate_for_tests(InstanceId(1), &"painter".into(), world.engine.endpoint(), 8);
    for _ in 0..3 {
        let reply = world.spawn(ask(&world, "POST", "/upstream/painter/prompt"));
        let mut looks = 0;
        loop {
            let exchange = world.engine.request().await;
            if exchange.head.starts_with("post /prompt ") {
                exchange.answer_json("{}").await;
                break;
            }
            looks += 1;
            exchange.answer_json(r#"{"queue_running":[],"queue_pending":[]}"#).await;
        }
        assert!(looks < 100);
        assert_eq!(reply.await.unwrap().text().await, "{}");
    }
    for _ in 0..3 {
        let look = world.engine.request().await;
        assert!(look.head.starts_with("get /queue "), "{}", look.head);
        assert_eq!(gate.in_flight(), 1, "one lease for all of it");
        look.answer_json(r#"{"queue_running":[[0,"id"]],"queue_pending":[]}"#).await;
    }
    for _ in 0..2 {
        assert_eq!(gate.in_flight(), 1);
        let look = world.engine.request().await;
        look.answer_json(r#"{"queue_running":[],"queue_pending":[]}"#).await;
    }
    until("the work is done", || gate.in_flight() == 0).await;
    assert_eq!(gate.granted(), 3);
    // The drain deadline ends this lease as any other.
    let reply = world.spawn(ask(&world, "POST", "/upstream/painter/prompt"));
    loop {
        let exchange = world.engine.request().await;
        if exchange.head.starts_with("post /prompt ") {
            break exchange.answer_json("{}").await;
        }
        exchange.answer_json(r#"{"queue_running":[1]}"#).await;
    }
    reply.await.unwrap().text().await;
    world.engine.request().await.answer_json(r#"{"queue_running":[1]}"#).await;
    assert_eq!(gate.in_flight(), 1);
    gate.cancel_leases();
    until("the lease is cut", || gate.in_flight() == 0).await;
}

// contract: any /sdapi/v1/{path…}
// contract: GET /v1/audio/voices
#[tokio::test]
async fn the_model_may_stand_in_the_query_or_in_the_body() {
    let mut world = every_engine(Vec::new()).await;
    let mut request = ask(&world, "POST", "/sdapi/v1/txt2img");
    *request.body_mut() = Full::from(r#"{"model":"remote","prompt":"a pier"}"#);
    let reply = world.spawn(request);
    let exchange = world.engine.request().await;
    assert!(exchange.head.starts_with("post /sdapi/v1/txt2img "));
    assert_eq!(exchange.body, br#"{"model":"remote","prompt":"a pier"}"#);
    exchange.answer_json("{}").await;
    reply.await.unwrap();
    for path in ["/v1/audio/voices?model=remote", "/sdapi/v1/loras?model=remote"] {
        let reply = world.spawn(ask(&world, "GET", path));
        let exchange = world.engine.request().await;
        assert!(exchange.head.starts_with(&format!("get {path} ")), "{}", exchange.head);
        exchange.answer_json(r#"{"voices":["alloy"]}"#).await;
        assert_eq!(reply.await.unwrap().json().await["voices"][0], "alloy", "{path}");
    }
    for path in ["/sdapi/v1/txt2img", "/v1/audio/voices"] {
        let (status, code, _) = world.send(ask(&world, "POST", path)).await.error().await;
        assert_eq!((status, code.as_str()), (400, "model_missing"), "{path}");
    }
    let (status, code, _) = world.get("/v1/audio/voices?model=nothing").await.error().await;
    assert_eq!((status, code.as_str()), (404, "model_not_found"));
}

#[tokio::test]
async fn models_for_pictures_are_listed_as_the_stable_diffusion_web_ui_does() {
    let flux = ModelSpec { tags: vec!["Image".into()], ..model("flux", &[]) };
    let other = ModelSpec { model_type: "diffusion".into(), ..model("sdxl", &[]) };
    let change = |to: &mut Catalog| {
        to.models.extend([flux, other].map(|spec| (spec.name.clone(), Arc::new(spec))))
    };
    let world = World::with(change, Limits::default()).await;
    let list = world.get("/sdapi/v1/sd-models").await.json().await;
    let names: Vec<&str> =
        list.as_array().unwrap().iter().map(|row| row["model_name"].as_str().unwrap()).collect();
    assert_eq!(names, ["flux", "sdxl"]);
    assert_eq!(list[0]["title"], "flux");
    assert!(list[0]["hash"].is_null());
}

#[tokio::test]
async fn a_page_of_many_files_is_none_of_the_requests_that_a_key_is_limited_to() {
    let change = |to: &mut Catalog| {
        let painter = Arc::new(comfyui());
        to.models.insert(painter.name.clone(), painter);
        to.settings.rate_limits = RateLimits { requests_per_minute: Some(1), concurrency: None };
    };
    let mut world = World::with(change, Limits::default()).await;
    let endpoint = world.engine.endpoint();
    world.handle.gate_for_tests(InstanceId(7), &"painter".into(), endpoint, 8);
    for _ in 0..3 {
        let reply = world.spawn(ask(&world, "GET", "/upstream/painter/app.js"));
        world.engine.request().await.answer("200 OK", "", "").await;
        assert_eq!(reply.await.unwrap().status(), 200);
    }
    let reply = world.spawn(ask(&world, "POST", "/upstream/painter/prompt"));
    loop {
        let exchange = world.engine.request().await;
        let is_prompt = exchange.head.starts_with("post ");
        exchange.answer_json("{}").await;
        if is_prompt {
            break;
        }
    }
    assert_eq!(reply.await.unwrap().status(), 200);
    let (status, code, _) =
        world.send(ask(&world, "POST", "/upstream/painter/prompt")).await.error().await;
    assert_eq!((status, code.as_str()), (429, "rate_limited"));
}

#[tokio::test]
async fn the_inference_paths_keep_the_same_rule() {
    let speech = ModelSpec {
        http: Some(Arc::new(HttpService {
            activity: vec![PathRule { method: None, path: "/v1/audio/speech".into() }],
            ..HttpService::default()
        })),
        engine: EngineKind::Http,
        ..model("kokoro", &[])
    };
    let change = |to: &mut Catalog| drop(to.models.insert(speech.name.clone(), Arc::new(speech)));
    let mut world = World::with(change, Limits::default()).await;
    let request = world.post("/v1/images/generations", r#"{"model":"kokoro"}"#);
    let (status, code, _) = world.send(request).await.error().await;
    assert_eq!((status, code.as_str()), (503, "model_not_loaded"));
    assert!(world.messages.try_recv().is_err());
    let reply = world.spawn(world.post("/v1/audio/speech", r#"{"model":"kokoro"}"#));
    let arrived = world.arrived().await;
    let endpoint = world.engine.endpoint();
    arrived.grant(&world.handle.gate_for_tests(InstanceId(1), &"kokoro".into(), endpoint, 8));
    world.engine.request().await.answer("200 OK", "", "sound").await;
    assert_eq!(reply.await.unwrap().text().await, "sound");
}
