//! Who may call what, how often, and how far ahead in the queue.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::Priority;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AuthSettings {
    pub keys: Vec<ApiKey>,
    /// Listen on public addresses without keys, knowingly.
    #[serde(default)]
    pub open: bool,
}

#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ApiKey {
    pub name: String,
    #[serde(skip_serializing, default)]
    pub key: String,
    /// Patterns with `*`.
    pub models: Vec<String>,
    pub scopes: Vec<Scope>,
    /// `start: never`: this key is served by ready models only.
    #[serde(default)]
    pub start: StartRule,
    /// The longest wait that its requests may ask for, and what they get without asking.
    #[serde(default)]
    pub max_wait: Option<Duration>,
    /// The lowest and the highest priority of its requests.
    #[serde(default)]
    pub priority: Option<(Priority, Priority)>,
    #[serde(default)]
    pub limits: RateLimits,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StartRule {
    #[default]
    Auto,
    Never,
}

/// `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimits {
    pub requests_per_minute: Option<u32>,
    /// Inference requests at once, waiting ones included.
    pub concurrency: Option<u32>,
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKey({})", self.name)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Inference,
    Read,
    Admin,
}
