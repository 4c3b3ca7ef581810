//! Host RAM is never promised twice: measured against what engines on the machine may take.

use wharf::scheduler::event::HostMemory;
use wharf::units::{Bytes, InstanceId};

use super::{Checker, Told};
use crate::machine::Machine;

impl Checker {
    /// Known to the scheduler: declared, or told by a sample.
    pub(super) fn host_total(&self) -> Option<Bytes> {
        self.catalog.settings.ram.total.or(self.host_seen.map(|host: HostMemory| host.total))
    }

    /// After every event. What was adopted is a fact that nobody promised.
    pub fn host_holds(&mut self, machine: &Machine) {
        let Some(total) = self.host_total().filter(|_| !self.adopts) else { return };
        let capacity = total - self.catalog.settings.ram.reserve;
        let claimed: Bytes = machine.insts.values().map(crate::machine::Inst::host_claim).sum();
        self.require(claimed <= capacity, || {
            format!("engines may take {claimed} of host RAM; {capacity} may be promised")
        });
    }

    /// What the newest sample shows must do beside what loads already.
    pub(super) fn start_fits_host(&mut self, instance: InstanceId, machine: &Machine) {
        let really = |id: &InstanceId| machine.insts.get(id).map_or(Bytes::ZERO, |i| i.ram_need);
        let need = really(&instance);
        let Some(host) = self.host_seen.filter(|_| need > Bytes::ZERO) else { return };
        let loads = |id: &&InstanceId| **id != instance && self.insts[*id].told == Told::Starting;
        let loading: Bytes = self.live.iter().filter(loads).map(really).sum();
        let reserve = self.catalog.settings.ram.reserve;
        self.require(need + loading + reserve <= host.available, || {
            format!(
                "{instance} needs {need} of host RAM beside {loading} that load and {reserve} in \
                 reserve, but {} are available",
                host.available
            )
        });
    }
}
