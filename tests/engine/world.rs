//! An engine made of a server in this process, a log and an end that the test decides.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{OriginalUri, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use tokio::sync::watch;
use tokio::time::Instant;
use wharf::runtime::{
    Endpoint, ExitReport, Identity, LogTail, Progress, ProgressNow, Running, RuntimeHandle,
};
use wharf::scheduler::event::Fault;
use wharf::units::{GpuId, InstanceId, ModelName};

use crate::ports::free_port;

/// Says loudly that a test could not run, also to the run that counts them.
pub fn skip(why: &str) {
    use std::io::Write;
    eprintln!("SKIPPED: {why}");
    if let Ok(path) = std::env::var("WHARF_SKIP_FILE") {
        let file = std::fs::File::options().create(true).append(true).open(path);
        writeln!(file.expect("the file"), "{why}").expect("written");
    }
}

/// No test takes nearly so long.
pub const LONG: Duration = Duration::from_secs(60);

type Reply = dyn Fn(&str, &str) -> (u16, String) + Send + Sync;

pub struct World {
    pub running: Running,
    pub exit: watch::Sender<Option<ExitReport>>,
    /// `METHOD /path?query body`, in order.
    pub asked: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone)]
struct Server {
    asked: Arc<Mutex<Vec<String>>>,
    reply: Arc<Reply>,
}

impl World {
    /// `reply`: (`METHOD /path?query`, body) → status and body.
    pub async fn serving(
        reply: impl Fn(&str, &str) -> (u16, String) + Send + Sync + 'static,
    ) -> World {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let server = Server { asked: Arc::clone(&asked), reply: Arc::new(reply) };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let router = Router::new().fallback(answer).with_state(server);
        tokio::spawn(async move { axum::serve(listener, router).await });
        World::at(port, asked)
    }

    /// Nothing listens.
    pub fn silent() -> World {
        World::at(free_port(), Arc::default())
    }

    pub fn at(port: u16, asked: Arc<Mutex<Vec<String>>>) -> World {
        let (exit, ended) = watch::channel(None);
        let running = Running {
            identity: Identity {
                installation: "test".to_owned(),
                instance: InstanceId(1),
                model: ModelName::new("coder"),
                spec_hash: String::new(),
                gpus: vec![GpuId(0)],
                port,
            },
            endpoint: Endpoint::new(format!("http://127.0.0.1:{port}"), None),
            handle: RuntimeHandle::External,
            log: LogTail::new(),
            exit: ended,
        };
        World { running, exit, asked }
    }

    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("the list").clone()
    }

    /// Waits for readiness, at most so long.
    pub async fn ready(
        &self,
        spec: &wharf::config::catalog::ModelSpec,
        limit: Duration,
    ) -> (Result<(), Fault>, ProgressNow) {
        let (progress, seen) = Progress::new();
        let deadline = Instant::now() + limit;
        let result = wharf::engine::wait_ready(spec, &self.running, &progress, deadline).await;
        let seen = seen.borrow().clone();
        (result, seen)
    }
}

async fn answer(
    State(server): State<Server>,
    method: http::Method,
    OriginalUri(uri): OriginalUri,
    body: Bytes,
) -> Response {
    let target = format!("{method} {uri}");
    let body = String::from_utf8_lossy(&body).into_owned();
    let line = format!("{target} {body}").trim_end().to_owned();
    server.asked.lock().expect("the list").push(line);
    let (status, text) = (server.reply)(&target, &body);
    (StatusCode::from_u16(status).expect("a status"), text).into_response()
}
