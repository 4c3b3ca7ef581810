//! News as server-sent events: ours with ids (`/events`), and llama-swap's (`/api/events`).

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Interval;
use tokio_util::sync::CancellationToken;

use super::Api;
use super::extract::QueryText;
use super::llama_swap::activity_rows;
use super::logs::UNBUFFERED;
use super::render::{self, Snapshot};
use crate::gateway::reject::Reject;
use crate::orchestrator::Handle;
use crate::telemetry::feed::{Entry, Feed, Followed, News};
use crate::telemetry::logs::{Line, Source, Wanted, left_out};

/// A comment at least this often, so that proxies and clients know that the stream lives.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(15);
/// Between two looks at the number of requests in flight.
const IN_FLIGHT_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, serde::Deserialize)]
pub struct Resume {
    /// As the header `Last-Event-ID`, for clients that cannot set headers.
    last_event_id: Option<String>,
}

/// `GET /events`
pub async fn events(
    State(api): State<Api>,
    QueryText(resume): QueryText<Resume>,
    headers: HeaderMap,
) -> Result<Response, Reject> {
    let header = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let last_id = header.or(resume.last_event_id.as_deref()).filter(|id| !id.is_empty());
    let feed = api.handle.feed().clone();
    let Followed { missed, entries, live } = feed.follow(last_id);
    let reader = Reader { missed, entries: entries.into(), live, closed: feed.closed(), feed };
    let events = stream::unfold(reader, |mut reader| async {
        let event = reader.next().await?;
        Some((Ok::<_, Infallible>(event), reader))
    });
    Ok(sse(events))
}

fn sse(events: impl stream::Stream<Item = Result<Event, Infallible>> + Send + 'static) -> Response {
    let sse = Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT).text("wharf"));
    ([UNBUFFERED], sse).into_response()
}

struct Reader {
    missed: bool,
    entries: VecDeque<Arc<Entry>>,
    live: Receiver<Arc<Entry>>,
    closed: CancellationToken,
    feed: Feed,
}

impl Reader {
    async fn next(&mut self) -> Option<Event> {
        if std::mem::take(&mut self.missed) {
            return Some(missed());
        }
        if let Some(entry) = self.entries.pop_front() {
            return Some(self.event(&entry));
        }
        let entry = tokio::select! {
            biased;
            () = self.closed.cancelled() => return None,
            entry = self.live.recv() => entry,
        };
        match entry {
            Ok(entry) => Some(self.event(&entry)),
            Err(RecvError::Lagged(_)) => Some(missed()),
            Err(RecvError::Closed) => None,
        }
    }

    fn event(&self, entry: &Entry) -> Event {
        let data = entry.data().to_string();
        Event::default().id(self.feed.id(entry)).event(entry.news.kind()).data(data)
    }
}

/// Some news are gone for this reader: it reads the state anew.
fn missed() -> Event {
    let data = json!({ "message": "some events are gone: read GET /status again" });
    Event::default().event("missed").data(data.to_string())
}

/// `GET /api/events`
pub async fn llama_swap(State(api): State<Api>) -> Response {
    let state = LlamaSwap::new(api);
    let events = stream::unfold(state, |mut state| async {
        let (kind, data) = state.next().await?;
        // Encoded twice: its clients parse the envelope, then the text in it.
        let envelope = json!({ "type": kind, "data": data.to_string() });
        let event = Event::default().event("message").data(envelope.to_string());
        Some((Ok::<_, Infallible>(event), state))
    });
    sse(events)
}

type Message = (&'static str, Value);

/// What one client of `/api/events` is told next. Nothing is kept for it: what it is too slow for
/// it does not get, but the newest state of the models it always does.
struct LlamaSwap {
    api: Api,
    ready: VecDeque<Message>,
    news: Receiver<Arc<Entry>>,
    lines: Receiver<Arc<Line>>,
    look: Interval,
    in_flight: u64,
    closed: CancellationToken,
}

impl LlamaSwap {
    /// Subscribes first: nothing falls between the first batch and what follows it.
    fn new(api: Api) -> LlamaSwap {
        let (feed, logs) = (api.handle.feed().clone(), api.handle.logs().clone());
        let news = feed.follow(None).live;
        let (history, lines) = logs.follow(&Wanted::All);
        let (proxy, upstream): (Vec<_>, Vec<_>) =
            history.into_iter().partition(|line| line.source == Source::Proxy);
        let text = |lines: &[Arc<Line>]| -> String {
            lines.iter().flat_map(|line| [line.text.as_str(), "\n"]).collect()
        };
        let in_flight = in_flight(&api.handle);
        let ready = VecDeque::from([
            log_data("proxy", &text(&proxy)),
            log_data("upstream", &text(&upstream)),
            models(&api),
            ("metrics", activity_rows(&api)),
            ("inflight", json!({ "total": in_flight })),
        ]);
        let mut look = tokio::time::interval(IN_FLIGHT_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        LlamaSwap { closed: feed.closed(), api, ready, news, lines, look, in_flight }
    }

    async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(message);
            }
            tokio::select! {
                biased;
                () = self.closed.cancelled() => return None,
                entry = self.news.recv() => match entry {
                    Ok(entry) => self.told(&entry),
                    Err(RecvError::Lagged(_)) => self.ready.push_back(models(&self.api)),
                    Err(RecvError::Closed) => return None,
                },
                line = self.lines.recv() => match line {
                    Ok(line) => self.ready.push_back(log_data(source(&line), &format!("{}\n", line.text))),
                    Err(RecvError::Lagged(lines)) => {
                        self.ready.push_back(log_data("proxy", &format!("{}\n", left_out(lines))));
                    }
                    Err(RecvError::Closed) => return None,
                },
                _ = self.look.tick() => self.look_at_in_flight(),
            }
        }
    }

    fn told(&mut self, entry: &Entry) {
        match &entry.news {
            News::ModelState { .. } | News::Reloaded { .. } => {
                self.ready.push_back(models(&self.api));
            }
            News::Activity { id } => {
                let row = self.api.handle.store().activity_row(*id);
                let row = row.iter().map(render::llama_swap::activity);
                // Its older clients read rows, its newer ones fetch by id.
                self.ready.push_back(("metrics", row.collect()));
                self.ready.push_back(("activity", json!({ "id": id })));
                self.look_at_in_flight();
            }
            News::SwapBegan { .. }
            | News::SwapPhase { .. }
            | News::SwapEnded { .. }
            | News::Health { .. } => {}
        }
    }

    fn look_at_in_flight(&mut self) {
        let now = in_flight(&self.api.handle);
        if std::mem::replace(&mut self.in_flight, now) != now {
            self.ready.push_back(("inflight", json!({ "total": now })));
        }
    }
}

/// Requests that wait or are served.
fn in_flight(handle: &Handle) -> u64 {
    // Adapters share the gate of their base.
    let gates = handle.gates();
    let by_instance = gates.values().map(|gate| (gate.instance, u64::from(gate.in_flight())));
    let served: u64 = by_instance.collect::<BTreeMap<_, _>>().values().sum();
    served + handle.view().scheduler.queued as u64
}

fn models(api: &Api) -> Message {
    ("modelStatus", render::llama_swap::model_status(&Snapshot::of(&api.handle)))
}

fn source(line: &Line) -> &'static str {
    match line.source {
        Source::Proxy => "proxy",
        Source::Model(_) => "upstream",
    }
}

fn log_data(source: &str, data: &str) -> Message {
    ("logData", json!({ "source": source, "data": data }))
}
