//! What the scheduler wants done. Serialisable; the owner performs each one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::event::{Fault, Learned};
use super::record::SwapRecord;
use crate::units::{AskId, Bytes, GpuId, InstanceId, ModelName, RequestId, SwapId, Time};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Give the waiting request a lease on this instance (also when its gate is closed).
    Grant {
        request: RequestId,
        instance: InstanceId,
    },
    Refuse {
        request: RequestId,
        refusal: Refusal,
    },
    /// Let the gateway take leases by itself, up to `permits` at once.
    OpenGate {
        instance: InstanceId,
        permits: u32,
    },
    /// Stop that. The owner answers at once with `GateSeen`.
    CloseGate {
        instance: InstanceId,
    },
    /// Send `GateSeen` whenever a lease of this instance ends (true), or stop doing so.
    WatchGate {
        instance: InstanceId,
        every_release: bool,
    },
    /// End what still runs on this instance: streams with an error event, the rest requeued once.
    CancelLeases {
        instance: InstanceId,
        why: String,
    },

    /// Each ends with `MoveDone` carrying the same swap and instance.
    Preflight {
        swap: SwapId,
        instance: InstanceId,
        model: ModelName,
        gpus: Vec<GpuId>,
    },
    Fetch {
        swap: SwapId,
        instance: InstanceId,
        model: ModelName,
    },
    /// Whoever has to leave begins to: what of the start needs no room yet may be done meanwhile.
    /// Nothing is reported; an end of the swap before its start undoes it.
    Prepare {
        swap: SwapId,
        instance: InstanceId,
        gpus: Vec<GpuId>,
        /// As it will likely be told to the start.
        footprint: Option<Bytes>,
    },
    StartInstance {
        swap: SwapId,
        instance: InstanceId,
        model: ModelName,
        gpus: Vec<GpuId>,
        /// Promised bytes on each of them; `None`: unknown, the instance has the GPUs alone.
        footprint: Option<Bytes>,
        deadline: Time,
    },
    /// Also cancels a start, fetch or preflight of this instance that is under way.
    StopInstance {
        swap: SwapId,
        instance: InstanceId,
    },
    Sleep {
        swap: SwapId,
        instance: InstanceId,
    },
    Wake {
        swap: SwapId,
        instance: InstanceId,
        deadline: Time,
    },
    /// Read the memory densely, and right after each stop and sleep, until unwatched.
    WatchMemory {
        swap: SwapId,
        gpus: Vec<GpuId>,
    },
    UnwatchMemory {
        swap: SwapId,
    },

    /// The ttl of a model's instance was extended; `None`: that instance leaves.
    TtlExtended {
        model: ModelName,
        until: Option<Time>,
    },

    /// The answer to each event that carries an ask; each gets exactly one.
    Answer {
        ask: AskId,
        answer: Answer,
    },
    /// A swap began, changed phase or ended: the ledger's row, whole.
    Record(SwapRecord),
    /// Something to remember over restarts.
    Remember {
        model: ModelName,
        learned: Learned,
    },
    /// A line for the log that a person should see.
    Notice {
        model: Option<ModelName>,
        text: String,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// The model is ready. `swapped`: it was not when asked.
    Ready {
        instance: InstanceId,
        swap: Option<SwapId>,
        swapped: bool,
    },
    /// The model is not loaded any more (or was not).
    Unloaded {
        was_loaded: bool,
    },
    Asleep {
        level: u8,
    },
    /// When the ttl ends now. `bounded`: not what was asked for, but what `ttl_bounds` allow.
    Extended {
        until: Time,
        left: Duration,
        bounded: bool,
    },
    /// No ttl runs, so there is none to extend: the model stays in any case. Why, in words.
    WithoutTtl {
        why: String,
    },
    /// `shut_out`: models that had a place before this pin and can have none beside it.
    Pinned {
        pinned: bool,
        shut_out: Vec<ModelName>,
    },
    /// The model is in no state for what was asked; nothing was changed. In words, with the fix.
    Declined {
        why: String,
    },
    /// The deadline passed; the swap goes on.
    TimedOut {
        swap: Option<SwapId>,
    },
    Refused(Refusal),
}

/// Why a request ends without a lease. The gateway's `reject.rs` turns it into HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    UnknownModel,
    /// `X-Wharf-Start: never` and the model is not ready.
    NotLoaded,
    QueueFull {
        limit: u32,
        per_model: bool,
    },
    /// Those ahead of it take longer than `queue.timeout`, by what was learned.
    Overloaded {
        /// Until its turn would come, at the least.
        expected_ms: u64,
        timeout_ms: u64,
    },
    /// `queue.timeout` passed; `waiting_for` says for what.
    QueueTimeout {
        waited_ms: u64,
        waiting_for: String,
    },
    /// Needs more than any GPU set, or the host, could ever give.
    CannotFit {
        need: Bytes,
        available: Bytes,
        gpus: u16,
        /// It is host RAM that is short; `gpus` says nothing.
        #[serde(default)]
        host: bool,
        /// Models whose pins hold what else could be free.
        #[serde(default)]
        pinned: Vec<ModelName>,
    },
    /// Group rules forbid that it is up beside a model that never leaves.
    KeptApart {
        group: String,
        by: ModelName,
    },
    /// The last start failed; the next is tried at `retry_at`.
    StartFailed {
        swap: Option<SwapId>,
        fault: Fault,
        retry_at: Time,
    },
    /// The victim's memory did not come back.
    VramNeverFreed {
        swap: SwapId,
        fault: Fault,
        retry_at: Time,
    },
    /// The GPU cannot be read: no proof, no starts.
    NoVramProof {
        message: String,
    },
    /// The runtime that holds the model does not answer.
    RuntimeLost {
        message: String,
    },
    /// Unloaded by an operator while it waited.
    Unloaded,
    /// Removed from the configuration while it waited.
    Removed,
    /// Died or was stopped under the request, and the one retry was used.
    InstanceLost {
        message: String,
    },
    ShuttingDown,
}
