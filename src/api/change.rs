//! Handlers that change what is loaded.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use backoff::BackoffBuilder;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{bad, declined, not_found, refused, unexpected, unknown_model};
use super::extract::{Body, PathText};
use super::group::{self, Target};
use super::render::{self, Snapshot, seconds};
use super::{Api, ledger, name, stay};
use crate::config::catalog::{Asked, Catalog, ModelSpec};
use crate::gateway::reject::Reject;
use crate::scheduler::action::{Answer, Refusal};
use crate::scheduler::event::EnsureKind;
use crate::scheduler::record::SwapKind;
use crate::units::{ModelName, SwapId, Time};

/// Longest time for which a caller may ask to wait.
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// The ledger's row follows the owner's answer by a few milliseconds.
const LEDGER_LAG_MAX: Duration = Duration::from_secs(1);
/// For whoever does not wait: how long the owner may take to begin a swap. Queued else.
const BEGIN_WITHIN: Duration = Duration::from_millis(250);
const BEGIN_LOOK_EVERY: Duration = Duration::from_millis(2);
/// The owner's answer to a deadline that passed.
const OWNER_LAG_MAX: Duration = Duration::from_secs(1);
/// Above the drain, for stopping the engine and for the proof.
const UNLOAD_MARGIN: Duration = Duration::from_secs(120);

#[derive(Debug, Deserialize)]
pub struct EnsureBody {
    model: Option<String>,
    #[serde(flatten)]
    wait: WaitBody,
}

#[derive(Debug, Deserialize)]
pub struct WaitBody {
    timeout: Option<Timeout>,
    /// `false`: answer 202 at once.
    wait: Option<bool>,
}

/// Seconds, or `"90s"`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Timeout {
    Seconds(f64),
    Text(String),
}

#[derive(Debug, Deserialize)]
pub struct UnloadBody {
    #[serde(default)]
    force: bool,
}

/// `POST /ensure_model`
pub async fn ensure_model(
    State(api): State<Api>,
    Body(body): Body<EnsureBody>,
) -> Result<Response, Reject> {
    let catalog = api.handle.catalog();
    let Some(wanted) = body.model.filter(|model| !model.is_empty()) else {
        return Err(bad("model", "the body must name a model: {\"model\":\"…\"}"));
    };
    let target = Target::of(&catalog, &wanted).ok_or_else(|| unknown_model(&catalog, &wanted))?;
    let timeout = timeout_of(body.wait.timeout.as_ref(), &catalog)?;
    let Asked { spec, group } = match target {
        Target::Model(asked) => asked,
        Target::Group(name, group) => {
            let wait = body.wait.wait != Some(false);
            return group::ensure(&api, name, group, EnsureKind::Ensure, timeout, wait).await;
        }
    };
    if body.wait.wait == Some(false) {
        return begun(&api, spec, EnsureKind::Ensure, timeout, group).await;
    }
    let asked = api.handle.now();
    let answer = ensured(&api, spec, EnsureKind::Ensure, timeout, group).await;
    let ready = ready(&api, &spec.name, answer, timeout, asked).await?;
    Ok(Json(ready.json()).into_response())
}

/// `POST /models/{name}/load`, `/unload` and so on: one route, because names may hold slashes.
pub async fn verb(
    State(api): State<Api>,
    PathText(path): PathText,
    Body(body): Body<Value>,
) -> Result<Response, Reject> {
    let catalog = api.handle.catalog();
    let found = name::split(&path, |name| Target::of(&catalog, name));
    match found {
        Some((Target::Model(asked), "load")) => {
            load(&api, asked, EnsureKind::Load, parse(body)?, &catalog).await
        }
        Some((Target::Model(asked), "wake")) => {
            load(&api, asked, EnsureKind::Wake, parse(body)?, &catalog).await
        }
        Some((Target::Model(Asked { spec, .. }), "sleep")) => {
            stay::sleep(&api, spec, &catalog).await
        }
        Some((Target::Model(Asked { spec, .. }), "pin")) => {
            stay::pin(&api, spec, parse(body)?).await
        }
        Some((Target::Model(Asked { spec, .. }), "extend-ttl")) => {
            stay::extend_ttl(&api, spec, parse(body)?).await
        }
        Some((Target::Model(Asked { spec, .. }), "unload")) => {
            unload(&api, spec, parse(body)?, &catalog).await
        }
        Some((Target::Group(name, group), "load")) => {
            let body: WaitBody = parse(body)?;
            let timeout = timeout_of(body.timeout.as_ref(), &catalog)?;
            let wait = body.wait != Some(false);
            group::ensure(&api, name, group, EnsureKind::Load, timeout, wait).await
        }
        Some((Target::Group(name, group), "unload")) => {
            group::unload(&api, name, group, parse::<UnloadBody>(body)?.force, &catalog).await
        }
        Some((target, verb)) => Err(not_found(
            "not_found",
            format!(
                "POST /models/{}/{verb} does not exist: load, unload, and of one model extend-ttl, \
                 pin, sleep and wake do",
                target.name()
            ),
        )),
        None => {
            let name = path.rsplit_once('/').map_or(path.as_str(), |(name, _verb)| name);
            Err(unknown_model(&catalog, name))
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(body: Value) -> Result<T, Reject> {
    serde_json::from_value(body)
        .map_err(|error| bad("body", format!("the body is not as expected: {error}")))
}

async fn load(
    api: &Api,
    Asked { spec, group }: Asked<'_>,
    kind: EnsureKind,
    body: WaitBody,
    catalog: &Catalog,
) -> Result<Response, Reject> {
    let timeout = timeout_of(body.timeout.as_ref(), catalog)?;
    if body.wait == Some(false) {
        return begun(api, spec, kind, timeout, group).await;
    }
    let asked = api.handle.now();
    let answer = ensured(api, spec, kind, timeout, group).await;
    let ready = ready(api, &spec.name, answer, timeout, asked).await?;
    let message = match (ready.swapped, kind) {
        (true, EnsureKind::Wake) => format!("Model {} woken", spec.name),
        (true, _) => format!("Model {} loaded", spec.name),
        (false, _) => format!("Model {} is loaded already", spec.name),
    };
    let mut body = render::object(ready.json());
    body.extend(render::object(render::done(&spec.name, message)));
    Ok(Json(body).into_response())
}

async fn unload(
    api: &Api,
    spec: &ModelSpec,
    body: UnloadBody,
    catalog: &Catalog,
) -> Result<Response, Reject> {
    let name = &spec.name;
    let was_loaded = unloaded(api, spec, body.force, catalog).await?;
    let message = match was_loaded {
        true => format!("Model {name} unloaded"),
        false => format!("Model {name} was not loaded"),
    };
    let mut body = render::object(render::done(name, message));
    body.insert("was_loaded".to_owned(), json!(was_loaded));
    Ok(Json(body).into_response())
}

/// How long a drain, the end of the engine and the proof of its memory may take.
pub(super) fn unload_limit(spec: &ModelSpec, catalog: &Catalog) -> Duration {
    let swap = &catalog.settings.swap;
    swap.drain_timeout + swap.vram_timeout + spec.stop.grace + UNLOAD_MARGIN
}

/// Whether it was loaded; answers when it is gone.
pub(super) async fn unloaded(
    api: &Api,
    spec: &ModelSpec,
    force: bool,
    catalog: &Catalog,
) -> Result<bool, Reject> {
    let name = &spec.name;
    let limit = unload_limit(spec, catalog);
    let answer = tokio::time::timeout(limit, api.handle.unload(name.clone(), force)).await;
    match answer {
        Ok(Answer::Unloaded { was_loaded }) => Ok(was_loaded),
        Ok(Answer::Refused(refusal)) => Err(refused(&refusal, name, api)),
        Ok(Answer::TimedOut { swap }) => Err(not_yet(api, name, limit, swap, "unloaded")),
        Err(_) => Err(not_yet(api, name, limit, None, "unloaded")),
        Ok(answer) => Err(unexpected("unload", &answer)),
    }
}

/// The owner keeps the deadline; should it not, the caller still gets an answer. `company`: the
/// group that comes along.
pub(super) async fn ensured(
    api: &Api,
    spec: &ModelSpec,
    kind: EnsureKind,
    timeout: Duration,
    company: Option<&str>,
) -> Answer {
    let answer = api.handle.ensure(spec.name.clone(), kind, timeout);
    let answer = tokio::time::timeout(timeout + OWNER_LAG_MAX, answer);
    // Polled second: the model is asked for before its company.
    let called = async { company.inspect(|group| api.handle.call_company(group)) };
    let (answer, _) = tokio::join!(biased; answer, called);
    answer.unwrap_or(Answer::TimedOut { swap: None })
}

/// 202: the swap goes on (or begins) without the caller. What is refused at once is refused.
async fn begun(
    api: &Api,
    spec: &ModelSpec,
    kind: EnsureKind,
    timeout: Duration,
    company: Option<&str>,
) -> Result<Response, Reject> {
    let mut answer = api.handle.ensure_detached(spec.name.clone(), kind, timeout);
    company.inspect(|group| api.handle.call_company(group));
    let begins = async {
        let mut look = tokio::time::interval(BEGIN_LOOK_EVERY);
        loop {
            look.tick().await;
            let view = api.handle.view();
            let swap = view.model(&spec.name).and_then(|model| view.swap(model.swap?));
            if let Some(load) = swap.filter(|swap| swap.kind == SwapKind::Load) {
                return load.id;
            }
        }
    };
    let swap = tokio::select! {
        biased;
        answer = &mut answer => match answer {
            Ok(Answer::Refused(refusal)) => return Err(refused(&refusal, &spec.name, api)),
            Ok(Answer::Ready { swap, .. }) => swap,
            Ok(Answer::Declined { why }) => return Err(declined(&spec.name, why)),
            Ok(Answer::TimedOut { .. }) => None,
            Ok(answer) => return Err(unexpected("load", &answer)),
            Err(_) => return Err(refused(&Refusal::ShuttingDown, &spec.name, api)),
        },
        swap = tokio::time::timeout(BEGIN_WITHIN, begins) => swap.ok(),
    };
    let at = Snapshot::of(&api.handle);
    let body = json!({
        "status": "accepted",
        "model": spec.name,
        "state": at.residency(&spec.name).as_str(),
        "swap_id": swap.map(|id| id.to_string()),
        "message": format!("GET /models/{} and GET /swaps tell how far it is", spec.name),
    });
    Ok((StatusCode::ACCEPTED, Json(body)).into_response())
}

/// What a caller of ensure or load is told.
pub(super) struct Ready {
    pub model: ModelName,
    pub swapped: bool,
    swap: Option<SwapId>,
    /// The swap's row, when a swap made the model ready.
    row: Option<Value>,
    waited: Duration,
}

impl Ready {
    pub fn json(&self) -> Value {
        let of_swap = |field: &str| self.row.as_ref().map(|row| row[field].clone());
        json!({
            "status": "ready",
            "model": self.model,
            "state": "ready",
            "swapped": self.swapped,
            "from": of_swap("from"),
            "evicted": of_swap("evicted").unwrap_or(json!([])),
            "swap_id": self.swap.map(|id| id.to_string()),
            "seconds": of_swap("seconds").unwrap_or(json!(0.0)),
            "phases": of_swap("phases").unwrap_or(json!({})),
            "waited_seconds": seconds(self.waited),
        })
    }
}

pub(super) async fn ready(
    api: &Api,
    model: &ModelName,
    answer: Answer,
    timeout: Duration,
    asked: Time,
) -> Result<Ready, Reject> {
    let waited = api.handle.now().since(asked);
    match answer {
        Answer::Ready { swap, swapped, .. } => {
            let row = match swap.filter(|_| swapped) {
                Some(id) => ended_row(api, id).await,
                None => None,
            };
            Ok(Ready { model: model.clone(), swapped, swap, row, waited })
        }
        Answer::TimedOut { swap } => Err(not_yet(api, model, timeout, swap, "ready")),
        Answer::Refused(refusal) => Err(refused(&refusal, model, api)),
        Answer::Declined { why } => Err(declined(model, why)),
        answer => Err(unexpected("load", &answer)),
    }
}

/// The ledger's row of a swap that has just ended; as it stands if the row does not come.
async fn ended_row(api: &Api, id: SwapId) -> Option<Value> {
    let mut pauses = backoff::ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(1))
        .with_total_delay(Some(LEDGER_LAG_MAX))
        .without_max_times()
        .build();
    loop {
        let at = Snapshot::of(&api.handle);
        let swap = at.view.swap(id);
        if swap.is_some_and(|swap| swap.ended.is_some()) {
            return swap.map(|swap| ledger::row(&at, swap));
        }
        match pauses.next() {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return swap.map(|swap| ledger::row(&at, swap)),
        }
    }
}

/// 504: the deadline passed; what was begun goes on.
fn not_yet(
    api: &Api,
    model: &ModelName,
    limit: Duration,
    swap: Option<SwapId>,
    wanted: &str,
) -> Reject {
    let at = Snapshot::of(&api.handle);
    let swap = swap.or_else(|| at.view.model(model)?.swap);
    let limit = humantime::format_duration(limit);
    let mut message = format!("{model} is not {wanted} after {limit}");
    let row = swap.and_then(|id| at.view.swap(id));
    if let Some(row) = row {
        message.push_str(&format!("; swap {} goes on", row.id));
        if let Some((phase, _)) = row.phase {
            message.push_str(&format!(", phase {}", phase.as_str()));
        }
        if let Some(progress) = at.view.progress_of(model).filter(|now| !now.stage.is_empty()) {
            message.push_str(&format!(" ({})", progress.stage));
        }
    }
    let reject =
        Reject::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message).model(model).swap(swap);
    let waiting_for = at.view.model(model).map(|model| model.waiting_for.as_str());
    match waiting_for.filter(|text| !text.is_empty()) {
        Some(text) => reject.because(text),
        None => reject,
    }
}

fn timeout_of(asked: Option<&Timeout>, catalog: &Catalog) -> Result<Duration, Reject> {
    let parsed = match asked {
        None => return Ok(catalog.settings.queue.timeout),
        Some(Timeout::Seconds(seconds)) => Duration::try_from_secs_f64(*seconds).ok(),
        Some(Timeout::Text(text)) => humantime::parse_duration(text).ok(),
    };
    parsed.filter(|timeout| *timeout <= TIMEOUT_MAX).ok_or_else(|| {
        bad("timeout", "timeout must be seconds or a text like \"90s\", at most one hour")
    })
}
