//! `wharf import`: what comes out of other tools' files, what is said of the rest, and that Wharf
//! takes and serves the result.

mod support;

use std::path::Path;

use wharf::cli::check;
use wharf::config;
use wharf::config::import::{Imported, Source, convert};

fn source(file: &str) -> Source {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import").join(file);
    Source { file: file.to_owned(), text: std::fs::read_to_string(path).unwrap() }
}

fn import(files: &[&str]) -> Imported {
    let sources: Vec<Source> = files.iter().map(|file| source(file)).collect();
    convert(&sources).unwrap_or_else(|error| panic!("{error}"))
}

/// The result, the report, and what `wharf check` says of it.
fn all_of(imported: &Imported) -> String {
    let env = |name: &str| match name {
        "CLIENT_KEY" | "OPENROUTER_API_KEY" => Some(format!("value-of-{name}")),
        _ => None,
    };
    let loaded = config::parse(&imported.yaml, "models.yaml", &env);
    let outcome = check::outcome("models.yaml", loaded, false);
    assert_eq!(outcome.code, 0, "{}\n{}", imported.yaml, outcome.problems);
    let notes: Vec<String> = imported.notes.iter().map(ToString::to_string).collect();
    format!(
        "{}\n=== {}\n{}\n=== {}\n{}",
        imported.yaml,
        imported.tool,
        notes.join("\n"),
        outcome.result,
        outcome.problems
    )
}

macro_rules! imports {
    ($($name:ident: $files:expr;)*) => {$(
        #[test]
        fn $name() {
            insta::assert_snapshot!(stringify!($name), all_of(&import(&$files)));
        }
    )*};
}

imports! {
    llama_swap_profiles: ["llama-swap-profiles.yaml"];
    llama_swap_one_port: ["llama-swap-one-port.yaml"];
    llama_swap_groups: ["llama-swap-groups.yaml"];
    llama_swap_matrix: ["llama-swap-matrix.yaml"];
    swapper: ["swapper_config.yaml"];
    pool: ["model_pool_config.json", "model_pool_registry.json"];
    pool_config_alone: ["model_pool_config.json"];
    pool_registry_alone: ["model_pool_registry.json"];
    compose: ["docker-compose.yml"];
}

#[test]
fn the_order_of_the_pools_files_does_not_matter() {
    let one = import(&["model_pool_config.json", "model_pool_registry.json"]);
    let other = import(&["model_pool_registry.json", "model_pool_config.json"]);
    let body = |imported: &Imported| imported.yaml.split_once("\n\n").unwrap().1.to_owned();
    assert_eq!(body(&one), body(&other));
}

#[test]
fn what_is_no_known_file_is_refused() {
    let text = |text: &str| Source { file: "x.yaml".to_owned(), text: text.to_owned() };
    let said = |sources: &[Source]| convert(sources).unwrap_err().to_string();
    assert!(said(&[text("a: 1")]).contains("no configuration of a known tool"));
    assert!(said(&[text("models: { a: { engine: vllm } }")]).contains("known tool"), "our own");
    assert!(said(&[text("a: [1")]).contains("x.yaml:1: this `[` is never closed"));
    assert!(said(&[text("swapper: {}")]).contains("no model"));
    let mixed = [source("swapper_config.yaml"), source("model_pool_config.json")];
    assert!(said(&mixed).contains("different tools"));
    let both = [source("swapper_config.yaml"), source("swapper_config.yaml")];
    assert!(said(&both).contains("one by one"));
}
