//! Scripted traps on several GPUs, and of what nobody asked for: see `traps`.

use std::time::Duration;

use wharf::config::catalog::{GpuRequest, ModelSpec};
use wharf::scheduler::action::Action;

use crate::scenario::Truth;
use crate::traps::Trap;
use crate::world::World;

/// `max_wait`, a drain (2 s of service), and the moves: stop, release, start.
const TURN_MS: u64 = 10_000 + 2000 + 3500;

fn on(gpu: &str) -> impl Fn(&mut ModelSpec, &mut Truth) + use<> {
    let names = vec![gpu.to_owned()];
    move |spec, _| spec.gpus = GpuRequest::Explicit(names.clone())
}

/// One model bound to each of two GPUs, and one that needs them both.
fn two_and_both() -> Trap {
    Trap::on(&[24, 24]).model_with("left", 16, on("0")).model_with("right", 16, on("1")).model_with(
        "both",
        14,
        |spec, _| spec.gpus = GpuRequest::Count(2),
    )
}

#[test]
fn a_model_that_needs_both_gpus_is_not_starved_by_traffic_on_each() {
    let mut trap = two_and_both();
    for client in 0..4 {
        trap = trap.again_and_again(client * 250, &["left"], 2000, 0).again_and_again(
            client * 250 + 125,
            &["right"],
            2000,
            0,
        );
    }
    // Each time both GPUs have to come free together.
    let world = trap.ask(30_000, "both", 1000).ask(80_000, "both", 1000).run(140_000);
    let waits = world.waits("both");
    assert!(waits.len() == 2 && waits.iter().all(|&ms| ms <= TURN_MS), "both waited {waits:?} ms");
    for single in ["left", "right"] {
        let last = world.requests(single).iter().filter_map(|request| request.1).max();
        assert!(last > Some(120_000), "{single} came back: {last:?}");
        let longest = world.waits(single).into_iter().max();
        assert!(longest <= Some(TURN_MS), "{single} waited {longest:?} ms");
    }
}

#[test]
fn models_on_single_gpus_are_not_starved_by_one_that_needs_both() {
    let mut trap = two_and_both();
    for client in 0..6 {
        trap = trap.again_and_again(client * 300, &["both"], 2000, 0);
    }
    let trap = trap.ask(30_000, "left", 1000).ask(31_000, "right", 1000);
    let world = trap.ask(80_000, "right", 1000).run(140_000);
    for single in ["left", "right"] {
        let waits = world.waits(single);
        assert!(waits.iter().all(|&ms| ms <= TURN_MS), "{single} waited {waits:?} ms");
    }
    assert_eq!((world.served("left"), world.served("right")), (1, 2));
    let last = world.requests("both").iter().filter_map(|request| request.1).max();
    assert!(last > Some(120_000), "both came back: {last:?}");
}

/// When instances of a model were told to start, and when each request for another waited.
fn starts_while_waiting(world: &World, unasked: &str, asked: &str) -> Vec<u64> {
    let waited: Vec<(u64, u64)> = world
        .requests(asked)
        .into_iter()
        .filter_map(|(arrived, lease, _)| Some((arrived, lease?)))
        .collect();
    let starts = world.starts(unasked).into_iter();
    starts.filter(|at| waited.iter().any(|(from, to)| from < at && at < to)).collect()
}

#[test]
fn a_warm_up_model_comes_back_in_quiet_and_never_in_front_of_demand() {
    let start_ms = 4000;
    let slow = move |truth: &mut Truth| truth.start_ms = (start_ms, start_ms);
    let mut trap = Trap::on(&[24])
        .model_with("warm", 16, move |spec, truth| {
            spec.warmup = true;
            slow(truth);
        })
        .model_with("b", 18, move |spec, truth| {
            spec.ttl = Some(Duration::from_secs(5));
            slow(truth);
        });
    // `b` leaves after its ttl; `warm` is restored after a quiet of twice its move. `b` is asked
    // for at every moment of that.
    let rounds = 24;
    for n in 0..rounds {
        trap = trap.ask(20_000 + n * 40_000 + n * 1000, "b", 500);
    }
    let end = 20_000 + rounds * 41_000 + 60_000;
    let world = trap.run(end);
    assert_eq!(world.served("b"), rounds as usize);
    let early = starts_while_waiting(&world, "warm", "b");
    assert_eq!(early, [] as [u64; 0], "restored while somebody waited");
    // The end of a restore that has begun, its stop, the release, and the own start.
    let longest = world.waits("b").into_iter().max();
    assert!(longest <= Some(2 * start_ms + 1000), "b waited {longest:?} ms");
    let stops = world.actions().filter(|(_, a)| matches!(a, Action::StopInstance { .. })).count();
    let (warm, b) = (world.starts("warm").len(), world.starts("b").len());
    assert!(world.starts("warm").last() > world.starts("b").last(), "it came back in the end");
    // Each comes once for the other's leave: no restore that is thrown away again and again.
    assert!(warm <= b + 1 && stops == warm + b - 1, "{warm} and {b} starts, {stops} stops");
}
