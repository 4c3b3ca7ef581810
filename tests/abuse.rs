//! Clients and engines that mean no good: what a real `wharf serve` takes of memory then, and that
//! everyone else is served meanwhile.

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use support::{World, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// An engine that behaves as a word in the request's body says.
struct Engine {
    address: SocketAddr,
    /// Bytes of bodies that Wharf took.
    written: Arc<AtomicU64>,
}

impl Engine {
    async fn start() -> Engine {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let written = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&written);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(behave(stream, Arc::clone(&counter)));
            }
        });
        Engine { address, written }
    }

    /// Until nobody takes any more of it.
    async fn settled(&self) -> u64 {
        let mut before = self.written.load(Ordering::Relaxed);
        for _ in 0..120 {
            sleep(Duration::from_millis(500)).await;
            let now = self.written.load(Ordering::Relaxed);
            if now == before && now > 0 {
                return now;
            }
            before = now;
        }
        panic!("the engine still writes: {before} bytes so far");
    }
}

async fn behave(mut stream: TcpStream, written: Arc<AtomicU64>) {
    loop {
        let Some(request) = read_request(&mut stream).await else { return };
        let has = |word: &str| request.windows(word.len()).any(|part| part == word.as_bytes());
        if has("upgrade: websocket") {
            let head = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                        upgrade: websocket\r\n\r\n";
            let _ = stream.write_all(head.as_bytes()).await;
            // Says back what it hears.
            let (mut from, mut to) = stream.split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
            return;
        }
        let answer = if has("be-large") {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", 20 * MIB);
            write(&mut stream, head.as_bytes(), &[b'x'; 64 << 10], 20 * MIB, &written).await
        } else if has("be-endless-head") {
            let line = format!("x-more: {}\r\n", "y".repeat(1000));
            write(&mut stream, b"HTTP/1.1 200 OK\r\n", line.as_bytes(), 64 * MIB, &written).await
        } else if has("be-one-line") {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: ";
            let sent =
                write(&mut stream, head.as_bytes(), &[b'z'; 16 << 10], 3 * MIB / 2, &written);
            if sent.await.is_ok() {
                std::future::pending::<()>().await;
            }
            return;
        } else if has("be-silent") {
            std::future::pending::<()>().await;
            return;
        } else {
            let body = r#"{"choices":[{"message":{"role":"assistant","content":"hello"}}]}"#;
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await
        };
        if answer.is_err() {
            return;
        }
    }
}

async fn write(
    stream: &mut TcpStream,
    head: &[u8],
    part: &[u8],
    total: u64,
    written: &AtomicU64,
) -> std::io::Result<()> {
    stream.write_all(head).await?;
    let mut left = total;
    while left > 0 {
        let length = left.min(part.len() as u64);
        let now = stream.write(&part[..usize::try_from(length).expect("a part")]).await?;
        written.fetch_add(now as u64, Ordering::Relaxed);
        left -= now as u64;
    }
    Ok(())
}

/// Head and body; `None`: Wharf left, or only knocked.
async fn read_request(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut request = Vec::new();
    loop {
        if stream.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
        let Some(end) = request.windows(4).position(|part| part == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&request[..end]).to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |length| length.parse().expect("a length"));
        while request.len() < end + 4 + length {
            if stream.read_buf(&mut request).await.ok()? == 0 {
                return None;
            }
        }
        return Some(request);
    }
}

struct Abused {
    world: World,
    engine: Engine,
    /// Resident before anything was done to it, in bytes.
    before: u64,
}

async fn abused(settings: &str) -> Abused {
    let engine = Engine::start().await;
    // The alias makes Wharf rewrite bodies.
    let models = format!(
        "  ada:\n    engine: openai\n    aliases: [eda]\n    health: none\n    concurrency: 4096\n    \
         external: {{ url: \"http://{}\" }}\n",
        engine.address
    ) + &format!(
        "  pia:\n    engine: http\n    health: none\n    external: {{ url: \"http://{}\" }}\n",
        engine.address
    );
    let world = serve(settings, &models, &[]).await;
    let abused = Abused { world, engine, before: 0 };
    abused.serves_others().await;
    let before = abused.memory("VmRSS");
    Abused { before, ..abused }
}

impl Abused {
    fn gateway(&self) -> &str {
        self.world.server.talk.gateway.trim_start_matches("http://")
    }

    fn memory(&self, field: &str) -> u64 {
        let path = format!("/proc/{}/status", self.world.server.pid());
        let status = std::fs::read_to_string(path).expect("Wharf lives");
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib: Option<u64> =
            line.and_then(|line| line.trim_matches([':', ' ', '\t', 'k', 'B']).parse().ok());
        1024 * kib.unwrap_or_else(|| panic!("no {field} in\n{status}"))
    }

    /// What it took at its worst beside what it takes anyhow.
    fn took_at_most(&self, bytes: u64) {
        let took = self.memory("VmHWM") - self.before;
        println!("took {} KiB of {} KiB", took / 1024, bytes / 1024);
        assert!(took <= bytes, "took {} KiB, more than {} KiB", took / 1024, bytes / 1024);
    }

    async fn serves_others(&self) {
        let answer = ask(self.connect().await, &body("eda", "hello")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}\n{}", self.world.log());
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.gateway()).await.expect("a connection")
    }

    /// Sends a request whose answer nobody reads yet.
    async fn sent(&self, body: &str) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(post(body).as_bytes()).await.expect("sent");
        stream
    }
}

fn body(model: &str, word: &str) -> String {
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"be-{word}"}}]}}"#)
}

fn post(body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

/// The beginning of the answer.
async fn ask(mut stream: TcpStream, body: &str) -> String {
    // Whoever is refused early may find the connection closed.
    let _ = stream.write_all(post(body).as_bytes()).await;
    read_some(&mut stream).await
}

async fn read_some(stream: &mut TcpStream) -> String {
    let mut answer = vec![0; 4096];
    let read = timeout(PATIENCE, stream.read(&mut answer)).await.expect("an answer in time");
    answer.truncate(read.unwrap_or(0));
    String::from_utf8_lossy(&answer).into_owned()
}

// contract: RULE memory is bounded whatever clients and engines send
#[tokio::test(flavor = "multi_thread")]
async fn large_answers_to_clients_that_do_not_read_stay_at_the_engine() {
    const CLIENTS: u64 = 64;
    let abused = abused("").await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a small buffer");
        let mut stream =
            socket.connect(abused.gateway().parse().expect("an address")).await.expect("connected");
        stream.write_all(post(&body("ada", "large")).as_bytes()).await.expect("sent");
        clients.push(stream);
    }
    let written = abused.engine.settled().await;
    assert!(written < CLIENTS * 20 * MIB, "nothing was held back");
    abused.serves_others().await;
    abused.took_at_most(CLIENTS * MIB / 2);
    // Whoever reads after all gets all of it.
    let mut last = clients.pop().expect("a client");
    let mut left = 20 * MIB;
    while left > 0 {
        let read = timeout(PATIENCE, last.read(&mut [0; 64 << 10])).await.expect("in time");
        left = left.saturating_sub(read.expect("the rest") as u64);
    }
    drop(clients);
    abused.world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_wait_take_no_more_than_they_may() {
    const CLIENTS: usize = 200;
    let abused = abused("queue: { body_limit: 1MiB, total_bodies: 16MiB }").await;
    let large = body("eda", &format!("silent {}", "x".repeat(900 << 10)));
    let mut asking = JoinSet::new();
    for _ in 0..CLIENTS {
        let (stream, large) = (abused.connect().await, large.clone());
        asking.spawn(async move { ask(stream, &large).await });
    }
    let mut refused = 0;
    // At most 18 have room.
    while refused < CLIENTS - 18 {
        let answer = timeout(PATIENCE, asking.join_next()).await.expect("answers in time");
        let answer = answer.expect("more clients").expect("no panic");
        assert!(answer.is_empty() || answer.contains("bodies_full"), "{answer}");
        refused += 1;
    }
    assert!(!asking.is_empty(), "nobody had room");
    abused.serves_others().await;
    abused.took_at_most(64 * MIB);
    asking.abort_all();
    abused.world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_have_a_bound_in_number_and_size_and_nobody_waits_for_their_end() {
    let abused = abused("").await;
    let begin = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n";
    for head in [
        (0..2000).map(|n| format!("x-{n}: y\r\n")).collect::<String>(),
        format!("x-long: {}", "y".repeat(200 << 10)),
    ] {
        let mut stream = abused.connect().await;
        let _ = stream.write_all(format!("{begin}{head}\r\n\r\n").as_bytes()).await;
        let answer = read_some(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 431") || answer.is_empty(), "{answer}");
    }
    // The kernel takes up to 6 MiB of each for a server that is slow to read, and little here.
    const ENDLESS: u64 = 10 * MIB;
    let mut endless = JoinSet::new();
    for _ in 0..64 {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_send_buffer_size(64 << 10).expect("a small buffer");
        let gateway = abused.gateway().parse().expect("an address");
        let mut stream = socket.connect(gateway).await.expect("connected");
        endless.spawn(async move {
            let line = format!("x-more: {}\r\n", "y".repeat(1000));
            let _ = stream.write_all(begin.as_bytes()).await;
            let mut sent = 0;
            while sent < ENDLESS && stream.write_all(line.as_bytes()).await.is_ok() {
                sent += line.len() as u64;
            }
            sent
        });
    }
    // Half heads, half bodies: they cost a connection, and nobody else waits.
    let mut slow = Vec::new();
    for _ in 0..300 {
        let mut stream = abused.connect().await;
        stream.write_all(begin.as_bytes()).await.expect("sent");
        slow.push(stream);
        let mut stream = abused.connect().await;
        let head = post("").replace("content-length: 0", "content-length: 1000000");
        stream.write_all(format!("{head}{{").as_bytes()).await.expect("sent");
        slow.push(stream);
    }
    while let Some(sent) = timeout(PATIENCE, endless.join_next()).await.expect("an end") {
        assert!(sent.expect("no panic") < ENDLESS, "an endless head was read");
    }
    abused.serves_others().await;
    abused.took_at_most(64 * MIB);
    drop(slow);
    abused.world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_sent_ahead_wait_in_the_clients_connection() {
    // Who has sent that much is not seen to leave.
    let abused = abused("swap: { shutdown_timeout: 1s }").await;
    let mut flooding = JoinSet::new();
    for n in 0..64 {
        let mut stream = abused.connect().await;
        flooding.spawn(async move {
            if n % 2 == 0 {
                // Its answer never comes.
                stream.write_all(post(&body("eda", "silent")).as_bytes()).await.expect("sent");
            }
            let requests = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(100);
            let mut sent = 0;
            // Until nobody takes any more.
            while let Ok(Ok(())) =
                timeout(Duration::from_secs(3), stream.write_all(requests.as_bytes())).await
            {
                sent += requests.len() as u64;
                assert!(sent < 256 * MIB, "it takes for ever");
            }
            stream
        });
    }
    let mut held = Vec::new();
    while let Some(stream) = timeout(PATIENCE, flooding.join_next()).await.expect("an end") {
        held.push(stream.expect("no panic"));
    }
    abused.serves_others().await;
    abused.took_at_most(48 * MIB);
    drop(held);
    abused.world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_that_never_come_to_an_end_take_no_memory_either() {
    let abused = abused("").await;
    for _ in 0..8 {
        let answer = ask(abused.connect().await, &body("ada", "endless-head")).await;
        assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
    }
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(abused.sent(&body("ada", "silent")).await);
    }
    abused.serves_others().await;
    // 256 events that do not end, of 1.5 MiB each, for clients that do read.
    let mut reading = JoinSet::new();
    for _ in 0..256 {
        let stream_body = body("ada", "one-line").replacen('{', r#"{"stream":true,"#, 1);
        let mut stream = abused.sent(&stream_body).await;
        reading.spawn(async move {
            let (mut buffer, mut read) = (vec![0; 64 << 10], 0);
            // Chunked or not: most of it must come through, without an end of the event.
            while read < MIB + MIB / 4 {
                let now = timeout(PATIENCE, stream.read(&mut buffer)).await.expect("in time");
                let now = now.expect("more");
                assert!(now > 0, "cut after {read} bytes");
                read += now as u64;
            }
            stream
        });
    }
    let mut open = Vec::new();
    while let Some(stream) = reading.join_next().await {
        open.push(stream.expect("no panic"));
    }
    abused.serves_others().await;
    abused.took_at_most(112 * MIB);
    drop((open, silent));
    abused.world.stop().await;
}

impl Abused {
    async fn socket(&self) -> TcpStream {
        let mut stream = self.connect().await;
        let ask = "GET /upstream/pia/ws HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\n\
                   upgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(ask.as_bytes()).await.expect("sent");
        let answer = read_some(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
        stream
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_that_say_nothing_take_little_and_those_that_do_not_listen_have_a_bound() {
    const SOCKETS: u64 = 400;
    let abused = abused("").await;
    let (load, nothing) = ("/models/pia/load", serde_json::json!({}));
    let loaded = abused.world.server.talk.call(http::Method::POST, load, nothing).await;
    assert_eq!(loaded.expect("an answer").0, 200);
    // The first is paid for by nobody: what it makes stays.
    let mut sockets = vec![abused.socket().await];
    let before = abused.memory("VmRSS");
    while sockets.len() < SOCKETS as usize {
        sockets.push(abused.socket().await);
    }
    for socket in &mut sockets {
        socket.write_all(b"hello").await.expect("sent");
        assert_eq!(read_some(socket).await, "hello");
    }
    let each = (abused.memory("VmRSS") - before) / SOCKETS;
    println!("an idle socket takes {} bytes", each);
    assert!(each <= 16 << 10, "an idle socket takes {each} bytes");

    // What comes back is read by nobody: the engine stops listening, and Wharf with it.
    let mut flooding = JoinSet::new();
    for mut socket in sockets.drain(..32) {
        flooding.spawn(async move {
            let mut sent = 0;
            let part = [b'x'; 64 << 10];
            while let Ok(Ok(())) = timeout(Duration::from_secs(2), socket.write_all(&part)).await {
                sent += part.len() as u64;
                assert!(sent < 256 * MIB, "it takes for ever");
            }
            socket
        });
    }
    let mut full = Vec::new();
    while let Some(socket) = timeout(PATIENCE, flooding.join_next()).await.expect("an end") {
        full.push(socket.expect("no panic"));
    }
    abused.serves_others().await;
    abused.took_at_most(48 * MIB);
    drop((full, sockets));

    let (mut from, mut to) = abused.socket().await.into_split();
    let began = std::time::Instant::now();
    let sending = tokio::spawn(async move {
        for _ in 0..1024 {
            to.write_all(&[b'x'; 64 << 10]).await.expect("sent");
        }
        to
    });
    let (mut buffer, mut left) = (vec![0; 256 << 10], 64 * MIB);
    while left > 0 {
        left -=
            timeout(PATIENCE, from.read(&mut buffer)).await.expect("in time").expect("all") as u64;
    }
    println!("64 MiB there and back: {:?}", began.elapsed());
    drop(sending.await.expect("sent"));
    abused.world.stop().await;
}
