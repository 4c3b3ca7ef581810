//! One inference request from its head to its lease and its upstream answer.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header, request, response};
use hyper::body::Incoming;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::account::{self, Account};
use super::admit::{self, Wishes};
use super::forward::{self, Failure, Outgoing};
use super::receive::{self, Held};
use super::reject::{Reject, Viewer};
use super::relay::{Relay, Source};
use super::routes::{Api, BodyKind, Inference};
use super::timing::{Timing, swap_share};
use super::usage::Meter;
use super::{Gateway, auth, multipart, parse, wait};
use crate::config::catalog::{
    ApiKey, Catalog, EngineKind, ModelSpec, Scope, WaitingSettings, WaitingStyle,
};
use crate::orchestrator::{Gate, Lease, RequestOptions};
use crate::scheduler::action::Refusal;
use crate::units::{RequestId, Time};

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
    let mut response = match admit(&gateway, inference, request, &id).await {
        Ok(job) => wait::respond(job).await,
        Err(reject) => {
            account::turned_away(&id, reject.code());
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
) -> Result<Job, Reject> {
    let arrived = gateway.handle.now();
    let catalog = gateway.handle.catalog();
    let (head, body) = request.into_parts();
    let entitled =
        auth::authorize(&catalog.settings, &head.headers, Scope::Inference).and_then(|key| {
            let wishes = Wishes::read(&head.headers)?;
            let permit = gateway.limiter.enter(&catalog.settings, key)?;
            Ok((key, wishes, permit))
        });
    let (key, wishes, permit) = match entitled {
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
    let mut job = admitted.job(received, id)?;
    job.account.hold(permit);
    Ok(job)
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
    fn job(self, received: receive::Received, id: &HeaderValue) -> Result<Job, Reject> {
        let Admitted { gateway, inference, catalog, head, key, wishes, arrived } = self;
        let asked = match inference.body {
            BodyKind::Json => parse::parse(&received.bytes)?,
            BodyKind::Form => multipart::parse(&received.bytes, &head.headers)?,
        };
        let spec = Arc::clone(admit::model(catalog, &asked.model, key)?);
        let company = catalog.asked(&asked.model).and_then(|asked| asked.group).map(str::to_owned);
        let stream = asked.stream;
        let mut edits = Vec::new();
        edits.extend(asked.rename(spec.served_name()));
        let usage = (stream && may_inject(inference, &spec))
            .then(|| asked.include_usage(&received.bytes))
            .flatten();
        let remove_usage = usage.is_some();
        edits.extend(usage);
        let body = parse::apply(received.bytes.clone(), edits);

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
            account: Account::open(
                Arc::clone(&gateway.metrics),
                spec.name.clone(),
                id.to_str().unwrap_or_default().to_owned(),
            ),
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
        })
    }
}

/// llama.cpp tells its figures in every stream by itself.
fn may_inject(inference: &Inference, spec: &ModelSpec) -> bool {
    spec.include_usage
        && matches!(inference.api, Api::Chat | Api::Completions)
        && spec.engine != EngineKind::Llamacpp
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
}

impl Job {
    /// To the head of the upstream answer. Dropping the future frees everything.
    pub async fn run(mut self, stage: watch::Sender<Stage>) -> Result<Answer, Reject> {
        match self.forwarded(&stage).await {
            Ok((response, lease, timing)) => {
                drop(self.held);
                let (head, body) = response.into_parts();
                let limits = self.gateway.limits.clone();
                let (account, remove_usage) = (self.account, self.remove_usage);
                Ok(Answer { head, body, lease, timing, account, remove_usage, limits })
            }
            Err(reject) => {
                let code = reject.code();
                if code.starts_with("upstream_") {
                    self.account.end("upstream_error");
                    tracing::warn!(model = %self.spec.name, "{}", reject.problem().message);
                } else {
                    self.account.end(code);
                    self.gateway.metrics.refused(code);
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
            self.account.granted(lease.start, waited);
            let mut timing = self.timing(waited);
            let sent = Instant::now();
            let silence_max = self.gateway.limits.upstream_silence;
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

    pub fn into_relay(self, epilogue: Option<bytes::Bytes>) -> Relay {
        let plain = !self.head.headers.contains_key(header::CONTENT_ENCODING);
        let events = plain && self.is_event_stream();
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
