//! What must be true of every action, by books of its own: from the actions and what engines
//! reported, never from the scheduler's state.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use wharf::config::catalog::{Catalog, EngineKind, ModelSpec};
use wharf::scheduler::action::{Action, Refusal};
use wharf::units::{Bytes, GpuId, InstanceId, ModelName, RequestId};

use crate::models::{GPU, bytes};
use crate::world::{Move, World};

/// What the scheduler was told of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Told {
    Preparing,
    Starting,
    Ready,
    FallingAsleep,
    Asleep,
    Waking,
    Stopping,
}

#[derive(Clone, Debug)]
pub struct Book {
    pub model: ModelName,
    pub gpus: Vec<GpuId>,
    pub told: Told,
    /// From the start until a sample showed that it holds nothing any more.
    pub promised: Bytes,
    pub ready_at: u64,
    /// Since when it takes nobody any more, or has to leave.
    pub closed_at: Option<u64>,
}

#[derive(Clone, Debug, Default)]
pub struct Reference {
    pub books: BTreeMap<InstanceId, Book>,
    /// Waiting requests: since when, and for which model.
    pub waiting: BTreeMap<RequestId, (u64, ModelName)>,
    /// Models whose moves have failed.
    pub failed: BTreeSet<ModelName>,
    /// Somebody could not be stopped, or its memory is late.
    pub stuck: bool,
    /// Until a grant, or a refusal by the queue's timeout; counted from here on at the earliest.
    pub longest_wait: u64,
    pub counts_from: u64,
    /// The longest that a start took which completed.
    pub slowest_start: u64,
}

type Check = Result<(), String>;

fn require(fine: bool, why: impl FnOnce() -> String) -> Check {
    if fine { Ok(()) } else { Err(why()) }
}

impl World {
    /// Before the action is performed.
    pub fn judge(&mut self, action: &Action) -> Check {
        match action {
            Action::Grant { request, instance } => self.judge_grant(*request, *instance),
            Action::Refuse { request, refusal } => self.judge_refusal(*request, refusal),
            Action::OpenGate { instance, permits } => {
                let book = self.book(*instance)?;
                require(book.told == Told::Ready, || {
                    format!("the gate of {} opens while {:?}", book.model, book.told)
                })?;
                let places = self.spec(&book.model).concurrency.unwrap_or(u32::MAX);
                require(*permits <= places, || format!("{permits} places for {}", book.model))
            }
            Action::CloseGate { instance } => self.judge_notice(*instance),
            Action::CancelLeases { instance, .. } => {
                let (book, now) = (self.book(*instance)?, self.now);
                let drain = self.catalog().settings.swap.drain_timeout.as_millis() as u64;
                let late = book.closed_at.is_some_and(|at| at + drain <= now);
                require(late, || format!("leases of {} are cut before its deadline", book.model))
            }
            Action::Preflight { instance, model, gpus, .. } => {
                let twin = self.reference.books.values().find(|book| book.model == *model);
                let fine = twin.is_none_or(|book| book.told == Told::Stopping);
                require(fine, || format!("a second instance of {model}"))?;
                let book = Book {
                    model: model.clone(),
                    gpus: gpus.clone(),
                    told: Told::Preparing,
                    promised: Bytes::ZERO,
                    ready_at: 0,
                    closed_at: None,
                };
                self.reference.books.insert(*instance, book);
                Ok(())
            }
            Action::Fetch { instance, .. } => self.judge_move(*instance, Told::Preparing, &[]),
            Action::StartInstance { instance, model, gpus, footprint, .. } => {
                if !self.reference.books.contains_key(instance) {
                    self.judge(&Action::Preflight {
                        swap: wharf::units::SwapId(0),
                        instance: *instance,
                        model: model.clone(),
                        gpus: gpus.clone(),
                    })?;
                }
                require(*footprint == Some(bytes(&self.spec(model))), || {
                    format!("{model} starts with {footprint:?}")
                })?;
                self.judge_load(*instance, Told::Preparing, gpus)?;
                self.book_mut(*instance)?.gpus.clone_from(gpus);
                self.tell(*instance, Told::Starting)
            }
            Action::Wake { instance, .. } => {
                let gpus = self.book(*instance)?.gpus;
                self.judge_load(*instance, Told::Asleep, &gpus)?;
                self.tell(*instance, Told::Waking)
            }
            Action::Sleep { instance, .. } => {
                let gpus = self.book(*instance)?.gpus;
                self.judge_move(*instance, Told::Ready, &gpus)?;
                self.judge_leaving(*instance)?;
                self.tell(*instance, Told::FallingAsleep)
            }
            Action::StopInstance { instance, .. } => {
                let Ok(book) = self.book(*instance) else { return Ok(()) };
                let under_way = self.engines.get(instance).and_then(|e| e.moving);
                let fine = !matches!(under_way, Some((Move::Stop | Move::Release, _)));
                require(fine, || format!("{} is stopped twice", book.model))?;
                // Who holds nothing disturbs nobody.
                if book.promised > Bytes::ZERO {
                    self.judge_neighbours(*instance, &book.gpus)?;
                }
                self.judge_leaving(*instance)?;
                self.tell(*instance, Told::Stopping)
            }
            Action::WatchGate { .. }
            | Action::WatchMemory { .. }
            | Action::Prepare { .. }
            | Action::UnwatchMemory { .. }
            | Action::Remember { .. }
            | Action::Notice { .. } => Ok(()),
            Action::Record(record) => {
                // A gate that was never opened is not closed: this is when its notice begins.
                for evicted in &record.evicted {
                    if let Some(book) = self.reference.books.get_mut(&evicted.instance) {
                        book.closed_at.get_or_insert(self.now);
                    }
                }
                // What was not started and is not being fetched any more ends with its swap.
                if let (Some(instance), Some(_)) = (record.instance, &record.outcome) {
                    let prepared = |book: &Book| book.told == Told::Preparing;
                    let ended = self.reference.books.get(&instance).is_some_and(prepared);
                    if ended && self.engines.get(&instance).is_none_or(|e| e.moving.is_none()) {
                        self.reference.books.remove(&instance);
                        self.engines.remove(&instance);
                    }
                }
                Ok(())
            }
            Action::TtlExtended { .. } | Action::Answer { .. } => {
                Err("nobody has asked for that".to_owned())
            }
        }
    }

    fn judge_grant(&mut self, request: RequestId, instance: InstanceId) -> Check {
        let Some((since, model)) = self.reference.waiting.remove(&request) else {
            return Err(format!("{request} is granted and does not wait"));
        };
        let first = self.reference.waiting.iter().find(|(_, (_, other))| *other == model);
        require(first.is_none_or(|(&first, _)| request < first), || {
            format!("{request} is granted before {first:?}")
        })?;
        let book = self.book(instance)?;
        require(book.model == model && book.told == Told::Ready, || {
            format!("{request} for {model} is granted on {} ({:?})", book.model, book.told)
        })?;
        let places = self.spec(&model).concurrency.unwrap_or(u32::MAX);
        let gate = self.engines[&instance].gate;
        let taken = gate.count.in_flight;
        require(taken < places, || format!("{model} serves {taken} and gets one more"))?;
        // Else the gateway may take the same place in that moment.
        require(places == u32::MAX || !gate.open, || {
            format!("{request} is granted on {model} with its gate open")
        })?;
        self.count_wait(since);
        Ok(())
    }

    /// A wait ended: by a grant, or because it was too long (who should have been served by then
    /// is a finding, however politely it was refused).
    fn count_wait(&mut self, since: u64) {
        let waited = self.now - since.max(self.reference.counts_from);
        self.reference.longest_wait = self.reference.longest_wait.max(waited);
    }

    fn judge_refusal(&mut self, request: RequestId, refusal: &Refusal) -> Check {
        // One that is refused at its arrival has not begun to wait.
        let waited = self.reference.waiting.remove(&request);
        let Some((since, model)) = waited else {
            return Err(format!("{request} is refused and does not wait"));
        };
        let timeout = self.catalog().settings.queue.timeout.as_millis() as u64;
        let fine = match refusal {
            Refusal::StartFailed { .. } => self.reference.failed.contains(&model),
            Refusal::VramNeverFreed { .. } => self.reference.stuck,
            Refusal::QueueTimeout { .. } => {
                self.count_wait(since);
                since + timeout <= self.now
            }
            Refusal::UnknownModel
            | Refusal::NotLoaded
            | Refusal::QueueFull { .. }
            // Nothing is learned of so few requests.
            | Refusal::Overloaded { .. }
            | Refusal::CannotFit { .. }
            | Refusal::KeptApart { .. }
            | Refusal::NoVramProof { .. }
            | Refusal::RuntimeLost { .. }
            | Refusal::Unloaded
            | Refusal::Removed
            | Refusal::InstanceLost { .. }
            | Refusal::ShuttingDown => false,
        };
        require(fine, || format!("{request} for {model} is refused: {refusal:?}"))
    }

    /// A busy model for which nobody waits is closed: that is notice, and its tenure comes first.
    fn judge_notice(&mut self, instance: InstanceId) -> Check {
        let (book, now) = (self.book(instance)?, self.now);
        let busy = self.engines[&instance].gate.count.in_flight > 0;
        let own = self.reference.waiting.values().any(|(_, model)| *model == book.model);
        let least = self.catalog().settings.swap.min_residency.as_millis() as u64;
        require(!busy || own || now >= book.ready_at + least, || {
            format!("{} gets notice {} ms after it became ready", book.model, now - book.ready_at)
        })?;
        self.book_mut(instance)?.closed_at = Some(now);
        Ok(())
    }

    /// At most one move an instance, from the state it belongs to.
    fn judge_move(&self, instance: InstanceId, from: Told, gpus: &[GpuId]) -> Check {
        let book = self.book(instance)?;
        require(book.told == from, || format!("{} is moved while {:?}", book.model, book.told))?;
        let under_way = self.engines.get(&instance).and_then(|e| e.moving);
        require(under_way.is_none(), || format!("{} is in {under_way:?}", book.model))?;
        self.judge_neighbours(instance, gpus)
    }

    /// While a vLLM measures its memory nothing moves beside it.
    fn judge_neighbours(&self, instance: InstanceId, gpus: &[GpuId]) -> Check {
        for (&other, engine) in self.engines.iter().filter(|(other, _)| **other != instance) {
            let vllm = self.spec(&engine.model).engine == EngineKind::Vllm;
            let measures = vllm && matches!(engine.moving, Some((Move::Start, _)));
            let shares = engine.gpus.iter().any(|gpu| gpus.contains(gpu));
            require(!(measures && shares), || {
                format!("{instance} moves while {other} ({}) measures", engine.model)
            })?;
        }
        Ok(())
    }

    /// A start or wake: the bytes are there, by every promise that was not seen to end.
    fn judge_load(&mut self, instance: InstanceId, from: Told, gpus: &[GpuId]) -> Check {
        self.judge_move(instance, from, gpus)?;
        let book = self.book(instance)?;
        let spec = self.spec(&book.model);
        let twin = |(id, other): (&InstanceId, &Book)| {
            *id != instance
                && other.model == book.model
                && self.engines.get(id).is_some_and(|engine| engine.runs)
        };
        require(!self.reference.books.iter().any(twin), || {
            format!("{} starts beside an earlier {}", book.model, book.model)
        })?;
        for &gpu in gpus {
            let here =
                |(id, book): &(&InstanceId, &Book)| **id != instance && book.gpus.contains(&gpu);
            let others = self.reference.books.iter().filter(here);
            let promised: Bytes = others.map(|(_, book)| book.promised).sum();
            let capacity = GPU - self.catalog().settings.gpu.reserve;
            require(promised + bytes(&spec) <= capacity, || {
                format!("{} starts on GPU {gpu} beside {promised} promised", book.model)
            })?;
            let alone = spec.engine == EngineKind::Vllm && from == Told::Preparing;
            let moves = self.engines.iter().find(|(id, engine)| {
                let touches = matches!(
                    engine.moving,
                    Some((Move::Start | Move::Stop | Move::Sleep | Move::Wake, _))
                );
                **id != instance
                    && engine.gpus.contains(&gpu)
                    && touches
                    && engine.held > Bytes::ZERO
            });
            require(!alone || moves.is_none(), || {
                format!("{} measures while {:?} moves", book.model, moves.map(|(id, _)| id))
            })?;
        }
        self.book_mut(instance)?.promised = bytes(&spec);
        Ok(())
    }

    fn judge_leaving(&self, instance: InstanceId) -> Check {
        let book = self.book(instance)?;
        let taken = self.engines.get(&instance).map_or(0, |e| e.gate.count.in_flight);
        let open = self.engines.get(&instance).is_some_and(|e| e.gate.open);
        require(taken == 0 && !open, || {
            format!("{} has to leave with {taken} leases (gate open: {open})", book.model)
        })
    }

    /// A sample was delivered: what it shows to be gone is not promised any more.
    pub fn seen(&mut self) {
        for (id, book) in &mut self.reference.books {
            let Some(engine) = self.engines.get(id) else { continue };
            match book.told {
                Told::Stopping if !engine.runs => book.promised = engine.held,
                Told::Asleep => book.promised = engine.held,
                Told::Preparing
                | Told::Starting
                | Told::Ready
                | Told::FallingAsleep
                | Told::Waking
                | Told::Stopping => {}
            }
        }
        self.reference.books.retain(|id, book| {
            let engine = &self.engines[id];
            book.told != Told::Stopping || engine.runs || engine.held > Bytes::ZERO
        });
        let books = &self.reference.books;
        self.engines.retain(|id, _| books.contains_key(id));
    }

    pub fn tell(&mut self, instance: InstanceId, told: Told) -> Check {
        let now = self.now;
        let book = self.book_mut(instance)?;
        book.told = told;
        if told == Told::Ready {
            (book.ready_at, book.closed_at) = (now, None);
        }
        Ok(())
    }

    pub fn catalog(&self) -> &Catalog {
        &self.setup.catalog
    }

    pub fn spec(&self, model: &ModelName) -> Arc<ModelSpec> {
        Arc::clone(&self.catalog().models[model])
    }

    fn book(&self, instance: InstanceId) -> Result<Book, String> {
        let book = self.reference.books.get(&instance).cloned();
        book.ok_or_else(|| format!("{instance} never was"))
    }

    pub fn book_mut(&mut self, instance: InstanceId) -> Result<&mut Book, String> {
        self.reference.books.get_mut(&instance).ok_or_else(|| format!("{instance} never was"))
    }
}
