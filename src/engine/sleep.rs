//! vLLM's sleep: level 1 keeps the weights in host RAM, level 2 keeps nothing.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::pace::until_next_look;
use super::{ended, fault, request};
use crate::config::catalog::{EngineKind, ModelSpec};
use crate::runtime::Running;
use crate::scheduler::event::{Fault, FaultKind};

/// The first sleep pins host memory, which was seen to take 36 s.
const SLEEP_LIMIT: Duration = Duration::from_secs(180);
/// Level 2 reads the weights again.
const WAKE_LIMIT: Duration = Duration::from_secs(600);
const CHECK_LIMIT: Duration = Duration::from_secs(5);
/// From the answer of /sleep to /is_sleeping agreeing.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

pub async fn sleep(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    let level = spec.sleep.unwrap_or(1);
    // Query parameters: a JSON body would be ignored.
    let path = format!("/sleep?level={level}");
    let work = async {
        post(running, &path, None).await?;
        settled(running, true).await
    };
    within(spec, running, "go to sleep", FaultKind::SleepFailed, SLEEP_LIMIT, work).await
}

pub async fn wake(spec: &ModelSpec, running: &Running) -> Result<(), Fault> {
    let work = async {
        if spec.sleep == Some(2) {
            post(running, "/wake_up?tags=weights", None).await?;
            let reload = json!({"method": "reload_weights"});
            post(running, "/collective_rpc", Some(&reload)).await?;
            post(running, "/wake_up?tags=kv_cache", None).await?;
            post(running, "/reset_prefix_cache", None).await?;
        } else {
            post(running, "/wake_up", None).await?;
        }
        settled(running, false).await
    };
    within(spec, running, "wake up", FaultKind::WakeFailed, WAKE_LIMIT, work).await
}

async fn within(
    spec: &ModelSpec,
    running: &Running,
    what: &str,
    kind: FaultKind,
    limit: Duration,
    work: impl Future<Output = Result<(), String>>,
) -> Result<(), Fault> {
    if spec.engine != EngineKind::Vllm {
        let text = "only vLLM engines sleep: remove `sleep:`";
        return Err(fault(spec, running, kind, text));
    }
    let why = tokio::select! {
        biased;
        report = ended(running) => format!("it {report}"),
        result = timeout(limit, work) => match result {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => why,
            Err(_) => format!("not done within {} s", limit.as_secs()),
        },
    };
    Err(fault(spec, running, kind, &format!("the engine did not {what}: {why}")))
}

async fn post(running: &Running, path: &str, body: Option<&Value>) -> Result<(), String> {
    let answer = request::post(&running.endpoint, path, body, WAKE_LIMIT).await;
    let answer = answer.map_err(|error| format!("{path}: {error}"))?;
    match answer.status {
        status if status.is_success() => Ok(()),
        StatusCode::NOT_FOUND => Err(format!(
            "{path} is not there: it needs --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, which \
             Wharf gives to engines that it starts with `sleep:` set"
        )),
        _ => Err(format!("{path} answered {}", answer.excerpt())),
    }
}

/// What the engine itself says; one that cannot say does not sleep.
pub async fn is_asleep(running: &Running) -> bool {
    match request::get(&running.endpoint, "/is_sleeping", CHECK_LIMIT).await {
        Ok(answer) => answer.json()["is_sleeping"].as_bool() == Some(true),
        Err(_) => false,
    }
}

/// /health says 200 awake and asleep; only /is_sleeping tells.
async fn settled(running: &Running, asleep: bool) -> Result<(), String> {
    let began = Instant::now();
    let until = began + SETTLE_LIMIT;
    loop {
        let why = match request::get(&running.endpoint, "/is_sleeping", CHECK_LIMIT).await {
            Ok(answer) => match answer.json()["is_sleeping"].as_bool() {
                Some(now) if now == asleep => return Ok(()),
                _ => answer.excerpt(),
            },
            Err(error) => error.to_string(),
        };
        if Instant::now() >= until {
            return Err(format!("/is_sleeping does not agree: {why}"));
        }
        tokio::time::sleep(until_next_look(began.elapsed())).await;
    }
}
