//! Instances of an earlier run that shall go and do not: tried again until they are gone, and
//! shown until then. Their memory is theirs: the proof of memory sees it as a stranger's.

use std::time::Duration;

use super::effects::Effects;
use super::handle::{Inbox, Message};
use super::run::Owner;
use super::view::Leftover;
use crate::config::catalog::StopSpec;
use crate::runtime::{Running, RuntimeHandle};
use crate::scheduler::event::Fault;
use crate::units::InstanceId;

const REAP_GRACE: Duration = Duration::from_secs(5);
const AGAIN_FIRST: Duration = Duration::from_secs(5);
const AGAIN_MAX: Duration = Duration::from_secs(300);

/// What became of one leftover.
#[derive(Debug)]
pub enum LeftoverNews {
    Stays(Leftover),
    Gone(InstanceId),
}

/// Ends an instance that nobody wants; what does not go at once is followed until it does.
/// False: it is still there.
pub async fn reap(effects: &Effects, running: &Running, why: &str) -> bool {
    let (model, instance) = (&running.identity.model, running.identity.instance);
    tracing::info!(%model, %instance, "reaping an instance of an earlier run: {why}");
    let Err(fault) = stop(effects, running).await else { return true };
    let (effects, running) = (effects.clone(), running.clone());
    tokio::spawn(async move {
        let again = || stop(&effects, &running);
        follow(&effects, &running, fault, again).await;
    });
    false
}

async fn stop(effects: &Effects, running: &Running) -> Result<(), Fault> {
    let stop = StopSpec { signal: "SIGTERM".to_owned(), grace: REAP_GRACE };
    effects.stop_within(running, &stop).await
}

async fn follow<F>(effects: &Effects, running: &Running, first: Fault, again: impl Fn() -> F)
where
    F: Future<Output = Result<(), Fault>>,
{
    let identity = &running.identity;
    let (model, instance) = (&identity.model, identity.instance);
    let (since, mut wait, mut fault) = (effects.now(), AGAIN_FIRST, first);
    loop {
        tracing::error!(%model, %instance, "failed to reap, next attempt in {wait:?}: {}", fault.message);
        let leftover = Leftover {
            instance,
            model: model.clone(),
            what: name_of(&running.handle),
            fault,
            since,
            next_attempt: effects.now() + wait,
        };
        tell(&effects.inbox, LeftoverNews::Stays(leftover));
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(AGAIN_MAX);
        match again().await {
            Ok(()) => break,
            Err(next) => fault = next,
        }
    }
    tracing::info!(%model, %instance, "the leftover is gone");
    tell(&effects.inbox, LeftoverNews::Gone(instance));
}

fn tell(inbox: &Inbox, news: LeftoverNews) {
    inbox.send(Message::Leftover(news));
}

fn name_of(handle: &RuntimeHandle) -> String {
    match handle {
        RuntimeHandle::Process { pid, .. } => format!("process {pid}"),
        RuntimeHandle::Docker { name, .. } => format!("container {name}"),
        RuntimeHandle::External => "an external engine".to_owned(),
        RuntimeHandle::Ollama { model } => format!("{model} in Ollama"),
    }
}

impl Owner {
    pub(super) fn leftover(&mut self, news: LeftoverNews) {
        match news {
            LeftoverNews::Stays(leftover) => {
                self.leftovers.insert(leftover.instance, leftover);
            }
            LeftoverNews::Gone(instance) => {
                self.leftovers.remove(&instance);
            }
        }
    }
}
