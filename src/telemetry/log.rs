//! The log: one line per event on stderr.

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, fmt};

use super::logs::{Logs, OwnLog};

/// Environment variables that set the filter, the first one set wins.
pub const FILTER_VARIABLES: [&str; 2] = ["WHARF_LOG", "RUST_LOG"];

/// Sends log lines to stderr, and to what `GET /logs` shows. `WHARF_LOG` or `RUST_LOG` sets the filter (`debug`,
/// `wharf::gateway=trace,info`, …), else `info`. A second call changes nothing.
pub fn init() {
    let wanted = FILTER_VARIABLES.iter().find_map(|variable| std::env::var(variable).ok());
    let (filter, bad) = filter(wanted.as_deref().unwrap_or_default());
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr())
        && std::env::var_os("NO_COLOR").is_none();
    let own = OwnLog(Logs::of_this_process());
    let begun = tracing_subscriber::registry()
        .with(filter)
        .with(fmt::layer().with_writer(std::io::stderr).with_ansi(ansi).with_target(false))
        .with(fmt::layer().with_writer(own).with_ansi(false).with_target(false))
        .try_init();
    if let (Ok(()), Some(error)) = (begun, bad) {
        tracing::warn!(%error, "the log filter is not valid and was not used");
    }
}

/// The filter of a specification, and what was wrong with it.
fn filter(wanted: &str) -> (EnvFilter, Option<String>) {
    let parsed =
        EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).parse(wanted);
    let (filter, bad) = match parsed {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error.to_string())),
    };
    // Its debug log prints the environment of containers, secrets included.
    let quiet = "bollard=info".parse().expect("a constant directive");
    (filter.add_directive(quiet), bad)
}

#[cfg(test)]
mod tests {
    use super::filter;

    #[test]
    fn bollard_never_logs_environments() {
        for wanted in ["", "debug", "bollard=trace", "wharf=trace,bollard=debug"] {
            let (filter, bad) = filter(wanted);
            let text = filter.to_string();
            assert!(text.contains("bollard=info"), "{wanted}: {text}");
            assert!(!text.contains("bollard=trace") && !text.contains("bollard=debug"), "{text}");
            assert_eq!(bad, None);
        }
    }

    #[test]
    fn a_bad_filter_is_reported_and_replaced() {
        let (filter, bad) = filter("wharf=loud");
        assert!(filter.to_string().contains("info"));
        assert!(bad.is_some());
    }
}
