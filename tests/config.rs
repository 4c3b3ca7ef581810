//! `models.yaml`: what is accepted, what it means, and what is said about what is wrong.

use std::path::Path;
use std::time::Duration;

use wharf::cli::check;
use wharf::config::catalog::{
    EngineKind, GpuRequest, ModelSpec, PullPolicy, RuntimeSpec, SwapMode, Vram, WaitingStyle,
};
use wharf::config::{self, ConfigErrors, Loaded};
use wharf::units::{Bytes, Priority};

fn parse_with(text: &str, env: &[(&str, &str)]) -> Result<Loaded, ConfigErrors> {
    let env: Vec<(String, String)> =
        env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    config::parse(text, "models.yaml", &move |name| {
        env.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone())
    })
}

/// What `wharf check` says about one of the broken files.
fn said(fixture: &str) -> String {
    let text = std::fs::read_to_string(Path::new("tests/config").join(fixture)).expect("fixture");
    let loaded = parse_with(&text, &[("HOME", "/root")]);
    let outcome = check::outcome("models.yaml", loaded, false);
    assert_eq!(outcome.code, 1, "{fixture} must be refused:\n{}", outcome.problems);
    outcome.problems
}

macro_rules! broken {
    ($($name:ident: $file:literal,)*) => {$(
        #[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), said($file));
        }
    )*};
}

broken! {
    unknown_keys: "01-unknown-keys.yaml",
    wrong_values: "02-wrong-values.yaml",
    duplicates: "03-duplicates.yaml",
    how_is_it_run: "04-how-is-it-run.yaml",
    macros_and_environment: "05-macros-and-environment.yaml",
    ports_and_names: "06-ports-and-names.yaml",
    does_not_fit: "07-does-not-fit.yaml",
    vllm_contradicts: "08-vllm-contradicts.yaml",
    other_tools: "09-other-tools.yaml",
    secrets_in_the_file: "10-secrets.yaml",
    broken_yaml: "11-broken-yaml.yaml",
    host_ram: "12-host-ram.yaml",
    lifecycle: "13-lifecycle.yaml",
    names_that_lead_elsewhere: "14-names-that-lead-elsewhere.yaml",
    access: "15-access.yaml",
    adapters_and_traffic: "16-adapters-and-traffic.yaml",
}

const EXAMPLE: &str = include_str!("../models.yaml");

fn model(text: &str) -> ModelSpec {
    models(text).remove(0)
}

/// The models of a file that must be right, in the order of their names.
fn models(text: &str) -> Vec<ModelSpec> {
    let loaded = parse_with(text, &[("HF_TOKEN", "hf_abcdef")]).unwrap_or_else(|e| panic!("{e}"));
    loaded.catalog.models.values().map(|spec| (**spec).clone()).collect()
}

/// The only problem of a file.
fn problem(text: &str) -> String {
    let errors = parse_with(text, &[]).expect_err("must be refused");
    let [problem] = errors.problems() else { panic!("one problem expected:\n{errors}") };
    format!("{}: {} | {}", problem.path, problem.message, problem.expected)
}

const VLLM: &str = "engine: vllm, docker: { image: \"a:1\" }";

fn one(keys: &str) -> String {
    format!("models: {{ m: {{ {VLLM}, {keys} }} }}\n")
}

#[test]
fn the_example_is_right_and_says_three_models() {
    let outcome = check::outcome("models.yaml", parse_with(EXAMPLE, &[]), false);
    assert_eq!(outcome.code, 0, "{}", outcome.problems);
    insta::assert_snapshot!(
        outcome.result + &outcome.problems,
        @"ok: 3 models (3 vllm; 3 docker), 1 alias, 1 loaded at start, multi-active, gateway 127.0.0.1:8080, orchestrator 127.0.0.1:8888"
    );
    let loaded = parse_with(EXAMPLE, &[]).expect("valid");
    let llava = loaded.catalog.resolve("llava").expect("llava");
    assert_eq!((llava.model_type.as_str(), llava.concurrency), ("vision", Some(16)));
    let mistral = loaded.catalog.resolve("gpt-4o-mini").expect("alias");
    let RuntimeSpec::Docker(docker) = &mistral.runtime else { panic!("docker") };
    assert_eq!(docker.image.as_deref(), Some("vllm/vllm-openai:v0.31.0"));
    assert_eq!(docker.volumes.len(), 2, "from defaults");
    assert_eq!(mistral.vram, Vram::Declared(Bytes::gib(20)));
    assert_eq!(mistral.priority, Priority::High);
}

#[test]
fn what_is_not_said_has_the_documented_default() {
    let loaded = parse_with(&one("gpus: 1"), &[]).expect("valid");
    insta::assert_json_snapshot!(loaded.catalog);
}

// contract: CONFIG every key
#[test]
fn everything_of_the_contract_is_understood() {
    let text = std::fs::read_to_string("tests/config/everything.yaml").expect("fixture");
    let env = [
        ("WHARF_KEY", "k-123456"),
        ("GPU2", "g-123456"),
        ("HF_TOKEN", "hf_abcdef"),
        ("PROBE_KEY", "p-123456"),
        ("REGISTRY_KEY", "r-123456"),
    ];
    let loaded = parse_with(&text, &env).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(loaded.catalog.settings.auth.keys[0].key, "k-123456".into());
    let json = serde_json::to_string(&loaded.catalog).expect("json");
    for secret in ["k-123456", "g-123456", "p-123456", "r-123456", "key-from-a-file-1"] {
        assert!(!json.contains(secret), "{secret} in {json}");
    }
    let keys = &loaded.catalog.settings.auth.keys;
    assert_eq!((keys[2].key, keys[3].key), ("p-123456".into(), "key-from-a-file-1".into()));
    insta::assert_json_snapshot!("everything", loaded.catalog);
    let warnings: Vec<String> =
        loaded.warnings.iter().map(|w| format!("{}: {}", w.path, w.message)).collect();
    assert_eq!(warnings, [] as [&str; 0]);
}

// contract: CONFIG templates
#[test]
fn templates_take_the_models_name_and_are_overridden_key_by_key() {
    let specs = models(
        "templates:\n  ft: { engine: vllm, vram: 9GiB, docker: { image: \"a:1\", \
         args: [--model, \"${model}\"], env: { A: 1 } } }\n\
         models:\n  org/x: { template: ft }\n  y: { template: ft, vram: 8GiB, \
         docker: { env: { B: 2 } } }\n",
    );
    let docker = |spec: &ModelSpec| match &spec.runtime {
        RuntimeSpec::Docker(docker) => docker.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(docker(&specs[0]).args, ["--model", "org/x"]);
    assert_eq!(specs[1].vram, Vram::Declared(Bytes::gib(8)));
    assert_eq!(docker(&specs[1]).image.as_deref(), Some("a:1"));
    assert_eq!(docker(&specs[1]).env.len(), 2, "{:?}", docker(&specs[1]).env);
}

// contract: CONFIG ${env.NAME} and macros
#[test]
fn macros_reach_commands_and_leave_the_port_for_the_start() {
    let spec = model(
        "macros: { bin: /opt/llama-server, serve: \"${bin} --port ${PORT} -a ${model}\" }\n\
         models: { m: { engine: llamacpp, process: { cmd: \"${serve} -m 'my model.gguf' $${HOME}\" } } }\n",
    );
    let RuntimeSpec::Process(process) = spec.runtime else { panic!("process") };
    let expected =
        ["/opt/llama-server", "--port", "${PORT}", "-a", "m", "-m", "my model.gguf", "${HOME}"];
    assert_eq!(process.argv, expected);
}

#[test]
fn defaults_for_containers_do_not_touch_other_models() {
    let specs = models(
        "defaults: { ttl: 10m, docker: { ipc: host } }\nmodels:\n  \
         a: { engine: vllm, docker: { image: \"a:1\" } }\n  \
         b: { engine: llamacpp, ttl: never, process: { cmd: \"x ${PORT}\" } }\n  \
         c: { engine: vllm, docker: { container: made-by-compose } }\n",
    );
    let RuntimeSpec::Docker(a) = &specs[0].runtime else { panic!("docker") };
    assert_eq!((a.ipc.as_deref(), specs[0].ttl), (Some("host"), Some(Duration::from_secs(600))));
    assert_eq!(specs[1].ttl, None);
    let RuntimeSpec::Docker(c) = &specs[2].runtime else { panic!("docker") };
    assert_eq!(c.ipc, None);
}

#[test]
fn the_ways_to_write_one_thing_mean_the_same() {
    let spec = |keys: &str| model(&one(keys));
    assert_eq!(spec("gpus: [0, 1]").gpus, GpuRequest::Explicit(vec!["0".into(), "1".into()]));
    assert_eq!(spec("gpus: 0").gpus, GpuRequest::None);
    assert_eq!(spec("gpus: []").gpus, GpuRequest::None);
    assert_eq!(spec("vram: rest").vram, Vram::Rest);
    for never in ["ttl: 0", "ttl: never"] {
        assert_eq!(spec(never).ttl, None);
    }
    for start in ["start_timeout: 15m", "timeouts: { start: 15m }"] {
        assert_eq!(spec(start).start_timeout, Some(Duration::from_secs(900)));
    }
    for none in ["health: none", "health: { path: none, stall: 120s }"] {
        assert_eq!(spec(none).health.path, None);
    }
    for sleep in ["sleep: 1", "sleep: { level: 1 }"] {
        assert_eq!(spec(sleep).sleep, Some(1));
    }
    assert_eq!(spec("sleep: off").sleep, None);
    assert_eq!(spec("stop: { signal: int, grace: 5s }").stop.signal, "SIGINT");
    let waiting = spec("waiting: { style: chunk }").waiting.expect("waiting");
    assert_eq!((waiting.style, waiting.after), (WaitingStyle::Chunk, Duration::from_secs(10)));
    for pull in ["pull: always", "pull: { policy: always }"] {
        let RuntimeSpec::Docker(docker) = spec(pull).runtime else { panic!("docker") };
        assert_eq!(docker.pull, PullPolicy::Always);
    }
    for env in ["env: { A: \"1\", HF_TOKEN: hf_abcdef }", "env: [A=1, HF_TOKEN]"] {
        let RuntimeSpec::Docker(docker) = spec(env).runtime else { panic!("docker") };
        let pairs: Vec<(&str, &str)> = docker.env.iter().map(|(k, v)| (&**k, &**v)).collect();
        assert_eq!(pairs, [("A", "1"), ("HF_TOKEN", "hf_abcdef")]);
    }
}

#[test]
fn the_grace_of_vllm_is_that_of_its_own_shutdown() {
    let grace = |text: &str| model(text).stop.grace.as_secs();
    assert_eq!(grace(&one("gpus: 1")), 60);
    let llama = "models: { m: { engine: llamacpp, process: { cmd: \"x ${PORT}\" } } }\n";
    assert_eq!(grace(llama), 30);
    assert_eq!(grace(&format!("swap: {{ shutdown_timeout: 20s }}\n{llama}")), 20);
}

// contract: CONFIG environment variables of the swapper
#[test]
fn the_swappers_variables_outrank_the_file() {
    let text = format!("swap: {{ mode: multi-active, start_timeout: 10m }}\n{}", one("gpus: 1"));
    let env = [
        ("SWAPPER_MODE", "single-active"),
        ("MAX_CONCURRENT_MODELS", "1"),
        ("MODEL_SWAP_TIMEOUT", "30"),
    ];
    let loaded = parse_with(&text, &env).expect("valid");
    let swap = &loaded.catalog.settings.swap;
    assert_eq!(swap.mode, SwapMode::SingleActive);
    assert_eq!((swap.max_concurrent_models, swap.start_timeout.as_secs()), (1, 30));
    assert_eq!(loaded.overrides.len(), 3);
    let errors = parse_with(&text, &[("SWAPPER_MODE", "single")]).expect_err("refused");
    assert!(errors.to_string().contains("SWAPPER_MODE: `single`"), "{errors}");
    let text = "models: { m: { engine: openai, external: {} } }\n";
    let loaded =
        parse_with(text, &[("OLLAMA_BASE_URL", "http://localhost:11434/")]).expect("valid");
    let spec = loaded.catalog.resolve("m").expect("m");
    let RuntimeSpec::External(external) = &spec.runtime else { panic!("external") };
    assert_eq!(external.url, "http://localhost:11434");
    assert!(loaded.warnings.is_empty());
    assert_eq!(spec.engine, EngineKind::Openai);
    assert_eq!(loaded.overrides.len(), 1, "{:?}", loaded.overrides);
}

#[test]
fn models_of_an_ollama_are_where_they_say_or_the_environment_or_usual() {
    let text = "models:\n  a: { engine: ollama, external: { url: \"http://10.0.0.5:11434\" } }\n  \
                b: { engine: ollama, upstream_name: \"b:7b\" }\n  c: { engine: ollama, vram: 6GiB }\n";
    let urls = |env: &[(&str, &str)]| {
        let loaded = parse_with(text, env).expect("valid");
        let url = |spec: &ModelSpec| match &spec.runtime {
            RuntimeSpec::Ollama(ollama) => ollama.at.url.clone(),
            other => panic!("{other:?}"),
        };
        let urls: Vec<String> = loaded.catalog.models.values().map(|spec| url(spec)).collect();
        (urls, loaded)
    };
    let (usual, loaded) = urls(&[]);
    assert_eq!(
        usual,
        ["http://10.0.0.5:11434", "http://localhost:11434", "http://localhost:11434"]
    );
    let spec = |name| loaded.catalog.resolve(name).expect("model").clone();
    assert_eq!((spec("a").served_name(), spec("b").served_name()), ("a", "b:7b"));
    assert_eq!((&spec("b").gpus, &spec("c").gpus), (&GpuRequest::None, &GpuRequest::Count(1)));
    let (told, loaded) = urls(&[("OLLAMA_BASE_URL", "http://gpu1:11434/")]);
    assert_eq!(told, ["http://10.0.0.5:11434", "http://gpu1:11434", "http://gpu1:11434"]);
    let [told] = loaded.overrides.as_slice() else { panic!("{:?}", loaded.overrides) };
    assert_eq!((told.variable, told.key), ("OLLAMA_BASE_URL", "external.url"));
}

#[test]
fn an_adapter_runs_as_its_base_and_defaults_for_engines_pass_it_by() {
    let specs = models(
        "defaults: { engine: vllm, gpus: 2, vram: 9GiB, sleep: 1, docker: { ipc: host } }\nmodels:\n  \
         base: { docker: { image: \"a:1\" }, stop: { grace: 40s } }\n  \
         sql: { adapter_of: base, adapter: org/sql, ttl: 5m, priority: high }\n",
    );
    let (base, sql) = (&specs[0], &specs[1]);
    let adapter = sql.adapter.as_ref().expect("adapter");
    assert_eq!((adapter.of.as_str(), adapter.source.as_str()), ("base", "org/sql"));
    assert_eq!((&sql.runtime, &sql.stop, sql.engine), (&base.runtime, &base.stop, base.engine));
    assert_eq!((&sql.gpus, sql.vram, sql.sleep), (&GpuRequest::None, Vram::Unknown, None));
    assert_eq!((sql.ttl, sql.priority), (Some(Duration::from_secs(300)), Priority::High));
}

#[test]
fn models_on_one_port_may_take_turns() {
    let two = "models:\n  a: &a { engine: llamacpp, process: { cmd: x }, port: 9001 }\n  b: *a\n";
    assert_eq!(models(&format!("{two}groups: {{ turns: {{ models: [a, b] }} }}\n")).len(), 2);
    let together = format!("{two}groups: {{ both: {{ models: [a, b], together: true }} }}\n");
    assert!(problem(&together).contains("same fixed port 9001"), "{}", problem(&together));
}

// contract: CONFIG gpu none without memory is single-active
#[test]
fn without_gpus_one_model_runs_at_a_time() {
    let mode = |gpu: &str| {
        let text = format!("gpu: {{ {gpu} }}\nmodels: {{ m: {{ {VLLM} }} }}\n");
        let loaded = parse_with(&text, &[]).expect("valid");
        (loaded.catalog.settings.swap.mode, loaded.catalog.resolve("m").expect("m").gpus.clone())
    };
    assert_eq!(mode("provider: none"), (SwapMode::SingleActive, GpuRequest::None));
    let declared = (SwapMode::MultiActive, GpuRequest::Count(1));
    assert_eq!(mode("provider: none, memory: 2 x 24GiB"), declared);
}

#[test]
fn single_mistakes_give_single_messages() {
    let cases = [
        (one("gpu: 1"), "models.m.gpu: unknown key `gpu` | did you mean `gpus`?"),
        (one("gpus: [0, 0]"), "models.m.gpus[1]: GPU 0 is listed twice | remove one"),
        (
            one("ttl:"),
            "models.m.ttl: this has no value | expected `never` or a duration such as 15m",
        ),
        ("models: {}\n".to_owned(), "models: no models are configured | expected `models:`"),
        (String::new(), ": the file is empty | expected `models:`"),
        (
            "- a\n".to_owned(),
            ": a list is not a mapping with `models:` and other keys | expected a mapping with `models:` and other keys",
        ),
        ("a: *b\n".to_owned(), ": this alias names no anchor | "),
    ];
    for (text, expected) in cases {
        assert_eq!(problem(&text), expected, "{text}");
    }
}

#[test]
fn two_models_share_a_port_only_when_one_runs_at_a_time() {
    let two = "models:\n  a: &a { engine: llamacpp, process: { cmd: x }, port: 9001 }\n  b: *a\n";
    assert!(problem(two).contains("same fixed port 9001"));
    assert_eq!(models(&format!("swap: {{ mode: single-active }}\n{two}")).len(), 2);
}

// contract: RULE a name that ends in a verb of the API is an error
#[test]
fn a_name_that_could_be_taken_for_a_call_is_refused() {
    for verb in ["load", "unload", "extend-ttl", "pin", "sleep", "wake", "health"] {
        let text = format!("models: {{ \"org/{verb}\": {{ {VLLM} }} }}\n");
        let said = problem(&text);
        assert!(said.contains(&format!("ends in `{verb}`, a verb of the API")), "{said}");
        assert_eq!(models(&text.replace("org/", "org-")).len(), 1, "{verb}");
    }
}

// contract: CONFIG unknown keys, every error with its place
#[test]
fn every_error_is_told_at_once_with_its_place_and_the_nearest_name() {
    let text =
        "swap: { max_wiat: 30s }\nmodels:\n  m:\n    engine: vlm\n    docker: { image: \"a:1\" }\n";
    let errors = parse_with(text, &[]).expect_err("refused");
    let problems: Vec<_> = errors
        .problems()
        .iter()
        .map(|problem| (problem.place.line, problem.place.column, problem.path.as_str()))
        .collect();
    assert_eq!(problems, [(1, 9, "swap.max_wiat"), (4, 13, "models.m.engine")]);
    let shown = errors.to_string();
    assert!(shown.contains("max_wait") && shown.contains("vllm"), "{shown}");
    assert!(shown.contains("models.yaml:1:9") && shown.contains("models.yaml:4:13"), "{shown}");
}

#[test]
fn a_container_belongs_to_one_model() {
    let two =
        "models:\n  a: &a { engine: vllm, docker: { container: coder }, vram: 1GiB }\n  b: *a\n";
    assert!(
        problem(two).contains("`b` and `a` name the same container `coder`"),
        "{}",
        problem(two)
    );
}

#[test]
fn no_secret_is_ever_shown() {
    let text = std::fs::read_to_string("tests/config/10-secrets.yaml").expect("fixture");
    for text in [text.clone(), text.replace('[', "[["), text.replace("    - ", "\t- ")] {
        let errors = parse_with(&text, &[]).expect_err("refused");
        let json = serde_json::to_string(errors.problems()).expect("json");
        for secret in ["s3cret", "pa55word", "hidden-value", "hunter2", "hf_abcdef"] {
            assert!(!errors.to_string().contains(secret), "{secret} in:\n{errors}");
            assert!(!json.contains(secret), "{secret} in {json}");
        }
    }
}

// contract: CLI check
#[test]
fn exit_codes_and_json() {
    let missing = check::outcome("none.yaml", config::load(Path::new("tests/none.yaml")), false);
    assert_eq!(missing.code, 2);
    assert!(missing.problems.starts_with("error: cannot read tests/none.yaml"), "{missing:?}");
    let json = check::outcome("models.yaml", parse_with("models: { m: 1 }\n", &[]), true);
    assert_eq!((json.code, json.problems.as_str()), (1, ""));
    let value: serde_json::Value = serde_json::from_str(&json.result).expect("json");
    assert_eq!(value["ok"], false);
    assert_eq!(value["errors"][0]["path"], "models.m");
    assert_eq!(
        (value["errors"][0]["line"].as_u64(), value["errors"][0]["column"].as_u64()),
        (Some(1), Some(14))
    );
}

mod mutations {
    use proptest::prelude::*;

    use super::{EXAMPLE, parse_with};

    const EVERYTHING: &str = include_str!("config/everything.yaml");

    /// Pieces that mean something to YAML or to us.
    const PIECES: [&str; 28] = [
        ":",
        " ",
        "\n",
        "\t",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "\"",
        "'",
        "${",
        "}",
        "$$",
        "&a ",
        "*a",
        "<<: *a",
        "| ",
        "!!str ",
        "#",
        "---\n",
        "0",
        "-1",
        "99999999999999999999",
        "\u{feff}",
        "é",
        "null",
        "1e309",
    ];

    fn mutate(text: &str, at: usize, cut: usize, piece: &str) -> String {
        let chars: Vec<char> = text.chars().collect();
        let at = at % (chars.len() + 1);
        let end = (at + cut).min(chars.len());
        chars[..at].iter().chain(&piece.chars().collect::<Vec<_>>()).chain(&chars[end..]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever happens to a file, it is either right or refused with a place that exists.
        #[test]
        fn any_mutation_is_answered(
            everything: bool,
            edits in prop::collection::vec((any::<usize>(), 0..40_usize, 0..PIECES.len()), 1..6),
        ) {
            let mut text = if everything { EVERYTHING } else { EXAMPLE }.to_owned();
            for (at, cut, piece) in edits {
                text = mutate(&text, at, cut, PIECES[piece]);
            }
            match parse_with(&text, &[("WHARF_KEY", "k"), ("GPU2", "g"), ("HF_TOKEN", "h"), ("PROBE_KEY", "p"), ("REGISTRY_KEY", "r")]) {
                Ok(loaded) => prop_assert!(!loaded.catalog.models.is_empty()),
                Err(errors) => {
                    prop_assert!(!errors.problems().is_empty());
                    let shown = errors.to_string();
                    prop_assert!(shown.contains("error"));
                    let lines = text.lines().count() as u32;
                    for problem in errors.problems() {
                        prop_assert!(problem.place.line <= lines + 1, "{}", shown);
                    }
                }
            }
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,200}") {
            let _ = parse_with(&text, &[]).map_err(|errors| errors.to_string());
        }
    }
}
