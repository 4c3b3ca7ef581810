//! The control API over its router: what operators and the older tools' clients get back.

#[path = "support/control/mod.rs"]
mod control;
#[path = "support/ports.rs"]
mod ports;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use control::*;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;
use wharf::config::catalog::{ApiKey, AuthSettings, Catalog, DockerSpec, RuntimeSpec, Scope};
use wharf::orchestrator::View;
use wharf::orchestrator::handle::Message;
use wharf::scheduler::action::{Answer, Refusal};
use wharf::scheduler::event::{EnsureKind, Event};
use wharf::scheduler::record::SwapOutcome;
use wharf::telemetry::metrics::Metrics;
use wharf::units::*;

fn api(puppet: &Puppet) -> Router {
    wharf::api::router(puppet.handle.clone(), Arc::new(Metrics::new()))
}

fn request(method: Method, path: &str, body: &str) -> Request<Body> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "127.0.0.1:8888")
        .body(Body::from(body.to_owned()))
        .expect("a request")
}

async fn send(api: &Router, request: Request<Body>) -> (StatusCode, Value) {
    let response = api.clone().oneshot(request).await.expect("infallible");
    let status = response.status();
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    let body = serde_json::from_slice(&bytes)
        .unwrap_or_else(|error| panic!("{status} not JSON ({error}): {bytes:?}"));
    (status, body)
}

async fn read(api: &Router, path: &str) -> (StatusCode, Value) {
    send(api, request(Method::GET, path, "")).await
}

async fn post(api: &Router, path: &str, body: &str) -> (StatusCode, Value) {
    send(api, request(Method::POST, path, body)).await
}

/// Plays the owner for one ask: answers it, and says what was asked.
fn answer_next(mut puppet: Puppet, answer: Answer) -> tokio::task::JoinHandle<(Event, Puppet)> {
    tokio::spawn(async move {
        loop {
            match puppet.inbox.recv().await.expect("an ask") {
                Message::Ask { event, reply, .. } => {
                    // A detached caller does not listen.
                    let _ = reply.send(answer);
                    return (event, puppet);
                }
                other => drop(other),
            }
        }
    })
}

// contract: GET /status
#[tokio::test]
async fn status_holds_every_field_of_the_older_tools() {
    let (puppet, _leases) = world();
    let (status, body) = read(&api(&puppet), "/status").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(body["status"], "healthy");
    assert_eq!(body["active_model"], MISTRAL);
    assert_eq!(body["current_model"], MISTRAL);
    assert_eq!(body["available_models"], json!([MISTRAL, CODER, TINY]));
    assert_eq!(body["loaded_models"], json!([MISTRAL]));
    assert_eq!(body["mode"], "multi-active");
    assert_eq!(body["total_models"], 3);
    assert_eq!((&body["in_flight"], &body["queued"]), (&json!(2), &json!(2)));
    assert_eq!(body["last_swap"]["id"], "s8");
    assert_eq!(body["models"][MISTRAL]["state"], "ready");
    assert_eq!(body["models"][CODER]["state"], "starting");
    assert_eq!(body["models"][TINY]["state"], "failed");
    assert_eq!(body["models"][TINY]["cause"], "out_of_memory");

    let swap = &body["swaps"][0];
    assert_eq!((&swap["model"], &swap["phase"]), (&json!(CODER), &json!("start")));
    assert_eq!(swap["estimate_seconds"], 9.0);
    assert_eq!(swap["progress"]["stage"], "load_weights");
    assert_eq!(swap["from"], TINY);
}

// contract: GET /health
// contract: HEADER Retry-After
#[tokio::test]
async fn health_is_green_only_if_every_needed_part_works() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let (status, body) = read(&api, "/health").await;
    assert_eq!(status, StatusCode::OK, "{body}");
    assert_eq!((&body["status"], &body["service"]), (&json!("healthy"), &json!("wharf")));
    assert_eq!((&body["active_model"], &body["mode"]), (&json!(MISTRAL), &json!("multi-active")));
    assert_eq!((&body["active_models"], &body["total_models"]), (&json!(1), &json!(3)));
    assert_eq!(body["total_memory_mb"], 16 * 1024, "of what is loaded");
    assert_eq!(body["available_ports"], 949 - 2);
    assert_eq!(body["gpu"], json!({"status": "ok", "detail": "simulated"}));
    assert_eq!(body["docker"]["status"], "unused");

    let mut red = view();
    red.scheduler.no_proof = Some("NVML: Unknown Error: restart the container".to_owned());
    puppet.handle.publish_for_tests(red);
    let (status, body) = read(&api, "/health").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!((&body["status"], &body["gpu"]["status"]), (&json!("unhealthy"), &json!("failed")));

    let mut away = view();
    away.docker_health = Some(wharf::orchestrator::view::Health {
        ok: false,
        detail: "unix:///run/docker.sock: connection refused".to_owned(),
    });
    puppet.handle.publish_for_tests(away);
    let (status, body) = read(&api, "/health").await;
    assert_eq!(status, StatusCode::OK, "only asked for what an earlier run left: {body}");
    assert_eq!(body["docker"]["status"], "unused");
    let before = Catalog::clone(&puppet.handle.catalog());
    let mut needed = before.clone();
    for spec in needed.models.values_mut() {
        Arc::make_mut(spec).runtime = RuntimeSpec::Docker(DockerSpec::default());
    }
    puppet.handle.catalog_for_tests(needed);
    let (status, body) = read(&api, "/health").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(body["docker"]["detail"].as_str().expect("text").contains("refused"));
    puppet.handle.catalog_for_tests(before);

    let mut full = view();
    full.outages = vec!["the journal cannot be written: No space left".to_owned()];
    puppet.handle.publish_for_tests(full);
    let (status, body) = read(&api, "/health").await;
    assert_eq!(status, StatusCode::OK, "it serves");
    assert_eq!(body["orchestrator"]["status"], "degraded");
    assert!(body["orchestrator"]["detail"].as_str().expect("text").contains("journal"));

    puppet.handle.publish_for_tests(view());
    assert_eq!(read(&api, "/health").await.0, StatusCode::OK);
    drop(puppet.inbox);
    let (status, body) = read(&api, "/health").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(body["orchestrator"]["status"], "failed");
}

#[tokio::test]
async fn health_tries_the_gateways_listener() {
    // Nobody else takes it when it is free again.
    let address = ("127.0.0.1", ports::free_port());
    let listener = tokio::net::TcpListener::bind(address).await.expect("a port");
    let mut catalog = three_models();
    catalog.settings.gateway = listener.local_addr().expect("bound");
    let puppet = Puppet::new(catalog);
    puppet.handle.publish_for_tests(view());
    let api = api(&puppet);
    let (status, body) = read(&api, "/health").await;
    assert_eq!((status, &body["gateway"]["status"]), (StatusCode::OK, &json!("ok")));
    drop(listener);
    let (status, body) = read(&api, "/health").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(body["gateway"]["status"], "failed");
}

// contract: GET /models
#[tokio::test]
async fn one_row_per_model_serves_both_older_tools() {
    let (puppet, _leases) = world();
    let mut catalog = Catalog::clone(&puppet.handle.catalog());
    catalog.settings.gateway = ([0, 0, 0, 0], 8080).into();
    puppet.handle.catalog_for_tests(catalog);
    let api = api(&puppet);
    let (_, body) = read(&api, "/models").await;
    let rows = body["models"].as_array().expect("rows");
    assert_eq!(rows.len(), 3);
    let row = &rows[0];
    for (field, value) in [
        ("name", json!(MISTRAL)),
        ("ollama_name", json!("mistral:7b")),
        ("type", json!("llm")),
        ("size_gb", json!(14.5)),
        ("priority", json!("high")),
        ("status", json!("loaded")),
        ("unloaded_at", Value::Null),
        ("model_id", json!(MISTRAL)),
        ("display_name", json!("Mistral 7B")),
        ("model_type", json!("llm")),
        // No front door of its own: clients reach it through the gateway.
        ("port", json!(8080)),
        ("state", json!("HOT")),
        // In flight: the ttl of 600 s has not begun to run.
        ("ttl_remaining_minutes", json!(10.0)),
        ("warmup", json!(false)),
        ("endpoint", json!("http://127.0.0.1:8080")),
        ("engine_endpoint", json!("http://127.0.0.1:18051")),
        ("tags", json!(["chat"])),
        ("residency", json!("ready")),
        ("in_flight", json!(2)),
        ("request_count", json!(42)),
    ] {
        assert_eq!(row[field], value, "{field}");
    }
    assert!(row["total_uptime_seconds"].as_f64().expect("a number") >= 3600.0);
    let loaded_at = row["loaded_at"].as_str().expect("a time");
    let loaded_at = humantime::parse_rfc3339(loaded_at).expect("RFC 3339");
    assert_eq!(loaded_at, puppet.handle.wall(Time(900_000)), "both in milliseconds");

    let states: Vec<&Value> = rows.iter().map(|row| &row["state"]).collect();
    assert_eq!(states, ["HOT", "WARMING", "COLD"]);
    assert_eq!(rows[1]["phase"], "start");
    assert_eq!(rows[2]["last_fault"]["cause"], "out_of_memory");
    assert!(rows[2]["unloaded_at"].is_string());
}

// contract: GET /models/{id}/health
#[tokio::test]
async fn a_model_has_a_health_of_its_own() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let (status, ready) = read(&api, "/models/gpt-4o-mini/health").await;
    assert_eq!((status, &ready["model"]), (StatusCode::OK, &json!(MISTRAL)));
    assert_eq!((&ready["status"], &ready["state"]), (&json!("ready"), &json!("HOT")));
    assert_eq!(ready["requests_served"], 42);
    assert!(ready["uptime_seconds"].is_number() && ready["port"].is_number(), "{ready}");
    for (name, word) in [("org/coder:7b", "starting"), ("tiny", "failed")] {
        let path = format!("/models/{name}/health");
        let response = api.clone().oneshot(request(Method::GET, &path, "")).await.expect("one");
        assert!(response.headers().contains_key("retry-after"), "{name}");
        let (status, body) = read(&api, &path).await;
        assert_eq!((status, &body["status"]), (StatusCode::SERVICE_UNAVAILABLE, &json!(word)));
        assert_eq!(body["uptime_seconds"], 0.0);
    }
    assert_eq!(read(&api, "/models/nope/health").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn after_its_ttl_a_model_cools_for_as_long_as_it_may_be_rescued() {
    let (puppet, leases) = world();
    let api = api(&puppet);
    let mut catalog = Catalog::clone(&puppet.handle.catalog());
    let mistral = Arc::make_mut(catalog.models.get_mut(MISTRAL).expect("configured"));
    (mistral.ttl, mistral.grace) = (Some(Duration::from_millis(1)), Duration::from_secs(120));
    puppet.handle.catalog_for_tests(catalog);
    let state = async || read(&api, "/models/mistral").await.1["state"].clone();
    assert_eq!(state().await, "HOT", "requests are in flight");
    drop(leases);
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(state().await, "COOLING");
    assert_eq!(read(&api, "/models/mistral").await.1["ttl_remaining_minutes"], 0.0);
}

// contract: RULE names with slashes and colons work in every path
// contract: GET /models/{name}
#[tokio::test]
async fn names_with_slashes_and_colons_work_in_paths() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    for path in [
        "/models/org/coder:7b",
        "/models/org%2Fcoder%3A7b",
        "/models/org%2fcoder:7b",
        "/metrics/org/coder:7b",
        "/metrics/org%2Fcoder:7b",
    ] {
        let (status, body) = read(&api, path).await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        let name = if path.starts_with("/models") { &body["name"] } else { &body["model_name"] };
        assert_eq!(name, CODER, "{path}");
    }
    let (_, by_alias) = read(&api, "/models/gpt-4o-mini").await;
    assert_eq!(by_alias["name"], MISTRAL);
    for path in ["/models/org/coder:7b/load", "/models/org%2Fcoder%3A7b/load"] {
        let (puppet, _leases) = world();
        let api = self::api(&puppet);
        let ready = Answer::Ready { instance: InstanceId(9), swap: None, swapped: false };
        let owner = answer_next(puppet, ready);
        let (status, body) = post(&api, path, "").await;
        assert_eq!((status, &body["model"]), (StatusCode::OK, &json!(CODER)), "{path}");
        let (event, _) = owner.await.expect("an ask");
        assert!(
            matches!(&event, Event::EnsureAsked { model, kind: EnsureKind::Load, .. }
                if model.as_str() == CODER),
            "{event:?}"
        );
    }
}

// contract: POST /ensure_model
#[tokio::test]
async fn ensure_tells_what_the_swap_did() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let mut after = view();
    let swap = ended_swap(12, TINY, &[MISTRAL], SwapOutcome::Ready);
    after.ledger = Arc::new([Arc::new(swap)].into());
    puppet.handle.publish_for_tests(after);
    let ready = Answer::Ready { instance: InstanceId(12), swap: Some(SwapId(12)), swapped: true };
    let owner = answer_next(puppet, ready);
    // As the older guide's curl line sends it, but with curl's default content type.
    let mut asked = request(Method::POST, "/ensure_model", r#"{"model":"tiny","timeout":30}"#);
    asked
        .headers_mut()
        .insert("content-type", "application/x-www-form-urlencoded".parse().expect("a value"));
    let (status, body) = send(&api, asked).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    assert_eq!((&body["model"], &body["state"]), (&json!("tiny"), &json!("ready")));
    assert_eq!((&body["swapped"], &body["from"]), (&json!(true), &json!(MISTRAL)));
    assert_eq!((&body["swap_id"], &body["seconds"]), (&json!("s12"), &json!(9.0)));
    assert_eq!(body["phases"], json!({"drain": 0.5, "prove": 1.2, "start": 7.0}));
    let (event, puppet) = owner.await.expect("an ask");
    let Event::EnsureAsked { kind: EnsureKind::Ensure, deadline, .. } = event else {
        panic!("{event:?}")
    };
    let left = deadline.since(puppet.handle.now()).as_secs();
    assert!((20..=30).contains(&left), "{left}");
}

#[tokio::test]
async fn ensure_waits_for_the_ledgers_row() {
    let (puppet, _leases) = world();
    let (api, handle) = (api(&puppet), puppet.handle.clone());
    let ready = Answer::Ready { instance: InstanceId(12), swap: Some(SwapId(12)), swapped: true };
    let owner = answer_next(puppet, ready);
    let asked =
        tokio::spawn(async move { post(&api, "/ensure_model", r#"{"model":"tiny"}"#).await });
    owner.await.expect("an ask");
    // The answer is out; the view follows.
    let mut after = view();
    after.ledger =
        Arc::new([Arc::new(ended_swap(12, TINY, &[MISTRAL], SwapOutcome::Ready))].into());
    handle.publish_for_tests(after);
    let (_, body) = asked.await.expect("an answer");
    assert_eq!((&body["from"], &body["seconds"]), (&json!(MISTRAL), &json!(9.0)));
}

// contract: POST /ensure_model
#[tokio::test]
async fn ensure_without_waiting_answers_202_and_goes_on() {
    let (mut puppet, _leases) = world();
    let api = api(&puppet);
    let (status, body) =
        post(&api, "/ensure_model", r#"{"model":"org/coder:7b","wait":false}"#).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!((&body["state"], &body["swap_id"]), (&json!("starting"), &json!("s9")));
    let message = puppet.inbox.recv().await.expect("a message");
    assert!(
        matches!(message, Message::Ask { event: Event::EnsureAsked { .. }, .. }),
        "{message:?}"
    );
}

#[tokio::test]
async fn an_ensure_that_fails_says_why_with_the_engines_last_lines() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let refusal = Refusal::StartFailed {
        swap: Some(SwapId(8)),
        fault: fault(),
        retry_at: puppet.handle.now() + std::time::Duration::from_secs(60),
    };
    let owner = answer_next(puppet, Answer::Refused(refusal));
    let response = api
        .clone()
        .oneshot(request(Method::POST, "/ensure_model", r#"{"model":"tiny"}"#))
        .await
        .expect("infallible");
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let retry_after = response.headers()["retry-after"].to_str().expect("text").to_owned();
    assert!((1..=61).contains(&retry_after.parse::<u64>().expect("seconds")), "{retry_after}");
    let bytes = response.into_body().collect().await.expect("a body").to_bytes();
    let body: Value = serde_json::from_slice(&bytes).expect("JSON");
    assert!(body["error"]["message"].as_str().expect("text").contains("CUDA out of memory"));
    assert_eq!((&body["model"], &body["swap_id"]), (&json!("tiny"), &json!("s8")));
    assert_eq!(body["cause"]["log"], json!(["loading", "CUDA out of memory"]));
    owner.await.expect("an ask");
}

// contract: POST /ensure_model
#[tokio::test]
async fn an_ensure_that_takes_too_long_names_the_swap_that_goes_on() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let owner = answer_next(puppet, Answer::TimedOut { swap: Some(SwapId(9)) });
    let (status, body) =
        post(&api, "/ensure_model", r#"{"model":"org/coder:7b","timeout":"1500ms"}"#).await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(body["swap_id"], "s9");
    let message = body["error"]["message"].as_str().expect("text");
    assert!(message.contains("1s 500ms") && message.contains("phase start"), "{message}");
    assert!(message.contains("load_weights"), "{message}");
    owner.await.expect("an ask");
}

#[tokio::test]
async fn an_owner_that_never_answers_does_not_hold_the_caller() {
    let (puppet, _leases) = world();
    let (status, body) = post(&api(&puppet), "/models/tiny/load", r#"{"timeout":0}"#).await;
    assert_eq!((status, &body["error"]["code"]), (StatusCode::GATEWAY_TIMEOUT, &json!("timeout")));
}

// contract: POST /models/{name}/load
// contract: POST /models/{name}/unload
#[tokio::test]
async fn load_and_unload_answer_in_the_swappers_shape() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let ready = Answer::Ready { instance: InstanceId(7), swap: None, swapped: false };
    let owner = answer_next(puppet, ready);
    let (status, body) = post(&api, "/models/mistral/load", "").await;
    assert_eq!((status, &body["status"]), (StatusCode::OK, &json!("success")));
    assert_eq!(body["message"], "Model mistral is loaded already");
    let (_, puppet) = owner.await.expect("an ask");

    let owner = answer_next(puppet, Answer::Unloaded { was_loaded: true });
    let (status, body) = post(&api, "/models/mistral/unload", r#"{"force": true}"#).await;
    assert_eq!((status, &body["status"]), (StatusCode::OK, &json!("success")));
    assert_eq!(
        (&body["model"], &body["message"]),
        (&json!(MISTRAL), &json!("Model mistral unloaded"))
    );
    let (event, puppet) = owner.await.expect("an ask");
    assert!(matches!(event, Event::UnloadAsked { force: true, .. }), "{event:?}");

    let owner = answer_next(puppet, Answer::Unloaded { was_loaded: false });
    let (_, body) = post(&api, "/models/tiny/unload", "").await;
    assert_eq!(body["was_loaded"], false);
    let (event, _) = owner.await.expect("an ask");
    assert!(matches!(event, Event::UnloadAsked { force: false, .. }), "{event:?}");
}

// contract: GET /metrics
// contract: GET /metrics/{name}
#[tokio::test]
async fn metrics_are_text_or_the_swappers_json() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let text = api.clone().oneshot(request(Method::GET, "/metrics", "")).await.expect("infallible");
    assert!(text.headers()["content-type"].to_str().expect("text").starts_with("text/plain"));
    let text = text.into_body().collect().await.expect("a body").to_bytes();
    assert!(
        String::from_utf8_lossy(&text)
            .contains("\norchestrator_current_model{model=\"mistral\"} 1")
    );

    let mut wanted = request(Method::GET, "/metrics", "");
    wanted.headers_mut().insert("accept", "application/json".parse().expect("a value"));
    let (_, body) = send(&api, wanted).await;
    assert_eq!(body["metrics"][0]["model_name"], MISTRAL);
    let (_, one) = read(&api, "/metrics/mistral").await;
    assert_eq!((&one["status"], &one["request_count"]), (&json!("loaded"), &json!(42)));
    let total = one["total_uptime_seconds"].as_f64().expect("a number");
    assert_eq!(one["uptime_hours"].as_f64(), Some(total / 3600.0));
}

// contract: GET /swaps
// contract: GET /swaps/{id}
#[tokio::test]
async fn swaps_are_listed_newest_first_and_told_whole() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let ids = |body: &Value| -> Vec<String> {
        let rows = body["swaps"].as_array().expect("rows").iter();
        rows.map(|row| row["id"].as_str().expect("an id").to_owned()).collect()
    };
    assert_eq!(ids(&read(&api, "/swaps").await.1), ["s9", "s8", "s7"]);
    assert_eq!(ids(&read(&api, "/swaps?limit=1").await.1), ["s9"]);
    assert_eq!(ids(&read(&api, "/swaps?model=tiny").await.1), ["s8"]);
    assert_eq!(ids(&read(&api, "/swaps?model=gpt-4o-mini&limit=5").await.1), ["s7"]);
    assert_eq!(read(&api, "/swaps?model=nope").await.0, StatusCode::NOT_FOUND);
    assert_eq!(read(&api, "/swaps?limit=many").await.0, StatusCode::BAD_REQUEST);

    let (_, failed) = read(&api, "/swaps/s8").await;
    assert_eq!((&failed["result"], &failed["fault"]), (&json!("failed"), &json!("out_of_memory")));
    assert_eq!(failed["log"], json!(["loading", "CUDA out of memory"]));
    assert_eq!(failed["evicted"][0]["model"], CODER);
    assert_eq!(read(&api, "/swaps/9").await.1["phase"], "start");
    assert_eq!(read(&api, "/swaps/s99").await.0, StatusCode::NOT_FOUND);
    assert_eq!(read(&api, "/swaps/x").await.0, StatusCode::NOT_FOUND);
}

// contract: GET /gpus
#[tokio::test]
async fn gpus_name_who_holds_what() {
    let (puppet, _leases) = world();
    let (_, body) = read(&api(&puppet), "/gpus").await;
    let gpu = &body["gpus"][0];
    assert_eq!(gpu["used_bytes"], 18u64 << 30);
    assert_eq!(gpu["promised_bytes"], 20u64 << 30);
    assert_eq!(gpu["promised_to"], json!([MISTRAL, CODER]));
    assert_eq!(gpu["holders"][0]["model"], MISTRAL);
    let stranger = &gpu["holders"][1];
    assert_eq!((&stranger["pid"], &stranger["mib"]), (&json!(4711), &json!(2048)));
    assert_eq!((&stranger["model"], &stranger["instance"]), (&Value::Null, &Value::Null));
    assert_eq!(body["foreign"][0]["name"], "stranger");
    let host = &body["host_memory"];
    assert_eq!(host["total_bytes"], 64u64 << 30);
    assert_eq!(host["available_bytes"], 40u64 << 30);
    assert_eq!(
        (&host["promised_bytes"], &host["promised_to"]),
        (&json!(12u64 << 30), &json!([MISTRAL]))
    );
}

// contract: GET /queue
#[tokio::test]
async fn the_queue_says_what_is_waited_for() {
    let (puppet, _leases) = world();
    let (_, body) = read(&api(&puppet), "/queue").await;
    assert_eq!(body["queued"], 2);
    let row = &body["models"][0];
    assert_eq!((&row["model"], &row["requests"]), (&json!(CODER), &json!(["r4", "r5"])));
    assert!(row["waiting_for"].as_str().expect("text").contains("load_weights"));
    assert!(row["oldest_seconds"].is_number());
}

// contract: RULE errors have one shape, unknown paths are JSON 404
#[tokio::test]
async fn bad_requests_get_json_that_names_the_mistake() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let (status, body) = post(&api, "/ensure_model", r#"{"model":"mistrel"}"#).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (StatusCode::NOT_FOUND, &json!("model_not_found"))
    );
    let message = body["error"]["message"].as_str().expect("text");
    for name in [MISTRAL, CODER, TINY] {
        assert!(message.contains(name) || body["available_models"].to_string().contains(name));
    }
    for (path, sent, expected) in [
        ("/ensure_model", "", StatusCode::BAD_REQUEST),
        ("/ensure_model", "{", StatusCode::BAD_REQUEST),
        ("/ensure_model", r#"{"model":"tiny","model":"mistral"}"#, StatusCode::BAD_REQUEST),
        ("/ensure_model", r#"{"model":"tiny","timeout":-1}"#, StatusCode::BAD_REQUEST),
        ("/ensure_model", r#"{"model":"tiny","timeout":"soon"}"#, StatusCode::BAD_REQUEST),
        ("/ensure_model", r#"{"model":"tiny","timeout":1e9}"#, StatusCode::BAD_REQUEST),
        ("/models/tiny/unload", r#"{"force":"yes"}"#, StatusCode::BAD_REQUEST),
        ("/models/nope/load", "", StatusCode::NOT_FOUND),
        ("/models/tiny/explode", "", StatusCode::NOT_FOUND),
        ("/nowhere", "", StatusCode::NOT_FOUND),
        ("/status", "", StatusCode::METHOD_NOT_ALLOWED),
    ] {
        let (status, body) = post(&api, path, sent).await;
        assert_eq!(status, expected, "{path} {sent}: {body}");
        assert!(body["error"]["message"].is_string(), "{path} {sent}: {body}");
    }
    let large = format!(r#"{{"model":"{}"}}"#, "x".repeat(70_000));
    assert_eq!(post(&api, "/ensure_model", &large).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    let (status, _) = read(&api, "/models/%FF%FE").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

// contract: RULE control bodies are JSON whatever their content type
#[tokio::test]
async fn a_body_is_json_whatever_its_content_type_says() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    for kind in [None, Some("application/x-www-form-urlencoded"), Some("text/plain")] {
        let mut sent = request(Method::POST, "/ensure_model", r#"{"model":"tiny","wait":false}"#);
        sent.headers_mut().remove("content-type");
        if let Some(kind) = kind {
            sent.headers_mut().insert("content-type", kind.parse().expect("a value"));
        }
        assert_eq!(send(&api, sent).await.0, StatusCode::ACCEPTED, "{kind:?}");
    }
}

// contract: RULE both listeners may have one address
#[tokio::test]
async fn one_address_can_serve_gateway_and_control() {
    let (puppet, _leases) = world();
    let gateway = Router::new()
        .route("/health", axum::routing::get(async || "the gateway's"))
        .route("/v1/models", axum::routing::get(async || axum::Json(json!({"object": "list"}))));
    let both = api(&puppet).fallback_service(gateway);
    assert_eq!(read(&both, "/v1/models").await.1["object"], "list");
    assert_eq!(read(&both, "/health").await.1["service"], "wharf");
}

fn with_keys(view: View) -> (Router, Puppet) {
    let key = |name: &str, scopes: &[Scope]| ApiKey {
        name: name.to_owned(),
        key: format!("secret-{name}").into(),
        models: vec!["*".to_owned()],
        scopes: scopes.to_vec(),
        ..ApiKey::default()
    };
    let mut catalog = three_models();
    catalog.settings.auth = AuthSettings {
        keys: vec![
            key("app", &[Scope::Inference]),
            key("monitor", &[Scope::Read]),
            key("boss", &[Scope::Inference, Scope::Admin]),
        ],
        ..AuthSettings::default()
    };
    let puppet = Puppet::new(catalog);
    puppet.handle.publish_for_tests(view);
    (api(&puppet), puppet)
}

fn keyed(mut request: Request<Body>, name: &str) -> Request<Body> {
    let value = format!("Bearer secret-{name}").parse().expect("a value");
    request.headers_mut().insert("authorization", value);
    request
}

// contract: RULE a key has scopes and models
#[tokio::test]
async fn keys_open_what_their_scopes_say() {
    let (api, _puppet) = with_keys(view());
    let status = |key: Option<&'static str>, method: Method, path: &'static str| {
        let api = api.clone();
        async move {
            let sent = request(method, path, r#"{"model":"tiny","wait":false}"#);
            let sent = if let Some(key) = key { keyed(sent, key) } else { sent };
            api.oneshot(sent).await.expect("infallible").status().as_u16()
        }
    };
    let (get, post) = (Method::GET, Method::POST);
    assert_eq!(status(None, get.clone(), "/health").await, 200);
    assert_eq!(status(None, get.clone(), "/status").await, 401);
    assert_eq!(status(Some("wrong"), get.clone(), "/status").await, 401);
    assert_eq!(status(Some("app"), get.clone(), "/status").await, 403);
    assert_eq!(status(Some("monitor"), get.clone(), "/status").await, 200);
    assert_eq!(status(Some("monitor"), get.clone(), "/metrics").await, 200);
    assert_eq!(status(Some("boss"), get, "/swaps").await, 200, "admin may read");
    assert_eq!(status(Some("monitor"), post.clone(), "/ensure_model").await, 403);
    assert_eq!(status(None, post.clone(), "/models/tiny/load").await, 401);
    assert_eq!(status(Some("boss"), post, "/ensure_model").await, 202);
}

// contract: RULE foreign hosts and origins are refused
#[tokio::test]
async fn browsers_from_elsewhere_change_nothing() {
    let (puppet, _leases) = world();
    let api = api(&puppet);
    let body = r#"{"model":"tiny","wait":false}"#;
    let with = |header: &'static str, value: &'static str| {
        let mut sent = request(Method::POST, "/ensure_model", body);
        sent.headers_mut().insert(header, value.parse().expect("a value"));
        sent
    };
    assert_eq!(send(&api, with("origin", "https://evil.example")).await.0, StatusCode::FORBIDDEN);
    assert_eq!(send(&api, with("sec-fetch-site", "cross-site")).await.0, StatusCode::FORBIDDEN);
    let mut rebound = request(Method::GET, "/status", "");
    rebound.headers_mut().insert("host", "evil.example".parse().expect("a value"));
    assert_eq!(send(&api, rebound).await.0, StatusCode::FORBIDDEN);
    let own = with("origin", "http://127.0.0.1:8888");
    assert_eq!(send(&api, own).await.0, StatusCode::ACCEPTED);
}
