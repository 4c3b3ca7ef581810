//! What is read off a run: waiting, moves, work done, and who starved.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::bound::{Turns, turns};
use super::setup::Setup;
use super::{Run, Stay, Visit};
use crate::scheduler::Policy;
use crate::units::{GpuId, ModelName, Time};

/// Nobody starves in less.
const STARVED_FLOOR: Duration = Duration::from_secs(60);
/// So many times the mean wait of the run.
const STARVED_TIMES: u32 = 10;

/// Seconds from arrival to the start of service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Waits {
    pub mean_s: f64,
    pub p50_s: f64,
    pub p95_s: f64,
    pub p99_s: f64,
    pub max_s: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ModelFigures {
    pub arrivals: usize,
    pub served: usize,
    pub wait: Waits,
    /// Starts and wakes.
    pub loads: usize,
    pub starved: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    pub policy: String,
    pub arrivals: usize,
    /// Served to their end.
    pub served: usize,
    pub refused: usize,
    /// Ended by a drain deadline.
    pub cut: usize,
    /// Still waiting when nothing more could happen.
    pub unserved: usize,
    pub wait: Waits,
    pub loads: usize,
    /// Onto GPUs, by starts and wakes.
    pub bytes_moved: u64,
    /// Share of GPU time in which at least one request was served there.
    pub gpu_busy: f64,
    /// Share of GPU time in which a model was being moved there.
    pub gpu_moving: f64,
    /// Requests that waited longer than `starved_after_s`, or for ever.
    pub starved: usize,
    pub starved_after_s: f64,
    /// Seconds of service of requests that ended before the last arrival, per hour until then.
    pub work_s_per_hour: f64,
    pub makespan_s: f64,
    /// The longest wait for a turn: a place on a ready model is not waited for here.
    pub longest_turn_s: f64,
    /// How the bound on that was kept, by the policy that has one.
    pub bound: Option<Turns>,
    pub models: BTreeMap<ModelName, ModelFigures>,
}

pub fn figures(run: &Run, setup: &Setup) -> Figures {
    let gpus: Vec<GpuId> = setup.gpus.iter().map(|gpu| gpu.id).collect();
    let waits: Vec<(usize, Duration)> = waits(run);
    let all: Vec<Duration> = waits.iter().map(|(_, wait)| *wait).collect();
    let wait = spread(all);
    let starved_after = (Duration::from_secs_f64(wait.mean_s) * STARVED_TIMES).max(STARVED_FLOOR);
    let is_starved = |visit: &Visit, wait: Duration| {
        wait > starved_after || (visit.began.is_none() && visit.refused.is_none())
    };
    let starved: BTreeSet<usize> = waits
        .iter()
        .filter(|(at, wait)| is_starved(&run.visits[*at], *wait))
        .map(|(at, _)| *at)
        .collect();
    let count = |of: fn(&Visit) -> bool| run.visits.iter().filter(|v| of(v)).count();
    let (busy, moving) = shares(run, &gpus);
    let turns = turns(run, setup);
    Figures {
        policy: run.policy.clone(),
        arrivals: run.visits.len(),
        served: count(is_served),
        refused: count(|v| v.began.is_none() && v.refused.is_some()),
        cut: count(|v| v.began.is_some() && v.refused.is_some()),
        unserved: count(|v| v.began.is_none() && v.refused.is_none()),
        wait,
        loads: run.stays.len(),
        bytes_moved: run.stays.iter().map(|s| s.bytes.0 * s.gpus.len() as u64).sum(),
        gpu_busy: busy,
        gpu_moving: moving,
        starved: starved.len(),
        starved_after_s: starved_after.as_secs_f64(),
        work_s_per_hour: work(run),
        makespan_s: run.ended.0 as f64 / 1000.0,
        longest_turn_s: turns.longest_s,
        bound: (run.policy == Policy::Fair.as_str()).then_some(turns),
        models: by_model(run, &waits, &starved),
    }
}

fn is_served(visit: &Visit) -> bool {
    visit.began.is_some() && visit.refused.is_none() && visit.ended.is_some()
}

/// Visit and its wait; of who was never served, as far as it went. Who was refused is left out.
fn waits(run: &Run) -> Vec<(usize, Duration)> {
    let wait = |visit: &Visit| match (visit.began, &visit.refused) {
        (Some(began), _) => Some(began.since(visit.arrived)),
        (None, Some(_)) => None,
        (None, None) => Some(run.ended.since(visit.arrived)),
    };
    run.visits.iter().enumerate().filter_map(|(at, visit)| Some((at, wait(visit)?))).collect()
}

/// Percentiles by nearest rank.
pub fn spread(mut waits: Vec<Duration>) -> Waits {
    waits.sort();
    let Some(max) = waits.last() else { return Waits::default() };
    let rank = |percent: usize| {
        let rank = (waits.len() * percent).div_ceil(100).max(1);
        waits[rank - 1].as_secs_f64()
    };
    let sum: Duration = waits.iter().sum();
    Waits {
        mean_s: sum.as_secs_f64() / waits.len() as f64,
        p50_s: rank(50),
        p95_s: rank(95),
        p99_s: rank(99),
        max_s: max.as_secs_f64(),
    }
}

fn by_model(
    run: &Run,
    waits: &[(usize, Duration)],
    starved: &BTreeSet<usize>,
) -> BTreeMap<ModelName, ModelFigures> {
    let mut models: BTreeMap<ModelName, (ModelFigures, Vec<Duration>)> = BTreeMap::new();
    for visit in &run.visits {
        let (figures, _) = models.entry(visit.model.clone()).or_default();
        figures.arrivals += 1;
        figures.served += usize::from(is_served(visit));
    }
    for (at, wait) in waits {
        let (figures, waits) = models.entry(run.visits[*at].model.clone()).or_default();
        waits.push(*wait);
        figures.starved += usize::from(starved.contains(at));
    }
    for stay in &run.stays {
        models.entry(stay.model.clone()).or_default().0.loads += 1;
    }
    let told = |(figures, waits)| ModelFigures { wait: spread(waits), ..figures };
    models.into_iter().map(|(name, model)| (name, told(model))).collect()
}

fn work(run: &Run) -> f64 {
    let Some(last) = run.visits.iter().map(|v| v.arrived).max() else { return 0.0 };
    let done = |visit: &Visit| {
        let (began, ended) = (visit.began?, visit.ended?);
        (is_served(visit) && ended <= last).then(|| ended.since(began).as_secs_f64())
    };
    let sum: f64 = run.visits.iter().filter_map(done).sum();
    if last == Time::ZERO { 0.0 } else { sum * 3600.0 / (last.0 as f64 / 1000.0) }
}

/// Shares of the GPUs' time: serving, and being moved on.
fn shares(run: &Run, gpus: &[GpuId]) -> (f64, f64) {
    let (mut busy, mut moving) = (0, 0);
    for gpu in gpus {
        let here: Vec<&Stay> = run.stays.iter().filter(|s| s.gpus.contains(gpu)).collect();
        let mut stays: BTreeMap<&ModelName, Vec<&Stay>> = BTreeMap::new();
        for stay in &here {
            stays.entry(&stay.model).or_default().push(stay);
        }
        let served_here = |visit: &&Visit| {
            let during = |stay: &&&Stay| {
                visit.began.is_some_and(|began| {
                    stay.ready.is_some_and(|ready| ready <= began) && began <= stay.ended
                })
            };
            stays.get(&visit.model).is_some_and(|stays| stays.iter().any(|s| during(&s)))
        };
        let served = run.visits.iter().filter(served_here);
        busy += covered(served.filter_map(|v| Some((v.began?, v.ended.unwrap_or(run.ended)))));
        let loading = here.iter().map(|s| (s.began, s.ready.unwrap_or(s.ended)));
        let leaving = here.iter().filter_map(|s| Some((s.left?, s.ended)));
        moving += covered(loading.chain(leaving));
    }
    let whole = (run.ended.0 * gpus.len() as u64).max(1) as f64;
    (busy as f64 / whole, moving as f64 / whole)
}

/// Milliseconds that lie in at least one of the spans.
fn covered(spans: impl Iterator<Item = (Time, Time)>) -> u64 {
    let mut spans: Vec<(Time, Time)> = spans.collect();
    spans.sort();
    let (mut sum, mut until) = (0, Time::ZERO);
    for (from, to) in spans {
        let from = from.max(until);
        sum += to.0.saturating_sub(from.0);
        until = until.max(to);
    }
    sum
}
