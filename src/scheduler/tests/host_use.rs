//! Host RAM is learned like a footprint: what cannot give way counts at once, a smaller peak once
//! it has served.

use std::time::Duration;

use super::config::*;
use super::world::*;
use crate::config::catalog::{Catalog, EngineKind, ModelSpec};
use crate::scheduler::event::{Event, HostUse, Learned};
use crate::units::*;

fn with_ram(name: &str, ram: u64) -> ModelSpec {
    ModelSpec { ram: Some(Bytes::gib(ram)), ..spec(name, 4) }
}

fn host(total: u64, models: Vec<ModelSpec>) -> Catalog {
    let mut catalog = catalog(models);
    catalog.settings.ram.total = Some(Bytes::gib(total));
    catalog
}

fn used(held: u64, resident: u64) -> HostUse {
    HostUse { held: Bytes::gib(held), resident: Bytes::gib(resident) }
}

fn a_little_more(gib: u64) -> Bytes {
    Bytes(Bytes::gib(gib).0 + Bytes::gib(gib).0 / 100 * 5)
}

fn promised(sim: &Sim) -> Bytes {
    sim.scheduler.view(sim.now).ram.promised
}

fn serve(sim: &mut Sim, model: &str, requests: u32) {
    for _ in 0..requests {
        let request = sim.request(model);
        sim.run_secs(8);
        assert_eq!(sim.served_by(request), Some(model), "{}", sim.model(model).waiting_for);
        sim.end(request);
    }
}

#[test]
fn a_smaller_peak_replaces_what_is_declared_once_it_has_served() {
    let mut sim = Sim::new(host(34, vec![with_ram("a", 24), with_ram("b", 16)]), &[80]);
    sim.host_use.insert("a".into(), used(2, 10));
    serve(&mut sim, "a", 9);
    assert_eq!(promised(&sim), Bytes::gib(24));
    serve(&mut sim, "a", 1);
    sim.run_secs(1);
    assert_eq!(promised(&sim), a_little_more(10), "mapped files count, too");
    serve(&mut sim, "b", 1);
    assert_eq!((sim.state("a"), sim.state("b")), ("ready", "ready"));
    // And for its next start.
    sim.unload("a", false);
    sim.run_secs(5);
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim), Bytes::gib(16) + a_little_more(10));
}

#[test]
fn what_cannot_give_way_counts_at_once_declared_or_not() {
    let mut sim =
        Sim::new(host(34, vec![with_ram("a", 4), spec("b", 4), with_ram("c", 16)]), &[80]);
    sim.host_use.insert("a".into(), used(8, 30));
    sim.host_use.insert("b".into(), used(6, 30));
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim), a_little_more(8), "files give way to whoever needs the room");
    serve(&mut sim, "b", 1);
    assert_eq!(promised(&sim), a_little_more(8) + a_little_more(6));
    serve(&mut sim, "c", 1);
    assert_eq!(promised(&sim), a_little_more(8) + a_little_more(6) + Bytes::gib(16));
}

#[test]
fn a_model_that_was_learned_to_take_much_makes_others_leave() {
    let mut sim = Sim::new(host(34, vec![spec("a", 4), spec("b", 4)]), &[80]);
    for (model, held) in [("a", 20), ("b", 20)] {
        let learned = Learned { ram_held: Some(Bytes::gib(held)), ..Learned::default() };
        sim.send(Event::Remembered { model: model.into(), learned });
    }
    serve(&mut sim, "a", 1);
    serve(&mut sim, "b", 1);
    assert_eq!((sim.state("a"), sim.state("b")), ("stopped", "ready"));
}

#[test]
fn what_was_learned_keeps_no_model_out_of_an_empty_machine() {
    let mut sim = Sim::new(host(16, vec![spec("a", 4)]), &[80]);
    sim.host_use.insert("a".into(), used(20, 20));
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim), Bytes::gib(14), "all that may be promised");
    sim.unload("a", false);
    sim.run_secs(5);
    serve(&mut sim, "a", 1);
}

#[test]
fn a_sleepers_weights_are_not_counted_twice() {
    let sleeper = ModelSpec { engine: EngineKind::Vllm, sleep: Some(1), ..with_ram("a", 4) };
    let sleeper = ModelSpec { vram: spec("", 20).vram, ..sleeper };
    let mut sim = Sim::new(host(64, vec![sleeper, spec("b", 20)]), &[24]);
    sim.host_use.insert("a".into(), used(3, 3));
    serve(&mut sim, "a", 1);
    serve(&mut sim, "b", 1);
    assert_eq!(sim.state("a"), "sleeping");
    let asleep = promised(&sim);
    sim.host_use.insert("a".into(), used(23, 23));
    sim.run_secs(10);
    assert_eq!(promised(&sim), asleep, "3 GiB of its own, 20 of weights, promised as such");
    sim.run_for(Duration::from_secs(1));
    serve(&mut sim, "a", 1);
    assert_eq!(promised(&sim), Bytes::gib(4), "b cannot sleep and holds none");
}
