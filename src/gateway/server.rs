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
use http::{HeaderMap, Request, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::places::{self, Places};
use super::reject::Reject;
use super::short_way::{self, Ends};
use super::site::Site;
use super::tls::{self, Opened, Tls};

/// Connections that are being refused at once. Further ones are closed without a word.
const REFUSING_MAX: usize = 64;
const REFUSING_TIME: Duration = Duration::from_secs(5);
/// Of one connection: the head of a request (431 beyond), and what is written and not sent yet, so
/// that a client that does not read takes no more.
const BUFFER_MAX: usize = 64 << 10;
/// For the head of a request; an idle connection is kept so long, on the short way up to twice.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
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
    let bounds = Bounds::new(Places::new(places::usual()), Tls::default());
    serve_until(bounds, listener, site.into(), shutdown, grace, CancellationToken::new()).await;
}

/// As [`serve`]; `grace` is first polled when it begins, and `hurry` ends it.
pub async fn serve_until(
    bounds: Bounds,
    listener: TcpListener,
    site: Site,
    shutdown: CancellationToken,
    grace: impl Future<Output = ()> + Send + 'static,
    hurry: CancellationToken,
) {
    let end = End { shutdown, grace: Box::pin(grace), hurry };
    serve_within(bounds, listener, site, end).await;
}

/// When serving ends, and how.
struct End {
    shutdown: CancellationToken,
    grace: BoxFuture<'static, ()>,
    hurry: CancellationToken,
}

#[derive(Clone, Debug)]
pub struct Bounds {
    /// Connections served at once. Further ones get 503.
    places: Places,
    tls: Tls,
    header_timeout: Duration,
}

impl Bounds {
    pub fn new(places: Places, tls: Tls) -> Bounds {
        Bounds { places, tls, header_timeout: HEADER_TIMEOUT }
    }
}

async fn serve_within(
    bounds: Bounds,
    listener: TcpListener,
    site: Site,
    End { shutdown, grace, hurry }: End,
) {
    let server = Server {
        terms: Terms {
            closing: CancellationToken::new(),
            abort: CancellationToken::new(),
            header_timeout: bounds.header_timeout,
        },
        serving: TaskTracker::new(),
        refusing: Arc::new(Semaphore::new(REFUSING_MAX)),
        busy: busy_router(bounds.places.clone()).into(),
        places: bounds.places,
        tls: bounds.tls,
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
    let Server { terms: Terms { closing, abort, .. }, serving, .. } = server;
    closing.cancel();
    serving.close();
    let in_order = tokio::select! {
        () = serving.wait() => true,
        () = grace => false,
        () = hurry.cancelled() => false,
    };
    if !in_order {
        let left = serving.len();
        let why = if hurry.is_cancelled() { "yet" } else { "in time" };
        tracing::warn!("cutting {left} connections that did not end {why}");
        abort.cancel();
        // They only have to be dropped; a second is plenty.
        let _ = timeout(Duration::from_secs(1), serving.wait()).await;
    }
}

struct Server {
    terms: Terms,
    serving: TaskTracker,
    places: Places,
    tls: Tls,
    refusing: Arc<Semaphore>,
    site: Site,
    busy: Site,
}

impl Server {
    fn accepted(&self, stream: TcpStream, peer: SocketAddr) {
        // Tokens are small: each must leave at once.
        let _ = stream.set_nodelay(true);
        let (terms, tls) = (self.terms.clone(), self.tls.config());
        if let Some(place) = self.places.take() {
            let site = self.site.clone();
            self.spawn(stream, move |stream| terms.open(stream, tls, peer, site, place));
        } else if let Ok(permit) = Arc::clone(&self.refusing).try_acquire_owned() {
            let busy = terms.open(stream, tls, peer, self.busy.clone(), permit);
            tokio::spawn(timeout(REFUSING_TIME, busy));
        }
    }

    /// On a thread of the site's, if it has any.
    fn spawn<F>(&self, stream: TcpStream, serve: impl FnOnce(TcpStream) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(threads) = &self.site.threads else {
            self.serving.spawn(serve(stream));
            return;
        };
        let lost = |error| tracing::error!("a connection is lost: {error}");
        match stream.into_std() {
            Ok(stream) => threads.spawn(self.serving.track_future(async move {
                match TcpStream::from_std(stream) {
                    Ok(stream) => serve(stream).await,
                    Err(error) => lost(error),
                }
            })),
            Err(error) => lost(error),
        }
    }
}

/// What every connection of a listener obeys.
#[derive(Clone)]
struct Terms {
    /// Idle connections end, the others after their answer.
    closing: CancellationToken,
    abort: CancellationToken,
    header_timeout: Duration,
}

impl Terms {
    /// Boxed: what a connection keeps for good is to be no larger than it must.
    async fn open(
        self,
        stream: TcpStream,
        tls: Option<Arc<rustls::ServerConfig>>,
        peer: SocketAddr,
        site: Site,
        place: impl Send + 'static,
    ) {
        match tls {
            None => Box::pin(self.serve(stream, peer, site, place)).await,
            Some(tls) => Box::pin(self.secure(stream, tls, peer, site, place)).await,
        }
    }

    /// Serves what is inside of TLS; tells who speaks plain HTTP that this port does not.
    async fn secure(
        self,
        stream: TcpStream,
        config: Arc<rustls::ServerConfig>,
        peer: SocketAddr,
        site: Site,
        place: impl Send + 'static,
    ) {
        let opened = tokio::select! {
            opened = tls::open(stream, config) => opened,
            () = self.closing.cancelled() => return,
        };
        match opened {
            Ok(Opened::Tls(stream)) => self.serve(stream, peer, site, place).await,
            Ok(Opened::Plain(stream)) => {
                let _ =
                    timeout(REFUSING_TIME, self.serve(stream, peer, https_router().into(), place))
                        .await;
            }
            Err(error) => tracing::debug!(%peer, "no TLS connection came about: {error}"),
        }
    }

    async fn serve(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: SocketAddr,
        site: Site,
        place: impl Send + 'static,
    ) {
        if site.has_short_way() {
            let closing = self.closing.child_token();
            let ends = Ends::new(closing, self.abort.clone(), self.header_timeout);
            if let Some(stream) = short_way::serve(stream, &site, peer, ends).await {
                Box::pin(self.serve_long(stream, peer, site)).await;
            }
        } else {
            self.serve_long(stream, peer, site).await;
        }
        drop(place);
    }

    /// Through hyper.
    async fn serve_long(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: SocketAddr,
        site: Site,
    ) {
        let Terms { closing, abort, header_timeout } = self;
        let service = service_fn(move |request: Request<Incoming>| {
            let site = site.clone();
            async move { Ok::<_, Infallible>(site.answer(request, peer).await) }
        });
        // HTTP/1.1 only: one HTTP/2 connection could carry any number of requests past the
        // bound, and waiting for its preface has no deadline.
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(header_timeout)
            .max_buf_size(BUFFER_MAX);
        let mut connection =
            pin!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
        // Nothing is aborted before it was asked to close. A token of its own: the lock of a common
        // one would be taken by all connections, whenever one of them stirs.
        let closing = closing.child_token();
        let ended = tokio::select! {
            biased;
            ended = connection.as_mut() => ended,
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
    }
}

/// For plain requests to a port with TLS.
fn https_router() -> Router {
    Router::new().fallback(|headers: HeaderMap| async move {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let message =
            format!("this port speaks HTTPS: ask for https://{}", host.unwrap_or("HOST:PORT"));
        let reject = Reject::bad_request("https_required", message);
        ([(header::CONNECTION, "close")], reject).into_response()
    })
}

fn busy_router(places: Places) -> Router {
    Router::new().fallback(move || async move {
        let message = format!(
            "all {} connections are in use (listen.connections); send again later",
            places.max()
        );
        let reject = Reject::new(StatusCode::SERVICE_UNAVAILABLE, "connections_full", message);
        ([(header::CONNECTION, "close")], reject).into_response()
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

    fn bounds(places: usize) -> Bounds {
        Bounds::new(Places::new(places), Tls::default())
    }

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
        let (address, shutdown, served) = serving(bounds(1)).await;
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
        let (address, shutdown, served) = serving(bounds(9)).await;
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
        let header_timeout = Duration::from_millis(100);
        let bounds = Bounds { header_timeout, ..bounds(9) };
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
