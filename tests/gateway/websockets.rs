//! WebSockets through the pass-through: bytes both ways, and the end of either side.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wharf::gateway::Limits;
use wharf::units::InstanceId;

use crate::passing::comfyui;
use crate::support::{Exchange, World, settings, timely, until};

const ASK: &str = "connection: keep-alive, Upgrade\r\nupgrade: WebSocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const ACCEPT: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\
                      connection: Upgrade\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\
                      sec-websocket-protocol: chat\r\n\r\n";

async fn open(world: &World, path: &str, headers: &str) -> TcpStream {
    let mut client = TcpStream::connect(world.address).await.unwrap();
    let head = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
    client.write_all(head.as_bytes()).await.unwrap();
    client
}

async fn read(client: &mut TcpStream) -> Vec<u8> {
    let mut buffer = vec![0; 64 << 10];
    let read = timely(client.read(&mut buffer)).await.unwrap_or(0);
    buffer.truncate(read);
    buffer
}

/// The handshake through the gateway, both ends at hand.
async fn joined(world: &mut World, path: &str) -> (TcpStream, Exchange) {
    let mut client = open(world, path, ASK).await;
    let mut engine = world.engine.request().await;
    assert!(engine.head.contains("connection: upgrade\r\n"), "{}", engine.head);
    assert!(engine.head.contains("upgrade: websocket\r\n"), "{}", engine.head);
    assert!(engine.head.contains("sec-websocket-key: dghlihnhbxbszsbub25jzq==\r\n"));
    engine.write(ACCEPT).await;
    let head = String::from_utf8(read(&mut client).await).unwrap().to_lowercase();
    assert!(head.starts_with("http/1.1 101 "), "{head}");
    for part in [
        "upgrade: websocket\r\n",
        "connection: upgrade\r\n",
        "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n",
        "sec-websocket-protocol: chat\r\n",
        "x-wharf-model: ",
        "x-request-id: ",
    ] {
        assert!(head.contains(part), "{part}: {head}");
    }
    (client, engine)
}

// contract: any /upstream/{model}/{path…}
#[tokio::test]
async fn bytes_pass_both_ways_unframed_and_the_lease_lasts_as_long() {
    let mut world = World::new().await;
    let gate = world.ready();
    let (mut client, mut engine) = joined(&mut world, "/upstream/mistral/v1/realtime").await;
    assert_eq!(gate.in_flight(), 1);
    // A masked text frame, a ping, half a frame: whatever it is, it passes.
    for bytes in [&b"\x81\x82\x01\x02\x03\x04ih"[..], b"\x89\x00", b"\x82\x7e", b"\x00\x00\xff"] {
        client.write_all(bytes).await.unwrap();
        assert_eq!(engine.read().await, bytes);
        engine.write(bytes).await;
        assert_eq!(read(&mut client).await, bytes);
    }
    let large = vec![7_u8; 3 << 20];
    let sent = large.clone();
    let sending = tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
        client
    });
    let mut received = 0;
    while received < large.len() {
        received += engine.read().await.len();
    }
    let mut client = timely(sending).await.unwrap();
    // The close handshake, then the end of the connection by the engine.
    client.write_all(b"\x88\x02\x03\xe8").await.unwrap();
    assert_eq!(engine.read().await, b"\x88\x02\x03\xe8");
    engine.write(b"\x88\x02\x03\xe8").await;
    assert_eq!(read(&mut client).await, b"\x88\x02\x03\xe8");
    engine.half_close().await;
    assert!(read(&mut client).await.is_empty());
    client.write_all(b"last").await.unwrap();
    assert_eq!(engine.read().await, b"last", "the other half is still open");
    drop(client);
    assert!(engine.read().await.is_empty());
    until("the lease ends", || gate.in_flight() == 0).await;
    let rows = || world.handle.store().activity(0, 10);
    until("its row is there", || rows().len() == 1).await;
    assert_eq!((rows()[0].status, &*rows()[0].outcome), (101, "ok"));
}

#[tokio::test]
async fn a_client_that_leaves_frees_everything() {
    let mut world = World::new().await;
    let gate = world.ready();
    let (client, engine) = joined(&mut world, "/upstream/mistral/v1/realtime").await;
    drop(client);
    engine.closed().await;
    until("the lease ends", || gate.in_flight() == 0).await;
    let (client, engine) = joined(&mut world, "/upstream/mistral/v1/realtime").await;
    client.set_zero_linger().unwrap();
    drop(client);
    engine.closed().await;
    until("the lease ends after a reset", || gate.in_flight() == 0).await;
}

#[tokio::test]
async fn a_drain_past_its_deadline_closes_both_sides() {
    let mut world = World::new().await;
    let gate = world.ready();
    let (mut client, engine) = joined(&mut world, "/upstream/mistral/v1/realtime").await;
    wharf::orchestrator::Handle::close_for_tests(&gate);
    client.write_all(b"on").await.unwrap();
    gate.cancel_leases();
    assert!(read(&mut client).await.is_empty());
    until("the lease ends", || gate.in_flight() == 0).await;
    drop(engine);
}

#[tokio::test]
async fn a_silent_socket_is_closed() {
    let limits = Limits { socket_idle: Duration::from_millis(300), ..Limits::default() };
    let mut world = World::with(|_| {}, limits).await;
    let gate = world.ready();
    let (mut client, engine) = joined(&mut world, "/upstream/mistral/v1/realtime").await;
    assert!(read(&mut client).await.is_empty());
    engine.closed().await;
    until("the lease ends", || gate.in_flight() == 0).await;
}

#[tokio::test]
async fn a_socket_to_a_server_that_is_no_llms_is_no_work() {
    let change = |catalog: &mut wharf::config::catalog::Catalog| {
        *catalog = crate::support::catalog(vec![comfyui()], settings());
    };
    let mut world = World::with(change, Limits::default()).await;
    let mut client = open(&world, "/comfyui/ws?clientId=1", ASK).await;
    let answer = String::from_utf8(read(&mut client).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("model_not_loaded"), "{answer}");
    assert!(world.messages.try_recv().is_err(), "nobody was asked to start it");
    let endpoint = world.engine.endpoint();
    let gate = world.handle.gate_for_tests(InstanceId(1), &"painter".into(), endpoint, 8);
    let before = gate.last_used();
    let (mut client, mut engine) = joined(&mut world, "/comfyui/ws?clientId=1").await;
    assert!(engine.head.starts_with("get /ws?clientid=1 "), "{}", engine.head);
    engine.write("status").await;
    assert_eq!(read(&mut client).await, b"status");
    assert_eq!((gate.in_flight(), gate.granted(), gate.last_used()), (0, 0, before));
    // What the owner does before a stop.
    gate.cancel_leases();
    assert!(read(&mut client).await.is_empty());
    engine.closed().await;
}

#[tokio::test]
async fn an_engine_that_declines_answers_as_it_likes() {
    let mut world = World::new().await;
    let gate = world.ready();
    let mut client = open(&world, "/upstream/mistral/v1/realtime", ASK).await;
    let engine = world.engine.request().await;
    engine.answer("426 Upgrade Required", "x-why: no\r\n", "no").await;
    let answer = String::from_utf8(read(&mut client).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 426 ") && answer.contains("x-why: no"), "{answer}");
    until("the lease ends", || gate.in_flight() == 0).await;
    // And one that switches unasked is at fault.
    let mut client = open(&world, "/upstream/mistral/health", "").await;
    world.engine.request().await.write(ACCEPT).await;
    let answer = String::from_utf8(read(&mut client).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
}

/// As Java's HTTP client asks with every request.
#[tokio::test]
async fn an_upgrade_that_is_not_spoken_is_ignored() {
    let mut world = World::new().await;
    world.ready();
    let asked = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n";
    let mut client = open(&world, "/upstream/mistral/health", asked).await;
    let exchange = world.engine.request().await;
    assert!(
        !exchange.head.contains("h2c") && !exchange.head.contains("http2"),
        "{}",
        exchange.head
    );
    exchange.answer_json("{}").await;
    let answer = String::from_utf8(read(&mut client).await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn other_upgrades_and_foreign_pages_are_refused() {
    let mut world = World::new().await;
    world.ready();
    let path = "/upstream/mistral/v1/realtime";
    for (headers, status, code) in [
        ("connection: upgrade\r\nupgrade: tcp, websocket\r\n", 400, "upgrade_not_supported"),
        ("upgrade: websocket\r\nsec-websocket-key: x\r\n", 400, "upgrade_not_supported"),
        ("connection: upgrade\r\nupgrade: websocket\r\n", 400, "upgrade_not_supported"),
    ] {
        let mut client = open(&world, path, headers).await;
        let answer = String::from_utf8(read(&mut client).await).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{headers}: {answer}");
        assert!(answer.contains(code), "{answer}");
    }
    for foreign in ["origin: https://evil.example\r\n", "sec-fetch-site: cross-site\r\n"] {
        let mut client = open(&world, path, &format!("{ASK}{foreign}")).await;
        let answer = String::from_utf8(read(&mut client).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 "), "{foreign}: {answer}");
        assert!(answer.contains("origin_not_allowed"), "{answer}");
    }
    let mut client = open(&world, "/upstream/mistral/sleep", ASK).await;
    assert!(String::from_utf8(read(&mut client).await).unwrap().starts_with("HTTP/1.1 403 "));
    assert!(world.engine.has_none());
}
