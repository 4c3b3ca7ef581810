//! One file per subcommand.

pub mod engine;
