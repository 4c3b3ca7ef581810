//! The listener: accepts, bounds the number of connections, and ends them in an orderly way.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use futures_util::future::BoxFuture;
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::reject::Reject;
use super::site::Site;

/// Connections served at once, on each listener. Further ones get 503.
const CONNECTIONS_MAX: usize = 4096;
/// Connections that are being refused at once. Further ones are closed without a word.
const REFUSING_MAX: usize = 64;
const REFUSING_TIME: Duration = Duration::from_secs(5);
/// For the head of a request, and how long an idle connection is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// Of a request's head, and of what is held for a client that does not read.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// After a failed accept (no file descriptors left, say).
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
const ACCEPT_BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Serves until `shutdown`, then lets requests end for `grace`, then cuts what is left.
pub async fn serve(
    listener: TcpListener,
    site: impl Into<Site>,
    shutdown: CancellationToken,
    grace: Duration,
) {
    let grace = async move { sleep(grace).await };
    serve_until(listener, site.into(), shutdown, grace, CancellationToken::new()).await;
}

/// As [`serve`]; `grace` is first polled when it begins, and `hurry` ends it.
pub async fn serve_until(
    listener: TcpListener,
    site: Site,
    shutdown: CancellationToken,
    grace: impl Future<Output = ()> + Send + 'static,
    hurry: CancellationToken,
) {
    let end = End { shutdown, grace: Box::pin(grace), hurry };
    serve_within(Bounds::default(), listener, site, end).await;
}

/// When serving ends, and how.
struct End {
    shutdown: CancellationToken,
    grace: BoxFuture<'static, ()>,
    hurry: CancellationToken,
}

#[derive(Clone, Copy, Debug)]
struct Bounds {
    connections: usize,
    header_timeout: Duration,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds { connections: CONNECTIONS_MAX, header_timeout: HEADER_TIMEOUT }
    }
}

async fn serve_within(
    bounds: Bounds,
    listener: TcpListener,
    site: Site,
    End { shutdown, grace, hurry }: End,
) {
    let server = Server {
        closing: CancellationToken::new(),
        abort: CancellationToken::new(),
        serving: Arc::new(Semaphore::new(bounds.connections)),
        refusing: Arc::new(Semaphore::new(REFUSING_MAX)),
        busy: busy_router(bounds.connections).into(),
        header_timeout: bounds.header_timeout,
        site,
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
    let Server { closing, abort, serving, .. } = server;
    closing.cancel();
    let all = u32::try_from(bounds.connections).unwrap_or(u32::MAX);
    let in_order = tokio::select! {
        in_order = serving.acquire_many(all) => in_order.is_ok(),
        () = grace => false,
        () = hurry.cancelled() => false,
    };
    if !in_order {
        let left = bounds.connections - serving.available_permits();
        let why = if hurry.is_cancelled() { "yet" } else { "in time" };
        tracing::warn!("cutting {left} connections that did not end {why}");
        abort.cancel();
        // They only have to be dropped; a second is plenty.
        let _ = timeout(Duration::from_secs(1), serving.acquire_many(all)).await;
    }
}

struct Server {
    /// Idle connections end, the others after their answer.
    closing: CancellationToken,
    abort: CancellationToken,
    serving: Arc<Semaphore>,
    refusing: Arc<Semaphore>,
    site: Site,
    busy: Site,
    header_timeout: Duration,
}

impl Server {
    fn accepted(&self, stream: TcpStream, peer: SocketAddr) {
        // Tokens are small: each must leave at once.
        let _ = stream.set_nodelay(true);
        if let Ok(permit) = Arc::clone(&self.serving).try_acquire_owned() {
            self.spawn(stream, peer, permit);
        } else if let Ok(permit) = Arc::clone(&self.refusing).try_acquire_owned() {
            let connection = self.connection(peer, self.busy.clone(), permit);
            tokio::spawn(timeout(REFUSING_TIME, connection(stream)));
        }
    }

    fn spawn(&self, stream: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        let connection = self.connection(peer, self.site.clone(), permit);
        let Some(threads) = &self.site.threads else {
            tokio::spawn(connection(stream));
            return;
        };
        match stream.into_std() {
            Ok(stream) => threads.spawn(async move {
                match TcpStream::from_std(stream) {
                    Ok(stream) => connection(stream).await,
                    Err(error) => tracing::error!(%peer, "a connection is lost: {error}"),
                }
            }),
            Err(error) => tracing::error!(%peer, "a connection is lost: {error}"),
        }
    }

    fn connection(
        &self,
        peer: SocketAddr,
        site: Site,
        permit: OwnedSemaphorePermit,
    ) -> impl FnOnce(TcpStream) -> BoxFuture<'static, ()> + Send + 'static {
        let (closing, abort) = (self.closing.clone(), self.abort.clone());
        let header_timeout = self.header_timeout;
        move |stream| {
            Box::pin(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let site = site.clone();
                    async move { Ok::<_, Infallible>(site.answer(request, peer).await) }
                });
                // HTTP/1.1 only: one HTTP/2 connection could carry any number of requests past the
                // bound, and waiting for its preface has no deadline.
                let mut builder = http1::Builder::new();
                builder.timer(TokioTimer::new()).header_read_timeout(header_timeout);
                builder.max_buf_size(BUFFER_BYTES_MAX);
                let mut connection =
                    pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
                let ended = tokio::select! {
                    biased;
                    ended = connection.as_mut() => ended,
                    () = abort.cancelled() => Ok(()),
                    () = closing.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        tokio::select! {
                            ended = connection.as_mut() => ended,
                            () = abort.cancelled() => Ok(()),
                        }
                    }
                };
                if let Err(error) = ended {
                    tracing::trace!(%peer, "connection ended: {error}");
                }
                drop(permit);
            })
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

    /// Serves "hello" on a port of its own.
    async fn serving(
        bounds: Bounds,
    ) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(|| async { "hello" });
        let shutdown = CancellationToken::new();
        let hurry = CancellationToken::new();
        let grace = Box::pin(async { sleep(Duration::from_secs(1)).await });
        let end = End { shutdown: shutdown.clone(), grace, hurry };
        let server = serve_within(bounds, listener, router.into(), end);
        (address, shutdown, tokio::spawn(server))
    }

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
        let (address, shutdown, served) =
            serving(Bounds { connections: 1, ..Bounds::default() }).await;
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
    #[tokio::test]
    async fn http_2_is_not_spoken() {
        let (address, shutdown, served) = serving(Bounds::default()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        shutdown.cancel();
        timeout(PATIENCE, served).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_connection_without_a_whole_head_is_closed() {
        let bounds = Bounds { header_timeout: Duration::from_millis(100), ..Bounds::default() };
        let (address, _shutdown, _served) = serving(bounds).await;
        for word in [&b""[..], b"P", b"GET / HT"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(word).await.unwrap();
            let mut answer = Vec::new();
            let closed = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
            assert!(closed.is_ok(), "{word:?} is held for ever");
        }
    }
}
