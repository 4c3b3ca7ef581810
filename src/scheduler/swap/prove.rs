//! Prove: nothing starts before the memory is really free, by promises and by a sample taken
//! after the last stop or sleep completed. When the time is up, whoever holds it is named.

use super::super::Scheduler;
use super::super::event::{Fault, FaultKind};
use super::super::memory::uses_gpu;
use super::super::placement::{ELASTIC_SHARE, Plan};
use super::super::policy::Candidate;
use super::super::record::{Phase, SwapOutcome};
use super::super::residency::Instance;
use crate::config::catalog::EngineKind;
use crate::units::{Bytes, GpuId, SwapId};

/// Why a start cannot be emitted yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::scheduler) enum StartBlock {
    /// The GPUs cannot be read.
    NoProof,
    /// A sample taken after the last change has yet to come.
    NoSample,
    /// A vLLM instance measures memory there, or wants to and something else moves.
    Moving(String),
    /// Earlier instances, or the cap of concurrent models.
    Process(String),
    /// Bytes that are leaving but not proven free.
    Unproven,
    /// Promised to somebody who stays: the plan is stale.
    Stale,
    /// Free by our books, but not by the sample.
    Held,
}

impl Scheduler {
    pub(super) fn advance_prove(&mut self, id: SwapId) {
        let Some(swap) = self.swaps.get(&id) else { return };
        if !swap.is_load() {
            return self.advance_unload_proof(id);
        }
        if self.shutting_down {
            return self.cancel_swap(id, "Wharf is shutting down");
        }
        let rethought = swap.rethought;
        match self.start_block(id) {
            Ok(footprint) => {
                self.unwatch(id);
                self.emit_start(id, footprint);
            }
            // Whoever was evicted stays evicted; `choose` decides about the rest.
            Err(StartBlock::Stale) => self.choose_again(id, "its room was taken"),
            Err(StartBlock::Held) if !rethought => {
                if let Some(swap) = self.swaps.get_mut(&id) {
                    swap.rethought = true;
                }
                self.choose_again(id, "a stranger holds memory that was counted on");
            }
            Err(block) => self.wait_for_room(id, &block),
        }
    }

    fn choose_again(&mut self, id: SwapId, why: &str) {
        self.enter_phase(id, Phase::Drain);
        self.unwatch(id);
        self.unplace(id, why);
    }

    fn wait_for_room(&mut self, id: SwapId, block: &StartBlock) {
        let for_memory = match block {
            StartBlock::Unproven | StartBlock::Held | StartBlock::NoSample => true,
            StartBlock::NoProof | StartBlock::Moving(_) | StartBlock::Process(_) => false,
            StartBlock::Stale => false,
        };
        if for_memory {
            self.wait_for_memory(id);
        } else {
            self.watch(id);
            self.forget_memory_wait(id);
        }
    }

    /// Memory that nobody accounts for is in the way of everyone who could leave: nobody is
    /// disturbed for it. The swap begins (what can be checked and fetched is), and waits.
    pub(in crate::scheduler) fn held(
        &mut self,
        candidate: &Candidate,
        swap: Option<SwapId>,
        gpus: Vec<GpuId>,
    ) {
        match swap {
            None => {
                self.begin_load(candidate, &Plan { gpus, victims: Vec::new() });
            }
            Some(swap) => self.wait_for_memory(swap),
        }
    }

    pub(in crate::scheduler) fn forget_memory_wait(&mut self, id: SwapId) {
        if let Some(swap) = self.swaps.get_mut(&id) {
            swap.memory_wait = None;
        }
    }

    /// Only memory is missing: after `vram_timeout` the swap fails and names the holder.
    fn wait_for_memory(&mut self, id: SwapId) {
        self.watch(id);
        let now = self.now;
        let timeout = self.catalog.settings.swap.vram_timeout;
        let no_proof = self.memory.no_proof.is_some();
        let Some(swap) = self.swaps.get_mut(&id) else { return };
        let since = *swap.memory_wait.get_or_insert(now);
        if no_proof || since + timeout > now {
            return;
        }
        let swap = swap.clone();
        // What a sleeper keeps beyond its residue may be all that is missing: one that cannot wake
        // is replaced by a fresh start, once.
        if self.wakes(id) && self.use_retry(id) {
            self.forget_memory_wait(id);
            return self.start_again(id, swap.instance);
        }
        let shares = |i: &Instance| i.gpus.iter().any(|g| swap.gpus.contains(g));
        let needs_ram =
            self.catalog.model(&swap.model).is_some_and(|m| self.ram_need(m) > Bytes::ZERO);
        let holder = self
            .instances
            .values()
            .find(|i| i.is_stopping() && (shares(i) || (needs_ram && i.ram() > Bytes::ZERO)))
            .map(|i| i.id);
        let stuck = holder.and_then(|id| self.instances.get(&id)).and_then(|i| i.trouble.clone());
        let fault = stuck.unwrap_or_else(|| {
            let message = format!(
                "memory for {} was not free within {} s: {}",
                swap.model,
                timeout.as_secs(),
                self.memory_text(&swap.model, &swap.gpus, holder)
            );
            Fault::new(FaultKind::VramNeverFreed, message)
        });
        let fault = Fault { kind: FaultKind::VramNeverFreed, ..fault };
        self.fail_load(id, fault);
    }

    /// Checks every condition of a start; `Ok` carries the bytes to promise per GPU.
    pub(in crate::scheduler) fn start_block(&self, id: SwapId) -> Result<Bytes, StartBlock> {
        let swap = self.swaps.get(&id).ok_or(StartBlock::Stale)?;
        let target = self.instances.get(&swap.instance).ok_or(StartBlock::Stale)?;
        if self.memory.no_proof.is_some() {
            return Err(StartBlock::NoProof);
        }
        if self.is_process_left(&swap.model) {
            return Err(StartBlock::Process(format!("the earlier {} to be gone", swap.model)));
        }
        self.slot_block(target)?;
        self.group_block(target)?;
        self.ram_block(target)?;
        if !uses_gpu(&target.spec) {
            return Ok(Bytes::ZERO);
        }
        if let Some(other) = self.profiling_on(&swap.gpus, target.id) {
            return Err(StartBlock::Moving(format!("{} measures its memory", other.model)));
        }
        let profiles = target.spec.engine == EngineKind::Vllm && !target.is_sleeping();
        if profiles && let Some(other) = self.moving_on(&swap.gpus, target.id) {
            return if other.is_stopping() && !other.may_run() {
                Err(StartBlock::Unproven)
            } else {
                Err(StartBlock::Moving(format!("{} is being moved there", other.model)))
            };
        }
        let mut least = None;
        for &gpu in &swap.gpus {
            let bytes = self.room_for(target, gpu)?;
            least = Some(least.map_or(bytes, |known: Bytes| known.min(bytes)));
        }
        least.ok_or(StartBlock::Stale)
    }

    /// Bytes to promise on one GPU, if they are free by the books and by the sample.
    fn room_for(&self, target: &Instance, gpu: GpuId) -> Result<Bytes, StartBlock> {
        let need = self.need(&target.spec, gpu).ok_or(StartBlock::Stale)?;
        let residue = self.promise_on(target, gpu);
        let promised = self.promised(gpu) - residue;
        let short = if need.elastic {
            promised > self.staying_promise(&target.spec, gpu)
        } else {
            promised + need.bytes > self.capacity(gpu)
        };
        if short {
            return Err(self.why_short(gpu));
        }
        if !self.world.proof || self.is_blind(gpu) {
            return Ok(need.bytes);
        }
        let free = self.fresh_free(gpu).ok_or(StartBlock::NoSample)?;
        let loading = self.unvouched(gpu);
        let free = free - self.catalog.settings.gpu.reserve + self.shown_on(target, gpu);
        let left = free - loading;
        let least = if need.elastic { Bytes(need.bytes.0 / ELASTIC_SHARE) } else { need.bytes };
        if left >= least.max(Bytes(1)) {
            Ok(left.min(need.bytes))
        } else if free >= least && loading > Bytes::ZERO {
            // Whether it fits shows once the neighbour has taken its bytes.
            Err(StartBlock::Moving("another model loads there first".to_owned()))
        } else if left + self.leaving_held(gpu) >= least {
            Err(self.why_short(gpu))
        } else {
            Err(StartBlock::Held)
        }
    }

    /// Too much is promised: to somebody whose stop is under way (it has its own deadline), to
    /// somebody who is gone and whose bytes are not proven free, or to somebody who stays.
    fn why_short(&self, gpu: GpuId) -> StartBlock {
        let mut unproven = false;
        for instance in self.instances.values().filter(|i| i.gpus.contains(&gpu)) {
            if instance.is_stopping() && instance.may_run() && instance.trouble.is_none() {
                return StartBlock::Process(format!("{} to stop", instance.model));
            }
            unproven |= instance.is_stopping() || instance.release.is_some();
        }
        if unproven { StartBlock::Unproven } else { StartBlock::Stale }
    }

    /// Earlier models that still count, where only so many may run.
    fn slot_block(&self, target: &Instance) -> Result<(), StartBlock> {
        if target.spec.is_external() {
            return Ok(());
        }
        let counts = |i: &&Instance| {
            i.id != target.id
                && i.launched
                && !i.spec.is_external()
                && !i.is_sleeping()
                && i.may_run()
        };
        let cap = self.catalog.settings.swap.max_concurrent_models as usize;
        let all = self.instances.values().filter(counts).count();
        let on_gpus = self.instances.values().filter(counts).filter(|i| uses_gpu(&i.spec)).count();
        let gpu_taken = self.single_gpu_model() && uses_gpu(&target.spec) && on_gpus > 0;
        if (cap > 0 && all >= cap) || gpu_taken {
            let leaving = self.instances.values().filter(counts).any(|i| i.is_stopping());
            let why = "an earlier model to be gone".to_owned();
            return Err(if leaving { StartBlock::Process(why) } else { StartBlock::Stale });
        }
        Ok(())
    }

    /// Unload: done when the instance is gone and its memory proven free.
    fn advance_unload_proof(&mut self, id: SwapId) {
        let Some(swap) = self.swaps.get(&id) else { return };
        match self.instances.get(&swap.instance) {
            None => {
                let death = swap.death.clone();
                self.end_swap(id, death.map_or(SwapOutcome::Unloaded, SwapOutcome::Died));
            }
            Some(instance) => match instance.trouble.clone() {
                Some(fault) => self.end_swap(id, SwapOutcome::Failed(fault)),
                None if instance.is_sleeping() && instance.release.is_none() => {
                    self.end_swap(id, SwapOutcome::Asleep);
                }
                None => self.watch(id),
            },
        }
    }
}
