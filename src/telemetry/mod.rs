//! Metrics, logs, news of what happens, load of the machine.
pub mod feed;
pub mod log;
pub mod logs;
pub mod metrics;
pub mod performance;
mod scrape;
