//! Who may call what, how often, and how far ahead in the queue.

use std::time::Duration;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use subtle::{Choice, ConstantTimeEq};

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
    #[serde(skip)]
    pub key: KeyDigest,
    /// Patterns with `*`.
    pub models: Vec<String>,
    pub scopes: Vec<Scope>,
    /// `start: never`: this key is served by ready models only.
    #[serde(default)]
    pub start: StartRule,
    /// Stands in for `swap.max_wait` of its requests; they may ask for longer, not for shorter.
    #[serde(default)]
    pub max_wait: Option<Duration>,
    /// The lowest and the highest priority of its requests.
    #[serde(default)]
    pub priority: Option<(Priority, Priority)>,
    #[serde(default)]
    pub limits: RateLimits,
}

/// SHA-256 of a key: the key itself is not kept. An unset or empty key matches nothing.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyDigest(Option<[u8; 32]>);

impl KeyDigest {
    pub fn of(key: &[u8]) -> KeyDigest {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, key).as_ref());
        KeyDigest((!key.is_empty()).then_some(bytes))
    }

    /// Equality in a time that tells nothing about either side.
    pub fn matches(&self, other: &KeyDigest) -> Choice {
        match (self.0, other.0) {
            (Some(mine), Some(theirs)) => mine.ct_eq(&theirs),
            _ => Choice::from(0),
        }
    }
}

impl std::fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyDigest")
    }
}

impl From<&str> for KeyDigest {
    fn from(key: &str) -> KeyDigest {
        KeyDigest::of(key.as_bytes())
    }
}

impl From<String> for KeyDigest {
    fn from(key: String) -> KeyDigest {
        KeyDigest::of(key.as_bytes())
    }
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
    /// Requests for inference at once, waiting ones included.
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
