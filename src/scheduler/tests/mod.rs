//! What users rely on, told with a small scripted machine.

mod config;
mod control;
mod fairness;
mod faults;
mod groups;
mod look;
mod overload;
mod priority;
mod ram;
mod random;
mod reload;
mod sleepers;
mod stay;
mod swaps;
mod world;
