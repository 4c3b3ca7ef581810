//! What the scheduler is told. Serialisable: the journal holds every one of them, in order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::catalog::Catalog;
use crate::units::{AskId, Bytes, GpuId, InstanceId, ModelName, Priority, RequestId, SwapId, Time};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A request found no open gate and waits.
    RequestArrived(Request),
    /// The client of a waiting request left. (A request that holds a lease ends by `GateSeen`.)
    RequestGone {
        request: RequestId,
    },
    /// Fresh counters of an instance's gate. The owner sends one for every gate that changed,
    /// before any other event, and at once after `CloseGate` and for a gate that pinged.
    GateSeen {
        instance: InstanceId,
        gate: GateCount,
    },
    EnsureAsked {
        ask: AskId,
        model: ModelName,
        kind: EnsureKind,
        deadline: Time,
    },
    /// The caller of an ensure or unload went away; what it began goes on.
    AskGone {
        ask: AskId,
    },
    UnloadAsked {
        ask: AskId,
        model: ModelName,
        force: bool,
    },
    /// `POST /models/{name}/sleep`: drains, then sleeps at the configured level.
    SleepAsked {
        ask: AskId,
        model: ModelName,
    },
    /// `POST /models/{name}/extend-ttl`; no `by`: as long as the model's own ttl.
    ExtendAsked {
        ask: AskId,
        model: ModelName,
        by: Option<Duration>,
    },
    /// `POST /models/{name}/pin`: in force instead of the configured one, also after a reload.
    PinAsked {
        ask: AskId,
        model: ModelName,
        pinned: bool,
    },
    /// An extended ttl of an earlier run, for an instance that was adopted.
    TtlUntil {
        model: ModelName,
        until: Time,
    },
    /// The first keep window of a model opened, or the last one closed: the owner knows the time
    /// of day.
    KeepChanged {
        model: ModelName,
        kept: bool,
    },
    /// `group/model` was asked for: the other members shall be loaded, too.
    CompanyAsked {
        group: String,
    },
    /// An effect ended. `swap` and `instance` are those of the action that began it;
    /// a completion that fits nothing under way is dropped.
    MoveDone {
        swap: SwapId,
        instance: InstanceId,
        done: Done,
    },
    /// A start reached its last part: the engine answers and is being vouched for.
    Vouching {
        swap: SwapId,
        instance: InstanceId,
    },
    /// A memory reading of every GPU and of the host (or why there is none).
    MemorySeen(Result<MemorySample, NoProof>),
    /// An instance that was starting, ready or sleeping ended by itself.
    InstanceDied {
        instance: InstanceId,
        fault: Fault,
    },
    /// A healthy instance found at start-up, unchanged since it was started. It is ready at once.
    Adopted {
        instance: InstanceId,
        model: ModelName,
        gpus: Vec<GpuId>,
        footprint: Bytes,
    },
    /// An engine that is ours and runs, but is not fit to be adopted, and why: it is stopped.
    Stray {
        instance: InstanceId,
        model: ModelName,
        gpus: Vec<GpuId>,
        footprint: Bytes,
        why: String,
    },
    /// Figures of earlier runs, read from the store at start-up.
    Remembered {
        model: ModelName,
        learned: Learned,
    },
    CatalogChanged(Arc<Catalog>),
    /// Docker (say) stopped answering: its instances are `Lost`, their bytes stay promised.
    /// `why`: what is wrong and the fix, fit for clients.
    RuntimeLost {
        instances: Vec<InstanceId>,
        why: String,
    },
    /// It answers again: these still live; the other lost ones died.
    RuntimeBack {
        alive: Vec<InstanceId>,
        dead: Vec<InstanceId>,
    },
    /// Refuse everything that waits and start nothing more.
    ShuttingDown,
    /// The time of `next_wake` came.
    Woke,
}

impl Event {
    /// It says by itself whether it changes more than its own request or instance.
    pub(super) fn is_of_a_request(&self) -> bool {
        matches!(
            self,
            Event::RequestArrived(_)
                | Event::RequestGone { .. }
                | Event::GateSeen { .. }
                | Event::MemorySeen(_)
                | Event::Woke
        )
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub id: RequestId,
    pub model: ModelName,
    pub priority: Priority,
    /// Asked for by the caller (bounded by its key); `None`: the configured one.
    pub max_wait: Option<Duration>,
    /// `max_wait` may also be shorter than the configured one.
    pub may_hurry: bool,
    /// `X-Wharf-Start: never`: serve only if ready, else refuse at once, leaving no trace.
    pub never_start: bool,
    /// 1, or 2 for the one safe retry.
    pub attempt: u8,
    /// First arrival, also on a retry: the age counts from here.
    pub arrived: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EnsureKind {
    /// `POST /ensure_model`: holds its model until its first request ends or 30 s pass.
    Ensure,
    /// `POST /models/{name}/load`: ensure without the hold.
    Load,
    /// `POST /models/{name}/wake`: as `Load`, for a model that sleeps.
    Wake,
    /// A warm-up model at start: never evicts, waits for free memory.
    Warmup,
}

/// Counters of one gate, read by the owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateCount {
    /// Leases held now.
    pub in_flight: u32,
    /// Leases granted since the instance became ready.
    pub granted: u64,
    /// When a lease was last taken or ended.
    pub last_used: Time,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Done {
    /// Preflight passed (spec, command, driver, runtime).
    Preflight(Result<(), Fault>),
    /// Image and weights are present.
    Fetch(Result<(), Fault>),
    /// The engine answers and was vouched for. `footprint`: measured bytes per GPU, where visible.
    Start(Result<Option<Bytes>, Fault>),
    /// The instance is gone (its memory perhaps not yet). An error: it may still run.
    Stop(Result<(), Fault>),
    /// Asleep, holding this many bytes per GPU, where visible.
    Sleep(Result<Option<Bytes>, Fault>),
    Wake(Result<Option<Bytes>, Fault>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemorySample {
    pub taken_at: Time,
    pub gpus: Vec<GpuMemory>,
    /// `None`: unknown, only promises count.
    #[serde(default)]
    pub host: Option<HostMemory>,
    /// Host RAM of our instances, where it can be told.
    #[serde(default)]
    pub ram: BTreeMap<InstanceId, HostUse>,
}

/// Host RAM of one instance: of all its processes, or of its container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostUse {
    /// What cannot give way: anonymous and shared memory.
    pub held: Bytes,
    /// With the files that it has in memory: weights that are mapped, for one.
    pub resident: Bytes,
}

/// Host RAM as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    pub total: Bytes,
    /// What programs can still get: free, and the page cache that gives way.
    pub available: Bytes,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuMemory {
    pub gpu: GpuId,
    pub uuid: String,
    pub total: Bytes,
    pub free: Bytes,
    pub holders: Vec<Holder>,
}

/// A process that holds memory on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    pub bytes: Bytes,
    /// Command and container where they can be read: `vllm serve (container coder)`.
    pub label: String,
    /// Set where the process belongs to an instance of ours.
    pub instance: Option<InstanceId>,
}

/// Why there is no memory reading.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoProof {
    pub message: String,
}

/// Why an effect failed. `message` names the thing and the fix.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    pub kind: FaultKind,
    pub message: String,
    /// `message` for those who may see neither log lines nor arguments; `None`: it holds neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<String>,
    /// The engine's last log lines.
    pub log_tail: Vec<String>,
}

impl Fault {
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Fault {
        Fault { kind, message: message.into(), public: None, log_tail: Vec::new() }
    }

    /// What everyone may be told instead of `message`.
    pub fn or_publicly(mut self, message: impl Into<String>) -> Fault {
        self.public = Some(message.into());
        self
    }

    /// More of the story, for everyone.
    #[must_use]
    pub fn and(mut self, more: &str) -> Fault {
        self.message.push_str(more);
        if let Some(public) = &mut self.public {
            public.push_str(more);
        }
        self
    }

    /// Fit for every client.
    pub fn public_message(&self) -> &str {
        self.public.as_deref().unwrap_or(&self.message)
    }

    pub fn with_log(mut self, log_tail: Vec<String>) -> Fault {
        self.log_tail = log_tail;
        self
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    ImageMissing,
    FetchDenied,
    FetchFailed,
    DiskFull,
    CommandMissing,
    BadSpec,
    GpuDriverMissing,
    PortTaken,
    NameConflict,
    RuntimeUnreachable,
    OutOfMemory,
    Exited,
    FatalLogLine,
    Stalled,
    TimedOut,
    NeverHealthy,
    StrangerOnPort,
    RunsOnCpu,
    NoVramProof,
    VramNeverFreed,
    StopFailed,
    SleepFailed,
    WakeFailed,
    AdapterFailed,
    Cancelled,
    Internal,
}

impl FaultKind {
    /// As it is written in answers and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            FaultKind::ImageMissing => "image_missing",
            FaultKind::FetchDenied => "fetch_denied",
            FaultKind::FetchFailed => "fetch_failed",
            FaultKind::DiskFull => "disk_full",
            FaultKind::CommandMissing => "command_missing",
            FaultKind::BadSpec => "bad_spec",
            FaultKind::GpuDriverMissing => "gpu_driver_missing",
            FaultKind::PortTaken => "port_taken",
            FaultKind::NameConflict => "name_conflict",
            FaultKind::RuntimeUnreachable => "runtime_unreachable",
            FaultKind::OutOfMemory => "out_of_memory",
            FaultKind::Exited => "exited",
            FaultKind::FatalLogLine => "fatal_log_line",
            FaultKind::Stalled => "stalled",
            FaultKind::TimedOut => "timed_out",
            FaultKind::NeverHealthy => "never_healthy",
            FaultKind::StrangerOnPort => "stranger_on_port",
            FaultKind::RunsOnCpu => "runs_on_cpu",
            FaultKind::NoVramProof => "no_vram_proof",
            FaultKind::VramNeverFreed => "vram_never_freed",
            FaultKind::StopFailed => "stop_failed",
            FaultKind::SleepFailed => "sleep_failed",
            FaultKind::WakeFailed => "wake_failed",
            FaultKind::AdapterFailed => "adapter_failed",
            FaultKind::Cancelled => "cancelled",
            FaultKind::Internal => "internal",
        }
    }

    /// Worth one immediate retry inside the swap.
    pub const fn is_transient(self) -> bool {
        matches!(self, FaultKind::PortTaken | FaultKind::RuntimeUnreachable)
    }
}

/// What earlier moves of a model taught.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// Awake peak per GPU.
    pub footprint: Option<Bytes>,
    /// Residue per GPU while asleep.
    pub asleep: Option<Bytes>,
    /// The peaks are those of an engine that has served for a while: they stand in for what is
    /// declared, also where they are smaller.
    #[serde(default)]
    pub seasoned: bool,
    /// Peak of host RAM, never having slept: what cannot give way.
    #[serde(default)]
    pub ram_held: Option<Bytes>,
    /// The same with the files that it had in memory.
    #[serde(default)]
    pub ram_resident: Option<Bytes>,
    /// Typical duration of each kind of move.
    pub start: Option<Duration>,
    pub stop: Option<Duration>,
    pub sleep: Option<Duration>,
    pub wake: Option<Duration>,
    /// Typical duration of each phase of a start, for progress estimates.
    pub phases: BTreeMap<String, Duration>,
}

impl Learned {
    /// Bytes are those of one engine only.
    pub fn forget_bytes(&mut self) {
        (self.footprint, self.asleep, self.seasoned) = (None, None, false);
        (self.ram_held, self.ram_resident) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::FaultKind;

    #[test]
    fn kinds_are_spelled_alike_in_answers_and_logs() {
        for kind in [FaultKind::RuntimeUnreachable, FaultKind::RunsOnCpu, FaultKind::NoVramProof] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
    }
}
