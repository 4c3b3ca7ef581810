//! Which GPUs are chosen.
