//! Readiness, and every way not to get there.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::model_support::{external, model};
use crate::world::{LONG, World};
use tokio::io::AsyncWriteExt;
use wharf::config::catalog::{EngineKind, ModelSpec};
use wharf::runtime::{ExitReport, RuntimeHandle};
use wharf::scheduler::event::{Fault, FaultKind};

/// A busy machine answers a question in less.
const SHORT: Duration = Duration::from_secs(2);
/// Put off by whatever happens: past twice of it, something was seen in time, twice.
const STALL: Duration = Duration::from_secs(5);
const PAST_STALLS: Duration = Duration::from_secs(11);

fn spec(engine: EngineKind) -> ModelSpec {
    model(engine, external("http://127.0.0.1:1"))
}

fn names(names: &[&str]) -> String {
    let data: Vec<_> = names.iter().map(|name| serde_json::json!({"id": name})).collect();
    serde_json::json!({"object": "list", "data": data}).to_string()
}

#[track_caller]
fn assert_fault(fault: Result<(), Fault>, kind: FaultKind, words: &[&str]) -> Fault {
    let fault = fault.expect_err("a fault");
    assert_eq!(fault.kind, kind, "{fault:?}");
    for word in words {
        assert!(fault.message.contains(word), "{word} is not in: {}", fault.message);
    }
    fault
}

#[tokio::test]
async fn loading_answers_are_waited_out() {
    let asked = AtomicUsize::new(0);
    let world = World::serving(move |_, _| match asked.fetch_add(1, Ordering::SeqCst) {
        0..=4 => (503, "{\"error\":{\"message\":\"Loading model\"}}".to_owned()),
        _ => (200, String::new()),
    });
    let world = world.await;
    world.running.log.push(&".".repeat(60));
    let (result, progress) = world.ready(&spec(EngineKind::Llamacpp), LONG).await;
    assert_eq!(result, Ok(()));
    assert_eq!((progress.stage.as_str(), progress.fraction), ("load_weights", Some(0.6)));
    assert_eq!(world.asked().len(), 6);
}

#[tokio::test]
async fn vllm_is_ready_when_it_lists_the_served_name() {
    let world = World::serving(|target, _| match target {
        "GET /health" => (200, String::new()),
        "GET /v1/models" => (200, names(&["org/coder", "coder"])),
        _ => (404, String::new()),
    })
    .await;
    assert_eq!(world.ready(&spec(EngineKind::Vllm), LONG).await.0, Ok(()));

    let world = World::serving(|_, _| (200, names(&["org/coder"]))).await;
    let (result, _) = world.ready(&spec(EngineKind::Vllm), LONG).await;
    assert_fault(result, FaultKind::BadSpec, &["`org/coder`", "not `coder`", "upstream_name"]);
}

#[tokio::test]
async fn a_fatal_line_ends_the_wait_at_once() {
    let world = World::silent();
    let log = world.running.log.clone();
    log.push("Loading safetensors checkpoint shards:  50% Completed | 1/2");
    let spec = spec(EngineKind::Vllm);
    let say = async {
        tokio::task::yield_now().await;
        log.push("ERROR ValueError: Free memory on device cuda:0 (2.0/24.0 GiB) on startup");
        log.push("after it");
    };
    let ((result, _), ()) = tokio::join!(world.ready(&spec, LONG), say);
    let words = ["model coder", "load_weights", "Free memory on device", "raise `vram:`"];
    let fault = assert_fault(result, FaultKind::OutOfMemory, &words);
    assert_eq!(fault.log_tail.last().map(String::as_str), Some("after it"));
}

#[tokio::test]
async fn an_engine_that_serves_has_survived_its_log() {
    let world = World::serving(|_, _| (200, String::new())).await;
    world.running.log.push("torch.OutOfMemoryError: CUDA out of memory.");
    assert_eq!(world.ready(&spec(EngineKind::Openai), LONG).await.0, Ok(()));
}

#[tokio::test]
async fn an_exit_is_told_with_the_best_line() {
    for (line, report, kind, words) in [
        (
            "401 Client Error: Unauthorized for url",
            ExitReport { code: Some(1), signal: None, oom_killed: false },
            FaultKind::FetchDenied,
            ["exited with code 1", "HF_TOKEN"],
        ),
        (
            "Traceback: something unknown",
            ExitReport { code: Some(2), signal: None, oom_killed: false },
            FaultKind::Exited,
            ["exited with code 2", "something unknown"],
        ),
        (
            "all is well",
            ExitReport { code: Some(137), signal: None, oom_killed: true },
            FaultKind::OutOfMemory,
            ["out of memory (host RAM)", "memory"],
        ),
    ] {
        let world = World::silent();
        // The line that explains it arrives after the end.
        world.exit.send_replace(Some(report));
        let log = world.running.log.clone();
        let say = async move {
            tokio::task::yield_now().await;
            log.push(line);
        };
        let spec = spec(EngineKind::Openai);
        let ((result, _), ()) = tokio::join!(world.ready(&spec, LONG), say);
        let fault = assert_fault(result, kind, &words);
        assert_eq!(fault.log_tail, [line]);
    }
}

#[tokio::test]
async fn a_consequence_is_not_the_cause() {
    let world = World::silent();
    world.running.log.push("gguf_init_from_file: failed to open GGUF file 'x.gguf'");
    world.running.log.push("llama_model_load: error loading model: nothing");
    world.running.log.push("srv  llama_server: exiting due to model loading error");
    let (result, _) = world.ready(&spec(EngineKind::Llamacpp), LONG).await;
    assert_fault(result, FaultKind::FatalLogLine, &["failed to open GGUF file"]);
}

#[tokio::test]
async fn silence_is_a_stall_and_names_the_phase() {
    let world = World::silent();
    world.running.log.push("INFO torch.compile takes 3.00 s in total");
    let mut spec = spec(EngineKind::Vllm);
    spec.health.stall = SHORT;
    let (result, _) = world.ready(&spec, LONG).await;
    assert_fault(result, FaultKind::Stalled, &["phase compile", "2s", "cannot connect"]);
}

#[tokio::test]
async fn log_lines_put_a_stall_off() {
    let world = World::silent();
    let mut spec = spec(EngineKind::Openai);
    spec.health.stall = STALL;
    let log = world.running.log.clone();
    let talk = async move {
        loop {
            log.push("still at it");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        (result, _) = world.ready(&spec, PAST_STALLS) => {
            assert_fault(result, FaultKind::TimedOut, &["start_timeout", "while starting"]);
        }
        () = talk => {}
    }
}

#[tokio::test]
async fn a_line_that_grows_puts_a_stall_off_and_tells_how_far_it_is() {
    let world = World::silent();
    let mut spec = spec(EngineKind::Llamacpp);
    spec.health.stall = STALL;
    let log = world.running.log.clone();
    let dots = async move {
        for count in 1..=80 {
            log.grow(&".".repeat(count));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        std::future::pending().await
    };
    tokio::select! {
        (result, progress) = world.ready(&spec, PAST_STALLS) => {
            assert_fault(result, FaultKind::TimedOut, &["start_timeout", "phase load_weights"]);
            assert_eq!(progress.stage, "load_weights");
            assert!(progress.fraction.is_some_and(|part| part > 0.04), "{progress:?}");
        }
        () = dots => {}
    }
    assert!(world.running.log.last(9).is_empty());
}

#[tokio::test]
async fn an_engine_that_answers_wrongly_is_never_healthy() {
    let world = World::serving(|_, _| (500, "it is broken".to_owned())).await;
    let mut spec = spec(EngineKind::Openai);
    spec.health.stall = SHORT;
    let (result, _) = world.ready(&spec, LONG).await;
    assert_fault(result, FaultKind::NeverHealthy, &["/health", "500", "it is broken", "path"]);
    spec.health.stall = LONG;
    let (result, _) = world.ready(&spec, SHORT).await;
    assert_fault(result, FaultKind::NeverHealthy, &["start_timeout"]);
}

#[tokio::test]
async fn still_loading_at_the_deadline_is_too_slow() {
    let world = World::serving(|_, _| (503, "Loading model".to_owned())).await;
    let (result, _) = world.ready(&spec(EngineKind::Llamacpp), SHORT).await;
    assert_fault(result, FaultKind::TimedOut, &["not ready in time", "Loading model"]);
}

#[tokio::test]
async fn a_listening_port_is_enough_without_a_health_path() {
    let world = World::serving(|_, _| (500, String::new())).await;
    let mut spec = spec(EngineKind::Openai);
    spec.health.path = None;
    assert_eq!(world.ready(&spec, LONG).await.0, Ok(()));
    assert_eq!(world.asked(), Vec::<String>::new());
}

#[tokio::test]
async fn a_proxy_that_hangs_up_is_no_listening_port() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let world = World::at(listener.local_addr().expect("an address").port(), Default::default());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.shutdown().await.ok();
        }
    });
    let mut spec = spec(EngineKind::Openai);
    spec.health.path = None;
    let (result, _) = world.ready(&spec, SHORT).await;
    assert_fault(result, FaultKind::TimedOut, &["closed at once"]);
}

#[tokio::test]
async fn a_stranger_on_the_port_is_not_vouched_for() {
    use std::os::unix::process::CommandExt;
    // The server of this test is the stranger.
    let mut world = World::serving(|_, _| (200, String::new())).await;
    let mut engine = std::process::Command::new("sleep");
    let mut engine = engine.arg("600").process_group(0).spawn().expect("a process");
    world.running.handle = RuntimeHandle::Process { pid: engine.id(), start_ticks: 0 };
    let (result, _) = world.ready(&spec(EngineKind::Openai), LONG).await;
    let pid = std::process::id().to_string();
    let fault = assert_fault(result, FaultKind::StrangerOnPort, &[&pid, "engine_ports"]);
    assert!(!fault.kind.is_transient());
    engine.kill().expect("killed");
    engine.wait().expect("reaped");
}

#[tokio::test]
async fn a_path_of_the_endpoint_precedes_that_of_the_question() {
    let mut world = World::serving(|_, _| (200, String::new())).await;
    world.running.endpoint.base.push_str("/api");
    let (result, _) = world.ready(&spec(EngineKind::Openai), LONG).await;
    assert_eq!(result, Ok(()));
    assert!(world.asked()[0].starts_with("GET /api/"), "{:?}", world.asked());
}

#[tokio::test]
async fn what_is_no_http_url_is_refused_clearly() {
    let mut world = World::silent();
    world.running.endpoint.base = "ftp://gpu2.lan:8000".to_owned();
    let (result, _) = world.ready(&spec(EngineKind::Openai), LONG).await;
    assert_fault(result, FaultKind::BadSpec, &["ftp://gpu2.lan:8000", "http://"]);
}

#[tokio::test]
async fn a_warm_up_request_that_fails_is_no_obstacle() {
    let world = World::serving(|target, _| match target {
        "GET /health" => (200, String::new()),
        _ => (500, "out of luck".to_owned()),
    })
    .await;
    let plain = spec(EngineKind::Llamacpp);
    wharf::engine::first_request(&plain, &world.running).await.expect("nothing is asked");
    assert!(world.asked().is_empty());
    let warm = ModelSpec { warmup_request: true, ..plain.clone() };
    wharf::engine::first_request(&warm, &world.running).await.expect("whatever comes of it");
    let asked = world.asked();
    assert!(asked.iter().any(|line| line.starts_with("POST /v1/chat/completions")), "{asked:?}");
    let canary = ModelSpec { canary: true, ..warm };
    wharf::engine::first_request(&canary, &world.running).await.expect_err("that one must answer");
}
