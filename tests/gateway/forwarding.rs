//! What reaches the engine, and what is tried again.

use std::time::Duration;

use wharf::gateway::Limits;
use wharf::orchestrator::Handle;
use wharf::scheduler::action::Refusal;
use wharf::units::InstanceId;

use crate::support::{Engine, World, until};

const CHAT: &str = "/v1/chat/completions";
const ASK: &str = r#"{"model":"mistral"}"#;

// contract: HEADER X-Request-Id
// contract: HEADER X-Wharf-Model
// contract: HEADER Server-Timing
#[tokio::test]
async fn the_body_arrives_byte_for_byte() {
    let mut world = World::new().await;
    world.ready();
    let odd = "\n{ \"n\" : 1.50e0, \"x\":\"\\u00e9 é\",\t\"mod\\u0065l\":\"mistra\\u006c\" , \"stream\":false,\"big\":12345678901234567890 }\r\n";
    let reply = world.spawn(world.post("/v1/chat/completions?a=b%20c", odd));
    let exchange = world.engine.request().await;
    assert_eq!(exchange.body, odd.as_bytes());
    assert!(exchange.head.starts_with("post /v1/chat/completions?a=b%20c http/1.1\r\n"));
    let text = "{\"whole\" : 1.0}";
    exchange.answer_json(text).await;
    let reply = reply.await.unwrap();
    assert_eq!(reply.status(), 200);
    assert_eq!(reply.headers()["x-wharf-model"], "mistral");
    assert!(reply.headers()["server-timing"].to_str().unwrap().starts_with("queue;dur="));
    assert!(!reply.headers()["x-request-id"].is_empty());
    assert_eq!(reply.text().await, text);
}

#[tokio::test]
async fn large_bodies_in_many_parts_arrive_whole() {
    let mut world = World::new().await;
    world.ready();
    let body = format!("{{\"model\":\"mistral\",\"x\":\"{}\"}}", "abcdefgh".repeat(400_000));
    let reply = world.spawn(world.post("/v1/embeddings", body.clone()));
    let exchange = world.engine.request().await;
    assert!(exchange.body == body.as_bytes(), "3 MB unchanged");
    exchange.answer_json("{}").await;
    assert_eq!(reply.await.unwrap().status(), 200);
}

#[tokio::test]
async fn an_alias_is_replaced_by_the_name_the_engine_knows() {
    let mut world = World::new().await;
    world.ready();
    let reply = world.spawn(world.post(CHAT, r#"{"a":1 ,"model" : "gpt-\u0034o","b":"gpt-4o"}"#));
    let exchange = world.engine.request().await;
    assert_eq!(exchange.body, br#"{"a":1 ,"model" : "mistral","b":"gpt-4o"}"#);
    exchange.answer_json("{}").await;
    reply.await.unwrap();
}

#[tokio::test]
async fn short_paths_and_other_content_types_work() {
    let mut world = World::new().await;
    world.ready();
    for (path, upstream) in [
        ("/chat/completions", "post /v1/chat/completions "),
        ("/completions", "post /v1/completions "),
        ("/v1/embeddings", "post /v1/embeddings "),
        ("/rerank", "post /rerank "),
    ] {
        let mut request = world.post(path, ASK);
        request.headers_mut().insert("content-type", "text/plain".parse().unwrap());
        let reply = world.spawn(request);
        let exchange = world.engine.request().await;
        assert!(exchange.head.starts_with(upstream), "{path}: {}", exchange.head);
        exchange.answer_json("{}").await;
        assert_eq!(reply.await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn a_path_of_the_endpoint_precedes_that_of_the_request() {
    let mut world = World::new().await;
    let mut endpoint = world.engine.endpoint();
    endpoint.base.push_str("/api");
    world.gate(1, endpoint, 8);
    let reply = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    assert!(exchange.head.starts_with("post /api/v1/chat/completions "), "{}", exchange.head);
    exchange.answer_json("{}").await;
    assert_eq!(reply.await.unwrap().status(), 200);
}

#[tokio::test]
async fn credentials_and_hop_by_hop_headers_stay_here() {
    let mut world = World::new().await;
    let mut endpoint = world.engine.endpoint();
    endpoint.api_key = wharf::runtime::EngineKey::new("engine-key");
    world.gate(1, endpoint, 8);
    let mut request = world.post(CHAT, ASK);
    for (name, value) in [
        ("authorization", "Bearer client-secret"),
        ("x-api-key", "client-secret"),
        ("cookie", "session=client-secret"),
        ("connection", "keep-alive, x-private"),
        ("x-private", "client-secret"),
        ("x-wharf-priority", "low"),
        ("x-request-id", "mine-1"),
        ("traceparent", "00-aa-bb-01"),
    ] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let reply = world.spawn(request);
    let exchange = world.engine.request().await;
    assert!(!exchange.head.contains("client-secret"), "{}", exchange.head);
    assert!(!exchange.head.contains("x-wharf"), "{}", exchange.head);
    assert!(exchange.head.contains("authorization: bearer engine-key\r\n"));
    assert!(exchange.head.contains("x-request-id: mine-1\r\n"));
    assert!(exchange.head.contains("traceparent: 00-aa-bb-01\r\n"));
    let headers = "connection: x-inner\r\nx-inner: 1\r\nkeep-alive: timeout=5\r\nx-kept: 1\r\naccess-control-allow-origin: *\r\n";
    exchange.answer("418 I'm a teapot", headers, "{\"error\":{\"message\":\"as it was\"}}").await;
    let reply = reply.await.unwrap();
    assert_eq!(reply.status(), 418);
    assert_eq!(reply.headers()["x-request-id"], "mine-1");
    assert_eq!(reply.headers()["x-kept"], "1");
    for name in ["x-inner", "keep-alive", "access-control-allow-origin"] {
        assert!(!reply.headers().contains_key(name), "{name}");
    }
    assert_eq!(reply.text().await, "{\"error\":{\"message\":\"as it was\"}}");
}

#[tokio::test]
async fn a_reset_pooled_connection_is_tried_once_more() {
    let mut world = World::new().await;
    let gate = world.ready();
    let first = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    exchange.answer_json("{}").await;
    first.await.unwrap().text().await;
    until("the lease ended", || gate.in_flight() == 0).await;

    let second = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    assert_eq!(exchange.connection, 1, "the pooled connection is used again");
    exchange.reset();
    let exchange = world.engine.request().await;
    assert_ne!(exchange.connection, 1);
    assert_eq!(exchange.body, ASK.as_bytes());
    exchange.answer_json("{\"ok\":1}").await;
    assert_eq!(second.await.unwrap().text().await, "{\"ok\":1}");
}

#[tokio::test]
async fn a_second_loss_ends_with_503() {
    let mut world = World::new().await;
    let gate = world.ready();
    let reply = world.spawn(world.post(CHAT, ASK));
    world.engine.request().await.reset();
    world.engine.request().await.reset();
    let (status, code, message) = reply.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (503, "instance_lost"));
    assert!(message.contains("mistral"), "{message}");
    assert_eq!(gate.in_flight(), 0);
    assert!(world.engine.has_none(), "not a third time");
}

#[tokio::test]
async fn a_dead_instance_sends_the_request_back_to_the_queue_with_its_age() {
    let mut world = World::new().await;
    let dead = world.ready();
    world.engine.die().await;
    let before = world.handle.now();
    let reply = world.spawn(world.post(CHAT, ASK));
    // The owner learns of the death a moment after the gateway met it.
    until("the gateway tried", || dead.granted() > 0).await;
    Handle::close_for_tests(&dead);
    let arrived = world.arrived().await;
    assert_eq!(arrived.request.attempt, 2);
    assert!(arrived.request.arrived >= before);
    let mut fresh = Engine::start().await;
    let gate = world.gate(2, fresh.endpoint(), 8);
    arrived.grant(&gate);
    fresh.request().await.answer_json("{\"ok\":2}").await;
    assert_eq!(reply.await.unwrap().text().await, "{\"ok\":2}");
}

#[tokio::test]
async fn cancelled_before_an_answer_it_is_requeued_once() {
    let mut world = World::new().await;
    let gate = world.ready();
    let reply = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    Handle::close_for_tests(&gate);
    gate.cancel_leases();
    exchange.closed().await;
    until("the lease ended", || gate.in_flight() == 0).await;
    let arrived = world.arrived().await;
    assert_eq!(arrived.request.attempt, 2);
    let second =
        world.handle.gate_for_tests(InstanceId(2), &"mistral".into(), world.engine.endpoint(), 0);
    arrived.grant(&second);
    let exchange = world.engine.request().await;
    second.cancel_leases();
    exchange.closed().await;
    let (status, code, message) = reply.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (503, "instance_lost"));
    assert!(message.contains("stopped"), "{message}");
}

#[tokio::test]
async fn nonsense_of_the_engine_is_502_and_not_tried_again() {
    let mut world = World::new().await;
    world.ready();
    let reply = world.spawn(world.post(CHAT, ASK));
    let mut exchange = world.engine.request().await;
    exchange.write("SSH-2.0-OpenSSH_9.2\r\n\r\n").await;
    let (status, code, _) = reply.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (502, "upstream_error"));
    assert!(world.engine.has_none());
}

#[tokio::test]
async fn an_engine_that_says_nothing_is_given_up() {
    let limits = Limits { upstream_silence: Duration::from_millis(50), ..Limits::default() };
    let mut world = World::with(|_| {}, limits).await;
    let gate = world.ready();
    let reply = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    let (status, code, _) = reply.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (504, "upstream_timeout"));
    exchange.closed().await;
    assert_eq!(gate.in_flight(), 0);
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_frees_its_lease() {
    let mut world = World::new().await;
    let gate = world.ready();
    let reply = world.spawn(world.post(CHAT, ASK));
    let exchange = world.engine.request().await;
    assert_eq!(gate.in_flight(), 1);
    reply.abort();
    exchange.closed().await;
    until("the lease ended", || gate.in_flight() == 0).await;
}

// contract: HEADER X-Wharf-Start
#[tokio::test]
async fn never_start_asks_the_owner_without_touching_an_idle_model() {
    let mut world = World::new().await;
    let never = |world: &World| {
        let mut request = world.post(CHAT, ASK);
        request.headers_mut().insert("x-wharf-start", "never".parse().unwrap());
        request
    };
    let reply = world.spawn(never(&world));
    let arrived = world.arrived().await;
    assert!(arrived.request.never_start);
    arrived.refuse(Refusal::NotLoaded);
    let (status, code, message) = reply.await.unwrap().error().await;
    assert_eq!((status, code.as_str()), (503, "model_not_loaded"));
    assert!(message.contains("X-Wharf-Start"), "{message}");

    let gate = world.ready();
    let before = Handle::demand_for_tests(&gate);
    // The owner's clock counts milliseconds: a trace would show.
    until("time passed", || world.handle.now() > before.last_used + Duration::from_millis(2)).await;
    let reply = world.spawn(never(&world));
    world.engine.request().await.answer_json("{}").await;
    assert_eq!(reply.await.unwrap().status(), 200);
    until("the lease ended", || gate.in_flight() == 0).await;
    assert_eq!(Handle::demand_for_tests(&gate), before);
    assert_eq!(gate.granted(), 1, "but it was served");

    let reply = world.spawn(world.post(CHAT, ASK));
    world.engine.request().await.answer_json("{}").await;
    reply.await.unwrap();
    let after = Handle::demand_for_tests(&gate);
    assert!(after.last_used > before.last_used && after.granted == 1);
}

// contract: RULE a form's model may follow its file
#[tokio::test]
async fn a_form_is_forwarded_as_it_came_with_the_name_the_engine_knows() {
    let mut world = World::new().await;
    world.ready();
    let form = |model: &str| {
        let audio = "RIFF\r\n--no\r\n".repeat(20_000);
        format!(
            "--b1\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n\
             {audio}\r\n--b1\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n\
             --b1--\r\n"
        )
    };
    for path in ["/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits"] {
        let mut request = world.post(path, form("gpt-4o"));
        let kind = "multipart/form-data; boundary=b1";
        request.headers_mut().insert("content-type", kind.parse().unwrap());
        let reply = world.spawn(request);
        let exchange = world.engine.request().await;
        assert!(exchange.head.starts_with(&format!("post {path} ")), "{}", exchange.head);
        assert!(exchange.head.contains(&format!("content-type: {kind}\r\n")), "{}", exchange.head);
        assert!(exchange.body == form("mistral").as_bytes(), "only the name is another");
        exchange.answer_json("{\"text\":\"hi\"}").await;
        assert_eq!(reply.await.unwrap().status(), 200);
    }
    let reply = world.spawn(world.post("/v1/audio/transcriptions", "{\"model\":\"mistral\"}"));
    let reply = reply.await.unwrap();
    assert_eq!(reply.status(), 400);
    assert!(reply.text().await.contains("multipart/form-data"));
}
