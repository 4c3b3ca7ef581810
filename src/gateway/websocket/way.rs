//! One direction of a socket. Bytes are read into a buffer of the thread's and written from there at
//! once: a socket on which nothing is under way has no buffer, and one whose reader is slow keeps
//! only what was read and not taken.

use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Clock;

const BUFFER_BYTES: usize = 64 << 10;
/// Parts that are passed on before the other direction has its turn.
const ROUNDS_MAX: usize = 16;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug, Default)]
pub struct Way {
    /// Read, and not taken from `taken` on.
    left: Vec<u8>,
    taken: usize,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Open,
    /// Written to what may hold it back (TLS).
    Flushing,
    /// Its end is passed on.
    Ending,
    Over,
}

enum Part {
    Passed,
    Kept(Vec<u8>),
    End,
    Broken,
}

impl Way {
    /// To the end of `from`, which is passed on; or to the first error.
    pub fn poll<F, T>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut F,
        to: &mut T,
        clock: &Clock,
    ) -> Poll<()>
    where
        F: AsyncRead + Unpin,
        T: AsyncWrite + Unpin,
    {
        for _ in 0..ROUNDS_MAX {
            let done = match self.stage {
                Stage::Over => return Poll::Ready(()),
                Stage::Ending => {
                    let _ = ready!(Pin::new(&mut *to).poll_shutdown(cx));
                    self.stage = Stage::Over;
                    continue;
                }
                Stage::Flushing => ready!(self.finish_writing(cx, to, clock)),
                Stage::Open => true,
            };
            if !done {
                self.stage = Stage::Over;
                continue;
            }
            match ready!(pass(cx, from, to)) {
                Part::Passed => self.stage = Stage::Flushing,
                Part::Kept(left) => (self.left, self.stage) = (left, Stage::Flushing),
                Part::End => self.stage = Stage::Ending,
                Part::Broken => self.stage = Stage::Over,
            }
            clock.tick();
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// False: it cannot be.
    fn finish_writing<T>(&mut self, cx: &mut Context<'_>, to: &mut T, clock: &Clock) -> Poll<bool>
    where
        T: AsyncWrite + Unpin,
    {
        while self.taken < self.left.len() {
            match ready!(Pin::new(&mut *to).poll_write(cx, &self.left[self.taken..])) {
                Ok(now @ 1..) => self.taken += now,
                _ => return Poll::Ready(false),
            }
            clock.tick();
        }
        if !self.left.is_empty() {
            (self.left, self.taken) = (Vec::new(), 0);
        }
        let flushed = ready!(Pin::new(to).poll_flush(cx));
        self.stage = Stage::Open;
        Poll::Ready(flushed.is_ok())
    }
}

/// Reads once, and writes what can be written of it now.
fn pass<F, T>(cx: &mut Context<'_>, from: &mut F, to: &mut T) -> Poll<Part>
where
    F: AsyncRead + Unpin,
    T: AsyncWrite + Unpin,
{
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(BUFFER_BYTES, 0);
        let mut read = ReadBuf::new(buffer);
        let Ok(()) = ready!(Pin::new(from).poll_read(cx, &mut read)) else {
            return Poll::Ready(Part::Broken);
        };
        let data = read.filled();
        if data.is_empty() {
            return Poll::Ready(Part::End);
        }
        Poll::Ready(match Pin::new(to).poll_write(cx, data) {
            Poll::Ready(Ok(0) | Err(_)) => Part::Broken,
            Poll::Ready(Ok(now)) if now == data.len() => Part::Passed,
            Poll::Ready(Ok(now)) => Part::Kept(data[now..].to_vec()),
            Poll::Pending => Part::Kept(data.to_vec()),
        })
    })
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::{Instant, timeout};

    use super::*;

    fn clock() -> Clock {
        Clock { began: Instant::now(), last_ms: AtomicU64::new(0) }
    }

    /// Readers and writers of every pace, and much more than any buffer: all of it, in order, then
    /// the end.
    #[tokio::test]
    async fn everything_arrives_in_order_and_then_the_end() {
        for (inner, outer) in [(1, 3), (7, 100_000), (100_000, 7), (1000, 1000)] {
            let ((mut client, mut near), (mut far, mut engine)) = (duplex(inner), duplex(outer));
            let sent: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
            let expected = sent.clone();
            let writing = tokio::spawn(async move {
                client.write_all(&sent).await.unwrap();
                client.shutdown().await.unwrap();
            });
            let passing = tokio::spawn(async move {
                let (mut way, clock) = (Way::default(), clock());
                poll_fn(|cx| way.poll(cx, &mut near, &mut far, &clock)).await;
                (way, far)
            });
            let mut got = Vec::new();
            let reading = timeout(Duration::from_secs(60), engine.read_to_end(&mut got));
            reading.await.expect("the end is passed on").unwrap();
            assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
            writing.await.unwrap();
            let (way, _far) = passing.await.unwrap();
            assert_eq!(way.left.capacity(), 0, "an idle way holds nothing");
        }
    }

    #[tokio::test]
    async fn a_side_that_is_gone_ends_it() {
        let ((mut client, mut near), (mut far, engine)) = (duplex(64), duplex(64));
        drop(engine);
        client.write_all(b"hello").await.unwrap();
        let (mut way, clock) = (Way::default(), clock());
        let ended = poll_fn(|cx| way.poll(cx, &mut near, &mut far, &clock));
        timeout(Duration::from_secs(60), ended).await.expect("it ends");
    }
}
