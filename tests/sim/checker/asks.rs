//! Callers of ensure, load and unload: one answer each, in time and true.

use wharf::scheduler::action::{Answer, Refusal};
use wharf::scheduler::event::EnsureKind;
use wharf::units::{AskId, InstanceId, ModelName};

use super::actions::really_ready;
use super::{Checker, Told};
use crate::machine::Machine;

/// What a caller wants of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    Ready(EnsureKind),
    Gone,
    Asleep,
    Extended,
    Pinned(bool),
}

#[derive(Clone, Debug)]
pub struct Asked {
    pub model: ModelName,
    pub wish: Wish,
    pub deadline: u64,
    /// The newest instance there was.
    pub newest: InstanceId,
    pub gone: bool,
}

impl Checker {
    pub(super) fn asked(&mut self, ask: AskId, model: &ModelName, wish: Wish, deadline: u64) {
        let newest = self.insts.keys().next_back().copied().unwrap_or(InstanceId(0));
        let asked = Asked { model: model.clone(), wish, deadline, newest, gone: false };
        self.asks.insert(ask, asked);
    }

    pub(super) fn check_asks(&mut self, now: u64) {
        let late = self.asks.iter().find(|(_, asked)| asked.deadline < now && !asked.gone);
        if let Some((ask, asked)) = late {
            let message = format!("{ask} for {} got no answer by its deadline", asked.model);
            self.fail(message);
        }
    }

    pub(super) fn answer(&mut self, now: u64, ask: AskId, answer: &Answer, machine: &Machine) {
        let Some(asked) = self.asks.remove(&ask) else {
            let twice = self.answered.contains(&ask);
            let why = if twice { "a second time" } else { "but was never asked" };
            return self.fail(format!("{ask} is answered {why}: {answer:?}"));
        };
        self.answered.insert(ask);
        match answer {
            Answer::Ready { instance, .. } => {
                let known = self.insts.get(instance);
                let fine = matches!(asked.wish, Wish::Ready(_))
                    && known.is_some_and(|known| {
                        known.model == asked.model && known.told == Told::Ready
                    })
                    && really_ready(machine, *instance);
                self.require(fine, || format!("{ask} is told {instance} is ready; it is not"));
            }
            Answer::Unloaded { .. } => {
                let up = self.live.iter().find(|id| {
                    let known = &self.insts[*id];
                    let up = matches!(known.told, Told::Ready | Told::Starting | Told::Waking);
                    known.model == asked.model && up && **id <= asked.newest
                });
                let up = up.copied();
                let fine = asked.wish == Wish::Gone && up.is_none();
                self.require(fine, || format!("{ask} is told {} is gone: {up:?}", asked.model));
            }
            Answer::Asleep { .. } => {
                let sleeps = self.live.iter().any(|id| {
                    let known = &self.insts[id];
                    known.model == asked.model && known.told == Told::Asleep
                });
                let fine = asked.wish == Wish::Asleep && sleeps;
                self.require(fine, || format!("{ask} is told {} sleeps", asked.model));
            }
            Answer::Extended { until, .. } => {
                let ready = self.ready(&asked.model);
                let fine = asked.wish == Wish::Extended && until.0 >= now && ready.is_some();
                self.require(fine, || format!("{ask}: {} is extended", asked.model));
                if let Some(known) = ready.and_then(|id| self.insts.get_mut(&id)) {
                    known.extended = until.0;
                }
            }
            Answer::Pinned { pinned, .. } => {
                let fine = asked.wish == Wish::Pinned(*pinned);
                self.require(fine, || format!("{ask} is told of a pin: {pinned}"));
            }
            Answer::Declined { why } => {
                let fine = !why.is_empty() && self.may_decline(&asked);
                self.require(fine, || format!("{ask} ({:?}) is declined: {why}", asked.wish));
            }
            Answer::TimedOut { .. } => {
                let fine = now >= asked.deadline;
                self.require(fine, || format!("{ask} timed out before its deadline"));
            }
            Answer::Refused(refusal) => self.ask_refused(now, ask, &asked.model, refusal),
        }
    }

    fn may_decline(&self, asked: &Asked) -> bool {
        let spec = self.catalog.model(&asked.model);
        match asked.wish {
            Wish::Ready(EnsureKind::Wake) => !self.live.iter().any(|id| {
                let known = &self.insts[id];
                known.model == asked.model && !known.lost && known.told == Told::Asleep
            }),
            Wish::Extended => {
                let open = self.ready(&asked.model).is_some_and(|id| self.insts[&id].open);
                let runs = spec.is_some_and(|spec| {
                    spec.ttl.is_some_and(|ttl| !ttl.is_zero())
                        && !spec.warmup
                        && !spec.is_external()
                        && !self.may_be_pinned(&spec.name)
                        && !self.kept.contains(&spec.name)
                });
                !(open && runs)
            }
            // For want of a way to sleep, of RAM, of a reading, or of luck.
            Wish::Asleep => true,
            Wish::Ready(_) | Wish::Gone | Wish::Pinned(_) => false,
        }
    }

    fn ask_refused(&mut self, now: u64, ask: AskId, model: &ModelName, refusal: &Refusal) {
        let unknown = self.catalog.model(model).is_none();
        let mismatch = matches!(refusal, Refusal::UnknownModel) && !unknown;
        self.require(!mismatch, || format!("{ask}: {model} is known"));
        self.refusal_is_true(now, model, refusal, None);
    }
}
