//! The contract as a table: each row of docs/contract.md, and the tests that prove it.
//!
//! A test says which rows it proves in comments directly above it: `// contract: POST /ensure_model`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const MARKER: &str = "// contract: ";

/// Names in braces do not count: `/models/{name}` and `/models/{id}` are one row.
fn normal(row: &str) -> String {
    // `ports 8051–8099: …` says what is on them.
    let row = row.split(": ").next().unwrap_or_default();
    let mut normal = String::new();
    let mut depth = 0;
    for c in row.trim().chars() {
        match c {
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                normal.push_str("{}");
            }
            c if depth == 0 => normal.push(c),
            _ => {}
        }
    }
    let (kind, what) = normal.split_once(' ').unwrap_or((&normal, ""));
    // A query is no part of a path.
    let what = what.split('?').next().unwrap_or_default();
    format!("{} {}", kind.to_uppercase(), what.trim())
}

struct Row {
    text: String,
    /// What is not built yet, where the row's last cell says `later: …`.
    later: Option<String>,
}

/// Rows of the document, in its order.
fn rows() -> Vec<Row> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/contract.md");
    let text = fs::read_to_string(path).expect("docs/contract.md");
    text.lines().filter_map(row).collect()
}

fn row(line: &str) -> Option<Row> {
    let text = line.strip_prefix("| `")?.split('`').next()?.to_owned();
    let last = line.trim_end_matches(['|', ' ']).rsplit('|').next()?.trim();
    Some(Row { text, later: last.starts_with("later: ").then(|| last.to_owned()) })
}

/// Row → tests (`file::name`), and what is wrong with markers.
fn proofs() -> (BTreeMap<String, Vec<String>>, Vec<String>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut proofs, mut problems) = (BTreeMap::<String, Vec<String>>::new(), Vec::new());
    let mut files = Vec::new();
    for folder in ["src", "tests"] {
        sources(&root.join(folder), &mut files);
    }
    for file in files.iter().filter(|file| !file.ends_with("tests/contract.rs")) {
        let shown = file.strip_prefix(root).expect("in the project").display().to_string();
        let text = fs::read_to_string(file).expect("a source");
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (at, line) in lines.iter().enumerate() {
            let Some(row) = line.strip_prefix(MARKER) else { continue };
            match test_below(&lines[at..]) {
                Some(test) => {
                    proofs.entry(normal(row)).or_default().push(format!("{shown}::{test}"));
                }
                None => problems.push(format!("{shown}:{}: no test below `{row}`", at + 1)),
            }
        }
    }
    (proofs, problems)
}

/// The function behind comments and attributes, if one of these says that it is a test.
fn test_below<'a>(lines: &[&'a str]) -> Option<&'a str> {
    let mut is_test = false;
    for line in lines {
        is_test |= line.starts_with("#[test]") || line.contains("::test");
        let code = line.strip_prefix("async ").unwrap_or(line);
        if let Some(name) = code.strip_prefix("fn ") {
            return is_test.then(|| name.split(['(', '<']).next().unwrap_or(name));
        }
        if !(line.starts_with("//")
            || line.starts_with('#')
            || line.starts_with("reason")
            || line.starts_with(')')
            || line.is_empty())
        {
            return None;
        }
    }
    None
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            found.push(path);
        }
    }
    found.sort();
}

#[test]
fn every_row_of_the_contract_has_a_test() {
    let (proofs, mut problems) = proofs();
    let rows = rows();
    let (mut proven, mut missing, mut later) = (0, 0, 0);
    for Row { text, later: planned } in &rows {
        let proof = match (proofs.get(&normal(text)), planned) {
            (Some(tests), None) => {
                proven += 1;
                tests.join(", ")
            }
            (None, Some(planned)) => {
                later += 1;
                planned.clone()
            }
            (Some(_), Some(planned)) => {
                problems.push(format!("{text} has a test: take `{planned}` out of its row"));
                "PROVEN AND LATER".to_owned()
            }
            (None, None) => {
                missing += 1;
                problems.push(format!("no test proves {text}"));
                "MISSING".to_owned()
            }
        };
        println!("{text:<55} {proof}");
    }
    let known: Vec<String> = rows.iter().map(|row| normal(&row.text)).collect();
    for (row, tests) in proofs.iter().filter(|(row, _)| !known.contains(row)) {
        problems.push(format!("{}: docs/contract.md has no row {row}", tests.join(", ")));
    }
    println!("\n{} rows: {proven} proven, {missing} without a test, {later} later", rows.len());
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn markers_stand_above_tests_and_rows_are_said_once() {
    let (proofs, problems) = proofs();
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
    assert!(proofs.len() > 50, "the scan sees the markers: {}", proofs.len());
    let mut rows: Vec<String> = rows().iter().map(|row| normal(&row.text)).collect();
    let all = rows.len();
    rows.sort();
    rows.dedup();
    assert_eq!(rows.len(), all, "a row stands twice");
}

#[test]
fn the_ways_to_write_one_row_mean_the_same() {
    assert_eq!(normal("post /models/{id}/extend-ttl"), "POST /models/{}/extend-ttl");
    assert_eq!(normal("GET /models/{name}"), normal("GET /models/{model…}"));
    assert_eq!(normal("any /upstream/{model}/{path…}"), "ANY /upstream/{}/{}");
    assert_eq!(normal("ports 8051–8099: `GET /health`"), normal("ports 8051–8099"));
    assert_eq!(normal("GET /api/performance?after=RFC3339"), "GET /api/performance");
    let planned = row("| `CLI replay` | later: wharf replay |").expect("a row");
    assert_eq!(
        (planned.text.as_str(), planned.later.as_deref()),
        ("CLI replay", Some("later: wharf replay"))
    );
    assert!(row("| `GET /later: x` | both | Wharf |").expect("a row").later.is_none());
    assert!(row("|---|---|").is_none());
    let test = ["// contract: X", "/// Why.", "#[tokio::test]", "async fn it_works() {"];
    assert_eq!(test_below(&test), Some("it_works"));
    assert_eq!(test_below(&["// contract: X", "fn helper() {"]), None);
    assert_eq!(test_below(&["// contract: X", "let x = 1;", "#[test]", "fn a() {"]), None);
}
