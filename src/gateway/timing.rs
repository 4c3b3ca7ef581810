//! Where a request's time went, for the `Server-Timing` header.

use std::time::Duration;

use crate::orchestrator::View;
use crate::scheduler::record::SwapKind;
use crate::units::{ModelName, Time};

/// Disjoint parts: waiting in the queue, waiting for a swap, waiting for the engine's first byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    pub queue: Duration,
    pub swap: Duration,
    pub upstream: Duration,
}

impl Timing {
    pub const HEADER: &str = "server-timing";

    /// Milliseconds, to a tenth.
    pub fn text(&self) -> String {
        let mut text = String::with_capacity(64);
        for (name, part) in
            [("queue", self.queue), (", swap", self.swap), (", upstream", self.upstream)]
        {
            let tenths = part.as_secs() * 10_000 + u64::from(part.subsec_micros() + 50) / 100;
            let mut digits = itoa::Buffer::new();
            text.push_str(name);
            text.push_str(";dur=");
            text.push_str(digits.format(tenths / 10));
            text.push('.');
            text.push_str(digits.format(tenths % 10));
        }
        text
    }
}

/// How much of the time between `from` and `to` the last swap of the model took.
pub fn swap_share(view: &View, model: &ModelName, from: Time, to: Time) -> Duration {
    let under_way = view.scheduler.swaps.iter();
    let ended = view.ledger.iter().rev().map(|swap| &**swap);
    let swap =
        under_way.chain(ended).find(|swap| swap.model == *model && swap.kind == SwapKind::Load);
    swap.map_or(Duration::ZERO, |swap| swap.ended.unwrap_or(to).min(to).since(swap.began.max(from)))
}
