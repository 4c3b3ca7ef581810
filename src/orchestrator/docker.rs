//! What the owner does when Docker goes away and comes back: its instances are lost until it says
//! which of them still live, and what an earlier run left there is looked up as soon as it answers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::handle::Message;
use super::leftovers::reap;
use super::reconcile::{InDocker, reconcile_docker, uses_docker};
use super::run::{Live, Owner};
use super::start::follow_docker;
use super::view::Health;
use crate::config::catalog::Catalog;
use crate::runtime::RuntimeHandle;
use crate::scheduler::event::Event;
use crate::units::{InstanceId, ModelName};

/// From a question that Docker did not answer, although it seems well, to the next.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Which instances Docker still runs; `None`: it did not say.
#[derive(Debug)]
pub struct WhoLives {
    /// Of [`DockerState`] when it was asked.
    pub flips: u64,
    pub found: Option<(Vec<InstanceId>, Vec<InstanceId>)>,
}

/// What the owner knows of Docker.
#[derive(Debug, Default)]
pub(super) struct DockerState {
    /// `None`: no model runs in Docker, nor did any in an earlier run.
    pub health: Option<Health>,
    /// How often it went away or came back: an answer from before the last time is stale.
    pub flips: u64,
    /// What an earlier run left is still to be looked up.
    pub missed: bool,
    /// The last id of an earlier run.
    pub last_id: u64,
    /// Ids set aside for containers named in the configuration, should they be found running.
    pub named: BTreeMap<ModelName, InstanceId>,
}

impl Owner {
    /// A reload may bring the first model that runs in Docker.
    pub(super) fn follow_docker_if_used(&mut self, catalog: &Catalog) {
        if !uses_docker(catalog) {
            return;
        }
        self.writer.note_docker();
        if self.docker.health.is_some() {
            return;
        }
        let docker = self.effects.runtimes.docker.clone();
        docker.connect();
        let inbox = self.effects.inbox.clone();
        self.foreign = follow_docker(&docker, inbox, self.state.installation.clone());
        self.docker.health = Some(docker.health().borrow().clone());
        self.docker.missed = true;
    }

    pub(super) fn docker_health(&mut self, health: Health) {
        let was_ok = self.docker.health.as_ref().is_none_or(|known| known.ok);
        let is_ok = health.ok;
        let why = health.detail.clone();
        self.docker.health = Some(health);
        if was_ok != is_ok {
            self.docker.flips += 1;
            let ours = self.in_docker();
            if is_ok {
                self.ask_who_lives();
            } else if !ours.is_empty() {
                let instances = ours.into_iter().map(|(instance, _)| instance).collect();
                self.step(Event::RuntimeLost { instances, why });
            }
        }
        self.look_for_missed();
    }

    fn docker_is_ok(&self) -> bool {
        self.docker.health.as_ref().is_some_and(|health| health.ok)
    }

    /// Our instances that are containers, with the containers' ids.
    fn in_docker(&self) -> Vec<(InstanceId, String)> {
        let container = |(instance, live): (&InstanceId, &Live)| match live.slot.peek()?.handle {
            RuntimeHandle::Docker { id, .. } => Some((*instance, id)),
            RuntimeHandle::Process { .. }
            | RuntimeHandle::External
            | RuntimeHandle::Ollama { .. } => None,
        };
        self.instances.iter().filter_map(container).collect()
    }

    fn ask_who_lives(&self) {
        let (inbox, docker) = (self.effects.inbox.clone(), self.effects.runtimes.docker.clone());
        let (flips, ours) = (self.docker.flips, self.in_docker());
        tokio::spawn(async move {
            let ids: Vec<String> = ours.iter().map(|(_, id)| id.clone()).collect();
            let found = match docker.running_of(&ids).await {
                Ok(running) => {
                    let (alive, dead): (Vec<_>, Vec<_>) =
                        ours.into_iter().partition(|(_, id)| running.contains(id));
                    let instances = |those: Vec<(InstanceId, String)>| {
                        those.into_iter().map(|(id, _)| id).collect()
                    };
                    Some((instances(alive), instances(dead)))
                }
                Err(_) => {
                    tokio::time::sleep(ASK_AGAIN).await;
                    None
                }
            };
            inbox.send(Message::WhoLives(WhoLives { flips, found }));
        });
    }

    /// An answer from before Docker last went away says nothing about who was lost then.
    pub(super) fn who_lives(&mut self, answer: WhoLives) {
        if answer.flips != self.docker.flips {
            return;
        }
        match answer.found {
            Some((alive, dead)) => self.step(Event::RuntimeBack { alive, dead }),
            None => self.ask_who_lives(),
        }
    }

    /// Once Docker answers, if it did not when Wharf started.
    pub(super) fn look_for_missed(&mut self) {
        if !self.docker_is_ok() || !std::mem::take(&mut self.docker.missed) {
            return;
        }
        let (effects, catalog) = (self.effects.clone(), self.shared.catalog.load_full());
        let (installation, named) = (self.state.installation.clone(), self.docker.named.clone());
        let (earlier, known) = (0..=self.docker.last_id, self.known_of_earlier());
        tokio::spawn(async move {
            let found =
                reconcile_docker(&effects, &catalog, &installation, earlier, &known, &named).await;
            if found.as_ref().is_none_or(|found| found.any_missed) {
                tokio::time::sleep(ASK_AGAIN).await;
            }
            effects.inbox.send(Message::FoundInDocker(found));
        });
    }

    /// What an earlier look brought, and containers by name whose model runs.
    fn known_of_earlier(&self) -> BTreeSet<InstanceId> {
        let runs = |model: &ModelName| self.instances.values().any(|live| live.spec.name == *model);
        let named = self.docker.named.iter().filter(|(model, _)| runs(model)).map(|(_, id)| *id);
        self.instances.keys().chain(self.leftovers.keys()).copied().chain(named).collect()
    }

    /// Their models may have been started anew meanwhile, or changed by a reload.
    pub(super) fn found_in_docker(&mut self, found: Option<InDocker>) {
        let any_missed = found.as_ref().is_none_or(|found| found.any_missed);
        for each in found.map(|found| found.adopted).unwrap_or_default() {
            let identity = &each.running.identity;
            let catalog = self.shared.catalog.load();
            let spec = catalog.model(&identity.model);
            let is_current = spec.is_some_and(|spec| spec.shape_hash() == identity.spec_hash);
            let is_replaced = self.instances.contains_key(&identity.instance)
                || self.instances.values().any(|live| live.spec.name == identity.model);
            let why = match (is_current, is_replaced) {
                (true, false) => {
                    self.adopt(each);
                    continue;
                }
                (_, true) => "its model was started anew",
                (false, false) => "its configuration changed since",
            };
            // The container that is named is the one that was started anew.
            let is_named = matches!(each.running.handle, RuntimeHandle::Docker { named: true, .. });
            if !is_named {
                let effects = self.effects.clone();
                tokio::spawn(async move {
                    reap(&effects, &each.running, why).await;
                });
            }
        }
        if any_missed {
            self.docker.missed = true;
            self.look_for_missed();
        }
    }
}
