//! Wharf: run more models than your GPUs can hold. Modules in reading order.

pub mod units;

pub mod config;
pub mod replay;
pub mod scheduler;

pub mod engine;
pub mod gpu;
pub mod http1;
pub mod runtime;
pub mod upstream;

pub mod orchestrator;

pub mod announce;
pub mod api;
pub mod gateway;
pub mod markup;
pub mod reload;
pub mod store;
pub mod telemetry;

pub mod app;
pub mod cli;
pub mod standin;
