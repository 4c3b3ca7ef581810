//! An endpoint that runs elsewhere: it is only reached, never started or stopped.

use tokio::sync::watch;

use super::{Endpoint, EngineKey, LaunchSpec, LogTail, Running, RuntimeHandle, Tls};
use crate::config::catalog::RuntimeSpec;
use crate::scheduler::event::{Fault, FaultKind};

#[derive(Clone, Debug, Default)]
pub struct ExternalRuntime;

impl ExternalRuntime {
    pub async fn preflight(&self, _spec: &LaunchSpec) -> Result<(), Fault> {
        Ok(())
    }

    pub async fn start(&self, spec: &LaunchSpec) -> Result<Running, Fault> {
        let RuntimeSpec::External(external) = &spec.model.runtime else {
            return Err(Fault::new(FaultKind::Internal, "not an external model"));
        };
        let api_key = match &external.api_key {
            None => None,
            Some(text) => Some(EngineKey::new(text).ok_or_else(|| {
                let message = format!(
                    "model {}: `external.api_key` is empty or holds what no header can carry",
                    spec.model.name
                );
                Fault::new(FaultKind::BadSpec, message)
            })?),
        };
        let mut endpoint = Endpoint::new(external.url.trim_end_matches('/'), api_key);
        if endpoint.base.starts_with("https://") {
            let ca = external.ca.clone();
            let tls = tokio::task::spawn_blocking(move || Tls::new(ca.as_deref()))
                .await
                .map_err(|error| Fault::new(FaultKind::Internal, error.to_string()))?;
            endpoint.tls = Some(tls.map_err(|why| {
                Fault::new(FaultKind::BadSpec, format!("model {}: {why}", spec.model.name))
            })?);
        }
        // The sender is dropped: the exit of something that runs elsewhere is never seen here.
        let (_, exit) = watch::channel(None);
        Ok(Running {
            identity: spec.identity.clone(),
            endpoint,
            handle: RuntimeHandle::External,
            log: LogTail::new(),
            exit,
        })
    }
}
