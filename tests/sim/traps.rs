//! Scripted traps: situations in which other swappers starve, thrash or hang. Every one of them
//! runs under the whole checker, too.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::{Catalog, EngineKind, GpuRequest, ModelSpec, SwapMode, Vram};
use wharf::scheduler::action::{Action, Answer, Refusal};
use wharf::scheduler::event::EnsureKind;
use wharf::units::{Bytes, ModelName};

use crate::clients::Outcome;
use crate::machine::Gpu;
use crate::scenario::{Faults, Loop, Plan, Scenario, Step, Truth, settings, spec};
use crate::world::World;

/// A scenario under construction. One GPU of 24 GiB unless said otherwise.
pub struct Trap {
    pub scenario: Scenario,
    pub catalog: Catalog,
}

impl Trap {
    pub fn on(gpus_gib: &[u64]) -> Trap {
        let gpu = |&gib: &u64| Gpu {
            total: Bytes::gib(gib),
            base: Bytes::mib(200),
            foreign: BTreeMap::new(),
        };
        let gpus: Vec<Gpu> = gpus_gib.iter().map(gpu).collect();
        let settings = settings(&gpus);
        let catalog = Catalog { settings, ..Catalog::default() };
        let scenario = Scenario {
            seed: 1,
            proof: true,
            unseen: false,
            host: None,
            truth: BTreeMap::new(),
            faults: Faults::default(),
            sample_every: 1000,
            steps: Vec::new(),
            adopted: Vec::new(),
            remembered: Vec::new(),
            quiet_from: u64::MAX / 2,
            probes: Vec::new(),
            calm: false,
            catalog: Arc::new(catalog.clone()),
            gpus,
        };
        Trap { scenario, catalog }
    }

    pub fn model(self, name: &str, gib: u64) -> Trap {
        self.model_with(name, gib, |_, _| {})
    }

    pub fn model_with(
        mut self,
        name: &str,
        gib: u64,
        change: impl FnOnce(&mut ModelSpec, &mut Truth),
    ) -> Trap {
        let bytes = Bytes::gib(gib);
        let mut spec = spec(name, GpuRequest::Count(1), Vram::Declared(bytes));
        let mut truth = Truth::quick(bytes);
        change(&mut spec, &mut truth);
        self.scenario.truth.insert(spec.name.clone(), truth);
        self.catalog.models.insert(spec.name.clone(), Arc::new(spec));
        self
    }

    pub fn at(mut self, ms: u64, step: Step) -> Trap {
        self.scenario.steps.push((ms, step));
        self
    }

    pub fn ask(self, ms: u64, model: &str, service_ms: u64) -> Trap {
        self.at(ms, Step::Arrive(Plan::new(&ModelName::new(model), service_ms)))
    }

    pub fn again_and_again(self, ms: u64, models: &[&str], service_ms: u64, think_ms: u64) -> Trap {
        let turns =
            models.iter().rev().map(|name| Plan::new(&ModelName::new(name), service_ms)).collect();
        let until = u64::MAX / 2;
        self.at(ms, Step::Loop(Loop { turns, think_ms, until, left: 1_000_000 }))
    }

    pub fn ensure(self, ms: u64, model: &str, timeout_ms: u64) -> Trap {
        let model = ModelName::new(model);
        let kind = EnsureKind::Ensure;
        self.at(ms, Step::Ensure { model, kind, timeout_ms, gone_after: None })
    }

    /// Runs until `end`; fails on anything that the checker dislikes.
    pub fn run(mut self, end: u64) -> World {
        self.scenario.catalog = Arc::new(self.catalog);
        let mut world = World::new(self.scenario);
        world.journal = Some(Vec::new());
        world.trace = Some(Vec::new());
        world.run_until(end);
        if let Some(failure) = &world.checker.failure {
            let lines = world.trace.take().unwrap_or_default();
            let last = lines.len().saturating_sub(60);
            panic!("{}\nat {} ms: {failure}", lines[last..].join("\n"), world.now);
        }
        world
    }
}

impl World {
    pub fn actions(&self) -> impl Iterator<Item = (u64, &Action)> {
        let entries = self.journal.iter().flatten();
        entries.flat_map(|entry| entry.actions.iter().map(|action| (entry.at, action)))
    }

    pub fn starts(&self, name: &str) -> Vec<u64> {
        let start = |(at, action): (u64, &Action)| match action {
            Action::StartInstance { model, .. } if model.as_str() == name => Some(at),
            _ => None,
        };
        self.actions().filter_map(start).collect()
    }

    /// (arrived, first lease or end, outcome) of each request for a model.
    pub fn requests(&self, name: &str) -> Vec<(u64, Option<u64>, Option<Outcome>)> {
        self.clients
            .iter()
            .filter(|client| client.plan.model.as_str() == name)
            .map(|client| (client.arrived, client.first_lease, client.outcome.clone()))
            .collect()
    }

    pub fn served(&self, name: &str) -> usize {
        let served =
            |(_, _, outcome): &(u64, _, Option<Outcome>)| *outcome == Some(Outcome::Served);
        self.requests(name).iter().filter(|request| served(request)).count()
    }

    /// Milliseconds that each request for a model waited for its lease.
    pub fn waits(&self, name: &str) -> Vec<u64> {
        let waited = |(arrived, lease, _): (u64, Option<u64>, _)| lease.map(|at| at - arrived);
        self.requests(name).into_iter().filter_map(waited).collect()
    }

    pub fn refusals(&self, name: &str) -> Vec<Refusal> {
        let refusal = |(_, _, outcome)| match outcome {
            Some(Outcome::Refused(refusal)) => Some(refusal),
            _ => None,
        };
        self.requests(name).into_iter().filter_map(refusal).collect()
    }

    pub fn answers(&self) -> Vec<(u64, Answer)> {
        let answer = |(at, action): (u64, &Action)| match action {
            Action::Answer { answer, .. } => Some((at, answer.clone())),
            _ => None,
        };
        self.actions().filter_map(answer).collect()
    }
}

#[test]
fn an_agent_that_alternates_two_models_is_served_each_time() {
    let world = Trap::on(&[24])
        .model("planner", 16)
        .model("coder", 18)
        .again_and_again(0, &["planner", "coder"], 500, 200)
        .run(120_000);
    let (planner, coder) = (world.served("planner"), world.served("coder"));
    assert!(planner >= 18 && coder >= 18, "{planner} and {coder} turns in two minutes");
    assert!(world.starts("planner").len() <= planner + 1, "one start a turn at most");
}

#[test]
fn eight_clients_of_one_model_cannot_starve_another() {
    let mut trap = Trap::on(&[24]).model("a", 16).model("b", 18).ask(30_000, "b", 1000);
    for client in 0..8 {
        trap = trap.again_and_again(client * 250, &["a"], 2000, 0);
    }
    let world = trap.run(120_000);
    let waits = world.waits("b");
    // max_wait 10 s, drain (2 s of service), stop, release, start.
    assert!(waits.len() == 1 && waits[0] <= 10_000 + 2000 + 3500, "b waited {waits:?} ms");
    let last = world.requests("a").iter().filter_map(|request| request.1).max();
    assert!(last > Some(60_000), "a came back after b: {last:?}");
}

#[test]
fn memory_that_never_comes_back_is_refused_by_name_and_blocks_nobody_else() {
    let world = Trap::on(&[24, 24])
        .model_with("a", 16, |spec, truth| {
            spec.gpus = GpuRequest::Explicit(vec!["0".to_owned()]);
            truth.never_frees = true;
        })
        .model_with("b", 18, |spec, _| spec.gpus = GpuRequest::Explicit(vec!["0".to_owned()]))
        .model_with("c", 18, |spec, _| spec.gpus = GpuRequest::Explicit(vec!["1".to_owned()]))
        .ask(0, "a", 1000)
        .ask(10_000, "b", 1000)
        .ask(15_000, "c", 1000)
        .ask(60_000, "c", 1000)
        .run(120_000);
    assert_eq!(world.starts("b"), [] as [u64; 0], "b must not start into unproven memory");
    let refusals = world.refusals("b");
    let [Refusal::VramNeverFreed { fault, .. }] = &refusals[..] else {
        panic!("b: {refusals:?}");
    };
    assert!(fault.message.contains("held by pid"), "{}", fault.message);
    assert_eq!(world.served("c"), 2);
}

#[test]
fn a_broken_model_does_not_evict_a_good_one_for_every_request() {
    let mut trap = Trap::on(&[24])
        .model("good", 16)
        .model_with("broken", 18, |_, truth| truth.broken = true)
        .again_and_again(0, &["good"], 300, 2000);
    for n in 1..60 {
        trap = trap.ask(n * 10_000, "broken", 100);
    }
    let world = trap.run(620_000);
    let (starts, evictions) = (world.starts("broken"), world.starts("good").len());
    assert!(!starts.is_empty() && starts.len() <= 8, "broken started at {starts:?}");
    assert!(evictions <= starts.len() + 1, "good was brought back {evictions} times");
    assert!(world.served("good") >= 180, "good served {}", world.served("good"));
    // Its own drain and stop, a start that fails, and its way back.
    let longest = world.waits("good").into_iter().max();
    assert!(longest <= Some(5000), "good waited {longest:?} ms");
    let refused = world.refusals("broken").len();
    assert_eq!(refused, 59, "every request for the broken model ends at once or with its start");
}

#[test]
fn two_hundred_queued_at_concurrency_one_leave_room_for_another_model() {
    let mut trap = Trap::on(&[24])
        .model_with("a", 16, |spec, _| spec.concurrency = Some(1))
        .model("b", 18)
        .ask(5000, "b", 500);
    for n in 0..200 {
        trap = trap.ask(n, "a", 1000);
    }
    let world = trap.run(400_000);
    let waits = world.waits("b");
    // max_wait 10 s and drain_timeout 20 s, then the move.
    assert!(waits.len() == 1 && waits[0] <= 10_000 + 20_000 + 3500, "b waited {waits:?} ms");
    assert_eq!(world.served("a"), 200, "those left over lead the next tenure");
}

#[test]
fn what_does_not_fit_beside_a_pinned_model_is_refused_at_once() {
    let world = Trap::on(&[24])
        .model_with("speech", 12, |spec, _| spec.pinned = true)
        .model("big", 16)
        .model("small", 8)
        .ask(0, "speech", 1000)
        .ask(5000, "big", 1000)
        .ask(5000, "small", 1000)
        .ask(30_000, "speech", 1000)
        .run(700_000);
    assert_eq!(world.starts("speech").len(), 1, "a pinned model never leaves");
    assert!(matches!(world.refusals("big")[..], [Refusal::CannotFit { .. }]));
    assert_eq!((world.served("speech"), world.served("small")), (2, 1));
}

#[test]
fn pinned_models_that_do_not_fit_together_leave_nobody_waiting() {
    let pinned = |spec: &mut ModelSpec, _: &mut Truth| spec.pinned = true;
    let world = Trap::on(&[24])
        .model_with("one", 12, pinned)
        .model_with("two", 20, pinned)
        .ask(0, "one", 1000)
        .ask(10_000, "two", 1000)
        .run(20_000);
    assert!(matches!(world.refusals("two")[..], [Refusal::CannotFit { .. }]));
    assert!(world.waiting.is_empty());
}

#[test]
fn a_model_that_never_fits_is_refused_at_once_and_disturbs_nothing() {
    let world = Trap::on(&[24])
        .model("a", 16)
        .model("huge", 80)
        .ask(0, "a", 1000)
        .ask(3000, "huge", 1000)
        .ask(9000, "a", 1000)
        .run(20_000);
    assert!(matches!(world.refusals("huge")[..], [Refusal::CannotFit { gpus: 1, .. }]));
    assert_eq!((world.starts("a").len(), world.served("a")), (1, 2));
}

#[test]
fn two_vllm_starts_on_one_gpu_follow_each_other() {
    let vllm = |spec: &mut ModelSpec, truth: &mut Truth| {
        spec.engine = EngineKind::Vllm;
        truth.start_ms = (10_000, 10_000);
    };
    let world = Trap::on(&[24])
        .model_with("a", 10, vllm)
        .model_with("b", 10, vllm)
        .ask(0, "a", 1000)
        .ask(10, "b", 1000)
        .run(60_000);
    let apart = world.starts("b")[0] - world.starts("a")[0];
    assert!((9000..12_000).contains(&apart), "{apart} ms apart");
    assert_eq!((world.served("a"), world.served("b")), (1, 1));
    assert!(world.waits("b")[0] <= 2 * 10_000 + 1500, "b waited {:?}", world.waits("b"));
}

#[test]
fn starts_that_fit_run_side_by_side() {
    let slow = |_: &mut ModelSpec, truth: &mut Truth| truth.start_ms = (10_000, 10_000);
    let world = Trap::on(&[24])
        .model_with("a", 10, slow)
        .model_with("b", 10, slow)
        .ask(0, "a", 1000)
        .ask(10, "b", 1000)
        .run(60_000);
    let apart = world.starts("b")[0] - world.starts("a")[0];
    assert!(apart < 2000, "{apart} ms apart");
}

#[test]
fn clients_that_leave_the_queue_leave_nothing_behind() {
    let mut trap = Trap::on(&[24])
        .model("a", 16)
        .model_with("b", 18, |_, truth| truth.start_ms = (20_000, 20_000))
        .ask(0, "a", 1000);
    for n in 0..40 {
        let mut plan = Plan::new(&ModelName::new("b"), 1000);
        plan.leaves_queue_after = Some(1000 + n * 50);
        trap = trap.at(8000 + n, Step::Arrive(plan));
    }
    let mut world = trap.ask(60_000, "a", 1000).ask(90_000, "b", 500).run(200_000);
    assert_eq!(world.served("a"), 2);
    assert_eq!(world.served("b"), 1, "only the one who stayed");
    assert!(world.waiting.is_empty() && world.leases.is_empty());
    let view = world.scheduler.view(wharf::units::Time(world.now));
    world.checker.at_rest(world.now, &view);
    assert_eq!(world.checker.failure, None);
}

#[test]
fn a_swap_on_one_gpu_delays_no_request_to_a_ready_model_on_another() {
    let on = |index: &str| {
        let names = vec![index.to_owned()];
        move |spec: &mut ModelSpec, _: &mut Truth| spec.gpus = GpuRequest::Explicit(names)
    };
    let world = Trap::on(&[24, 24])
        .model_with("steady", 16, on("0"))
        .model_with("x", 16, on("1"))
        .model_with("y", 18, on("1"))
        .ask(0, "steady", 100)
        .again_and_again(5000, &["x", "y"], 300, 10)
        .again_and_again(6000, &["steady"], 100, 37)
        .run(60_000);
    let waits = world.waits("steady");
    let worst = waits[1..].iter().max();
    assert!(waits.len() > 200 && worst < Some(&20), "the ready model waited {worst:?} ms");
    assert!(world.starts("y").len() > 5);
}

#[test]
fn probes_that_must_not_start_swap_nothing() {
    let mut trap = Trap::on(&[24]).ask(0, "m0", 1000);
    for n in 0..25 {
        trap = trap.model(&format!("m{n}"), 16);
        for sweep in 1..20 {
            let mut plan = Plan::new(&ModelName::new(format!("m{n}")), 50);
            plan.never_start = true;
            trap = trap.at(sweep * 10_000 + n, Step::Arrive(plan));
        }
    }
    let world = trap.run(220_000);
    let starts: usize = (0..25).map(|n| world.starts(&format!("m{n}")).len()).sum();
    assert_eq!(starts, 1, "only the one that was asked for");
    assert_eq!(world.served("m0"), 20);
    assert!(world.refusals("m7").iter().all(|refusal| *refusal == Refusal::NotLoaded));
}

#[test]
fn a_start_waits_for_memory_that_comes_late() {
    let world = Trap::on(&[24])
        .model_with("a", 16, |_, truth| truth.release_ms = (2000, 2000))
        .model("b", 18)
        .ask(0, "a", 100)
        .ask(10_000, "b", 100)
        .run(60_000);
    let stopped = world
        .actions()
        .find_map(|(at, action)| matches!(action, Action::StopInstance { .. }).then_some(at));
    let waited = world.starts("b")[0] - stopped.expect("a was stopped");
    assert!((2100..2500).contains(&waited), "started {waited} ms after the stop");
}

#[test]
fn an_ensure_that_times_out_leaves_the_swap_going() {
    let world = Trap::on(&[24])
        .model_with("slow", 16, |_, truth| truth.start_ms = (30_000, 30_000))
        .ensure(0, "slow", 5000)
        .ensure(6000, "slow", 60_000)
        .run(60_000);
    let answers = world.answers();
    assert!(matches!(answers[0], (5000, Answer::TimedOut { swap: Some(_) })), "{answers:?}");
    assert!(matches!(answers[1].1, Answer::Ready { swapped: true, .. }), "{answers:?}");
    assert_eq!(world.starts("slow").len(), 1);
}

#[test]
fn no_proof_means_no_start_and_ends_by_itself() {
    let world = Trap::on(&[24])
        .model("a", 16)
        .model("b", 18)
        .ask(0, "a", 1000)
        .at(5000, Step::NoProof { for_ms: 60_000 })
        .ask(8000, "b", 1000)
        .ask(20_000, "a", 1000)
        .ask(90_000, "b", 1000)
        .run(200_000);
    assert!(world.starts("b").iter().all(|at| *at > 65_000), "{:?}", world.starts("b"));
    let last = world.requests("b").last().cloned();
    assert_eq!(last.and_then(|request| request.2), Some(Outcome::Served));
    assert_eq!(world.served("a"), 2, "what is ready goes on serving");
}

#[test]
fn single_active_runs_one_model_at_a_time() {
    let mut trap = Trap::on(&[48]).model("a", 4).model("b", 4).model("c", 4);
    trap.catalog.settings.swap.mode = SwapMode::SingleActive;
    let world = trap.ask(0, "a", 1000).ask(100, "b", 1000).ask(200, "c", 1000).run(120_000);
    let served: usize = ["a", "b", "c"].iter().map(|name| world.served(name)).sum();
    assert_eq!(served, 3);
}

#[test]
fn an_idle_model_leaves_after_its_ttl_and_not_before() {
    let world = Trap::on(&[24])
        .model_with("a", 16, |spec, _| spec.ttl = Some(Duration::from_secs(30)))
        .ask(0, "a", 1000)
        .ask(25_000, "a", 1000)
        .run(120_000);
    let stops: Vec<u64> = world
        .actions()
        .filter(|(_, action)| matches!(action, Action::StopInstance { .. }))
        .map(|(at, _)| at)
        .collect();
    assert_eq!(stops.len(), 1, "{stops:?}");
    assert!((55_900..57_000).contains(&stops[0]), "26 s and 30 s: {stops:?}");
}
