//! How Wharf leaves: requests may end, unless somebody is in a hurry.

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{World, gpu, processes_with, serve, standin};

const PATIENCE: Duration = Duration::from_secs(40);

fn signal(world: &World, signal: Signal) {
    let pid = i32::try_from(world.server.pid()).expect("a pid");
    kill(Pid::from_raw(pid), signal).expect("it runs");
}

async fn until(what: &str, world: &World, wanted: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !wanted() {
        assert!(Instant::now() < end, "{what} never came true\n{}", world.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_second_signal_cuts_requests_and_ends_engines_that_do_not_listen() {
    // Neither the answer nor the engine's own end comes within the test's patience.
    let models = standin(
        "ada",
        "1GiB",
        "--load 100ms --tokens-per-second 0.05 --reply-tokens 600 --shutdown fixed:600s",
    );
    let settings = gpu("24GiB", "0ms") + "\nswap: { shutdown_timeout: 10m, drain_timeout: 10m }";
    let world = serve(&settings, &models, &[]).await;
    let marker = format!("WHARF_INSTALLATION={}", world.installation());
    let talk = world.server.talk.clone();
    let stream = tokio::spawn(async move { talk.chat("ada", true, &[]).await });
    world.until("a stream runs", |status| status["models"]["ada"]["in_flight"] == 1).await;
    signal(&world, Signal::SIGTERM);
    until("the first signal", &world, || world.log().contains("draining")).await;
    assert_eq!(processes_with(&marker).len(), 1);
    assert!(!stream.is_finished(), "requests may end");
    // Within a second it would count as the same signal, passed on by a wrapper.
    let hurried = || world.log().contains("cutting requests");
    let end = Instant::now() + PATIENCE;
    while !hurried() {
        assert!(Instant::now() < end, "{}", world.log());
        signal(&world, Signal::SIGINT);
        tokio::time::sleep(Duration::from_millis(700)).await;
        // Another one would be the third.
        for _ in 0..20 {
            if hurried() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let cut = stream.await.unwrap();
    assert!(cut.is_err() || !cut.unwrap().done, "cut, not ended");
    until("the engine's end", &world, || processes_with(&marker).is_empty()).await;
    let stat = format!("/proc/{}/stat", world.server.pid());
    until("the end of wharf", &world, || {
        std::fs::read_to_string(&stat).unwrap_or_default().contains(") Z ")
    })
    .await;
    // It ended with 0, as asked.
    world.server.stop().await.unwrap();
}
