//! What users rely on, told with a small scripted machine.

mod config;
mod control;
mod fairness;
mod faults;
mod look;
mod random;
mod reload;
mod swaps;
mod world;
