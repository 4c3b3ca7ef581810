//! The held head, the notes to waiting streams, and what refusals look like before and after it.

use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::{Catalog, WaitingStyle};
use wharf::gateway::Limits;
use wharf::orchestrator::View;
use wharf::orchestrator::handle::Message;
use wharf::runtime::ProgressNow;
use wharf::scheduler::action::Refusal;
use wharf::scheduler::event::{Fault, FaultKind};
use wharf::scheduler::record::*;
use wharf::units::*;

use crate::support::{World, timely, until};

const CHAT: &str = "/v1/chat/completions";
const STREAM: &str = r#"{"model":"mistral","stream":true}"#;
const WHOLE: &str = r#"{"model":"mistral"}"#;

/// Tells quickly and often.
async fn eager(style: WaitingStyle) -> World {
    let change = move |catalog: &mut Catalog| {
        catalog.settings.waiting.style = style;
        catalog.settings.waiting.after = Duration::from_millis(20);
    };
    let limits = Limits { keep_alive: Duration::from_millis(30), ..Limits::default() };
    World::with(change, limits).await
}

/// `mistral` is being started for these waiting requests.
fn starting(queue: Vec<RequestId>) -> View {
    let mut view = View::default();
    view.scheduler.swaps.push(SwapRecord {
        id: SwapId(3),
        model: "mistral".into(),
        kind: SwapKind::Load,
        cause: SwapCause::Request,
        decision: String::new(),
        instance: Some(InstanceId(5)),
        gpus: Vec::new(),
        evicted: Vec::new(),
        began: Time::ZERO,
        ended: None,
        phases: Vec::new(),
        phase: Some((Phase::Start, Time::ZERO)),
        outcome: None,
    });
    view.scheduler.models.push(ModelView {
        name: "mistral".into(),
        residency: ResidencyView::Starting { phase: Phase::Start },
        instance: Some(InstanceId(5)),
        gpus: Vec::new(),
        since: Time::ZERO,
        footprint: None,
        swap: Some(SwapId(3)),
        queue,
        oldest: None,
        ready_in: Some(Duration::from_secs(3600)),
        waiting_for: "its start".into(),
        pinned: false,
        kept: false,
        ttl_runs: false,
        ttl_until: None,
    });
    view
}

// contract: RULE a refusal before the head keeps its status
#[tokio::test]
async fn refusals_before_the_head_keep_their_status() {
    let mut world = World::new().await;
    let fault =
        Fault::new(FaultKind::FatalLogLine, "CUDA out of memory").with_log(vec!["l1".into()]);
    let retry_at = world.handle.now() + Duration::from_secs(60);
    for (refusal, status, code, part) in [
        (Refusal::UnknownModel, 404, "model_not_found", "mistral"),
        (Refusal::QueueFull { limit: 9, per_model: true }, 429, "queue_full", "queue.per_model"),
        (
            Refusal::Overloaded { expected_ms: 90_000, timeout_ms: 60_000 },
            503,
            "overloaded",
            "90 s of work",
        ),
        (
            Refusal::QueueTimeout { waited_ms: 2000, waiting_for: "qwen drains".into() },
            504,
            "queue_timeout",
            "qwen drains",
        ),
        (
            Refusal::CannotFit {
                need: Bytes::gib(30),
                available: Bytes::gib(20),
                gpus: 1,
                host: false,
                pinned: Vec::new(),
            },
            507,
            "cannot_fit",
            "30.0 GiB",
        ),
        (
            Refusal::StartFailed { swap: Some(SwapId(4)), fault: fault.clone(), retry_at },
            503,
            "start_failed",
            "CUDA out of memory",
        ),
        (
            Refusal::VramNeverFreed { swap: SwapId(4), fault, retry_at },
            503,
            "vram_not_freed",
            "did not come back",
        ),
        (Refusal::NoVramProof { message: "NVML".into() }, 503, "no_vram_proof", "NVML"),
        (Refusal::RuntimeLost { message: "docker".into() }, 503, "runtime_lost", "docker"),
        (Refusal::Unloaded, 503, "model_unloaded", "operator"),
        (Refusal::ShuttingDown, 503, "shutting_down", "shutting down"),
    ] {
        for body in [WHOLE, STREAM] {
            let reply = world.spawn(world.post(CHAT, body));
            world.arrived().await.refuse(refusal.clone());
            let (found, found_code, message) = reply.await.unwrap().error().await;
            assert_eq!((found, found_code.as_str()), (status, code));
            assert!(message.contains(part), "{message}");
        }
    }
}

#[tokio::test]
async fn a_failed_start_tells_cause_and_swap_and_to_local_callers_the_log() {
    let mut world = World::new().await;
    let fault = Fault::new(FaultKind::Exited, "exited with code 1").with_log(vec!["last".into()]);
    let retry_at = world.handle.now() + Duration::from_secs(60);
    let reply = world.spawn(world.post(CHAT, WHOLE));
    let refusal = Refusal::StartFailed { swap: Some(SwapId(4)), fault, retry_at };
    world.arrived().await.refuse(refusal);
    let reply = reply.await.unwrap();
    let seconds = reply.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((50..=60).contains(&seconds), "{seconds}");
    let body = reply.json().await;
    assert_eq!(body["swap_id"], "s4");
    assert_eq!(body["cause"]["kind"], "exited");
    assert_eq!(body["cause"]["log"][0], "last");
}

// contract: HEADER X-Wharf-Max-Wait
// contract: HEADER X-Wharf-Priority
#[tokio::test]
async fn what_a_request_asks_reaches_the_owner() {
    let mut world = World::new().await;
    let mut request = world.post(CHAT, WHOLE);
    request.headers_mut().insert("x-wharf-max-wait", "45s".parse().unwrap());
    request.headers_mut().insert("x-wharf-priority", "high".parse().unwrap());
    let reply = world.spawn(request);
    let arrived = world.arrived().await;
    assert_eq!(arrived.request.max_wait, Some(Duration::from_secs(45)));
    assert_eq!(arrived.request.priority, Priority::High);
    assert_eq!(arrived.request.attempt, 1);
    assert_eq!(arrived.request.model.as_str(), "mistral");
    let gate = world.closed();
    arrived.grant(&gate);
    world.engine.request().await.answer_json("{}").await;
    assert_eq!(reply.await.unwrap().status(), 200);
    until("the lease ended", || gate.in_flight() == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_is_taken_out_of_it() {
    let mut world = World::new().await;
    let reply = world.spawn(world.post(CHAT, WHOLE));
    let arrived = world.arrived().await;
    reply.abort();
    let gone = timely(world.messages.recv()).await.unwrap();
    assert!(matches!(gone, Message::RequestGone(id) if id == arrived.request.id), "{gone:?}");
}

// contract: RULE waiting as comments
#[tokio::test]
async fn a_waiting_stream_is_told_phase_place_and_estimate_and_then_answered() {
    let mut world = eager(WaitingStyle::Comment).await;
    let reply = world.spawn(world.post(CHAT, STREAM));
    let arrived = world.arrived().await;
    let mut view = starting(vec![RequestId(999), arrived.request.id]);
    world.handle.publish_for_tests(view.clone());
    let mut reply = reply.await.unwrap();
    assert_eq!(reply.status(), 200);
    assert_eq!(reply.headers()["content-type"], "text/event-stream");
    assert_eq!(reply.headers()["x-wharf-model"], "mistral");
    assert!(reply.headers().contains_key("x-request-id"));
    let told = loop {
        let told = reply.part().await.unwrap();
        if told.contains("place") {
            break told;
        }
    };
    assert!(told.starts_with(": wharf starting mistral, phase=start, place 2, about "), "{told}");
    assert!(told.ends_with(" s\n\n"), "{told}");

    view.progress.insert(
        InstanceId(5),
        ProgressNow { stage: "load_weights".into(), fraction: Some(0.4), detail: String::new() },
    );
    world.handle.publish_for_tests(view);
    let told = loop {
        let told = reply.part().await.unwrap();
        if !told.contains("phase=start,") {
            break told;
        }
    };
    assert!(told.contains("phase=load_weights 40%, place 2"), "{told}");

    let gate = world.closed();
    arrived.grant(&gate);
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    exchange.chunk("data: {\"choices\":[1]}\n\n").await;
    exchange.chunk("data: [DONE]\n\n").await;
    exchange.end().await;
    let rest = reply.text().await;
    let answer = rest.find("data:").unwrap();
    assert!(rest[..answer].lines().all(|line| line.is_empty() || line.starts_with(": wharf ")));
    let answer = &rest[answer..];
    assert!(
        answer.starts_with("data: {\"choices\":[1]}\n\ndata: [DONE]\n\n: server-timing queue;dur="),
        "{answer}"
    );
    until("the lease ended", || gate.in_flight() == 0).await;
}

// contract: RULE a refusal after the head is an error event
#[tokio::test]
async fn a_refusal_after_the_head_is_an_error_event() {
    let mut world = eager(WaitingStyle::Comment).await;
    let reply = world.spawn(world.post(CHAT, STREAM));
    let arrived = world.arrived().await;
    let reply = reply.await.unwrap();
    assert_eq!(reply.status(), 200);
    arrived.refuse(Refusal::ShuttingDown);
    let text = reply.text().await;
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    let error: serde_json::Value =
        serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "shutting_down");
    assert!(!text.contains("[DONE]"));
}

#[tokio::test]
async fn an_upstream_error_after_the_head_is_an_error_event() {
    let mut world = eager(WaitingStyle::Comment).await;
    let reply = world.spawn(world.post(CHAT, STREAM));
    let arrived = world.arrived().await;
    let reply = reply.await.unwrap();
    arrived.grant(&world.closed());
    let exchange = world.engine.request().await;
    let body = "{\n  \"error\": {\"message\": \"too long\", \"code\": 400}\n}";
    exchange.answer("400 Bad Request", "content-type: application/json\r\n", body).await;
    let text = reply.text().await;
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    assert_eq!(last, "data: {\"error\":{\"message\":\"too long\",\"code\":400}}");
}

#[tokio::test]
async fn leaving_a_told_stream_frees_the_place() {
    let mut world = eager(WaitingStyle::Comment).await;
    let reply = world.spawn(world.post(CHAT, STREAM));
    let arrived = world.arrived().await;
    let mut reply = reply.await.unwrap();
    reply.part().await.unwrap();
    drop(reply);
    let gone = timely(world.messages.recv()).await.unwrap();
    assert!(matches!(gone, Message::RequestGone(id) if id == arrived.request.id), "{gone:?}");
}

// contract: RULE waiting as chunks and as reasoning
#[tokio::test]
async fn other_styles_are_events_that_clients_can_read() {
    for (style, field) in
        [(WaitingStyle::Chunk, "content"), (WaitingStyle::Reasoning, "reasoning_content")]
    {
        let mut world = eager(style).await;
        let reply = world.spawn(world.post(CHAT, STREAM));
        let arrived = world.arrived().await;
        world.handle.publish_for_tests(starting(vec![arrived.request.id]));
        let mut reply = reply.await.unwrap();
        let part = reply.part().await.unwrap();
        let chunk: serde_json::Value =
            serde_json::from_str(part.strip_prefix("data: ").unwrap().trim_end()).unwrap();
        assert_eq!(chunk["object"], "chat.completion.chunk");
        let told = chunk["choices"][0]["delta"][field].as_str().unwrap();
        assert_eq!(told.is_empty(), style == WaitingStyle::Chunk, "{told}");
        arrived.refuse(Refusal::ShuttingDown);
        assert!(reply.text().await.contains("shutting_down"));
    }
}

// contract: RULE waiting silently
#[tokio::test]
async fn off_and_whole_answers_hold_the_head_to_the_end() {
    for (style, body) in [(WaitingStyle::Off, STREAM), (WaitingStyle::Comment, WHOLE)] {
        let mut world = eager(style).await;
        let reply = world.spawn(world.post(CHAT, body));
        let arrived = world.arrived().await;
        // Much longer than the head of an eager stream is held.
        tokio::time::sleep(Duration::from_millis(120)).await;
        assert!(!reply.is_finished());
        arrived.refuse(Refusal::Unloaded);
        assert_eq!(reply.await.unwrap().status(), 503);
    }
}

#[tokio::test]
async fn the_swap_has_its_own_share_of_the_time() {
    let mut world = World::new().await;
    let reply = world.spawn(world.post(CHAT, WHOLE));
    let arrived = world.arrived().await;
    let mut view = starting(vec![arrived.request.id]);
    let mut swap = view.scheduler.swaps.remove(0);
    tokio::time::sleep(Duration::from_millis(30)).await;
    swap.ended = Some(world.handle.now());
    swap.outcome = Some(SwapOutcome::Ready);
    view.ledger = Arc::new([Arc::new(swap)].into());
    world.handle.publish_for_tests(view);
    arrived.grant(&world.closed());
    world.engine.request().await.answer_json("{}").await;
    let reply = reply.await.unwrap();
    let timing = reply.headers()["server-timing"].to_str().unwrap();
    let swap = timing.split("swap;dur=").nth(1).unwrap().split(',').next().unwrap();
    assert!(swap.parse::<f64>().unwrap() >= 29.0, "{timing}");
}
