//! What users rely on, told with a small scripted machine.

mod config;
mod random;
mod swaps;
mod world;
