//! The one task that follows the daemon: is it there, and which containers ended.
//!
//! ```text
//!   away ── connected, all watched containers looked at ──► here ── stream ended, no ping ──► away
//! ```
//! While it is away nothing is reported as ended. The events stream makes an end known within
//! milliseconds; a periodic look at all watched containers makes sure that none is missed.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use backoff::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use bollard::models::EventMessage;
use bollard::query_parameters::{EventsOptionsBuilder, ListContainersOptionsBuilder};
use futures_util::future::join_all;
use futures_util::{Stream, StreamExt as _};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::client::{Client, PROMPT};
use super::errors;
use super::watched::{NOT_CONNECTED, Watched};
use crate::scheduler::event::{Fault, FaultKind};

/// How often the daemon is pinged and all watched containers are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_secs(2);

pub fn delays(first: Duration, max: Duration) -> ExponentialBackoff {
    let delays = ExponentialBuilder::new().with_min_delay(first).with_max_delay(max);
    delays.without_max_times().build()
}

/// Never ends; its owner aborts it.
pub async fn follow(client: Client, watched: Arc<Watched>) {
    let mut waits = delays(RECONNECT_FIRST, RECONNECT_MAX);
    loop {
        let fault = match begin(&client, &watched).await {
            Ok(events) => {
                waits = delays(RECONNECT_FIRST, RECONNECT_MAX);
                session(&client, &watched, events).await
            }
            Err(fault) => fault,
        };
        client.forget();
        // Told once, here: what fails for this reason meanwhile repeats it in answers only.
        let known = watched.health().borrow().clone();
        if known.ok {
            tracing::warn!(host = client.host(), reason = fault.message, "Docker went away");
        } else if known.detail == NOT_CONNECTED {
            tracing::warn!(
                "{}; what an earlier run left there is looked up when it answers",
                fault.message
            );
        }
        watched.set_health(false, fault.message);
        tokio::time::sleep(waits.next().unwrap_or(RECONNECT_MAX)).await;
    }
}

/// Connects, subscribes, and looks at everything that may have ended meanwhile.
async fn begin(
    client: &Client,
    watched: &Arc<Watched>,
) -> Result<impl Stream<Item = Result<EventMessage, bollard::errors::Error>> + use<>, Fault> {
    let daemon = client.daemon().await?;
    let docker = client.docker().await?;
    // The request is sent when the stream is first polled. Asking for events since a moment
    // before the look at everything leaves no gap between the two.
    let since = daemon.now.map(|now| now.to_string());
    let filters = HashMap::from([("type", vec!["container"]), ("event", vec!["die", "destroy"])]);
    let options = EventsOptionsBuilder::new().filters(&filters);
    let options = match &since {
        Some(since) => options.since(since),
        None => options,
    };
    let events = docker.events(Some(options.build()));
    look_at_all(client, watched).await?;
    if !watched.health().borrow().ok {
        tracing::info!(host = client.host(), engine = daemon.title, "Docker answers");
    }
    watched.set_health(true, daemon.title.clone());
    Ok(events)
}

/// Until the daemon goes away; returns why.
async fn session(
    client: &Client,
    watched: &Arc<Watched>,
    events: impl Stream<Item = Result<EventMessage, bollard::errors::Error>>,
) -> Fault {
    let mut events = std::pin::pin!(events);
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(event)) => spawn_look(client, watched, event),
                Some(Err(error)) => return errors::fault(client.host(), "send events", &error),
                None => return gone(client),
            },
            _ = ticks.tick() => {
                if let Err(fault) = look_at_all(client, watched).await {
                    return fault;
                }
            }
        }
    }
}

fn gone(client: &Client) -> Fault {
    let message = format!("Docker at {} went away (closed the events stream)", client.host());
    Fault::new(FaultKind::RuntimeUnreachable, message)
}

/// On a task of its own: a container that Docker holds locked must not delay the others.
fn spawn_look(client: &Client, watched: &Arc<Watched>, event: EventMessage) {
    let Some(actor) = event.actor else { return };
    let Some(id) = actor.id.filter(|id| watched.is_watched(id)) else { return };
    let code = actor
        .attributes
        .and_then(|attributes| attributes.get("exitCode").and_then(|code| code.parse().ok()));
    let (client, watched) = (client.clone(), Arc::clone(watched));
    tokio::spawn(async move { watched.look(&client, &id, code).await });
}

/// One cheap list (it takes no container's lock) doubles as the ping.
async fn look_at_all(client: &Client, watched: &Arc<Watched>) -> Result<(), Fault> {
    let ids = watched.ids();
    let docker = client.docker().await?;
    if ids.is_empty() {
        let ping = timeout(PROMPT, docker.ping()).await;
        let ping = ping.map_err(|_| errors::silent(client.host(), PROMPT))?;
        return ping.map(drop).map_err(|error| errors::fault(client.host(), "answer", &error));
    }
    let running = running_of(client, &ids).await?;
    // Side by side: one that Docker holds locked, or whose log ends late, does not delay the others.
    let ended = ids.iter().filter(|id| !running.contains(*id));
    join_all(ended.map(|id| watched.look(client, id, None))).await;
    Ok(())
}

/// Which of these containers run; the others ended or are gone. It asks for a list, which takes no
/// container's lock: one that hangs does not hide the others.
pub async fn running_of(client: &Client, ids: &[String]) -> Result<BTreeSet<String>, Fault> {
    if ids.is_empty() {
        return Ok(BTreeSet::new());
    }
    let docker = client.docker().await?;
    let filters = HashMap::from([("id", ids.to_vec()), ("status", running_states())]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    let running = client.within(PROMPT, docker.list_containers(Some(options))).await?;
    Ok(running.into_iter().filter_map(|container| container.id).collect())
}

fn running_states() -> Vec<String> {
    ["running", "paused", "restarting"].map(str::to_owned).into()
}
