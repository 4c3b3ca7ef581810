//! What the owner does when Docker goes away and comes back: its instances are lost until it says
//! which of them still live, and what an earlier run left there is looked up as soon as it answers.

use std::collections::BTreeMap;
use std::time::Duration;

use super::handle::Message;
use super::leftovers::reap;
use super::reconcile::{Adopted, reconcile_docker, uses_docker};
use super::run::Owner;
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
        if self.docker.health.is_some() || !uses_docker(catalog) {
            return;
        }
        self.state.note_docker();
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
                self.step(Event::RuntimeLost { instances: ours, why });
            }
        }
        self.look_for_missed();
    }

    fn docker_is_ok(&self) -> bool {
        self.docker.health.as_ref().is_some_and(|health| health.ok)
    }

    fn in_docker(&self) -> Vec<InstanceId> {
        let is_docker = |handle: &RuntimeHandle| matches!(handle, RuntimeHandle::Docker { .. });
        self.instances
            .iter()
            .filter(|(_, live)| live.slot.peek().is_some_and(|running| is_docker(&running.handle)))
            .map(|(instance, _)| *instance)
            .collect()
    }

    fn ask_who_lives(&self) {
        let (effects, docker) = (self.effects.clone(), self.effects.runtimes.docker.clone());
        let flips = self.docker.flips;
        let running: Vec<_> = self
            .in_docker()
            .into_iter()
            .filter_map(|instance| Some((instance, self.instances.get(&instance)?.slot.peek()?)))
            .collect();
        tokio::spawn(async move {
            let (mut alive, mut dead) = (Vec::new(), Vec::new());
            for (instance, running) in running {
                match docker.is_alive(&running).await {
                    Ok(true) => alive.push(instance),
                    Ok(false) => dead.push(instance),
                    Err(_) => {
                        tokio::time::sleep(ASK_AGAIN).await;
                        effects.inbox.send(Message::WhoLives(WhoLives { flips, found: None }));
                        return;
                    }
                }
            }
            let found = Some((alive, dead));
            effects.inbox.send(Message::WhoLives(WhoLives { flips, found }));
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
        let earlier = 0..=self.docker.last_id;
        tokio::spawn(async move {
            let found = reconcile_docker(&effects, &catalog, &installation, earlier, &named).await;
            if found.is_none() {
                tokio::time::sleep(ASK_AGAIN).await;
            }
            let adopted = found.map(|found| found.adopted);
            effects.inbox.send(Message::FoundInDocker(adopted));
        });
    }

    /// Their models may have been started anew meanwhile, or changed by a reload.
    pub(super) fn found_in_docker(&mut self, found: Option<Vec<Adopted>>) {
        let Some(found) = found else {
            self.docker.missed = true;
            return self.look_for_missed();
        };
        for each in found {
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
    }
}
