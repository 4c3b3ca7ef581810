//! What happens when things go wrong: each failure has its own cause, and others are served.

use std::sync::Arc;
use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::*;
use crate::scheduler::action::{Action, Answer, Refusal};
use crate::scheduler::event::{EnsureKind, Event, FaultKind, Holder};
use crate::scheduler::memory::name_holders;
use crate::scheduler::record::{SwapCause, SwapKind, SwapOutcome};
use crate::units::*;

fn fail_start(sim: &mut Sim, model: &str, kinds: &[FaultKind]) {
    sim.faults.start.insert(model.into(), kinds.iter().copied().collect());
}

#[test]
fn a_failed_start_refuses_with_its_cause_and_backs_off() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    fail_start(&mut sim, "a", &[FaultKind::OutOfMemory; 2]);
    let request = sim.request("a");
    sim.run_secs(5);
    let Some(Refusal::StartFailed { fault, retry_at, .. }) = sim.refused.get(&request).cloned()
    else {
        panic!("{:?}", sim.refused.get(&request));
    };
    assert_eq!(fault.kind, FaultKind::OutOfMemory);
    assert!(retry_at >= sim.now);
    assert_eq!(sim.state("a"), "failed");
    let later = sim.request("a");
    assert!(matches!(sim.refused.get(&later), Some(Refusal::StartFailed { .. })));
    assert_eq!(sim.starts("a"), 1, "not started for every request");
    sim.run_secs(10);
    sim.request("a");
    sim.run_secs(5);
    let third = sim.request("a");
    let Some(Refusal::StartFailed { retry_at: second, .. }) = sim.refused.get(&third) else {
        panic!("the second failure");
    };
    assert!(second.since(sim.now) > Duration::from_secs(15), "doubled");
    sim.run_secs(21);
    let served = sim.request("a");
    sim.run_secs(5);
    assert_eq!(sim.served_by(served), Some("a"));
}

#[test]
fn a_taken_port_is_tried_once_more_within_the_swap() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    fail_start(&mut sim, "a", &[FaultKind::PortTaken]);
    let request = sim.request("a");
    sim.run_secs(12);
    assert_eq!(sim.served_by(request), Some("a"));
    assert_eq!(sim.starts("a"), 2);
}

#[test]
fn a_preflight_that_fails_disturbs_nobody() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.end(first);
    sim.faults.preflight.insert("b".into(), [FaultKind::CommandMissing].into());
    let request = sim.request("b");
    sim.run_secs(2);
    assert!(matches!(sim.refused.get(&request), Some(Refusal::StartFailed { .. })));
    assert_eq!(sim.state("a"), "ready");
    assert_eq!(sim.count(|a| matches!(a, Action::CloseGate { .. })), 0);
}

#[test]
fn memory_that_is_never_freed_names_its_holder_and_others_are_served() {
    let models = vec![spec("a", 14), spec("b", 20), spec("small", 4)];
    let mut sim = Sim::new(catalog(models), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.end(first);
    sim.faults.keeps_memory.insert("a".into());
    let request = sim.request("b");
    sim.run_secs(20);
    assert!(sim.model("b").waiting_for.contains("14.0 GiB still held by pid"));
    sim.run_secs(20);
    let Some(Refusal::VramNeverFreed { fault, .. }) = sim.refused.get(&request) else {
        panic!("{:?}", sim.refused.get(&request));
    };
    assert!(fault.message.contains("14336 MiB on GPU 0 held by pid"), "{}", fault.message);
    assert_eq!(sim.starts("b"), 0);
    let small = sim.request("small");
    sim.run_secs(5);
    assert_eq!(sim.served_by(small), Some("small"), "what fits is served");
    sim.heal();
    sim.run_secs(400);
    sim.end(small);
    let again = sim.request("b");
    sim.run_secs(15);
    assert_eq!(sim.served_by(again), Some("b"), "a late proof counts");
}

#[test]
fn bytes_that_a_start_is_about_to_take_are_not_free() {
    let mut sim = Sim::new(catalog(vec![spec("a", 10), spec("b", 10)]), &[24]);
    sim.strangers.insert(GpuId(0), Bytes::gib(8));
    sim.run_secs(1);
    let first = sim.request("a");
    sim.run_for(Duration::from_millis(100));
    // It reads its files: nothing of it is on the GPU yet, where 16 GiB are free.
    let loading = sim.running.values_mut().next().expect("it starts");
    let bytes = std::mem::replace(&mut loading.bytes, Bytes::ZERO);
    sim.request("b");
    sim.run_secs(2);
    assert_eq!((sim.state("a"), sim.starts("b")), ("starting", 0));
    sim.running.values_mut().next().expect("it starts").bytes = bytes;
    sim.run_secs(3);
    assert_eq!(sim.served_by(first), Some("a"));
}

#[test]
fn a_victim_that_cannot_be_stopped_is_tried_again_later() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.end(first);
    sim.faults.stop.insert("a".into(), [FaultKind::StopFailed].into());
    let request = sim.request("b");
    sim.run_secs(2);
    let Some(Refusal::VramNeverFreed { fault, .. }) = sim.refused.get(&request) else {
        panic!("{:?}", sim.refused.get(&request));
    };
    assert!(fault.message.contains("a could not be stopped"), "{}", fault.message);
    sim.run_secs(100);
    let again = sim.request("b");
    sim.run_secs(10);
    assert_eq!(sim.served_by(again), Some("b"));
}

#[test]
fn a_stranger_on_the_gpu_is_named() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 8)]), &[24]);
    sim.strangers.insert(GpuId(0), Bytes::gib(10));
    sim.sample();
    let request = sim.request("a");
    sim.run_secs(35);
    let Some(Refusal::VramNeverFreed { fault, .. }) = sim.refused.get(&request) else {
        panic!("{:?}", sim.refused.get(&request));
    };
    assert!(fault.message.contains("pid 4711 (blender)"), "{}", fault.message);
    let fits = sim.request("b");
    sim.run_secs(5);
    assert_eq!(sim.served_by(fits), Some("b"));
}

#[test]
fn nothing_starts_while_the_gpus_cannot_be_read() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    sim.faults.no_proof = true;
    sim.run_secs(1);
    let request = sim.request("a");
    sim.run_secs(60);
    assert_eq!(sim.starts("a"), 0);
    assert!(sim.refused.is_empty());
    assert!(sim.scheduler.view(sim.now).no_proof.is_some());
    assert!(sim.model("a").waiting_for.contains("NVML: Unknown Error"));
    sim.faults.no_proof = false;
    sim.run_secs(6);
    assert_eq!(sim.served_by(request), Some("a"));
}

#[test]
fn a_dead_engine_is_started_again_for_those_who_wait_and_backs_off_if_it_dies_again() {
    let mut one = spec("a", 20);
    one.concurrency = Some(1);
    let mut sim = Sim::new(catalog(vec![one]), &[24]);
    sim.request("a");
    sim.run_secs(5);
    let waiting = sim.request("a");
    sim.kill("a");
    sim.run_secs(8);
    assert_eq!(sim.served_by(waiting), Some("a"));
    let row = sim.ledger().into_iter().find(|r| r.cause == SwapCause::Died).expect("a row");
    let Some(SwapOutcome::Died(fault)) = &row.outcome else { panic!("{:?}", row.outcome) };
    assert_eq!((row.kind, row.evicted.len()), (SwapKind::Unload, 0), "nobody evicted it");
    assert_eq!((fault.kind, fault.message.as_str()), (FaultKind::Exited, "exited with code 1"));
    let unlucky = sim.request("a");
    sim.kill("a");
    sim.run_secs(1);
    assert!(matches!(sim.refused.get(&unlucky), Some(Refusal::StartFailed { .. })));
}

#[test]
fn a_lost_runtime_keeps_its_promise_and_comes_back() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20), spec("b", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.end(first);
    let instances: Vec<InstanceId> = sim.running.keys().copied().collect();
    let why = "Docker is away".to_owned();
    sim.send(Event::RuntimeLost { instances: instances.clone(), why });
    assert_eq!(sim.state("a"), "lost");
    let request = sim.request("b");
    sim.run_secs(60);
    assert_eq!(sim.starts("b"), 0, "its bytes stay promised");
    sim.send(Event::RuntimeBack { alive: instances, dead: Vec::new() });
    sim.run_secs(8);
    assert_eq!(sim.served_by(request), Some("b"));
}

#[test]
fn a_lost_runtime_is_waited_for_briefly_then_named() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.end(first);
    let instances: Vec<InstanceId> = sim.running.keys().copied().collect();
    let lose = |sim: &mut Sim| {
        let why = "Docker is away".to_owned();
        sim.send(Event::RuntimeLost { instances: instances.clone(), why });
    };
    let back = || Event::RuntimeBack { alive: instances.clone(), dead: Vec::new() };
    lose(&mut sim);
    // A restart of Docker takes seconds: nobody hears of it.
    let patient = sim.request("a");
    sim.run_secs(9);
    assert!(sim.model("a").waiting_for.contains("Docker is away"));
    sim.send(back());
    assert_eq!(sim.served_by(patient), Some("a"));
    sim.end(patient);
    lose(&mut sim);
    sim.run_secs(4);
    let late = sim.request("a");
    let ask = sim.ensure("a", EnsureKind::Ensure, Duration::from_secs(600));
    sim.run_secs(7);
    let lost = Refusal::RuntimeLost { message: "Docker is away".to_owned() };
    assert_eq!(sim.refused.get(&late), Some(&lost));
    assert_eq!(sim.answers.get(&ask), Some(&Answer::Refused(lost.clone())));
    // By now it is known: nobody waits ten more seconds for it.
    let later = sim.request("a");
    assert_eq!(sim.refused.get(&later), Some(&lost));
    assert_eq!(sim.state("a"), "lost");
    let promised = sim.scheduler.view(sim.now).gpus[0].promised;
    assert_eq!(promised, Bytes::gib(20), "its bytes stay promised");
    sim.send(back());
    let again = sim.request("a");
    sim.run_secs(1);
    assert_eq!(sim.served_by(again), Some("a"));
}

#[test]
fn a_start_that_went_down_with_its_runtime_is_tried_once_more() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let request = sim.request("a");
    for round in 1..=2 {
        sim.run_secs(3);
        assert_eq!((sim.state("a"), sim.starts("a")), ("starting", round));
        let dead: Vec<InstanceId> = sim.running.keys().copied().collect();
        sim.send(Event::RuntimeLost { instances: dead.clone(), why: "Docker is away".into() });
        sim.send(Event::RuntimeBack { alive: Vec::new(), dead });
    }
    let Some(Refusal::StartFailed { fault, .. }) = sim.refused.get(&request) else {
        panic!("{:?}", sim.refused.get(&request));
    };
    assert_eq!(fault.kind, FaultKind::RuntimeUnreachable, "{}", fault.message);
}

#[test]
fn an_entry_that_can_never_fit_is_refused_though_an_older_instance_of_it_is_lost() {
    let mut sim = Sim::new(catalog(vec![spec("a", 20)]), &[24]);
    let first = sim.request("a");
    sim.run_secs(5);
    sim.end(first);
    let instances: Vec<InstanceId> = sim.running.keys().copied().collect();
    sim.send(Event::RuntimeLost { instances, why: "Docker is away".into() });
    let mut anew = spec("a", 100);
    anew.upstream_name = Some("another engine".to_owned());
    sim.send(Event::CatalogChanged(Arc::new(catalog(vec![anew]))));
    let request = sim.request("a");
    assert!(matches!(sim.refused.get(&request), Some(Refusal::CannotFit { .. })));
}

#[test]
fn nobody_waits_for_a_place_that_pinned_models_hold() {
    let mut pinned = spec("pinned", 4);
    pinned.pinned = true;
    let mut config = catalog(vec![pinned, spec("b", 4)]);
    config.settings.swap.max_concurrent_models = 1;
    let mut sim = Sim::new(config, &[24]);
    let waits = sim.ensure("pinned", EnsureKind::Load, Duration::from_secs(30));
    let early = sim.request("b");
    sim.run_secs(10);
    assert!(sim.answers.contains_key(&waits));
    assert!(matches!(sim.refused.get(&early), Some(Refusal::CannotFit { .. })));
    let late = sim.request("b");
    assert!(matches!(sim.refused.get(&late), Some(Refusal::CannotFit { .. })));
}

#[test]
fn bytes_taken_beyond_the_promise_are_counted_on_when_their_holder_leaves() {
    let mut greedy = spec("greedy", 0);
    greedy.vram = Vram::Unknown;
    let mut sim = Sim::new(catalog(vec![greedy, spec("b", 20)]), &[24]);
    for _ in 0..2 {
        let request = sim.request("greedy");
        sim.run_secs(8);
        sim.end(request);
        sim.unload("greedy", false);
        sim.run_secs(3);
    }
    let request = sim.request("greedy");
    sim.run_secs(8);
    sim.end(request);
    for running in sim.running.values_mut() {
        running.bytes = Bytes::gib(15);
    }
    sim.run_secs(2);
    let request = sim.request("b");
    sim.run_secs(15);
    assert_eq!(sim.served_by(request), Some("b"));
}

#[test]
fn without_any_reading_one_gpu_model_runs_at_a_time() {
    let mut cpu = spec("cpu", 0);
    cpu.gpus = GpuRequest::None;
    let config = catalog(vec![spec("a", 1), spec("b", 1), cpu]);
    let mut sim = Sim::in_world(config, &[], false);
    for model in ["a", "b", "cpu"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
    assert_eq!((sim.state("a"), sim.state("b"), sim.state("cpu")), ("stopped", "ready", "ready"));
}

#[test]
fn an_unknown_footprint_is_alone_once_then_packed() {
    let mut unknown = spec("unknown", 0);
    unknown.vram = Vram::Unknown;
    let mut sim = Sim::new(catalog(vec![unknown, spec("b", 10)]), &[24]);
    for model in ["unknown", "b"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
    assert_eq!(sim.state("unknown"), "stopped", "alone, so it had to leave");
    sim.request("unknown");
    sim.run_secs(10);
    assert_eq!((sim.state("unknown"), sim.state("b")), ("ready", "ready"), "packed");
    let footprint = sim.model("unknown").footprint.expect("learned");
    assert!(footprint > Bytes::gib(6) && footprint < Bytes::gib(7), "{footprint}");
}

#[test]
fn nothing_moves_beside_a_vllm_that_measures_its_memory() {
    let mut vllm = spec("vllm", 10);
    vllm.engine = EngineKind::Vllm;
    let mut sim = Sim::new(catalog(vec![vllm, spec("b", 8)]), &[24]);
    let first = sim.request("vllm");
    sim.run_secs(1);
    let second = sim.request("b");
    sim.run_secs(2);
    assert_eq!(sim.starts("b"), 0);
    assert!(sim.model("b").waiting_for.contains("vllm measures its memory"));
    sim.run_secs(8);
    assert_eq!((sim.served_by(first), sim.served_by(second)), (Some("vllm"), Some("b")));
}

#[test]
fn a_sleeper_wakes_on_its_gpu() {
    let mut sleeper = spec("a", 20);
    (sleeper.engine, sleeper.sleep) = (EngineKind::Vllm, Some(1));
    let mut sim = Sim::new(catalog(vec![sleeper, spec("b", 18)]), &[24]);
    for model in ["a", "b", "a"] {
        let request = sim.request(model);
        sim.run_secs(10);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
    assert_eq!(sim.starts("a"), 1);
    assert_eq!(sim.count(|a| matches!(a, Action::Wake { .. })), 1);
}

#[test]
fn every_holder_of_memory_is_named_up_to_three() {
    let mut sim = Sim::new(catalog(vec![spec("a", 7), spec("b", 8), spec("c", 20)]), &[24]);
    for model in ["a", "b"] {
        let first = sim.request(model);
        sim.run_secs(5);
        sim.end(first);
        sim.faults.keeps_memory.insert(model.into());
    }
    sim.request("c");
    sim.run_secs(20);
    let why = sim.model("c").waiting_for;
    let named = ["8.0 GiB still held by pid 1002 (engine i2)", "7.0 GiB by pid 1001 (engine i1)"];
    assert!(why.starts_with(&named.join(", ")), "{why}");
    let four: Vec<Holder> = (1..=4)
        .map(|pid| Holder { pid, bytes: Bytes::gib(1), label: "x".to_owned(), instance: None })
        .collect();
    let holders: Vec<(GpuId, &Holder)> = four.iter().map(|h| (GpuId(0), h)).collect();
    let text = name_holders(&holders, "held", |(_, h)| h.bytes.to_string()).expect("some");
    assert!(text.ends_with("1.0 GiB by pid 3 (x) and 1 more"), "{text}");
}
