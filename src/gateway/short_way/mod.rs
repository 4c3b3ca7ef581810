//! The short way of a connection: an inference request that says nothing special and is whole
//! within one buffer is read, answered and written here, with nothing between the socket and the
//! gateway. At the first other request all that was read goes the long way, through hyper, and the
//! connection stays there.

mod ends;
mod head;
mod writer;

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::Gateway;
use super::answer::Reply;
use super::infer::{self, Asking};
use super::routes::Inference;
use super::site::Site;
use crate::http1::{self, Prefixed};
use head::Verdict;
use writer::{Left, Writer};

pub use ends::Ends;

/// A whole request, and what is taken of those that a client sends ahead.
const BUFFER_MAX: usize = 64 << 10;
/// Whoever takes longer for a body has it read the long way, by the rules for slow ones.
const BODY_WITHIN: Duration = Duration::from_secs(1);
const CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// Serves until the connection ends; or gives it back with what is not of the short way.
pub async fn serve<S>(stream: S, site: &Site, peer: SocketAddr, ends: Ends) -> Option<Prefixed<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (ahead, left) = (BytesMut::new(), Left::default());
    let mut connection = Connection { stream, ahead, left, ends };
    // What answers a request, some 1.6 KB, is a part of this future: idle connections keep room for
    // it, so that no request has to ask for memory of that size.
    loop {
        let request = match connection.next(site, peer).await {
            Next::Request(request) => request,
            Next::LongWay => {
                return Some(Prefixed::new(connection.ahead.freeze(), connection.stream));
            }
            Next::Over => break,
        };
        let reply = {
            let Request { gateway, inference, asking } = request;
            let answer = pin!(infer::infer(&gateway, inference, asking));
            connection.answered(answer).await?
        };
        match connection.send(Writer::new(reply)).await {
            Ok(true) => connection.ends.used(),
            Ok(false) => break,
            Err(error) => {
                tracing::trace!(%peer, "connection ended: {error}");
                return None;
            }
        }
    }
    let _ = timeout(CLOSE_WITHIN, connection.stream.shutdown()).await;
    None
}

/// A request of the short way.
struct Request {
    gateway: Arc<Gateway>,
    inference: &'static Inference,
    asking: Asking<'static>,
}

enum Next {
    Request(Request),
    LongWay,
    Over,
}

struct Connection<S> {
    stream: S,
    /// Read, and not yet served.
    ahead: BytesMut,
    /// Written, and not yet taken by the socket.
    left: Left,
    ends: Ends,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    async fn next(&mut self, site: &Site, peer: SocketAddr) -> Next {
        loop {
            let total = match poll_fn(|cx| self.poll_verdict(cx, site, peer)).await {
                None => return Next::Over,
                Some(Verdict::Whole(request, _)) => return Next::Request(request),
                Some(Verdict::Special) => return Next::LongWay,
                Some(Verdict::Partial(total)) => total,
            };
            let rest = poll_fn(|cx| self.poll_more(cx, total));
            if !matches!(timeout(BODY_WITHIN, rest).await, Ok(Ok(()))) {
                return Next::LongWay;
            }
        }
    }

    /// What comes next; `None` where nothing does.
    fn poll_verdict(
        &mut self,
        cx: &mut Context<'_>,
        site: &Site,
        peer: SocketAddr,
    ) -> Poll<Option<Verdict>> {
        let Connection { stream, ahead, ends, .. } = self;
        if !ahead.is_empty() {
            let verdict = head::judge(ahead, site, peer);
            if let Verdict::Whole(_, used) = verdict {
                ahead.advance(used);
            }
            if ahead.is_empty() {
                *ahead = BytesMut::new();
            }
            return Poll::Ready(Some(verdict));
        }
        let read = http1::poll_read(stream, cx, |data| {
            if data.is_empty() {
                return None;
            }
            let verdict = head::judge(data, site, peer);
            let used = if let Verdict::Whole(_, used) = verdict { used } else { 0 };
            ahead.extend_from_slice(&data[used..]);
            Some(verdict)
        });
        match read {
            Poll::Ready(Ok(verdict)) => Poll::Ready(verdict),
            Poll::Ready(Err(_)) => Poll::Ready(None),
            Poll::Pending if ends.is_closing(cx) || ends.is_idle_too_long(cx) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Until so much is here.
    fn poll_more(&mut self, cx: &mut Context<'_>, total: usize) -> Poll<io::Result<()>> {
        while self.ahead.len() < total {
            if std::task::ready!(self.poll_ahead(cx))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let ahead = &mut self.ahead;
        let room = BUFFER_MAX - ahead.len().min(BUFFER_MAX);
        http1::poll_read_some(&mut self.stream, cx, room, |data| {
            ahead.extend_from_slice(data);
            data.len()
        })
    }

    /// `None`: nobody waits for it any more.
    async fn answered(
        &mut self,
        mut answer: Pin<&mut impl Future<Output = Reply>>,
    ) -> Option<Reply> {
        poll_fn(|cx| {
            if let Poll::Ready(reply) = answer.as_mut().poll(cx) {
                return Poll::Ready(Some(reply));
            }
            self.poll_gone(cx).map(|()| None)
        })
        .await
    }

    /// Ready when the client has left, or is to be cut. Whether one is there that has sent so much
    /// ahead that there is no room for more shows with the next answer only.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.ahead.len() < BUFFER_MAX {
            match self.poll_ahead(cx) {
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        if self.ends.is_aborted(cx) { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Whether the connection may be used again.
    async fn send(&mut self, mut writer: Writer) -> io::Result<bool> {
        poll_fn(|cx| self.poll_send(cx, &mut writer)).await?;
        Ok(writer.keeps_alive())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, writer: &mut Writer) -> Poll<io::Result<()>> {
        loop {
            let closing = self.ends.is_closing(cx);
            // What the socket does not take is waited for before the body is asked for more.
            let waits = self.left.is_empty()
                && writer.poll_parts(cx, closing, |parts, cx| {
                    self.left.begin(&mut self.stream, cx, parts);
                })?;
            let sent = self.left.poll(&mut self.stream, cx)?;
            if waits || sent.is_pending() {
                return self.poll_gone(cx).map(|()| Err(gone()));
            }
            if writer.is_over() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the client left, or was cut")
}

#[cfg(test)]
mod tests;
