//! Flags → subcommand → exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    wharf::cli::main()
}
