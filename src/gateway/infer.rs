//! One inference request from its head to its lease and its upstream answer.

mod passing;

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use http::{HeaderValue, Method, StatusCode};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::account::{Account, Arrival};
use super::admit::{self, Wishes};
use super::answer::{Answer, Head, Reply};
use super::choose::{Chosen, Others, choose};
use super::fit::{self, Fitted};
use super::forward::{self, Failure, Outgoing, REQUEST_ID};
use super::receive::{self, Content, Held};
use super::reject::{Reject, Viewer};
use super::routes::{Api, Inference};
use super::timing::{Timing, swap_share};
use super::underway::{self, Following, Queue};
use super::{Gateway, auth, wait};
use crate::config::catalog::{ApiKey, Catalog, ModelSpec, Scope, WaitingSettings, WaitingStyle};
use crate::http1::Fields;
use crate::orchestrator::{Gate, Lease, RequestOptions};
use crate::scheduler::action::Refusal;
use crate::units::{ModelName, RequestId, Time};
use crate::upstream;

pub use passing::Passing;

/// The scheduler ends every wait; this bounds it if it should not.
const WAIT_BACKSTOP: Duration = Duration::from_secs(30);
/// An adapter that somebody unloaded is loaded again for a request.
const ADAPTER_WITHIN: Duration = Duration::from_secs(120);
/// How long a retry waits for the owner to learn that the instance died.
const SETTLE_MAX: Duration = Duration::from_secs(1);
const SETTLE_LOOK_EVERY: Duration = Duration::from_millis(50);

/// A `POST` to a path of inference.
#[derive(Debug)]
pub struct Asking<'a> {
    pub query: Option<String>,
    pub headers: Fields,
    pub body: Content,
    pub peer: Option<SocketAddr>,
    /// The model of the front door through which it came.
    pub bound: Option<&'a ModelName>,
}

impl<'a> Asking<'a> {
    pub fn new(request: Request, peer: Option<SocketAddr>, bound: Option<&'a ModelName>) -> Self {
        let (head, body) = request.into_parts();
        let query = head.uri.query().map(str::to_owned);
        let headers = Fields::from(&head.headers);
        Asking { query, headers, body: body.into(), peer, bound }
    }
}

pub async fn infer(
    gateway: &Arc<Gateway>,
    inference: &'static Inference,
    asking: Asking<'_>,
) -> Reply {
    let id = admit::request_id(&asking.headers, || gateway.fresh_id());
    let mut arrival = Arrival::open(gateway, &Method::POST, inference.path, &id);
    let mut reply = match admit(gateway, inference, asking, &id, &mut arrival).await {
        Ok(job) => wait::respond(job).await,
        Err(reject) => arrival.turned_away(gateway, reject).into(),
    };
    reply.headers.push(&REQUEST_ID, &id);
    reply
}

/// Everything that can be said before a lease is asked for.
async fn admit(
    gateway: &Arc<Gateway>,
    inference: &'static Inference,
    asking: Asking<'_>,
    id: &HeaderValue,
    arrival: &mut Arrival,
) -> Result<Box<Job>, Reject> {
    let arrived = arrival.arrived();
    let catalog = gateway.handle.catalog();
    let Asking { query, headers, body, peer, bound } = asking;
    let entitled = auth::authorize(&catalog.settings, &headers, Scope::Inference)
        .inspect(|key| arrival.entitled(*key))
        .and_then(|key| {
            let wishes = Wishes::read(&headers)?;
            arrival.hold(gateway.limiter.enter(&catalog.settings, key)?);
            Ok((key, wishes))
        });
    let (key, wishes) = match entitled {
        Ok(entitled) => entitled,
        Err(reject) => {
            receive::discard(body, &headers).await;
            return Err(reject);
        }
    };
    let received =
        receive::receive(body, &headers, &catalog.settings.queue, &gateway.bodies, &gateway.limits)
            .await?;
    let catalog = &*catalog;
    let admitted =
        Admitted { gateway, inference, catalog, query, headers, peer, bound, key, wishes, arrived };
    admitted.job(received, id, arrival)
}

struct Admitted<'a> {
    gateway: &'a Arc<Gateway>,
    inference: &'static Inference,
    catalog: &'a Catalog,
    query: Option<String>,
    headers: Fields,
    peer: Option<SocketAddr>,
    bound: Option<&'a ModelName>,
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
    ) -> Result<Box<Job>, Reject> {
        let Admitted { gateway, inference, catalog, bound, key, wishes, .. } = self;
        arrival.received(catalog, || self.headers.to_map(), &received.bytes);
        let asked = fit::read(inference, &received.bytes, &self.headers, bound.is_some())?;
        let wanted = bound.map_or(&*asked.model, ModelName::as_str);
        arrival.asked(wanted);
        let Chosen { spec, rest, within } = choose(&gateway.handle, catalog, wanted, key)?;
        let company = catalog.asked(wanted).and_then(|asked| asked.group).map(str::to_owned);
        let Fitted { body, stream, remove_usage } =
            fit::fit(inference, &received.bytes, asked, &spec)?;
        let mut held = received.held;
        if !rest.is_empty() && body.as_ptr() != received.bytes.as_ptr() {
            held.also(body.len(), &catalog.settings.queue)?;
        }
        let others = (!rest.is_empty()).then(|| {
            let (body, key, headers) = (received.bytes.clone(), key.cloned(), self.headers.clone());
            let failed = Vec::new();
            Box::new(Others { rest, within, inference, body, headers, wishes, key, failed })
        });
        let (is_work, queue) =
            underway::work_of(&gateway.watched, &spec, &Method::POST, inference.upstream);
        let outgoing = Outgoing {
            method: Method::POST,
            path_and_query: match self.query {
                None => Cow::Borrowed(inference.upstream),
                Some(query) => format!("{}?{query}", inference.upstream).into(),
            },
            headers: forward::request_lines(&self.headers, id),
            body,
            hops: wishes.hops,
        };
        let waiting = spec.waiting.unwrap_or(catalog.settings.waiting);
        Ok(Box::new(Job {
            account: arrival.admitted(spec.name.clone()),
            gateway: Arc::clone(gateway),
            api: inference.api,
            options: options(&spec, &wishes, key),
            waiting: (stream && waiting.style != WaitingStyle::Off).then_some(waiting),
            queue_timeout: catalog.settings.queue.timeout,
            spec,
            company,
            outgoing,
            held,
            remove_usage,
            viewer: auth::viewer(key, self.peer),
            arrived: self.arrived,
            is_visit: !is_work,
            queue,
            following: None,
            others,
        }))
    }
}

fn options(spec: &ModelSpec, wishes: &Wishes, key: Option<&ApiKey>) -> RequestOptions {
    RequestOptions {
        model: spec.name.clone(),
        priority: wishes.priority(spec, key),
        max_wait: wishes.max_wait(key),
        may_hurry: admit::may_hurry(key),
        never_start: wishes.never_start(key),
        retry_of: None,
    }
}

/// Where a request is, for those who tell its client.
#[derive(Clone, Debug)]
pub enum Stage {
    Admitted,
    Waiting(RequestId, Arc<ModelSpec>),
    Forwarded,
}

fn tell(listener: Option<&watch::Sender<Stage>>, stage: Stage) {
    if let Some(listener) = listener {
        listener.send_replace(stage);
    }
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
    /// Of a route: who is asked if this model cannot serve.
    others: Option<Box<Others>>,
}

impl Job {
    /// To the head of the upstream answer. Dropping the future frees everything.
    pub async fn run(
        mut self: Box<Self>,
        stage: Option<watch::Sender<Stage>>,
    ) -> Result<Answer, Reject> {
        let cancel = self.account.cancel().clone();
        let forwarded = loop {
            let forwarded = tokio::select! {
                biased;
                forwarded = self.forwarded(stage.as_ref()) => forwarded,
                () = cancel.wished() => Err(Reject::cancelled(&self.spec.name)),
            };
            match forwarded {
                Err(reject) => match self.move_on(reject) {
                    Ok(()) => {}
                    Err(reject) => break Err(reject),
                },
                answered => break answered,
            }
        };
        match forwarded {
            Ok((answer, lease, timing)) => {
                drop(self.held);
                let upstream::Answer { status, headers, body } = answer;
                let head = Head::new(status, headers);
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

    /// Nothing was answered yet: the next model of the route is asked, if there is one.
    fn move_on(&mut self, reject: Reject) -> Result<(), Reject> {
        let Some(others) = &mut self.others else { return Err(reject) };
        if matches!(reject.code(), "cancelled" | "shutting_down") {
            return Err(reject);
        }
        let Some(next) = others.rest.pop_front() else { return Err(others.told(reject)) };
        tracing::info!(model = %self.spec.name, next = %next.name, "{}", reject.problem().message);
        others.failed.push(format!("{}: {}", self.spec.name, reject.code()));
        let asked = fit::read(others.inference, &others.body, &others.headers, false)?;
        let fitted = fit::fit(others.inference, &others.body, asked, &next)?;
        (self.outgoing.body, self.remove_usage) = (fitted.body, fitted.remove_usage);
        self.options = options(&next, &others.wishes, others.key.as_ref());
        let (watched, path) = (&self.gateway.watched, others.inference.upstream);
        let (is_work, queue) = underway::work_of(watched, &next, &self.outgoing.method, path);
        (self.is_visit, self.queue, self.following) = (!is_work, queue, None);
        self.account.moved(next.name.clone());
        self.spec = next;
        Ok(())
    }

    /// The model that will answer, if that is certain.
    pub fn sole_model(&self) -> Option<String> {
        self.others.is_none().then(|| self.spec.name.to_string())
    }

    /// While somebody else can be asked, no longer than the route allows.
    fn patience(&self) -> (Duration, Option<Duration>) {
        let within = self.others.as_ref().filter(|others| !others.rest.is_empty());
        let within = within.map(|others| others.within);
        let whole = self.queue_timeout + WAIT_BACKSTOP;
        (within.map_or(whole, |within| within.min(whole)), within)
    }

    async fn forwarded(
        &mut self,
        stage: Option<&watch::Sender<Stage>>,
    ) -> Result<(upstream::Answer, Lease, Timing), Reject> {
        let mut waited = Duration::ZERO;
        loop {
            let asked = Instant::now();
            let lease = self.lease(stage).await?;
            let lease = self.on_adapter(lease).await?;
            tell(stage, Stage::Forwarded);
            let sent = Instant::now();
            waited += sent - asked;
            if !lease.is_visit() {
                self.account.granted(lease.start, waited, sent.into_std());
            }
            self.following = self.queue.as_ref().map(|queue| queue.follow(&lease));
            let mut timing = self.timing(waited);
            let silence_max =
                self.spec.answer_timeout.unwrap_or(self.gateway.limits.upstream_silence);
            let failure = match forward::send(&lease, &self.outgoing, sent, silence_max).await {
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

    async fn lease(&self, stage: Option<&watch::Sender<Stage>>) -> Result<Lease, Reject> {
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
        tell(stage, Stage::Waiting(waiting.id, Arc::clone(&self.spec)));
        let (patience, within) = self.patience();
        let refusal = match timeout(patience, waiting.decision()).await {
            Ok(Ok(lease)) => return Ok(lease),
            Ok(Err(refusal)) => refusal,
            Err(_) => Refusal::QueueTimeout {
                waited_ms: handle.now().since(self.arrived).as_millis().try_into().unwrap_or(0),
                waiting_for: match within {
                    Some(_) => "its turn did not come within the time of the route".into(),
                    None => "the orchestrator gave no answer".into(),
                },
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
