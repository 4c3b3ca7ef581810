//! Tells registries (`announce`) which models are ready and where: `POST {url}/register` when an
//! instance became ready, `POST {url}/deregister` when it went.
//!
//! One task per registry compares what is ready with what it was told, and tells the difference. So
//! nothing queues up while a registry is away (it is told what holds when it is back), one that is
//! dead holds up nobody, and one instance is told at most once more than needed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use backoff::BackoffBuilder;
use bytes::Bytes;
use http::{HeaderValue, Method, header};
use http_body_util::{BodyExt, Limited};
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::api::reachable;
use crate::config::catalog::Announce;
use crate::http1::Lines;
use crate::orchestrator::Handle;
use crate::runtime::Endpoint;
use crate::runtime::tls::Tls;
use crate::scheduler::record::ResidencyView;
use crate::units::ModelName;
use crate::upstream::{Call, CallError, UpstreamClient};

/// One call to a registry.
const CALL_MAX: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// After a failed call.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// At the end of Wharf, for all that has to be deregistered.
const FAREWELL_MAX: Duration = Duration::from_secs(3);

/// What a registry is told of one ready model: the body of both calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Service {
    /// Unique in one Wharf: `wharf/qwen:7b`.
    name: String,
    service: &'static str,
    model_id: ModelName,
    model_type: String,
    /// The model's front door, else the gateway.
    endpoint: String,
    port: u16,
    health: String,
    tags: Vec<String>,
    instance: String,
}

type Services = BTreeMap<ModelName, Service>;
/// `false`: it may have been heard, no answer came.
type Told = BTreeMap<ModelName, (Service, bool)>;

/// Follows the configuration and the models until `stop`; then says goodbye.
pub fn spawn(handle: Handle, stop: CancellationToken) -> JoinHandle<()> {
    tokio::spawn(async move {
        let (ready, services) = watch::channel(Services::new());
        let mut published = handle.published();
        let mut registries: Vec<(Announce, CancellationToken)> = Vec::new();
        let mut tasks = JoinSet::new();
        while !stop.is_cancelled() {
            let wanted = handle.catalog().settings.announce.clone();
            registries.retain(|(registry, stop)| {
                let stays = wanted.contains(registry);
                if !stays {
                    stop.cancel();
                }
                stays
            });
            for registry in wanted {
                if registries.iter().all(|(known, _)| *known != registry) {
                    let stop = stop.child_token();
                    tasks.spawn(tell(registry.clone(), services.clone(), stop.clone()));
                    registries.push((registry, stop));
                }
            }
            if !registries.is_empty() {
                let now = ready_now(&handle);
                ready.send_if_modified(|told| {
                    let differs = *told != now;
                    *told = now;
                    differs
                });
            }
            while tasks.try_join_next().is_some() {}
            tokio::select! {
                changed = published.changed() => if changed.is_err() { break },
                () = stop.cancelled() => {}
            }
        }
        while tasks.join_next().await.is_some() {}
    })
}

fn ready_now(handle: &Handle) -> Services {
    let (catalog, view, doors) = (handle.catalog(), handle.view(), handle.front_doors());
    let ready =
        view.scheduler.models.iter().filter(|model| model.residency == ResidencyView::Ready);
    ready
        .filter_map(|model| {
            let spec = catalog.model(&model.name)?;
            let door = doors.get(&model.name).copied();
            let address: SocketAddr = reachable(door.unwrap_or(catalog.settings.gateway));
            let endpoint = format!("{}://{address}", catalog.settings.scheme());
            let service = Service {
                name: format!("wharf/{}", model.name),
                service: "wharf",
                model_id: model.name.clone(),
                model_type: spec.model_type.clone(),
                health: format!("{endpoint}/health"),
                endpoint,
                port: address.port(),
                tags: spec.tags.clone(),
                instance: model.instance.map(|id| id.to_string()).unwrap_or_default(),
            };
            Some((model.name.clone(), service))
        })
        .collect()
}

/// What is to be told next: what went first, so that an endpoint is free before it is given anew.
/// `failed`: models about which the registry would not hear just now; the others go on.
fn next(
    told: &Told,
    ready: &Services,
    failed: &BTreeSet<ModelName>,
) -> Option<(&'static str, Service)> {
    let mut told_of = told.iter().filter(|(name, _)| !failed.contains(*name));
    let gone = told_of.find(|(name, (service, _))| ready.get(*name) != Some(service));
    if let Some((_, (service, _))) = gone {
        return Some(("deregister", service.clone()));
    }
    let heard = |name: &ModelName| told.get(name).is_some_and(|(_, certain)| *certain);
    let new = ready.iter().find(|(name, _)| !heard(name) && !failed.contains(*name));
    new.map(|(_, service)| ("register", service.clone()))
}

fn pauses() -> backoff::ExponentialBackoff {
    let pauses = backoff::ExponentialBuilder::new();
    pauses
        .with_min_delay(RETRY_MIN)
        .with_max_delay(RETRY_MAX)
        .without_max_times()
        .with_jitter()
        .build()
}

async fn tell(
    registry: Announce,
    mut services: watch::Receiver<Services>,
    stop: CancellationToken,
) {
    let mut told = Told::new();
    let client = match client(&registry) {
        Ok(client) => client,
        Err(why) => {
            tracing::error!("announce {}: {why}; nothing is announced there", registry.url);
            return;
        }
    };
    let mut pauses = self::pauses();
    let mut failing = false;
    // About whom it would not hear, and when it is asked again.
    let (mut failed, mut again) = (BTreeSet::new(), None);
    while !stop.is_cancelled() {
        let wanted = services.borrow_and_update().clone();
        let Some((verb, service)) = next(&told, &wanted, &failed) else {
            let due = async {
                match again {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {
                    again = None;
                    failed.clear();
                }
                changed = services.changed() => if changed.is_err() { break },
                () = stop.cancelled() => {}
            }
            continue;
        };
        if verb == "register" {
            // Cut off by our end it may have been heard, too.
            told.insert(service.model_id.clone(), (service.clone(), false));
        }
        let called = tokio::select! {
            called = call(&client, &registry, verb, &service) => called,
            () = stop.cancelled() => break,
        };
        match called {
            Ok(()) => {
                if std::mem::take(&mut failing) {
                    tracing::info!("announce {}: it answers again", registry.url);
                }
                if failed.is_empty() {
                    pauses = self::pauses();
                }
                match verb {
                    "register" => drop(told.insert(service.model_id.clone(), (service, true))),
                    _ => drop(told.remove(&service.model_id)),
                }
            }
            Err(why) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!("announce {}: {why}; trying again", registry.url);
                }
                failed.insert(service.model_id);
                let pause = || Instant::now() + pauses.next().unwrap_or(RETRY_MAX);
                again = Some(again.unwrap_or_else(pause));
            }
        }
    }
    let until = Instant::now() + FAREWELL_MAX;
    for (service, _) in told.values() {
        let farewell = call(&client, &registry, "deregister", service);
        if !matches!(timeout_at(until, farewell).await, Ok(Ok(()))) {
            tracing::warn!("announce {}: it was not told that {} goes", registry.url, service.name);
            return;
        }
    }
}

fn client(registry: &Announce) -> Result<UpstreamClient, String> {
    let mut endpoint = Endpoint::new(&registry.url, None);
    if registry.url.starts_with("https://") {
        endpoint.tls = Some(Tls::new(registry.ca.as_deref())?);
    }
    Ok(UpstreamClient::to(&endpoint))
}

async fn call(
    client: &UpstreamClient,
    registry: &Announce,
    verb: &str,
    service: &Service,
) -> Result<(), String> {
    let body = serde_json::to_vec(service).map_err(|error| error.to_string())?;
    let mut headers = Lines::default();
    headers.push(&header::CONTENT_TYPE, &HeaderValue::from_static("application/json"));
    if let Some(key) = &registry.key {
        let bearer = format!("Bearer {key}").try_into();
        headers.push(&header::AUTHORIZATION, &bearer.map_err(|_| "its key is no header value")?);
    }
    let call = Call {
        method: &Method::POST,
        path_and_query: &format!("/{verb}"),
        headers: &headers,
        more: &Lines::default(),
        body: &Bytes::from(body),
    };
    let until = Instant::now() + CALL_MAX;
    let silent = || format!("no answer to {verb} within {CALL_MAX:?}");
    let exchange = async {
        let answer = client.request(call, until).await.map_err(|error| match error {
            CallError::Silent => silent(),
            error => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                source.unwrap_or_else(|| error.to_string())
            }
        })?;
        let status = answer.status;
        // Read to its end, so that the connection can be used again.
        let _ = Limited::new(answer.body, ANSWER_BYTES_MAX).collect().await;
        let unknown = verb == "deregister" && status == http::StatusCode::NOT_FOUND;
        if status.is_success() || unknown {
            Ok(())
        } else {
            Err(format!("{verb} answered {status}"))
        }
    };
    timeout_at(until, exchange).await.unwrap_or_else(|_| Err(silent()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, instance: &str) -> (ModelName, Service) {
        let service = Service {
            name: format!("wharf/{name}"),
            service: "wharf",
            model_id: ModelName::new(name),
            model_type: "llm".to_owned(),
            endpoint: "http://127.0.0.1:8051".to_owned(),
            port: 8051,
            health: "http://127.0.0.1:8051/health".to_owned(),
            tags: Vec::new(),
            instance: instance.to_owned(),
        };
        (ModelName::new(name), service)
    }

    #[test]
    fn the_difference_is_told_and_what_goes_comes_first() {
        let told = |known: &[(ModelName, Service)], certain| -> Told {
            let known = known.iter().cloned();
            known.map(|(name, service)| (name, (service, certain))).collect()
        };
        let ready = Services::from([service("b", "i3"), service("c", "i4")]);
        let step_without = |told: Told, failed: &[&str]| {
            let failed = failed.iter().map(|name| ModelName::new(*name)).collect();
            next(&told, &ready, &failed).map(|(verb, it)| (verb, it.instance))
        };
        let step = |told: Told| step_without(told, &[]);
        let go = |instance: &str| Some(("deregister", instance.to_owned()));
        let come = |instance: &str| Some(("register", instance.to_owned()));
        assert_eq!(step(told(&[service("a", "i1"), service("b", "i2")], true)), go("i1"));
        assert_eq!(step(told(&[service("b", "i2")], true)), go("i2"), "another instance");
        assert_eq!(step(told(&[service("b", "i2")], false)), go("i2"), "it may have been heard");
        assert_eq!(step(Told::new()), come("i3"));
        assert_eq!(step(told(&[service("b", "i3")], true)), come("i4"));
        let all = [service("b", "i3"), service("c", "i4")];
        assert_eq!(step(told(&all, false)), come("i3"), "once more");
        assert_eq!(step(told(&all, true)), None);
        assert_eq!(step_without(Told::new(), &["b"]), come("i4"), "one refused, the others not");
        assert_eq!(step_without(told(&[service("a", "i1")], true), &["a"]), come("i3"));
        assert_eq!(step_without(Told::new(), &["b", "c"]), None);
    }
}
