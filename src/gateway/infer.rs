//! One inference request from its head to its lease and its upstream answer.

mod passing;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header, request, response};
use hyper::body::Incoming;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::account::{Account, Arrival};
use super::admit::{self, Wishes};
use super::door::Bound;
use super::forward::{self, Failure, Outgoing};
use super::receive::{self, Held};
use super::reject::{Reject, Viewer};
use super::relay::{Relay, Source};
use super::routes::{Api, BodyKind, Inference};
use super::timing::{Timing, swap_share};
use super::underway::{self, Following, Queue};
use super::usage::Meter;
use super::{Gateway, auth, filter, multipart, parse, wait};
use crate::config::catalog::{
    ApiKey, Catalog, EngineKind, ModelSpec, Scope, WaitingSettings, WaitingStyle,
};
use crate::orchestrator::{Gate, Lease, RequestOptions};
use crate::scheduler::action::Refusal;
use crate::units::{RequestId, Time};

pub use passing::Passing;

/// The scheduler ends every wait; this bounds it if it should not.
const WAIT_BACKSTOP: Duration = Duration::from_secs(30);
/// An adapter that somebody unloaded is loaded again for a request.
const ADAPTER_WITHIN: Duration = Duration::from_secs(120);
/// How long a retry waits for the owner to learn that the instance died.
const SETTLE_MAX: Duration = Duration::from_secs(1);
const SETTLE_LOOK_EVERY: Duration = Duration::from_millis(50);

pub async fn infer(
    gateway: Arc<Gateway>,
    inference: &'static Inference,
    request: Request,
) -> Response {
    let id = admit::request_id(request.headers(), || gateway.fresh_id());
    let mut arrival = Arrival::open(&gateway, request.method(), inference.path, &id);
    let mut response = match admit(&gateway, inference, request, &id, &mut arrival).await {
        Ok(job) => wait::respond(job).await,
        Err(reject) => {
            arrival.turned_away(&reject);
            gateway.metrics.refused(reject.code());
            reject.into_response()
        }
    };
    response.headers_mut().insert("x-request-id", id);
    response
}

/// Everything that can be said before a lease is asked for.
async fn admit(
    gateway: &Arc<Gateway>,
    inference: &'static Inference,
    request: Request,
    id: &HeaderValue,
    arrival: &mut Arrival,
) -> Result<Job, Reject> {
    let arrived = gateway.handle.now();
    let catalog = gateway.handle.catalog();
    let (head, body) = request.into_parts();
    let entitled = auth::authorize(&catalog.settings, &head.headers, Scope::Inference)
        .inspect(|key| arrival.entitled(*key))
        .and_then(|key| {
            let wishes = Wishes::read(&head.headers)?;
            arrival.hold(gateway.limiter.enter(&catalog.settings, key)?);
            Ok((key, wishes))
        });
    let (key, wishes) = match entitled {
        Ok(entitled) => entitled,
        Err(reject) => {
            receive::discard(body, &head.headers).await;
            return Err(reject);
        }
    };
    let received = receive::receive(
        body,
        &head.headers,
        &catalog.settings.queue,
        &gateway.bodies,
        &gateway.limits,
    )
    .await?;
    let admitted = Admitted { gateway, inference, catalog: &catalog, head, key, wishes, arrived };
    admitted.job(received, id, arrival)
}

struct Admitted<'a> {
    gateway: &'a Arc<Gateway>,
    inference: &'static Inference,
    catalog: &'a Catalog,
    head: request::Parts,
    key: Option<&'a ApiKey>,
    wishes: Wishes,
    arrived: Time,
}

impl Admitted<'_> {
    fn job(
        self,
        received: receive::Received,
        id: &HeaderValue,
        arrival: &mut Arrival,
    ) -> Result<Job, Reject> {
        let Admitted { gateway, inference, catalog, head, key, wishes, arrived } = self;
        arrival.received(&head.headers, &received.bytes);
        let bound = head.extensions.get::<Bound>();
        let mut asked = match (inference.body, bound) {
            (BodyKind::Json, Some(_)) => parse::parse_any(&received.bytes)?,
            (BodyKind::Json, None) => parse::parse(&received.bytes)?,
            (BodyKind::Form, _) => multipart::parse(&received.bytes, &head.headers)?,
        };
        let wanted = bound.map_or(&*asked.model, |bound| bound.0.as_str());
        arrival.asked(wanted);
        let spec = Arc::clone(admit::model(catalog, wanted, key)?);
        let company = catalog.asked(wanted).and_then(|asked| asked.group).map(str::to_owned);
        let mut body = received.bytes.clone();
        let filtered;
        if inference.body == BodyKind::Json && !spec.filters.is_empty() {
            body = filter::apply(body, &spec.filters)?;
            filtered = body.clone();
            asked = match bound {
                Some(_) => parse::parse_any(&filtered)?,
                None => parse::parse(&filtered)?,
            };
        }
        let stream = asked.stream;
        let mut edits = Vec::new();
        edits.extend(asked.rename(spec.served_name()));
        let usage =
            (stream && may_inject(inference, &spec)).then(|| asked.include_usage(&body)).flatten();
        let remove_usage = usage.is_some();
        edits.extend(usage);
        let body = parse::apply(body.clone(), edits);

        let (is_work, queue) =
            underway::work_of(&gateway.watched, &spec, &head.method, inference.upstream);
        let query = head.uri.query().map_or(String::new(), |query| format!("?{query}"));
        let outgoing = Outgoing {
            method: head.method,
            path_and_query: format!("{}{query}", inference.upstream),
            headers: forward::request_headers(head.headers, id),
            body,
        };
        let peer = head.extensions.get::<ConnectInfo<std::net::SocketAddr>>().map(|peer| peer.0);
        let waiting = spec.waiting.unwrap_or(catalog.settings.waiting);
        Ok(Job {
            account: arrival.admitted(spec.name.clone()),
            gateway: Arc::clone(gateway),
            api: inference.api,
            options: RequestOptions {
                model: spec.name.clone(),
                priority: wishes.priority(&spec, key),
                max_wait: wishes.max_wait(key),
                may_hurry: admit::may_hurry(key),
                never_start: wishes.never_start(key),
                retry_of: None,
            },
            waiting: (stream && waiting.style != WaitingStyle::Off).then_some(waiting),
            queue_timeout: catalog.settings.queue.timeout,
            spec,
            company,
            outgoing,
            held: received.held,
            remove_usage,
            viewer: auth::viewer(key, peer),
            arrived,
            is_visit: !is_work,
            queue,
            following: None,
        })
    }
}

/// llama.cpp tells its figures in every stream by itself.
fn may_inject(inference: &Inference, spec: &ModelSpec) -> bool {
    spec.include_usage
        && matches!(inference.api, Api::Chat | Api::Completions)
        && spec.engine != EngineKind::Llamacpp
        // Whoever configures that field means it.
        && !spec.filters.touch("stream_options")
}

/// Where a request is, for those who tell its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Admitted,
    Waiting(RequestId),
    Forwarded,
}

/// An admitted request.
pub struct Job {
    pub gateway: Arc<Gateway>,
    pub api: Api,
    pub spec: Arc<ModelSpec>,
    /// How a waiting stream is told what happens; `None`: the head is held to the end.
    pub waiting: Option<WaitingSettings>,
    /// The group that was asked for with the model.
    company: Option<String>,
    options: RequestOptions,
    outgoing: Outgoing,
    /// The body's share of `queue.total_bodies`.
    held: Held,
    remove_usage: bool,
    viewer: Viewer,
    account: Account,
    arrived: Time,
    queue_timeout: Duration,
    /// `engine: http`: no work, so served by a ready instance or not at all.
    is_visit: bool,
    /// `engine: http`: where the server says what of its work is under way.
    queue: Option<Queue>,
    following: Option<Following>,
}

impl Job {
    /// To the head of the upstream answer. Dropping the future frees everything.
    pub async fn run(mut self, stage: watch::Sender<Stage>) -> Result<Answer, Reject> {
        let cancelled = self.account.cancelled().clone();
        let forwarded = tokio::select! {
            biased;
            forwarded = self.forwarded(&stage) => forwarded,
            () = cancelled.cancelled() => Err(Reject::cancelled(&self.spec.name)),
        };
        match forwarded {
            Ok((response, lease, timing)) => {
                drop(self.held);
                let (head, body) = response.into_parts();
                let limits = self.gateway.limits.clone();
                let (account, remove_usage) = (self.account, self.remove_usage);
                let first_within =
                    self.spec.answer_timeout.map(|limit| limit.saturating_sub(timing.upstream));
                Ok(Answer {
                    head,
                    body,
                    lease,
                    timing,
                    account,
                    remove_usage,
                    first_within,
                    limits,
                })
            }
            Err(reject) => {
                let code = reject.code();
                if code.starts_with("upstream_") {
                    self.account.refused(&reject, "upstream_error");
                    tracing::warn!(model = %self.spec.name, "{}", reject.problem().message);
                } else {
                    self.account.refused(&reject, code);
                    if code != "cancelled" {
                        self.gateway.metrics.refused(code);
                    }
                }
                Err(reject)
            }
        }
    }

    async fn forwarded(
        &mut self,
        stage: &watch::Sender<Stage>,
    ) -> Result<(http::Response<Incoming>, Lease, Timing), Reject> {
        let mut waited = Duration::ZERO;
        loop {
            let asked = Instant::now();
            let lease = self.lease(stage).await?;
            let lease = self.on_adapter(lease).await?;
            stage.send_replace(Stage::Forwarded);
            waited += asked.elapsed();
            if !lease.is_visit() {
                self.account.granted(lease.start, waited);
            }
            self.following = self.queue.as_ref().map(|queue| queue.follow(&lease));
            let mut timing = self.timing(waited);
            let sent = Instant::now();
            let silence_max =
                self.spec.answer_timeout.unwrap_or(self.gateway.limits.upstream_silence);
            let failure = match forward::send(&lease, &self.outgoing, silence_max).await {
                Ok(response) => {
                    timing.upstream = sent.elapsed();
                    return Ok((response, lease, timing));
                }
                Err(failure) => failure,
            };
            let gate = Arc::clone(lease.gate());
            drop(lease);
            self.judge(failure, &gate).await?;
        }
    }

    async fn lease(&self, stage: &watch::Sender<Stage>) -> Result<Lease, Reject> {
        let handle = &self.gateway.handle;
        if self.is_visit {
            let visit = handle.gates().get(&self.spec.name).and_then(Gate::visit);
            return visit.ok_or_else(|| {
                let model = &self.spec.name;
                self.refused(&Refusal::NotLoaded).saying(format!(
                    "\"{model}\" is not loaded, and this request does not load it: only what \
                     `http.activity` names does; send such a request, or POST /models/{model}/load"
                ))
            });
        }
        let ready = if self.options.never_start {
            handle.gate(&self.spec.name).as_ref().and_then(Gate::try_lease_quietly)
        } else {
            handle.try_lease(&self.spec.name)
        };
        if let Some(lease) = ready {
            self.call_company();
            return Ok(lease);
        }
        let mut waiting = handle.request(self.options.clone());
        self.call_company();
        stage.send_replace(Stage::Waiting(waiting.id));
        let refusal = match timeout(self.queue_timeout + WAIT_BACKSTOP, waiting.decision()).await {
            Ok(Ok(lease)) => return Ok(lease),
            Ok(Err(refusal)) => refusal,
            Err(_) => Refusal::QueueTimeout {
                waited_ms: handle.now().since(self.arrived).as_millis().try_into().unwrap_or(0),
                waiting_for: "the orchestrator gave no answer".into(),
            },
        };
        Err(self.refused(&refusal))
    }

    /// The base is there; is the adapter?
    async fn on_adapter(&self, mut lease: Lease) -> Result<Lease, Reject> {
        let handle = &self.gateway.handle;
        let Some(adapter) = handle.adapter_use(&self.spec.name) else { return Ok(lease) };
        let start = !self.options.never_start;
        handle
            .adapter_on(lease.gate(), &self.spec.name, start, ADAPTER_WITHIN)
            .await
            .map_err(|refusal| self.refused(&refusal))?;
        lease.count_on(&adapter);
        Ok(lease)
    }

    /// After the model itself is asked for: its group comes along.
    fn call_company(&self) {
        if let Some(group) = self.company.as_ref().filter(|_| !self.options.never_start) {
            self.gateway.handle.call_company(group);
        }
    }

    /// `Ok`: once more. Only here is it decided what is tried again.
    async fn judge(&mut self, failure: Failure, gate: &Arc<Gate>) -> Result<(), Reject> {
        let model = &self.spec.name;
        let message = match failure {
            Failure::Cancelled => "it was stopped before it answered".to_owned(),
            Failure::Lost(message) => message,
            Failure::Silent(after) => {
                let message = format!(
                    "the engine of model \"{model}\" gave no answer for {} s",
                    after.as_secs()
                );
                let status = StatusCode::GATEWAY_TIMEOUT;
                return Err(Reject::new(status, "upstream_timeout", message).model(model));
            }
            Failure::Broken(why) => {
                let message = format!("the engine of model \"{model}\" cannot be used: {why}");
                return Err(
                    Reject::new(StatusCode::BAD_GATEWAY, "upstream_error", message).model(model)
                );
            }
        };
        if self.options.retry_of.is_some() {
            return Err(self.refused(&Refusal::InstanceLost { message }));
        }
        tracing::info!(%model, "no answer ({message}); trying once more");
        self.options.retry_of = Some(self.arrived);
        self.settle(gate).await;
        Ok(())
    }

    /// Waits until the owner has learned that the instance died, so that the second attempt does
    /// not meet the dead one again; or until it shows that only a pooled connection was stale.
    async fn settle(&self, gate: &Arc<Gate>) {
        let was_open = gate.is_open();
        let learned = || {
            let current = self.gateway.handle.gate(&self.spec.name);
            let replaced = !current.is_some_and(|current| Arc::ptr_eq(&current, gate));
            replaced || gate.is_cancelled() || (was_open && !gate.is_open())
        };
        let settled = async {
            while !learned() {
                sleep(SETTLE_LOOK_EVERY).await;
                if !learned() && forward::accepts(&gate.endpoint.base).await {
                    return;
                }
            }
        };
        let _ = timeout(SETTLE_MAX, settled).await;
    }

    fn refused(&self, refusal: &Refusal) -> Reject {
        let handle = &self.gateway.handle;
        Reject::refusal(refusal, &self.spec.name, &handle.view(), handle.now(), self.viewer)
    }

    fn timing(&self, waited: Duration) -> Timing {
        let handle = &self.gateway.handle;
        // Not worth a look at the ledger where nothing was waited for.
        let swap = if waited < Duration::from_millis(1) {
            Duration::ZERO
        } else {
            swap_share(&handle.view(), &self.spec.name, self.arrived, handle.now()).min(waited)
        };
        Timing { queue: waited - swap, swap, upstream: Duration::ZERO }
    }
}

/// The head of an upstream answer, its body still to come.
pub struct Answer {
    pub head: response::Parts,
    pub body: Incoming,
    pub lease: Lease,
    pub timing: Timing,
    pub account: Account,
    remove_usage: bool,
    first_within: Option<Duration>,
    limits: super::Limits,
}

impl Answer {
    pub fn is_event_stream(&self) -> bool {
        is(&self.head.headers, header::CONTENT_TYPE, "text/event-stream")
    }

    /// As a whole response: the usual way.
    pub fn into_response(self) -> Response {
        let mut headers = self.head.headers.clone();
        forward::response_headers(&mut headers);
        if self.is_event_stream() {
            // An event may be taken out, and proxies before us must not collect any.
            headers.remove(header::CONTENT_LENGTH);
            headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        }
        headers.extend(named(self.account.model().as_str()));
        headers.extend(self.timing.header().map(|value| (Timing::HEADER, value)));
        let status = self.head.status;
        let mut response = Response::new(Body::new(self.into_relay(None)));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    pub fn into_relay(mut self, epilogue: Option<bytes::Bytes>) -> Relay {
        let plain = !self.head.headers.contains_key(header::CONTENT_ENCODING);
        let events = plain && self.is_event_stream();
        self.account.answered(self.head.status, &self.head.headers, self.is_event_stream());
        let meter = match (plain, events) {
            (false, _) => Meter::Blind,
            (true, true) => Meter::events(self.remove_usage),
            (true, false) => Meter::json(),
        };
        let source = Source {
            status: self.head.status,
            body: self.body,
            lease: self.lease,
            account: self.account,
            meter,
            events,
            epilogue,
            first_within: self.first_within,
        };
        Relay::new(source, &self.limits)
    }
}

/// `X-Wharf-Model`, where the name can be a header value.
pub fn named(model: &str) -> Option<(http::HeaderName, HeaderValue)> {
    let value = HeaderValue::from_bytes(model.as_bytes()).ok()?;
    Some((http::HeaderName::from_static("x-wharf-model"), value))
}

fn is(headers: &HeaderMap, name: http::HeaderName, start: &str) -> bool {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok()?.get(..start.len()))
        .is_some_and(|value| value.eq_ignore_ascii_case(start))
}
