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

    pub fn text(&self) -> String {
        let mut text = Vec::with_capacity(64);
        self.write(&mut text);
        String::from_utf8(text).unwrap_or_default()
    }

    /// Milliseconds, to a tenth.
    pub fn write(&self, text: &mut Vec<u8>) {
        for (name, part) in
            [("queue", self.queue), (", swap", self.swap), (", upstream", self.upstream)]
        {
            let tenths = part.as_secs() * 10_000 + u64::from(part.subsec_micros() + 50) / 100;
            let mut digits = itoa::Buffer::new();
            text.extend_from_slice(name.as_bytes());
            text.extend_from_slice(b";dur=");
            text.extend_from_slice(digits.format(tenths / 10).as_bytes());
            text.push(b'.');
            text.push(b'0' + (tenths % 10) as u8);
        }
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
