//! Rows of activity, the in-flight list, cancelling, captures.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use wharf::config::catalog::{ApiKey, CaptureSettings, Catalog, Scope};
use wharf::gateway::Limits;
use wharf::scheduler::action::Refusal;
use wharf::store::Activity;
use wharf::units::Bytes;

use crate::support::{World, until};

const CHAT: &str = "/v1/chat/completions";
const ASK: &str = r#"{"model":"gpt-4o","messages":[{"content":"a secret prompt"}]}"#;
const STREAM: &str = r#"{"model":"mistral","stream":true}"#;

fn rows(world: &World) -> Vec<Activity> {
    world.handle.store().activity(0, 1000)
}

async fn row(world: &World) -> Activity {
    until("a row is there", || !rows(world).is_empty()).await;
    let rows = rows(world);
    assert_eq!(rows.len(), 1, "{rows:#?}");
    rows[0].clone()
}

/// Two keys: one may ask, one may do anything.
fn keys(catalog: &mut Catalog) {
    let key = |name: &str, scopes: &[Scope]| ApiKey {
        name: name.into(),
        key: format!("sk-{name}").into(),
        models: vec!["*".into()],
        scopes: scopes.to_vec(),
        ..ApiKey::default()
    };
    catalog.settings.auth.keys =
        vec![key("app", &[Scope::Inference]), key("boss", &[Scope::Inference, Scope::Admin])];
}

fn captured(catalog: &mut Catalog) {
    catalog.settings.captures =
        CaptureSettings { enabled: true, total: Bytes(256 << 10), body: Bytes(16 << 10) };
}

#[tokio::test]
async fn every_answer_leaves_a_row_before_its_client_has_read_it() {
    let mut world = World::new().await;
    world.ready();
    let reply = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    let usage =
        r#"{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}"#;
    exchange.answer_json(&format!("{{\"choices\":[],\"usage\":{usage}}}")).await;
    let reply = reply.await.unwrap();
    let id = reply.headers()["x-request-id"].to_str().unwrap().to_owned();
    reply.text().await;
    let found = rows(&world);
    assert_eq!(found.len(), 1);
    let row = &found[0];
    assert_eq!((row.id, row.model.as_str(), row.requested.as_str()), (1, "mistral", "gpt-4o"));
    assert_eq!((&*row.method, &*row.path, row.status), ("POST", CHAT, 200));
    assert_eq!((&*row.outcome, &*row.content_type), ("ok", "application/json"));
    assert_eq!((row.prompt_tokens, row.cached_tokens), (Some(7), Some(2)));
    assert_eq!((row.completion_tokens, row.key.as_deref()), (Some(3), None));
    assert_eq!(row.request_id, id);
    assert!(row.first_token_ms.is_some() && row.arrived_unix_ms > 0 && !row.has_capture);
    let text = serde_json::to_string(row).unwrap();
    assert!(!text.contains("secret"), "a row holds no prompt: {text}");
}

#[tokio::test]
async fn streams_are_counted_and_the_metrics_agree() {
    let mut world = World::new().await;
    world.ready();
    let reply = world.spawn(world.post("/v1/messages", STREAM));
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    exchange
        .chunk("event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":4,\"cache_read_input_tokens\":6,\"output_tokens\":1}}}\n\n")
        .await;
    exchange
        .chunk("event: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":9}}\n\n")
        .await;
    exchange.end().await;
    reply.await.unwrap().text().await;
    let row = row(&world).await;
    assert_eq!((row.prompt_tokens, row.cached_tokens), (Some(10), Some(6)));
    assert_eq!((row.completion_tokens, &*row.path), (Some(9), "/v1/messages"));
    assert_eq!(row.content_type, "text/event-stream");
    let metrics = world.get("/metrics").await.text().await;
    for (kind, count) in [("prompt", 10), ("completion", 9)] {
        let line =
            format!("orchestrator_tokens_total{{kind=\"{kind}\",model=\"mistral\"}} {count}");
        assert!(metrics.contains(&line), "{metrics}");
    }
}

#[tokio::test]
async fn refusals_leave_rows_too_and_strangers_none() {
    let mut world = World::with(keys, Limits::default()).await;
    let with_key = |body: &'static str| {
        let mut request = world.post(CHAT, body);
        request.headers_mut().insert("x-api-key", "sk-app".parse().unwrap());
        request
    };
    assert_eq!(world.send(world.post(CHAT, ASK)).await.status(), 401);
    assert_eq!(rows(&world), [], "nobody fills the store without a key");
    assert_eq!(world.send(with_key("{")).await.status(), 400);
    assert_eq!(world.send(with_key(r#"{"model":"mistrall"}"#)).await.status(), 404);
    let waiting = world.spawn(with_key(r#"{"model":"mistral"}"#));
    world.arrived().await.refuse(Refusal::Unloaded);
    assert_eq!(waiting.await.unwrap().status(), 503);
    let found = rows(&world);
    let told: Vec<_> = found
        .iter()
        .map(|row| (row.status, &*row.outcome, row.requested.as_str(), row.model.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (400, "invalid_json", "", ""),
            (404, "model_not_found", "mistrall", ""),
            (503, "model_unloaded", "mistral", "mistral"),
        ]
    );
    assert!(found.iter().all(|row| row.key.as_deref() == Some("app")));
}

#[tokio::test]
async fn a_client_that_leaves_is_a_row_with_what_was_counted() {
    let mut world = World::new().await;
    world.ready();
    let reply = world.spawn(world.post(CHAT, STREAM));
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    exchange
        .chunk(
            "data: {\"choices\":[1],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1}}\n\n",
        )
        .await;
    let mut reply = reply.await.unwrap();
    reply.part().await.unwrap();
    drop(reply);
    exchange.closed().await;
    let row = row(&world).await;
    assert_eq!((&*row.outcome, row.status), ("client_gone", 200));
    assert_eq!((row.prompt_tokens, row.completion_tokens), (Some(3), Some(1)));
}

// contract: POST /api/inflight/{id}/cancel
#[tokio::test]
async fn a_waiting_request_is_listed_and_leaves_the_queue_when_cancelled() {
    let mut world = World::new().await;
    let waiting = world.spawn(world.post(CHAT, ASK));
    let arrived = world.arrived().await;
    let list = world.get("/api/inflight").await.json().await;
    assert_eq!(list["total"], 1, "{list}");
    let listed = &list["requests"][0];
    assert_eq!((&listed["model"], &listed["requested"]), (&json!("mistral"), &json!("gpt-4o")));
    assert_eq!((&listed["stage"], &listed["path"]), (&json!("queued"), &json!(CHAT)));
    assert!(listed["arrived"].is_string() && listed["seconds"].is_number(), "{listed}");
    let path = format!("/api/inflight/{}/cancel", listed["id"]);
    let cancelled = world.send(world.post(&path, "")).await;
    let told = cancelled.json().await;
    assert_eq!((&told["status"], &told["id"]), (&json!("cancelled"), &listed["id"]), "{told}");
    let (status, code, _) = waiting.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (499, "cancelled"));
    assert!(arrived.reply.is_closed(), "the owner sees that nobody waits any more");
    assert_eq!(world.get("/api/inflight").await.json().await["total"], 0);
    let row = row(&world).await;
    assert_eq!((&*row.outcome, row.status), ("cancelled", 499));
    // Once more: there is nothing left to cancel.
    assert_eq!(world.send(world.post(&path, "")).await.error().await.0, 404);
    assert_eq!(world.send(world.post("/api/inflight/x/cancel", "")).await.error().await.0, 400);
}

#[tokio::test]
async fn a_stream_that_is_cancelled_ends_with_an_error_and_frees_its_engine() {
    let mut world = World::new().await;
    let gate = world.ready();
    let reply = world.spawn(world.post(CHAT, STREAM));
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    exchange.chunk("data: {\"choices\":[1]}\n\n").await;
    let mut reply = reply.await.unwrap();
    reply.part().await.unwrap();
    let list = world.get("/api/inflight").await.json().await;
    let listed = &list["requests"][0];
    assert_eq!((&listed["stage"], &listed["bytes"]), (&json!("forwarded"), &json!(23)), "{list}");
    let path = format!("/api/inflight/{}/cancel", listed["id"]);
    assert_eq!(world.send(world.post(&path, "")).await.status(), 200);
    let last = reply.part().await.unwrap();
    let error: Value = serde_json::from_str(last.trim().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "cancelled");
    assert_eq!(reply.part().await, None);
    exchange.closed().await;
    until("the lease ended", || gate.in_flight() == 0).await;
    let row = row(&world).await;
    assert_eq!((&*row.outcome, row.status), ("cancelled", 200));
}

#[tokio::test]
async fn a_request_whose_engine_is_silent_can_be_cancelled() {
    let mut world = World::new().await;
    let gate = world.ready();
    let reply = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    let list = world.get("/api/inflight").await.json().await;
    let path = format!("/api/inflight/{}/cancel", list["requests"][0]["id"]);
    world.send(world.post(&path, "")).await;
    assert_eq!(reply.await.unwrap().error().await.1, "cancelled");
    exchange.closed().await;
    until("the lease ended", || gate.in_flight() == 0).await;
}

#[tokio::test]
async fn only_an_administrator_cancels_and_sees_prompts() {
    let world = World::with(keys, Limits::default()).await;
    let ask = async |method: &str, path: &str, key: &str| {
        let request = http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", world.address))
            .header("x-api-key", format!("sk-{key}"));
        world.send(request.body(Default::default()).unwrap()).await.status().as_u16()
    };
    for (method, path, for_boss) in [
        ("POST", "/api/inflight/1/cancel", 404),
        ("GET", "/api/inflight", 200),
        ("GET", "/api/captures/1", 404),
    ] {
        assert_eq!(ask(method, path, "app").await, 403, "{path}");
        assert_eq!(ask(method, path, "boss").await, for_boss, "{path}");
    }
}

// contract: GET /api/captures/{id}
#[tokio::test]
async fn a_capture_holds_both_sides_and_no_credentials() {
    let mut world = World::with(captured, Limits::default()).await;
    world.ready();
    let mut request = world.post(&format!("{CHAT}?key=s3cret"), ASK);
    for (name, value) in [("authorization", "Bearer s3cret"), ("cookie", "s3cret")] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let reply = world.spawn(request);
    let exchange = world.engine.request().await;
    let head = "content-type: application/json\r\nset-cookie: s3cret\r\n";
    exchange.answer("200 OK", head, "{\"choices\":[]}").await;
    reply.await.unwrap().text().await;
    let row = row(&world).await;
    assert!(row.has_capture);
    let capture = world.get(&format!("/api/captures/{}", row.id)).await.json().await;
    assert_eq!((&capture["id"], &capture["req_path"]), (&json!(row.id), &json!(CHAT)));
    let body = |field: &str| STANDARD.decode(capture[field].as_str().unwrap()).unwrap();
    assert_eq!(body("req_body"), ASK.as_bytes());
    assert_eq!(body("resp_body"), b"{\"choices\":[]}");
    assert_eq!(capture["req_headers"]["content-type"], "application/json");
    assert_eq!(capture["resp_headers"]["content-type"], "application/json");
    assert!(capture["req_headers"]["authorization"].is_string(), "that there was one is told");
    assert!(!capture.to_string().contains("s3cret"), "{capture}");
    let wrong = world.get("/api/captures/x").await;
    assert_eq!(wrong.status(), 400);
    assert_eq!(wrong.json().await, json!({"error": "invalid capture ID"}));
    let missing = world.get("/api/captures/99").await;
    assert_eq!(missing.status(), 404);
    assert_eq!(missing.json().await, json!({"error": "capture not found"}));
}

#[tokio::test]
async fn a_captured_stream_is_what_the_client_got() {
    let mut world = World::with(captured, Limits::default()).await;
    world.ready();
    let reply = world.spawn(world.post(CHAT, STREAM));
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    exchange.chunk("data: {\"choices\":[1]}\n\n").await;
    exchange.chunk("data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1}}\n\ndata: [DONE]").await;
    exchange.end().await;
    let got = reply.await.unwrap().text().await;
    let capture = world.get("/api/captures/1").await.json().await;
    assert_eq!(STANDARD.decode(capture["resp_body"].as_str().unwrap()).unwrap(), got.as_bytes());
    assert_eq!(STANDARD.decode(capture["req_body"].as_str().unwrap()).unwrap(), STREAM.as_bytes());
}

#[tokio::test]
async fn captures_are_off_by_default_and_stay_within_their_bound() {
    let mut world = World::new().await;
    world.ready();
    let send = async |world: &mut World| {
        let big = format!("{{\"model\":\"mistral\",\"x\":\"{}\"}}", "q".repeat(1 << 20));
        let reply = world.spawn(world.post(CHAT, big));
        let exchange = world.engine.request().await;
        let answer = format!("{{\"x\":\"{}\"}}", "a".repeat(1 << 20));
        exchange.answer_json(&answer).await;
        assert_eq!(reply.await.unwrap().text().await.len(), answer.len());
    };
    send(&mut world).await;
    assert_eq!(world.get("/api/captures/1").await.status(), 404);
    let mut catalog = Catalog::clone(&world.handle.catalog());
    captured(&mut catalog);
    world.handle.catalog_for_tests(catalog.clone());
    for _ in 0..20 {
        send(&mut world).await;
    }
    let found = rows(&world);
    assert!(!found[0].has_capture && found[1..].iter().all(|row| row.has_capture));
    let newest = world.get("/api/captures/21").await.json().await;
    assert_eq!(STANDARD.decode(newest["req_body"].as_str().unwrap()).unwrap().len(), 16 << 10);
    assert_eq!(newest["resp_bytes"], (1 << 20) + 8);
    // 256 KiB hold fewer than eight of 32 KiB each and their headers.
    assert_eq!(world.get("/api/captures/13").await.status(), 404, "the oldest went");
    assert_eq!(world.get("/api/captures/16").await.status(), 200);
    catalog.settings.captures.enabled = false;
    world.handle.catalog_for_tests(catalog);
    assert_eq!(world.get("/api/captures/21").await.status(), 404, "switched off");
}
