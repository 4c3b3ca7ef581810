//! The only wiring: build the orchestrator, serve both listeners, reload, drain, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::config::catalog::Catalog;
use crate::gateway::Limits;
use crate::orchestrator::Handle;
use crate::reload::{Bound, Built, Certificates, Listeners, Routers, Source};
use crate::store::Store;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::performance;
use crate::{announce, api, gateway, orchestrator, reload};

/// Two signals closer together than this are one.
const SAME_SIGNAL_WITHIN: Duration = Duration::from_secs(1);
/// Between two lines about who is waited for at the end.
const DRAIN_TOLD_EVERY: Duration = Duration::from_secs(5);

/// Serves until SIGTERM or SIGINT. A second one hurries: requests are cut and engines told to end
/// at once. A third ends at once; what still runs is adopted or reaped at the next start.
pub async fn run(source: Source, built: Built, store: Store) -> anyhow::Result<()> {
    let catalog = Arc::new(built.loaded.catalog.clone());
    let settings = &catalog.settings;
    refuse_open_control(settings.orchestrator, &catalog)?;
    // Heard from here on: who stops us while we start must not leave engines behind.
    let mut signals = stop_signals()?;
    let hangup = signal(SignalKind::hangup())?;
    // Before anything is started: a taken port must cost nothing.
    let certificates = Certificates::load(settings.tls.as_ref()).map_err(anyhow::Error::msg)?;
    let bound = Bound::all(settings).await?;
    let metrics = Arc::new(Metrics::new());
    let (handle, mut owner) =
        orchestrator::start(Arc::clone(&catalog), Arc::clone(&metrics), store.clone()).await?;

    let (stop, hurry) = (CancellationToken::new(), CancellationToken::new());
    let traffic = gateway::Traffic::default();
    let inference =
        gateway::shared(handle.clone(), Arc::clone(&metrics), Limits::default(), traffic.clone());
    // Until the owner has ended: WebSockets outlive their listeners and end with their leases.
    let threads = gateway::Threads::start().context("the serving threads cannot be started")?;
    let routers = Routers {
        control: api::router_with(handle.clone(), metrics, traffic),
        inference: gateway::Content::from(Arc::clone(&inference)),
        threads: threads.clone(),
    };
    let listeners =
        Listeners::new(routers, handle.clone(), certificates, stop.clone(), hurry.clone());
    let drain = settings.swap.drain_timeout.min(settings.swap.shutdown_timeout);
    let reloads =
        reload::start(source, built, handle.clone(), inference, (listeners, bound), stop.clone())
            .await;
    let announcing = announce::spawn(handle.clone(), stop.clone());
    tracing::info!(gateway = %settings.gateway, orchestrator = %settings.orchestrator, "serving");

    let sampling = tokio::spawn(performance::sample(handle.clone()));
    let discovering = tokio::spawn(orchestrator::discover_peers(handle.clone()));
    let hangups = tokio::spawn(reload_on_sighup(hangup, handle.clone()));
    let signal_name = tokio::select! {
        name = wait_for_stop(&mut signals) => name,
        // Only after a panic. The engines live on: whoever starts us again adopts them.
        _ = &mut owner => bail!("the orchestrator ended by itself: report the last log lines"),
    };
    tracing::info!("{signal_name}: draining, at most {} s; once more to hurry", drain.as_secs());
    hangups.abort();
    sampling.abort();
    discovering.abort();
    // Whoever waits in the queue hears it now, not when the drain is over and connections are cut.
    handle.refuse_new();
    stop.cancel();
    let progress = tokio::spawn(tell_drain(handle.clone(), Instant::now() + drain));
    let drained = async {
        let _threads = threads;
        // One that panicked has nothing left to drain.
        let _ = reloads.await;
        let _ = announcing.await;
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
/// `listening`: where the orchestrator is, or shall be.
pub fn refuse_open_control(listening: SocketAddr, catalog: &Catalog) -> anyhow::Result<()> {
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
async fn reload_on_sighup(mut hangup: Signal, handle: Handle) {
    while hangup.recv().await.is_some() {
        if let Some(reloads) = handle.reloads() {
            // Its owner told the log what came of it.
            let _ = reloads.reload("SIGHUP").await;
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
