//! Why a connection ends that nobody closed.

use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Asked whenever its connection stirs, so it waits for each cause but once.
#[derive(Debug)]
pub struct Ends {
    closing: CancellationToken,
    close: Pin<Box<WaitForCancellationFutureOwned>>,
    abort: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Whom `close` will wake.
    heard_by: Option<Waker>,
    idle_max: Duration,
    idle: Pin<Box<Sleep>>,
    used: bool,
}

impl Ends {
    /// `closing`: idle connections end, others after their answer; nothing is aborted before. An
    /// idle one is kept for once to twice `idle_max`: so the clock needs no look for each request.
    pub fn new(closing: CancellationToken, abort: CancellationToken, idle_max: Duration) -> Ends {
        Ends {
            close: Box::pin(closing.clone().cancelled_owned()),
            abort: Box::pin(abort.cancelled_owned()),
            closing,
            heard_by: None,
            idle_max,
            idle: Box::pin(sleep(idle_max)),
            used: false,
        }
    }

    /// The connection is no idle one.
    pub fn used(&mut self) {
        self.used = true;
    }

    pub fn is_closing(&mut self, cx: &mut Context<'_>) -> bool {
        if self.closing.is_cancelled() {
            return true;
        }
        if self.heard_by.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return false;
        }
        self.heard_by = Some(cx.waker().clone());
        self.close.as_mut().poll(cx).is_ready()
    }

    pub fn is_aborted(&mut self, cx: &mut Context<'_>) -> bool {
        self.is_closing(cx) && self.abort.as_mut().poll(cx).is_ready()
    }

    pub fn is_idle_too_long(&mut self, cx: &mut Context<'_>) -> bool {
        while self.idle.as_mut().poll(cx).is_ready() {
            if !std::mem::take(&mut self.used) {
                return true;
            }
            self.idle.as_mut().reset(Instant::now() + self.idle_max);
        }
        false
    }
}
