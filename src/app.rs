//! The only wiring: build the orchestrator, serve both listeners, reload, drain, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::catalog::Catalog;
use crate::config::diff::{changes, keep_what_needs_a_restart};
use crate::orchestrator::Handle;
use crate::runtime::process::ProcessRuntime;
use crate::store::Store;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::performance;
use crate::{api, gateway, orchestrator};

/// How long a taken listener port is retried (a predecessor may just be leaving).
const BIND_WITHIN: Duration = Duration::from_secs(3);
/// Two signals closer together than this are one.
const SAME_SIGNAL_WITHIN: Duration = Duration::from_secs(1);
/// Between two lines about who is waited for at the end.
const DRAIN_TOLD_EVERY: Duration = Duration::from_secs(5);
/// Control answers are short; inference streams get `drain_timeout`.
const CONTROL_GRACE: Duration = Duration::from_secs(2);

/// Serves until SIGTERM or SIGINT. A second one hurries: requests are cut and engines told to end
/// at once. A third ends at once; what still runs is adopted or reaped at the next start.
/// `reload` reads the configuration again, flags applied.
pub async fn run(
    catalog: Catalog,
    reload: impl Fn() -> anyhow::Result<Catalog> + Send + 'static,
) -> anyhow::Result<()> {
    let catalog = Arc::new(catalog);
    let settings = &catalog.settings;
    let (gateway_at, orchestrator_at) = (settings.gateway, settings.orchestrator);
    refuse_open_control(orchestrator_at, &catalog)?;
    // Bound before anything is started: a taken port must cost nothing.
    let orchestrator_listener = bind("listen.orchestrator", orchestrator_at).await?;
    let gateway_listener = match gateway_at == orchestrator_at {
        true => None,
        false => Some(bind("listen.gateway", gateway_at).await?),
    };
    let metrics = Arc::new(Metrics::new());
    let store = Store::open(&settings.store, settings.retention);
    let (handle, mut owner) =
        orchestrator::start(Arc::clone(&catalog), Arc::clone(&metrics), store.clone()).await?;

    // Before the first answer: whoever has one may send a signal.
    let mut signals = stop_signals()?;
    let (stop, hurry) = (CancellationToken::new(), CancellationToken::new());
    let traffic = gateway::Traffic::default();
    let control = api::router_with(handle.clone(), Arc::clone(&metrics), traffic.clone());
    let inference = gateway::router(handle.clone(), metrics, traffic);
    let drain = settings.swap.drain_timeout.min(settings.swap.shutdown_timeout);
    let mut serving = Vec::new();
    let control = match gateway_listener {
        Some(listener) => {
            let (stop, hurry) = (stop.clone(), hurry.clone());
            let serve = gateway::serve_until(listener, inference, stop, drain, hurry);
            serving.push(tokio::spawn(serve));
            control
        }
        // One address for both: the orchestrator's routes win, the rest is inference.
        None => control.fallback_service(inference),
    };
    serving.push(tokio::spawn(gateway::serve_until(
        orchestrator_listener,
        control,
        stop.clone(),
        CONTROL_GRACE.max(if gateway_at == orchestrator_at { drain } else { CONTROL_GRACE }),
        hurry.clone(),
    )));
    tracing::info!(gateway = %gateway_at, orchestrator = %orchestrator_at, "serving");

    let sampling = tokio::spawn(performance::sample(handle.clone()));
    let discovering = tokio::spawn(orchestrator::discover_peers(handle.clone()));
    let reloads = tokio::spawn(reload_on_sighup(reload, handle.clone(), orchestrator_at));
    let signal_name = tokio::select! {
        name = wait_for_stop(&mut signals) => name,
        // Only after a panic. The engines live on: whoever starts us again adopts them.
        _ = &mut owner => bail!("the orchestrator ended by itself: report the last log lines"),
    };
    tracing::info!("{signal_name}: draining, at most {} s; once more to hurry", drain.as_secs());
    reloads.abort();
    sampling.abort();
    discovering.abort();
    // Whoever waits in the queue hears it now, not when the drain is over and connections are cut.
    handle.refuse_new();
    stop.cancel();
    let progress = tokio::spawn(tell_drain(handle.clone(), Instant::now() + drain));
    let drained = async {
        for task in serving {
            // A panicked listener has nothing left to drain.
            let _ = task.await;
        }
        progress.abort();
        handle.shutdown(hurry.clone()).await;
        let _ = owner.await;
        store.close().await;
    };
    tokio::pin!(drained);
    tokio::select! {
        () = &mut drained => return Ok(()),
        again = next_stop() => {
            tracing::warn!("{}: cutting requests and ending engines; once more to leave at once", again?);
            hurry.cancel();
        }
    }
    tokio::select! {
        () = drained => Ok(()),
        again = next_stop() => bail!("left at once by a third {}", again?),
    }
}

/// Says at once, and every few seconds, who is still waited for.
async fn tell_drain(handle: Handle, until: Instant) {
    let mut tick = tokio::time::interval(DRAIN_TOLD_EVERY);
    loop {
        tick.tick().await;
        let gates = handle.gates().clone();
        let busy = gates.iter().map(|(model, gate)| (model.as_str(), gate.in_flight()));
        let left = until.saturating_duration_since(Instant::now());
        if let Some(text) = drain_text(busy, left) {
            tracing::info!("{text}");
        }
    }
}

/// `waiting for 3 requests of mistral, 42 s left (…)`; `None`: for nobody.
fn drain_text<'a>(busy: impl Iterator<Item = (&'a str, u32)>, left: Duration) -> Option<String> {
    const MODELS_MAX: usize = 3;
    let parts: Vec<String> = busy
        .filter(|(_, requests)| *requests > 0)
        .map(|(model, requests)| {
            format!("{requests} {} of {model}", if requests == 1 { "request" } else { "requests" })
        })
        .collect();
    let named = parts.iter().take(MODELS_MAX).cloned().collect::<Vec<_>>().join(", ");
    let more = match parts.len().saturating_sub(MODELS_MAX) {
        0 => String::new(),
        n => format!(" and of {n} more models"),
    };
    let left = left.as_secs_f64().round();
    (!parts.is_empty()).then(|| {
        format!("waiting for {named}{more}, {left} s left (press Ctrl-C again to cut them)")
    })
}

/// Wrappers pass a signal on that the whole group also gets: that is still the same one.
async fn next_stop() -> anyhow::Result<&'static str> {
    tokio::time::sleep(SAME_SIGNAL_WITHIN).await;
    Ok(wait_for_stop(&mut stop_signals()?).await)
}

/// A control API that anyone on the network can use is refused, not warned about.
/// `listening`: where the orchestrator is, which a reload does not move.
fn refuse_open_control(listening: SocketAddr, catalog: &Catalog) -> anyhow::Result<()> {
    let auth = &catalog.settings.auth;
    if !listening.ip().is_loopback() && auth.keys.is_empty() && !auth.open {
        bail!(
            "listen.orchestrator {listening} is reachable from other machines and auth.keys is \
             empty: add a key with scope admin, listen on 127.0.0.1, or say `auth: {{ open: true }}` \
             if everyone in that network may load and unload models"
        );
    }
    Ok(())
}

async fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let until = tokio::time::Instant::now() + BIND_WITHIN;
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                if tokio::time::Instant::now() >= until {
                    bail!(
                        "{key}: {address} is taken by {}; stop it or choose another port",
                        occupant(address.port()).await
                    );
                }
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        "{key}: {address} is taken by {}; trying again for {} s",
                        occupant(address.port()).await,
                        BIND_WITHIN.as_secs()
                    );
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => {
                return Err(error).with_context(|| format!("{key}: cannot listen on {address}"));
            }
        }
    }
}

async fn occupant(port: u16) -> String {
    let listeners = ProcessRuntime::default().listeners(port).await;
    let unseen = || "a process that this user cannot see".to_owned();
    listeners.first().map_or_else(unseen, ToString::to_string)
}

/// SIGTERM and SIGINT, which end nothing by themselves from now on.
fn stop_signals() -> std::io::Result<(Signal, Signal)> {
    Ok((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
}

async fn wait_for_stop((terminate, interrupt): &mut (Signal, Signal)) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// A bad file changes nothing and says why.
async fn reload_on_sighup(
    reload: impl Fn() -> anyhow::Result<Catalog> + Send + 'static,
    handle: Handle,
    orchestrator_at: SocketAddr,
) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    while hangup.recv().await.is_some() {
        let checked = reload().and_then(|catalog| {
            refuse_open_control(orchestrator_at, &catalog)?;
            Ok(catalog)
        });
        match checked {
            Ok(mut catalog) => {
                let kept =
                    keep_what_needs_a_restart(&mut catalog.settings, &handle.catalog().settings);
                if !kept.is_empty() {
                    tracing::warn!("{} need a restart; the rest is reloaded", kept.join(", "));
                }
                let changes = changes(&handle.catalog(), &catalog);
                handle.reload(Arc::new(catalog)).await;
                tracing::info!("configuration reloaded: {changes}");
            }
            Err(errors) => {
                tracing::error!("{errors}\nthe running configuration stays in force");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{drain_text, refuse_open_control};
    use crate::config;

    #[test]
    fn a_drain_says_who_is_waited_for() {
        let left = Duration::from_millis(41_600);
        let text = |busy: &[(&'static str, u32)]| drain_text(busy.iter().copied(), left);
        assert_eq!(text(&[("mistral", 0)]), None);
        assert_eq!(
            text(&[("coder", 1), ("llava", 0), ("mistral", 3)]).unwrap(),
            "waiting for 1 request of coder, 3 requests of mistral, 42 s left (press Ctrl-C again \
             to cut them)"
        );
        let many = text(&[("a", 1), ("b", 1), ("c", 1), ("d", 1), ("e", 1)]).unwrap();
        assert!(many.contains("1 request of c and of 2 more models"), "{many}");
    }

    #[test]
    fn neither_start_nor_reload_may_open_the_control_api_to_the_network() {
        let catalog = |auth: &str| {
            let yaml = format!(
                "{auth}models: {{ ada: {{ engine: openai, process: {{ cmd: x }}, port: 9001, gpus: 0 }} }}"
            );
            config::parse(&yaml, "models.yaml", &|_| None).unwrap().catalog
        };
        let open = catalog("");
        let keyed =
            catalog("auth: { keys: [{ name: a, key: s3cret-s3cret-s3cret, scopes: [admin] }] }\n");
        let (everywhere, here) =
            ("0.0.0.0:8888".parse().unwrap(), "127.0.0.1:8888".parse().unwrap());
        // What the reloaded file says of `listen` changes nothing: it is the default here.
        assert!(refuse_open_control(everywhere, &open).is_err());
        assert!(refuse_open_control(everywhere, &keyed).is_ok());
        assert!(refuse_open_control(here, &open).is_ok());
    }
}
