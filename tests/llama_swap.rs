//! llama-swap's control paths: what its users' scripts and dashboards read, on both listeners.

#[path = "support/control/mod.rs"]
mod control;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, BodyDataStream};
use control::*;
use futures_util::StreamExt as _;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;
use wharf::config::catalog::*;
use wharf::gateway::Traffic;
use wharf::orchestrator::handle::Message;
use wharf::replay::read::parse;
use wharf::scheduler::action::Answer;
use wharf::scheduler::event::Event;
use wharf::scheduler::record::ResidencyView;
use wharf::store::Activity;
use wharf::telemetry::feed::News;
use wharf::telemetry::logs::Source;
use wharf::telemetry::metrics::Metrics;
use wharf::telemetry::performance::{Memory, Sample, SystemLoad};

const PATIENCE: Duration = Duration::from_secs(20);

fn orchestrator(puppet: &Puppet) -> Router {
    wharf::api::router(puppet.handle.clone(), Arc::new(Metrics::new()))
}

fn gateway(puppet: &Puppet) -> Router {
    wharf::gateway::router(puppet.handle.clone(), Arc::new(Metrics::new()), Traffic::default())
}

fn request(method: Method, path: &str) -> Request<Body> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "127.0.0.1:8080")
        .body(Body::empty())
        .expect("a request")
}

async fn answer(router: &Router, request: Request<Body>) -> (StatusCode, HeaderMap, String) {
    let response = router.clone().oneshot(request).await.expect("infallible");
    let (status, headers) = (response.status(), response.headers().clone());
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    (status, headers, String::from_utf8(bytes.to_vec()).expect("text"))
}

async fn read(router: &Router, path: &str) -> Value {
    let (status, _, text) = answer(router, request(Method::GET, path)).await;
    assert_eq!(status, StatusCode::OK, "{path}: {text}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
}

/// A streamed answer, read until `wanted` is in it.
struct Tail {
    body: BodyDataStream,
    text: String,
}

impl Tail {
    async fn open(router: &Router, request: Request<Body>) -> (HeaderMap, Tail) {
        let response = router.clone().oneshot(request).await.expect("infallible");
        assert_eq!(response.status(), StatusCode::OK);
        let headers = response.headers().clone();
        (headers, Tail { body: response.into_body().into_data_stream(), text: String::new() })
    }

    async fn until(&mut self, wanted: &str) -> &str {
        let more = async {
            while !self.text.contains(wanted) {
                let chunk = self.body.next().await.expect("it goes on").expect("a chunk");
                self.text.push_str(std::str::from_utf8(&chunk).expect("text"));
            }
        };
        if tokio::time::timeout(PATIENCE, more).await.is_err() {
            panic!("{wanted:?} never came: {}", self.text);
        }
        &self.text
    }

    /// The rest, if the stream ends.
    async fn end(mut self) -> String {
        let rest = async {
            while let Some(chunk) = self.body.next().await {
                self.text.push_str(std::str::from_utf8(&chunk.expect("a chunk")).expect("text"));
            }
        };
        tokio::time::timeout(PATIENCE, rest).await.expect("the stream ends");
        self.text
    }
}

/// Plays the owner: every unload succeeds. Tells what was asked, in order.
fn unloads(mut puppet: Puppet, asks: usize) -> tokio::task::JoinHandle<Vec<(String, bool)>> {
    tokio::spawn(async move {
        let mut asked = Vec::new();
        while asked.len() < asks {
            if let Message::Ask { event, reply, .. } = puppet.inbox.recv().await.expect("an ask") {
                let Event::UnloadAsked { model, force, .. } = event else { panic!("{event:?}") };
                asked.push((model.to_string(), force));
                let _ = reply.send(Answer::Unloaded { was_loaded: true });
            }
        }
        asked
    })
}

// contract: GET /running
#[tokio::test]
async fn running_lists_what_is_not_stopped_in_its_words() {
    let (puppet, _leases) = world();
    let mut catalog = Catalog::clone(&puppet.handle.catalog());
    let mistral = Arc::make_mut(catalog.models.get_mut(MISTRAL).expect("configured"));
    mistral.description = Some("small".to_owned());
    mistral.runtime = RuntimeSpec::Process(ProcessSpec {
        argv: ["serve", "--api-key", "s3cret-value", "a b"].map(str::to_owned).to_vec(),
        env: [("DB_PASSWORD".to_owned(), "hunter22".to_owned())].into(),
        ..ProcessSpec::default()
    });
    puppet.handle.catalog_for_tests(catalog);
    for router in [orchestrator(&puppet), gateway(&puppet)] {
        let body = read(&router, "/running").await;
        let rows = body["running"].as_array().expect("rows");
        assert_eq!(rows.len(), 2, "the failed one is stopped: {body}");
        let expected = json!({
            "model": MISTRAL, "state": "ready", "cmd": "serve --api-key *** 'a b'",
            "proxy": "http://127.0.0.1:18051", "ttl": 600, "name": "Mistral 7B",
            "description": "small",
        });
        assert_eq!(rows[0], expected);
        assert_eq!((&rows[1]["model"], &rows[1]["state"]), (&json!(CODER), &json!("starting")));
        assert_eq!((&rows[1]["ttl"], &rows[1]["name"]), (&json!(0), &json!("")));
    }
}

// contract: GET /unload
#[tokio::test]
async fn unload_takes_everything_away_at_once_and_answers_ok() {
    for on in [orchestrator, gateway] {
        let (puppet, _leases) = world();
        let router = on(&puppet);
        let owner = unloads(puppet, 2);
        let (status, _, text) = answer(&router, request(Method::GET, "/unload")).await;
        assert_eq!((status, text.as_str()), (StatusCode::OK, "OK"));
        let mut asked = owner.await.expect("the owner");
        asked.sort();
        assert_eq!(asked, [(MISTRAL.to_owned(), true), (CODER.to_owned(), true)], "forced");
    }
}

// contract: POST /api/models/unload
#[tokio::test]
async fn unloading_all_by_the_api_says_msg_ok() {
    let (puppet, _leases) = world();
    let router = gateway(&puppet);
    let owner = unloads(puppet, 2);
    let (status, _, text) = answer(&router, request(Method::POST, "/api/models/unload")).await;
    assert_eq!((status, text.as_str()), (StatusCode::OK, r#"{"msg":"ok"}"#));
    owner.await.expect("the owner");
}

// contract: POST /api/models/unload/{model}
#[tokio::test]
async fn one_model_is_unloaded_by_any_of_its_names() {
    for (path, model) in [
        ("/api/models/unload/mistral", MISTRAL),
        ("/api/models/unload/gpt-4o-mini", MISTRAL),
        ("/api/models/unload/org/coder:7b", CODER),
        ("/api/models/unload/org%2Fcoder%3A7b", CODER),
    ] {
        let (puppet, _leases) = world();
        let router = gateway(&puppet);
        let owner = unloads(puppet, 1);
        let (status, _, text) = answer(&router, request(Method::POST, path)).await;
        assert_eq!((status, text.as_str()), (StatusCode::OK, "OK"), "{path}");
        assert_eq!(owner.await.expect("the owner"), [(model.to_owned(), true)], "{path}");
    }
    let (puppet, _leases) = world();
    let unknown = "/api/models/unload/nope";
    let (status, _, text) = answer(&gateway(&puppet), request(Method::POST, unknown)).await;
    assert_eq!((status, text.as_str()), (StatusCode::NOT_FOUND, "Model not found"));
    let mut wants_json = request(Method::POST, unknown);
    wants_json.headers_mut().insert("accept", "application/json".parse().expect("a value"));
    let (status, _, text) = answer(&gateway(&puppet), wants_json).await;
    let body: Value = serde_json::from_str(&text).expect("JSON");
    let code = &body["error"]["code"];
    assert_eq!((status, code), (StatusCode::NOT_FOUND, &json!("model_not_found")));
}

fn activity(model: &str) -> Activity {
    Activity {
        arrived_unix_ms: 1_767_268_800_000,
        model: model.into(),
        path: "/v1/chat/completions".into(),
        status: 200,
        content_type: "application/json".into(),
        prompt_tokens: Some(12),
        completion_tokens: Some(34),
        tokens_per_second: Some(17.5),
        duration_ms: 2500,
        queue_ms: 500,
        ..Activity::default()
    }
}

// contract: GET /api/metrics
#[tokio::test]
async fn activity_rows_have_its_field_names() {
    let (puppet, _leases) = world();
    let id = puppet.handle.record_activity(activity(MISTRAL));
    puppet.handle.record_activity(activity(CODER));
    for router in [orchestrator(&puppet), gateway(&puppet)] {
        let body = read(&router, "/api/metrics").await;
        assert_eq!(body.as_array().map(Vec::len), Some(2));
        let expected = json!({
            "id": id, "timestamp": "2026-01-01T12:00:02.500Z", "model": MISTRAL,
            "req_path": "/v1/chat/completions", "resp_content_type": "application/json",
            "resp_status_code": 200,
            "tokens": {
                "cache_tokens": -1, "input_tokens": 12, "output_tokens": 34,
                "prompt_per_second": -1.0, "tokens_per_second": 17.5,
            },
            "duration_ms": 2500, "queue_ms": 500, "has_capture": false,
        });
        assert_eq!(body[0], expected);
        assert_eq!(body[1]["model"], CODER, "oldest first");
        // What a user saves of it can be replayed.
        for saved in [body.to_string(), format!("{body:#}")] {
            let trace = parse("metrics.json", saved.as_bytes()).expect("a trace");
            let trace = trace.iter().map(|one| (one.at.0, one.model.as_str(), one.service));
            let service = Duration::from_secs(2);
            assert_eq!(trace.collect::<Vec<_>>(), [(0, MISTRAL, service), (0, CODER, service)]);
        }
    }
}

// contract: GET /api/performance
#[tokio::test]
async fn performance_is_filtered_by_time() {
    let (puppet, _leases) = world();
    let (noon, step) = (1_767_268_800, 5);
    for at in [noon, noon + step] {
        let memory = Memory { total_kib: 64 << 20, available_kib: 40 << 20, ..Memory::default() };
        let load_average = [0.5, 1.0, 1.5];
        let system =
            SystemLoad { cpu_percent: vec![50.0], memory, load_average, network: Vec::new() };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(at);
        puppet.handle.performance().push(Sample { at, system, gpus: view().gpus });
    }
    let router = gateway(&puppet);
    let body = read(&router, "/api/performance").await;
    let (system, gpus) = (&body["sys_stats"], &body["gpu_stats"]);
    assert_eq!(
        (system.as_array().map(Vec::len), gpus.as_array().map(Vec::len)),
        (Some(2), Some(2))
    );
    assert_eq!(system[0]["timestamp"], "2026-01-01T12:00:00.000Z");
    assert_eq!(
        (&system[0]["mem_total_mb"], &system[0]["mem_used_mb"]),
        (&json!(65536), &json!(24576))
    );
    assert_eq!(
        (&system[0]["load_avg_1"], &system[0]["cpu_util_per_core"]),
        (&json!(0.5), &json!([50.0]))
    );
    for field in
        ["mem_free_mb", "swap_total_mb", "swap_used_mb", "load_avg_5", "load_avg_15", "net_io"]
    {
        assert!(!system[0][field].is_null(), "{field}");
    }
    assert_eq!((&gpus[0]["id"], &gpus[0]["uuid"]), (&json!(0), &json!("GPU-0")));
    assert_eq!((&gpus[0]["mem_used_mb"], &gpus[0]["mem_total_mb"]), (&json!(18432), &json!(24576)));
    assert_eq!((&gpus[0]["gpu_util_pct"], &gpus[0]["mem_util_pct"]), (&json!(25.0), &json!(75.0)));
    for field in ["timestamp", "name", "temp_c", "vram_temp_c", "fan_speed_pct", "power_draw_w"] {
        assert!(!gpus[0][field].is_null(), "{field}");
    }

    for after in ["2026-01-01T12:00:00Z", "2026-01-01T13:00:01%2B01:00"] {
        let late = read(&router, &format!("/api/performance?after={after}")).await;
        assert_eq!(late["sys_stats"].as_array().map(Vec::len), Some(1), "{after}");
        assert_eq!(late["gpu_stats"].as_array().map(Vec::len), Some(1), "{after}");
    }
    let wrong = request(Method::GET, "/api/performance?after=yesterday");
    let (status, _, text) = answer(&router, wrong).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains("RFC3339"), "{text}");
}

// contract: GET /api/version
#[tokio::test]
async fn the_version_has_its_three_fields() {
    let (puppet, _leases) = world();
    let body = read(&gateway(&puppet), "/api/version").await;
    assert_eq!(body["version"], env!("CARGO_PKG_VERSION"));
    assert!(body["commit"].is_string() && body["build_date"].is_string(), "{body}");
}

/// Wharf's lines, and those of two engines.
fn write_logs(puppet: &Puppet) {
    let logs = puppet.handle.logs();
    logs.push(Source::Proxy, "wharf began");
    logs.push(Source::Model(MISTRAL.into()), "mistral loads");
    logs.push(Source::Model(CODER.into()), "coder loads");
    logs.push(Source::Proxy, "wharf serves");
}

// contract: GET /logs
// contract: GET /log
#[tokio::test]
async fn logs_are_the_last_lines_of_all_in_their_order() {
    let (puppet, _leases) = world();
    write_logs(&puppet);
    for router in [orchestrator(&puppet), gateway(&puppet)] {
        for path in ["/logs", "/log"] {
            let (status, headers, text) = answer(&router, request(Method::GET, path)).await;
            assert_eq!(status, StatusCode::OK);
            assert!(headers["content-type"].to_str().expect("text").starts_with("text/plain"));
            assert_eq!(text, "wharf began\nmistral loads\ncoder loads\nwharf serves\n");
        }
    }
}

// contract: GET /logs/stream
// contract: GET /logs/stream/{model}
#[tokio::test]
async fn a_log_stream_tells_the_past_and_goes_on() {
    let (puppet, _leases) = world();
    write_logs(&puppet);
    let router = gateway(&puppet);
    let paths = [
        ("/logs/stream", "wharf began\nmistral loads\ncoder loads\nwharf serves\nnew m\nnew w\n"),
        ("/logs/stream/proxy", "wharf began\nwharf serves\nnew w\n"),
        ("/logs/stream/upstream", "mistral loads\ncoder loads\nnew m\n"),
        ("/logs/stream/gpt-4o-mini", "mistral loads\nnew m\n"),
        ("/logs/stream/org/coder:7b", "coder loads\n"),
        ("/logs/stream?no-history", "new m\nnew w\n"),
        ("/logs/stream/proxy?no-history=1", "new w\n"),
    ];
    let mut tails = Vec::new();
    for (path, expected) in paths {
        let (headers, tail) = Tail::open(&router, request(Method::GET, path)).await;
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["x-accel-buffering"], "no");
        tails.push((path, expected, tail));
    }
    puppet.handle.logs().push(Source::Model(MISTRAL.into()), "new m");
    puppet.handle.logs().push(Source::Proxy, "new w");
    for (path, expected, mut tail) in tails {
        assert_eq!(tail.until(expected).await, expected, "{path}");
    }
    let (status, _, text) = answer(&router, request(Method::GET, "/logs/stream/nope")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.starts_with("invalid logger. Use 'proxy', 'upstream'"), "{text}");
}

// contract: GET /logs/streamSSE
#[tokio::test]
async fn logs_come_as_server_sent_events_too() {
    let (puppet, _leases) = world();
    write_logs(&puppet);
    let router = gateway(&puppet);
    let all = request(Method::GET, "/logs/streamSSE");
    let (headers, mut tail) = Tail::open(&router, all).await;
    assert_eq!(headers["content-type"], "text/event-stream");
    let first = "event: message\ndata: wharf began\n\nevent: message\ndata: mistral loads\n\n";
    assert!(tail.until("serves").await.starts_with(first), "{}", tail.text);
    let one = request(Method::GET, "/logs/streamSSE/proxy?no-history");
    let (_, mut tail) = Tail::open(&router, one).await;
    puppet.handle.logs().push(Source::Proxy, "50%\r100%");
    assert_eq!(tail.until("\n\n").await, "event: message\ndata: 50% 100%\n\n");
}

/// Messages of `/api/events`: type, and the data decoded a second time.
fn messages(text: &str) -> Vec<(String, Value)> {
    let events = text.split("\n\n").filter(|event| !event.is_empty() && !event.starts_with(':'));
    let parsed = events.map(|event| {
        let data = event.strip_prefix("event: message\ndata: ").expect(event);
        let envelope: Value = serde_json::from_str(data).expect("an envelope");
        let text = envelope["data"].as_str().expect("encoded twice");
        let kind = envelope["type"].as_str().expect("a type").to_owned();
        (kind, serde_json::from_str(text).expect("JSON in JSON"))
    });
    parsed.collect()
}

// contract: GET /api/events
#[tokio::test]
async fn api_events_begin_with_everything_and_go_on_live() {
    let (puppet, _leases) = world();
    write_logs(&puppet);
    puppet.handle.record_activity(activity(MISTRAL));
    let (headers, mut tail) =
        Tail::open(&gateway(&puppet), request(Method::GET, "/api/events")).await;
    assert_eq!(headers["content-type"], "text/event-stream");
    let first = messages(tail.until("inflight").await);
    let kinds: Vec<&str> = first.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["logData", "logData", "modelStatus", "metrics", "inflight"]);
    assert_eq!(first[0].1, json!({"source": "proxy", "data": "wharf began\nwharf serves\n"}));
    assert_eq!(first[1].1, json!({"source": "upstream", "data": "mistral loads\ncoder loads\n"}));
    let models = &first[2].1;
    let mistral = json!({
        "id": MISTRAL, "name": "Mistral 7B", "description": "", "state": "ready",
        "unlisted": false, "peerID": "", "aliases": ["gpt-4o-mini"],
    });
    assert_eq!(models[0], mistral);
    assert_eq!((&models[1]["id"], &models[1]["state"]), (&json!(CODER), &json!("starting")));
    assert_eq!((&models[1]["aliases"], &models[2]["state"]), (&Value::Null, &json!("stopped")));
    assert_eq!(first[3].1[0]["model"], MISTRAL);
    assert_eq!(first[4].1, json!({"total": 4}), "two in flight, two wait");

    tail.text.clear();
    puppet.handle.logs().push(Source::Model(CODER.into()), "still loads");
    let mut now = view();
    now.scheduler.models[1].residency = ResidencyView::Ready;
    puppet.handle.publish_for_tests(now);
    puppet.handle.feed().publish(News::ModelState {
        model: CODER.into(),
        state: "ready",
        before: "starting",
        instance: None,
        swap_id: None,
        cause: None,
        message: None,
    });
    puppet.handle.record_activity(activity(CODER));
    let later = messages(tail.until("\"activity\"").await);
    let of = |kind: &str| later.iter().find(|(found, _)| found == kind).map(|(_, data)| data);
    assert_eq!(of("modelStatus").expect("told")[1]["state"], "ready");
    assert_eq!(of("metrics").expect("told")[0]["model"], CODER);
    assert_eq!(of("activity"), Some(&json!({"id": 2})));
    let text = tail.until("still loads").await;
    let line = json!({"source": "upstream", "data": "still loads\n"});
    assert!(messages(text).contains(&("logData".to_owned(), line)), "{text}");
}

#[tokio::test]
async fn models_of_peers_are_rows_with_their_peer() {
    let (puppet, _leases) = world();
    let mut catalog = Catalog::clone(&puppet.handle.catalog());
    let spec = ModelSpec { peer: Some("gpu2".to_owned()), ..ModelSpec::plain("gpu2/big") };
    catalog.models.insert(spec.name.clone(), Arc::new(spec));
    puppet.handle.catalog_for_tests(catalog);
    let (_, mut tail) = Tail::open(&gateway(&puppet), request(Method::GET, "/api/events")).await;
    let first = messages(tail.until("inflight").await);
    let row = first[2].1.as_array().expect("rows").last().expect("a row").clone();
    assert_eq!((&row["id"], &row["peerID"]), (&json!("gpu2/big"), &json!("gpu2")));
}

/// A reader that reads nothing costs one ring for all, and is told what it missed.
#[tokio::test]
async fn a_slow_reader_skips_and_holds_nobody_up() {
    let (puppet, _leases) = world();
    let router = gateway(&puppet);
    let (_, mut slow) =
        Tail::open(&router, request(Method::GET, "/logs/stream/proxy?no-history")).await;
    let (_, mut events) = Tail::open(&router, request(Method::GET, "/api/events")).await;
    for n in 0..5000 {
        puppet.handle.logs().push(Source::Proxy, &format!("line {n}"));
    }
    let text = slow.until("line 4999").await;
    assert!(text.starts_with("(3976 lines left out"), "{}", &text[..80]);
    assert!(text.lines().count() <= 1025);
    let text = events.until("line 4999").await;
    assert!(text.contains("lines left out"));
}

#[tokio::test]
async fn streams_end_when_wharf_goes() {
    let (puppet, _leases) = world();
    let router = orchestrator(&puppet);
    let mut tails = Vec::new();
    for path in ["/logs/stream", "/logs/streamSSE", "/api/events", "/events"] {
        tails.push(Tail::open(&router, request(Method::GET, path)).await.1);
    }
    puppet.handle.refuse_new();
    for tail in tails {
        tail.end().await;
    }
}

// contract: RULE llama-swap's control paths are on the gateway too
/// Path by path: which listener answers. 404 and 405 are what it does not serve.
#[tokio::test]
async fn llama_swaps_control_paths_are_on_both_ports_and_the_others_on_one() {
    let both = [
        (Method::POST, "/api/models/unload/nope"),
        (Method::GET, "/api/events"),
        (Method::GET, "/api/metrics"),
        (Method::GET, "/api/performance"),
        (Method::GET, "/api/version"),
        (Method::GET, "/running"),
        (Method::GET, "/log"),
        (Method::GET, "/logs"),
        (Method::GET, "/logs/stream"),
        (Method::GET, "/logs/stream/proxy"),
        (Method::GET, "/logs/streamSSE"),
        (Method::GET, "/logs/streamSSE/proxy"),
        (Method::GET, "/health"),
        (Method::GET, "/status"),
        (Method::GET, "/metrics"),
    ];
    let orchestrator_only = [
        (Method::GET, "/models"),
        (Method::GET, "/models/mistral"),
        (Method::GET, "/models/mistral/health"),
        (Method::GET, "/metrics/mistral"),
        (Method::GET, "/swaps"),
        (Method::GET, "/gpus"),
        (Method::GET, "/queue"),
        (Method::GET, "/events"),
    ];
    let gateway_only = [(Method::GET, "/v1/models"), (Method::GET, "/v1/models/mistral")];
    let (puppet, _leases) = world();
    let (orchestrator, gateway) = (orchestrator(&puppet), gateway(&puppet));
    // As `wharf serve` does it where both have one address.
    let one_address = orchestrator.clone().fallback_service(gateway.clone());
    let serves = async |router: &Router, (method, path): (Method, &str)| {
        let response = router.clone().oneshot(request(method, path)).await.expect("infallible");
        let text = response.headers()["content-type"].to_str().expect("text").to_owned();
        // An unknown model's text is an answer of the path.
        response.status() != StatusCode::METHOD_NOT_ALLOWED
            && (response.status() != StatusCode::NOT_FOUND || text.starts_with("text/plain"))
    };
    for row in both {
        for router in [&orchestrator, &gateway, &one_address] {
            assert!(serves(router, row.clone()).await, "{row:?}");
        }
    }
    for row in orchestrator_only {
        assert!(serves(&orchestrator, row.clone()).await, "{row:?}");
        assert!(!serves(&gateway, row.clone()).await, "{row:?} on the gateway");
        assert!(serves(&one_address, row.clone()).await, "{row:?}");
    }
    for row in gateway_only {
        assert!(!serves(&orchestrator, row.clone()).await, "{row:?} on the orchestrator");
        assert!(serves(&gateway, row.clone()).await, "{row:?}");
        assert!(serves(&one_address, row.clone()).await, "{row:?}");
    }
}

#[tokio::test]
async fn the_gateway_guards_control_paths_as_the_orchestrator_does() {
    let (puppet, _leases) = world();
    let mut catalog = Catalog::clone(&puppet.handle.catalog());
    let key = |name: &str, scopes: &[Scope]| ApiKey {
        name: name.to_owned(),
        key: format!("key-of-{name}-0123456789").into(),
        models: vec!["*".to_owned()],
        scopes: scopes.to_vec(),
        ..ApiKey::default()
    };
    let keys = vec![key("chat", &[Scope::Inference]), key("look", &[Scope::Read])];
    catalog.settings.auth = AuthSettings { keys, ..AuthSettings::default() };
    puppet.handle.catalog_for_tests(catalog);
    let gateway = gateway(&puppet);
    let status = async |method: Method, path: &str, key: Option<&str>| {
        let mut request = request(method, path);
        if let Some(key) = key {
            let value = format!("Bearer key-of-{key}-0123456789").parse().expect("a value");
            request.headers_mut().insert("authorization", value);
        }
        gateway.clone().oneshot(request).await.expect("infallible").status()
    };
    for path in ["/running", "/logs", "/api/metrics", "/api/events"] {
        assert_eq!(status(Method::GET, path, None).await, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(status(Method::GET, path, Some("chat")).await, StatusCode::FORBIDDEN, "{path}");
        assert_eq!(status(Method::GET, path, Some("look")).await, StatusCode::OK, "{path}");
    }
    for (method, path) in [(Method::GET, "/unload"), (Method::POST, "/api/models/unload")] {
        assert_eq!(status(method.clone(), path, None).await, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(status(method, path, Some("look")).await, StatusCode::FORBIDDEN, "{path}");
    }
    let mut foreign = request(Method::GET, "/unload");
    foreign.headers_mut().insert("origin", "http://evil.example".parse().expect("a value"));
    let status = gateway.clone().oneshot(foreign).await.expect("infallible").status();
    assert_eq!(status, StatusCode::FORBIDDEN, "a foreign page");
}
