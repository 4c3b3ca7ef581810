//! `wharf schema`: what is committed is up to date, and a validator agrees with the reader.

mod support;

use std::path::Path;

use wharf::config::schema;

/// Run with WHARF_UPDATE=1 to write it.
fn is_up_to_date(file: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    if std::env::var_os("WHARF_UPDATE").is_some() {
        std::fs::write(&path, made).expect("docs can be written");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == made, "{file} is out of date: WHARF_UPDATE=1 cargo test --test schema");
}

// contract: CONFIG every key
#[test]
fn the_schema_and_the_page_in_docs_are_up_to_date() {
    is_up_to_date("docs/wharf.schema.json", &schema::json_schema());
    is_up_to_date("docs/configuration.md", &schema::markdown());
    let example = include_str!("../models.yaml");
    assert!(example.starts_with("# yaml-language-server: $schema=docs/wharf.schema.json\n"));
}

// contract: CLI schema
#[test]
fn the_command_prints_the_schema_or_its_page() {
    let run = |args: &[&str]| {
        let output = std::process::Command::new(support::EXE).arg("schema").args(args).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let printed: serde_json::Value = serde_json::from_str(&run(&[])).unwrap();
    assert_eq!(printed["$schema"], "https://json-schema.org/draft/2020-12/schema");
    for key in ["models", "templates", "groups", "auth", "captures", "announce"] {
        assert!(printed["properties"][key]["description"].is_string(), "{key}");
    }
    assert!(run(&["--format", "markdown"]).contains("| `swap.max_wait` |"));
}

/// Files that `wharf check` takes are valid; files with unknown keys or wrong values are not.
#[test]
fn a_json_schema_validator_agrees_with_the_reader() {
    let Ok(python) = std::env::var("WHARF_TEST_PYTHON") else {
        support::skip("JSON Schema validator: WHARF_TEST_PYTHON is not set");
        return;
    };
    let right = ["models.yaml", "tests/config/everything.yaml"];
    let wrong = [
        "tests/config/01-unknown-keys.yaml",
        "tests/config/02-wrong-values.yaml",
        "tests/config/09-other-tools.yaml",
        "tests/config/10-secrets.yaml",
        "tests/config/15-access.yaml",
        "tests/config/16-adapters-and-traffic.yaml",
    ];
    let output = std::process::Command::new(python)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["tests/support/validate.py", "docs/wharf.schema.json"])
        .args(right.iter().chain(&wrong))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in right {
        assert!(said.contains(&format!("{file}: ok\n")), "{file} must be valid:\n{said}");
    }
    for file in wrong {
        assert!(!said.contains(&format!("{file}: ok\n")), "{file} must not be valid:\n{said}");
    }
    for key in
        ["listen.*'gatway'", "models.mistral.docker.*'imgae'", "models.mistral.*'temperature'"]
    {
        let (path, name) = key.split_once('*').unwrap();
        let told = said.lines().any(|line| {
            line.contains(&format!(": {}", path.trim_end_matches('.'))) && line.contains(name)
        });
        assert!(told, "{key}:\n{said}");
    }
}
