//! The connection pool of one instance.

use std::time::Duration;

use http::Request;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Builder, Client, ResponseFuture};
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::runtime::Endpoint;

/// vLLM keeps idle connections 120 s (we set it so); uvicorn's own default would be 5 s.
const POOL_IDLE: Duration = Duration::from_secs(4);
/// Of one connection: the head of an answer, and what came and was not taken yet.
const BUFFER_MAX: usize = 64 << 10;
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
        .http1_max_buf_size(BUFFER_MAX)
        .pool_idle_timeout(POOL_IDLE)
        .pool_timer(TokioTimer::new())
        .retry_canceled_requests(false);
    builder
}
