//! Breadth first through all that can happen, each state once.

use std::collections::HashMap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::models::Setup;
use crate::world::{Step, World};

/// From every so many states everything is let come to its end.
const ENDS_EVERY: u64 = 64;
/// Steps to an end: more are no end.
const END_STEPS_MAX: usize = 400;
/// What the scheduler assumes of a start that it never saw.
const START_UNKNOWN: Duration = Duration::from_secs(10);

/// Worlds that were searched by this run, and their states.
static WORLDS: AtomicUsize = AtomicUsize::new(0);
static STATES: AtomicUsize = AtomicUsize::new(0);

/// How a state was reached first.
struct Way {
    from: u64,
    step: Step,
}

#[derive(Default)]
struct Figures {
    steps: u64,
    ends: u64,
    longest_wait: u64,
}

pub fn explore(setup: Setup) {
    let depth = std::env::var("WHARF_SMALL_WORLD_DEPTH").ok().and_then(|d| d.parse().ok());
    let depth = depth.unwrap_or(setup.depth);
    let setup = Rc::new(setup);
    let first = World::new(Rc::clone(&setup)).expect("the models load");
    let root = first.digest();
    let mut ways: HashMap<u64, Option<Way>> = HashMap::from([(root, None)]);
    let mut frontier = vec![(root, first)];
    let mut figures = Figures::default();
    for _ in 0..depth {
        let mut next = Vec::new();
        for (from, world) in frontier {
            for step in world.steps() {
                figures.steps += 1;
                let reached = guarded(|| {
                    let mut world = world.clone();
                    world.step(&step)?;
                    Ok(world)
                });
                let reached = match reached {
                    Ok(reached) => reached,
                    Err(why) => tell(&setup, &ways, from, Some(&step), None, &why),
                };
                let digest = reached.digest();
                if ways.contains_key(&digest) {
                    continue;
                }
                ways.insert(digest, Some(Way { from, step }));
                if digest.is_multiple_of(ENDS_EVERY) {
                    figures.ends += 1;
                    for ends in [true, false] {
                        match guarded(|| comes_to_an_end(&mut reached.clone(), ends)) {
                            Ok(waited) => figures.longest_wait = figures.longest_wait.max(waited),
                            Err(why) => tell(&setup, &ways, digest, None, Some(ends), &why),
                        }
                    }
                }
                next.push((digest, reached));
            }
        }
        frontier = next;
    }
    // Past the test harness's capture: the figures are wanted of green runs, too.
    let states = STATES.fetch_add(ways.len(), Ordering::SeqCst) + ways.len();
    let worlds = WORLDS.fetch_add(1, Ordering::SeqCst) + 1;
    let _ = writeln!(
        std::io::stderr(),
        "{}: {} states by {} steps to depth {depth} ({} at its edge), {} led to their end, longest \
         wait there {} ms\nsmall worlds: {states} states in {worlds}",
        setup.name,
        ways.len(),
        figures.steps,
        frontier.len(),
        figures.ends,
        figures.longest_wait,
    );
}

/// An assertion of the scheduler's own is a finding like any other.
fn guarded<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("without words")))
    })
}

/// Nobody comes any more. Moves complete, requests end (`ends`; else they hold on to their engine
/// until they are cut off), and time passes: then nobody waits, nothing is under way, and nobody
/// has waited longer than until notice fell due, and a whole turn of every model: a tenure, a drain,
/// a proof of release and a start.
fn comes_to_an_end(world: &mut World, ends: bool) -> Result<u64, String> {
    (world.arrivals, world.failures, world.leaves) = ([0; 3], 0, 0);
    world.ticks = u8::MAX;
    (world.reference.longest_wait, world.reference.counts_from) = (0, world.now);
    for _ in 0..END_STEPS_MAX {
        let steps = world.steps();
        let moves = steps.iter().find(|step| matches!(step, Step::Completes(..)));
        let request = steps.iter().find(|step| matches!(step, Step::Ends(..)) && ends);
        let idle = world.reference.waiting.is_empty() && world.view().swaps.is_empty();
        let clock = steps.iter().find(|step| matches!(step, Step::Clock) && !idle);
        let Some(step) = moves.or(request).or(clock).cloned() else {
            return at_the_end(world, ends);
        };
        let now = world.now;
        world.note(|| format!(" -. at {now} ms {step}"));
        world.step(&step)?;
    }
    Err(format!("no end after {END_STEPS_MAX} steps"))
}

fn at_the_end(world: &World, ends: bool) -> Result<u64, String> {
    let swap = &world.catalog().settings.swap;
    let ms = |duration: Duration| duration.as_millis() as u64;
    let max_wait = ms(swap.max_wait.unwrap_or_default());
    let models = world.catalog().models.len() as u64;
    // Tenure is bought by what the start took, or is thought to take.
    let start = world.reference.slowest_start.max(ms(START_UNKNOWN));
    let tenure = ms(swap.min_residency).max(2 * start);
    let turn = tenure + ms(swap.drain_timeout) + start + ms(swap.vram_timeout);
    let bound = max_wait + models * turn;
    let view = world.view();
    if !world.reference.waiting.is_empty() {
        let waiting = &world.reference.waiting;
        return Err(format!("nothing is left to happen, and {waiting:?} wait"));
    }
    if !view.swaps.is_empty() {
        return Err(format!("nothing is left to happen, but {:?}", view.swaps));
    }
    let places = world.catalog().models.values().any(|model| model.concurrency.is_some());
    // A place on a ready model is waited for as long as the queue's timeout.
    let longest = world.reference.longest_wait;
    if longest > bound && (ends || !places) {
        return Err(format!("somebody waited {longest} ms; the bound is {bound} ms"));
    }
    Ok(longest)
}

/// The shortest way to what was found, as a script with everything that was said.
fn tell(
    setup: &Rc<Setup>,
    ways: &HashMap<u64, Option<Way>>,
    last: u64,
    step: Option<&Step>,
    ends: Option<bool>,
    why: &str,
) -> ! {
    let mut script = step.cloned().into_iter().collect::<Vec<Step>>();
    let mut at = last;
    while let Some(Some(way)) = ways.get(&at) {
        script.push(way.step.clone());
        at = way.from;
    }
    script.reverse();
    let mut world = World::new(Rc::clone(setup)).expect("the models load");
    world.trace = Some(Vec::new());
    for (number, step) in script.iter().enumerate() {
        let now = world.now;
        world.note(|| format!("{:>2}. at {now} ms {step}", number + 1));
        if guarded(|| world.step(step)).is_err() {
            break;
        }
    }
    if let Some(ends) = ends {
        world.note(|| format!("Nobody comes any more; requests end by themselves: {ends}"));
        // What it finds is `why`.
        let _ = guarded(|| comes_to_an_end(&mut world, ends));
    }
    let lines = world.trace.take().unwrap_or_default();
    panic!("{}\n{}: after {} steps: {why}", lines.join("\n"), setup.name, script.len());
}
