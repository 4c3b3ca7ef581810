//! Which GPUs are chosen: later fits shall remain possible.

use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::{Catalog, GpuRequest, ModelSpec, Vram};

use crate::scheduler::action::Action;
use crate::scheduler::event::{Event, Learned};
use crate::scheduler::plan::Verdict;
use crate::units::*;

fn on(name: &str, gib: u64, gpus: u16) -> ModelSpec {
    ModelSpec { gpus: GpuRequest::Count(gpus), ..spec(name, gib) }
}

fn named(name: &str, gib: u64, gpus: &[u16]) -> ModelSpec {
    let names = gpus.iter().map(ToString::to_string).collect();
    ModelSpec { gpus: GpuRequest::Explicit(names), ..spec(name, gib) }
}

/// Without a reserve, so that sizes say what they seem to.
fn bare(models: Vec<ModelSpec>) -> Catalog {
    let mut catalog = catalog(models);
    catalog.settings.gpu.reserve = Bytes::ZERO;
    catalog
}

fn place(sim: &mut Sim, model: &str) -> Vec<u16> {
    let request = sim.request(model);
    sim.run_secs(8);
    assert_eq!(sim.served_by(request), Some(model), "{}", sim.model(model).waiting_for);
    sim.end(request);
    sim.model(model).gpus.iter().map(|gpu| gpu.0).collect()
}

fn took(sim: &mut Sim, model: &str, start: u64) {
    let learned = Learned { start: Some(Duration::from_secs(start)), ..Learned::default() };
    sim.send(Event::Remembered { model: model.into(), learned });
}

#[test]
fn a_small_model_goes_where_the_least_is_left_over() {
    let models = vec![spec("small", 18), spec("tiny", 4), spec("large", 70)];
    for sizes in [[24, 80], [80, 24]] {
        let small = u16::from(sizes[0] == 80);
        let mut sim = Sim::new(bare(models.clone()), &sizes);
        assert_eq!(place(&mut sim, "small"), [small]);
        assert_eq!(place(&mut sim, "tiny"), [small], "what is large and free stays so");
        assert_eq!(place(&mut sim, "large"), [1 - small]);
        assert_eq!(sim.count(|a| matches!(a, Action::StopInstance { .. })), 0);
    }
}

#[test]
fn nobody_leaves_where_a_free_gpu_would_do_and_the_cheapest_where_none_does() {
    let models = vec![spec("a", 18), spec("b", 8), spec("c", 70), spec("d", 20)];
    let mut sim = Sim::new(bare(models), &[24, 80]);
    assert_eq!(place(&mut sim, "a"), [0]);
    assert_eq!(place(&mut sim, "c"), [1]);
    assert_eq!(place(&mut sim, "b"), [1], "disturbs nobody");
    for (model, start) in [("a", 60), ("b", 60), ("c", 20)] {
        took(&mut sim, model, start);
    }
    assert_eq!(place(&mut sim, "d"), [1], "c is back in 20 s, a in 60");
    assert_eq!((sim.state("a"), sim.state("b"), sim.state("c")), ("ready", "ready", "stopped"));
}

#[test]
fn of_equal_victims_the_one_whose_place_fits_best_leaves() {
    let models = vec![spec("a", 18), spec("b", 78), spec("c", 18)];
    let mut sim = Sim::new(bare(models), &[24, 80]);
    assert_eq!((place(&mut sim, "a"), place(&mut sim, "b")), (vec![0], vec![1]));
    for model in ["a", "b"] {
        took(&mut sim, model, 20);
    }
    assert_eq!(place(&mut sim, "c"), [0], "62 GiB of the large GPU would be left");
}

#[test]
fn tensor_parallel_models_take_a_pair_of_one_kind() {
    let models = vec![on("pair", 20, 2), spec("one", 10), on("wide", 60, 2)];
    let mut sim = Sim::new(bare(models.clone()), &[24, 80, 24, 80]);
    assert_eq!(place(&mut sim, "pair"), [0, 2]);
    assert_eq!(place(&mut sim, "wide"), [1, 3]);
    let mut sim = Sim::new(bare(models.clone()), &[24, 24, 80, 80]);
    assert_eq!(place(&mut sim, "one"), [0]);
    assert_eq!(place(&mut sim, "pair"), [2, 3], "one GPU of each kind would serve neither well");
    // Neighbours: the second pair stays whole.
    let mut sim = Sim::new(bare(models), &[24, 24, 24, 24]);
    assert_eq!(place(&mut sim, "one"), [0]);
    assert_eq!(place(&mut sim, "pair"), [2, 3]);
}

#[test]
fn a_place_that_another_model_is_bound_to_is_left_to_it() {
    let models = vec![named("bound", 20, &[0]), spec("any", 18), on("pair", 20, 2)];
    let mut sim = Sim::new(bare(models), &[24, 24, 24]);
    assert_eq!(place(&mut sim, "any"), [1]);
    assert_eq!(place(&mut sim, "bound"), [0]);
    // A pair needs two that are free; a third GPU has room for the rest.
    let models = vec![on("pair", 20, 2), spec("a", 8), spec("b", 8)];
    let mut sim = Sim::new(bare(models), &[24, 24, 24]);
    assert_eq!((place(&mut sim, "a"), place(&mut sim, "b")), (vec![0], vec![0]));
    assert_eq!(place(&mut sim, "pair"), [1, 2]);
}

#[test]
fn a_gpu_that_strangers_use_is_the_second_choice_and_never_overfilled() {
    let models = vec![spec("a", 8), spec("b", 16), spec("c", 12)];
    let mut sim = Sim::new(bare(models), &[24, 24]);
    sim.strangers.insert(GpuId(0), Bytes::gib(8));
    sim.run_secs(1);
    assert_eq!(place(&mut sim, "a"), [1], "14 GiB are left over there, and no stranger grows");
    assert_eq!(place(&mut sim, "b"), [1], "16 are left, and still no stranger");
    assert_eq!(place(&mut sim, "c"), [0], "nobody has to leave for it: 16 are free");
    sim.strangers.insert(GpuId(0), Bytes::gib(14));
    sim.unload("c", false);
    sim.run_secs(5);
    assert_eq!(place(&mut sim, "c"), [1], "10 GiB are left beside the stranger");
    // A desktop keeps nobody away.
    let mut sim = Sim::new(bare(vec![spec("a", 18)]), &[24, 80]);
    sim.strangers.insert(GpuId(0), Bytes::gib(1));
    sim.run_secs(1);
    assert_eq!(place(&mut sim, "a"), [0]);
}

#[test]
fn a_model_of_unknown_size_is_measured_where_most_is_free() {
    let unknown = ModelSpec { vram: Vram::Unknown, ..spec("unknown", 0) };
    let mut sim = Sim::new(bare(vec![unknown]), &[24, 80]);
    sim.real.insert("unknown".into(), Bytes::gib(20));
    assert_eq!(place(&mut sim, "unknown"), [1]);
    sim.unload("unknown", false);
    sim.run_secs(5);
    assert_eq!(place(&mut sim, "unknown"), [0], "now its size is known");
}

#[test]
fn free_in_total_and_nowhere_in_one_piece_the_cheapest_leaves() {
    let models = vec![spec("a", 14), spec("b", 14), spec("c", 14), spec("d", 16)];
    let mut sim = Sim::new(bare(models), &[24, 24, 24]);
    for (model, start) in [("a", 40), ("b", 10), ("c", 40)] {
        assert_eq!(place(&mut sim, model).len(), 1);
        took(&mut sim, model, start);
    }
    let at = sim.model("b").gpus.clone();
    let d = place(&mut sim, "d");
    assert_eq!(d, [at[0].0], "30 GiB are free, 10 on each");
    assert_eq!((sim.state("a"), sim.state("b"), sim.state("c")), ("ready", "stopped", "ready"));
}

#[test]
fn one_that_is_cheap_leaves_instead_of_two_that_are_dearer_together() {
    let models = vec![spec("a", 6), spec("b", 6), spec("c", 12), spec("d", 12)];
    let mut sim = Sim::new(bare(models), &[24]);
    for (model, start) in [("a", 10), ("b", 10), ("c", 12)] {
        place(&mut sim, model);
        took(&mut sim, model, start);
    }
    place(&mut sim, "d");
    assert_eq!((sim.state("a"), sim.state("b"), sim.state("c")), ("ready", "ready", "stopped"));
}

#[test]
fn pinned_and_persistent_models_stay_on_every_gpu_they_use() {
    let pinned = ModelSpec { pinned: true, ..on("pinned", 10, 2) };
    let models = vec![pinned, on("pair", 16, 2), spec("one", 20), spec("other", 20)];
    let mut sim = Sim::new(bare(models), &[24, 24, 24]);
    assert_eq!(place(&mut sim, "pinned"), [0, 1]);
    let refused = sim.request("pair");
    assert!(sim.refused.contains_key(&refused), "one GPU is free of the pinned: not two");
    assert_eq!(place(&mut sim, "one"), [2]);
    assert_eq!(place(&mut sim, "other"), [2], "one had to leave");
    assert_eq!(sim.state("pinned"), "ready");
}

#[test]
fn a_plan_names_gpus_and_who_leaves_on_each_of_them() {
    let models = vec![spec("a", 20), spec("b", 20), on("pair", 20, 2)];
    let mut sim = Sim::new(bare(models), &[24, 24]);
    for model in ["a", "b"] {
        place(&mut sim, model);
    }
    sim.run_secs(1);
    let forecast = sim.scheduler.forecast(sim.now, &"pair".into()).expect("configured");
    assert_eq!(forecast.verdict, Verdict::Begins, "{forecast:?}");
    assert_eq!(forecast.gpus, [GpuId(0), GpuId(1)]);
    let leave: Vec<_> = forecast.evicts.iter().map(|e| e.model.as_str()).collect();
    assert_eq!(leave, ["a", "b"]);
    assert_eq!(forecast.need.declared, Some(Bytes::gib(20)));
    let rooms: Vec<_> = forecast.rooms.iter().map(|r| (r.room, r.need, r.promised.len())).collect();
    assert_eq!(rooms, [(Bytes::gib(4), Some(Bytes::gib(20)), 1); 2]);
}

/// A small world: sizes of GPUs, and models in the order in which they come, all to stay.
struct Small {
    gpus: Vec<u64>,
    models: Vec<(u64, u16)>,
}

impl Small {
    fn new(seed: u64) -> Small {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut roll = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let count = 2 + roll(3);
        let gpus = (0..count).map(|_| [16, 24, 24, 48, 80][roll(5) as usize]).collect();
        let models = (0..4 + roll(3))
            .map(|_| (4 + roll(20) * (1 + roll(3)), if roll(4) == 0 { 2 } else { 1 }))
            .collect();
        Small { gpus, models }
    }

    /// How many come to be up together, each request held so that nobody leaves.
    fn run(&self) -> usize {
        let models = self.models.iter().zip('a'..);
        let models = models.map(|(&(gib, gpus), name)| on(&name.to_string(), gib, gpus)).collect();
        let mut sim = Sim::in_world(bare(models), &self.gpus, false);
        let names = ('a'..).take(self.models.len()).map(|name| name.to_string());
        let mut up = 0;
        for name in names {
            let request = sim.request(&name);
            sim.run_secs(6);
            if sim.served_by(request).is_some() {
                up += 1;
            } else {
                sim.end(request);
            }
        }
        up
    }

    fn sets(&self, count: u16) -> Vec<Vec<usize>> {
        let n = self.gpus.len();
        match count {
            1 => (0..n).map(|g| vec![g]).collect(),
            _ => (0..n).flat_map(|a| (a + 1..n).map(move |b| vec![a, b])).collect(),
        }
    }

    /// The most that any assignment has up together.
    fn most(&self, rooms: &mut Vec<u64>, at: usize) -> usize {
        let Some(&(gib, count)) = self.models.get(at) else { return 0 };
        let mut best = self.most(rooms, at + 1);
        for set in self.sets(count) {
            if set.iter().all(|&g| rooms[g] >= gib) {
                set.iter().for_each(|&g| rooms[g] -= gib);
                best = best.max(1 + self.most(rooms, at + 1));
                set.iter().for_each(|&g| rooms[g] += gib);
            }
        }
        best
    }

    /// Each where `key` is least, in the order in which they come.
    fn greedy(&self, key: impl Fn(&[u64], &[usize]) -> i64) -> usize {
        let mut rooms = self.gpus.clone();
        let mut up = 0;
        for &(gib, count) in &self.models {
            let fits = |set: &&Vec<usize>| set.iter().all(|&g| rooms[g] >= gib);
            let sets = self.sets(count);
            if let Some(set) = sets.iter().filter(fits).min_by_key(|set| key(&rooms, set)) {
                set.iter().for_each(|&g| rooms[g] -= gib);
                up += 1;
            }
        }
        up
    }
}

#[test]
fn later_models_fit_nearly_as_often_as_in_the_best_of_all_assignments() {
    let (mut ours, mut most, mut first, mut roomiest) = (0, 0, 0, 0);
    for seed in 1..=300 {
        let world = Small::new(seed);
        ours += world.run();
        most += world.most(&mut world.gpus.clone(), 0);
        first += world.greedy(|_, _| 0);
        roomiest += world.greedy(|rooms, set| -set.iter().map(|&g| rooms[g] as i64).sum::<i64>());
    }
    println!("up together: {ours}; best {most}, first fit {first}, roomiest {roomiest}");
    assert!(ours > first && ours > roomiest, "{ours}, first {first}, roomiest {roomiest}");
    assert!(ours * 100 >= most * 95, "{ours} of {most}");
}
