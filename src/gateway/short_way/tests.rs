//! Against a pipe: what is answered here, and what goes the long way.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::super::{Limits, content};
use super::*;
use crate::config::catalog::{Catalog, ModelSpec};
use crate::orchestrator::Handle;
use crate::orchestrator::handle::Message;
use crate::telemetry::metrics::Metrics;

/// Nothing takes this long; it only ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough to see that nothing happens.
const A_WHILE: Duration = Duration::from_millis(100);
const IDLE_MAX: Duration = Duration::from_secs(60);

/// A client's end of a connection; nobody serves the one model that there is.
struct World {
    client: DuplexStream,
    served: JoinHandle<Option<Prefixed<DuplexStream>>>,
    closing: CancellationToken,
    abort: CancellationToken,
    messages: UnboundedReceiver<Message>,
}

impl World {
    fn new() -> World {
        World::with(IDLE_MAX)
    }

    fn with(idle_max: Duration) -> World {
        let spec = Arc::new(ModelSpec::plain("ada"));
        let models = [(spec.name.clone(), spec)].into();
        let (handle, messages) =
            Handle::for_tests(Arc::new(Catalog { models, ..Catalog::default() }));
        let site = Site::from(content(handle, Arc::new(Metrics::new()), Limits::default()));
        let (client, stream) = duplex(1 << 20);
        let (closing, abort) = (CancellationToken::new(), CancellationToken::new());
        let ends = Ends::new(closing.child_token(), abort.clone(), idle_max);
        let served = tokio::spawn(async move {
            serve(stream, &site, "127.0.0.1:1".parse().unwrap(), ends).await
        });
        World { client, served, closing, abort, messages }
    }

    async fn send(&mut self, text: &str) {
        self.client.write_all(text.as_bytes()).await.unwrap();
    }

    /// One answer with a length.
    async fn answer(&mut self) -> (String, String) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(PATIENCE, self.client.read_u8()).await.unwrap().unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.unwrap().parse().unwrap()];
        timeout(PATIENCE, self.client.read_exact(&mut body)).await.unwrap().unwrap();
        (head, String::from_utf8(body).unwrap())
    }

    /// What goes the long way; `None`: the connection is over.
    async fn rest(self) -> Option<String> {
        let stream = timeout(PATIENCE, self.served).await.unwrap().unwrap();
        drop(self.client);
        let mut rest = String::new();
        stream?.read_to_string(&mut rest).await.unwrap();
        Some(rest)
    }
}

fn post(model: &str) -> String {
    let body = format!("{{\"model\":\"{model}\"}}");
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn requests_are_answered_one_after_the_other_however_they_come() {
    let mut world = World::new();
    world.send(&[post("eve"), post("bob")].concat()).await;
    for name in ["eve", "bob"] {
        let (head, body) = world.answer().await;
        assert!(head.starts_with("HTTP/1.1 404 Not Found\r\n"), "{head}");
        assert!(head.contains("\r\ndate: ") && head.contains("\r\nx-request-id: "), "{head}");
        assert!(body.contains(name), "{body}");
    }
    let request = post("dan");
    let (head, body) = request.split_at(request.find("\r\n\r\n").unwrap() + 4);
    for part in [head, &body[..3], &body[3..]] {
        world.send(part).await;
        // The server reads it before the next one comes.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
    assert!(world.answer().await.1.contains("dan"));
    drop(world.client);
    assert!(world.served.await.unwrap().is_none());
}

#[tokio::test]
async fn whatever_is_special_goes_the_long_way_with_all_that_was_read() {
    let large = post("eve").replace("content-length: ", "content-length: 9");
    for special in [
        "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n".to_owned(),
        "POST /v1/chat/completions HTTP/1.1\r\nhost: loc".to_owned(),
        post("eve").replace("/v1/chat/completions", "/models/load"),
        post("eve").replace("HTTP/1.1", "HTTP/1.0"),
        post("eve").replace("localhost", "evil.example"),
        post("eve").replace("host:", "connection: close\r\nhost:"),
        large.replace("content-length: 9", "content-length: 99999"),
        "no HTTP at all\r\n\r\n".to_owned(),
    ] {
        let mut world = World::new();
        world.send(&[&post("eve"), &*special].concat()).await;
        assert!(world.answer().await.0.starts_with("HTTP/1.1 404"), "{special}");
        assert_eq!(world.rest().await.as_deref(), Some(&*special));
    }
}

#[tokio::test]
async fn a_body_that_does_not_come_is_waited_for_elsewhere() {
    let half = &post("eve")[..post("eve").len() - 5];
    let mut world = World::new();
    world.send(half).await;
    let began = Instant::now();
    assert_eq!(world.rest().await.as_deref(), Some(half));
    assert!(began.elapsed() >= BODY_WITHIN);
}

#[tokio::test]
async fn who_leaves_while_waiting_is_waited_for_no_more() {
    let mut world = World::new();
    world.send(&post("ada")).await;
    let asked = timeout(PATIENCE, world.messages.recv()).await.unwrap();
    assert!(matches!(asked, Some(Message::Request { .. })));
    // It sends its next request already: that is no end.
    world.send(&post("eve")).await;
    assert!(timeout(A_WHILE, &mut world.served).await.is_err());
    drop(world.client);
    assert!(timeout(PATIENCE, world.served).await.unwrap().unwrap().is_none());
}

#[tokio::test]
async fn a_connection_ends_when_it_is_idle_or_told_to() {
    let mut world = World::with(A_WHILE);
    let began = Instant::now();
    world.send(&post("eve")).await;
    world.answer().await;
    assert!(world.rest().await.is_none());
    assert!(began.elapsed() >= A_WHILE);

    let world = World::new();
    tokio::task::yield_now().await;
    world.closing.cancel();
    assert!(world.rest().await.is_none());

    let mut world = World::new();
    world.send(&post("ada")).await;
    let Some(Message::Request { reply, .. }) = world.messages.recv().await else {
        panic!("no request")
    };
    world.closing.cancel();
    assert!(timeout(A_WHILE, &mut world.served).await.is_err());
    drop(reply);
    let (head, _) = world.answer().await;
    assert!(head.contains("\r\nconnection: close\r\n"), "{head}");
    assert!(world.rest().await.is_none());

    let mut world = World::new();
    world.send(&post("ada")).await;
    let _request = world.messages.recv().await;
    world.closing.cancel();
    world.abort.cancel();
    assert!(world.rest().await.is_none());
}

/// What a client gets that reads slowly.
async fn sent(parts: Vec<Result<Bytes, &'static str>>) -> (io::Result<bool>, String) {
    let (mut client, stream) = duplex(1000);
    let token = CancellationToken::new();
    let ends = Ends::new(token.clone(), token, IDLE_MAX);
    let (ahead, left) = (BytesMut::new(), Left::default());
    let mut connection = Connection { stream, ahead, left, ends };
    let body = Body::from_stream(futures_util::stream::iter(parts));
    let sending = tokio::spawn(async move {
        let sent = connection.send(Writer::new(Response::new(body).into())).await;
        drop(connection);
        sent
    });
    let mut text = String::new();
    timeout(PATIENCE, client.read_to_string(&mut text)).await.unwrap().unwrap();
    (sending.await.unwrap(), text)
}

#[tokio::test]
async fn parts_of_any_size_are_chunks_and_one_that_is_lost_ends_the_connection() {
    let sizes = [1, 0, 9, 15, 16, 17, 255, 256, 20_000, 3, 70_000, 16_384, 16_370, 1];
    let part = |size: usize| Ok(Bytes::from(vec![b'a' + (size % 26) as u8; size]));
    let parts: Vec<_> = sizes.into_iter().map(part).collect();
    let (sent, text) = sent(parts.clone()).await;
    assert!(sent.unwrap(), "it may be used again");
    let (head, mut rest) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("transfer-encoding: chunked") && !head.contains("content-length"));
    for part in parts.into_iter().flatten().filter(|part| !part.is_empty()) {
        let (size, behind) = rest.split_once("\r\n").unwrap();
        assert_eq!(usize::from_str_radix(size, 16).unwrap(), part.len());
        let (data, behind) = behind.split_at(part.len());
        assert_eq!(data.as_bytes(), part);
        rest = behind.strip_prefix("\r\n").unwrap();
    }
    assert_eq!(rest, "0\r\n\r\n");

    let (sent, text) = sent_with_loss().await;
    assert!(sent.is_err() && text.ends_with("\r\n5\r\nhello\r\n"), "{text}");
}

async fn sent_with_loss() -> (io::Result<bool>, String) {
    sent(vec![Ok(Bytes::from_static(b"hello")), Err("lost")]).await
}
