//! What Wharf knows about engines: their arguments, their readiness, their sleep.

#[path = "engine/args.rs"]
mod args;
#[path = "support/model.rs"]
mod model_support;
#[path = "support/ports.rs"]
mod ports;
#[path = "engine/processes.rs"]
mod processes;
#[path = "engine/ready.rs"]
mod ready;
#[path = "engine/sleep.rs"]
mod sleep;
#[path = "engine/world.rs"]
mod world;
