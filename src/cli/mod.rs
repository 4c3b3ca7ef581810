//! One file per subcommand; `client` is what those share that talk to a running Wharf.

pub mod client;
pub mod ensure;
pub mod load;
pub mod status;
pub mod swaps;
pub mod unload;
