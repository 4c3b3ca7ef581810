//! What the program says of itself.

use std::process::Command;

const EXE: &str = env!("CARGO_BIN_EXE_wharf");

fn help(args: &[&str]) -> String {
    let output = Command::new(EXE).args(args).arg("--help").output().expect("it runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Commands as the overview lists them.
fn commands() -> Vec<String> {
    let overview = help(&[]);
    let list = overview.lines().skip_while(|line| *line != "Commands:").skip(1);
    let list = list.take_while(|line| !line.is_empty());
    // Descriptions go on in further lines, deeper.
    let named = list.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = named.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

// contract: CLI --help with an example, --json
#[test]
fn every_command_shows_an_example_and_those_that_print_data_take_json() {
    let commands = commands();
    assert!(commands.len() >= 10, "{commands:?}");
    for command in &commands {
        let text = help(&[command]);
        assert!(text.contains("Example"), "wharf {command} --help has no example:\n{text}");
        assert!(text.contains(&format!("wharf {command}")), "{command}");
    }
    for command in ["check", "status", "ensure", "load", "unload", "swaps", "top", "doctor"] {
        assert!(help(&[command]).contains("--json"), "wharf {command} has no --json");
        assert!(help(&[command]).contains("Exit codes"), "wharf {command}: exit codes");
    }
}
