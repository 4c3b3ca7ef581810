//! An endpoint that runs elsewhere: it is only reached, never started or stopped.

use tokio::sync::watch;

use super::{Endpoint, EngineKey, LaunchSpec, LogTail, Running, RuntimeHandle, Tls};
use crate::config::catalog::{ExternalSpec, RuntimeSpec};
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
        let endpoint = endpoint(spec.model.name.as_str(), external).await?;
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
