//! Whether a server that runs elsewhere is still reached: told by looks at it now and then, and by
//! what happens to requests.
//!
//! One [`Server`] per address, however many models are used there. After a few failures in a row it
//! is taken for gone, and so are the instances there: how soon it is tried again is the scheduler's
//! affair, by whose next start it is looked at anew.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Endpoint;
use crate::engine::request;

/// In a row, before the server is taken for gone.
const FAILURES_MAX: u32 = 3;
/// Between two looks, and what is added at random: servers with many clients are not asked by all
/// at once.
const LOOK_EVERY: Duration = Duration::from_secs(8);
const LOOK_JITTER_MS: u64 = 4000;
/// After a failed look the next comes sooner.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Servers that are used now, by address and by what is asked there.
#[derive(Clone, Debug, Default)]
pub struct Servers(Arc<Mutex<BTreeMap<String, Weak<Server>>>>);

impl Servers {
    /// The circuit of one more instance at `endpoint`. `path`: asked now and then; without one a
    /// connection is enough.
    pub fn circuit(&self, endpoint: &Endpoint, path: Option<&str>) -> Circuit {
        let key = format!("{} {}", endpoint.base, path.unwrap_or_default());
        let mut servers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        servers.retain(|_, server| server.strong_count() > 0);
        let known = servers.get(&key).and_then(Weak::upgrade).filter(|server| server.is_there());
        let server = known.unwrap_or_else(|| {
            let server =
                Arc::new(Server { failed: AtomicU32::new(0), gone: watch::channel(None).0 });
            servers.insert(key, Arc::downgrade(&server));
            let look = look(Arc::downgrade(&server), endpoint.clone(), path.map(str::to_owned));
            tokio::spawn(look);
            server
        });
        Circuit { server, left: CancellationToken::new() }
    }
}

#[derive(Debug)]
struct Server {
    failed: AtomicU32,
    /// Why it is taken for gone.
    gone: watch::Sender<Option<String>>,
}

impl Server {
    fn is_there(&self) -> bool {
        self.gone.borrow().is_none()
    }

    fn answered(&self) {
        self.failed.store(0, Ordering::Relaxed);
    }

    fn failed(&self, why: &str) {
        let failures = self.failed.fetch_add(1, Ordering::Relaxed) + 1;
        if failures >= FAILURES_MAX {
            let told = format!("{failures} failures in a row, the last: {why}");
            self.gone.send_if_modified(|gone| match gone {
                Some(_) => false,
                None => {
                    *gone = Some(told);
                    true
                }
            });
        }
    }
}

/// One instance's share in its server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Circuit {
    server: Arc<Server>,
    left: CancellationToken,
}

/// The same instance's.
impl PartialEq for Circuit {
    fn eq(&self, other: &Circuit) -> bool {
        Arc::ptr_eq(&self.server, &other.server)
    }
}

impl Eq for Circuit {}

impl Circuit {
    /// A request got the head of an answer, whatever it says.
    pub fn answered(&self) {
        self.server.answered();
    }

    /// The server was not reached, or hung up.
    pub fn failed(&self, why: &str) {
        self.server.failed(why);
    }

    /// Why the server is taken for gone, once it is; `None`: the instance was let go.
    pub async fn broken(&self) -> Option<String> {
        let mut gone = self.server.gone.subscribe();
        tokio::select! {
            why = gone.wait_for(Option::is_some) => why.ok()?.clone(),
            () = self.left.cancelled() => None,
        }
    }

    /// The instance is used no more.
    pub fn leave(&self) {
        self.left.cancel();
    }
}

/// Until nobody uses the server any more, or it is taken for gone.
async fn look(server: Weak<Server>, at: Endpoint, path: Option<String>) {
    let seed = RandomState::new();
    let mut turn: u64 = 0;
    let mut wait = LOOK_EVERY;
    loop {
        turn += 1;
        sleep(wait + Duration::from_millis(seed.hash_one(turn) % LOOK_JITTER_MS)).await;
        if server.strong_count() == 0 {
            return;
        }
        let failure = ask(&at, path.as_deref()).await.err();
        let Some(server) = server.upgrade().filter(|server| server.is_there()) else { return };
        match failure {
            None => {
                server.answered();
                wait = LOOK_EVERY;
            }
            Some(why) => {
                tracing::debug!(server = at.base, "does not answer: {why}");
                server.failed(&why);
                wait = LOOK_AGAIN;
            }
        }
    }
}

async fn ask(at: &Endpoint, path: Option<&str>) -> Result<(), String> {
    let Some(path) = path else {
        return request::connect(at, ANSWER_MAX).await.map(drop).map_err(|why| why.to_string());
    };
    match request::get(at, path, ANSWER_MAX).await {
        // It is there: what it thinks of the question is for whoever asks something.
        Ok(answer) if !answer.status.is_server_error() => Ok(()),
        Ok(answer) => Err(format!("{path} answers {}", answer.excerpt())),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nowhere() -> Endpoint {
        Endpoint::new("http://127.0.0.1:9", None)
    }

    #[tokio::test]
    async fn failures_in_a_row_break_it_for_all_its_models_and_a_new_one_begins_whole() {
        let servers = Servers::default();
        let (one, other) = (servers.circuit(&nowhere(), None), servers.circuit(&nowhere(), None));
        for _ in 0..4 {
            one.failed("refused");
            other.failed("refused");
            other.answered();
        }
        assert!(one.server.is_there(), "never three in a row");
        for _ in 0..3 {
            other.failed("refused");
        }
        let why = one.broken().await.unwrap();
        assert!(why.contains("3 failures") && why.contains("refused"), "{why}");
        assert!(servers.circuit(&nowhere(), None).server.is_there());
    }

    #[tokio::test]
    async fn who_leaves_is_not_told_and_the_last_one_ends_the_looking() {
        let servers = Servers::default();
        let one = servers.circuit(&nowhere(), None);
        one.leave();
        assert_eq!(one.broken().await, None);
        drop(one);
        let more = Endpoint::new("http://127.0.0.1:10", None);
        let _other = servers.circuit(&more, None);
        assert_eq!(servers.0.lock().unwrap().len(), 1, "the first is forgotten");
    }
}
