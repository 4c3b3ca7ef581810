//! The seeded faults of `tests/mutants` can still be planted: `make mutants` plants them and asks
//! whether a test notices. (A fault whose old text is gone says nothing; when the scheduler
//! changes there, its file is to be brought up to date.)

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const FAULTS_MIN: usize = 12;

struct Fault {
    name: String,
    file: PathBuf,
    breaks: String,
    old: String,
    new: String,
}

/// `file: PATH`, `breaks: WORDS`, `--- old`, its text, `--- new`, its text.
fn read(path: &Path) -> Option<Fault> {
    let text = fs::read_to_string(path).ok()?;
    let (head, rest) = text.split_once("--- old\n")?;
    let (old, new) = rest.split_once("\n--- new\n")?;
    let field = |key: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(key));
        line.map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    };
    Some(Fault {
        name: path.file_stem()?.to_string_lossy().into_owned(),
        file: PathBuf::from(field("file:")?),
        breaks: field("breaks:")?,
        old: old.to_owned(),
        new: new.trim_end_matches('\n').to_owned(),
    })
}

#[test]
fn every_seeded_fault_can_be_planted() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(root.join("tests/mutants/faults")).expect("the faults") {
        let path = entry.expect("a readable folder").path();
        let Some(fault) = read(&path) else {
            problems.push(format!("{}: not in the format of the others", path.display()));
            continue;
        };
        let name = &fault.name;
        let source = fs::read_to_string(root.join(&fault.file)).unwrap_or_default();
        let times = source.matches(fault.old.trim_end_matches('\n')).count();
        if times != 1 {
            let file = fault.file.display();
            problems.push(format!("{name}: its old text is {times} times in {file}, not once"));
        }
        if fault.old == fault.new || !fault.file.starts_with("src/scheduler") {
            problems.push(format!("{name}: changes nothing, or not the scheduler"));
        }
        if !seen.insert(fault.breaks) {
            problems.push(format!("{name}: breaks the same as another"));
        }
    }
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
    assert!(seen.len() >= FAULTS_MIN, "only {} faults", seen.len());
}
