//! Clients and leases: the gateway's side of a gate.

use wharf::scheduler::action::Refusal;
use wharf::scheduler::event::{Event, Request};
use wharf::units::{InstanceId, RequestId, Time};

use crate::machine::Real;
use crate::scenario::Plan;
use crate::world::{Next, World};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseEnd {
    Served,
    Left,
    /// The instance died under it.
    Broken,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Served,
    Left,
    /// Broken or cancelled after its head, or twice.
    Lost,
    Refused(Refusal),
}

#[derive(Clone, Debug)]
pub struct Client {
    pub plan: Plan,
    pub arrived: u64,
    pub attempt: u8,
    pub waiting: Option<RequestId>,
    pub lease: Option<u64>,
    pub grants: u8,
    /// Which loop it belongs to.
    pub of_loop: Option<usize>,
    pub outcome: Option<Outcome>,
    /// When it first held a lease.
    pub first_lease: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct Lease {
    pub client: usize,
    pub instance: InstanceId,
    pub began: u64,
}

impl World {
    pub fn arrive(&mut self, plan: Plan, of_loop: Option<usize>) {
        let client = self.clients.len();
        self.clients.push(Client {
            plan,
            arrived: self.now,
            attempt: 1,
            waiting: None,
            lease: None,
            grants: 0,
            of_loop,
            outcome: None,
            first_lease: None,
        });
        self.ask_for_lease(client);
    }

    /// The fast path, else the queue.
    pub fn ask_for_lease(&mut self, index: usize) {
        let client = &self.clients[index];
        if client.outcome.is_some() {
            return;
        }
        if let Some(instance) = self.machine.open_gate(&client.plan.model) {
            self.note(|| format!("client {index} takes a lease of {instance} by its gate"));
            return self.lease(index, instance);
        }
        let id = RequestId(self.id());
        let client = &mut self.clients[index];
        client.waiting = Some(id);
        let request = Request {
            id,
            model: client.plan.model.clone(),
            priority: client.plan.priority,
            max_wait: client.plan.max_wait,
            may_hurry: true,
            never_start: client.plan.never_start,
            attempt: client.attempt,
            arrived: Time(client.arrived),
        };
        let leaves = client.plan.leaves_queue_after;
        self.waiting.insert(id, index);
        self.tell(Event::RequestArrived(request));
        if let Some(ms) = leaves {
            self.after(ms, Next::LeavesQueue(index));
        }
    }

    pub fn leaves_queue(&mut self, index: usize) {
        let Some(id) = self.clients[index].waiting.take() else { return };
        self.finish(index, Outcome::Left);
        let late = self.rng.chance(self.faults.late_gone);
        let ms = if late { 4 + self.rng.below(20) } else { 4 };
        // It stays in `waiting` without a client: a grant that crosses is dropped at once.
        self.after(ms, Next::Tell(Event::RequestGone { request: id }));
    }

    pub fn granted(&mut self, request: RequestId, instance: InstanceId) {
        let Some(index) = self.waiting.remove(&request) else { return };
        if self.clients[index].waiting.take().is_some() {
            return self.lease(index, instance);
        }
        // The client left meanwhile: its lease begins and ends.
        let lease = self.take(index, instance);
        self.lease_end(lease, LeaseEnd::Left);
    }

    pub fn refused(&mut self, request: RequestId, refusal: &Refusal) {
        let Some(index) = self.waiting.remove(&request) else { return };
        if self.clients[index].waiting.take().is_some() {
            self.finish(index, Outcome::Refused(refusal.clone()));
        }
    }

    pub fn gone(&mut self, request: RequestId) {
        self.waiting.remove(&request);
    }

    fn take(&mut self, index: usize, instance: InstanceId) -> u64 {
        let lease = self.id();
        let now = self.now;
        let gate = self.machine.gates.entry(instance).or_default();
        gate.count.in_flight += 1;
        gate.count.granted += 1;
        gate.count.last_used = Time(now);
        self.dirty.insert(instance);
        self.leases.insert(lease, Lease { client: index, instance, began: now });
        lease
    }

    fn lease(&mut self, index: usize, instance: InstanceId) {
        let lease = self.take(index, instance);
        let real = self.machine.insts.get(&instance).map(|inst| inst.real);
        let now = self.now;
        let client = &mut self.clients[index];
        client.lease = Some(lease);
        client.grants += 1;
        client.first_lease.get_or_insert(now);
        if client.grants > 2 {
            let message = format!("client {index} was granted {} leases", client.grants);
            return self.checker.fail(message);
        }
        let (service, left) = (client.plan.service_ms, client.plan.leaves_flight_after);
        let (ms, how) = match left {
            Some(ms) if ms < service => (ms, LeaseEnd::Left),
            _ => (service, LeaseEnd::Served),
        };
        if matches!(real, Some(Real::Gone | Real::Dying) | None) {
            let ms = self.rng.below(20);
            return self.after(ms, Next::LeaseEnd { lease, how: LeaseEnd::Broken });
        }
        self.after(ms, Next::LeaseEnd { lease, how });
        if self.rng.chance(self.faults.crash_serving) {
            let ms = self.rng.range(0, service);
            self.after(ms, Next::Exit(instance));
        }
    }

    pub fn end_leases(&mut self, instance: InstanceId, how: LeaseEnd, within_ms: u64) {
        let leases: Vec<u64> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.instance == instance)
            .map(|(&id, _)| id)
            .collect();
        for lease in leases {
            let ms = self.rng.below(within_ms);
            self.after(ms, Next::LeaseEnd { lease, how });
        }
    }

    pub fn lease_end(&mut self, lease: u64, how: LeaseEnd) {
        let Some(Lease { client: index, instance, began }) = self.leases.remove(&lease) else {
            return;
        };
        self.release(instance);
        let now = self.now;
        let client = &mut self.clients[index];
        client.lease = None;
        let no_head = now < began + client.plan.head_ms;
        let retry = no_head && client.attempt == 1;
        match how {
            LeaseEnd::Broken | LeaseEnd::Cancelled if retry && client.outcome.is_none() => {
                client.attempt = 2;
                let ms = self.rng.below(10);
                self.after(ms, Next::Retry(index));
            }
            LeaseEnd::Broken | LeaseEnd::Cancelled => self.finish(index, Outcome::Lost),
            LeaseEnd::Served => self.finish(index, Outcome::Served),
            LeaseEnd::Left => self.finish(index, Outcome::Left),
        }
    }

    fn release(&mut self, instance: InstanceId) {
        let now = self.now;
        let Some(gate) = self.machine.gates.get_mut(&instance) else { return };
        gate.count.in_flight -= 1;
        gate.count.last_used = Time(now);
        self.dirty.insert(instance);
        let drained = !gate.open && gate.count.in_flight == 0;
        if (drained || gate.every_release) && !gate.pinged {
            gate.pinged = true;
            let ms = self.rng.below(3);
            self.after(ms, Next::Ping(instance));
        }
    }

    fn finish(&mut self, index: usize, outcome: Outcome) {
        let client = &mut self.clients[index];
        if client.outcome.is_some() {
            return;
        }
        if client.plan.must_be_served && outcome != Outcome::Served {
            let model = client.plan.model.clone();
            self.checker.fail(format!(
                "all is quiet and {model} fits, but a request for it ended as {outcome:?}"
            ));
        }
        let client = &mut self.clients[index];
        client.outcome = Some(outcome);
        if let Some(of_loop) = client.of_loop {
            let think = self.loops[of_loop].think_ms;
            self.after(think + 1, Next::Turn(of_loop));
        }
    }

    /// The next request of a closed loop.
    pub fn turn(&mut self, index: usize) {
        let now = self.now;
        let turns = &mut self.loops[index];
        if turns.left == 0 || now >= turns.until {
            return;
        }
        turns.left -= 1;
        let plan = turns.turns[turns.left % turns.turns.len()].clone();
        self.arrive(plan, Some(index));
    }
}
