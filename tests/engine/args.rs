//! What Wharf adds to engines' commands, and what it finds contradictory in them.

use crate::model_support::{docker, external, model, process};
use wharf::config::catalog::{EngineKind, GpuRequest, ModelSpec, RuntimeSpec, Vram};
use wharf::engine::{contradictions, derive};
use wharf::units::Bytes;

const IMAGE: &str = "vllm/vllm-openai:v0.31.0";

fn args(spec: &ModelSpec, gpus: usize, memory: Option<(Bytes, Bytes)>) -> String {
    let (footprint, total) = memory.unzip();
    derive(spec, 18051, gpus, footprint, total).args.join(" ")
}

#[test]
fn vllm_in_a_container_gets_name_share_and_address() {
    let mut spec = model(EngineKind::Vllm, docker(IMAGE, "--model org/coder"));
    assert_eq!(
        args(&spec, 1, Some((Bytes::gib(22), Bytes::gib(24)))),
        "--served-model-name coder --gpu-memory-utilization 0.916 --shutdown-timeout 1 \
         --host 0.0.0.0 --port 8000"
    );
    spec.upstream_name = Some("org/coder".to_owned());
    assert_eq!(
        args(&spec, 2, None),
        "--served-model-name org/coder --tensor-parallel-size 2 --shutdown-timeout 1 \
         --host 0.0.0.0 --port 8000"
    );
    let derived = derive(&spec, 18051, 1, None, None);
    assert_eq!(derived.container_port, 8000);
    assert_eq!(derived.env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"], "120");
    assert!(!derived.env.contains_key("VLLM_SERVER_DEV_MODE"));
}

#[test]
fn the_share_never_exceeds_the_promise() {
    let spec = model(EngineKind::Vllm, docker(IMAGE, ""));
    let share = |footprint, total| {
        let args = args(&spec, 1, Some((Bytes(footprint), Bytes(total))));
        args.split(' ').nth(3).expect("a share").to_owned()
    };
    assert_eq!(share(9_999, 10_000), "0.999");
    assert_eq!(share(10, 10), "1.000");
    assert_eq!(share(20, 10), "1.000");
    assert_eq!(share(1, 10_000_000), "0.001");
    assert!(!args(&spec, 1, Some((Bytes(1), Bytes(0)))).contains("utilization"));
    assert!(!args(&spec, 0, Some((Bytes(1), Bytes(2)))).contains("utilization"));
}

#[test]
fn what_the_command_says_is_not_said_again() {
    let line = "vllm serve org/coder --served_model_name=coder --gpu-memory-utilization 0.5 \
                --host 127.0.0.1 --port ${PORT} -tp 2 --shutdown-timeout 7";
    assert_eq!(
        args(&model(EngineKind::Vllm, process(line)), 2, Some((Bytes::gib(1), Bytes::gib(2)))),
        ""
    );
    let spec = model(EngineKind::Llamacpp, process("llama-server -m x -a coder --port=${PORT}"));
    assert_eq!(args(&spec, 1, None), "--host 127.0.0.1");
    let spec = model(EngineKind::Vllm, process("env A=${PORT} vllm serve x"));
    assert!(!args(&spec, 1, None).contains("--port"));
}

#[test]
fn a_shell_script_gets_environment_only() {
    let spec = model(EngineKind::Vllm, process("sh -c 'exec vllm serve x --port ${PORT}'"));
    let derived = derive(&spec, 18051, 1, None, None);
    assert_eq!(derived.args, Vec::<String>::new());
    assert!(derived.env.contains_key("VLLM_HTTP_TIMEOUT_KEEP_ALIVE"));
}

#[test]
fn older_vllm_images_do_not_get_flags_they_lack() {
    for (image, knows) in [
        ("vllm/vllm-openai:v0.17.1", false),
        ("vllm/vllm-openai:v0.18.0", true),
        ("registry.lan:5000/vllm-openai:v0.9.2-cu128", false),
        ("registry.lan:5000/vllm-openai", true),
        ("vllm/vllm-openai:latest", true),
    ] {
        let spec = model(EngineKind::Vllm, docker(image, ""));
        assert_eq!(args(&spec, 1, None).contains("--shutdown-timeout"), knows, "{image}");
    }
}

#[test]
fn sleep_mode_is_switched_on() {
    let mut spec = model(EngineKind::Vllm, process("vllm serve x"));
    spec.sleep = Some(1);
    let derived = derive(&spec, 18051, 1, None, None);
    assert!(derived.args.contains(&"--enable-sleep-mode".to_owned()), "{:?}", derived.args);
    assert!(derived.args.join(" ").contains("--host 127.0.0.1 --port 18051"));
    assert_eq!(derived.env["VLLM_SERVER_DEV_MODE"], "1");
}

#[test]
fn llamacpp_and_generic_engines() {
    let spec = model(EngineKind::Llamacpp, docker("ghcr.io/ggml-org/llama.cpp:server", "-m x"));
    let derived = derive(&spec, 18051, 1, None, None);
    assert_eq!(derived.args.join(" "), "--host 0.0.0.0 --port 8080 --alias coder");
    assert_eq!(derived.container_port, 8080);
    assert_eq!(derived.env["LLAMA_ARG_SSE_PING_INTERVAL"], "1");

    let spec = model(EngineKind::Openai, process("server --port ${PORT}"));
    assert_eq!(args(&spec, 1, None), "");
    let spec = model(EngineKind::Vllm, external("http://127.0.0.1:9"));
    assert_eq!(args(&spec, 1, None), "");
}

#[test]
fn the_container_port_is_where_the_engine_listens() {
    let port = |args: &str, declared| {
        let mut runtime = docker(IMAGE, args);
        if let RuntimeSpec::Docker(docker) = &mut runtime {
            docker.port = declared;
        }
        let derived = derive(&model(EngineKind::Vllm, runtime), 18051, 1, None, None);
        (derived.container_port, derived.args.join(" ").contains("--port"))
    };
    assert_eq!(port("--port 9000", None), (9000, false));
    assert_eq!(port("", Some(7000)), (7000, true));
}

#[test]
fn contradictions_name_argument_and_fix() {
    let with = |args: &str, change: fn(&mut ModelSpec)| {
        let mut spec = model(EngineKind::Vllm, docker(IMAGE, args));
        change(&mut spec);
        contradictions(&spec)
    };
    type Change = fn(&mut ModelSpec);
    let cases: [(&str, Change, &str, &str); 7] = [
        ("--served-model-name a b", |_| {}, "--served-model-name", "upstream_name: a"),
        (
            "--gpu-memory-utilization 0.9",
            |spec| spec.vram = Vram::Declared(Bytes::gib(20)),
            "--gpu-memory-utilization",
            "remove one",
        ),
        ("--enable-sleep-mode", |_| {}, "--enable-sleep-mode", "sleep: 1"),
        ("-tp 4", |spec| spec.gpus = GpuRequest::Count(2), "--tensor-parallel-size", "gpus: 4"),
        ("--host localhost", |_| {}, "--host", "0.0.0.0"),
        ("--ssl-keyfile k.pem", |_| {}, "--ssl-keyfile", "remove"),
        (
            "--port 9",
            |spec| {
                if let RuntimeSpec::Docker(docker) = &mut spec.runtime {
                    docker.port = Some(10);
                }
            },
            "--port",
            "remove one",
        ),
    ];
    for (args, change, argument, fix) in cases {
        let found = with(args, change);
        assert_eq!(found.len(), 1, "{args}: {found:?}");
        assert_eq!(found[0].0, argument);
        assert!(found[0].1.contains(fix), "{args}: {}", found[0].1);
    }
}

#[test]
fn agreement_is_no_contradiction() {
    let fine = [
        (1, "vllm serve x --served-model-name x coder --port ${PORT} --host 127.0.0.1"),
        (4, "vllm serve x --served-model-name ${MODEL} -tp 2 -pp 2"),
        (1, "vllm serve x --gpu-memory-utilization 0.9"),
        (1, "vllm serve x --api-key pa$$word"),
    ];
    for (gpus, command) in fine {
        let mut spec = model(EngineKind::Vllm, process(command));
        spec.gpus = GpuRequest::Count(gpus);
        assert_eq!(contradictions(&spec), Vec::new(), "{command}");
    }
    let hidden =
        model(EngineKind::Vllm, process("sh -c 'exec vllm serve x --port ${PORT} --api-key $K'"));
    let found = contradictions(&hidden);
    assert!(
        found.iter().any(|(flag, why)| flag == "--api-key" && why.contains("${env.")),
        "{found:?}"
    );
    let generic = model(EngineKind::Openai, process("server --api-key x --port 9"));
    assert_eq!(contradictions(&generic), Vec::new());
}

#[test]
fn a_fixed_port_is_the_declared_one() {
    let mut spec = model(EngineKind::Llamacpp, process("llama-server -m x --port 9000"));
    spec.port = Some(9001);
    let found = contradictions(&spec);
    assert!(found[0].1.contains("${PORT}") && found[0].1.contains("port: 9001"), "{found:?}");
    spec.port = Some(9000);
    assert_eq!(contradictions(&spec), Vec::new());
}

#[test]
fn a_base_of_adapters_is_told_to_take_them_and_no_other_model_is() {
    let mut spec = model(EngineKind::Vllm, docker(IMAGE, "--model org/coder"));
    let derived = derive(&spec, 18051, 1, None, None);
    assert!(!derived.args.contains(&"--enable-lora".to_owned()));
    assert!(!derived.env.contains_key("VLLM_ALLOW_RUNTIME_LORA_UPDATING"));
    spec.lora = true;
    let derived = derive(&spec, 18051, 1, None, None);
    assert_eq!(derived.args.iter().filter(|arg| *arg == "--enable-lora").count(), 1);
    assert_eq!(derived.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], "1");
    // Said by the user: not said again.
    let mut spec = model(EngineKind::Vllm, docker(IMAGE, "--model org/coder --enable-lora"));
    spec.lora = true;
    let derived = derive(&spec, 18051, 1, None, None);
    assert!(!derived.args.contains(&"--enable-lora".to_owned()), "{:?}", derived.args);
    assert_eq!(derived.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], "1");
}
