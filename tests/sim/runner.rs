//! Many seeds, on two threads; and one, with its trace.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::checker::Counts;
use crate::groups::WITH_GROUPS;
use crate::random;
use crate::world::World;

const THREADS: u64 = 2;
const TRACE_LINES: usize = 70;
const FAILURES_SHOWN: usize = 3;
const FAILURES_LISTED: usize = 500;

/// Seeds that once found something: always run first.
const REGRESSIONS: &str = include_str!("regressions.txt");

#[derive(Clone, Debug, Default)]
struct Totals {
    events: u64,
    virtual_ms: u64,
    calm: u64,
    tightest: u64,
    counts: Counts,
}

impl Totals {
    fn add(&mut self, other: &Totals) {
        self.events += other.events;
        self.virtual_ms += other.virtual_ms;
        self.calm += other.calm;
        self.tightest = self.tightest.max(other.tightest);
        self.counts.grants += other.counts.grants;
        for (reason, count) in &other.counts.refusals {
            *self.counts.refusals.entry(reason).or_default() += count;
        }
        self.counts.starts += other.counts.starts;
        self.counts.stops += other.counts.stops;
        self.counts.sleeps += other.counts.sleeps;
        self.counts.wakes += other.counts.wakes;
        self.counts.called_off += other.counts.called_off;
    }
}

fn run(seed: u64) -> Result<Totals, String> {
    let whole = || {
        let mut world = World::new(random::scenario(seed));
        world.run();
        match world.checker.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(Totals {
                events: world.events(),
                virtual_ms: world.now,
                calm: u64::from(world.scenario.calm),
                tightest: world.checker.tightest,
                counts: world.checker.counts.clone(),
            }),
        }
    };
    catch_unwind(AssertUnwindSafe(whole)).unwrap_or_else(|panic| Err(panic_text(&*panic)))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without words"))
}

/// The same run again, with every event and action written down.
fn traced(seed: u64) -> String {
    let mut world = World::new(random::scenario(seed));
    world.trace = Some(Vec::new());
    let ran = catch_unwind(AssertUnwindSafe(|| world.run()));
    let failure = match ran {
        Ok(()) => world.checker.failure.clone().unwrap_or_else(|| "nothing is wrong".to_owned()),
        Err(panic) => panic_text(&*panic),
    };
    let lines = world.trace.take().unwrap_or_default();
    let shown = if std::env::var("WHARF_SIM_TRACE").is_ok_and(|what| what == "all") {
        0
    } else {
        lines.len().saturating_sub(TRACE_LINES)
    };
    let mut text = summary(&world);
    for line in &lines[shown..] {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(&view(&world));
    format!("{text}seed {seed} at {} ms: {failure}\n", world.now)
}

/// What the scheduler says of itself at the end.
fn view(world: &World) -> String {
    let view = world.scheduler.view(wharf::units::Time(world.now));
    let mut text = String::new();
    for model in view.models {
        text.push_str(&format!(
            "{} is {} since {} as {:?} on {:?}, {} queued: {}\n",
            model.name,
            model.residency.as_str(),
            model.since.0,
            model.instance.map(|id| id.0),
            model.gpus.iter().map(|gpu| gpu.0).collect::<Vec<_>>(),
            model.queue.len(),
            model.waiting_for,
        ));
    }
    for gpu in view.gpus {
        let free = gpu.free.unwrap_or_default();
        text.push_str(&format!("GPU {}: {} promised, {free} free\n", gpu.gpu, gpu.promised));
    }
    text.push_str(&format!("{:?}\n", view.ram));
    text
}

fn summary(world: &World) -> String {
    let scenario = &world.scenario;
    let gpus: Vec<String> = scenario.gpus.iter().map(|gpu| gpu.total.to_string()).collect();
    let swap = &scenario.catalog.settings.swap;
    let queue = &scenario.catalog.settings.queue;
    let mut text = format!(
        "seed {}: calm {}, proof {}, GPUs {gpus:?}, quiet from {} ms\n{swap:?}\n{queue:?}\n{:?}\n",
        scenario.seed, scenario.calm, scenario.proof, scenario.quiet_from, scenario.faults
    );
    if let Some(host) = scenario.host {
        text.push_str(&format!("{host:?} {:?}\n", scenario.catalog.settings.ram));
    }
    for spec in scenario.catalog.models.values() {
        let truth = &scenario.truth[&spec.name];
        text.push_str(&format!(
            "{}: {:?} {:?} {:?} real {} ram {:?} start {:?} stop {:?} release {:?} conc {:?} ttl {:?} \
             sleep {:?} pinned {} warmup {} broken {}\n",
            spec.name,
            spec.engine,
            spec.gpus,
            spec.vram,
            truth.awake,
            spec.ram,
            truth.start_ms,
            truth.stop_ms,
            truth.release_ms,
            spec.concurrency,
            spec.ttl,
            spec.sleep,
            spec.pinned,
            spec.warmup,
            truth.broken,
        ));
    }
    text
}

fn seeds() -> u64 {
    let asked = std::env::var("WHARF_SIM_SEEDS").ok().and_then(|n| n.parse().ok());
    asked.unwrap_or(if cfg!(debug_assertions) { 200 } else { 10_000 })
}

fn regressions() -> Vec<u64> {
    let lines = REGRESSIONS.lines().map(|line| line.split('#').next().unwrap_or("").trim());
    lines.filter_map(|line| line.parse().ok()).collect()
}

#[test]
fn random_scenarios_keep_every_promise() {
    if let Some(seed) = std::env::var("WHARF_SIM_SEED").ok().and_then(|seed| seed.parse().ok()) {
        print!("{}", traced(seed));
        run(seed).expect("the replayed seed");
        return;
    }
    let began = Instant::now();
    let from = std::env::var("WHARF_SIM_FROM").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let grouped = (from..from + seeds()).map(|seed| seed | WITH_GROUPS);
    let plain = from..from + seeds();
    let list: Vec<u64> = regressions().into_iter().chain(plain).chain(grouped).collect();
    let next = AtomicU64::new(0);
    let totals = Mutex::new(Totals::default());
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(&seed) = list.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    match run(seed) {
                        Ok(one) => totals.lock().expect("no panic holds it").add(&one),
                        Err(failure) => {
                            failures.lock().expect("no panic holds it").push((seed, failure));
                        }
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().expect("no panic holds it");
    let mut failures = failures.into_inner().expect("no panic holds it");
    failures.sort();
    report(list.len(), began, &totals);
    for (seed, _) in failures.iter().take(FAILURES_SHOWN) {
        println!("{}", traced(*seed));
    }
    let all: Vec<String> = failures
        .iter()
        .take(FAILURES_LISTED)
        .map(|(seed, failure)| format!("seed {seed}: {failure}"))
        .collect();
    assert!(failures.is_empty(), "{} seeds failed:\n{}", failures.len(), all.join("\n"));
}

fn report(seeds: usize, began: Instant, totals: &Totals) {
    let seconds = began.elapsed().as_secs_f64();
    let counts = &totals.counts;
    // Past the test harness's capture: the figures are wanted of green runs, too.
    let _ = writeln!(
        std::io::stderr(),
        "simulated {seeds} seeds ({} calm) in {seconds:.1} s ({:.0} seeds/s, {:.0} events/s): {} \
         events, {:.0} h virtual, {} starts, {} stops, {} sleeps, {} wakes, {} starts called off, \
         {} queued grants, refusals {:?}; longest wait {} ‰ of its bound",
        totals.calm,
        seeds as f64 / seconds,
        totals.events as f64 / seconds,
        totals.events,
        totals.virtual_ms as f64 / 3.6e6,
        counts.starts,
        counts.stops,
        counts.sleeps,
        counts.wakes,
        counts.called_off,
        counts.grants,
        counts.refusals,
        totals.tightest,
    );
}

/// The journal, read back from its serialised form, replays to the same actions.
#[test]
fn a_journal_replays_to_the_same_actions() {
    for seed in (0..25).chain((0..25).map(|seed| seed | WITH_GROUPS)) {
        let scenario = random::scenario(seed);
        let mut again = crate::world::scheduler(&scenario);
        let mut world = World::new(scenario);
        world.journal = Some(Vec::new());
        let noise = world.scenario.quiet_from;
        world.run_until(noise);
        for entry in world.journal.iter().flatten() {
            let line = serde_json::to_string(&entry.event).expect("an event is serialisable");
            let event = serde_json::from_str(&line).expect("and can be read back");
            let mut actions = Vec::new();
            again.handle(wharf::units::Time(entry.at), event, &mut actions);
            let text = serde_json::to_string(&actions).expect("actions are serialisable");
            let wanted = serde_json::to_string(&entry.actions).expect("actions are serialisable");
            assert_eq!(text, wanted, "seed {seed} at {} after {line}", entry.at);
        }
    }
}
