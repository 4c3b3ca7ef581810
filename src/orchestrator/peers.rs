//! What peers with `models: "*"` have: asked now and then, and told to the owner, who takes it up as
//! a reload.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::handle::{Handle, Message};
use crate::config::catalog::Peer;
use crate::engine::request;
use crate::runtime::external;

const ASK_EVERY: Duration = Duration::from_secs(60);
/// At random in addition: a restart of many does not make them ask at once for ever.
const JITTER_MS: u64 = 10_000;
/// After a failure, growing from the first to the second.
const AGAIN_AFTER: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));
/// A peer that a reload brings is asked this soon.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What is known of asking one peer.
struct Asked {
    peer: Arc<Peer>,
    next: Instant,
    /// In a row.
    failures: u32,
}

/// For as long as it is polled.
pub async fn discover(handle: Handle) {
    let seed = RandomState::new();
    let mut asked: BTreeMap<String, Asked> = BTreeMap::new();
    loop {
        let catalog = handle.catalog();
        let open = || catalog.peers.values().filter(|peer| peer.is_open());
        asked.retain(|name, asked| open().any(|peer| peer.name == *name && *peer == asked.peer));
        let now = Instant::now();
        let due = open().filter(|peer| asked.get(&peer.name).is_none_or(|asked| asked.next <= now));
        let answers = join_all(due.map(async |peer| (Arc::clone(peer), models_of(peer).await)));
        for (peer, answer) in answers.await {
            let name = peer.name.clone();
            let before = asked.get(&name).map_or(0, |asked| asked.failures);
            let (failures, wait) = match answer {
                Ok(models) => {
                    if before > 0 {
                        tracing::info!(peer = name, "tells its models again");
                    }
                    handle.inbox.send(Message::PeerModels { peer: Arc::clone(&peer), models });
                    let jitter = seed.hash_one((&name, now)) % JITTER_MS;
                    (0, ASK_EVERY + Duration::from_millis(jitter))
                }
                Err(why) => {
                    if before == 0 {
                        tracing::warn!(peer = name, "does not tell its models: {why}");
                    }
                    let doubled = AGAIN_AFTER.0 * 2_u32.saturating_pow(before.min(6));
                    (before.saturating_add(1), doubled.min(AGAIN_AFTER.1))
                }
            };
            asked.insert(name, Asked { peer, next: Instant::now() + wait, failures });
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Names at the peer, less those that it has from peers of its own: two that list each other would
/// never come to an end.
async fn models_of(peer: &Peer) -> Result<Vec<String>, String> {
    let endpoint = external::endpoint(&peer.name, &peer.at).await.map_err(|fault| fault.message)?;
    let answer = request::get(&endpoint, "/v1/models", ANSWER_MAX).await;
    let answer = answer.map_err(|error| format!("{}: {error}", endpoint.base))?;
    let list = answer.json();
    match list["data"].as_array() {
        Some(rows) if answer.status.is_success() => Ok(rows.iter().filter_map(own_name).collect()),
        _ => Err(format!("{}/v1/models answers {}", endpoint.base, answer.excerpt())),
    }
}

fn own_name(row: &Value) -> Option<String> {
    let is_own = row["meta"]["peer"].is_null();
    row["id"].as_str().filter(|_| is_own).map(str::to_owned)
}
