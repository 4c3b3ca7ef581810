//! One question to an engine: do you serve?

use std::time::Duration;

use http::StatusCode;

use super::request::{self, HttpError};
use crate::config::catalog::{EngineKind, ModelSpec};
use crate::runtime::process::ProcessRuntime;
use crate::runtime::{Running, RuntimeHandle};

/// For one answer. A busy engine may be slow to give it.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A proxy in front of a container (Docker's) accepts at once and hangs up at once if nothing
/// listens behind it.
const HANG_UP_WAIT: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Ready,
    /// It answers, but not that it serves.
    Status {
        code: u16,
        excerpt: String,
    },
    /// No answer; why.
    Silent(String),
    /// It is ready under other names than the one that requests will carry.
    OtherNames(Vec<String>),
    /// Somebody else listens on the instance's port.
    Stranger(String),
    /// It can never be asked.
    BadUrl(String),
}

/// `trusted`: the listener has been seen to be ours before.
pub async fn ask(spec: &ModelSpec, running: &Running, trusted: bool) -> Answer {
    let answer = match &spec.health.path {
        Some(path) => ask_health(path, running).await,
        None => ask_port(running).await,
    };
    let listens = matches!(answer, Answer::Ready | Answer::Status { .. });
    if listens && (answer == Answer::Ready || !trusted) {
        match listener(running).await {
            Listener::Ours => {}
            Listener::Stranger(who) => return Answer::Stranger(who),
            Listener::Gone => return Answer::Silent("the port was closed again".to_owned()),
        }
    }
    match (&answer, spec.engine) {
        (Answer::Ready, EngineKind::Vllm) => ask_names(spec, running).await,
        _ => answer,
    }
}

fn failed(error: HttpError) -> Answer {
    match error {
        HttpError::BadUrl(why) | HttpError::Tls(why) => Answer::BadUrl(why),
        error => Answer::Silent(error.to_string()),
    }
}

fn status(answer: &request::Answer) -> Answer {
    Answer::Status { code: answer.status.as_u16(), excerpt: answer.excerpt() }
}

async fn ask_health(path: &str, running: &Running) -> Answer {
    match request::get(&running.endpoint, path, ANSWER_LIMIT).await {
        Ok(answer) if answer.status.is_success() => Answer::Ready,
        Ok(answer) => status(&answer),
        Err(error) => failed(error),
    }
}

async fn ask_port(running: &Running) -> Answer {
    let stream = match request::connect(&running.endpoint, ANSWER_LIMIT).await {
        Ok(stream) => stream,
        Err(error) => return failed(error),
    };
    let mut byte = [0];
    match tokio::time::timeout(HANG_UP_WAIT, stream.peek(&mut byte)).await {
        Err(_) | Ok(Ok(1..)) => Answer::Ready,
        Ok(Ok(0)) => Answer::Silent("the connection was closed at once".to_owned()),
        Ok(Err(error)) => Answer::Silent(error.to_string()),
    }
}

/// vLLM serves exactly the names it lists; requests for others get 404.
async fn ask_names(spec: &ModelSpec, running: &Running) -> Answer {
    match request::get(&running.endpoint, "/v1/models", ANSWER_LIMIT).await {
        Ok(answer) if answer.status == StatusCode::OK => {
            let list = answer.json();
            let models = list["data"].as_array().map(Vec::as_slice).unwrap_or_default();
            let names = models.iter().filter_map(|model| model["id"].as_str().map(str::to_owned));
            let names: Vec<String> = names.collect();
            match names.iter().any(|name| name == spec.served_name()) {
                true => Answer::Ready,
                false => Answer::OtherNames(names),
            }
        }
        Ok(answer) => status(&answer),
        Err(error) => failed(error),
    }
}

enum Listener {
    Ours,
    Stranger(String),
    Gone,
}

/// Who listens on the port of a process instance. A container's port is held by its runtime, which
/// refuses to start it if the port is taken.
async fn listener(running: &Running) -> Listener {
    let RuntimeHandle::Process { pid, .. } = running.handle else { return Listener::Ours };
    let runtime = ProcessRuntime::default();
    if runtime.listens_alone(pid, running.identity.port).await {
        return Listener::Ours;
    }
    let listeners = runtime.listeners(running.identity.port).await;
    if listeners.is_empty() {
        // One of ours could be seen.
        return match request::connect(&running.endpoint, ANSWER_LIMIT).await {
            Ok(_) => Listener::Stranger("a process of another user".to_owned()),
            Err(_) => Listener::Gone,
        };
    }
    let ours = tokio::task::spawn_blocking(move || runtime.group_pids(pid)).await;
    let ours = ours.unwrap_or_default();
    // One stranger is enough: sockets with SO_REUSEPORT share the requests.
    match listeners.iter().find(|listener| !ours.contains(&listener.pid)) {
        Some(stranger) => Listener::Stranger(stranger.to_string()),
        None => Listener::Ours,
    }
}
