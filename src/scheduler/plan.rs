//! A dry run: what a request for a model would bring about now. It is the scheduler itself that
//! says so, on a copy to which the request is shown.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Scheduler;
use super::action::{Action, Refusal};
use super::event::{EnsureKind, Event, Request};
use super::record::SwapCause;
use crate::config::catalog::{ModelSpec, Vram};
use crate::units::{AskId, Bytes, GpuId, ModelName, RequestId, Time};

/// Ids that no caller of this run has.
const REQUEST: RequestId = RequestId(u64::MAX);
const ASK: AskId = AskId(u64::MAX);

/// What would happen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    pub verdict: Verdict,
    /// Where it is, or would be.
    pub gpus: Vec<GpuId>,
    /// Bytes that it takes on each of them, as far as known.
    pub footprint: Option<Bytes>,
    pub evicts: Vec<Evicted>,
    /// What it would wait for first, in words; empty: for nothing.
    pub waits_for: String,
    /// Until it is ready, as learned moves estimate it.
    pub ready_in: Option<Duration>,
    /// The decision in the scheduler's words.
    pub decision: String,
    pub need: NeedView,
    /// Every GPU as it is now.
    pub rooms: Vec<RoomView>,
}

/// What a model takes, and how that is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NeedView {
    /// On each GPU.
    pub declared: Option<Bytes>,
    /// Most seen on one GPU.
    pub peak: Option<Bytes>,
    /// Smaller peaks replace what is declared: it has served enough.
    pub seasoned: bool,
    /// Host RAM that is promised to it while it runs.
    pub ram: Bytes,
    pub ram_declared: Option<Bytes>,
    pub ram_peak: Option<Bytes>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoomView {
    pub gpu: GpuId,
    /// May be promised: the total less the reserve.
    pub capacity: Bytes,
    pub promised: Vec<(ModelName, Bytes)>,
    /// Held by processes that are none of ours.
    pub strangers: Bytes,
    /// For a model that comes now.
    pub room: Bytes,
    /// What the planned model would take there.
    pub need: Option<Bytes>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Verdict {
    /// It is ready and has a place.
    Ready,
    /// A swap would begin, or has begun.
    Begins,
    /// It would wait, in time be loaded, and `evicts` is who gives way then.
    Waits,
    Refused(Refusal),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evicted {
    pub model: ModelName,
    pub why: String,
    /// It goes to sleep instead of being stopped.
    pub sleeps: bool,
    /// It is busy and would get notice.
    pub busy: bool,
}

impl Scheduler {
    /// `None`: the model is not configured. Changes nothing.
    pub fn forecast(&self, now: Time, model: &ModelName) -> Option<Forecast> {
        let spec = self.catalog.model(model)?;
        let seen = self.world.gpus.iter().filter(|gpu| gpu.total > Bytes::ZERO);
        Some(Forecast {
            need: self.need_view(spec),
            rooms: seen.map(|gpu| self.room_view(spec, gpu.id)).collect(),
            ..self.outcome(now, model)?
        })
    }

    fn outcome(&self, now: Time, model: &ModelName) -> Option<Forecast> {
        let spec = self.catalog.model(model)?;
        let request = Request {
            id: REQUEST,
            model: model.clone(),
            priority: spec.priority,
            max_wait: None,
            may_hurry: false,
            never_start: false,
            attempt: 1,
            arrived: now,
        };
        let mut copy = self.clone();
        let mut actions = Vec::new();
        copy.handle(now, Event::RequestArrived(request), &mut actions);
        let refused = actions.iter().find_map(|action| {
            let Action::Refuse { request: REQUEST, refusal } = action else { return None };
            Some(refusal.clone())
        });
        let granted = |action: &Action| matches!(action, Action::Grant { request: REQUEST, .. });
        if let Some(refusal) = refused {
            return Some(copy.forecast_of(model, Verdict::Refused(refusal)));
        }
        if actions.iter().any(granted) {
            return Some(copy.forecast_of(model, Verdict::Ready));
        }
        let has_room = |s: &Scheduler| s.load_of(model).is_some_and(|swap| swap.planned);
        if has_room(&copy) {
            return Some(copy.forecast_of(model, Verdict::Begins));
        }
        let waits_for = copy.waiting_for(model);
        // Who gives way once it may press: as for a caller of load.
        let (kind, deadline) = (EnsureKind::Load, now + Duration::from_secs(3600));
        let mut pressed = copy.clone();
        let ask = Event::EnsureAsked { ask: ASK, model: model.clone(), kind, deadline };
        pressed.handle(now, ask, &mut Vec::new());
        let by = if has_room(&pressed) { &pressed } else { &copy };
        Some(Forecast { waits_for, ..by.forecast_of(model, Verdict::Waits) })
    }

    fn forecast_of(&self, model: &ModelName, verdict: Verdict) -> Forecast {
        let view = self.model_view(model);
        let swap = self.load_of(model).filter(|s| s.cause != SwapCause::Unload && s.planned);
        let evicts = swap.map(|swap| {
            let victims = swap.victims.iter();
            let evicted = victims.filter_map(|victim| {
                let model = self.instances.get(&victim.instance)?.model.clone();
                let (why, sleeps, busy) = (victim.why.clone(), victim.asleep, victim.busy);
                Some(Evicted { model, why, sleeps, busy })
            });
            evicted.collect()
        });
        let gpus = swap.map_or(view.gpus, |swap| {
            swap.gpus.iter().copied().filter(|&gpu| gpu != super::memory::UNSEEN).collect()
        });
        Forecast {
            verdict,
            gpus,
            footprint: view.footprint,
            evicts: evicts.unwrap_or_default(),
            waits_for: String::new(),
            ready_in: view.ready_in,
            decision: swap.map(|swap| swap.decision.clone()).unwrap_or_default(),
            need: NeedView::default(),
            rooms: Vec::new(),
        }
    }

    fn need_view(&self, spec: &ModelSpec) -> NeedView {
        let learned = self.models.get(&spec.name).map(|m| m.learned.clone()).unwrap_or_default();
        NeedView {
            declared: match spec.vram {
                Vram::Declared(bytes) => Some(bytes),
                Vram::Unknown | Vram::Rest => None,
            },
            peak: learned.footprint,
            seasoned: learned.seasoned,
            ram: self.ram_of(spec),
            ram_declared: spec.ram,
            ram_peak: learned.ram_resident,
        }
    }

    fn room_view(&self, spec: &ModelSpec, gpu: GpuId) -> RoomView {
        let promised = self.instances.values().map(|i| (i.model.clone(), self.promise_on(i, gpu)));
        RoomView {
            gpu,
            capacity: self.capacity(gpu),
            promised: promised.filter(|(_, bytes)| *bytes > Bytes::ZERO).collect(),
            strangers: self.strangers_on(gpu),
            room: self.room_on(gpu, spec, None),
            need: self.need(spec, gpu).filter(|need| !need.elastic).map(|need| need.bytes),
        }
    }
}
