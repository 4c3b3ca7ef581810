//! Relaying the answer: frames as they come. The lease lives in here, so that it ends with the last
//! byte, or when the client leaves, or when the owner cuts it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body::{Body, Frame, SizeHint};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval};
use tokio_util::sync::CancellationToken;

use super::Limits;
use super::account::Account;
use super::answer::outcome;
use super::in_flight::Cancel;
use super::reject::Reject;
use super::usage::Meter;
use crate::orchestrator::{Gate, Lease};
use crate::units::ModelName;
use crate::upstream::Incoming;

/// How often a stream is looked at for a stall.
const LOOK_EVERY: Duration = Duration::from_secs(5);
const LOOK_EVERY_MIN: Duration = Duration::from_millis(50);

/// Why an answer ends before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The owner ended the lease: drain deadline, forced unload, or the instance died.
    Cancelled,
    /// An operator cancelled this request.
    ByOperator,
    /// The client reads nothing while the model is under notice.
    ReaderStalled(Duration),
    UpstreamStalled(Duration),
    UpstreamBroke(String),
}

impl Cut {
    fn reject(&self, model: &ModelName) -> Reject {
        let (status, code, message) = match self {
            Cut::ByOperator => return Reject::cancelled(model),
            Cut::Cancelled => (
                StatusCode::SERVICE_UNAVAILABLE,
                "instance_lost",
                format!("the answer was cut: the instance of model \"{model}\" was stopped"),
            ),
            Cut::ReaderStalled(after) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "reader_stalled",
                format!(
                    "the answer was cut: nothing was read for {} s while model \"{model}\" was \
                     to leave its GPU",
                    after.as_secs()
                ),
            ),
            Cut::UpstreamStalled(after) => (
                StatusCode::GATEWAY_TIMEOUT,
                "upstream_timeout",
                format!("the engine of model \"{model}\" sent nothing for {} s", after.as_secs()),
            ),
            Cut::UpstreamBroke(error) => (
                StatusCode::BAD_GATEWAY,
                "upstream_error",
                format!("the engine of model \"{model}\" broke off its answer: {error}"),
            ),
        };
        Reject::new(status, code, message).model(model)
    }
}

/// What the body and its watchdog share. The watchdog is needed because nobody polls the body of a
/// client that does not read.
#[derive(Debug)]
struct Flow(Mutex<State>);

#[derive(Debug)]
struct State {
    open: Option<(Incoming, Lease)>,
    cut: Option<Cut>,
    waker: Option<Waker>,
    /// Whom the stream waits for, and since when.
    waits_for_reader: bool,
    since: Instant,
    /// Until the first byte: how long it may take.
    first_within: Option<Duration>,
}

impl Flow {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends lease and upstream connection at once.
    fn cut(&self, why: Cut) {
        let mut state = self.state();
        let Some(open) = state.open.take() else { return };
        state.cut = Some(why);
        let waker = state.waker.take();
        drop(state);
        drop(open);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn overdue(&self, gate: &Gate, limits: &Limits) -> Option<Cut> {
        let state = self.state();
        let waited = state.since.elapsed();
        if state.waits_for_reader {
            let under_notice = !gate.is_open();
            (under_notice && waited >= limits.reader_stall)
                .then_some(Cut::ReaderStalled(limits.reader_stall))
        } else {
            let silence_max = state.first_within.unwrap_or(limits.upstream_silence);
            (waited >= silence_max).then_some(Cut::UpstreamStalled(silence_max))
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Cut>>> {
        let mut state = self.state();
        loop {
            let Some((upstream, _)) = &mut state.open else {
                return Poll::Ready(state.cut.take().map(Err));
            };
            let polled = Pin::new(upstream).poll_frame(cx);
            state.waits_for_reader = polled.is_ready();
            match polled {
                Poll::Pending => {
                    if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                        state.waker = Some(cx.waker().clone());
                    }
                    return Poll::Pending;
                }
                Poll::Ready(Some(Ok(frame))) => {
                    state.since = Instant::now();
                    // Trailers belong to the connection.
                    if let Ok(data) = frame.into_data()
                        && !data.is_empty()
                    {
                        state.first_within = None;
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    let cancelled = state.open.take().is_some_and(|(_, l)| l.cut().is_cancelled());
                    let why = super::forward::describe(&error);
                    let cut = if cancelled { Cut::Cancelled } else { Cut::UpstreamBroke(why) };
                    return Poll::Ready(Some(Err(cut)));
                }
                Poll::Ready(None) => {
                    // The last byte: the lease ends here, whenever the client reads it.
                    state.open = None;
                    return Poll::Ready(None);
                }
            }
        }
    }
}

async fn watch(
    flow: Arc<Flow>,
    gate: Arc<Gate>,
    cut: CancellationToken,
    by_operator: Cancel,
    limits: Limits,
) {
    let shortest = limits.reader_stall.min(limits.upstream_silence);
    let first_within = flow.state().first_within.unwrap_or(LOOK_EVERY);
    let mut look = interval(LOOK_EVERY.min(shortest).min(first_within.max(LOOK_EVERY_MIN)));
    loop {
        tokio::select! {
            () = cut.cancelled() => return flow.cut(Cut::Cancelled),
            () = by_operator.wished() => return flow.cut(Cut::ByOperator),
            _ = look.tick() => if let Some(why) = flow.overdue(&gate, &limits) {
                return flow.cut(why);
            },
        }
    }
}

/// The body of an answer.
#[derive(Debug)]
pub struct Relay {
    flow: Arc<Flow>,
    watchdog: JoinHandle<()>,
    meter: Meter,
    ready: VecDeque<Bytes>,
    account: Account,
    events: bool,
    status: StatusCode,
    /// Sent after the last event of a stream.
    epilogue: Option<Bytes>,
    ended: bool,
    /// `Content-Length` of upstream, where the bytes are not touched.
    remaining: Option<u64>,
}

pub struct Source {
    pub status: StatusCode,
    pub body: Incoming,
    pub lease: Lease,
    pub account: Account,
    pub meter: Meter,
    /// The body is an event stream in plain text: an error can be told in it.
    pub events: bool,
    pub epilogue: Option<Bytes>,
    /// What is left of the model's `answer_timeout`.
    pub first_within: Option<Duration>,
}

impl Relay {
    pub fn new(source: Source, limits: &Limits) -> Relay {
        let Source { status, body, lease, account, meter, events, epilogue, first_within } = source;
        let (gate, cut) = (Arc::clone(lease.gate()), lease.cut().clone());
        let remaining = if events { None } else { body.size_hint().exact() };
        let flow = Arc::new(Flow(Mutex::new(State {
            open: Some((body, lease)),
            cut: None,
            waker: None,
            waits_for_reader: true,
            since: Instant::now(),
            first_within,
        })));
        let by_operator = account.cancel().clone();
        let watching = watch(Arc::clone(&flow), gate, cut, by_operator, limits.clone());
        let watchdog = tokio::spawn(watching);
        let mut relay = Relay {
            flow,
            watchdog,
            meter,
            ready: VecDeque::new(),
            account,
            events,
            status,
            epilogue,
            ended: false,
            remaining,
        };
        relay.finish_if_whole();
        relay
    }

    /// hyper does not ask for more once `Content-Length` bytes are there: the last byte is the end.
    fn finish_if_whole(&mut self) {
        if self.remaining == Some(0) && self.ready.is_empty() && !self.ended {
            drop(self.flow.state().open.take());
            self.finish();
        }
    }

    fn finish(&mut self) {
        self.ended = true;
        self.meter.finish(&mut self.ready);
        self.ready.extend(self.epilogue.take());
        self.account.counted(self.meter.figures());
        self.account.relayed(&self.ready);
        self.account.end(outcome(self.status));
    }

    /// In a stream the error is its last event; elsewhere only a broken connection tells.
    fn broken(&mut self, cut: &Cut) -> Option<Result<Frame<Bytes>, axum::BoxError>> {
        self.ended = true;
        let reject = cut.reject(self.account.model());
        self.account.counted(self.meter.figures());
        let event = self.events.then(|| reject.event());
        self.account.relayed(&event);
        self.account.end(if *cut == Cut::ByOperator { reject.code() } else { "cut" });
        tracing::warn!(model = %self.account.model(), "{}", reject.problem().message);
        if let Some(event) = event {
            return Some(Ok(Frame::data(event)));
        }
        Some(Err(reject.problem().message.clone().into()))
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let relay = self.get_mut();
        loop {
            if let Some(data) = relay.ready.pop_front() {
                relay.remaining =
                    relay.remaining.map(|left| left.saturating_sub(data.len() as u64));
                relay.finish_if_whole();
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            if relay.ended {
                return Poll::Ready(None);
            }
            match std::task::ready!(relay.flow.poll(cx)) {
                Some(Ok(data)) => {
                    relay.account.arrived(data.len());
                    relay.meter.feed(data, &mut relay.ready);
                    relay.account.relayed(&relay.ready);
                }
                Some(Err(cut)) => return Poll::Ready(relay.broken(&cut)),
                None => relay.finish(),
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.watchdog.abort();
        if !self.ended {
            self.account.counted(self.meter.figures());
        }
        // The aborted watchdog still holds its share for a moment; the lease must not.
        drop(self.flow.state().open.take());
    }
}
