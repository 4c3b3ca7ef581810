//! What one decision costs: `cargo bench --bench decision`.
//!
//! 500 models of different sizes on 16 GPUs, 10,000 requests queued, and the events of a busy
//! gateway in between. A small modelled world answers every action, so swaps really happen. One
//! decision is one `Scheduler::handle` and the `next_wake` that the owner asks for after it; both
//! are measured, by kind of event. `WHARF_BENCH_EVENTS` sets how many are (20,000),
//! `WHARF_BENCH_WARMUP` how many before (20,000): the queue fills before that.

mod world;

use std::collections::BTreeMap;

use world::World;

/// Nanoseconds of one event: `handle`, and `next_wake` after it.
#[derive(Clone, Copy)]
pub struct Cost {
    pub handle: u64,
    pub wake: u64,
}

#[derive(Default)]
pub struct Costs {
    by_kind: BTreeMap<&'static str, Vec<Cost>>,
}

impl Costs {
    pub fn note(&mut self, kind: &'static str, cost: Cost) {
        self.by_kind.entry(kind).or_default().push(cost);
    }

    pub fn count(&self) -> u64 {
        self.by_kind.values().map(|costs| costs.len() as u64).sum()
    }

    fn print(&self) {
        println!(
            "{:<28} {:>8} {:>9} {:>9} {:>9} | {:>9} {:>9} | {:>9} {:>9}",
            "µs", "count", "both p50", "p99", "max", "handle 50", "p99", "wake 50", "p99"
        );
        for (kind, costs) in &self.by_kind {
            print_row(kind, costs.iter().copied());
        }
        print_row("all", self.by_kind.values().flatten().copied());
    }
}

fn print_row(kind: &str, costs: impl Iterator<Item = Cost> + Clone) {
    let sorted = |of: fn(Cost) -> u64| {
        let mut list: Vec<u64> = costs.clone().map(of).collect();
        list.sort_unstable();
        list
    };
    let at = |list: &[u64], per_mille: usize| {
        let place = (list.len() * per_mille / 1000).min(list.len().saturating_sub(1));
        list.get(place).map_or(0.0, |&ns| ns as f64 / 1000.0)
    };
    let (both, handle, wake) =
        (sorted(|c| c.handle + c.wake), sorted(|c| c.handle), sorted(|c| c.wake));
    println!(
        "{kind:<28} {:>8} {:>9.1} {:>9.1} {:>9.1} | {:>9.1} {:>9.1} | {:>9.1} {:>9.1}",
        both.len(),
        at(&both, 500),
        at(&both, 990),
        at(&both, 1000),
        at(&handle, 500),
        at(&handle, 990),
        at(&wake, 500),
        at(&wake, 990),
    );
}

fn asked(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

fn main() {
    // Cargo runs benchmarks as tests, too: then a few events show that the world turns.
    let short = !std::env::args().any(|arg| arg == "--bench");
    let (warmup, events) = if short { (0, 50) } else { (20_000, 20_000) };
    let mut world = World::new();
    world.fill();
    world.run(asked("WHARF_BENCH_WARMUP", warmup), &mut Costs::default());
    let mut costs = Costs::default();
    world.run(asked("WHARF_BENCH_EVENTS", events), &mut costs);
    costs.print();
    println!("{}", world.summary());
}
