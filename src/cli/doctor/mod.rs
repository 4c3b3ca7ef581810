//! `wharf doctor`: what a person would look at first, each with its fix. Nothing is changed.

mod backends;
mod machine;
mod ports;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use serde_json::{Value, json};

use super::client::{Client, Connection, Failure, say, text};
use crate::app;
use crate::config::catalog::Catalog;
use crate::config::{self, ConfigErrors};

/// Something failed.
const SICK: u8 = 1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Looks at: the configuration, listeners and who holds their ports, keys, \
    front doors, engine ports,\nprograms, Docker (version, GPU runtime or CDI, named containers), \
    NVML and the GPUs, the store and its\ndisk, Ollama backends, external servers and peers, the \
    clock, and a running Wharf's own health.\nNothing is changed or started.\n\n\
    Examples:\n  wharf doctor\n  wharf doctor --config models.yaml\n  \
    wharf doctor --json | jq '.checks[] | select(.status != \"ok\")'\n\n\
    Exit codes: 0 nothing failed (warnings do not count), 1 something failed.")]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    /// Works, but a person should look.
    Warn,
    Fail,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub check: &'static str,
    pub status: Status,
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    fn ok(check: &'static str, detail: impl Into<String>) -> Check {
        Check { check, status: Status::Ok, detail: detail.into(), fix: None }
    }

    fn warn(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Check {
        Check { check, status: Status::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn fail(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Check {
        Check { status: Status::Fail, ..Check::warn(check, detail, fix) }
    }

    /// Of messages that name the fix themselves.
    fn failed(check: &'static str, detail: impl Into<String>) -> Check {
        Check { status: Status::Fail, ..Check::ok(check, detail) }
    }
}

pub async fn run(args: Args) -> ExitCode {
    let checks = examine(&args.connection).await;
    let count = |status| checks.iter().filter(|check| check.status == status).count();
    let (warnings, failures) = (count(Status::Warn), count(Status::Fail));
    if args.connection.json {
        let ok = failures == 0;
        let report = json!({
            "ok": ok, "warnings": warnings, "failures": failures, "checks": checks,
        });
        say(&format!("{report:#}"));
    } else {
        checks.iter().for_each(|check| say(&line(check)));
        let warnings = several(warnings, "warning");
        say(&format!("\n{} checks: {warnings}, {failures} failed", checks.len()));
    }
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::from(SICK) }
}

/// `1 model`, `2 models`
fn several(count: usize, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// `FAIL  listeners      … ` and the fix below it.
fn line(check: &Check) -> String {
    let status = match check.status {
        Status::Ok => "ok",
        Status::Warn => "warn",
        Status::Fail => "FAIL",
    };
    let mut line = format!("{status:<5} {:<14} {}", check.check, check.detail);
    if let Some(fix) = &check.fix {
        line.push_str(&format!("\n{:<21}→ {fix}", ""));
    }
    line
}

/// A Wharf that answers, with its own word about its health.
struct Running {
    health: Value,
}

/// Every check, in the order in which a person would go.
pub async fn examine(connection: &Connection) -> Vec<Check> {
    let path = config::path(connection.config.clone());
    let (catalog, mut checks) = configuration(&path);
    let running = match Client::new(connection) {
        Ok(client) => {
            let (running, found) = running(&client).await;
            checks.extend(found);
            running
        }
        Err(failure) => {
            let fix = "correct --url, WHARF_URL or WHARF_KEY_FILE";
            checks.push(Check::fail("wharf", failure.to_string(), fix));
            None
        }
    };
    // Without a configuration nothing is known of the rest but the machine itself.
    let known = catalog.is_some();
    let catalog = catalog.unwrap_or_default();
    if known {
        checks.extend(ports::listeners(&catalog.settings).await);
        checks.push(keys(&catalog));
        checks.extend(ports::front_doors(&catalog, running.as_ref()).await);
        checks.extend(ports::engines(&catalog, running.as_ref()).await);
        checks.extend(machine::programs(&catalog));
    }
    // Each may have to wait for somebody who does not answer.
    let (docker, gpus, backends, clock) = tokio::join!(
        machine::docker(&catalog),
        machine::gpus(&catalog),
        backends::all(&catalog),
        machine::clock(&catalog),
    );
    checks.extend(docker);
    checks.push(gpus);
    checks.extend(machine::store(&catalog.settings, running.as_ref()));
    checks.extend(backends);
    checks.push(clock);
    checks
}

/// The file as `wharf serve` would read it, with the addresses and store of the environment.
fn configuration(path: &Path) -> (Option<Catalog>, Vec<Check>) {
    const NAME: &str = "configuration";
    let file = path.display();
    match config::load(path) {
        Ok(loaded) => {
            let mut catalog = loaded.catalog;
            overlay(&mut catalog);
            let count = several(catalog.models.len(), "model");
            let check = match loaded.warnings.first() {
                None => Check::ok(NAME, format!("{file}: {count}")),
                Some(first) => Check::warn(
                    NAME,
                    format!("{file}: {count}; {}", first.in_a_line()),
                    format!("`wharf check --config {file}` shows every warning"),
                ),
            };
            (Some(catalog), vec![check])
        }
        Err(ConfigErrors::Unreadable { reason, .. }) => {
            let fix = "name it with --config or WHARF_CONFIG; `wharf import` makes one from another \
                       tool's, and `wharf demo` needs none";
            (None, vec![Check::fail(NAME, format!("{file} cannot be read: {reason}"), fix)])
        }
        Err(errors @ ConfigErrors::Invalid { .. }) => {
            let problems = errors.problems();
            let first = problems
                .first()
                .map(|problem| format!("; line {}: {}", problem.place.line, problem.in_a_line()));
            let count = several(problems.len(), "problem");
            let told = format!("{file} has {count}{}", first.unwrap_or_default());
            let fix = format!("`wharf check --config {file}` shows each at its place");
            (None, vec![Check::fail(NAME, told, fix)])
        }
    }
}

/// As the flags of `wharf serve`, which have these variables.
fn overlay(catalog: &mut Catalog) {
    let given = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let address = |name| given(name).and_then(|value| value.parse().ok());
    let settings = &mut catalog.settings;
    if let Some(gateway) = address("WHARF_GATEWAY") {
        settings.gateway = gateway;
    }
    if let Some(orchestrator) = address("WHARF_ORCHESTRATOR") {
        settings.orchestrator = orchestrator;
    }
    if let Some(store) = given("WHARF_STORE") {
        settings.store = PathBuf::from(store);
    }
}

/// Whether a Wharf serves, how it does, and whether it takes our key.
async fn running(client: &Client) -> (Option<Running>, Vec<Check>) {
    const NAME: &str = "wharf";
    let base = client.base();
    let health = match client.get("/health").await {
        Ok(health) => health,
        Err(Failure::Refused { body, .. }) if body["orchestrator"].is_object() => body,
        Err(Failure::Unreachable { .. }) => {
            let told = format!("none runs at {base}: only what lies around it can be looked at");
            return (None, vec![Check::ok(NAME, told)]);
        }
        Err(failure) => {
            let fix = "something else may listen there: name Wharf's orchestrator with --url";
            return (None, vec![Check::fail(NAME, failure.to_string(), fix)]);
        }
    };
    let parts = health.as_object().into_iter().flatten();
    let mut checks: Vec<Check> = parts
        .filter_map(|(part, of)| {
            let told = format!("{part} of the Wharf at {base}: {}", text(&of["detail"]));
            match of["status"].as_str()? {
                "failed" => Some(Check::failed(NAME, told)),
                "degraded" => Some(Check::warn(NAME, told, "see `wharf status` and its log")),
                _ => None,
            }
        })
        .collect();
    if checks.is_empty() {
        checks.push(Check::ok(NAME, format!("runs at {base} and is healthy")));
    }
    if let Err(Failure::Refused { status, message, .. }) = client.get("/status").await
        && matches!(status.as_u16(), 401 | 403)
    {
        let fix = "put a key with scope `read` or `admin` into WHARF_KEY, or its file's name into \
                   WHARF_KEY_FILE";
        checks.push(Check::warn("keys", format!("this command's key: {message}"), fix));
    }
    (Some(Running { health }), checks)
}

fn keys(catalog: &Catalog) -> Check {
    const NAME: &str = "keys";
    let settings = &catalog.settings;
    let auth = &settings.auth;
    if let Err(error) = app::refuse_open_control(settings.orchestrator, catalog) {
        return Check::failed(NAME, error.to_string());
    }
    let open: Vec<String> = [settings.gateway, settings.orchestrator]
        .iter()
        .filter(|address| !address.ip().is_loopback())
        .map(ToString::to_string)
        .collect();
    match (auth.keys.is_empty(), open.is_empty()) {
        (true, false) => Check::warn(
            NAME,
            format!("none, and everyone who reaches {} may use it", open.join(" and ")),
            "add `auth.keys`, or listen on 127.0.0.1",
        ),
        (true, true) => Check::ok(NAME, "none: only this machine's users can reach the ports"),
        (false, _) => Check::ok(NAME, format!("{} configured", auth.keys.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(yaml: &str) -> Catalog {
        let models = "models: { ada: { engine: openai, process: { cmd: x }, port: 9001 } }\n";
        config::parse(&format!("{yaml}\n{models}"), "models.yaml", &|_| None).unwrap().catalog
    }

    #[test]
    fn an_open_gateway_is_a_warning_and_an_open_control_port_a_failure() {
        let status = |yaml: &str| keys(&catalog(yaml)).status;
        assert_eq!(status(""), Status::Ok);
        assert_eq!(status("listen: { gateway: 0.0.0.0:8080 }"), Status::Warn);
        assert_eq!(status("listen: { orchestrator: 0.0.0.0:8888 }"), Status::Fail);
        let keyed = "auth: { keys: [{ name: a, key: s3cret-s3cret-s3cret, scopes: [admin] }] }";
        assert_eq!(
            status(&format!("listen: {{ orchestrator: 0.0.0.0:8888 }}\n{keyed}")),
            Status::Ok
        );
    }

    #[test]
    fn a_line_names_the_fix_below_it() {
        let told = line(&Check::fail("docker", "no daemon", "start it"));
        assert_eq!(told, "FAIL  docker         no daemon\n                     → start it");
    }
}
