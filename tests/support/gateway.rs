//! A gateway with a scripted engine behind it and a scripted owner beside it: the test plays both.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use wharf::config::catalog::*;
use wharf::gateway::{self, Limits};
use wharf::orchestrator::handle::Message;
use wharf::orchestrator::{Gate, Handle, Lease};
use wharf::runtime::Endpoint;
use wharf::scheduler::action::Refusal;
use wharf::scheduler::event;
use wharf::telemetry::metrics::Metrics;
use wharf::units::{self, InstanceId, ModelName};

/// Nothing in these tests takes this long; it only ends a test that hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn settings() -> Settings {
    let gpu = GpuSettings {
        provider: GpuProvider::None,
        reserve: units::Bytes::ZERO,
        ..Settings::default().gpu
    };
    Settings { gpu, ..Settings::default() }
}

pub fn model(name: &str, aliases: &[&str]) -> ModelSpec {
    ModelSpec {
        aliases: aliases.iter().map(|alias| (*alias).to_owned()).collect(),
        engine: EngineKind::Vllm,
        gpus: GpuRequest::None,
        ..ModelSpec::plain(name)
    }
}

pub fn catalog(models: Vec<ModelSpec>, settings: Settings) -> Catalog {
    let aliases = models
        .iter()
        .flat_map(|spec| spec.aliases.iter().map(|alias| (alias.clone(), spec.name.clone())))
        .collect();
    let models: BTreeMap<ModelName, Arc<ModelSpec>> =
        models.into_iter().map(|spec| (spec.name.clone(), Arc::new(spec))).collect();
    Catalog { models, aliases, settings, ..Catalog::default() }
}

/// One gateway under test.
pub struct World {
    pub address: SocketAddr,
    pub handle: Handle,
    /// What the owner would receive.
    pub messages: mpsc::UnboundedReceiver<Message>,
    pub engine: Engine,
    pub shutdown: CancellationToken,
    pub served: tokio::task::JoinHandle<()>,
    pub client: Client<HttpConnector, Full<Bytes>>,
}

impl World {
    /// Models `mistral` (alias `gpt-4o`) and `org/qwen:7b`; none is ready.
    pub async fn new() -> World {
        World::with(|_| {}, Limits::default()).await
    }

    pub async fn with(change: impl FnOnce(&mut Catalog), limits: Limits) -> World {
        let models = vec![model("mistral", &["gpt-4o"]), model("org/qwen:7b", &[])];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut catalog = catalog(models, settings());
        // `/health` knocks there: it must be this gateway, whatever else runs on the machine.
        catalog.settings.gateway = address;
        change(&mut catalog);
        let (handle, messages) = Handle::for_tests(Arc::new(catalog));
        let shutdown = CancellationToken::new();
        let content = gateway::content(handle.clone(), Arc::new(Metrics::new()), limits);
        let grace = Duration::from_secs(3);
        let served = tokio::spawn(gateway::serve(listener, content, shutdown.clone(), grace));
        let client = Client::builder(TokioExecutor::new()).build_http();
        let engine = Engine::start().await;
        World { address, handle, messages, engine, shutdown, served, client }
    }

    /// Makes the scripted engine the ready instance of `mistral`.
    pub fn ready(&self) -> Arc<Gate> {
        self.gate(1, self.engine.endpoint(), 8)
    }

    /// A closed gate: only the owner's own grants pass.
    pub fn closed(&self) -> Arc<Gate> {
        self.gate(1, self.engine.endpoint(), 0)
    }

    pub fn gate(&self, instance: u64, endpoint: Endpoint, permits: u32) -> Arc<Gate> {
        self.handle.gate_for_tests(InstanceId(instance), &"mistral".into(), endpoint, permits)
    }

    pub fn post(&self, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
        Request::post(format!("http://{}{path}", self.address))
            .header("content-type", "application/json")
            .body(Full::new(body.into()))
            .unwrap()
    }

    pub async fn send(&self, request: Request<Full<Bytes>>) -> Reply {
        Reply(timely(self.client.request(request)).await.unwrap())
    }

    pub async fn get(&self, path: &str) -> Reply {
        let request = Request::get(format!("http://{}{path}", self.address));
        self.send(request.body(Full::default()).unwrap()).await
    }

    /// Sends in the background, for requests that wait.
    pub fn spawn(&self, request: Request<Full<Bytes>>) -> tokio::task::JoinHandle<Reply> {
        let client = self.client.clone();
        tokio::spawn(async move { Reply(client.request(request).await.unwrap()) })
    }

    /// The next waiting request, as the owner sees it.
    pub async fn arrived(&mut self) -> Arrived {
        loop {
            match timely(self.messages.recv()).await.expect("the owner's inbox is open") {
                Message::Request { request, reply, .. } => return Arrived { request, reply },
                Message::GatePing(_) => {}
                other => panic!("expected a request, got {other:?}"),
            }
        }
    }
}

pub struct Arrived {
    pub request: event::Request,
    pub reply: oneshot::Sender<Result<Lease, Refusal>>,
}

impl Arrived {
    pub fn grant(self, gate: &Arc<Gate>) {
        self.reply.send(Ok(Handle::grant_for_tests(gate))).unwrap();
    }

    pub fn refuse(self, refusal: Refusal) {
        self.reply.send(Err(refusal)).unwrap();
    }
}

/// An answer of the gateway.
pub struct Reply(pub Response<Incoming>);

impl Reply {
    pub fn status(&self) -> StatusCode {
        self.0.status()
    }

    pub fn headers(&self) -> &HeaderMap {
        self.0.headers()
    }

    /// The next part, as soon as it is there; `None` at the end.
    pub async fn part(&mut self) -> Option<String> {
        match timely(self.0.body_mut().frame()).await {
            Some(frame) => {
                let data = frame.expect("the answer is whole").into_data().unwrap();
                Some(String::from_utf8(data.to_vec()).unwrap())
            }
            None => None,
        }
    }

    pub async fn text(self) -> String {
        let body = timely(self.0.into_body().collect()).await.expect("the answer is whole");
        String::from_utf8(body.to_bytes().to_vec()).unwrap()
    }

    pub async fn json(self) -> Value {
        serde_json::from_str(&self.text().await).unwrap()
    }

    /// Status, code and message of an error.
    pub async fn error(self) -> (u16, String, String) {
        let status = self.status().as_u16();
        let retry = self.headers().contains_key("retry-after");
        assert!(retry || !matches!(status, 429 | 503), "{status} without Retry-After");
        let body = self.json().await;
        let error = &body["error"];
        assert!(error["type"].is_string() && error.get("param").is_some(), "{body}");
        let text = |field: &str| error[field].as_str().unwrap().to_owned();
        (status, text("code"), text("message"))
    }
}

pub async fn timely<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.expect("within the test's patience")
}

/// Polls until something is so.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A server that does exactly what the test says, byte by byte.
pub struct Engine {
    pub address: SocketAddr,
    exchanges: mpsc::UnboundedReceiver<Exchange>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Engine {
    pub async fn start() -> Engine {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tx, exchanges) = mpsc::unbounded_channel();
        let accepting = tokio::spawn(async move {
            let mut connection = 0;
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                connection += 1;
                tokio::spawn(read_request(stream, connection, tx.clone()));
            }
        });
        Engine { address, exchanges, accepting }
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::new(format!("http://{}", self.address), None)
    }

    /// Stops listening: connects are refused from now on.
    pub async fn die(&mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
    }

    pub async fn request(&mut self) -> Exchange {
        timely(self.exchanges.recv()).await.expect("the engine is up")
    }

    pub fn has_none(&mut self) -> bool {
        self.exchanges.try_recv().is_err()
    }
}

/// A request at the engine, and the way to answer it.
pub struct Exchange {
    pub head: String,
    pub body: Vec<u8>,
    /// Counts connections from 1.
    pub connection: usize,
    stream: TcpStream,
    again: mpsc::UnboundedSender<Exchange>,
}

async fn read_request(
    mut stream: TcpStream,
    connection: usize,
    tx: mpsc::UnboundedSender<Exchange>,
) {
    let mut read = Vec::new();
    let head_end = loop {
        if let Some(at) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        match stream.read_buf(&mut read).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    };
    let mut body = read.split_off(head_end);
    let head = String::from_utf8(read).unwrap().to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().unwrap());
    while body.len() < length {
        if stream.read_buf(&mut body).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let again = tx.clone();
    let _ = tx.send(Exchange { head, body, connection, stream, again });
}

impl Exchange {
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        timely(self.stream.write_all(bytes.as_ref())).await.unwrap();
    }

    /// What the gateway sends next on this connection; empty: it said its last.
    pub async fn read(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; 64 << 10];
        let read = timely(self.stream.read(&mut buffer)).await.unwrap_or(0);
        buffer.truncate(read);
        buffer
    }

    /// Says its last and goes on hearing.
    pub async fn half_close(&mut self) {
        timely(self.stream.shutdown()).await.unwrap();
    }

    /// A whole answer; the connection stays open for the next request.
    pub async fn answer(mut self, status: &str, headers: &str, body: &str) {
        let length = body.len();
        self.write(format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{headers}\r\n{body}"))
            .await;
        tokio::spawn(read_request(self.stream, self.connection, self.again));
    }

    pub async fn answer_json(self, body: &str) {
        self.answer("200 OK", "content-type: application/json\r\n", body).await;
    }

    /// The head of an event stream.
    pub async fn stream(&mut self) {
        self.write(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .await;
    }

    pub async fn chunk(&mut self, data: &str) {
        self.write(format!("{:x}\r\n{data}\r\n", data.len())).await;
    }

    /// False if the gateway has closed the connection.
    pub async fn try_chunk(&mut self, data: &str) -> bool {
        let chunk = format!("{:x}\r\n{data}\r\n", data.len());
        timely(self.stream.write_all(chunk.as_bytes())).await.is_ok()
    }

    pub async fn end(mut self) {
        let _ = timely(self.stream.write_all(b"0\r\n\r\n")).await;
        tokio::spawn(read_request(self.stream, self.connection, self.again));
    }

    /// RST instead of FIN.
    pub fn reset(self) {
        self.stream.set_zero_linger().unwrap();
    }

    /// Returns when the gateway has closed the connection.
    pub async fn closed(mut self) {
        let mut byte = [0; 1];
        let read = timely(self.stream.read(&mut byte)).await;
        assert!(matches!(read, Ok(0) | Err(_)), "the gateway sent more");
    }
}
