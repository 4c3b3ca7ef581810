//! From what Docker says to a [`Fault`] that names the thing and the fix.
//!
//! Docker's answers carry their reason in prose only, so the mapping goes by phrases; they are
//! those of Engine 20.10 to 28. What no phrase fits keeps Docker's own words.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use bollard::errors::Error;

use crate::scheduler::event::{Fault, FaultKind};

/// HTTP status of a refusal by the daemon.
pub fn status(error: &Error) -> Option<u16> {
    match error {
        Error::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

pub fn is_missing(error: &Error) -> bool {
    status(error) == Some(404)
}

/// Did the daemon refuse (as opposed to: not answer)? Its words.
pub fn words(error: &Error) -> Option<&str> {
    match error {
        Error::DockerResponseServerError { message, .. } => Some(message.trim()),
        Error::DockerStreamError { error } => Some(error.trim()),
        _ => None,
    }
}

/// The daemon did not answer in time.
pub fn silent(host: &str, limit: Duration) -> Fault {
    Fault::new(
        FaultKind::RuntimeUnreachable,
        format!("Docker at {host} did not answer within {} s", limit.as_secs()),
    )
}

/// Any error: unreachable if the daemon did not answer, else its words.
pub fn fault(host: &str, what: &str, error: &Error) -> Fault {
    if let Some(words) = words(error) {
        return Fault::new(FaultKind::Internal, format!("Docker refused to {what}: {words}"));
    }
    let kind = FaultKind::RuntimeUnreachable;
    let message = match (error, io_kind(error)) {
        (Error::RequestTimeoutError, _) => format!("Docker at {host} did not answer in time"),
        (Error::SocketNotFoundError(_), _) | (_, Some(io::ErrorKind::NotFound)) => format!(
            "Docker is not there: no socket at {host}. Is it installed and started \
             (`systemctl start docker`)? Another place: DOCKER_HOST or `docker: {{ host }}`"
        ),
        (_, Some(io::ErrorKind::PermissionDenied)) => format!(
            "may not use Docker at {host}: permission denied. Add this user to the group of the \
             socket (`usermod -aG docker USER`, then log in again)"
        ),
        (_, Some(io::ErrorKind::ConnectionRefused)) => {
            format!("Docker does not run: {host} refuses connections (`systemctl start docker`)")
        }
        _ => format!("Docker at {host} is unreachable: {}", chain(error)),
    };
    Fault::new(kind, message)
}

fn io_kind(error: &Error) -> Option<io::ErrorKind> {
    if let Error::IOError { err } = error {
        return Some(err.kind());
    }
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        source = cause.source();
    }
    None
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// What the container is made from, for messages.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub model: &'a str,
    pub image: &'a str,
    pub port: u16,
    pub runtime: &'a str,
}

/// A refusal to create or start a container.
pub fn start_fault(host: &str, subject: Subject<'_>, error: &Error) -> Fault {
    if matches!(error, Error::RequestTimeoutError) {
        return Fault::new(
            FaultKind::TimedOut,
            format!("Docker at {host} did not start the container of {} in time", subject.model),
        );
    }
    let Some(words) = words(error) else {
        return fault(host, "start a container", error);
    };
    let (kind, message) = explain_start(subject, status(error), words);
    Fault::new(kind, message)
}

fn explain_start(subject: Subject<'_>, status: Option<u16>, words: &str) -> (FaultKind, String) {
    let Subject { model, image, port, runtime } = subject;
    let has = |phrases: &[&str]| phrases.iter().any(|phrase| words.contains(phrase));
    if status == Some(404) && has(&["No such image", "no such image"]) {
        return (
            FaultKind::ImageMissing,
            format!("image {image} is not on this Docker: `wharf pull {model}`"),
        );
    }
    if has(&["unknown or invalid runtime name", "Unknown runtime specified", "unknown runtime"]) {
        return (FaultKind::BadSpec, unknown_runtime(runtime));
    }
    if has(&["could not select device driver", "nvidia-container-cli", "CDI device", "libnvidia"]) {
        return (
            FaultKind::GpuDriverMissing,
            format!(
                "Docker cannot give a GPU to {model}: {words}. Install the NVIDIA driver and the \
                 NVIDIA Container Toolkit (`nvidia-ctk runtime configure --runtime=docker`, then \
                 restart Docker), or set `gpus: 0` to run on the CPU"
            ),
        );
    }
    if has(&["port is already allocated", "address already in use", "ports are not available"]) {
        return (FaultKind::PortTaken, format!("port {port} on this machine is taken"));
    }
    if has(&["executable file not found", "exec format error"])
        || (has(&["exec: \"", "unable to start container process"])
            && has(&["no such file or directory", "permission denied"]))
    {
        return (
            FaultKind::CommandMissing,
            format!("image {image} cannot run its command ({words}); see `entrypoint` and `args`"),
        );
    }
    if has(&["no space left on device"]) {
        return (FaultKind::DiskFull, format!("Docker's disk is full: {words}"));
    }
    if has(&["cannot allocate memory"]) {
        return (FaultKind::OutOfMemory, format!("no host memory left to start {model}: {words}"));
    }
    if has(&["rlimit"]) {
        return (
            FaultKind::BadSpec,
            format!("Docker may not set the `ulimits` of {model} on this machine: {words}"),
        );
    }
    match status {
        Some(400 | 404 | 409) => (
            FaultKind::BadSpec,
            format!("Docker does not accept the container of {model}: {words}"),
        ),
        _ => (FaultKind::Internal, format!("Docker could not start {model}: {words}")),
    }
}

pub fn unknown_runtime(runtime: &str) -> String {
    let fix = if runtime.contains("nvidia") {
        "install the NVIDIA Container Toolkit (`nvidia-ctk runtime configure --runtime=docker`, \
         then restart Docker), or leave `runtime` out: GPUs do not need it"
    } else {
        "register it in /etc/docker/daemon.json under `runtimes`, or leave `runtime` out"
    };
    format!("this Docker knows no runtime `{runtime}`: {fix}")
}

/// A pull that failed. `registry` is the host that serves `image`.
pub fn pull_fault(host: &str, image: &str, registry: &str, error: &Error) -> Fault {
    let Some(words) = words(error) else {
        return fault(host, "pull", error);
    };
    let (kind, message) = explain_pull(image, registry, words);
    Fault::new(kind, message)
}

fn explain_pull(image: &str, registry: &str, words: &str) -> (FaultKind, String) {
    // Names and ports may hold anything, `:45401` too.
    let lower = words.replace(image, "").replace(registry, "").to_lowercase();
    let has = |phrases: &[&str]| phrases.iter().any(|phrase| lower.contains(phrase));
    let mut parts = lower.split(|c: char| !c.is_ascii_alphanumeric());
    let has_code = parts.any(|part| matches!(part, "401" | "403"));
    if has(&["no space left on device"]) {
        return (
            FaultKind::DiskFull,
            format!(
                "Docker's disk is full while pulling {image}; `docker system df` shows what \
                     can go"
            ),
        );
    }
    if has(&["toomanyrequests", "rate limit"]) {
        return (
            FaultKind::FetchFailed,
            format!(
                "{registry} limits pulls for now: {words}. `docker login {registry}` raises \
                     the limit"
            ),
        );
    }
    if has(&[
        "dial tcp",
        "no such host",
        "i/o timeout",
        "connection refused",
        "connection reset",
        "client.timeout",
        "tls handshake",
        "network is unreachable",
        "unexpected eof",
        "server misbehaving",
        "proxyconnect",
        "x509",
    ]) {
        return (
            FaultKind::FetchFailed,
            format!("cannot reach registry {registry} for image {image}: {words}"),
        );
    }
    if has_code || has(&["denied", "unauthorized", "authentication required", "forbidden"]) {
        return (
            FaultKind::FetchDenied,
            format!(
                "registry {registry} does not give out image {image} ({words}): check its name, \
                 and `docker login {registry}` as the user that runs Wharf"
            ),
        );
    }
    if has(&[
        "manifest unknown",
        "not found",
        "no matching manifest",
        "name unknown",
        "manifest_unknown",
        "name_unknown",
    ]) {
        return (
            FaultKind::ImageMissing,
            format!("registry {registry} has no image {image} for this machine: {words}"),
        );
    }
    (FaultKind::FetchFailed, format!("pulling {image} from {registry} failed: {words}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(status: u16, words: &str) -> FaultKind {
        let subject = Subject { model: "m", image: "i:1", port: 18051, runtime: "nvidia" };
        explain_start(subject, Some(status), words).0
    }

    #[test]
    fn start_errors_of_docker_get_their_kind() {
        let gpu = "could not select device driver \"\" with capabilities: [[gpu]]";
        let port = "driver failed programming external connectivity on endpoint x: Bind for \
                    127.0.0.1:18051 failed: port is already allocated";
        let proxy = "listen tcp4 127.0.0.1:18051: bind: address already in use";
        let exec = "OCI runtime create failed: container_linux.go:380: starting container process \
                    caused: exec: \"nope\": executable file not found in $PATH: unknown";
        assert_eq!(start(500, gpu), FaultKind::GpuDriverMissing);
        assert_eq!(start(500, port), FaultKind::PortTaken);
        assert_eq!(start(500, proxy), FaultKind::PortTaken);
        assert_eq!(start(400, exec), FaultKind::CommandMissing);
        assert_eq!(start(404, "No such image: i:1"), FaultKind::ImageMissing);
        assert_eq!(start(404, "network x not found"), FaultKind::BadSpec);
        assert_eq!(start(400, "unknown or invalid runtime name: nvidia"), FaultKind::BadSpec);
        assert_eq!(start(500, "something new"), FaultKind::Internal);
    }

    #[test]
    fn pull_errors_of_registries_get_their_kind() {
        let kind = |words| explain_pull("org/x:1", "docker.io", words).0;
        assert_eq!(
            kind(
                "Get \"https://registry-1.docker.io/v2/\": dial tcp: lookup registry-1.docker.io: \
                  no such host"
            ),
            FaultKind::FetchFailed
        );
        assert_eq!(
            kind(
                "pull access denied for org/x, repository does not exist or may require 'docker \
                  login': denied: requested access to the resource is denied"
            ),
            FaultKind::FetchDenied
        );
        assert_eq!(kind("unauthorized: authentication required"), FaultKind::FetchDenied);
        assert_eq!(
            kind("manifest for org/x:1 not found: manifest unknown"),
            FaultKind::ImageMissing
        );
        assert_eq!(kind("unexpected HTTP status: 403 from the proxy"), FaultKind::FetchDenied);
        let (registry, image) = ("127.0.0.1:45401", "127.0.0.1:45401/denied/x:403");
        let words = format!("manifest for {image} not found: manifest unknown");
        assert_eq!(explain_pull(image, registry, &words).0, FaultKind::ImageMissing);
        assert_eq!(
            kind("write /var/lib/docker/tmp/x: no space left on device"),
            FaultKind::DiskFull
        );
    }
}
