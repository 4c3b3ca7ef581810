//! Against a server that says exactly what it is told to, byte by byte.

use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::*;
use crate::http1::Headers as _;

const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    listener: TcpListener,
    client: UpstreamClient,
}

impl Server {
    async fn new() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}/base", listener.local_addr().unwrap());
        Server { client: UpstreamClient::to(&Endpoint::new(base, None)), listener }
    }

    async fn accept(&self) -> TcpStream {
        let stream = timeout(PATIENCE, self.listener.accept()).await.unwrap().unwrap().0;
        stream.set_nodelay(true).unwrap();
        stream
    }

    async fn call(&self, method: &Method, body: &[u8]) -> Result<Answer, CallError> {
        self.call_within(PATIENCE, method, body).await
    }

    async fn call_within(
        &self,
        limit: Duration,
        method: &Method,
        body: &[u8],
    ) -> Result<Answer, CallError> {
        let (headers, body) = (Lines::default(), Bytes::copy_from_slice(body));
        let call = Call {
            method,
            path_and_query: "/x?y=1",
            headers: &headers,
            more: &Lines::default(),
            body: &body,
        };
        self.client.request(call, Instant::now() + limit).await
    }
}

/// The head of a request, to its empty line.
async fn heard(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap());
    }
    String::from_utf8(text).unwrap()
}

async fn body(answer: Answer) -> Result<Bytes, io::Error> {
    Ok(timeout(PATIENCE, answer.body.collect()).await.unwrap()?.to_bytes())
}

/// What comes when `said` is sent in two parts and the connection stays open (or not).
async fn told(said: &[u8], cut: usize, close: bool) -> (Result<(u16, Bytes), String>, bool) {
    let server = Server::new().await;
    let talk = async {
        let mut stream = server.accept().await;
        heard(&mut stream).await;
        stream.write_all(&said[..cut]).await.unwrap();
        // Two reads at the other end, mostly; one is as good.
        tokio::task::yield_now().await;
        stream.write_all(&said[cut..]).await.unwrap();
        if close { None } else { Some(stream) }
    };
    let ask = async {
        let response = server.call(&Method::GET, b"").await.map_err(|error| error.to_string())?;
        let status = response.status.as_u16();
        Ok((status, body(response).await.map_err(|error| error.to_string())?))
    };
    let (answer, kept) = tokio::join!(ask, talk);
    let reused = server.client.pool.count() == 1;
    drop(kept);
    (answer, reused)
}

#[tokio::test]
async fn an_answer_is_whole_wherever_the_network_cuts_it() {
    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
        4;name=\"v\"\r\nwiki\r\n5\r\npedia\r\nA\r\n 012345678\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\n";
    for (said, status, expected, close, reused) in [
        (&b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"[..], 200, &b"hello"[..], false, true),
        (CHUNKED, 200, b"wikipedia 012345678", false, true),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 X\r\ncontent-length: 1\r\n\r\na", 201, b"a", false, true),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", false, true),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nab", 200, b"ab", false, false),
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", 200, b"to the end", true, false),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nabMORE", 200, b"ab", false, false),
        // Both: the chunks count, and nobody trusts that connection again.
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", 200, b"a", false, false),
        (b"HTTP/1.1 200 OK\ncontent-length: 1\n\nz", 200, b"z", false, true),
    ] {
        for cut in 0..=said.len() {
            let shown = format!("{:?} cut at {cut}", String::from_utf8_lossy(said));
            let (answer, was_reused) = told(said, cut, close).await;
            assert_eq!(answer, Ok((status, Bytes::from_static(expected))), "{shown}");
            assert_eq!(was_reused, reused, "{shown}");
        }
    }
}

#[tokio::test]
async fn what_is_no_answer_is_an_error() {
    let many = "a: b\r\n".repeat(200);
    let long = "x".repeat(70 << 10);
    for (said, expected) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel".to_owned(), "closed before the end"),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel".to_owned(),
            "closed before the end",
        ),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n".to_owned(), "malformed"),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc\r\n".to_owned(),
            "malformed",
        ),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n".to_owned(),
            "malformed",
        ),
        (format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;{long}\r\n"), "more than"),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!".to_owned(),
            "two lengths",
        ),
        ("HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n".to_owned(), "no number"),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(), "does not speak HTTP"),
        ("HTTP/1.1 200 OK\r\ncontent".to_owned(), "closed before the answer"),
        (String::new(), "closed before the answer"),
        (format!("HTTP/1.1 200 OK\r\n{many}\r\n"), "more than 128 headers"),
        (format!("HTTP/1.1 200 OK\r\na: {long}"), "more than 65536 bytes"),
        ("HTTP/1.1 103 E\r\n\r\n".repeat(20), "interim"),
    ] {
        let (answer, reused) = told(said.as_bytes(), said.len() / 2, true).await;
        let why = answer.expect_err(&said);
        assert!(why.contains(expected), "{why}\n{said:.200}");
        assert!(!reused, "{said:.200}");
    }
}

#[tokio::test]
async fn a_request_says_what_it_must_and_nothing_that_it_must_not() {
    let server = Server::new().await;
    for (method, sent, expected) in [
        (Method::GET, &b""[..], "GET /base/x?y=1 HTTP/1.1\r\nhost: HOST\r\n\r\n"),
        (Method::POST, b"", "POST /base/x?y=1 HTTP/1.1\r\nhost: HOST\r\ncontent-length: 0\r\n\r\n"),
        (
            Method::POST,
            b"abc",
            "POST /base/x?y=1 HTTP/1.1\r\nhost: HOST\r\ncontent-length: 3\r\n\r\n",
        ),
    ] {
        let listen = async {
            let mut stream = server.accept().await;
            let head = heard(&mut stream).await;
            let mut body = vec![0; sent.len()];
            stream.read_exact(&mut body).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await.unwrap();
            (head, body)
        };
        let (answer, (head, body)) = tokio::join!(server.call(&method, sent), listen);
        let host = server.listener.local_addr().unwrap().to_string();
        assert_eq!((head, body), (expected.replace("HOST", &host), sent.to_vec()));
        assert_eq!(answer.unwrap().status, 200);
    }
    let (headers, body) = (Lines::default(), Bytes::new());
    for path in ["/a b", "/a\r\nhost: x", "a", ""] {
        let call = Call {
            method: &Method::GET,
            path_and_query: path,
            headers: &headers,
            more: &Lines::default(),
            body: &body,
        };
        let refused = server.client.request(call, Instant::now() + PATIENCE).await.unwrap_err();
        assert!(matches!(refused, CallError::Invalid(_)), "{path:?}: {refused}");
    }
}

#[tokio::test]
async fn an_idle_connection_that_the_engine_closed_is_not_used() {
    let server = Server::new().await;
    for _ in 0..3 {
        let serve = async {
            let mut stream = server.accept().await;
            heard(&mut stream).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        };
        let (answer, ()) = tokio::join!(server.call(&Method::GET, b""), serve);
        assert_eq!(answer.unwrap().status, 200);
        // The reactor has to hear of the end first.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_connection_opened_ahead_is_the_next_ones_and_idle_ones_close_when_told() {
    let server = Server::new().await;
    server.client.open_ahead().await.unwrap();
    let mut stream = server.accept().await;
    let serve = async {
        heard(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    };
    let (answer, ()) = tokio::join!(server.call(&Method::GET, b""), serve);
    drop(answer.unwrap());
    server.client.close_idle();
    assert_eq!(
        timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap_err().kind(),
        io::ErrorKind::UnexpectedEof
    );
}

#[tokio::test]
async fn silence_ends_after_its_own_time_on_new_connections_and_on_used_ones() {
    let short = Duration::from_millis(60);
    let server = Server::new().await;
    let talk = async {
        let mut stream = server.accept().await;
        heard(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        stream
    };
    let ask = async {
        drop(server.call(&Method::GET, b"").await.unwrap());
        let began = Instant::now();
        for _ in ["a used one", "a new one"] {
            let refused = server.call_within(short, &Method::GET, b"").await.unwrap_err();
            assert!(matches!(refused, CallError::Silent), "{refused}");
        }
        began.elapsed()
    };
    let (took, _stream) = tokio::join!(timeout(PATIENCE, ask), talk);
    assert!(took.expect("an end") >= 2 * short);
}

#[tokio::test]
async fn an_alarm_goes_off_when_it_is_too_late_for_this_time() {
    let mut alarm = connection::Alarm::default();
    let soon = || Instant::now() + Duration::from_millis(30);
    // It is new, it went off for the time before, or it is set for later.
    for before in [None, None, Some(Instant::now() + PATIENCE)] {
        if let Some(before) = before {
            let early = std::future::poll_fn(|cx| Poll::Ready(alarm.is_late(cx, before))).await;
            assert!(!early);
        }
        let until = soon();
        let late = |cx: &mut Context<'_>| match alarm.is_late(cx, until) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        };
        timeout(PATIENCE, std::future::poll_fn(late)).await.expect("an end");
        assert!(Instant::now() >= until);
    }
}

#[tokio::test]
async fn a_body_dropped_early_closes_its_connection() {
    let server = Server::new().await;
    let serve = async {
        let mut stream = server.accept().await;
        heard(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc").await.unwrap();
        stream
    };
    let (answer, mut stream) = tokio::join!(server.call(&Method::GET, b""), serve);
    drop(answer.unwrap());
    let ended = timeout(PATIENCE, stream.read_u8()).await.unwrap();
    assert!(ended.is_err(), "the engine hears of it");
}

#[tokio::test]
async fn an_early_answer_to_a_large_request_is_heard() {
    let server = Server::new().await;
    let serve = async {
        let mut stream = server.accept().await;
        heard(&mut stream).await;
        stream.write_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno").await.unwrap();
        stream
    };
    let large = vec![b'x'; 32 << 20];
    let (answer, stream) = tokio::join!(server.call(&Method::POST, &large), serve);
    let answer = answer.unwrap();
    assert_eq!(answer.status, 413);
    assert_eq!(body(answer).await.unwrap(), "no");
    drop(stream);
    let serve = async { heard(&mut server.accept().await).await };
    let (lost, _) = tokio::join!(server.call(&Method::GET, b""), serve);
    assert!(matches!(lost, Err(CallError::Closed | CallError::Broken(_))), "on a new connection");
}

#[tokio::test]
async fn a_server_that_answers_while_it_reads_gets_the_whole_request() {
    const LENGTH: usize = 32 << 20;
    let server = Server::new().await;
    let serve = async {
        let mut stream = server.accept().await;
        heard(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nwe").await.unwrap();
        let mut left = LENGTH;
        let mut part = vec![0; 1 << 20];
        while left > 0 {
            let read = timeout(PATIENCE, stream.read(&mut part)).await.unwrap().unwrap();
            assert!(read > 0, "{left} bytes are missing");
            left -= read;
        }
        stream.write_all(b"ll").await.unwrap();
    };
    let large = vec![b'x'; LENGTH];
    let ask = async { body(server.call(&Method::POST, &large).await.unwrap()).await };
    let ((), answer) = tokio::join!(serve, ask);
    assert_eq!(answer.unwrap(), "well");
    assert_eq!(server.client.pool.count(), 1, "everything was sent and read");
}

#[tokio::test]
async fn after_a_switch_the_connection_is_handed_over_with_its_first_bytes() {
    let server = Server::new().await;
    let serve = async {
        let mut stream = server.accept().await;
        heard(&mut stream).await;
        stream.write_all(b"HTTP/1.1 101 S\r\nupgrade: websocket\r\n\r\nfirst").await.unwrap();
        stream.read_u8().await.unwrap()
    };
    let ask = async {
        let answer = server.call(&Method::GET, b"").await.unwrap();
        assert_eq!(answer.headers.first("upgrade"), Some(&b"websocket"[..]));
        let mut upgraded = answer.body.into_upgraded().unwrap();
        upgraded.write_all(b"x").await.unwrap();
        let mut first = vec![0; 5];
        upgraded.read_exact(&mut first).await.unwrap();
        Bytes::from(first)
    };
    assert_eq!(tokio::join!(serve, ask), (b'x', Bytes::from_static(b"first")));
}
