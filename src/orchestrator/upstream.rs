//! The connection pool of one instance.

use std::time::Duration;

use http::Request;
use http_body_util::BodyExt as _;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Builder, Client, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::runtime::Endpoint;

/// vLLM keeps idle connections 120 s (we set it so); uvicorn's own default would be 5 s.
const POOL_IDLE: Duration = Duration::from_secs(4);
const OPEN_AHEAD_WITHIN: Duration = Duration::from_millis(250);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub type UpstreamBody = http_body_util::Full<bytes::Bytes>;

/// Two kinds, so that engines on this machine pay nothing for those elsewhere.
#[derive(Clone, Debug)]
pub enum UpstreamClient {
    Plain(Client<HttpConnector, UpstreamBody>),
    Tls(Client<HttpsConnector<HttpConnector>, UpstreamBody>),
}

impl UpstreamClient {
    pub fn to(endpoint: &Endpoint) -> UpstreamClient {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let Some(tls) = &endpoint.tls else {
            return UpstreamClient::Plain(pool().build(connector));
        };
        connector.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(rustls::ClientConfig::clone(&tls.config()))
            .https_only()
            .enable_http1()
            .wrap_connector(connector);
        UpstreamClient::Tls(pool().build(connector))
    }

    /// Opens a connection before the first request needs one: a short one is answered on it.
    pub async fn open_ahead(&self, endpoint: &Endpoint) {
        let head = Request::head(format!("{}/", endpoint.base)).body(UpstreamBody::default());
        let Ok(request) = head else { return };
        let answered = async {
            if let Ok(answer) = self.request(request).await {
                // To its end, so that the connection is free again.
                let _ = answer.into_body().collect().await;
            }
        };
        // The first request opens its own then.
        let _ = tokio::time::timeout(OPEN_AHEAD_WITHIN, answered).await;
    }

    pub fn request(&self, request: Request<UpstreamBody>) -> ResponseFuture {
        match self {
            UpstreamClient::Plain(client) => client.request(request),
            UpstreamClient::Tls(client) => client.request(request),
        }
    }
}

fn pool() -> Builder {
    let mut builder = Client::builder(TokioExecutor::new());
    builder
        .pool_idle_timeout(POOL_IDLE)
        .pool_timer(TokioTimer::new())
        .retry_canceled_requests(false);
    builder
}
