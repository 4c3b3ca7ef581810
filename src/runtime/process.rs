//! Engines as processes of their own process group.

use super::{Found, LaunchSpec, Running};
use crate::config::catalog::StopSpec;
use crate::scheduler::event::{Fault, FaultKind};

#[derive(Clone, Debug, Default)]
pub struct ProcessRuntime {}

impl ProcessRuntime {
    pub async fn preflight(&self, _spec: &LaunchSpec) -> Result<(), Fault> {
        Ok(())
    }

    pub async fn start(&self, _spec: &LaunchSpec) -> Result<Running, Fault> {
        Err(Fault::new(FaultKind::Internal, "not yet"))
    }

    pub async fn stop(&self, _running: &Running, _stop: &StopSpec) -> Result<(), Fault> {
        Ok(())
    }

    /// Every process of this installation, found by its environment in /proc.
    pub async fn find(&self, _installation: &str) -> Result<Vec<Found>, Fault> {
        Ok(Vec::new())
    }

    pub fn group_pids(&self, _leader: u32) -> Vec<u32> {
        Vec::new()
    }
}
