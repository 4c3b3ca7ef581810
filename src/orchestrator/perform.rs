//! One arm per action: what the owner does itself, and what it hands to an effect.

use std::sync::Arc;

use super::adapters::{AdapterStates, Desk};
use super::effects::ended;
use super::gate::{Gate, StartKind};
use super::handle::Message;
use super::launch::Launcher;
use super::run::{Live, Owner, Reply};
use crate::config::catalog::ModelSpec;
use crate::engine;
use crate::runtime::{LaunchSpec, Running, RuntimeHandle};
use crate::scheduler::action::{Action, Refusal};
use crate::scheduler::event::{Done, Event, Fault, FaultKind};
use crate::store::Figures;
use crate::units::{Bytes, GpuId, InstanceId, ModelName, RequestId, SwapId, Time};
use crate::upstream::UpstreamClient;

impl Owner {
    pub(super) fn perform(&mut self, now: Time, action: Action) {
        match action {
            Action::Grant { request, instance } => self.grant(request, instance),
            Action::Refuse { request, refusal } => self.refuse(request, refusal),
            Action::OpenGate { instance, permits } => self.open_gate(instance, permits),
            Action::CloseGate { instance } => self.close_gate(instance),
            Action::WatchGate { instance, every_release } => {
                self.watch_gate(instance, every_release);
            }
            Action::CancelLeases { instance, why } => {
                if let Some(gate) = self.gate(instance) {
                    tracing::warn!(model = %gate.model, %instance, why, "ending leases");
                    gate.cancel_leases();
                }
            }
            Action::Preflight { swap, instance, model, gpus } => {
                self.preflight(swap, instance, &model, gpus);
            }
            Action::Fetch { swap, instance, model: _ } => self.fetch(swap, instance),
            Action::Prepare { swap: _, instance, gpus, footprint } => {
                self.prepare(instance, gpus, footprint);
            }
            Action::StartInstance { swap, instance, model, gpus, footprint, deadline } => {
                self.start(swap, instance, &model, gpus, footprint, deadline);
            }
            Action::StopInstance { swap, instance } => self.stop(now, swap, instance),
            Action::Sleep { swap, instance } => {
                self.unpublish_gate(instance);
                self.count_residency(now, instance);
                let Some(live) = self.instances.get_mut(&instance) else { return };
                if let Some(gate) = live.gate.take() {
                    gate.cancel_leases();
                }
                live.adapters = None;
                let (slot, spec) = (live.slot.clone(), Arc::clone(&live.spec));
                live.task = Some(self.effects.sleep(swap, instance, slot, spec));
            }
            Action::Wake { swap, instance, deadline } => {
                let Some(live) = self.instances.get_mut(&instance) else { return };
                live.started = StartKind::Warm;
                let (slot, spec) = (live.slot.clone(), Arc::clone(&live.spec));
                live.task = Some(self.effects.wake(swap, instance, slot, spec, deadline));
            }
            Action::WatchMemory { swap, gpus: _ } => self.memory.watch(swap),
            Action::UnwatchMemory { swap } => self.memory.unwatch(swap),
            Action::Answer { ask, answer } => {
                if let Some(reply) = self.asks.remove(&ask) {
                    self.replies.push(Reply::Ask(reply, answer));
                }
            }
            Action::TtlExtended { model, until } => {
                let until = until.map(|until| self.shared.wall_ms(until));
                self.shared.store.put_ttl_until(&model, until);
            }
            Action::Record(record) => self.record(record),
            Action::Remember { model, learned } => {
                // The scheduler learns of engines as they are configured now only.
                let catalog = self.shared.catalog.load();
                let spec = catalog.model(&model).map(|spec| spec.shape_hash()).unwrap_or_default();
                self.shared.store.put_learned(&model, &Figures { spec, learned });
            }
            Action::Notice { model: Some(model), text } => tracing::info!(%model, "{text}"),
            Action::Notice { model: None, text } => tracing::info!("{text}"),
        }
    }

    fn gate(&self, instance: InstanceId) -> Option<&Arc<Gate>> {
        self.instances.get(&instance)?.gate.as_ref()
    }

    fn grant(&mut self, request: RequestId, instance: InstanceId) {
        let Some(waiting) = self.waiting.remove(&request) else { return };
        let Some(live) = self.instances.get(&instance) else { return };
        let Some(gate) = &live.gate else { return };
        let start = match live.ready_at {
            Some(ready_at) if waiting.arrived < ready_at => live.started,
            _ => StartKind::Hot,
        };
        let lease = gate.grant(start);
        self.replies.push(Reply::Request(waiting.reply, Ok(lease)));
    }

    fn refuse(&mut self, request: RequestId, refusal: Refusal) {
        if let Some(waiting) = self.waiting.remove(&request) {
            tracing::debug!(model = %waiting.model, ?refusal, "refused");
            self.replies.push(Reply::Request(waiting.reply, Err(refusal)));
        }
    }

    fn open_gate(&mut self, instance: InstanceId, permits: u32) {
        let Some(live) = self.instances.get(&instance) else { return };
        let Some(gate) = live.gate.clone() else { return };
        gate.open(permits);
        self.publish_gates(|gates| {
            gates.insert(gate.model.clone(), gate);
        });
    }

    fn close_gate(&mut self, instance: InstanceId) {
        let Some(live) = self.instances.get_mut(&instance) else { return };
        let Some(gate) = &live.gate else { return };
        gate.close();
        let count = gate.read();
        live.told = Some(count);
        self.follow_up.push_back(Event::GateSeen { instance, gate: count });
    }

    /// What ended since the scheduler was told last sent no ping yet: it is told now.
    fn watch_gate(&mut self, instance: InstanceId, every_release: bool) {
        let Some(live) = self.instances.get_mut(&instance) else { return };
        let Some(gate) = &live.gate else { return };
        gate.watch(every_release);
        if !every_release {
            return;
        }
        let count = gate.read();
        if live.told != Some(count) {
            live.told = Some(count);
            self.follow_up.push_back(Event::GateSeen { instance, gate: count });
        }
    }

    fn unpublish_gate(&mut self, instance: InstanceId) {
        self.publish_gates(|gates| gates.retain(|_, gate| gate.instance != instance));
    }

    fn publish_gates(&self, change: impl FnOnce(&mut super::handle::Gates)) {
        let mut gates = super::handle::Gates::clone(&self.shared.gates.load());
        change(&mut gates);
        self.shared.gates.store(Arc::new(gates));
    }

    fn launch(
        &mut self,
        instance: InstanceId,
        footprint: Option<Bytes>,
    ) -> Result<LaunchSpec, Fault> {
        let Some(live) = self.instances.get_mut(&instance) else {
            return Err(Fault::new(FaultKind::Internal, "the instance is gone"));
        };
        let port = match live.spec.takes_a_port() {
            true => self.ports.assign(instance, live.spec.port)?,
            false => 0,
        };
        let launcher = Launcher {
            gpus: &self.effects.gpus,
            installation: &self.state.installation,
            log_dir: self.state.logs(),
        };
        let mut launch = launcher.launch(instance, &live.spec, &live.gpus, footprint, port)?;
        if let Some(before) = live.launch.take() {
            // One key for each instance: what was made ahead has it already.
            launch.api_key = before.api_key;
        }
        live.launch = Some(launch.clone());
        Ok(launch)
    }

    fn preflight(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        model: &ModelName,
        gpus: Vec<GpuId>,
    ) {
        self.note_id(instance.0);
        let catalog = self.shared.catalog.load_full();
        let Some(spec) = catalog.model(model) else {
            let fault =
                Fault::new(FaultKind::Internal, format!("{model} is not configured any more"));
            let done = Done::Preflight(Err(fault));
            self.follow_up.push_back(Event::MoveDone { swap, instance, done });
            return;
        };
        self.instances.insert(instance, Live::new(Arc::clone(spec), gpus));
        let launch = self.launch(instance, None);
        let task = self.effects.preflight(swap, launch, instance);
        if let Some(live) = self.instances.get_mut(&instance) {
            live.task = Some(task);
        }
    }

    fn fetch(&mut self, swap: SwapId, instance: InstanceId) {
        let Some(live) = self.instances.get_mut(&instance) else { return };
        let Some(launch) = live.launch.clone() else { return };
        live.task = Some(self.effects.fetch(swap, launch, live.progress.clone()));
    }

    /// While others leave. What changes until the start is looked at again there.
    fn prepare(&mut self, instance: InstanceId, gpus: Vec<GpuId>, footprint: Option<Bytes>) {
        let Some(live) = self.instances.get_mut(&instance) else { return };
        if live.prepared.is_some() || live.stopping {
            return;
        }
        live.gpus = gpus;
        // Without a port, say, the start fails; it says so itself.
        let Ok(launch) = self.launch(instance, footprint) else { return };
        let settings = &self.shared.catalog.load().settings;
        if let Some(live) = self.instances.get_mut(&instance) {
            let progress = live.progress.clone();
            live.prepared = Some(self.effects.prepare(&launch, progress, settings));
        }
    }

    fn start(
        &mut self,
        swap: SwapId,
        instance: InstanceId,
        model: &ModelName,
        gpus: Vec<GpuId>,
        footprint: Option<Bytes>,
        deadline: Time,
    ) {
        self.note_id(instance.0);
        let known = self.instances.get_mut(&instance);
        match (known, self.shared.catalog.load().model(model)) {
            (Some(live), _) => live.gpus = gpus,
            // The one retry of a start comes as a new instance, which had no preflight.
            (None, Some(spec)) => {
                self.instances.insert(instance, Live::new(Arc::clone(spec), gpus));
            }
            (None, None) => {}
        }
        let launch = match self.launch(instance, footprint) {
            Ok(launch) => launch,
            Err(fault) => {
                let done = Done::Start(Err(fault));
                self.follow_up.push_back(Event::MoveDone { swap, instance, done });
                return;
            }
        };
        tracing::info!(%model, %instance, port = launch.port, "starting");
        let Some(live) = self.instances.get_mut(&instance) else { return };
        let slot = live.slot.clone();
        live.started = StartKind::Cold;
        let catalog = self.shared.catalog.load();
        let (desk, seed) = Desk::new(&catalog, &live.spec.name);
        live.adapters = Some(desk);
        let adapters = (seed, self.effects.around_adapters(&self.shared, &catalog));
        let prepared = match live.prepared.take() {
            Some(prepared) => prepared,
            None => self.effects.prepare_start(&launch, live.progress.clone(), &catalog.settings),
        };
        let task = self.effects.start(swap, launch, slot, prepared, deadline, adapters);
        live.task = Some(task);
    }

    fn stop(&mut self, now: Time, swap: SwapId, instance: InstanceId) {
        self.unpublish_gate(instance);
        self.count_residency(now, instance);
        let Some(live) = self.instances.get_mut(&instance) else {
            // Died and was cleared already: gone is what was asked for.
            let done = Done::Stop(Ok(()));
            self.follow_up.push_back(Event::MoveDone { swap, instance, done });
            return;
        };
        live.stopping = true;
        live.prepared = None;
        let connections = live.gate.as_ref().map(|gate| gate.gone());
        if let Some(gate) = &live.gate {
            // Guests are not waited for: they leave now.
            gate.cancel_leases();
            // An engine that drains must not wait for them.
            gate.client.close_idle();
        }
        (live.gate, live.adapters) = (None, None);
        tracing::info!(model = %live.spec.name, %instance, "stopping");
        let (task, slot, spec) = (live.task.take(), live.slot.clone(), Arc::clone(&live.spec));
        self.effects.stop(swap, instance, task, slot, spec, connections);
    }

    /// What the owner must know of an effect's end before the scheduler acts on it.
    pub(super) fn effect(&mut self, event: Event) {
        if let Event::InstanceDied { instance, .. } = &event
            && self.instances.get(instance).is_none_or(|live| live.stopping)
        {
            // It was told to end; `MoveDone` says so.
            return;
        }
        match &event {
            Event::MoveDone { instance, done, .. } => self.before_move_done(*instance, done),
            Event::InstanceDied { instance, fault } => self.before_death(*instance, fault),
            _ => {}
        }
        let gives_back =
            matches!(&event, Event::MoveDone { done: Done::Stop(Ok(())) | Done::Sleep(_), .. });
        let cleared = match &event {
            Event::MoveDone { instance, done: Done::Stop(Ok(())), .. } => Some(*instance),
            _ => None,
        };
        self.step(event);
        if gives_back {
            self.memory.look_again();
        }
        if let Some(instance) = cleared {
            self.instances.remove(&instance);
            self.ports.release(instance);
        }
    }

    fn before_move_done(&mut self, instance: InstanceId, done: &Done) {
        let Some(live) = self.instances.get_mut(&instance) else { return };
        match done {
            Done::Start(Ok(_)) | Done::Wake(Ok(_)) if !live.stopping => {
                live.task = None;
                let Some(running) = live.slot.peek() else { return };
                self.became_ready(instance, &running);
                if matches!(done, Done::Start(_)) {
                    self.watch_exit(instance, &running);
                    self.count_start(&running.identity.model);
                }
            }
            Done::Start(Err(fault)) | Done::Preflight(Err(fault)) | Done::Fetch(Err(fault)) => {
                live.task = None;
                let facts = self.facts.entry(live.spec.name.clone()).or_default();
                facts.last_fault = Some(fault.clone());
                let (model, kind) = (&live.spec.name, fault.kind.as_str());
                tracing::warn!(%model, %instance, kind, "{}", fault.message);
            }
            Done::Stop(Err(fault)) => {
                tracing::error!(model = %live.spec.name, %instance, "{}", fault.message);
            }
            _ => live.task = None,
        }
    }

    /// Builds the gate, still closed.
    pub(super) fn became_ready(&mut self, instance: InstanceId, running: &Running) {
        let now = self.effects.now();
        let desk_of_start = self.keep_adapters(instance, running);
        let Some(live) = self.instances.get_mut(&instance) else { return };
        let endpoint = running.endpoint.clone();
        let client = live.slot.take_opened().unwrap_or_else(|| UpstreamClient::to(&endpoint));
        let name = live.spec.name.clone();
        let inbox = self.effects.inbox.clone();
        let gate = Gate::with(instance, name, endpoint, client, inbox, self.shared.epoch);
        live.gate = Some(Arc::new(match desk_of_start {
            Some(states) => gate.serving(states),
            None => gate,
        }));
        live.told = None;
        live.ready_at = Some(now);
        let spec = Arc::clone(&live.spec);
        let facts = self.facts.entry(spec.name.clone()).or_default();
        facts.loaded_at = Some(now);
        facts.last_fault = None;
        facts.endpoint = Some(running.endpoint.base.clone());
        self.learn_context(spec, running);
    }

    /// Nobody waits for it, and an engine that does not tell is not asked again.
    fn learn_context(&self, spec: Arc<ModelSpec>, running: &Running) {
        let (shared, endpoint) = (Arc::clone(&self.shared), running.endpoint.clone());
        tokio::spawn(async move {
            if let Some(length) = engine::context_length(&spec, &endpoint).await {
                shared.contexts().insert(spec.name.clone(), length);
            }
        });
    }

    /// An engine that was adopted or woken has no keeper yet; one that started has.
    fn keep_adapters(
        &mut self,
        instance: InstanceId,
        running: &Running,
    ) -> Option<tokio::sync::watch::Receiver<AdapterStates>> {
        let catalog = self.shared.catalog.load_full();
        let around = self.effects.around_adapters(&self.shared, &catalog);
        let live = self.instances.get_mut(&instance)?;
        if live.adapters.is_none() {
            let (desk, seed) = Desk::new(&catalog, &live.spec.name);
            live.adapters = Some(desk);
            // Level 2 discards the weights.
            let afresh = live.started == StartKind::Warm && live.spec.sleep == Some(2);
            let running = running.clone();
            tokio::spawn(async move { seed.keep(running, around, afresh).await });
        }
        live.adapters.as_ref().map(|desk| desk.states().clone())
    }

    pub(super) fn switch_adapter(&mut self, adapter: &ModelName, on: bool) {
        let catalog = self.shared.catalog.load_full();
        let Some(base) = catalog.serving(adapter).map(|spec| spec.name.clone()) else { return };
        let live = self.instances.values_mut().filter(|live| live.spec.name == base);
        for desk in live.filter_map(|live| live.adapters.as_mut()) {
            desk.switch(&catalog, &base, adapter, on);
        }
    }

    /// Tells the scheduler when a ready engine ends by itself.
    pub(super) fn watch_exit(&self, instance: InstanceId, running: &Running) {
        let (mut exit, inbox) = (running.exit.clone(), self.effects.inbox.clone());
        let (log, model) = (running.log.clone(), running.identity.model.clone());
        let elsewhere =
            (running.handle == RuntimeHandle::External).then(|| running.endpoint.base.clone());
        tokio::spawn(async move {
            let Some(report) = ended(&mut exit).await else { return };
            if let Some(base) = elsewhere {
                let text = format!("{model}: {base} does not answer any more");
                let fault = Fault::new(FaultKind::RuntimeUnreachable, text).with_log(log.last(20));
                inbox.send(Message::Effect(Event::InstanceDied { instance, fault }));
                return;
            }
            let kind = if report.oom_killed { FaultKind::OutOfMemory } else { FaultKind::Exited };
            let fault =
                Fault::new(kind, format!("{model}: the engine {report} while it was ready"))
                    .with_log(log.last(20));
            inbox.send(Message::Effect(Event::InstanceDied { instance, fault }));
        });
    }

    /// The scheduler then has it stopped: its children and its container go too.
    fn before_death(&mut self, instance: InstanceId, fault: &Fault) {
        let now = self.effects.now();
        let Some(live) = self.instances.get(&instance) else { return };
        let spec = Arc::clone(&live.spec);
        tracing::error!(model = %spec.name, %instance, "{}", fault.message);
        self.unpublish_gate(instance);
        if let Some(gate) = self.gate(instance) {
            gate.cancel_leases();
        }
        self.count_residency(now, instance);
        let facts = self.facts.entry(spec.name.clone()).or_default();
        facts.last_fault = Some(fault.clone());
        self.died.insert(spec.name.clone());
    }
}
