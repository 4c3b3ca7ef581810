//! What users rely on, told with a small scripted machine.

mod config;
mod control;
mod fairness;
mod faults;
mod fingerprint;
mod footprint;
mod groups;
mod host_use;
mod look;
mod overload;
mod placement;
mod priority;
mod ram;
mod random;
mod reload;
mod sleepers;
mod stay;
mod swaps;
mod turns;
mod world;
