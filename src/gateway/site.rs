//! What is served at an address: the router, and past it the inference requests.

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::response::{IntoResponse as _, Response};
use http::{Extensions, Method, Request, header};
use hyper::body::Incoming;
use tower::ServiceExt;

use super::infer::Asking;
use super::routes::Inference;
use super::threads::Threads;
use super::{Gateway, browser, infer, routes};

/// Cheap to clone; all clones serve the same.
#[derive(Clone, Debug)]
pub struct Site {
    content: Arc<ArcSwap<Content>>,
    /// `None`: connections are served where they are accepted.
    pub(super) threads: Option<Threads>,
}

/// Routes, and whose inference paths they hold.
#[derive(Clone, Debug)]
pub struct Content {
    pub router: Router,
    /// Inference requests need not go through the router, which would come to the same.
    pub inference: Option<Arc<Gateway>>,
}

impl From<Router> for Content {
    fn from(router: Router) -> Content {
        Content { router, inference: None }
    }
}

impl From<Arc<Gateway>> for Content {
    fn from(gateway: Arc<Gateway>) -> Content {
        Content { router: routes::router(Arc::clone(&gateway)), inference: Some(gateway) }
    }
}

impl From<Content> for Site {
    fn from(content: Content) -> Site {
        Site::new(content, None)
    }
}

impl From<Router> for Site {
    fn from(router: Router) -> Site {
        Site::new(router, None)
    }
}

impl Site {
    pub fn new(content: impl Into<Content>, threads: Option<Threads>) -> Site {
        Site { content: Arc::new(ArcSwap::from_pointee(content.into())), threads }
    }

    /// From the next request on.
    pub fn change(&self, content: Content) {
        self.content.store(Arc::new(content));
    }

    /// Whether any request is of the short way.
    pub(super) fn has_short_way(&self) -> bool {
        self.content.load().inference.is_some()
    }

    /// For a plain request: `POST`, to this host, and from no web page.
    pub(super) fn short_way(
        &self,
        path: &str,
        host: &str,
    ) -> Option<(Arc<Gateway>, &'static Inference)> {
        let inference = routes::inference(path)?;
        let content = self.content.load();
        let gateway = content.inference.as_ref()?;
        let catalog = gateway.handle.catalog_now();
        let settings = &catalog.settings;
        let passes = settings.cors.is_empty() && browser::is_our_host(settings, host);
        passes.then(|| (Arc::clone(gateway), inference))
    }

    pub(super) async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response {
        let content = self.content.load();
        if let Some(gateway) = &content.inference
            && let Some(inference) = past_router(gateway, &request)
        {
            let gateway = &Arc::clone(gateway);
            drop(content);
            let asking = Asking::new(request.map(Body::new), Some(peer), None);
            // Its state is large; the connection holds its place for good.
            return Box::pin(infer::infer(gateway, inference, asking)).await.into_response();
        }
        let router = content.router.clone();
        drop(content);
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        match Box::pin(router.oneshot(request)).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

/// Who sent a request that came through the router.
pub(super) fn peer(extensions: &Extensions) -> Option<SocketAddr> {
    extensions.get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0)
}

/// Of a request to which no rule for web pages applies.
fn past_router(gateway: &Gateway, request: &Request<Incoming>) -> Option<&'static Inference> {
    if *request.method() != Method::POST || request.headers().contains_key(header::ORIGIN) {
        return None;
    }
    let inference = routes::inference(request.uri().path())?;
    let catalog = gateway.handle.catalog_now();
    let settings = &catalog.settings;
    let passes = settings.cors.is_empty()
        && browser::check(settings, request.method(), request.uri(), request.headers()).is_ok();
    passes.then_some(inference)
}
