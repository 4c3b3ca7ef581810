//! Bounded waiting (invariant 5 of the design), read off a run.
//!
//! A request's turn comes with the next tenure of its model. It comes within its `max_wait`, the
//! turns (tenure, drain, move) of the models that fell due earlier on those GPUs, and its own
//! drain and move. Whom a tenure leaves behind waits anew from its end. Waiting for a place on a
//! ready model is no waiting for a turn.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::setup::Setup;
use super::{Run, Visit};
use crate::units::{GpuId, ModelName, Time};

/// Default `max_wait`: `max(30 s, 3 × the move)`.
const MAX_WAIT_FLOOR: Duration = Duration::from_secs(30);

/// How the turns of a run kept their bound.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Turns {
    /// Times that a request had to wait for a turn.
    pub waited: usize,
    /// The longest of these waits, and the bound of that one.
    pub longest_s: f64,
    pub longest_bound_s: f64,
    /// The model of the longest, and when that wait began.
    pub longest_model: Option<ModelName>,
    pub longest_from_s: f64,
    /// The largest share of its bound that a wait took: 1 is all of it.
    pub tightest: f64,
    /// Waits longer than their bound.
    pub beyond: usize,
}

/// One request waits for one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wait<'a> {
    model: &'a ModelName,
    from: Time,
    /// When notice to leave is due to whoever is in the way.
    due: Time,
    until: Time,
    /// Which tenure it was; `None`: it never came.
    tenure: Option<usize>,
}

/// What is known of a model's tenures, in their order.
#[derive(Debug, Default)]
struct Tenures {
    ready: Vec<Time>,
    left: Vec<Time>,
    gpus: Vec<Vec<GpuId>>,
}

/// For one model on one GPU: when its turns came, and when their first waiter had fallen due.
#[derive(Debug, Default)]
struct Claims {
    turns: Vec<(Time, Time)>,
    /// The earliest due of this turn and all later ones.
    first_due: Vec<Time>,
}

pub fn turns(run: &Run, setup: &Setup) -> Turns {
    let tenures = tenures(run);
    let max_wait = |model: &ModelName| {
        let default = MAX_WAIT_FLOOR.max(setup.costs(model).start * 3);
        setup.catalog.settings.swap.max_wait.unwrap_or(default)
    };
    let none = Tenures::default();
    let waits: Vec<Wait<'_>> = run
        .visits
        .iter()
        .flat_map(|visit| {
            let tenures = tenures.get(&visit.model).unwrap_or(&none);
            waits_of(visit, tenures, max_wait(&visit.model), run.ended)
        })
        .collect();
    let claims = claims(&waits, &tenures, setup);
    let mut told = Turns { waited: waits.len(), ..Turns::default() };
    for wait in &waits {
        let took = wait.until.since(wait.from).as_secs_f64();
        let bound = bound(wait, &tenures, &claims, setup, max_wait(wait.model)).as_secs_f64();
        told.tightest = told.tightest.max(took / bound);
        told.beyond += usize::from(took > bound);
        if took > told.longest_s {
            (told.longest_s, told.longest_bound_s) = (took, bound);
            told.longest_model = Some(wait.model.clone());
            told.longest_from_s = wait.from.0 as f64 / 1000.0;
        }
    }
    told
}

fn tenures(run: &Run) -> BTreeMap<&ModelName, Tenures> {
    let mut all: BTreeMap<&ModelName, Tenures> = BTreeMap::new();
    for stay in &run.stays {
        let Some(ready) = stay.ready else { continue };
        let tenures = all.entry(&stay.model).or_default();
        tenures.ready.push(ready);
        tenures.left.push(stay.left.unwrap_or(Time::MAX));
        tenures.gpus.push(stay.gpus.clone());
    }
    all
}

/// The turns that one request waited for: more than one, if a tenure left it behind.
fn waits_of<'a>(
    visit: &'a Visit,
    tenures: &Tenures,
    max_wait: Duration,
    ended: Time,
) -> Vec<Wait<'a>> {
    let mut waits = Vec::new();
    // A refusal ends the waiting.
    let last = visit.began.or(visit.ended).unwrap_or(ended);
    let mut from = visit.arrived;
    let mut next = tenures.left.partition_point(|left| *left <= from);
    while from < last {
        let ready = tenures.ready.get(next).copied();
        let until = ready.unwrap_or(last).min(last);
        if until > from {
            let tenure = ready.filter(|ready| *ready <= last).map(|_| next);
            waits.push(Wait { model: &visit.model, from, due: from + max_wait, until, tenure });
        }
        from = match tenures.left.get(next) {
            Some(left) if *left < last => *left,
            Some(_) | None => break,
        };
        next += 1;
    }
    waits
}

fn claims<'a>(
    waits: &[Wait<'a>],
    tenures: &BTreeMap<&'a ModelName, Tenures>,
    setup: &Setup,
) -> BTreeMap<(&'a ModelName, GpuId), Claims> {
    let mut first: BTreeMap<(&ModelName, Option<usize>), (Time, Time)> = BTreeMap::new();
    for wait in waits {
        let entry = first.entry((wait.model, wait.tenure)).or_insert((wait.until, wait.due));
        *entry = (entry.0.max(wait.until), entry.1.min(wait.due));
    }
    let mut claims: BTreeMap<(&ModelName, GpuId), Claims> = BTreeMap::new();
    for ((model, tenure), (until, due)) in first {
        for gpu in gpus(model, tenure, tenures, setup) {
            claims.entry((model, gpu)).or_default().turns.push((until, due));
        }
    }
    for claims in claims.values_mut() {
        claims.turns.sort();
        claims.first_due = claims.turns.iter().map(|(_, due)| *due).collect();
        for at in (1..claims.first_due.len()).rev() {
            claims.first_due[at - 1] = claims.first_due[at - 1].min(claims.first_due[at]);
        }
    }
    claims
}

/// The GPUs of a tenure; of one that never came, all.
fn gpus(
    model: &ModelName,
    tenure: Option<usize>,
    tenures: &BTreeMap<&ModelName, Tenures>,
    setup: &Setup,
) -> Vec<GpuId> {
    let known = tenure.and_then(|at| tenures.get(model)?.gpus.get(at).cloned());
    known.unwrap_or_else(|| setup.gpus.iter().map(|gpu| gpu.id).collect())
}

fn bound(
    wait: &Wait<'_>,
    tenures: &BTreeMap<&ModelName, Tenures>,
    claims: &BTreeMap<(&ModelName, GpuId), Claims>,
    setup: &Setup,
    max_wait: Duration,
) -> Duration {
    let swap = &setup.catalog.settings.swap;
    let stop = setup.costs.values().map(|c| c.stop.max(c.sleep.unwrap_or_default())).max();
    let moves = |model: &ModelName| setup.costs(model).start + stop.unwrap_or_default();
    let tenure = |model: &ModelName| swap.min_residency.max(setup.costs(model).start * 2);
    let here: BTreeSet<GpuId> = gpus(wait.model, wait.tenure, tenures, setup).into_iter().collect();
    let earlier: BTreeSet<&ModelName> = claims
        .iter()
        .filter(|((model, gpu), _)| *model != wait.model && here.contains(gpu))
        .filter(|((model, _), claims)| claims.before(wait, tenure(model)))
        .map(|((model, _), _)| *model)
        .collect();
    let before: Duration = earlier.iter().map(|m| tenure(m) + swap.drain_timeout + moves(m)).sum();
    max_wait + before + swap.drain_timeout + moves(wait.model)
}

impl Claims {
    /// It fell due before this wait did, and had its turn (or its tenure) still ahead then.
    fn before(&self, wait: &Wait<'_>, tenure: Duration) -> bool {
        let ahead = self.turns.partition_point(|(turn, _)| *turn + tenure <= wait.due);
        self.first_due.get(ahead).is_some_and(|due| *due < wait.due)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::replay::Stay;
    use crate::replay::setup::{Costs, FOR_EVER, Machine, Terms};
    use crate::units::Bytes;

    const fn s(seconds: u64) -> Time {
        Time(seconds * 1000)
    }

    fn setup() -> Setup {
        let names: BTreeSet<ModelName> = ["ada", "bob", "eve"].map(ModelName::from).into();
        let terms = Terms {
            costs: Costs {
                start: Duration::from_secs(5),
                stop: Duration::from_secs(1),
                sleep: None,
                wake: None,
                residue: Bytes::ZERO,
            },
            concurrency: Some(1),
            max_wait: Some(Duration::from_secs(20)),
            drain_timeout: None,
            queue_timeout: FOR_EVER,
        };
        Setup::of_trace(&names, &Machine::Slots(1), &terms).expect("a world")
    }

    fn visit(model: &str, arrived: u64, began: u64) -> Visit {
        Visit {
            model: model.into(),
            arrived: s(arrived),
            began: Some(s(began)),
            ended: Some(s(began + 1)),
            refused: None,
        }
    }

    fn stay(model: &str, began: u64, left: u64) -> Stay {
        Stay {
            model: model.into(),
            gpus: vec![GpuId(0)],
            bytes: Bytes::gib(1),
            began: s(began),
            ready: Some(s(began + 5)),
            left: Some(s(left)),
            ended: s(left + 1),
        }
    }

    fn run(visits: Vec<Visit>, stays: Vec<Stay>) -> Run {
        Run { policy: "fair".to_owned(), visits, stays, ended: s(2000) }
    }

    #[test]
    fn waiting_for_a_place_is_no_waiting_for_a_turn() {
        let run = run(vec![visit("ada", 0, 5), visit("ada", 10, 900)], vec![stay("ada", 0, 1000)]);
        let told = turns(&run, &setup());
        assert_eq!((told.waited, told.longest_s), (1, 5.0), "only the first");
        // max_wait 20 + drain 300 + move 6.
        assert_eq!((told.longest_bound_s, told.beyond), (326.0, 0));
    }

    #[test]
    fn a_model_that_fell_due_earlier_has_its_turn_first() {
        // bob is due at 20, eve at 21: eve may wait for bob's move, tenure (10) and drain.
        let visits = vec![visit("ada", 0, 5), visit("bob", 0, 400), visit("eve", 1, 700)];
        let stays = vec![stay("ada", 0, 394), stay("bob", 395, 694), stay("eve", 695, 2000)];
        let told = turns(&run(visits, stays), &setup());
        assert_eq!(told.longest_model.as_ref().map(ModelName::as_str), Some("eve"));
        assert_eq!(told.longest_s, 699.0);
        // ada was ready long before: her turn counts for nobody who fell due later.
        assert_eq!(told.longest_bound_s, 326.0 + (10.0 + 300.0 + 6.0));
        assert_eq!(told.beyond, 2, "bob's 400 s are more than 326, eve's 699 more than 642");
    }

    #[test]
    fn who_is_left_behind_waits_anew_and_who_never_had_a_turn_waits_to_the_end() {
        let mut never = visit("bob", 1990, 0);
        (never.began, never.ended) = (None, None);
        let visits = vec![visit("ada", 10, 205), never];
        let stays = vec![stay("ada", 0, 100), stay("bob", 101, 199), stay("ada", 200, 2000)];
        let told = turns(&run(visits, stays), &setup());
        // ada's request came to a ready model, was left at 100 s and served at 205 s.
        assert_eq!((told.waited, told.longest_s), (2, 105.0));
        assert_eq!(told.longest_from_s, 100.0);
    }
}
