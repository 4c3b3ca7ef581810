//! Whether Wharf can serve: each part with its own state.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::render::{self, Snapshot};
use crate::config::catalog::{GpuRequest, RuntimeSpec};
use crate::orchestrator::Handle;
use crate::orchestrator::view::Leftover;
use crate::store::StoreHealth;

/// A listener on this machine accepts at once, or does not accept.
const GATEWAY_TIMEOUT: Duration = Duration::from_millis(500);

/// Failed parts are tried again every second or two.
const RETRY_AFTER_S: &str = "5";

/// State of one part of Wharf.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Ok(String),
    /// Works, but a person should look.
    Degraded(String),
    /// Nothing configured needs it.
    Unused(String),
    Failed(String),
}

impl Part {
    fn json(&self) -> Value {
        let (status, detail) = match self {
            Part::Ok(detail) => ("ok", detail),
            Part::Degraded(detail) => ("degraded", detail),
            Part::Unused(detail) => ("unused", detail),
            Part::Failed(detail) => ("failed", detail),
        };
        json!({ "status": status, "detail": detail })
    }

    fn serves(&self) -> bool {
        !matches!(self, Part::Failed(_))
    }
}

/// `GET /health` of both listeners: 200 only if every part that a configured model needs works.
pub async fn answer(handle: &Handle) -> Response {
    let at = Snapshot::of(handle);
    let parts = [
        ("gateway", gateway(&at).await),
        ("orchestrator", orchestrator(&at)),
        ("docker", docker(&at)),
        ("gpu", gpu(&at)),
        ("store", store(&at)),
    ];
    let healthy = parts.iter().all(|(_, part)| part.serves());
    let mut body = render::health(&at, healthy);
    body.extend(parts.iter().map(|(name, part)| ((*name).to_owned(), part.json())));
    if healthy {
        return Json(body).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, RETRY_AFTER_S)], Json(body))
        .into_response()
}

/// As [`answer`], without the gateway's listener: for the word in `/status`.
pub fn is_healthy(at: &Snapshot<'_>) -> bool {
    [orchestrator(at), docker(at), gpu(at)].iter().all(Part::serves)
}

async fn gateway(at: &Snapshot<'_>) -> Part {
    let configured = at.catalog.settings.gateway;
    if configured.port() == 0 {
        return Part::Unused("listens on a port chosen by the system".to_owned());
    }
    let address = reachable(configured);
    match tokio::time::timeout(GATEWAY_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Part::Ok(format!("accepts on {configured}")),
        Ok(Err(error)) => Part::Failed(format!("{address} does not accept: {error}")),
        Err(_) => Part::Failed(format!("{address} does not accept within 500 ms")),
    }
}

/// An unspecified address is reached on loopback.
pub fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn orchestrator(at: &Snapshot<'_>) -> Part {
    if !at.handle.is_alive() {
        let why = "its task ended: restart Wharf and report the last log lines";
        return Part::Failed(why.to_owned());
    }
    let swaps = at.view.scheduler.swaps.len();
    let queued = at.view.scheduler.queued;
    let works = format!("{swaps} swaps under way, {queued} requests waiting");
    let troubles: Vec<String> =
        at.view.leftovers.iter().map(leftover).chain(at.view.outages.iter().cloned()).collect();
    if troubles.is_empty() {
        return Part::Ok(works);
    }
    Part::Degraded(format!("{works}; {}", troubles.join("; ")))
}

fn leftover(left: &Leftover) -> String {
    let Leftover { what, model, fault, .. } = left;
    format!(
        "{what} of an earlier run ({model}) could not be stopped yet: {}",
        fault.public_message()
    )
}

fn docker(at: &Snapshot<'_>) -> Part {
    let needed =
        at.catalog.models.values().any(|spec| matches!(spec.runtime, RuntimeSpec::Docker(_)));
    match &at.view.docker_health {
        None => Part::Unused("no model runs in Docker".to_owned()),
        Some(health) if health.ok => Part::Ok(health.detail.clone()),
        Some(health) if needed => Part::Failed(health.detail.clone()),
        // Only to look for containers of an earlier run.
        Some(health) => Part::Unused(health.detail.clone()),
    }
}

/// Requests are served without it.
fn store(at: &Snapshot<'_>) -> Part {
    let StoreHealth { ok, detail } = at.handle.store().health();
    if ok { Part::Ok(detail) } else { Part::Degraded(detail) }
}

fn gpu(at: &Snapshot<'_>) -> Part {
    let needed = at.catalog.models.values().any(|spec| spec.gpus != GpuRequest::None);
    let detail = at.view.scheduler.no_proof.as_ref().unwrap_or(&at.view.gpu_health.detail);
    match at.view.gpu_health.ok && at.view.scheduler.no_proof.is_none() {
        true => Part::Ok(detail.clone()),
        false if needed => Part::Failed(detail.clone()),
        false => Part::Unused(detail.clone()),
    }
}
