//! The accept loop: connections can be reset in mid-request, and closing is explicit.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tower::ServiceExt;

/// Resets its connection (RST, no answer) when pulled.
#[derive(Clone, Debug, Default)]
pub struct ResetSwitch(Arc<Notify>);

impl ResetSwitch {
    pub fn pull(&self) {
        self.0.notify_one();
    }
}

/// Set by a handler that answers 101: what follows on its connection is a WebSocket.
#[derive(Clone, Debug, Default)]
pub struct UpgradeSwitch(Arc<AtomicBool>);

impl UpgradeSwitch {
    pub fn pull(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub struct Server {
    closing: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Server {
    pub async fn open(addr: SocketAddr, router: Router) -> std::io::Result<Server> {
        let listener = TcpListener::bind(addr).await?;
        let (closing, closing_seen) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, router, closing_seen));
        Ok(Server { closing, accepting })
    }

    /// Closes the port and every idle connection; replies under way go on.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Waits, after `close`, for the last connection.
    pub async fn closed(self) {
        let _ = self.accepting.await;
    }
}

async fn accept(listener: TcpListener, router: Router, closing: watch::Receiver<bool>) {
    /// Out of descriptors, say: it may pass.
    const PAUSE: Duration = Duration::from_millis(50);
    let mut connections = JoinSet::new();
    let mut is_closing = closing.clone();
    loop {
        tokio::select! {
            () = closed(&mut is_closing) => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(stream, router.clone(), closing.clone()));
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }
    drop(listener);
    connections.join_all().await;
}

async fn closed(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

async fn serve(stream: TcpStream, router: Router, mut closing: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let reset = ResetSwitch::default();
    let switch = reset.clone();
    let upgrade = UpgradeSwitch::default();
    let upgrading = upgrade.clone();
    let service = service_fn(move |request: http::Request<Incoming>| {
        let router = router.clone();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(switch.clone());
        request.extensions_mut().insert(upgrading.clone());
        Box::pin(router.oneshot(request))
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new());
    let mut connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut is_closing = false;
    loop {
        tokio::select! {
            _ = std::future::poll_fn(|cx| connection.poll_without_shutdown(cx)) => {
                if upgrade.0.load(Ordering::SeqCst) {
                    let parts = connection.into_parts();
                    let socket = super::socket::echo(parts.io.into_inner(), parts.read_buf);
                    tokio::select! {
                        _ = socket => {}
                        () = closed(&mut closing) => {}
                    }
                }
                return;
            }
            () = reset.0.notified() => {
                let stream = connection.into_parts().io.into_inner();
                let _ = stream.set_zero_linger();
                return;
            }
            () = closed(&mut closing), if !is_closing => {
                is_closing = true;
                std::pin::Pin::new(&mut connection).graceful_shutdown();
            }
        }
    }
}
