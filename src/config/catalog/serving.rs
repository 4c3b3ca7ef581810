//! How requests find a model, what is done to them, and what is kept and told of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ExternalSpec;
use crate::units::{Bytes, ModelName};

/// Both in PEM. Read at the start, at a reload, and when they change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFiles {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

/// `routes:`: a name that leads to one of several models.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    pub kind: RouteKind,
    /// Names of models, or `peer/model`, best first.
    pub models: Vec<String>,
    /// `failover`: how long the first may keep a request waiting before the next is tried.
    pub within: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteKind {
    /// One that is ready, else the first.
    AnyOf,
    /// The first that can be had in time.
    Failover,
}

/// Another OpenAI server, or another Wharf.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    pub name: String,
    pub at: ExternalSpec,
    /// Listed under `peer/`; `*` allows every name.
    pub models: Vec<String>,
}

/// `adapter_of` and `adapter`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapter {
    pub of: ModelName,
    /// Path or repository, as the engine shall load it.
    pub source: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Filters {
    /// Parameters taken out of the body; never `model`.
    pub strip: Vec<String>,
    /// Parameters set in the body, whatever the client sent.
    pub set: BTreeMap<String, Value>,
}

impl Filters {
    pub fn is_empty(&self) -> bool {
        self.strip.is_empty() && self.set.is_empty()
    }

    /// Whether clients have no say about a parameter.
    pub fn touch(&self, parameter: &str) -> bool {
        self.set.contains_key(parameter) || self.strip.iter().any(|name| name == parameter)
    }
}

/// `POST /prompt`, `GET /history/*`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathRule {
    /// `None`: any.
    #[serde(with = "method")]
    pub method: Option<Method>,
    /// `*` stands for any run of characters.
    pub path: String,
}

/// What `engine: http` is told of a server that is no LLM's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpService {
    /// Requests that start the model and count as work; all others do neither.
    pub activity: Vec<PathRule>,
    /// A path whose JSON tells what is still under way, such as ComfyUI's `/queue`.
    pub queue: Option<String>,
    /// Called before the engine is stopped, such as `POST /free`.
    pub release: Option<PathRule>,
    /// JSON body of the release call.
    pub release_body: Option<String>,
}

/// Requests and answers kept for debugging: off by default, in memory only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureSettings {
    pub enabled: bool,
    /// All of them together; the oldest go first.
    pub total: Bytes,
    /// Of one body; the rest is cut.
    pub body: Bytes,
}

impl Default for CaptureSettings {
    fn default() -> CaptureSettings {
        CaptureSettings { enabled: false, total: Bytes::mib(16), body: Bytes(256 << 10) }
    }
}

/// How long rows stay in the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    pub age: Duration,
    /// Rows of each table.
    pub rows: u64,
}

impl Default for Retention {
    fn default() -> Retention {
        Retention { age: Duration::from_secs(30 * 24 * 3600), rows: 100_000 }
    }
}

/// A registry that is told of instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announce {
    /// Gets `POST {url}/register` and `POST {url}/deregister`.
    pub url: String,
    #[serde(skip_serializing, default)]
    pub key: Option<String>,
    #[serde(default)]
    pub ca: Option<PathBuf>,
}

mod method {
    use http::Method;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(method: &Option<Method>, to: S) -> Result<S::Ok, S::Error> {
        method.as_ref().map(Method::as_str).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Method>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
    }
}
