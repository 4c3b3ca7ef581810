//! The configuration while Wharf runs: reload as a diff, patches, registered models, listeners that
//! move, front doors, announcements. Real `wharf serve` with stand-in engines.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is a failed test")]

#[path = "../support/mod.rs"]
mod support;

mod announced;
mod doors;
mod patched;
mod registered;
mod reloaded;

use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use support::ports::{free_port, free_ports};

/// Status and JSON of one call, also to an address that is none of the usual two.
pub async fn call(method: Method, url: &str, body: &str) -> Result<(u16, Value), String> {
    let client: Client<_, Full<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::builder().method(method).uri(url);
    let request = request.body(Full::from(body.to_owned())).map_err(|error| error.to_string())?;
    let asked = async {
        let response = client.request(request).await.map_err(|error| format!("{url}: {error}"))?;
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.map_err(|error| error.to_string())?;
        let bytes = bytes.to_bytes();
        let body = serde_json::from_slice(&bytes)
            .map_err(|_| format!("{url}: {status} {}", String::from_utf8_lossy(&bytes)))?;
        Ok((status, body))
    };
    tokio::time::timeout(Duration::from_secs(60), asked).await.map_err(|_| "too late".to_owned())?
}

/// Polls until `wanted` gives something.
pub async fn until<T>(what: &str, mut wanted: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = wanted().await {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl support::World {
    pub fn yaml(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("models.yaml")).expect("models.yaml")
    }

    pub fn write(&self, yaml: &str) {
        std::fs::write(self.dir.path().join("models.yaml"), yaml).expect("models.yaml");
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.server.talk.call(Method::POST, path, body).await.expect(path)
    }

    pub async fn patch(&self, body: Value) -> (u16, Value) {
        self.server.talk.call(Method::PATCH, "/config", body).await.expect("/config")
    }

    pub async fn config(&self) -> Value {
        self.server.talk.get("/config").await.expect("/config")
    }
}
