//! A model inside a running Ollama: loaded, watched and unloaded by its API.
//!
//! Ollama itself is never started or stopped. Every request through its OpenAI paths sets a model's
//! `keep_alive` back to the server's default, so while a model is ours it is told again and again
//! to stay; and as Ollama has a mind of its own (its bound of loaded models, other clients), its
//! list of loaded models is the truth about whether it still is there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::{
    Endpoint, ExitReport, Identity, LaunchSpec, LogTail, Progress, Running, RuntimeHandle, external,
};
use crate::config::catalog::{ModelSpec, OllamaSpec, PullPolicy, RuntimeSpec};
use crate::engine::request::{self, HttpError};
use crate::scheduler::event::{Fault, FaultKind};
use crate::units::{Bytes, InstanceId};

/// For questions that Ollama answers from memory.
const ASK_MAX: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Looks in a row that Ollama may leave unanswered: it is restarted, say.
const UNANSWERED_MAX: u32 = 5;
/// A model that would leave sooner than this is told to stay.
const STAY_BEFORE: Duration = Duration::from_secs(3600);
const GONE_LOOK_EVERY: Duration = Duration::from_millis(50);
/// Without a byte of progress a pull has failed.
const PULL_STALL: Duration = Duration::from_secs(120);

/// Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct OllamaRuntime {
    /// Locked while Ollama is told to keep the model, so that a stop comes before or after, and is
    /// not undone.
    stages: Arc<Mutex<BTreeMap<InstanceId, Shared>>>,
}

type Shared = Arc<tokio::sync::Mutex<Stage>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Loading,
    Loaded,
    Leaving,
}

/// One row of `/api/ps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Loaded {
    size: Bytes,
    size_vram: Bytes,
    /// `None`: no time that can be read.
    left: Option<Duration>,
}

impl OllamaRuntime {
    pub async fn preflight(&self, spec: &LaunchSpec) -> Result<(), Fault> {
        let endpoint = endpoint(&spec.model).await?;
        match request::get(&endpoint, "/api/version", ASK_MAX).await {
            Ok(answer) if answer.status.is_success() => Ok(()),
            Ok(answer) => {
                let why = format!("answers /api/version with {}", answer.excerpt());
                Err(fault(&spec.model, FaultKind::BadSpec, &format!("{} {why}", endpoint.base))
                    .and(": is that Ollama? correct `external.url`"))
            }
            Err(error) => Err(unreachable(&spec.model, &endpoint, &error)),
        }
    }

    /// Pulls the model if Ollama does not have it.
    pub async fn fetch(&self, spec: &LaunchSpec, progress: &Progress) -> Result<(), Fault> {
        let model = &spec.model;
        let (endpoint, name) = (endpoint(model).await?, model.served_name());
        let shown = request::post(&endpoint, "/api/show", Some(&json!({"model": name})), ASK_MAX)
            .await
            .map_err(|error| unreachable(model, &endpoint, &error))?;
        if shown.status.is_success() {
            return Ok(());
        }
        let pull = ollama(model).map_or(PullPolicy::default(), |ollama| ollama.pull);
        if pull == PullPolicy::Never {
            let text = format!("Ollama does not have `{name}`: run `ollama pull {name}`");
            return Err(fault(model, FaultKind::ImageMissing, &text));
        }
        progress.set("pull", None, name);
        let mut refused = None;
        let on_line = |line: &str| {
            let Ok(line) = serde_json::from_str::<Value>(line) else { return };
            if let Some(why) = line["error"].as_str() {
                refused = Some(why.to_owned());
            }
            let part = |key: &str| line[key].as_f64();
            let fraction = part("completed").zip(part("total")).map(|(done, of)| done / of);
            progress.set(
                "pull",
                fraction.map(|part| part as f32),
                line["status"].as_str().unwrap_or(""),
            );
        };
        let body = json!({"model": name, "stream": true});
        let pulled = request::post_lines(&endpoint, "/api/pull", &body, PULL_STALL, on_line).await;
        let refused = match pulled {
            Ok(status) if status.is_success() => refused,
            Ok(status) => Some(refused.unwrap_or_else(|| status.to_string())),
            Err(error) => Some(error.to_string()),
        };
        match refused {
            None => Ok(()),
            Some(why) => {
                let text = format!("Ollama cannot pull `{name}`: {why}; is the name right?");
                Err(fault(model, FaultKind::FetchFailed, &text))
            }
        }
    }

    /// Returns at once: the load itself is waited for by [`Self::load`].
    pub async fn start(&self, spec: &LaunchSpec) -> Result<Running, Fault> {
        let endpoint = endpoint(&spec.model).await?;
        Ok(self.watched(spec.identity.clone(), endpoint, spec.model.served_name(), Stage::Loading))
    }

    /// A model of ours that is loaded already. It may have been loaded by somebody else: a model
    /// that the configuration names is owned by being named.
    pub async fn adopt(&self, spec: &ModelSpec, identity: Identity) -> Option<(Running, Bytes)> {
        let endpoint = endpoint(spec).await.ok()?;
        let loaded = look(&endpoint, spec.served_name()).await.ok()??;
        let running = self.watched(identity, endpoint, spec.served_name(), Stage::Loaded);
        Some((running, loaded.size_vram))
    }

    fn watched(&self, identity: Identity, endpoint: Endpoint, name: &str, stage: Stage) -> Running {
        let (ended, exit) = watch::channel(None);
        let stage = Shared::new(tokio::sync::Mutex::new(stage));
        self.stages().insert(identity.instance, Arc::clone(&stage));
        let (at, model) = (endpoint.clone(), name.to_owned());
        tokio::spawn(async move {
            let watch = follow(&at, &model, &stage);
            tokio::select! {
                why = watch => {
                    tracing::warn!(model, ollama = at.base, "is not loaded any more: {why}");
                    let gone = ExitReport { code: None, signal: None, oom_killed: false };
                    ended.send_replace(Some(gone));
                }
                () = ended.closed() => {}
            }
        });
        Running {
            identity,
            endpoint,
            handle: RuntimeHandle::Ollama { model: name.to_owned() },
            log: LogTail::new(),
            exit,
        }
    }

    /// Loads the model and tells it to stay; returns when Ollama says that it is loaded, with the bytes
    /// that it takes of the GPUs.
    pub async fn load(
        &self,
        spec: &ModelSpec,
        running: &Running,
        progress: &Progress,
        deadline: Instant,
    ) -> Result<Bytes, Fault> {
        let name = spec.served_name();
        progress.set("load", None, "");
        let limit = deadline.saturating_duration_since(Instant::now());
        let answer =
            request::post(&running.endpoint, "/api/generate", Some(&stay(name)), limit).await;
        match answer {
            Ok(answer) if answer.status.is_success() => {}
            Ok(answer) => {
                let text = format!("Ollama cannot load `{name}`: {}", answer.excerpt());
                return Err(fault(spec, FaultKind::Exited, &text));
            }
            Err(HttpError::TooSlow(_)) => {
                let text = format!("Ollama did not load `{name}` in time (start_timeout)");
                return Err(fault(spec, FaultKind::TimedOut, &text));
            }
            Err(error) => return Err(unreachable(spec, &running.endpoint, &error)),
        }
        match look(&running.endpoint, name).await {
            Ok(Some(loaded)) => {
                let stage = self.stages().get(&running.identity.instance).cloned();
                if let Some(stage) = stage {
                    *stage.lock().await = Stage::Loaded;
                }
                let (vram, size) = (loaded.size_vram, loaded.size);
                if vram > Bytes::ZERO && vram < size {
                    tracing::warn!(model = %spec.name, "{vram} of {size} fit into the GPU: the rest runs on the CPU");
                }
                Ok(vram)
            }
            Ok(None) => {
                let text =
                    format!("Ollama says that `{name}` is loaded, and does not list it in /api/ps");
                Err(fault(spec, FaultKind::NeverHealthy, &text))
            }
            Err(error) => Err(unreachable(spec, &running.endpoint, &error)),
        }
    }

    /// Returns once Ollama lists it no more.
    pub async fn stop(&self, running: &Running, name: &str) -> Result<(), Fault> {
        let stage = self.stages().remove(&running.identity.instance);
        if let Some(stage) = stage {
            *stage.lock().await = Stage::Leaving;
        }
        let body = json!({"model": name, "keep_alive": 0});
        let stuck = |why: &str| {
            let model = &running.identity.model;
            Fault::new(
                FaultKind::StopFailed,
                format!("model {model}: Ollama at {} {why}", running.endpoint.base),
            )
        };
        loop {
            match request::post(&running.endpoint, "/api/generate", Some(&body), ASK_MAX).await {
                // Nothing listens there: nothing is loaded there.
                Err(HttpError::Connect(error))
                    if error.kind() == std::io::ErrorKind::ConnectionRefused =>
                {
                    return Ok(());
                }
                Err(error) => return Err(stuck(&format!("does not answer: {error}"))),
                Ok(_) => {}
            }
            let asked = Instant::now();
            while asked.elapsed() < ASK_MAX {
                match look(&running.endpoint, name).await {
                    Ok(None) => return Ok(()),
                    Ok(Some(_)) => sleep(GONE_LOOK_EVERY).await,
                    Err(error) => return Err(stuck(&format!("does not answer: {error}"))),
                }
            }
            // Somebody else's request holds it, or loaded it again. The caller's patience ends this.
        }
    }

    fn stages(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Shared>> {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Until a loaded model is gone; answers with why.
async fn follow(at: &Endpoint, name: &str, stage: &Shared) -> String {
    let mut unanswered = 0;
    loop {
        sleep(LOOK_EVERY).await;
        match look(at, name).await {
            Ok(Some(loaded)) => {
                unanswered = 0;
                if loaded.left.is_some_and(|left| left < STAY_BEFORE) {
                    let stage = stage.lock().await;
                    if *stage == Stage::Loaded {
                        // A failure shows at the next look.
                        let _ =
                            request::post(at, "/api/generate", Some(&stay(name)), ASK_MAX).await;
                    }
                }
            }
            Ok(None) if *stage.lock().await == Stage::Loaded => {
                return "Ollama unloaded it, or somebody else did".to_owned();
            }
            Ok(None) => unanswered = 0,
            Err(error) => {
                unanswered += 1;
                if unanswered >= UNANSWERED_MAX {
                    return format!("Ollama does not answer: {error}");
                }
            }
        }
    }
}

/// Without a prompt: loads, and sets how long it stays. Below zero: until it is told otherwise.
fn stay(name: &str) -> Value {
    json!({"model": name, "keep_alive": -1, "stream": false})
}

async fn look(at: &Endpoint, name: &str) -> Result<Option<Loaded>, HttpError> {
    let answer = request::get(at, "/api/ps", ASK_MAX).await?;
    if !answer.status.is_success() {
        return Err(HttpError::Broken(format!("/api/ps answers {}", answer.excerpt())));
    }
    Ok(find(&answer.json(), name, SystemTime::now()))
}

fn find(ps: &Value, name: &str, now: SystemTime) -> Option<Loaded> {
    let is_it = |listed: &str| listed == name || listed.strip_suffix(":latest") == Some(name);
    let row = ps["models"]
        .as_array()?
        .iter()
        .find(|row| ["name", "model"].iter().any(|key| row[key].as_str().is_some_and(is_it)))?;
    let bytes = |key: &str| Bytes(row[key].as_u64().unwrap_or_default());
    let until = row["expires_at"].as_str().and_then(instant);
    let left = until.map(|until| until.duration_since(now).unwrap_or_default());
    Some(Loaded { size: bytes("size"), size_vram: bytes("size_vram"), left })
}

/// RFC 3339 with any offset, as Go writes it.
fn instant(text: &str) -> Option<SystemTime> {
    if text.ends_with('Z') {
        return humantime::parse_rfc3339(text).ok();
    }
    let (date, offset) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let time = humantime::parse_rfc3339(&format!("{date}Z")).ok()?;
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let seconds = hours.parse::<u64>().ok()? * 3600 + minutes.parse::<u64>().ok()? * 60;
    let offset_s = Duration::from_secs(seconds);
    if offset.starts_with('-') { time.checked_add(offset_s) } else { time.checked_sub(offset_s) }
}

fn ollama(spec: &ModelSpec) -> Option<&OllamaSpec> {
    match &spec.runtime {
        RuntimeSpec::Ollama(ollama) => Some(ollama),
        RuntimeSpec::Docker(_) | RuntimeSpec::Process(_) | RuntimeSpec::External(_) => None,
    }
}

async fn endpoint(spec: &ModelSpec) -> Result<Endpoint, Fault> {
    let ollama = ollama(spec).ok_or_else(|| fault(spec, FaultKind::Internal, "not of Ollama"))?;
    external::endpoint(spec.name.as_str(), &ollama.at).await
}

fn unreachable(spec: &ModelSpec, at: &Endpoint, error: &HttpError) -> Fault {
    let text =
        format!("Ollama at {} does not answer: {error}; start it, or correct its url", at.base);
    fault(spec, FaultKind::RuntimeUnreachable, &text)
}

fn fault(spec: &ModelSpec, kind: FaultKind, text: &str) -> Fault {
    Fault::new(kind, format!("model {}: {text}", spec.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_found_by_either_spelling_and_its_time_is_read() {
        let now = humantime::parse_rfc3339("2026-01-01T12:00:00Z").unwrap();
        let ps = json!({"models": [
            {"name": "other:7b", "model": "other:7b"},
            {"name": "llama3:latest", "size": 9, "size_vram": 5, "expires_at": "2026-01-01T13:05:00.5+01:00"},
        ]});
        let found = find(&ps, "llama3", now).unwrap();
        assert_eq!(found.left, Some(Duration::from_millis(300_500)));
        assert_eq!((found.size, found.size_vram), (Bytes(9), Bytes(5)));
        assert_eq!(find(&ps, "llama3:8b", now), None);
        assert_eq!(find(&json!({}), "llama3", now), None);
        let far = json!({"models": [{"name": "a", "expires_at": "2318-04-12T00:00:00.1-07:00"}]});
        assert!(find(&far, "a", now).unwrap().left.unwrap() > Duration::from_secs(1 << 32));
    }
}
