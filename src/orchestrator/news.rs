//! What changed from one published view to the next, as news.

use super::view::{Health, View};
use crate::scheduler::record::{ModelView, ResidencyView, SwapOutcome, SwapRecord};
use crate::telemetry::feed::News;
use crate::units::SwapId;

/// In the order in which readers understand them: parts, begun swaps and phases, states, ended
/// swaps.
pub(super) fn between(before: &View, now: &View) -> Vec<News> {
    let mut news = health(before, now);
    swaps_under_way(before, now, &mut news);
    let ended: Vec<&SwapRecord> = newly_ended(before, now);
    // Begun and ended between two views.
    for swap in ended.iter().filter(|swap| under_way(before, swap.id).is_none()) {
        news.push(began(swap));
    }
    for (place, model) in now.scheduler.models.iter().enumerate() {
        // Only a reload moves models about: to look for each one would take the square of their number.
        let same = before.scheduler.models.get(place).filter(|same| same.name == model.name);
        news.extend(state(same.or_else(|| before.model(&model.name)), model));
    }
    news.extend(ended.into_iter().filter_map(ended_news));
    news
}

fn under_way(view: &View, id: SwapId) -> Option<&SwapRecord> {
    view.scheduler.swaps.iter().find(|swap| swap.id == id)
}

fn swaps_under_way(before: &View, now: &View, news: &mut Vec<News>) {
    for swap in &now.scheduler.swaps {
        let earlier = under_way(before, swap.id);
        if earlier.is_none() {
            news.push(began(swap));
        }
        let phase = swap.phase.map(|(phase, _)| phase);
        let told = earlier.and_then(|swap| swap.phase).map(|(phase, _)| phase);
        if let Some(phase) = phase.filter(|phase| Some(*phase) != told) {
            let (swap_id, model) = (swap.id.to_string(), swap.model.clone());
            news.push(News::SwapPhase { swap_id, model, phase });
        }
    }
}

/// The ledger only grows at its end (and loses its oldest rows), in the order of ending.
fn newly_ended<'a>(before: &View, now: &'a View) -> Vec<&'a SwapRecord> {
    let last = before.ledger.back().map(|swap| swap.id);
    let rows = now.ledger.iter().rev().take_while(|swap| Some(swap.id) != last);
    let mut ended: Vec<&SwapRecord> = rows.map(|swap| &**swap).collect();
    ended.reverse();
    ended
}

fn began(swap: &SwapRecord) -> News {
    News::SwapBegan {
        swap_id: swap.id.to_string(),
        model: swap.model.clone(),
        kind: swap.kind,
        cause: swap.cause,
        decision: swap.decision.clone(),
        evicted: swap.evicted.iter().map(|victim| victim.model.clone()).collect(),
    }
}

fn ended_news(swap: &SwapRecord) -> Option<News> {
    let outcome = swap.outcome.as_ref()?;
    let message = match outcome {
        SwapOutcome::Failed(fault) | SwapOutcome::Died(fault) => Some(fault.message.clone()),
        SwapOutcome::Cancelled { why } => Some(why.to_string()),
        SwapOutcome::Ready | SwapOutcome::Unloaded | SwapOutcome::Asleep => None,
    };
    let took = swap.ended.unwrap_or(swap.began).since(swap.began);
    Some(News::SwapEnded {
        swap_id: swap.id.to_string(),
        model: swap.model.clone(),
        result: outcome.as_str(),
        seconds: took.as_millis() as f64 / 1000.0,
        message,
    })
}

fn state(earlier: Option<&ModelView>, model: &ModelView) -> Option<News> {
    let told = earlier.map_or(ResidencyView::Stopped.as_str(), |model| model.residency.as_str());
    let state = model.residency.as_str();
    if told == state {
        return None;
    }
    let fault = match &model.residency {
        ResidencyView::Failed { fault, .. } => Some(fault),
        _ => None,
    };
    Some(News::ModelState {
        model: model.name.clone(),
        state,
        before: told,
        instance: model.instance.map(|id| id.to_string()),
        swap_id: model.swap.map(|id| id.to_string()),
        cause: fault.map(|fault| fault.kind.as_str()),
        message: fault.map(|fault| fault.message.clone()),
    })
}

fn health(before: &View, now: &View) -> Vec<News> {
    let mut news = Vec::new();
    let mut part = |part, told: Option<&Health>, health: &Health| {
        if told.is_none_or(|told| told.ok != health.ok) {
            news.push(News::Health { part, ok: health.ok, detail: health.detail.clone() });
        }
    };
    part("gpu", Some(&before.gpu_health), &now.gpu_health);
    if let Some(docker) = &now.docker_health {
        part("docker", before.docker_health.as_ref(), docker);
    }
    let files =
        |view: &View| Health { ok: view.outages.is_empty(), detail: view.outages.join("; ") };
    part("state", Some(&files(before)), &files(now));
    news
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::scheduler::event::{Fault, FaultKind};
    use crate::scheduler::record::{Phase, SwapCause, SwapKind};
    use crate::units::{ModelName, Time};

    fn model(residency: ResidencyView) -> ModelView {
        ModelView {
            name: ModelName::new("a"),
            residency,
            instance: None,
            gpus: Vec::new(),
            since: Time::ZERO,
            footprint: None,
            swap: Some(SwapId(1)),
            queue: Vec::new(),
            oldest: None,
            ready_in: None,
            waiting_for: String::new(),
            pinned: false,
            kept: false,
            ttl_runs: false,
            ttl_until: None,
        }
    }

    fn swap(id: u64) -> SwapRecord {
        SwapRecord {
            id: SwapId(id),
            model: ModelName::new("a"),
            kind: SwapKind::Load,
            cause: SwapCause::Request,
            decision: "one waits".to_owned(),
            instance: None,
            gpus: Vec::new(),
            evicted: Vec::new(),
            began: Time(1000),
            ended: None,
            phases: Vec::new(),
            phase: Some((Phase::Start, Time(1000))),
            outcome: None,
        }
    }

    fn kinds(news: &[News]) -> Vec<&'static str> {
        news.iter().map(News::kind).collect()
    }

    #[test]
    fn a_swap_is_told_from_its_begin_to_its_end_and_nothing_twice() {
        let mut started = View::default();
        started.scheduler.models = vec![model(ResidencyView::Starting { phase: Phase::Start })];
        started.scheduler.swaps = vec![swap(1)];
        let news = between(&View::default(), &started);
        assert_eq!(kinds(&news), ["swap_began", "swap_phase", "model_state"]);
        assert!(between(&started, &started.clone()).is_empty());

        let mut failed = started.clone();
        let fault = Fault::new(FaultKind::OutOfMemory, "no room");
        let residency = ResidencyView::Failed { retry_at: Time(9000), fault: fault.clone() };
        failed.scheduler.models = vec![model(residency)];
        failed.scheduler.swaps.clear();
        let ended = SwapRecord {
            ended: Some(Time(1000) + Duration::from_millis(2500)),
            outcome: Some(SwapOutcome::Failed(fault)),
            ..swap(1)
        };
        failed.ledger = Arc::new(VecDeque::from([Arc::new(ended)]));
        let news = between(&started, &failed);
        assert_eq!(kinds(&news), ["model_state", "swap_ended"]);
        let News::SwapEnded { seconds, message, result, .. } = &news[1] else { panic!("{news:?}") };
        assert_eq!((*seconds, message.as_deref(), *result), (2.5, Some("no room"), "failed"));
    }

    #[test]
    fn what_began_and_ended_between_two_views_is_told_too() {
        let ended = |id| {
            let outcome = Some(SwapOutcome::Ready);
            Arc::new(SwapRecord { ended: Some(Time(2000)), outcome, ..swap(id) })
        };
        let before = View { ledger: Arc::new(VecDeque::from([ended(4)])), ..View::default() };
        // An older id may end later.
        let now = View {
            ledger: Arc::new(VecDeque::from([ended(4), ended(3), ended(6)])),
            ..View::default()
        };
        let news = between(&before, &now);
        assert_eq!(kinds(&news), ["swap_began", "swap_began", "swap_ended", "swap_ended"]);
    }

    #[test]
    fn health_is_told_when_it_turns() {
        let up = View {
            gpu_health: Health { ok: true, detail: "nvml".to_owned() },
            docker_health: Some(Health { ok: true, detail: "Docker".to_owned() }),
            ..View::default()
        };
        let mut down = up.clone();
        down.outages = vec!["the journal cannot be written".to_owned()];
        down.gpu_health.ok = false;
        assert!(between(&up, &up.clone()).is_empty());
        let parts: Vec<_> = between(&up, &down)
            .into_iter()
            .map(|news| match news {
                News::Health { part, ok, .. } => (part, ok),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(parts, [("gpu", false), ("state", false)]);
    }
}
