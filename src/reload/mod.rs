//! The one owner of the configuration in force: the file, what callers registered and patched, and
//! what follows from them outside the orchestrator (listeners, front doors).
//!
//! [`Reloads`] is how everyone else asks it; [`owner`] answers, one change after the other.

mod certificates;
mod doors;
mod listeners;
mod owner;
mod source;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use crate::config::diff::Changes;
use crate::config::{ConfigErrors, LeftOut, Overlay, Override, Problem};
use crate::store::{Registration, StoreFault};
use crate::units::ModelName;

pub use certificates::Certificates;
pub use listeners::{Bound, Listeners, Routers, occupant};
pub use owner::start;
pub use source::{Built, Flag, Misfits, Source};

/// Changes that may wait for their turn.
const ASKS_MAX: usize = 64;
/// Binding retries, the store and the orchestrator each have a bound; together they stay below.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Asks for changes of the configuration, and shows what is in force. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Reloads {
    to: mpsc::Sender<Ask>,
    now: Arc<ArcSwap<InForce>>,
}

/// What is in force beside the catalog: where it came from.
#[derive(Clone, Debug, Default)]
pub struct InForce {
    pub file: PathBuf,
    /// As stored, what is left out among it.
    pub overlay: Overlay,
    pub left_out: Vec<LeftOut>,
    /// What environment variables of the swapper service said.
    pub overrides: Vec<Override>,
    pub flags: Vec<Flag>,
    pub in_file: BTreeSet<String>,
    pub defaults: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Ask {
    what: What,
    reply: Option<oneshot::Sender<Result<Changed, Rejected>>>,
}

#[derive(Debug)]
enum What {
    Reload {
        why: &'static str,
    },
    /// `null` removes a patch.
    Patch(BTreeMap<String, Value>),
    Register(Registration),
    Unregister(ModelName),
}

/// What a change did.
#[derive(Clone, Debug, Default)]
pub struct Changed {
    pub changes: Changes,
    /// Keys that the file changes in vain until a restart.
    pub needs_restart: Vec<String>,
    pub warnings: Vec<Problem>,
    pub left_out: Vec<LeftOut>,
    /// A registration of the same name was replaced.
    pub replaced: bool,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Rejected {
    #[error("{0}")]
    Config(#[from] ConfigErrors),
    /// A key file that cannot be read, a control API that would be open to everyone.
    #[error("{0}")]
    Unfit(String),
    /// Somebody else listens there.
    #[error("{0}")]
    Taken(String),
    #[error("model {0} comes from models.yaml: remove it there")]
    InFile(ModelName),
    #[error("no model called {0} is registered")]
    NotRegistered(ModelName),
    #[error("{0}")]
    Full(String),
    #[error("{0}")]
    Store(#[from] StoreFault),
    #[error("Wharf is shutting down, or its configuration is not ready yet")]
    Closed,
}

impl Reloads {
    /// Reads the file again. `why` is said in the log.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn reload(&self, why: &'static str) -> Result<Changed, Rejected> {
        self.ask(What::Reload { why }).await
    }

    /// Sets patches and removes those that are `null`: all of them or none.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn patch(&self, patches: BTreeMap<String, Value>) -> Result<Changed, Rejected> {
        self.ask(What::Patch(patches)).await
    }

    /// Adds a model, or replaces the registration of that name.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn register(&self, registration: Registration) -> Result<Changed, Rejected> {
        self.ask(What::Register(registration)).await
    }

    /// Takes a registered model away; what runs is drained.
    ///
    /// # Errors
    /// Why nothing was changed.
    pub async fn unregister(&self, model: ModelName) -> Result<Changed, Rejected> {
        self.ask(What::Unregister(model)).await
    }

    pub fn in_force(&self) -> Arc<InForce> {
        self.now.load_full()
    }

    async fn ask(&self, what: What) -> Result<Changed, Rejected> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.to.send(Ask { what, reply: Some(reply) }).await.map_err(|_| Rejected::Closed)?;
            answer.await.unwrap_or(Err(Rejected::Closed))
        };
        tokio::time::timeout(ANSWER_WITHIN, asked).await.unwrap_or(Err(Rejected::Closed))
    }
}
