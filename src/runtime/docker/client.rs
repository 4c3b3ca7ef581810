//! The connection to the daemon: made on first use, forgotten when the daemon goes away.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bollard::{API_DEFAULT_VERSION, Docker};

use super::errors;
use crate::scheduler::event::{Fault, FaultKind};

/// Longest wait for the head of an answer. Creating and starting a GPU container may take the
/// NVIDIA hook tens of seconds while the driver wakes up.
const HEAD_SECONDS_MAX: u64 = 120;
/// Longest wait for anything that a living daemon answers at once.
pub const PROMPT: Duration = Duration::from_secs(10);

const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

#[derive(Clone, Debug)]
pub struct Client(Arc<Connection>);

struct Connection {
    host: String,
    docker: ArcSwapOption<Docker>,
    daemon: ArcSwapOption<Daemon>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({})", self.host)
    }
}

/// What the daemon says about itself.
#[derive(Clone, Debug, Default)]
pub struct Daemon {
    /// `Docker Engine 26.1.5 (API 1.45)`
    pub title: String,
    pub runtimes: Vec<String>,
    pub default_runtime: String,
    pub root_dir: String,
    pub logging_driver: String,
    /// CDI devices that it can hand out (`nvidia.com/gpu=0`), where it tells.
    pub devices: Vec<String>,
    /// The daemon's clock, seconds since 1970; for `since` of the events stream.
    pub now: Option<u64>,
}

impl Client {
    /// `host`: as configured; `None`: DOCKER_HOST or the default socket.
    pub fn new(host: Option<String>) -> Client {
        let host = host
            .or_else(|| std::env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty()))
            .unwrap_or_else(default_host);
        let (docker, daemon) = (ArcSwapOption::empty(), ArcSwapOption::empty());
        Client(Arc::new(Connection { host, docker, daemon }))
    }

    /// `unix:///var/run/docker.sock`, for messages.
    pub fn host(&self) -> &str {
        &self.0.host
    }

    /// Host name or address of a TCP daemon.
    pub fn tcp_host(&self) -> Option<&str> {
        let address =
            self.host().strip_prefix("tcp://").or_else(|| self.host().strip_prefix("http://"))?;
        let address = address.split('/').next().unwrap_or_default();
        Some(address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']))
    }

    /// The connected API. Fails with `RuntimeUnreachable` and the fix.
    pub async fn docker(&self) -> Result<Docker, Fault> {
        if let Some(docker) = self.0.docker.load_full() {
            return Ok(Docker::clone(&docker));
        }
        let docker = self.open()?;
        // bollard 0.21 does not put the version into its requests, so each daemon answers in its
        // own newest version; negotiated all the same, for the release that does.
        let docker = self.within(PROMPT, docker.negotiate_version()).await?;
        self.0.docker.store(Some(Arc::new(docker.clone())));
        Ok(docker)
    }

    fn open(&self) -> Result<Docker, Fault> {
        let host = self.host();
        let opened = if host.starts_with("unix://") {
            Docker::connect_with_unix(host, HEAD_SECONDS_MAX, API_DEFAULT_VERSION)
        } else if self.tcp_host().is_some() {
            Docker::connect_with_http(host, HEAD_SECONDS_MAX, API_DEFAULT_VERSION)
        } else {
            return Err(Fault::new(
                FaultKind::RuntimeUnreachable,
                format!(
                    "Docker host {host} is neither unix:///… nor tcp://…; TLS and SSH need a \
                     tunnel, e.g. `ssh -L /tmp/docker.sock:/var/run/docker.sock HOST`"
                ),
            ));
        };
        opened.map_err(|error| errors::fault(host, "connect", &error))
    }

    /// Runs one call with a deadline; errors become faults.
    pub async fn within<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<T, bollard::errors::Error>>,
    ) -> Result<T, Fault> {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(errors::fault(self.host(), "answer", &error)),
            Err(_) => Err(errors::silent(self.host(), limit)),
        }
    }

    /// What the daemon says about itself; asked once per connection.
    pub async fn daemon(&self) -> Result<Arc<Daemon>, Fault> {
        if let Some(daemon) = self.0.daemon.load_full() {
            return Ok(daemon);
        }
        let docker = self.docker().await?;
        let version = self.within(PROMPT, docker.version()).await?;
        let info = self.within(PROMPT, docker.info()).await?;
        let mut runtimes: Vec<String> = info.runtimes.unwrap_or_default().into_keys().collect();
        runtimes.sort();
        let devices = info.discovered_devices.unwrap_or_default();
        let daemon = Arc::new(Daemon {
            devices: devices.into_iter().filter_map(|device| device.id).collect(),
            title: format!(
                "Docker Engine {} (API {})",
                version.version.unwrap_or_default(),
                version.api_version.unwrap_or_default()
            ),
            runtimes,
            default_runtime: info.default_runtime.unwrap_or_default(),
            root_dir: info.docker_root_dir.unwrap_or_default(),
            logging_driver: info.logging_driver.unwrap_or_default(),
            now: info.system_time.as_deref().and_then(epoch_seconds),
        });
        self.0.daemon.store(Some(Arc::clone(&daemon)));
        Ok(daemon)
    }

    /// The daemon went away: what comes back may be another one.
    pub fn forget(&self) {
        self.0.docker.store(None);
        self.0.daemon.store(None);
    }
}

fn default_host() -> String {
    let rootless = std::env::var("XDG_RUNTIME_DIR").map(|dir| format!("{dir}/docker.sock"));
    match rootless {
        Ok(socket) if !Path::new(DEFAULT_SOCKET).exists() && Path::new(&socket).exists() => {
            format!("unix://{socket}")
        }
        _ => format!("unix://{DEFAULT_SOCKET}"),
    }
}

/// Seconds since 1970 of an RFC 3339 time; the daemon writes its own in its local time.
pub fn epoch_seconds(time: &str) -> Option<u64> {
    let (date, clock) = time.split_at_checked(10)?;
    let (clock, offset) = match clock.find(['+', '-']) {
        Some(at) => clock.split_at(at),
        None => (clock, "+00:00"),
    };
    let parsed = humantime::parse_rfc3339_weak(&format!("{date}{clock}")).ok()?;
    let seconds = parsed.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let ahead = hours.parse::<u64>().ok()? * 3600 + minutes.parse::<u64>().ok()? * 60;
    if offset.starts_with('-') { seconds.checked_add(ahead) } else { seconds.checked_sub(ahead) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_hosts_are_told_apart() {
        let host = |text: &str| Client::new(Some(text.to_owned())).tcp_host().map(str::to_owned);
        assert_eq!(host("tcp://127.0.0.1:2375").as_deref(), Some("127.0.0.1"));
        assert_eq!(host("tcp://[::1]:2375/").as_deref(), Some("::1"));
        assert_eq!(host("unix:///run/docker.sock"), None);
    }

    #[test]
    fn the_daemons_clock_is_read_in_any_zone() {
        let seconds = 1_767_225_600;
        for time in [
            "2026-01-01T00:00:00Z",
            "2026-01-01T00:00:00.123456789Z",
            "2026-01-01 00:00:00",
            "2026-01-01T01:00:00.123456789+01:00",
            "2025-12-31T19:00:00-05:00",
            "2026-01-01T05:45:00+05:45",
        ] {
            assert_eq!(epoch_seconds(time), Some(seconds), "{time}");
        }
        for time in ["", "2026-01-01", "2026-01-01T00:00:00+", "2026-01-01T00:00:00+a:b", "é"] {
            assert_eq!(epoch_seconds(time), None, "{time}");
        }
    }

    #[tokio::test]
    async fn a_missing_socket_and_a_foreign_scheme_name_the_fix() {
        let missing = Client::new(Some("unix:///nonexistent/docker.sock".to_owned()));
        let fault = missing.docker().await.expect_err("no daemon");
        assert_eq!(fault.kind, FaultKind::RuntimeUnreachable);
        assert!(fault.message.contains("/nonexistent/docker.sock"), "{}", fault.message);
        let ssh = Client::new(Some("ssh://gpu2".to_owned()));
        let fault = ssh.docker().await.expect_err("no such scheme");
        assert!(fault.message.contains("ssh -L"), "{}", fault.message);
    }
}
