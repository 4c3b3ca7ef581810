//! House rules that no compiler checks, by plain scanning of the sources.
//!
//! Size: no file over 500 lines, no function over 100 (aim: 400 and 70). Purity: `scheduler/`
//! imports nothing but `units`, `config::catalog`, itself, and quiet parts of `std`; no clock, no
//! thread, no randomness, no log, no hash order. Words: nothing unfinished, nothing silenced.

use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 100;

/// Unfinished work and silenced lints. Split, so that this file does not find itself.
const BANNED_EVERYWHERE: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("#[al", "low("), concat!("#![al", "low(")];

/// Words that would make the scheduler depend on more than its events.
const BANNED_IN_SCHEDULER: [&str; 20] = [
    "HashMap",
    "HashSet",
    "tokio",
    "async ",
    ".await",
    "Instant",
    "SystemTime",
    "std::time::{",
    "std::thread",
    "std::sync::{",
    "Mutex",
    "RwLock",
    "Atomic",
    "mpsc",
    "tracing",
    "rand::",
    "println!",
    "eprintln!",
    "std::fs",
    "std::net",
];

/// What `use` (and full paths) in the scheduler may begin with.
const ALLOWED_IN_SCHEDULER: [&str; 14] = [
    "std::collections::",
    "std::sync::Arc",
    "std::time::Duration",
    "std::cmp::",
    "std::fmt",
    // Its keys are fixed: the same state, the same digest.
    "std::hash::Hasher",
    "std::mem",
    "std::ops::",
    "serde::{Deserialize, Serialize}",
    "super::",
    "crate::units",
    "crate::config::catalog",
    "crate::scheduler",
    // Siblings declared in `scheduler/mod.rs` itself.
    "self::",
];

const SCHEDULER_SIBLINGS: [&str; 10] = [
    "action::",
    "ask::",
    "event::",
    "memory::",
    "queue::",
    "record::",
    "residency::",
    "swap::",
    "quiet::",
    "table::",
];

struct Source {
    path: PathBuf,
    text: String,
}

fn sources(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("sources are UTF-8");
                found.push(Source { path, text });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// The part of a file that ships: up to its unit tests.
fn shipped(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

/// Files of `scheduler/` without its tests.
fn scheduler_sources() -> Vec<Source> {
    let mut list = sources("src/scheduler");
    list.retain(|s| !s.path.components().any(|c| c.as_os_str() == "tests"));
    assert!(list.len() > 10, "the scheduler has moved: tidy looks in the wrong place");
    list
}

/// Functions and how many lines each has, found by the indentation that rustfmt guarantees.
fn functions(text: &str) -> Vec<(String, usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let head = ["fn ", "async fn ", "const fn ", "unsafe fn ", "extern \"C\" fn "];
        let bare = code
            .strip_prefix("pub ")
            .or_else(|| code.strip_prefix("pub(").and_then(|c| Some(c.split_once(") ")?.1)))
            .unwrap_or(code);
        if !head.iter().any(|h| bare.starts_with(h)) || line.ends_with(';') {
            continue;
        }
        let close = format!("{}}}", " ".repeat(indent));
        let length = lines[at..].iter().position(|l| **l == *close).map_or(1, |n| n + 1);
        let name = bare.split_once("fn ").map_or(bare, |(_, rest)| rest);
        found.push((name.split(['(', '<']).next().unwrap_or(name).to_owned(), at + 1, length));
    }
    found
}

fn report(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn files_and_functions_stay_small() {
    let mut problems = Vec::new();
    for source in sources("src") {
        let lines = source.text.lines().count();
        if lines > FILE_LINES_MAX {
            problems.push(format!("{}: {lines} lines", source.path.display()));
        }
        for (name, line, length) in functions(&source.text) {
            if length > FUNCTION_LINES_MAX {
                let path = source.path.display();
                problems.push(format!("{path}:{line}: fn {name} has {length} lines"));
            }
        }
    }
    report(&problems);
}

#[test]
fn nothing_is_unfinished_or_silenced() {
    let mut problems = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")) {
        for (at, line) in source.text.lines().enumerate() {
            for word in BANNED_EVERYWHERE.iter().filter(|word| line.contains(**word)) {
                problems.push(format!("{}:{}: {word}", source.path.display(), at + 1));
            }
        }
    }
    report(&problems);
}

#[test]
fn the_scheduler_is_pure() {
    let mut problems = Vec::new();
    for source in scheduler_sources() {
        for (at, line) in shipped(&source.text).lines().enumerate() {
            if is_comment(line) {
                continue;
            }
            for word in BANNED_IN_SCHEDULER.iter().filter(|word| line.contains(**word)) {
                problems.push(format!("{}:{}: {word}", source.path.display(), at + 1));
            }
        }
    }
    report(&problems);
}

#[test]
fn the_scheduler_imports_only_units_and_the_catalog() {
    let mut problems = Vec::new();
    for source in scheduler_sources() {
        for (at, line) in shipped(&source.text).lines().enumerate() {
            let code = line.trim_start();
            let import = code
                .strip_prefix("use ")
                .or_else(|| code.strip_prefix("pub use "))
                .or_else(|| code.strip_prefix("pub(super) use "))
                .or_else(|| code.strip_prefix("pub(crate) use "));
            let allowed = |path: &str| {
                ALLOWED_IN_SCHEDULER.iter().any(|ok| path.starts_with(ok))
                    || SCHEDULER_SIBLINGS.iter().any(|ok| path.starts_with(ok))
                    || path.starts_with("drain::")
                    || path.starts_with("prove::")
            };
            let wrong = match import {
                Some(path) => !allowed(path),
                // Full paths in code: only the same two modules of the crate.
                None => code.match_indices("crate::").any(|(from, _)| {
                    !is_comment(code) && !allowed(&code[from..]) && !code[..from].ends_with("in ")
                }),
            };
            if wrong {
                problems.push(format!("{}:{}: {code}", source.path.display(), at + 1));
            }
        }
    }
    report(&problems);
}

#[test]
fn the_scan_for_functions_sees_them() {
    let text = "impl A {\n    pub(super) fn b<T>(&self) {\n        c();\n    }\n}\n\nfn d() {\n}\n";
    let names: Vec<(String, usize)> =
        functions(text).into_iter().map(|(name, _, length)| (name, length)).collect();
    assert_eq!(names, [("b".to_owned(), 3), ("d".to_owned(), 2)]);
}
