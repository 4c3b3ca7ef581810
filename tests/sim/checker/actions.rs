//! Rules for single actions.

use wharf::config::catalog::EngineKind;
use wharf::scheduler::action::{Action, Answer, Refusal};
use wharf::scheduler::record::Phase;
use wharf::units::{AskId, Bytes, GpuId, InstanceId, ModelName, RequestId, SwapId, Time};

use super::{Checker, Known, Move, Told};
use crate::machine::{Machine, Real};
use crate::scenario::fits;

impl Checker {
    pub fn on_action(&mut self, now: u64, action: &Action, machine: &Machine) {
        match action {
            Action::Grant { request, instance } => self.grant(*request, *instance, machine),
            Action::Refuse { request, refusal } => self.refuse(now, *request, refusal),
            Action::OpenGate { instance, permits } => self.open(*instance, *permits, machine),
            Action::CloseGate { instance } => {
                if let Some(known) = self.existing(*instance, "CloseGate") {
                    known.open = false;
                    known.closed_at = Some(now);
                }
            }
            Action::WatchGate { instance, .. } => {
                self.existing(*instance, "WatchGate");
            }
            Action::CancelLeases { instance, .. } => self.cancel(now, *instance, machine),
            Action::Preflight { swap, instance, model, gpus } => {
                self.preflight(*swap, *instance, model, gpus);
            }
            Action::Fetch { swap, instance, .. } => self.fetch(*swap, *instance),
            Action::StartInstance { swap, instance, model, gpus, footprint, deadline } => {
                self.counts.starts += 1;
                self.require(deadline.0 > now, || format!("{instance} starts past its deadline"));
                self.start(*swap, *instance, (model, gpus, *footprint), machine);
            }
            Action::StopInstance { swap, instance } => self.stop(*swap, *instance, machine),
            Action::Sleep { swap, instance } => self.sleep(*swap, *instance, machine),
            Action::Wake { swap, instance, .. } => self.wake(*swap, *instance, machine),
            Action::WatchMemory { swap, .. } => {
                let first = self.watches.insert(*swap);
                self.require(first, || format!("memory is watched twice for {swap}"));
            }
            Action::UnwatchMemory { swap } => {
                let was = self.watches.remove(swap);
                self.require(was, || format!("memory was not watched for {swap}"));
            }
            Action::Answer { ask, answer } => self.answer(now, *ask, answer, machine),
            Action::Record(record) => self.record(now, record),
            Action::Remember { model, learned } => {
                let sane = learned.footprint.is_none_or(|bytes| bytes < Bytes::gib(1000));
                self.require(sane, || format!("learned nonsense of {model}: {learned:?}"));
            }
            Action::Notice { text, .. } => {
                self.require(!text.is_empty(), || "an empty notice".to_owned());
            }
        }
    }

    /// The instance, if the scheduler may still speak of it.
    fn existing(&mut self, instance: InstanceId, what: &str) -> Option<&mut Known> {
        if !self.insts.contains_key(&instance) {
            self.fail(format!("{what} for {instance}, which never was"));
        }
        self.insts.get_mut(&instance)
    }

    fn grant(&mut self, request: RequestId, instance: InstanceId, machine: &Machine) {
        self.counts.grants += 1;
        let Some(waiting) = self.forget(request) else {
            return self.fail(format!("{request} is granted, but does not wait"));
        };
        self.stalled.remove(&waiting.model);
        let Some(known) = self.existing(instance, "Grant") else { return };
        let known = known.clone();
        let fine = known.model == waiting.model
            && known.told == Told::Ready
            && !known.lost
            && really_ready(machine, instance);
        if !fine {
            let real = machine.insts.get(&instance).map(|inst| inst.real);
            return self.fail(format!(
                "{request} for {} is granted on {instance}: {} told {:?}, lost {}, really {real:?}",
                waiting.model, known.model, known.told, known.lost
            ));
        }
        let busy = machine.in_flight(instance);
        if let Some(known) = self.insts.get_mut(&instance) {
            known.in_flight += 1;
        }
        let limit = self.concurrency(&known);
        self.require(busy < limit, || {
            format!("{request} is granted on {instance} beside {busy}; the limit is {limit}")
        });
    }

    fn concurrency(&self, known: &Known) -> u32 {
        let now =
            self.catalog.model(&known.model).map_or(known.spec.concurrency, |s| s.concurrency);
        let limit = |limit: Option<u32>| limit.unwrap_or(u32::MAX);
        // A reload may have changed it: the larger one is in force at worst.
        limit(now).max(limit(known.spec.concurrency))
    }

    fn open(&mut self, instance: InstanceId, permits: u32, machine: &Machine) {
        let Some(known) = self.existing(instance, "OpenGate") else { return };
        (known.open, known.cancelled) = (true, false);
        let known = known.clone();
        let fine = known.told == Told::Ready && !known.lost && really_ready(machine, instance);
        self.require(fine, || format!("the gate of {instance} opens: told {:?}", known.told));
        let limit = self.concurrency(&known);
        self.require(permits <= limit, || {
            format!("the gate of {instance} opens with {permits} permits; the limit is {limit}")
        });
    }

    fn cancel(&mut self, now: u64, instance: InstanceId, machine: &Machine) {
        let drain = self.catalog.settings.swap.drain_timeout.as_millis() as u64;
        let forced = self.forced.clone();
        let shutting_down = self.shutting_down;
        let Some(known) = self.existing(instance, "CancelLeases") else { return };
        known.cancelled = true;
        let noticed = known.closed_at.into_iter().chain(known.listed_at).min();
        let drained = noticed.is_some_and(|at| now >= at + drain) && !known.open;
        let dead = known.told == Told::Gone || known.lost;
        let excused = forced.contains(&known.model) || drained || dead || shutting_down;
        self.require(excused || machine.in_flight(instance) == 0, || {
            format!("leases of {instance} are cancelled before drain_timeout ({noticed:?})")
        });
    }

    fn preflight(&mut self, swap: SwapId, instance: InstanceId, model: &ModelName, gpus: &[GpuId]) {
        let Some(spec) = self.catalog.model(model).cloned() else {
            return self.fail(format!("preflight of {model}, which is not configured"));
        };
        if let Some(known) = self.insts.get(&instance) {
            // A transient fault is tried again.
            let again = known.under_way.is_none() && known.footprint.is_none();
            self.require(again, || format!("{instance} is used twice"));
        }
        self.require(!self.shutting_down, || format!("{model} starts during shutdown"));
        self.insts.insert(instance, Known::new(model, spec, gpus));
        self.live.insert(instance);
        self.begin_move(Move::Preflight, swap, instance);
    }

    fn fetch(&mut self, swap: SwapId, instance: InstanceId) {
        let Some(known) = self.existing(instance, "Fetch") else { return };
        let fine = known.preflight;
        self.require(fine, || format!("{instance} is fetched before its preflight passed"));
        self.begin_move(Move::Fetch, swap, instance);
    }

    fn begin_move(&mut self, what: Move, swap: SwapId, instance: InstanceId) {
        let Some(known) = self.existing(instance, "a move") else { return };
        let busy = known.under_way;
        let cancels = what == Move::Stop
            && matches!(busy, Some((Move::Preflight | Move::Fetch | Move::Start | Move::Wake, _)));
        (known.under_way, known.last_for) = (Some((what, swap)), Some(swap));
        known.launched |= what == Move::Start;
        let lost = known.lost;
        self.require(busy.is_none() || cancels, || {
            format!("{what:?} of {instance} for {swap} during {busy:?}")
        });
        self.require(!lost || what == Move::Stop, || {
            format!("{what:?} of {instance}, whose runtime is lost")
        });
        let ended = self.ended.contains(&swap) && what != Move::Stop;
        self.require(!ended, || format!("{what:?} of {instance} for {swap}, which has ended"));
        // What was never launched, or is gone, holds nothing.
        let known = &self.insts[&instance];
        let launched = known.launched;
        if what != Move::Stop || (launched && known.told != Told::Gone) {
            self.profiling_is_alone(what, instance);
        }
    }

    /// While a vLLM instance profiles its memory nothing else moves on its GPUs.
    fn profiling_is_alone(&mut self, what: Move, instance: InstanceId) {
        if matches!(what, Move::Preflight | Move::Fetch) || self.shutting_down {
            return;
        }
        let me = &self.insts[&instance];
        let starts_vllm = what == Move::Start && me.spec.engine == EngineKind::Vllm;
        let clash = self.live.iter().filter(|&&other| other != instance).find(|other| {
            let other = &self.insts[*other];
            let shares = other.gpus.iter().any(|gpu| me.gpus.contains(gpu));
            let moves = matches!(
                other.under_way,
                Some((Move::Start | Move::Stop | Move::Sleep | Move::Wake, _))
            );
            shares && (other.profiling || (starts_vllm && moves && other.launched))
        });
        if let Some(&other) = clash {
            let other_move = self.insts[&other].under_way;
            self.fail(format!(
                "{what:?} of {instance} while {other} ({other_move:?}) is on the same GPU and one \
                 of them is vLLM profiling its memory"
            ));
        }
    }

    fn start(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        (model, gpus, footprint): (&ModelName, &[GpuId], Option<Bytes>),
        machine: &Machine,
    ) {
        self.second_try(swap, instance, model);
        let Some(known) = self.existing(instance, "StartInstance") else { return };
        let ready = known.preflight && known.fetched && known.model == *model;
        known.gpus = gpus.to_vec();
        self.require(ready, || format!("{instance} starts without preflight and fetch"));
        self.begin_move(Move::Start, swap, instance);
        self.start_is_wanted(instance, model);
        self.start_fits(instance, gpus, footprint, machine);
        self.start_fits_host(instance);
        self.live.insert(instance);
        if let Some(known) = self.insts.get_mut(&instance) {
            known.footprint = footprint;
            known.told = Told::Starting;
            known.profiling = known.spec.engine == EngineKind::Vllm && !known.gpus.is_empty();
        }
    }

    /// The one retry inside a swap is a new instance; what was checked and fetched still counts.
    fn second_try(&mut self, swap: SwapId, instance: InstanceId, model: &ModelName) {
        let recorded = self.swaps.get(&swap).is_some_and(|record| {
            record.model == *model && record.phases.iter().any(|(phase, _)| *phase == Phase::Start)
        });
        let tried = self.insts.values().any(|known| known.launched && known.model == *model);
        let spec = self.catalog.model(model).filter(|_| recorded && tried).cloned();
        if let (None, Some(spec)) = (self.insts.get(&instance), spec) {
            let known = Known { preflight: true, fetched: true, ..Known::new(model, spec, &[]) };
            self.insts.insert(instance, known);
        }
    }

    fn start_is_wanted(&mut self, instance: InstanceId, model: &ModelName) {
        self.require(!self.shutting_down, || format!("{model} starts during shutdown"));
        let up = |id: &&InstanceId| {
            let other = &self.insts[*id];
            let up = !matches!(other.told, Told::Preparing | Told::Asleep);
            **id != instance && up && other.launched && other.wants_gpu()
        };
        let on_gpu = self.insts[&instance].wants_gpu();
        let others = self.live.iter().filter(up).count();
        let twin = self.live.iter().find(|&&id| {
            let other = &self.insts[&id];
            id != instance && other.model == *model && other.told == Told::Ready
        });
        let twin = twin.copied();
        self.require(twin.is_none(), || format!("{model} starts beside its ready {twin:?}"));
        if let Some(most) = self.models_max()
            && on_gpu
        {
            self.require(others < most, || {
                format!("{model} starts beside {others} others, {most} may be up at once")
            });
        }
    }

    fn sleep(&mut self, swap: SwapId, instance: InstanceId, machine: &Machine) {
        self.counts.sleeps += 1;
        let Some(known) = self.existing(instance, "Sleep") else { return };
        let fine = known.told == Told::Ready && known.spec.sleep.is_some();
        known.told = Told::FallingAsleep;
        self.require(fine, || format!("{instance} is put to sleep, but is not ready to"));
        self.begin_move(Move::Sleep, swap, instance);
        self.idle(instance, machine, "put to sleep");
        self.leaving.push((swap, instance));
    }

    fn wake(&mut self, swap: SwapId, instance: InstanceId, machine: &Machine) {
        self.counts.wakes += 1;
        let Some(known) = self.existing(instance, "Wake") else { return };
        let fine = known.told == Told::Asleep;
        known.told = Told::Waking;
        let gpus = known.gpus.clone();
        self.require(fine, || format!("{instance} is woken, but does not sleep"));
        self.begin_move(Move::Wake, swap, instance);
        self.wake_fits(instance, &gpus, machine);
    }

    fn stop(&mut self, swap: SwapId, instance: InstanceId, machine: &Machine) {
        self.counts.stops += 1;
        let Some(known) = self.existing(instance, "StopInstance") else { return };
        let was_up = !matches!(known.told, Told::Gone | Told::Preparing);
        if known.told != Told::Gone {
            known.told = Told::Stopping;
        }
        known.profiling = false;
        // Also of one that died: something may be left of it.
        self.begin_move(Move::Stop, swap, instance);
        if was_up {
            self.idle(instance, machine, "stopped");
            self.leaving.push((swap, instance));
        }
    }

    /// Without leases, unless they were cancelled with good reason; and behind a closed gate.
    fn idle(&mut self, instance: InstanceId, machine: &Machine, what: &str) {
        let known = &self.insts[&instance];
        let (cancelled, open) = (known.cancelled, known.open);
        let leases = machine.in_flight(instance);
        let dead = machine.insts.get(&instance).is_none_or(|inst| inst.real == Real::Gone);
        self.require(leases == 0 || cancelled || dead, || {
            format!("{instance} is {what} with {leases} leases")
        });
        self.require(!open, || format!("{instance} is {what} behind an open gate"));
    }

    fn answer(&mut self, now: u64, ask: AskId, answer: &Answer, machine: &Machine) {
        let Some(asked) = self.asks.remove(&ask) else {
            let twice = self.answered.contains(&ask);
            let why = if twice { "a second time" } else { "but was never asked" };
            return self.fail(format!("{ask} is answered {why}: {answer:?}"));
        };
        self.answered.insert(ask);
        match answer {
            Answer::Ready { instance, .. } => {
                let known = self.insts.get(instance);
                let fine = asked.kind.is_some()
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
                let fine = asked.kind.is_none() && up.is_none();
                self.require(fine, || format!("{ask} is told {} is gone: {up:?}", asked.model));
            }
            Answer::TimedOut { .. } => {
                let fine = now >= asked.deadline;
                self.require(fine, || format!("{ask} timed out before its deadline"));
            }
            Answer::Refused(refusal) => self.ask_refused(now, ask, &asked.model, refusal),
        }
    }

    fn ask_refused(&mut self, now: u64, ask: AskId, model: &ModelName, refusal: &Refusal) {
        let unknown = self.catalog.model(model).is_none();
        let mismatch = matches!(refusal, Refusal::UnknownModel) && !unknown;
        self.require(!mismatch, || format!("{ask}: {model} is known"));
        self.refusal_is_true(now, model, refusal, None);
    }

    fn refuse(&mut self, now: u64, request: RequestId, refusal: &Refusal) {
        *self.counts.refusals.entry(refusal_name(refusal)).or_default() += 1;
        let before = self.waiting.len();
        let of_model = |checker: &Checker, model: &ModelName| {
            checker.waiting.values().filter(|other| other.model == *model).count()
        };
        let Some(waiting) = self.forget(request) else {
            return self.fail(format!("{request} is refused, but does not wait: {refusal:?}"));
        };
        let queue = self.catalog.settings.queue.clone();
        match refusal {
            Refusal::QueueTimeout { .. } => {
                // A retry's age counts from its first arrival.
                let timeout = queue.timeout.as_millis() as u64;
                let early = now + 2 * timeout < waiting.due || now < waiting.at;
                self.require(!early, || format!("{request} timed out early"));
            }
            Refusal::QueueFull { per_model: true, .. } => {
                let others = of_model(self, &waiting.model) + 1;
                let full = others > queue.per_model as usize;
                self.require(full, || format!("{request}: queue not full, {others} wait"));
            }
            Refusal::QueueFull { per_model: false, .. } => {
                let full = before > queue.limit as usize;
                self.require(full, || format!("{request}: queue not full, {before} wait"));
            }
            Refusal::NotLoaded => {
                let asked = waiting.never_start;
                self.require(asked, || format!("{request} did not ask for start: never"));
            }
            _ => {}
        }
        self.refusal_is_true(now, &waiting.model, refusal, Some(waiting.at));
    }

    fn refusal_is_true(
        &mut self,
        now: u64,
        model: &ModelName,
        refusal: &Refusal,
        arrived: Option<u64>,
    ) {
        let spec = self.catalog.model(model).cloned();
        let holds = match refusal {
            Refusal::UnknownModel => spec.is_none(),
            Refusal::Removed => spec.is_none(),
            // Under notice it takes no one new.
            Refusal::NotLoaded => self.ready(model).is_none_or(|id| {
                let known = &self.insts[&id];
                !known.open || known.in_flight >= known.spec.concurrency.unwrap_or(u32::MAX)
            }),
            Refusal::CannotFit { .. } => self.may_never_fit(spec.as_deref()),
            Refusal::StartFailed { retry_at, .. } => {
                self.failed_models.contains(model) && *retry_at >= Time(now)
            }
            Refusal::VramNeverFreed { .. } => !self.calm,
            Refusal::NoVramProof { .. } => self.no_proof,
            Refusal::RuntimeLost { .. } => self.ever_lost,
            Refusal::InstanceLost { .. } => !self.calm,
            Refusal::ShuttingDown => self.shutting_down,
            Refusal::Unloaded => !self.calm,
            Refusal::QueueTimeout { .. } => !self.calm || arrived.is_none(),
            Refusal::QueueFull { .. } => true,
        };
        self.require(holds, || format!("{model} is refused without reason: {refusal:?}"));
    }

    fn may_never_fit(&self, spec: Option<&wharf::config::catalog::ModelSpec>) -> bool {
        let Some(spec) = spec else { return false };
        let pinned = self.catalog.models.values().any(|other| other.pinned);
        pinned || fits(&self.catalog, &self.gpus, self.host_total(), spec) != Some(true)
    }
}

/// Ready in truth, or dead so freshly that nobody could know.
fn really_ready(machine: &Machine, instance: InstanceId) -> bool {
    machine
        .insts
        .get(&instance)
        .is_some_and(|inst| matches!(inst.real, Real::Ready | Real::Gone | Real::Dying))
}

fn refusal_name(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::UnknownModel => "unknown_model",
        Refusal::NotLoaded => "not_loaded",
        Refusal::QueueFull { .. } => "queue_full",
        Refusal::QueueTimeout { .. } => "queue_timeout",
        Refusal::CannotFit { .. } => "cannot_fit",
        Refusal::StartFailed { .. } => "start_failed",
        Refusal::VramNeverFreed { .. } => "vram_never_freed",
        Refusal::NoVramProof { .. } => "no_vram_proof",
        Refusal::RuntimeLost { .. } => "runtime_lost",
        Refusal::Unloaded => "unloaded",
        Refusal::Removed => "removed",
        Refusal::InstanceLost { .. } => "instance_lost",
        Refusal::ShuttingDown => "shutting_down",
    }
}
