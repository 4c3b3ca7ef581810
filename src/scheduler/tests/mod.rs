//! What users rely on, told with a small scripted machine.

mod swaps;
mod world;
