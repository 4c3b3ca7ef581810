//! Patches and registered models over models.yaml: the same checks, named as what they are.

use std::time::Duration;

use serde_json::{Value, json};
use wharf::config::{ConfigErrors, Loaded, Overlay, Severity, parse_around, parse_over};
use wharf::store::Registration;
use wharf::units::{ModelName, Priority};

const FILE: &str = "\
swap: { max_wait: 30s }
defaults: { ttl: 20m }
registration: { templates: [chat] }
templates:
  chat: { engine: openai, gpus: 0, process: { cmd: \"engine --name ${model} --port ${PORT}\" } }
  private: { engine: openai, gpus: 0, process: { cmd: \"other --port ${PORT}\" } }
models:
  a.b: { engine: openai, gpus: 0, process: { cmd: \"engine --port ${PORT}\" }, aliases: [gpt] }
";

fn overlay(patches: &[(&str, Value)], registered: &[Registration]) -> Overlay {
    let patches = patches.iter().map(|(path, value)| ((*path).to_owned(), value.clone()));
    Overlay { patches: patches.collect(), registered: registered.to_vec() }
}

fn model(name: &str) -> Registration {
    Registration { model_id: name.to_owned(), ..Registration::default() }
}

fn strict(file: &str, overlay: &Overlay) -> Result<Loaded, ConfigErrors> {
    parse_over(file, "models.yaml", overlay, &|name| (name == "SECRET").then(|| "s3cret".into()))
}

#[test]
fn patches_outrank_the_file_and_the_environment_outranks_patches() {
    let patches = [
        ("swap.max_wait", json!("60s")),
        ("swap.max_concurrent_models", json!(3)),
        ("swap.mode", json!("single-active")),
        ("models.a.b.ttl", json!("5m")),
        ("models.a.b.priority", json!("high")),
        ("defaults.ttl_bounds.max", json!("40m")),
    ];
    let env = |name: &str| (name == "SWAPPER_MODE").then(|| "multi-active".to_owned());
    let loaded = parse_over(FILE, "models.yaml", &overlay(&patches, &[]), &env).unwrap();
    let swap = &loaded.catalog.settings.swap;
    assert_eq!(swap.max_wait, Some(Duration::from_secs(60)));
    assert_eq!(swap.max_concurrent_models, 3);
    assert_eq!(swap.mode, wharf::config::catalog::SwapMode::MultiActive, "the environment");
    let spec = &loaded.catalog.models["a.b"];
    assert_eq!((spec.ttl, spec.priority), (Some(Duration::from_secs(300)), Priority::High));
    assert_eq!(spec.ttl_bounds.max, Some(Duration::from_secs(2400)), "of defaults");
    assert!(loaded.in_file.contains("swap.max_wait") && loaded.in_file.contains("defaults.ttl"));
}

#[test]
fn a_registered_model_is_its_template_with_its_own_words() {
    let registration = Registration {
        model_id: "qwen2.5-coder:7b".to_owned(),
        display_name: Some("Qwen".to_owned()),
        model_type: Some("code".to_owned()),
        ttl_minutes: Some(7.5),
        priority: Some("medium".to_owned()),
        tags: vec!["fast".to_owned()],
        ..Registration::default()
    };
    let loaded = strict(FILE, &overlay(&[], &[registration, model("warm/one")])).unwrap();
    let spec = &loaded.catalog.models["qwen2.5-coder:7b"];
    assert!(spec.registered && !loaded.catalog.models["a.b"].registered);
    assert_eq!(spec.ttl, Some(Duration::from_secs(450)));
    assert_eq!((spec.display_name.as_deref(), spec.model_type.as_str()), (Some("Qwen"), "code"));
    let wharf::config::catalog::RuntimeSpec::Process(process) = &spec.runtime else { panic!() };
    assert_eq!(process.argv[..3], ["engine", "--name", "qwen2.5-coder:7b"]);
    let default = loaded.catalog.models["warm/one"].ttl;
    assert_eq!(default, Some(Duration::from_secs(1200)), "nothing said: the default");
}

/// Each is refused, named as what it is, and what is wrong is said.
#[test]
fn what_does_not_fit_is_named_as_patch_or_registered_model() {
    let patch = |path: &str, value: Value| overlay(&[(path, value)], &[]);
    let register = |registration: Registration| overlay(&[], &[registration]);
    let with =
        |template: &str| Registration { template: Some(template.to_owned()), ..model("new") };
    let cases = [
        (patch("swap.max_wait", json!("soon")), "patch: swap.max_wait", "duration"),
        (patch("swap.max_wait", json!(60)), "patch: swap.max_wait", "did you mean `60s`"),
        (patch("swap.max_wait", json!({ "a": 1 })), "patch: swap.max_wait", "mapping"),
        (patch("queue.limit", json!(-1)), "patch: queue.limit", "whole number"),
        (patch("models.a.b.pinned", json!("yes")), "patch: models.a.b.pinned", "true"),
        (patch("models.nobody.ttl", json!("5m")), "patch: models.nobody.ttl", "no model"),
        (patch("models.gpt.ttl", json!("5m")), "patch: models.gpt.ttl", "no model"),
        (patch("models.a.b.keep", json!(["${env.SECRET}"])), "patch: models.a.b.keep", "macros"),
        (patch("listen.gateway", json!("0.0.0.0:1")), "patch: listen.gateway", "swap.mode"),
        (
            patch("models.a.b.process.cmd", json!("x")),
            "patch: models.a.b.process.cmd",
            "be patched",
        ),
        (register(with("private")), "registered model new", "allowed are `chat`"),
        (register(with("nope")), "registered model new", "allowed are `chat`"),
        (register(model("a.b")), "registered model a.b", "models.yaml has a model"),
        (register(model("gpt")), "registered model gpt", "gpt"),
        (register(model("--trust-remote-code")), "registered model --trust-remote-code", "option"),
        (register(model("a b")), "registered model a b", "contains"),
        (register(model("../../etc")), "registered model ../../etc", "URL"),
        (register(model("x/load")), "registered model x/load", "verb"),
        (register(model("${env.SECRET}")), "registered model ${env.SECRET}", "macros"),
        (
            register(Registration { display_name: Some("${env.SECRET}".into()), ..model("new") }),
            "registered model new",
            "macros",
        ),
        (
            register(Registration { priority: Some("urgent".into()), ..model("new") }),
            "registered model new: priority",
            "high",
        ),
        (
            register(Registration { ttl_minutes: Some(-1.0), ..model("new") }),
            "registered model new",
            "time to live",
        ),
    ];
    for (overlay, path, said) in cases {
        let errors = strict(FILE, &overlay).expect_err(path);
        let wrong: Vec<_> =
            errors.problems().iter().filter(|p| p.severity == Severity::Error).collect();
        let named = wrong.iter().find(|problem| problem.path == path);
        let named = named.unwrap_or_else(|| panic!("{path}: {errors}\n{wrong:#?}"));
        assert!(named.in_a_line().contains(said), "{path}: {}", named.in_a_line());
        assert!(!errors.to_string().contains("s3cret"), "{errors}");
        // Stored, it keeps nothing from starting.
        let loaded = parse_around(FILE, "models.yaml", &overlay, &|_| None).unwrap();
        assert_eq!(loaded.left_out.len(), 1, "{path}");
        assert!(path.starts_with(&loaded.left_out[0].what), "{path}: {:?}", loaded.left_out);
        let told = loaded.warnings.iter().any(|p| p.message.contains("is left out"));
        assert!(told && loaded.catalog.models.len() == 1, "{path}");
    }
}

#[test]
fn one_that_does_not_fit_leaves_the_others_in_force() {
    let all = overlay(
        &[
            ("models.gone.ttl", json!("5m")),
            ("models.new.ttl", json!("6m")),
            ("swap.max_wait", json!("60s")),
        ],
        &[model("a.b"), model("new")],
    );
    let loaded = parse_around(FILE, "models.yaml", &all, &|_| None).unwrap();
    let left: Vec<&str> = loaded.left_out.iter().map(|left| left.what.as_str()).collect();
    assert_eq!(left, ["registered model a.b", "patch: models.gone.ttl"]);
    assert_eq!(loaded.catalog.settings.swap.max_wait, Some(Duration::from_secs(60)));
    let new = loaded.catalog.model(&ModelName::new("new")).unwrap();
    assert_eq!(new.ttl, Some(Duration::from_secs(360)), "a patch of a registered model");
}

#[test]
fn a_file_that_is_wrong_is_wrong_whatever_lies_over_it() {
    let broken = FILE.replace("swap:", "swpa:");
    let errors = parse_around(&broken, "models.yaml", &overlay(&[], &[model("new")]), &|_| None)
        .unwrap_err();
    assert!(errors.problems().iter().any(|problem| problem.place.line == 1), "{errors}");
}
