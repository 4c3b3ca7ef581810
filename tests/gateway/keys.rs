//! What a key bounds: how often and how many at once, how far ahead, and whether it may start
//! anything.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use wharf::config::catalog::{ApiKey, Catalog, RateLimits, Scope, StartRule};
use wharf::gateway::Limits;
use wharf::orchestrator::handle::Message;
use wharf::scheduler::action::Refusal;
use wharf::units::Priority;

use crate::support::World;

fn keys(catalog: &mut Catalog) {
    let key = |name: &str| ApiKey {
        name: name.into(),
        key: format!("sk-{name}").into(),
        models: vec!["*".into()],
        scopes: vec![Scope::Inference],
        ..ApiKey::default()
    };
    let limits = |requests_per_minute, concurrency| RateLimits { requests_per_minute, concurrency };
    catalog.settings.rate_limits = limits(None, Some(3));
    catalog.settings.auth.keys = vec![
        ApiKey { limits: limits(Some(2), None), ..key("rare") },
        ApiKey { limits: limits(None, Some(1)), ..key("single") },
        ApiKey { start: StartRule::Never, ..key("probe") },
        ApiKey {
            max_wait: Some(Duration::from_secs(60)),
            priority: Some((Priority::Low, Priority::Low)),
            ..key("batch")
        },
    ];
}

fn chat(world: &World, key: &str) -> Request<Full<Bytes>> {
    let mut request = world.post("/v1/chat/completions", r#"{"model":"mistral"}"#);
    request.headers_mut().insert("authorization", format!("Bearer sk-{key}").parse().unwrap());
    request
}

/// What is over a limit never reaches the queue.
fn nobody_queued(world: &mut World) {
    while let Ok(message) = world.messages.try_recv() {
        assert!(matches!(message, Message::GatePing(_)), "{message:?}");
    }
}

// contract: RULE limits of a key act before the queue
#[tokio::test]
async fn a_key_that_asks_too_often_is_told_when_to_come_back() {
    let mut world = World::with(keys, Limits::default()).await;
    for _ in 0..2 {
        let reply = world.spawn(chat(&world, "rare"));
        world.arrived().await.refuse(Refusal::Unloaded);
        assert_eq!(reply.await.unwrap().status(), 503);
    }
    let reply = world.send(chat(&world, "rare")).await;
    // Two a minute: one each 30 s, of which a busy machine may have used some.
    let seconds = reply.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((20..=30).contains(&seconds), "{seconds}");
    let (status, code, message) = reply.error().await;
    assert_eq!((status, code.as_str()), (429, "rate_limited"));
    assert!(message.contains("\"rare\"") && message.contains("2 requests a minute"), "{message}");
    nobody_queued(&mut world);
}

#[tokio::test]
async fn requests_at_once_are_counted_until_their_answer_has_ended() {
    let mut world = World::with(keys, Limits::default()).await;
    let first = world.spawn(chat(&world, "single"));
    let waiting = world.arrived().await;
    let (status, code, _) = world.send(chat(&world, "single")).await.error().await;
    assert_eq!((status, code.as_str()), (429, "too_many_requests"));
    nobody_queued(&mut world);
    waiting.refuse(Refusal::Unloaded);
    first.await.unwrap();
    let again = world.spawn(chat(&world, "single"));
    world.arrived().await.refuse(Refusal::Unloaded);
    assert_eq!(again.await.unwrap().status(), 503);
}

#[tokio::test]
async fn a_key_that_says_nothing_has_the_limits_of_all() {
    let mut world = World::with(keys, Limits::default()).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let reply = world.spawn(chat(&world, "batch"));
        waiting.push((world.arrived().await, reply));
    }
    assert_eq!(world.send(chat(&world, "batch")).await.error().await.1, "too_many_requests");
    for (arrived, reply) in waiting {
        arrived.refuse(Refusal::Unloaded);
        reply.await.unwrap();
    }
}

// contract: RULE a key bounds start, wait and priority
#[tokio::test]
async fn a_key_bounds_start_wait_and_priority() {
    let mut world = World::with(keys, Limits::default()).await;
    let reply = world.spawn(chat(&world, "probe"));
    let arrived = world.arrived().await;
    assert!(arrived.request.never_start);
    arrived.refuse(Refusal::NotLoaded);
    assert_eq!(reply.await.unwrap().error().await.1, "model_not_loaded");

    let mut request = chat(&world, "batch");
    request.headers_mut().insert("x-wharf-priority", "high".parse().unwrap());
    request.headers_mut().insert("x-wharf-max-wait", "1s".parse().unwrap());
    let reply = world.spawn(request);
    let arrived = world.arrived().await;
    assert_eq!(arrived.request.priority, Priority::Low);
    assert_eq!(arrived.request.max_wait, Some(Duration::from_secs(60)));
    arrived.refuse(Refusal::Unloaded);
    reply.await.unwrap();
}
