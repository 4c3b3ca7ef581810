//! What operators and the time of day want: extensions, pins, sleep, keep windows, grace.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::{Catalog, TtlBounds};
use wharf::scheduler::event::{EnsureKind, Event};
use wharf::units::ModelName;

use crate::rng::Rng;
use crate::scenario::{Scenario, Step};
use crate::world::World;

/// An operator's word on how long a model stays.
#[derive(Clone, Debug)]
pub enum Stay {
    Extend(Option<Duration>),
    Pin(bool),
    Sleep,
    Keep(bool),
}

impl World {
    pub fn stay(&mut self, model: ModelName, stay: &Stay) {
        let ask = self.ask_id();
        self.tell(match *stay {
            Stay::Extend(by) => Event::ExtendAsked { ask, model, by },
            Stay::Pin(pinned) => Event::PinAsked { ask, model, pinned },
            Stay::Sleep => Event::SleepAsked { ask, model },
            Stay::Keep(kept) => Event::KeepChanged { model, kept },
        });
    }
}

/// Half of the runs are left as they were.
pub fn add(scenario: &mut Scenario) {
    let mut rng = Rng::new(scenario.seed ^ 0x57A7);
    let rng = &mut rng;
    if rng.chance(500) {
        return;
    }
    graces(rng, scenario);
    if scenario.calm {
        return;
    }
    let names: Vec<ModelName> = scenario.catalog.models.keys().cloned().collect();
    let until = scenario.quiet_from;
    for _ in 0..rng.range(1, 12) {
        let model = rng.pick(&names).clone();
        let stay = match rng.below(10) {
            0..3 => {
                Stay::Extend(rng.chance(700).then(|| Duration::from_millis(rng.skewed(90_000))))
            }
            3 => Stay::Pin(true),
            4 => Stay::Pin(false),
            5..8 => Stay::Sleep,
            _ => Stay::Keep(rng.chance(650)),
        };
        scenario.steps.push((rng.below(until), Step::Stay { model, stay }));
    }
    for _ in 0..rng.range(0, 3) {
        let (model, kind) = (rng.pick(&names).clone(), EnsureKind::Wake);
        let (timeout_ms, gone_after) = (rng.skewed(60_000), None);
        let step = Step::Ensure { model, kind, timeout_ms, gone_after };
        scenario.steps.push((rng.below(until), step));
    }
    // Pins are given back with the end of the noise: what fits is to be served then.
    for (model, spec) in &scenario.catalog.models {
        let stay = Stay::Pin(spec.pinned);
        scenario.steps.push((until, Step::Stay { model: model.clone(), stay }));
        if rng.chance(700) {
            let step = Step::Stay { model: model.clone(), stay: Stay::Keep(false) };
            scenario.steps.push((until, step));
        }
    }
}

/// By name, so that a reload changes no more than it did.
fn graces(rng: &mut Rng, scenario: &mut Scenario) {
    let seconds = |rng: &mut Rng, from: &[u64]| Duration::from_secs(*rng.pick(from));
    let of: BTreeMap<ModelName, (Duration, TtlBounds)> = (0..=30)
        .map(|n| {
            let bounds = TtlBounds {
                min: rng.chance(300).then(|| seconds(rng, &[1, 5])),
                max: rng.chance(300).then(|| seconds(rng, &[20, 60])),
            };
            (ModelName::new(format!("m{n}")), (seconds(rng, &[0, 1, 5, 20]), bounds))
        })
        .collect();
    let change = |catalog: &mut Arc<Catalog>| {
        for (name, spec) in &mut Arc::make_mut(catalog).models {
            if let Some((grace, bounds)) = of.get(name) {
                let spec = Arc::make_mut(spec);
                (spec.grace, spec.ttl_bounds) = (*grace, *bounds);
            }
        }
    };
    change(&mut scenario.catalog);
    for (_, step) in &mut scenario.steps {
        if let Step::Reload(catalog, _) = step {
            change(catalog);
        }
    }
}
