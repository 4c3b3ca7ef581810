//! An endpoint that runs elsewhere: it is only reached, never started or stopped.

use tokio::sync::watch;

use super::{Endpoint, LaunchSpec, LogTail, Running, RuntimeHandle};
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
        // The sender is dropped: the exit of something that runs elsewhere is never seen here.
        let (_, exit) = watch::channel(None);
        Ok(Running {
            identity: spec.identity.clone(),
            endpoint: Endpoint {
                base: external.url.trim_end_matches('/').to_owned(),
                api_key: external.api_key.clone(),
            },
            handle: RuntimeHandle::External,
            log: LogTail::new(),
            exit,
        })
    }
}
