//! Streams: frame by frame, and every way in which they end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use wharf::config::catalog::{Catalog, EngineKind};
use wharf::gateway::Limits;
use wharf::orchestrator::Handle;

use crate::support::{Exchange, Reply, World, timely, until};

const CHAT: &str = "/v1/chat/completions";
const STREAM: &str = r#"{"model":"mistral","stream":true}"#;

fn event(text: &str) -> String {
    format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
}

const USAGE: &str =
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// A request that is with its engine, which has sent the head of a stream.
async fn forwarded(world: &mut World, body: &'static str) -> (JoinHandle<Reply>, Exchange) {
    let reply = world.spawn(world.post(CHAT, body));
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    (reply, exchange)
}

/// A stream whose first event has reached the client.
async fn begun(world: &mut World) -> (Reply, Exchange) {
    let (reply, mut exchange) = forwarded(world, STREAM).await;
    exchange.chunk(&event("a")).await;
    let mut reply = reply.await.unwrap();
    assert_eq!(reply.part().await.unwrap(), event("a"));
    (reply, exchange)
}

#[tokio::test]
async fn every_frame_leaves_before_the_next_one_comes() {
    let mut world = World::new().await;
    let gate = world.ready();
    let (reply, mut exchange) = forwarded(&mut world, STREAM).await;
    let mut reply = reply.await.unwrap();
    assert_eq!(reply.headers()["content-type"], "text/event-stream");
    assert!(reply.headers()["server-timing"].to_str().unwrap().contains("upstream;dur="));
    for text in ["one", "two", "three"] {
        exchange.chunk(&event(text)).await;
        assert_eq!(reply.part().await.unwrap(), event(text));
    }
    assert_eq!(gate.in_flight(), 1);
    exchange.chunk(DONE).await;
    exchange.end().await;
    assert_eq!(reply.part().await.unwrap(), DONE);
    assert_eq!(reply.part().await, None);
    until("the lease ended", || gate.in_flight() == 0).await;
}

// contract: RULE usage is asked for and taken out again
#[tokio::test]
async fn usage_is_asked_for_and_taken_out_again() {
    let mut world = World::new().await;
    world.ready();
    let (reply, mut exchange) = forwarded(&mut world, STREAM).await;
    assert_eq!(
        exchange.body,
        br#"{"stream_options":{"include_usage":true},"model":"mistral","stream":true}"#
    );
    exchange.chunk(&event("a")).await;
    // Cut in the middle: the client sees none of it.
    let (head, tail) = USAGE.split_at(30);
    exchange.chunk(head).await;
    exchange.chunk(&format!("{tail}{DONE}")).await;
    exchange.end().await;
    assert_eq!(reply.await.unwrap().text().await, format!("{}{DONE}", event("a")));
}

#[tokio::test]
async fn usage_that_the_client_asked_for_reaches_it() {
    let mut world = World::new().await;
    world.ready();
    let body = r#"{"model":"mistral","stream":true,"stream_options":{"include_usage":true}}"#;
    let (reply, mut exchange) = forwarded(&mut world, body).await;
    assert_eq!(exchange.body, body.as_bytes());
    exchange.chunk(&format!("{}{USAGE}{DONE}", event("a"))).await;
    exchange.end().await;
    assert_eq!(reply.await.unwrap().text().await, format!("{}{USAGE}{DONE}", event("a")));
}

// contract: RULE usage is asked for and taken out again
#[tokio::test]
async fn streams_stay_untouched_where_usage_is_not_wanted() {
    let llamacpp = |catalog: &mut Catalog| {
        for spec in catalog.models.values_mut() {
            std::sync::Arc::make_mut(spec).engine = EngineKind::Llamacpp;
        }
    };
    let off = |catalog: &mut Catalog| {
        for spec in catalog.models.values_mut() {
            std::sync::Arc::make_mut(spec).include_usage = false;
        }
    };
    for mut world in
        [World::with(llamacpp, Limits::default()).await, World::with(off, Limits::default()).await]
    {
        world.ready();
        let (reply, mut exchange) = forwarded(&mut world, STREAM).await;
        assert_eq!(exchange.body, STREAM.as_bytes());
        exchange.chunk(USAGE).await;
        exchange.end().await;
        assert_eq!(reply.await.unwrap().text().await, USAGE);
    }
}

#[tokio::test]
async fn a_client_that_leaves_closes_the_upstream_connection() {
    let mut world = World::new().await;
    let gate = world.ready();
    let (reply, exchange) = begun(&mut world).await;
    assert_eq!(gate.in_flight(), 1);
    drop(reply);
    exchange.closed().await;
    until("the lease ended", || gate.in_flight() == 0).await;
}

#[tokio::test]
async fn a_cancelled_stream_ends_with_an_error_event_and_without_done() {
    let mut world = World::new().await;
    let gate = world.ready();
    let (mut reply, mut exchange) = begun(&mut world).await;
    // Half an event must not run into the error.
    exchange.chunk("data: {\"choi").await;
    gate.cancel_leases();
    exchange.closed().await;
    let last = reply.part().await.unwrap();
    let error: serde_json::Value =
        serde_json::from_str(last.strip_prefix("data: ").unwrap().trim_end()).unwrap();
    assert_eq!(error["error"]["code"], "instance_lost");
    assert_eq!(error["model"], "mistral");
    assert_eq!(reply.part().await, None);
    assert_eq!(gate.in_flight(), 0);
}

#[tokio::test]
async fn an_engine_that_breaks_off_a_stream_is_told_to_the_client() {
    let mut world = World::new().await;
    world.ready();
    let (mut reply, exchange) = begun(&mut world).await;
    exchange.reset();
    let last = reply.part().await.unwrap();
    assert!(last.contains("\"code\":\"upstream_error\""), "{last}");
    assert_eq!(reply.part().await, None);
    assert!(world.engine.has_none(), "never again after a head");
}

#[tokio::test]
async fn a_whole_answer_is_counted_with_its_tokens() {
    let mut world = World::new().await;
    world.ready();
    let reply = world.spawn(world.post(CHAT, r#"{"model":"mistral"}"#));
    let usage = r#"{"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
    world.engine.request().await.answer_json(usage).await;
    assert_eq!(reply.await.unwrap().text().await, usage);
    let counted = async {
        let ok = "orchestrator_requests_total{model=\"mistral\",outcome=\"ok\"} 1\n";
        let tokens = "orchestrator_tokens_total{kind=\"completion\",model=\"mistral\"} 2\n";
        loop {
            let text = world.get("/metrics").await.text().await;
            if text.contains(ok) && text.contains(tokens) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timely(counted).await;
}

#[tokio::test]
async fn a_cut_json_answer_breaks_the_connection() {
    let mut world = World::new().await;
    let gate = world.ready();
    let reply = world.spawn(world.post(CHAT, r#"{"model":"mistral"}"#));
    let mut exchange = world.engine.request().await;
    exchange
        .write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        .await;
    let mut reply = reply.await.unwrap();
    assert_eq!(reply.headers()["content-length"], "100");
    assert_eq!(reply.part().await.unwrap(), "{");
    gate.cancel_leases();
    assert!(timely(reply.0.body_mut().frame()).await.unwrap().is_err());
    exchange.closed().await;
}

#[tokio::test]
async fn a_reader_that_stalls_is_dropped_under_notice_only() {
    let limits = Limits { reader_stall: Duration::from_millis(100), ..Limits::default() };
    let mut world = World::with(|_| {}, limits).await;
    let gate = world.ready();
    // A client that sends its request and then reads nothing.
    let mut client = tokio::net::TcpStream::connect(world.address).await.unwrap();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n",
        STREAM.len()
    );
    client.write_all(format!("{head}{STREAM}").as_bytes()).await.unwrap();
    let mut exchange = world.engine.request().await;
    exchange.stream().await;
    // More than every buffer on the way holds, until the gateway hangs up.
    let sent = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&sent);
    let filling = tokio::spawn(async move {
        let block = event(&"x".repeat(60_000));
        while exchange.try_chunk(&block).await {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut before = u64::MAX;
    while before != sent.load(Ordering::Relaxed) {
        before = sent.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(gate.in_flight(), 1, "without notice it may take its time");
    Handle::close_for_tests(&gate);
    until("the lease ended", || gate.in_flight() == 0).await;
    filling.await.unwrap();
    drop(client);
}

#[tokio::test]
async fn a_silent_stream_is_given_up() {
    let limits = Limits {
        upstream_silence: Duration::from_secs(2),
        reader_stall: Duration::from_millis(20),
        ..Limits::default()
    };
    let mut world = World::with(|_| {}, limits).await;
    world.ready();
    let (mut reply, exchange) = begun(&mut world).await;
    assert!(reply.part().await.unwrap().contains("\"code\":\"upstream_timeout\""));
    exchange.closed().await;
}

#[tokio::test]
async fn shutdown_lets_requests_end_and_then_cuts_them() {
    let mut world = World::new().await;
    world.ready();
    let whole = world.spawn(world.post(CHAT, r#"{"model":"mistral"}"#));
    let first = world.engine.request().await;
    let (endless, second) = forwarded(&mut world, STREAM).await;
    let mut endless = endless.await.unwrap();
    world.shutdown.cancel();
    first.answer_json("{}").await;
    assert_eq!(whole.await.unwrap().status(), 200);
    timely(&mut world.served).await.unwrap();
    assert!(timely(endless.0.body_mut().frame()).await.unwrap().is_err(), "cut");
    second.closed().await;
    assert!(tokio::net::TcpStream::connect(world.address).await.is_err());
}

#[tokio::test]
async fn many_clients_that_leave_at_any_point_leak_nothing() {
    const CLIENTS: usize = 120;
    let world = World::new().await;
    let gate = world.gate(1, world.engine.endpoint(), 1000);
    let mut clients = Vec::new();
    for n in 0..CLIENTS {
        clients.push((n, world.spawn(world.post(CHAT, STREAM))));
    }
    let World { mut engine, handle: _handle, .. } = world;
    let serving = tokio::spawn(async move {
        loop {
            let mut exchange = engine.request().await;
            tokio::spawn(async move {
                exchange.stream().await;
                for _ in 0..5 {
                    // Some clients are gone by now.
                    if !exchange.try_chunk(&event("a")).await {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                if exchange.try_chunk(DONE).await {
                    exchange.end().await;
                }
            });
        }
    });
    let mut whole = 0;
    for (n, client) in clients {
        match n % 4 {
            0 => client.abort(),
            1 => drop(client.await.unwrap()),
            2 => {
                let mut reply = client.await.unwrap();
                reply.part().await.unwrap();
            }
            _ => {
                assert_eq!(client.await.unwrap().text().await, event("a").repeat(5) + DONE);
                whole += 1;
            }
        }
    }
    assert_eq!(whole, CLIENTS / 4);
    until("every lease ended", || gate.in_flight() == 0).await;
    serving.abort();
}

#[tokio::test]
async fn a_whole_answer_counts_as_such_with_its_tokens() {
    let mut world = World::new().await;
    let gate = world.ready();
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
    for body in [usage, usage, ""] {
        let reply = world.spawn(world.post(CHAT, r#"{"model":"mistral"}"#));
        let exchange = world.engine.request().await;
        assert_eq!(exchange.connection, 1, "the connection is used again");
        exchange.answer_json(body).await;
        assert_eq!(reply.await.unwrap().text().await, body);
    }
    until("the leases ended", || gate.in_flight() == 0).await;
    let metrics = world.get("/metrics").await.text().await;
    let ok = "orchestrator_requests_total{model=\"mistral\",outcome=\"ok\"} 3";
    assert!(metrics.contains(ok) && !metrics.contains("outcome=\"client_gone\""), "{metrics}");
    let tokens = "orchestrator_tokens_total{kind=\"prompt\",model=\"mistral\"} 6";
    assert!(metrics.contains(tokens), "{metrics}");
}
