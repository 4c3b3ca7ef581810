//! Closed loops: agents that ask, wait for the answer, think, and ask the next model. A recorded
//! trace cannot show what a policy does to them, as its requests come whether the earlier ones
//! were answered or not.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;

use super::generate::Random;
use super::{Arrival, Run};
use crate::units::{ModelName, Time};

pub const AGENTS_MAX: usize = 16;
/// Of each agent.
pub const TASKS: usize = 5;

pub const PLANNER: &str = "planner";
pub const CODER: &str = "coder";

/// Median seconds of an answer: a plan, a piece of code, a review.
const PLAN: f64 = 6.0;
const CODE: f64 = 10.0;
const REVIEW: f64 = 4.0;
/// Median seconds between an answer and the next request: tools run.
const THINK: f64 = 2.0;
/// Between two tasks a person reads.
const READ: f64 = 15.0;
/// Of the logarithms of all of them.
const SPREAD: f64 = 0.5;

/// One request of an agent, and how long it thinks before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    pub think: Duration,
    pub model: ModelName,
    pub service: Duration,
}

/// One caller: its turns, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agent {
    pub turns: VecDeque<Turn>,
}

impl Agent {
    /// The next request, if there is one, of an agent that was answered now.
    pub(super) fn next(&mut self, now: Time) -> Option<Arrival> {
        let Turn { think, model, service } = self.turns.pop_front()?;
        Some(Arrival { at: now + think, model, service })
    }
}

/// So many agents with [`TASKS`] tasks each: the planner plans, the coder writes one to four
/// pieces, the planner looks at them. Only the seed decides what comes out.
pub fn agents(seed: u64, count: usize) -> Vec<Agent> {
    (0..count as u64).map(|agent| one(&mut Random(seed.wrapping_add(agent << 32)))).collect()
}

fn one(random: &mut Random) -> Agent {
    let mut turns = VecDeque::new();
    for _ in 0..TASKS {
        let pieces = 1 + (random.unit() * 4.0) as usize;
        let steps = std::iter::once((READ, PLANNER, PLAN))
            .chain(std::iter::repeat_n((THINK, CODER, CODE), pieces))
            .chain(std::iter::once((THINK, PLANNER, REVIEW)));
        for (think, model, service) in steps {
            let mut about = |median: f64| {
                Duration::from_millis((random.log_normal(median, SPREAD) * 1000.0) as u64)
            };
            turns.push_back(Turn {
                think: about(think),
                model: model.into(),
                service: about(service),
            });
        }
    }
    Agent { turns }
}

/// What agents saw of a policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SessionFigures {
    pub policy: String,
    pub agents: usize,
    pub tasks: usize,
    pub requests: usize,
    pub loads: usize,
    pub swaps_per_task: f64,
    /// Until the last agent was done.
    pub makespan_s: f64,
    /// Waiting for a start of service, of all of a task's requests.
    pub wait_per_task_s: f64,
}

pub fn session_figures(run: &Run, agents: usize) -> SessionFigures {
    let tasks = agents * TASKS;
    let waited: Duration =
        run.visits.iter().filter_map(|visit| Some(visit.began?.since(visit.arrived))).sum();
    let each = |sum: f64| sum / tasks.max(1) as f64;
    SessionFigures {
        policy: run.policy.clone(),
        agents,
        tasks,
        requests: run.visits.len(),
        loads: run.stays.len(),
        swaps_per_task: each(run.stays.len() as f64),
        makespan_s: run.ended.0 as f64 / 1000.0,
        wait_per_task_s: each(waited.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_begins_and_ends_with_the_planner_and_only_the_seed_decides() {
        let one = agents(7, 3);
        assert_eq!(one, agents(7, 3));
        assert_ne!(one, agents(8, 3));
        assert_eq!(one[..2], agents(7, 2), "another agent changes nothing for the others");
        for agent in &one {
            let models: Vec<&str> = agent.turns.iter().map(|turn| turn.model.as_str()).collect();
            assert_eq!((models[0], models[models.len() - 1]), (PLANNER, PLANNER));
            assert_eq!(models.iter().filter(|model| **model == PLANNER).count(), 2 * TASKS);
            assert!(models.len() <= 6 * TASKS);
        }
    }
}
