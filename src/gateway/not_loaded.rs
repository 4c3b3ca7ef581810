//! What a browser is shown where a page is asked of a server that is not loaded: looking at it must
//! not start it.

use axum::response::{Html, IntoResponse, Response};
use http::{HeaderMap, HeaderValue, header};

use super::path::encode;
use super::reject::Reject;
use crate::config::catalog::{ModelSpec, Settings};
use crate::markup::escaped;

/// Somebody looks at a page (and not a script or a picture of one).
pub fn is_navigation(headers: &HeaderMap) -> bool {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accepts.is_some_and(|accept| accept.contains("text/html"))
}

/// The refusal, with its status and headers, as a page that looks again by itself.
pub fn page(spec: &ModelSpec, settings: &Settings, reject: Reject) -> Response {
    let name = escaped(spec.name.as_str());
    let path = escaped(&encode(spec.name.as_str(), true));
    let title = spec.display_name.as_deref().map_or_else(|| name.clone(), escaped);
    let orchestrator = settings.orchestrator;
    let html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"refresh\" content=\"5\"><title>{title} is not loaded</title>\
         <style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:4em auto;\
         padding:0 1em}}code{{background:#8882;padding:.1em .3em}}</style></head><body>\
         <h1>{title} is not loaded</h1>\
         <p>Opening its page does not load it; work does, and so does</p>\
         <p><code>wharf load {name}</code> or \
         <code>curl -X POST http://{orchestrator}/models/{path}/load</code></p>\
         <p>This page looks again every 5 seconds.</p></body></html>"
    );
    let (mut head, _) = reject.into_response().into_parts();
    head.headers.remove(header::CONTENT_TYPE);
    head.headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    (head.status, head.headers, Html(html)).into_response()
}
