//! An endpoint that runs elsewhere: it is only reached, never started or stopped.

use std::time::Duration;

use tokio::sync::watch;

use super::circuit::Servers;
use super::{Endpoint, EngineKey, ExitReport, LaunchSpec, LogTail, Running, RuntimeHandle, Tls};
use crate::config::catalog::{ExternalSpec, RuntimeSpec};
use crate::engine::request::{self, HttpError};
use crate::scheduler::event::{Fault, FaultKind};

/// For the first answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, Default)]
pub struct ExternalRuntime {
    servers: Servers,
}

impl ExternalRuntime {
    /// A server that is not there, or does not take the key, is said at once: nothing is started
    /// that could be waited for. All else is for the start to judge.
    pub async fn preflight(&self, spec: &LaunchSpec) -> Result<(), Fault> {
        let RuntimeSpec::External(external) = &spec.model.runtime else {
            return Err(Fault::new(FaultKind::Internal, "not an external model"));
        };
        let model = &spec.model.name;
        let endpoint = endpoint(model.as_str(), external).await?;
        let asked = match &spec.model.health.path {
            Some(path) => request::get(&endpoint, path, ANSWER_MAX).await.map(Some),
            None => request::connect(&endpoint, ANSWER_MAX).await.map(|_| None),
        };
        match asked {
            Ok(Some(answer)) if matches!(answer.status.as_u16(), 401 | 403) => {
                let text = format!(
                    "model {model}: {} does not take the key: it answers {}; correct `api_key`",
                    endpoint.base,
                    answer.excerpt()
                );
                Err(Fault::new(FaultKind::BadSpec, text))
            }
            Ok(_) | Err(HttpError::BadUrl(_) | HttpError::Tls(_)) => Ok(()),
            Err(error) => {
                let text = format!(
                    "model {model}: {} does not answer: {error}; start it, or correct its `url`",
                    endpoint.base
                );
                Err(Fault::new(FaultKind::RuntimeUnreachable, text))
            }
        }
    }

    pub async fn start(&self, spec: &LaunchSpec) -> Result<Running, Fault> {
        let RuntimeSpec::External(external) = &spec.model.runtime else {
            return Err(Fault::new(FaultKind::Internal, "not an external model"));
        };
        let mut endpoint = endpoint(spec.model.name.as_str(), external).await?;
        let circuit = self.servers.circuit(&endpoint, spec.model.health.path.as_deref());
        let (ended, exit) = watch::channel(None);
        let log = LogTail::new();
        let (lines, base, watched) = (log.clone(), endpoint.base.clone(), circuit.clone());
        tokio::spawn(async move {
            if let Some(why) = watched.broken().await {
                lines.push(&format!("{base} is not used until it answers again: {why}"));
                let gone = ExitReport { code: None, signal: None, oom_killed: false };
                ended.send_replace(Some(gone));
            }
        });
        endpoint.circuit = Some(circuit);
        Ok(Running {
            identity: spec.identity.clone(),
            endpoint,
            handle: RuntimeHandle::External,
            log,
            exit,
        })
    }

    /// It goes on elsewhere, and is looked at no more.
    pub fn stop(&self, running: &Running) {
        if let Some(circuit) = &running.endpoint.circuit {
            circuit.leave();
        }
    }
}

/// Where a server that runs elsewhere is reached. Reads the certificates of an `https` one.
pub async fn endpoint(model: &str, external: &ExternalSpec) -> Result<Endpoint, Fault> {
    let bad = |why: &str| Fault::new(FaultKind::BadSpec, format!("model {model}: {why}"));
    let api_key =
        match &external.api_key {
            None => None,
            Some(text) => Some(EngineKey::new(text).ok_or_else(|| {
                bad("`external.api_key` is empty or holds what no header can carry")
            })?),
        };
    let mut endpoint = Endpoint::new(external.url.trim_end_matches('/'), api_key);
    if endpoint.base.starts_with("https://") {
        let ca = external.ca.clone();
        let tls = tokio::task::spawn_blocking(move || Tls::new(ca.as_deref()))
            .await
            .map_err(|error| Fault::new(FaultKind::Internal, error.to_string()))?;
        endpoint.tls = Some(tls.map_err(|why| bad(&why))?);
    }
    Ok(endpoint)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config;
    use crate::runtime::{Identity, LaunchKey};
    use crate::units::{InstanceId, ModelName};

    async fn ended(running: &mut Running) -> Option<ExitReport> {
        running.exit.wait_for(Option::is_some).await.ok()?.clone()
    }

    #[tokio::test]
    async fn what_runs_elsewhere_ends_for_us_when_it_is_let_go_or_not_reached() {
        let yaml = "models: { a: { engine: openai, external: { url: 'http://127.0.0.1:9' } } }";
        let catalog = config::parse(yaml, "models.yaml", &|_| None).unwrap().catalog;
        let launch = LaunchSpec {
            identity: Identity {
                installation: "here".into(),
                instance: InstanceId(4),
                model: ModelName::new("a"),
                spec_hash: String::new(),
                gpus: Vec::new(),
                port: 0,
            },
            model: Arc::clone(catalog.models.values().next().unwrap()),
            gpus: Vec::new(),
            port: 0,
            container_port: 0,
            args: Vec::new(),
            env: Default::default(),
            log_dir: Default::default(),
            api_key: LaunchKey::None,
        };
        let runtime = ExternalRuntime::default();
        let mut running = runtime.start(&launch).await.unwrap();
        runtime.stop(&running);
        let within = Duration::from_secs(60);
        assert_eq!(tokio::time::timeout(within, ended(&mut running)).await, Ok(None));

        let mut running = runtime.start(&launch).await.unwrap();
        let circuit = running.endpoint.circuit.clone().unwrap();
        (0..3).for_each(|_| circuit.failed("refused"));
        let report = tokio::time::timeout(within, ended(&mut running)).await.unwrap();
        assert!(report.is_some());
        assert!(running.log.last(1)[0].contains("refused"));
    }
}
