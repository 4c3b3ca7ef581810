//! Scripted traps.
