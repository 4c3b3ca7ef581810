//! The listener: accepts, bounds the number of connections, and ends them in an orderly way.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::response::IntoResponse;
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::reject::Reject;

/// Connections served at once, on each listener. Further ones get 503.
const CONNECTIONS_MAX: usize = 4096;
/// Connections that are being refused at once. Further ones are closed without a word.
const REFUSING_MAX: usize = 64;
const REFUSING_TIME: Duration = Duration::from_secs(5);
/// For the head of a request, and how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// After a failed accept (no file descriptors left, say).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
const ACCEPT_BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Serves until `shutdown`, then lets requests end for `grace`, then cuts what is left.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
    grace: Duration,
) {
    serve_until(listener, router, shutdown, grace, CancellationToken::new()).await;
}

/// As [`serve`]; `hurry` ends the grace.
pub async fn serve_until(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
    grace: Duration,
    hurry: CancellationToken,
) {
    let end = End { shutdown, grace, hurry };
    serve_at_most(CONNECTIONS_MAX, listener, router, end).await;
}

/// When serving ends, and how.
struct End {
    shutdown: CancellationToken,
    grace: Duration,
    hurry: CancellationToken,
}

async fn serve_at_most(
    connections_max: usize,
    listener: TcpListener,
    router: Router,
    End { shutdown, grace, hurry }: End,
) {
    let server = Server {
        graceful: GracefulShutdown::new(),
        abort: CancellationToken::new(),
        serving: Arc::new(Semaphore::new(connections_max)),
        refusing: Arc::new(Semaphore::new(REFUSING_MAX)),
        busy: busy_router(connections_max),
        router,
    };
    let mut backoff = ACCEPT_BACKOFF;
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                backoff = ACCEPT_BACKOFF;
                server.accepted(stream, peer);
            }
            // The client went away between its knock and our opening.
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!("cannot accept connections: {error}; trying again in {backoff:?}");
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = sleep(backoff) => backoff = (backoff * 2).min(ACCEPT_BACKOFF_MAX),
                }
            }
        }
    }
    drop(listener);
    let Server { graceful, abort, serving, .. } = server;
    let in_order = tokio::select! {
        in_order = timeout(grace, graceful.shutdown()) => in_order.is_ok(),
        () = hurry.cancelled() => false,
    };
    if !in_order {
        let left = connections_max - serving.available_permits();
        let why = if hurry.is_cancelled() { "yet" } else { "in time" };
        tracing::warn!("cutting {left} connections that did not end {why}");
        abort.cancel();
        let all = u32::try_from(connections_max).unwrap_or(u32::MAX);
        // They only have to be dropped; a second is plenty.
        let _ = timeout(Duration::from_secs(1), serving.acquire_many(all)).await;
    }
}

struct Server {
    graceful: GracefulShutdown,
    abort: CancellationToken,
    serving: Arc<Semaphore>,
    refusing: Arc<Semaphore>,
    router: Router,
    busy: Router,
}

impl Server {
    fn accepted(&self, stream: TcpStream, peer: SocketAddr) {
        // Tokens are small: each must leave at once.
        let _ = stream.set_nodelay(true);
        if let Ok(permit) = Arc::clone(&self.serving).try_acquire_owned() {
            let connection = self.connection(stream, peer, self.router.clone(), permit);
            tokio::spawn(connection);
        } else if let Ok(permit) = Arc::clone(&self.refusing).try_acquire_owned() {
            let connection = self.connection(stream, peer, self.busy.clone(), permit);
            tokio::spawn(timeout(REFUSING_TIME, connection));
        }
    }

    fn connection(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        router: Router,
        permit: OwnedSemaphorePermit,
    ) -> impl Future<Output = ()> + Send + 'static {
        let abort = self.abort.clone();
        let watcher = self.graceful.watcher();
        async move {
            let service = service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(ConnectInfo(peer));
                router.clone().oneshot(request.map(Body::new))
            });
            let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
            builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            let connection =
                builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
            tokio::select! {
                ended = watcher.watch(connection) => if let Err(error) = ended {
                    tracing::trace!(%peer, "connection ended: {error}");
                },
                () = abort.cancelled() => {}
            }
            drop(permit);
        }
    }
}

fn busy_router(connections_max: usize) -> Router {
    Router::new().fallback(move || async move {
        let message = format!("all {connections_max} connections are in use; send again later");
        let reject = Reject::new(StatusCode::SERVICE_UNAVAILABLE, "connections_full", message);
        ([(http::header::CONNECTION, "close")], reject).into_response()
    })
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const PATIENCE: Duration = Duration::from_secs(20);

    async fn ask(address: SocketAddr) -> (TcpStream, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let mut answer = vec![0; 4096];
        let read = timeout(PATIENCE, stream.read(&mut answer)).await.unwrap().unwrap();
        answer.truncate(read);
        (stream, String::from_utf8(answer).unwrap())
    }

    #[tokio::test]
    async fn one_connection_too_many_is_told_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(|| async { "hello" });
        let shutdown = CancellationToken::new();
        let (grace, hurry) = (Duration::from_secs(1), CancellationToken::new());
        let end = End { shutdown: shutdown.clone(), grace, hurry };
        let served = tokio::spawn(serve_at_most(1, listener, router, end));
        let (first, answer) = ask(address).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let (_, answer) = ask(address).await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains("retry-after") && answer.contains("connections_full"), "{answer}");
        drop(first);
        let again = async { while !ask(address).await.1.starts_with("HTTP/1.1 200") {} };
        timeout(PATIENCE, again).await.expect("the place is free again");
        shutdown.cancel();
        timeout(PATIENCE, served).await.unwrap().unwrap();
    }
}
