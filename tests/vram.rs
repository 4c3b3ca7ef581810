//! Proof of memory end to end: the real nvml-wrapper path on a library that says what a file tells
//! it to, with real processes.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use support::{World, serve, standin};

struct FakeNvml {
    dir: tempfile::TempDir,
}

impl FakeNvml {
    /// `None` (and loudly so) without a C compiler.
    fn build() -> Option<FakeNvml> {
        let dir = tempfile::tempdir().expect("it works in a temporary folder");
        fs::create_dir(dir.path().join("ledger")).expect("it works in a temporary folder");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake_nvml.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(dir.path().join("libnvidia-ml.so.1"))
            .arg(source)
            .status();
        match built {
            Ok(status) => assert!(status.success(), "fake_nvml.c does not compile"),
            Err(error) => {
                support::skip(&format!("fake NVML: no C compiler ({error})"));
                return None;
            }
        }
        let fake = FakeNvml { dir };
        fake.say(2000, "");
        Some(fake)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `lag_ms`: how long memory stays taken after its process died; -1: for ever.
    fn say(&self, lag_ms: i64, more: &str) {
        let ledger = self.path("ledger");
        let text =
            format!("count 1\ngpu 0 total 24576\nledger {} {lag_ms}\n{more}", ledger.display());
        fs::write(self.path("new"), text).expect("it works in a temporary folder");
        fs::rename(self.path("new"), self.path("state")).expect("it works in a temporary folder");
    }

    async fn serve(&self, models: &str) -> World {
        let (library, state) = (self.path("libnvidia-ml.so.1"), self.path("state"));
        let (library, state) = (text(&library), text(&state));
        let env = [("WHARF_NVML_LIBRARY", library), ("FAKE_NVML_STATE", state)];
        let settings = "gpu: { provider: nvml, reserve: 256MiB }\n\
                        swap: { vram_timeout: 10s, min_residency: 100ms }";
        serve(settings, models, &env).await
    }

    /// A stand-in whose memory the library shows.
    fn model(&self, name: &str, vram: &str) -> String {
        let ledger = self.path("ledger");
        let indented = format!("      env: {{ WHARF_VRAM_LEDGER: {} }}\n", ledger.display());
        standin(name, vram, "--load 100ms") + &indented
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("it works in a temporary folder")
}

#[tokio::test]
async fn the_next_model_starts_only_after_the_memory_is_really_free() {
    let Some(nvml) = FakeNvml::build() else { return };
    let world = nvml.serve(&(nvml.model("ada", "14GiB") + &nvml.model("bob", "14GiB"))).await;
    let talk = &world.server.talk;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"), "{}", world.log());
    assert!(talk.chat("bob", false, &[]).await.unwrap().is_from("bob"), "{}", world.log());
    let swaps = world.swaps().await;
    let swap = swaps.iter().find(|swap| swap["model"] == "bob").unwrap();
    // A busy machine sees the exit late: part of the 2 s is over by then.
    let seconds = |phase: &str| swap["phases"][phase].as_f64().unwrap_or_default();
    let before_start: f64 = ["drain", "vacate", "prove"].into_iter().map(seconds).sum();
    println!(
        "memory released 2 s after the exit; prove took {:.3} s of {before_start:.3} s",
        seconds("prove")
    );
    assert!(before_start >= 1.8, "{swap:#}");
    world.stop().await;
}

#[tokio::test]
async fn memory_that_never_comes_back_is_refused_by_name_and_others_still_serve() {
    let Some(nvml) = FakeNvml::build() else { return };
    let models =
        nvml.model("ada", "14GiB") + &nvml.model("bob", "14GiB") + &nvml.model("cyd", "3GiB");
    let world = nvml.serve(&models).await;
    let talk = &world.server.talk;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"), "{}", world.log());
    // The engine will die, but something of it keeps the memory: here a process of ours.
    let holder = std::process::id();
    nvml.say(0, &format!("process 0 {holder} 14336\n"));
    let refused = talk.chat("bob", false, &[]).await.unwrap();
    println!("{}: {}", refused.status, refused.text);
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.text.contains(&holder.to_string()), "names the holder: {refused:?}");
    assert!(talk.chat("cyd", false, &[]).await.unwrap().is_from("cyd"), "{}", world.log());
    let swaps = world.swaps().await;
    let failed = swaps.iter().find(|swap| swap["model"] == "bob").unwrap();
    assert_eq!(failed["result"], "failed", "{failed:#}");
    assert!(failed["message"].as_str().unwrap().contains(&holder.to_string()), "{failed:#}");
    world.stop().await;
}

#[tokio::test]
async fn when_the_driver_cannot_be_read_nothing_starts_and_health_is_red_until_it_can() {
    let Some(nvml) = FakeNvml::build() else { return };
    let world = nvml.serve(&(nvml.model("ada", "8GiB") + &nvml.model("bob", "8GiB"))).await;
    let talk = &world.server.talk;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"), "{}", world.log());
    nvml.say(0, "fail 999\n");
    let status = world.until("no proof", |status| status["no_proof"].is_string()).await;
    println!("{}", status["no_proof"]);
    let (code, health) = talk.call(hyper::Method::GET, "/health", json!(null)).await.unwrap();
    assert_eq!(code, 503, "{health}");
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"), "what is ready serves on");
    let asked = {
        let talk = talk.clone();
        tokio::spawn(async move { talk.chat("bob", false, &[]).await })
    };
    world.until("bob waits", |status| status["queued"] == 1).await;
    assert_eq!(world.engine_pids().len(), 1, "nothing was started without proof");
    nvml.say(0, "");
    let answer = asked.await.unwrap().unwrap();
    assert!(answer.is_from("bob"), "{answer:?}\n{}", world.log());
    world.stop().await;
}

#[tokio::test]
async fn a_driver_lost_in_the_middle_of_a_swap_holds_it_up_and_no_longer() {
    let Some(nvml) = FakeNvml::build() else { return };
    nvml.say(-1, "");
    let world = nvml.serve(&(nvml.model("ada", "14GiB") + &nvml.model("bob", "14GiB"))).await;
    let talk = &world.server.talk;
    assert!(talk.chat("ada", false, &[]).await.unwrap().is_from("ada"), "{}", world.log());
    let asked = {
        let talk = talk.clone();
        tokio::spawn(async move { talk.chat("bob", false, &[]).await })
    };
    // Its memory stays, so the proof is under way until the driver goes.
    world.until("a proof", |status| status["swaps"][0]["phase"] == "prove").await;
    nvml.say(-1, "fail 15\n");
    world.until("no proof", |status| status["no_proof"].is_string()).await;
    // What would be the end of a proof ends nothing: nobody can say what is free.
    tokio::time::sleep(std::time::Duration::from_secs(11)).await;
    assert!(!asked.is_finished(), "neither refused nor started");
    assert!(world.engine_pids().is_empty(), "nothing was started without proof");
    nvml.say(0, "");
    let answer = asked.await.unwrap().unwrap();
    assert!(answer.is_from("bob"), "{answer:?}\n{}", world.log());
    world.stop().await;
}

#[tokio::test]
async fn an_engine_that_runs_on_the_cpu_is_not_vouched_for() {
    let Some(nvml) = FakeNvml::build() else { return };
    // Declares 8 GiB and takes none: its memory goes nowhere that the library looks.
    let world = nvml.serve(&standin("ada", "8GiB", "--load 50ms")).await;
    let refused = world.server.talk.chat("ada", false, &[]).await.unwrap();
    println!("{}: {}", refused.status, refused.text);
    assert_eq!(refused.status, 503);
    assert!(refused.text.contains("runs on the CPU"), "{refused:?}");
    world.stop().await;
}
