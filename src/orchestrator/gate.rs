//! The gate of one instance: how the gateway takes a lease without asking the owner.
//!
//! One atomic word holds "open" and the number of leases. The gateway takes a lease with one
//! compare-and-swap; the owner closes the gate and then reads the count, so that after `close`
//! no lease can appear that the owner did not grant itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::adapters::{AdapterStates, InUse, Use};
use super::handle::{Inbox, Message};
use crate::runtime::Endpoint;
use crate::scheduler::event::GateCount;
use crate::units::{InstanceId, ModelName, Time};
use crate::upstream::UpstreamClient;

const OPEN: u64 = 1 << 63;
const COUNT: u64 = OPEN - 1;

/// How the model was when the request came (label `start` of the time-to-first-token metric).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartKind {
    Hot,
    Warm,
    Cold,
}

impl StartKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            StartKind::Hot => "hot",
            StartKind::Warm => "warm",
            StartKind::Cold => "cold",
        }
    }
}

/// A ready instance as the gateway sees it.
#[derive(Debug)]
pub struct Gate {
    pub instance: InstanceId,
    pub model: ModelName,
    pub endpoint: Endpoint,
    /// A connection pool of this instance alone: it goes when the instance goes.
    pub client: UpstreamClient,
    /// Ends the leases taken since the gate was opened last. Renewed when it opens again: a drain
    /// may be called off after its leases were cut, and the instance then serves on.
    cut: ArcSwap<CancellationToken>,
    word: AtomicU64,
    permits: AtomicU32,
    granted: AtomicU64,
    /// Probes: they count as served, not as demand.
    granted_quietly: AtomicU64,
    last_used: AtomicU64,
    ping_every_release: AtomicBool,
    pinged: AtomicBool,
    /// Those that the instance serves beside its own model.
    pub adapters: watch::Receiver<AdapterStates>,
    inbox: Inbox,
    epoch: Instant,
    gone: CancellationToken,
    /// The last field: dropped after the connections.
    _last: DropGuard,
}

impl Gate {
    pub(super) fn new(
        instance: InstanceId,
        model: ModelName,
        endpoint: Endpoint,
        inbox: Inbox,
        epoch: Instant,
    ) -> Gate {
        let client = UpstreamClient::to(&endpoint);
        Gate::with(instance, model, endpoint, client, inbox, epoch)
    }

    /// With connections that are open already.
    pub(super) fn with(
        instance: InstanceId,
        model: ModelName,
        endpoint: Endpoint,
        client: UpstreamClient,
        inbox: Inbox,
        epoch: Instant,
    ) -> Gate {
        let gone = CancellationToken::new();
        Gate {
            instance,
            model,
            client,
            endpoint,
            cut: ArcSwap::default(),
            word: AtomicU64::new(0),
            permits: AtomicU32::new(0),
            granted: AtomicU64::new(0),
            granted_quietly: AtomicU64::new(0),
            last_used: AtomicU64::new(elapsed_ms(epoch)),
            ping_every_release: AtomicBool::new(false),
            pinged: AtomicBool::new(false),
            adapters: watch::channel(AdapterStates::new()).1,
            inbox,
            epoch,
            _last: gone.clone().drop_guard(),
            gone,
        }
    }

    /// Cancelled once the gate and every lease are dropped: no connection to the engine is ours.
    pub(super) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    pub(super) fn serving(self, adapters: watch::Receiver<AdapterStates>) -> Gate {
        Gate { adapters, ..self }
    }

    /// A lease, if the gate is open and has a permit left.
    pub fn try_lease(self: &Arc<Self>) -> Option<Lease> {
        self.take_permit()?;
        Some(self.leased(StartKind::Hot))
    }

    /// As [`Gate::try_lease`], but the scheduler sees no demand in it: for `X-Wharf-Start: never`,
    /// so that health probes do not keep an idle model loaded.
    pub fn try_lease_quietly(self: &Arc<Self>) -> Option<Lease> {
        self.take_permit()?;
        self.granted_quietly.fetch_add(1, Ordering::Relaxed);
        Some(self.lease(StartKind::Hot, Hold::Quiet))
    }

    /// For what is no work: it takes no permit, nobody waits for its end, and it ends when the
    /// engine is told to stop or sleep. `None`: that is so already.
    pub fn visit(self: &Arc<Self>) -> Option<Lease> {
        let lease = self.lease(StartKind::Hot, Hold::Visit);
        (!lease.cut.is_cancelled()).then_some(lease)
    }

    fn take_permit(&self) -> Option<()> {
        let permits = u64::from(self.permits.load(Ordering::Relaxed));
        self.word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                (word & OPEN != 0 && (word & COUNT) < permits).then_some(word + 1)
            })
            .ok()
            .map(|_| ())
    }

    /// Closed means: under notice, stopping, or full by the owner's decision.
    pub fn is_open(&self) -> bool {
        self.word.load(Ordering::Acquire) & OPEN != 0
    }

    /// The owner's own grant: also through a closed gate.
    pub(super) fn grant(self: &Arc<Self>, start: StartKind) -> Lease {
        self.word.fetch_add(1, Ordering::AcqRel);
        self.leased(start)
    }

    fn leased(self: &Arc<Self>, start: StartKind) -> Lease {
        self.granted.fetch_add(1, Ordering::Relaxed);
        self.touch();
        self.lease(start, Hold::Work)
    }

    fn lease(self: &Arc<Self>, start: StartKind, hold: Hold) -> Lease {
        Lease { gate: Arc::clone(self), cut: self.cut.load_full(), start, hold, on_adapter: None }
    }

    /// Ends every lease now.
    pub fn cancel_leases(&self) {
        self.cut.load().cancel();
    }

    /// The leases were ended, and the gate has not been opened since.
    pub fn is_cancelled(&self) -> bool {
        self.cut.load().is_cancelled()
    }

    pub(super) fn open(&self, permits: u32) {
        if self.is_cancelled() {
            self.cut.store(Arc::default());
        }
        self.permits.store(permits, Ordering::Relaxed);
        self.word.fetch_or(OPEN, Ordering::AcqRel);
    }

    pub(super) fn close(&self) {
        self.word.fetch_and(!OPEN, Ordering::AcqRel);
    }

    pub(super) fn watch(&self, every_release: bool) {
        self.ping_every_release.store(every_release, Ordering::SeqCst);
    }

    /// Counters for the scheduler. Re-arms the ping first, so that nothing is missed: a `release`
    /// is either in the count or sends a ping. Two words are written and read crosswise here and
    /// there, which takes one order of all four steps, hence `SeqCst`.
    pub(super) fn read(&self) -> GateCount {
        self.pinged.swap(false, Ordering::SeqCst);
        GateCount {
            in_flight: count_of(self.word.load(Ordering::SeqCst)),
            granted: self.granted.load(Ordering::Relaxed),
            last_used: Time(self.last_used.load(Ordering::Relaxed)),
        }
    }

    pub fn in_flight(&self) -> u32 {
        count_of(self.word.load(Ordering::Acquire))
    }

    pub fn granted(&self) -> u64 {
        self.granted.load(Ordering::Relaxed) + self.granted_quietly.load(Ordering::Relaxed)
    }

    /// When a lease was last taken or ended; before the first, when the gate was made.
    pub fn last_used(&self) -> Time {
        Time(self.last_used.load(Ordering::Relaxed))
    }

    fn touch(&self) {
        self.last_used.store(elapsed_ms(self.epoch), Ordering::Relaxed);
    }

    fn release(&self, hold: Hold) {
        if hold == Hold::Visit {
            return;
        }
        if hold == Hold::Work {
            self.touch();
        }
        let before = self.word.fetch_sub(1, Ordering::SeqCst);
        let drained = before & OPEN == 0 && before & COUNT == 1;
        if (drained || self.ping_every_release.load(Ordering::SeqCst))
            && !self.pinged.swap(true, Ordering::SeqCst)
        {
            self.inbox.send(Message::GatePing(self.instance));
        }
    }
}

fn count_of(word: u64) -> u32 {
    u32::try_from(word & COUNT).unwrap_or(u32::MAX)
}

fn elapsed_ms(epoch: Instant) -> u64 {
    u64::try_from(epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Permission for one request to use one instance. Ends when dropped: keep it inside the response
/// body, so that it lasts until the last byte.
#[derive(Debug)]
#[must_use = "a lease ends when it is dropped"]
pub struct Lease {
    gate: Arc<Gate>,
    /// Shared, as a token that is cloned locks all of its clones.
    cut: Arc<CancellationToken>,
    pub start: StartKind,
    hold: Hold,
    on_adapter: Option<InUse>,
}

/// What a lease is to its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Work,
    /// Counted while it lasts, but no demand.
    Quiet,
    /// Not counted at all.
    Visit,
}

impl Lease {
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// One more lease for work that goes on behind this one. As this one is counted, the owner sees
    /// no moment without a lease in between. It ends with the same cut.
    pub fn another(&self) -> Lease {
        debug_assert!(!self.is_visit(), "a guest's lease is not counted");
        self.gate.word.fetch_add(1, Ordering::AcqRel);
        Lease {
            gate: Arc::clone(&self.gate),
            cut: Arc::clone(&self.cut),
            start: self.start,
            hold: Hold::Work,
            on_adapter: None,
        }
    }

    /// Taken by [`Gate::visit`].
    pub fn is_visit(&self) -> bool {
        self.hold == Hold::Visit
    }

    /// The adapter is in use as long as the lease lasts.
    pub fn count_on(&mut self, adapter: &Arc<Use>) {
        self.on_adapter = Some(adapter.begin());
    }

    /// Cancelled when this lease must end now: drain deadline, forced unload, or a dead instance.
    pub fn cut(&self) -> &CancellationToken {
        &self.cut
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.gate.release(self.hold);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate() -> Arc<Gate> {
        gate_with(Inbox::new().0)
    }

    fn gate_with(inbox: Inbox) -> Arc<Gate> {
        let endpoint = Endpoint::new("http://127.0.0.1:1", None);
        let model = ModelName::new("ada");
        let gate = Gate::new(InstanceId(1), model, endpoint, inbox, Instant::now());
        gate.open(2);
        Arc::new(gate)
    }

    #[test]
    fn an_instance_that_was_rescued_after_its_leases_were_cut_serves_again() {
        let gate = gate();
        let before = gate.try_lease().unwrap();
        gate.close();
        gate.cancel_leases();
        assert!(before.cut().is_cancelled());
        gate.open(2);
        let after = gate.try_lease().unwrap();
        assert!(!after.cut().is_cancelled(), "a fresh start");
        assert!(before.cut().is_cancelled(), "what was cut stays cut");
        assert_eq!(gate.in_flight(), 2);
    }

    #[test]
    fn nothing_passes_a_closed_gate_but_the_owners_own_grant() {
        let gate = gate();
        let leases = (gate.try_lease().unwrap(), gate.try_lease().unwrap());
        assert!(gate.try_lease().is_none(), "two permits");
        gate.close();
        drop(leases.0);
        assert!(gate.try_lease().is_none());
        let granted = gate.grant(StartKind::Cold);
        assert_eq!(gate.in_flight(), 2);
        drop((leases.1, granted));
        assert_eq!((gate.in_flight(), gate.granted()), (0, 3));
    }

    #[test]
    fn a_guest_is_not_counted_and_leaves_when_the_engine_does() {
        let gate = gate();
        let guest = gate.visit().unwrap();
        gate.close();
        assert!(gate.visit().is_some(), "also while the last work ends");
        assert_eq!((gate.in_flight(), gate.granted()), (0, 0));
        drop(guest);
        assert_eq!(gate.in_flight(), 0);
        let guest = gate.visit().unwrap();
        gate.cancel_leases();
        assert!(guest.cut().is_cancelled());
        assert!(gate.visit().is_none());
    }

    #[test]
    fn work_behind_a_request_is_counted_as_long_as_it_lasts() {
        let gate = gate();
        let request = gate.try_lease().unwrap();
        let work = request.another();
        gate.close();
        drop(request);
        assert_eq!((gate.in_flight(), gate.granted()), (1, 1));
        gate.cancel_leases();
        assert!(work.cut().is_cancelled());
        drop(work);
        assert_eq!(gate.in_flight(), 0);
    }

    #[test]
    fn it_is_gone_with_its_last_lease_and_its_connections() {
        let gate = gate();
        let (gone, lease) = (gate.gone(), gate.try_lease().unwrap());
        drop(gate);
        assert!(!gone.is_cancelled(), "somebody still uses a connection");
        drop(lease);
        assert!(gone.is_cancelled());
    }

    /// Reading and releasing at the same moment, often: with weaker orders than `SeqCst` some
    /// releases are neither counted nor told.
    #[test]
    fn a_release_is_counted_or_told() {
        const ROUNDS: usize = 20_000;
        let (inbox, mut pings) = Inbox::new();
        let gate = gate_with(inbox);
        gate.close();
        let (begun, ended) = (AtomicU64::new(0), AtomicU64::new(0));
        let spin_until = |word: &AtomicU64, round: u64| {
            let mut spins = 0_u32;
            while word.load(Ordering::Acquire) < round {
                spins += 1;
                if spins.is_multiple_of(500) {
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
            }
        };
        let lost = std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=ROUNDS as u64 {
                    spin_until(&begun, round);
                    // Both hold the word in their cache: so a write takes a while to be seen.
                    for _ in 0..20 {
                        std::hint::black_box(gate.in_flight());
                    }
                    gate.release(Hold::Quiet);
                    ended.store(round, Ordering::Release);
                }
            });
            (1..=ROUNDS as u64)
                .filter(|round| {
                    std::mem::forget(gate.grant(StartKind::Hot));
                    gate.pinged.store(true, Ordering::SeqCst);
                    while pings.try_recv().is_ok() {}
                    begun.store(*round, Ordering::Release);
                    // The other one begins a moment later: so the two meet now and then.
                    for wait in 0..round % 200 {
                        std::hint::black_box(wait);
                    }
                    let counted = gate.read().in_flight == 0;
                    spin_until(&ended, *round);
                    !counted && pings.try_recv().is_err()
                })
                .count()
        });
        assert_eq!(lost, 0, "of {ROUNDS}");
    }
}
