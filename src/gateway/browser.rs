//! What web pages may do here: only those of Wharf itself and of the configured origins may change
//! anything, and nobody gets in under a host name that is not ours (DNS rebinding).
//!
//! Used by the gateway and by the control API:
//! `router.layer(middleware::from_fn_with_state(handle, browser::guard))`.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};

use super::reject::Reject;
use crate::config::catalog::Settings;
use crate::orchestrator::Handle;

const ALLOWED_METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE");
const EXPOSED: HeaderValue =
    HeaderValue::from_static("X-Request-Id, X-Wharf-Model, Server-Timing, Retry-After");
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const PRIVATE_NETWORK_ASKED: HeaderName =
    HeaderName::from_static("access-control-request-private-network");
const PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");

pub async fn guard(State(handle): State<Handle>, request: Request, next: Next) -> Response {
    let catalog = handle.catalog();
    let settings = &catalog.settings;
    if let Err(reject) = check(settings, request.method(), request.uri(), request.headers()) {
        return reject.into_response();
    }
    let origin = request.headers().get(header::ORIGIN).cloned();
    let shared = origin.filter(|origin| is_configured(settings, origin));
    let mut response = match preflight(&request) {
        true if shared.is_some() => answer_preflight(request.headers()),
        _ => next.run(request).await,
    };
    if !settings.cors.is_empty() {
        response.headers_mut().append(header::VARY, HeaderValue::from_static("Origin"));
    }
    if let Some(origin) = shared {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
    response
}

/// Refuses unknown hosts, and foreign pages that would change something.
pub fn check(
    settings: &Settings,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<(), Reject> {
    let header_host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or("\u{fffd}"));
    for host in header_host.into_iter().chain(uri.authority().map(|host| host.as_str())) {
        if !is_our_host(settings, host) {
            return Err(unknown_host(host));
        }
    }
    if changes_state(method, uri, headers) && is_foreign(settings, headers) {
        return Err(foreign_page(headers));
    }
    Ok(())
}

/// Paths whose reads act: they may load or unload a model.
const ACTING: [&str; 5] = ["/unload", "/upstream", "/comfyui", "/sdapi", "/v1/audio/voices"];

/// Everything that is not a plain read; and the reads that act (llama-swap's `GET /unload`, the
/// pass-through, WebSockets).
fn changes_state(method: &Method, uri: &Uri, headers: &HeaderMap) -> bool {
    let path = uri.path();
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
        || headers.contains_key(header::UPGRADE)
        || ACTING.iter().any(|acting| {
            path.strip_prefix(acting).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
}

fn is_foreign(settings: &Settings, headers: &HeaderMap) -> bool {
    if let Some(origin) = headers.get(header::ORIGIN) {
        return !is_configured(settings, origin) && !is_same_origin(origin, headers);
    }
    // No Origin: only the fetch metadata tells an image tag of a foreign page from a script.
    headers.get(FETCH_SITE).is_some_and(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"))
}

fn is_same_origin(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let authority = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.strip_prefix("http://").or(origin.strip_prefix("https://")));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    matches!((authority, host), (Some(origin), Some(host)) if origin.eq_ignore_ascii_case(host))
}

fn is_configured(settings: &Settings, origin: &HeaderValue) -> bool {
    settings.cors.iter().any(|allowed| {
        allowed == "*"
            || allowed.trim_end_matches('/').as_bytes().eq_ignore_ascii_case(origin.as_bytes())
    })
}

pub(super) fn is_our_host(settings: &Settings, host: &str) -> bool {
    let name = host_name(host);
    if name.eq_ignore_ascii_case("localhost")
        || ends_with(name, ".localhost")
        || settings.hosts.iter().any(|allowed| host_matches(allowed, host, name))
    {
        return true;
    }
    let literal = name.trim_start_matches('[').trim_end_matches(']');
    let Ok(ip) = literal.parse::<IpAddr>() else { return false };
    ip.to_canonical().is_loopback()
        || [settings.gateway, settings.orchestrator]
            .iter()
            .any(|listen| listen.ip().is_unspecified() || listen.ip() == ip)
}

/// `wharf`, `wharf:8080`, `*.example.org` or `*`.
fn host_matches(allowed: &str, host: &str, name: &str) -> bool {
    match allowed.strip_prefix('*') {
        Some(suffix) => ends_with(name, suffix),
        None => allowed.eq_ignore_ascii_case(name) || allowed.eq_ignore_ascii_case(host),
    }
}

/// In any case of letters.
fn ends_with(name: &str, suffix: &str) -> bool {
    let (name, suffix) = (name.as_bytes(), suffix.as_bytes());
    name.len() >= suffix.len() && name[name.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
}

/// Without the port; an IPv6 literal keeps its brackets.
fn host_name(host: &str) -> &str {
    match host.rfind(':') {
        Some(colon) if !host[colon..].contains(']') => &host[..colon],
        _ => host,
    }
}

fn unknown_host(host: &str) -> Reject {
    let name: String = host_name(host).chars().take(100).collect();
    Reject::new(
        StatusCode::FORBIDDEN,
        "host_not_allowed",
        format!(
            "this Wharf is not known as \"{name}\"; add that name under `hosts:` in models.yaml"
        ),
    )
}

fn foreign_page(headers: &HeaderMap) -> Reject {
    let origin = headers.get(header::ORIGIN).and_then(|origin| origin.to_str().ok());
    let origin: String = origin.unwrap_or("another site").chars().take(100).collect();
    Reject::new(
        StatusCode::FORBIDDEN,
        "origin_not_allowed",
        format!(
            "pages of {origin} may not use this Wharf; add the origin under `cors:` in models.yaml"
        ),
    )
}

fn preflight(request: &Request) -> bool {
    request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

fn answer_preflight(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, ALLOWED_METHODS);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    if let Some(names) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names.clone());
    }
    if asked.contains_key(PRIVATE_NETWORK_ASKED) {
        headers.insert(PRIVATE_NETWORK, HeaderValue::from_static("true"));
    }
    response
}
