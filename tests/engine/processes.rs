//! The same with engines that are real processes: the stand-in, and llama-server where
//! WHARF_TEST_LLAMA names it (and WHARF_TEST_GGUF a folder with ada.gguf).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::model_support::{model, process};
use crate::ports::free_port;
use crate::world::{LONG, skip};
use tokio::time::Instant;
use wharf::config::catalog::{EngineKind, ModelSpec, RuntimeSpec};
use wharf::engine::{canary, derive, launch_key, sleep, wait_ready, wake};
use wharf::runtime::process::ProcessRuntime;
use wharf::runtime::{GpuDevice, Identity, LaunchSpec, Progress, ProgressNow, Running};
use wharf::scheduler::event::{Fault, FaultKind};
use wharf::units::{GpuId, InstanceId};

fn standin(engine: EngineKind, options: &str) -> ModelSpec {
    let style = match engine {
        EngineKind::Vllm => "vllm",
        EngineKind::Llamacpp => "llamacpp",
        EngineKind::Openai | EngineKind::Ollama | EngineKind::Http => "plain",
    };
    let wharf = env!("CARGO_BIN_EXE_wharf");
    model(engine, process(&format!("{wharf} engine --style {style} {options}")))
}

struct Started {
    spec: Arc<ModelSpec>,
    runtime: ProcessRuntime,
    running: Running,
    _logs: tempfile::TempDir,
}

impl Started {
    async fn new(spec: ModelSpec) -> Started {
        let logs = tempfile::tempdir().expect("a folder");
        let spec = Arc::new(spec);
        let runtime = ProcessRuntime::default();
        let launch = launch(&spec, free_port(), logs.path());
        let running = runtime.start(&launch).await.expect("started");
        Started { spec, runtime, running, _logs: logs }
    }

    async fn ready(&self) -> (Result<(), Fault>, ProgressNow) {
        self.ready_within(LONG).await
    }

    async fn ready_within(&self, limit: Duration) -> (Result<(), Fault>, ProgressNow) {
        let (progress, seen) = Progress::new();
        let deadline = Instant::now() + limit;
        let result = wait_ready(&self.spec, &self.running, &progress, deadline).await;
        let seen = seen.borrow().clone();
        (result, seen)
    }

    /// Until its log holds such a line.
    async fn says(&self, words: &str) {
        let (history, mut live) = self.running.log.follow();
        if history.iter().any(|line| line.contains(words)) {
            return;
        }
        let said = async { while !live.recv().await.expect("a line").contains(words) {} };
        tokio::time::timeout(LONG, said).await.expect("the line");
    }

    async fn stop(self) {
        self.runtime.stop(&self.running, &self.spec.stop).await.expect("stopped");
    }
}

fn launch(spec: &Arc<ModelSpec>, port: u16, logs: &Path) -> LaunchSpec {
    let derived = derive(spec, port, 1, None, None);
    LaunchSpec {
        identity: Identity {
            installation: format!("engine-test-{}", std::process::id()),
            instance: InstanceId(u64::from(port)),
            model: spec.name.clone(),
            spec_hash: "x".to_owned(),
            gpus: vec![GpuId(0)],
            port,
        },
        model: Arc::clone(spec),
        gpus: vec![GpuDevice { id: GpuId(0), uuid: "SIM-0".to_owned() }],
        port,
        container_port: derived.container_port,
        args: derived.args,
        env: derived.env,
        api_key: launch_key(spec, |_| None).expect("randomness"),
        log_dir: logs.to_owned(),
    }
}

#[tokio::test]
async fn stand_ins_of_every_style_become_ready() {
    for (engine, stage, last_line) in [
        (EngineKind::Vllm, "warm_up", "Application startup complete"),
        (EngineKind::Llamacpp, "size_kv_cache", "server is listening"),
        (EngineKind::Openai, "load", "ready on"),
    ] {
        let started = Started::new(standin(engine, "--load 300ms")).await;
        assert_eq!(started.ready().await.0, Ok(()), "{engine:?}");
        // An engine may answer before its last lines were read; asked again, all of them count.
        started.says(last_line).await;
        let (result, progress) = started.ready().await;
        assert_eq!(result, Ok(()), "{engine:?}");
        assert_eq!(progress.stage, stage, "{engine:?}");
        canary(&started.spec, &started.running).await.expect("a token");
        started.stop().await;
    }
}

#[tokio::test]
async fn a_stand_in_sleeps_and_wakes() {
    for level in [1, 2] {
        let mut spec = standin(EngineKind::Vllm, "");
        spec.sleep = Some(level);
        let started = Started::new(spec).await;
        assert_eq!(started.ready().await.0, Ok(()));
        sleep(&started.spec, &started.running).await.expect("asleep");
        wake(&started.spec, &started.running).await.expect("awake");
        canary(&started.spec, &started.running).await.expect("a token");
        started.stop().await;
    }
}

#[tokio::test]
async fn a_fatal_line_and_the_exit_after_it_are_one_fault() {
    let line = "'ValueError: No available memory for the cache blocks.'";
    for then in ["exit", "hang"] {
        let options = format!("--fatal-line {line} --fatal-then {then}");
        let started = Started::new(standin(EngineKind::Vllm, &options)).await;
        let fault = started.ready().await.0.expect_err("a fault");
        assert_eq!(fault.kind, FaultKind::OutOfMemory, "{fault:?}");
        assert!(fault.message.contains("--max-model-len"), "{}", fault.message);
        assert!(!fault.log_tail.is_empty());
        started.stop().await;
    }
}

#[tokio::test]
async fn a_crash_while_loading_is_seen_at_once() {
    let options = "--fatal-line 'it broke' --exit-code 3 --load 100ms";
    let started = Started::new(standin(EngineKind::Openai, options)).await;
    let fault = started.ready().await.0.expect_err("a fault");
    assert_eq!(fault.kind, FaultKind::Exited, "{fault:?}");
    assert!(fault.message.contains("it broke"), "{}", fault.message);
    started.stop().await;
}

/// As llama.cpp prints its load: dots, of which the line ends with the load.
#[tokio::test]
async fn dots_on_one_line_are_no_stall() {
    let mut spec = model(EngineKind::Llamacpp, process("x"));
    let RuntimeSpec::Process(process) = &mut spec.runtime else { panic!("a process") };
    let script = "while :; do printf .; sleep 0.05; done";
    process.argv = ["sh", "-c", script].map(str::to_owned).into();
    spec.health.stall = Duration::from_secs(6);
    let started = Started::new(spec).await;
    let (result, progress) = started.ready_within(Duration::from_secs(13)).await;
    let fault = result.expect_err("never ready");
    assert_eq!(fault.kind, FaultKind::TimedOut, "{fault:?}");
    assert_eq!(progress.stage, "load_weights");
    assert!(progress.fraction.is_some(), "{progress:?}");
    started.stop().await;
}

#[tokio::test]
async fn a_real_llama_server_becomes_ready() {
    let var = |name| std::env::var(name).ok();
    let (Some(server), Some(gguf)) = (var("WHARF_TEST_LLAMA"), var("WHARF_TEST_GGUF")) else {
        skip("real llama-server: WHARF_TEST_LLAMA and WHARF_TEST_GGUF are not set");
        return;
    };
    let command = format!("{server} -m {gguf}/ada.gguf -t 1 -tb 1");
    let started = Started::new(model(EngineKind::Llamacpp, process(&command))).await;
    assert_eq!(started.ready().await.0, Ok(()));
    canary(&started.spec, &started.running).await.expect("a token");
    started.stop().await;

    let command = format!("{server} -m /nowhere/x.gguf");
    let started = Started::new(model(EngineKind::Llamacpp, process(&command))).await;
    let fault = started.ready().await.0.expect_err("a fault");
    assert_eq!(fault.kind, FaultKind::FatalLogLine, "{fault:?}");
    assert!(fault.message.contains("/nowhere/x.gguf"), "{}", fault.message);
    started.stop().await;
}
