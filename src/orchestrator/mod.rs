//! The one owner of the scheduler, and what it hands to everyone else.
//!
//! `run` is the loop, `perform` what it does with each action, `keep` the time of day, `effects` the
//! work that happens outside it, `docker` what it does when Docker comes and goes, `handle` and
//! `gate` what the gateway holds, `view` what everyone may read, `news` what is told of its changes.

mod adapter_asks;
pub mod adapters;
mod docker;
mod effects;
pub mod gate;
pub mod handle;
mod journal;
mod keep;
mod launch;
mod leftovers;
mod memory_watch;
mod news;
mod ollama;
mod outage;
mod peers;
mod perform;
pub mod preload;
mod prepare;
mod publish;
mod puppet;
mod ram_watch;
mod reconcile;
mod remember;
mod run;
mod start;
mod state_dir;
mod state_writer;
pub mod view;
mod vouch;

pub use gate::{Gate, Lease, StartKind};
pub use handle::{Handle, RequestOptions, Waiting};
pub use peers::discover as discover_peers;
pub use start::{StartError, start};
pub use view::View;
