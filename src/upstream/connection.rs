//! One connection: how it is made, and how a request and the head of its answer cross it.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd as _;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until, timeout, timeout_at};
use tower::ServiceExt as _;

use super::head::{self, Head};
use super::pool::own_lane;
use super::{CONNECT_TIMEOUT, CallError};
use crate::http1::{self, JOIN_BYTES_MAX, Prefixed};
use crate::runtime::Endpoint;

/// Two kinds, so that engines on this machine pay nothing for those elsewhere.
#[derive(Debug)]
pub enum Io {
    Plain(TcpStream),
    Tls(Box<TokioIo<MaybeHttpsStream<TokioIo<TcpStream>>>>),
}

impl Io {
    fn has_nothing(&self) -> bool {
        let stream = match self {
            Io::Plain(stream) => stream,
            Io::Tls(stream) => match stream.inner() {
                MaybeHttpsStream::Http(stream) => stream.inner(),
                MaybeHttpsStream::Https(stream) => stream.inner().get_ref().0.inner().inner(),
            },
        };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
    }
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Io::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Io::Plain(stream) => Pin::new(stream).poll_write(cx, data),
            Io::Tls(stream) => Pin::new(stream).poll_write(cx, data),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Io::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Io::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Io::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Where connections lead. The connectors look names up and try each of their addresses.
#[derive(Debug)]
pub struct Connector {
    kind: Kind,
    target: Result<Target, String>,
}

#[derive(Debug)]
enum Kind {
    Plain(HttpConnector),
    Tls(HttpsConnector<HttpConnector>),
}

#[derive(Debug)]
pub struct Target {
    uri: Uri,
    /// As in `Host`.
    pub authority: String,
    /// What precedes every path, without a slash at its end.
    pub path: String,
}

impl Connector {
    pub fn to(endpoint: &Endpoint) -> Connector {
        let mut plain = HttpConnector::new();
        plain.set_nodelay(true);
        plain.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let kind = match &endpoint.tls {
            None => Kind::Plain(plain),
            Some(tls) => {
                plain.enforce_http(false);
                let https = HttpsConnectorBuilder::new()
                    .with_tls_config(rustls::ClientConfig::clone(&tls.config()))
                    .https_only()
                    .enable_http1()
                    .wrap_connector(plain);
                Kind::Tls(https)
            }
        };
        Connector { kind, target: target(&endpoint.base) }
    }

    pub fn target(&self) -> Result<&Target, String> {
        self.target.as_ref().map_err(Clone::clone)
    }

    pub async fn connect(&self) -> Result<Connection, CallError> {
        let uri = self.target().map_err(CallError::Invalid)?.uri.clone();
        let connect = async {
            match &self.kind {
                Kind::Plain(connector) => {
                    let stream = connector.clone().oneshot(uri).await;
                    let stream = stream.map_err(|error| CallError::Connect(error.into()))?;
                    Ok(Io::Plain(stream.into_inner()))
                }
                Kind::Tls(connector) => {
                    let stream = connector.clone().oneshot(uri).await;
                    let stream = stream.map_err(CallError::Connect)?;
                    Ok(Io::Tls(Box::new(TokioIo::new(stream))))
                }
            }
        };
        let io = timeout(CONNECT_TIMEOUT, connect).await;
        let io = io.map_err(|_| CallError::ConnectTimeout(CONNECT_TIMEOUT))??;
        Ok(Connection { io, lane: own_lane(), alarm: Alarm::default() })
    }

    pub async fn connect_until(&self, until: Instant) -> Result<Connection, CallError> {
        timeout_at(until, self.connect()).await.map_err(|_| CallError::Silent)?
    }
}

fn target(base: &str) -> Result<Target, String> {
    let bad = |why: String| format!("the URL {base} cannot be used: {why}");
    let uri: Uri = base.parse().map_err(|error| bad(format!("{error}")))?;
    let authority = uri.authority().ok_or_else(|| bad("it names no host".to_owned()))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(bad("it must begin with http:// or https://".to_owned()));
    }
    // What precedes an `@` are credentials, which are no part of `Host`.
    let authority = authority.as_str().rsplit('@').next().unwrap_or_default().to_owned();
    let path = uri.path().trim_end_matches('/').to_owned();
    Ok(Target { authority, path, uri })
}

/// A connection between two exchanges, or during one.
#[derive(Debug)]
pub struct Connection {
    io: Io,
    /// Of the thread that opened it.
    pub lane: usize,
    alarm: Alarm,
}

/// Says that it is too late. Set anew only when it goes off: most exchanges are over long before,
/// and the clock need not hear of each.
#[derive(Debug, Default)]
pub struct Alarm(Option<(usize, Pin<Box<Sleep>>)>);

impl Alarm {
    pub fn is_late(&mut self, cx: &mut Context<'_>, until: Instant) -> bool {
        // One that was set on another thread goes by that thread's clock, which may end sooner.
        self.0 = self.0.take().filter(|(lane, _)| *lane == own_lane());
        let (_, sleep) = self.0.get_or_insert_with(|| (own_lane(), Box::pin(sleep_until(until))));
        if sleep.deadline() > until {
            sleep.as_mut().reset(until);
        }
        while sleep.as_mut().poll(cx).is_ready() {
            if Instant::now() >= until {
                return true;
            }
            sleep.as_mut().reset(until);
        }
        false
    }
}

impl Connection {
    /// Whether an idle connection can still be used: neither closed nor talking unasked. `surely`:
    /// the socket is asked, too; else that costs no system call where the reactor saw nothing.
    pub fn is_silent(&mut self, surely: bool) -> bool {
        let mut byte = [0];
        let mut buffer = ReadBuf::new(&mut byte);
        let mut cx = Context::from_waker(Waker::noop());
        let read = std::future::poll_fn(|cx| Pin::new(&mut self.io).poll_read(cx, &mut buffer));
        // A task that did much at once would be told "pending" whatever is there.
        let silent = pin!(unconstrained(read)).poll(&mut cx).is_pending();
        silent && (!surely || self.io.has_nothing())
    }

    /// Sends a request and reads the head of its answer, and what came with it, if that is here by
    /// `until`. A server may answer before it has read everything: what it was not sent by then
    /// comes back.
    pub async fn exchange(
        &mut self,
        head: Vec<u8>,
        body: &Bytes,
        until: Instant,
    ) -> Result<(Head, Bytes, Option<Sending>), CallError> {
        let mut sending = Sending::new(head, body);
        let mut partial = BytesMut::new();
        let (answer, rest) = std::future::poll_fn(|cx| {
            let _ = sending.poll(&mut self.io, cx);
            loop {
                let read = self.poll_read(cx, |data| {
                    if data.is_empty() { None } else { Some(head::read(&mut partial, data)) }
                });
                let Poll::Ready(read) = read else {
                    let late = self.alarm.is_late(cx, until);
                    return if late { Poll::Ready(Err(CallError::Silent)) } else { Poll::Pending };
                };
                match read.map_err(CallError::Broken)? {
                    None => return Poll::Ready(Err(sending.failed())),
                    Some(Ok(None)) => {}
                    Some(Ok(Some(answer))) => return Poll::Ready(Ok(answer)),
                    Some(Err(why)) => return Poll::Ready(Err(CallError::Invalid(why))),
                }
            }
        })
        .await?;
        Ok((answer, rest, (!sending.is_done()).then_some(sending)))
    }

    /// Goes on sending while the answer is read. A failure shows in what is read.
    pub fn poll_send(&mut self, sending: &mut Sending, cx: &mut Context<'_>) -> bool {
        sending.poll(&mut self.io, cx).is_ready() && sending.is_done()
    }

    /// The next bytes; none at the end.
    pub fn poll_read<T>(
        &mut self,
        cx: &mut Context<'_>,
        use_data: impl FnOnce(&[u8]) -> T,
    ) -> Poll<io::Result<T>> {
        http1::poll_read(&mut self.io, cx, use_data)
    }

    /// `early`: what came behind the head.
    pub fn into_upgraded(self, early: Bytes) -> Prefixed<Io> {
        Prefixed::new(early, self.io)
    }
}

/// A request on its way out.
#[derive(Debug)]
pub struct Sending {
    head: Vec<u8>,
    body: Bytes,
    sent: usize,
    failure: Option<io::Error>,
}

impl Sending {
    fn new(mut head: Vec<u8>, body: &Bytes) -> Sending {
        let joined = body.len() <= JOIN_BYTES_MAX;
        if joined {
            head.extend_from_slice(body);
        }
        let body = if joined { Bytes::new() } else { body.clone() };
        Sending { head, body, sent: 0, failure: None }
    }

    fn is_done(&self) -> bool {
        self.sent == self.head.len() + self.body.len()
    }

    /// Remembers a failure: an answer that says why may be there.
    fn poll(&mut self, io: &mut Io, cx: &mut Context<'_>) -> Poll<()> {
        while !self.is_done() && self.failure.is_none() {
            let mut out = Pin::new(&mut *io);
            let written = match self.sent.checked_sub(self.head.len()) {
                Some(of_body) => out.poll_write(cx, &self.body[of_body..]),
                None if self.body.is_empty() => out.poll_write(cx, &self.head[self.sent..]),
                None => {
                    let parts = [IoSlice::new(&self.head[self.sent..]), IoSlice::new(&self.body)];
                    out.as_mut().poll_write_vectored(cx, &parts)
                }
            };
            match ready!(written) {
                Ok(0) => self.failure = Some(io::ErrorKind::WriteZero.into()),
                Ok(written) => self.sent += written,
                Err(error) => self.failure = Some(error),
            }
        }
        if self.failure.is_none() {
            // TLS keeps records back until it is asked.
            if let Err(error) = ready!(Pin::new(io).poll_flush(cx)) {
                self.failure = Some(error);
            }
        }
        Poll::Ready(())
    }

    fn failed(&mut self) -> CallError {
        self.failure.take().map_or(CallError::Closed, CallError::Broken)
    }
}
