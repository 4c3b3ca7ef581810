//! Random groups, laid over a scenario that exists without them.

use std::collections::BTreeMap;
use std::sync::Arc;

use wharf::config::catalog::{Catalog, Group};
use wharf::units::ModelName;

use crate::rng::Rng;
use crate::scenario::{Scenario, Step};

/// Seeds from here on are those without this bit, with groups.
pub const WITH_GROUPS: u64 = 1 << 40;

pub fn add(scenario: &mut Scenario) {
    let mut rng = Rng::new(scenario.seed.wrapping_mul(31));
    let rng = &mut rng;
    let names: Vec<ModelName> = scenario.catalog.models.keys().cloned().collect();
    let groups: BTreeMap<String, Group> = (0..rng.range(1, 3))
        .map(|n| (format!("g{n}"), group(rng, &names, scenario.calm)))
        .collect();
    for (name, group) in groups.iter().filter(|(_, group)| group.together) {
        for _ in 0..rng.range(0, 4) {
            let at = rng.below(scenario.quiet_from);
            scenario.steps.push((at, Step::Company { group: name.clone() }));
            // Without a member that is wanted nobody needs company.
            let member = rng.pick(&group.models).clone();
            let plan = crate::scenario::Plan::new(&member, rng.range(100, 3000));
            scenario.steps.push((at.saturating_sub(5), Step::Arrive(plan)));
        }
    }
    let with = |catalog: &Arc<Catalog>, groups: &BTreeMap<String, Group>| {
        Arc::new(Catalog { groups: groups.clone(), ..Catalog::clone(catalog) })
    };
    scenario.catalog = with(&scenario.catalog, &groups);
    let mut groups = groups;
    scenario.steps.sort_by_key(|(at, _)| *at);
    for (_, step) in &mut scenario.steps {
        if let Step::Reload(catalog, _) = step {
            if rng.chance(300) {
                groups.clear();
            }
            *catalog = with(catalog, &groups);
        }
    }
    let lasting = |catalog: &Catalog| {
        let pinned = catalog.models.values().any(|spec| spec.pinned);
        !catalog.groups.is_empty()
            && (pinned || catalog.groups.values().any(|group| group.persistent))
    };
    let reloads = scenario.steps.iter().filter_map(|(_, step)| match step {
        Step::Reload(catalog, _) => Some(catalog),
        _ => None,
    });
    if reloads.chain([&scenario.catalog]).any(|catalog| lasting(catalog)) {
        scenario.probes.clear();
    }
}

fn group(rng: &mut Rng, names: &[ModelName], calm: bool) -> Group {
    let mut models: Vec<ModelName> = names.iter().filter(|_| rng.chance(450)).cloned().collect();
    if models.is_empty() {
        models.push(rng.pick(names).clone());
    }
    Group {
        models,
        together: rng.chance(500),
        exclusive: rng.chance(350),
        persistent: !calm && rng.chance(200),
    }
}
