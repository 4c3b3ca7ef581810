//! See design: filled in by its own files.

pub mod pull;
