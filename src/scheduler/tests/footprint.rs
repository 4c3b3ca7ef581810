//! What a model takes is learned: more than declared counts at once, less once it has served.

use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::{EngineKind, ModelSpec, Vram};
use crate::scheduler::action::Action;
use crate::scheduler::event::{Event, Learned};
use crate::units::*;

fn vllm(name: &str, gib: u64) -> ModelSpec {
    ModelSpec { engine: EngineKind::Vllm, ..spec(name, gib) }
}

fn with_margin(gib: u64) -> Bytes {
    Bytes(Bytes::gib(gib).0 + Bytes::gib(gib).0 / 100 * 5)
}

/// A day on which `a` is declared with 20 GiB and takes `real`.
fn day(a: ModelSpec, real: u64) -> Sim {
    let mut sim = Sim::new(catalog(vec![a, spec("b", 12)]), &[24]);
    sim.real.insert("a".into(), Bytes::gib(real));
    sim
}

fn serve(sim: &mut Sim, model: &str, requests: u32) {
    for _ in 0..requests {
        let request = sim.request(model);
        sim.run_secs(6);
        assert_eq!(sim.served_by(request), Some(model));
        sim.end(request);
    }
}

fn promised(sim: &Sim, gpu: usize) -> Bytes {
    sim.scheduler.view(sim.now).gpus[gpu].promised
}

#[test]
fn a_smaller_peak_counts_once_it_has_served() {
    let mut sim = day(spec("a", 20), 8);
    serve(&mut sim, "a", 9);
    sim.run_secs(60);
    assert_eq!(promised(&sim, 0), Bytes::gib(20), "nine requests are not enough");
    serve(&mut sim, "a", 1);
    sim.run_secs(1);
    assert_eq!(promised(&sim, 0), with_margin(8));
    serve(&mut sim, "b", 1);
    assert_eq!((sim.state("a"), sim.state("b")), ("ready", "ready"), "they fit together now");
}

#[test]
fn a_minute_has_to_pass_too() {
    let mut sim = day(spec("a", 20), 8);
    let first = sim.request("a");
    sim.run_secs(6);
    sim.end(first);
    for _ in 0..20 {
        let request = sim.request("a");
        sim.end(request);
    }
    sim.run_secs(40);
    assert_eq!(promised(&sim, 0), Bytes::gib(20));
    sim.run_secs(30);
    assert_eq!(promised(&sim, 0), with_margin(8));
}

#[test]
fn what_was_learned_so_holds_for_the_next_start_and_after_a_restart() {
    let mut sim = day(spec("a", 20), 8);
    let learned = Learned {
        footprint: Some(Bytes::gib(8)),
        seasoned: true,
        start: Some(Duration::from_secs(4)),
        ..Learned::default()
    };
    sim.send(Event::Remembered { model: "a".into(), learned });
    serve(&mut sim, "b", 1);
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim, 0), Bytes::gib(12) + with_margin(8));
    assert_eq!(sim.state("b"), "ready");
}

#[test]
fn a_larger_peak_counts_at_once() {
    let mut sim = day(spec("a", 10), 14);
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim, 0), with_margin(14), "as soon as a sample shows it");
    serve(&mut sim, "b", 1);
    assert_eq!(sim.state("a"), "stopped", "10 and 12 GiB would have fitted");
    serve(&mut sim, "a", 1);
    assert_eq!(sim.state("b"), "stopped");
}

#[test]
fn for_vllm_the_declaration_is_a_command() {
    let mut sim = day(vllm("a", 20), 8);
    serve(&mut sim, "a", 12);
    sim.run_secs(70);
    assert_eq!(promised(&sim, 0), Bytes::gib(20), "it was told to take them");
    // More than it was told: promised, but never told.
    let mut sim = day(vllm("a", 10), 12);
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim, 0), with_margin(12));
    serve(&mut sim, "b", 1);
    serve(&mut sim, "a", 1);
    let mut told = Vec::new();
    for (_, action) in &sim.log {
        if let Action::StartInstance { model, footprint, .. } = action
            && model.as_str() == "a"
        {
            told.extend(*footprint);
        }
    }
    assert_eq!(told, [Bytes::gib(10), Bytes::gib(10)]);
}

#[test]
fn the_margin_keeps_no_model_from_where_it_ran() {
    let mut pinned = spec("pinned", 12);
    pinned.pinned = true;
    let mut sim = Sim::new(catalog(vec![pinned, spec("a", 8)]), &[24]);
    sim.real.insert("a".into(), Bytes::mib(11 * 1024 + 300));
    serve(&mut sim, "pinned", 1);
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim, 0), Bytes::gib(24) - Bytes::mib(512), "all that the pinned left");
    sim.unload("a", false);
    sim.run_secs(5);
    serve(&mut sim, "a", 1);
}

#[test]
fn a_gpu_smaller_than_a_learned_peak_is_no_place() {
    let both = |vram| vec![ModelSpec { vram, ..spec("a", 0) }, spec("b", 20)];
    for vram in [Vram::Declared(Bytes::gib(14)), Vram::Unknown] {
        let mut sim = Sim::new(catalog(both(vram)), &[24, 8]);
        sim.real.insert("a".into(), Bytes::gib(12));
        serve(&mut sim, "a", 10);
        sim.run_secs(70);
        // Only GPU 1 is free.
        sim.unload("a", false);
        sim.run_secs(5);
        serve(&mut sim, "b", 1);
        serve(&mut sim, "a", 1);
        assert_eq!(promised(&sim, 1), Bytes::ZERO, "12 GiB are more than 8 ({vram:?})");
    }
}

#[test]
fn nothing_is_learned_where_the_driver_lists_no_process() {
    let mut sim = day(spec("a", 20), 8);
    sim.hide_pids = true;
    for instance in 0..12 {
        let request = sim.request("a");
        sim.run_secs(6);
        sim.end(request);
        assert_eq!(sim.starts("a"), 1, "request {instance}");
    }
    sim.run_secs(70);
    assert_eq!(promised(&sim, 0), Bytes::gib(20));
}

#[test]
fn pinned_models_leave_what_they_do_not_take() {
    let mut pinned = spec("a", 20);
    pinned.pinned = true;
    let mut sim = day(pinned, 8);
    let refused = sim.request("b");
    assert!(sim.refused.contains_key(&refused), "20 of 23.5 GiB are a's as far as is known");
    serve(&mut sim, "a", 10);
    sim.run_secs(30);
    serve(&mut sim, "b", 1);
    let rest = ModelSpec { vram: Vram::Rest, ..spec("b", 0) };
    let mut reshaped = spec("a", 20);
    reshaped.pinned = true;
    let mut sim = Sim::new(catalog(vec![reshaped, rest]), &[24]);
    sim.real.insert("a".into(), Bytes::gib(22));
    serve(&mut sim, "a", 1);
    let rest = sim.request("b");
    sim.run_secs(6);
    assert_eq!(sim.served_by(rest), Some("b"));
    assert!(promised(&sim, 0) <= Bytes::gib(24) - Bytes::mib(512));
}
