//! A small world for tests of the control API and the metrics: three models on one 24 GiB GPU,
//! and an owner that the test plays.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use wharf::config::catalog::*;
use wharf::orchestrator::Handle;
use wharf::orchestrator::View;
use wharf::orchestrator::handle::Message;
use wharf::orchestrator::view::{GpuFacts, Health as PartHealth, ModelFacts};
use wharf::runtime::{Endpoint, Foreign, ProgressNow};
use wharf::scheduler::event::{Fault, FaultKind, GpuMemory, Holder};
use wharf::scheduler::record::*;
use wharf::store::SwapRow;
use wharf::units::*;

/// Ready, two requests in flight.
pub const MISTRAL: &str = "mistral";
/// Starting; two requests wait.
pub const CODER: &str = "org/coder:7b";
/// Failed, to be tried again later.
pub const TINY: &str = "tiny";

pub fn model(name: &str) -> ModelSpec {
    ModelSpec {
        runtime: RuntimeSpec::Process(ProcessSpec {
            argv: vec!["engine".to_owned()],
            ..ProcessSpec::default()
        }),
        vram: Vram::Declared(Bytes::gib(16)),
        size_gb: Some(14.5),
        health: Health { path: Some("/health".to_owned()), stall: Duration::from_secs(60) },
        ..ModelSpec::plain(name)
    }
}

pub fn settings() -> Settings {
    let any_port = ([127, 0, 0, 1], 0).into();
    let gpu = GpuSettings {
        provider: GpuProvider::Simulated,
        memory: vec![Bytes::gib(24)],
        ..Settings::default().gpu
    };
    Settings { gateway: any_port, orchestrator: any_port, gpu, ..Settings::default() }
}

pub fn catalog(models: impl IntoIterator<Item = ModelSpec>) -> Catalog {
    let models: BTreeMap<_, _> =
        models.into_iter().map(|spec| (spec.name.clone(), Arc::new(spec))).collect();
    let aliases = models
        .values()
        .flat_map(|spec| spec.aliases.iter().map(|alias| (alias.clone(), spec.name.clone())))
        .collect();
    Catalog { models, aliases, settings: settings(), ..Catalog::default() }
}

pub fn three_models() -> Catalog {
    let mistral = ModelSpec {
        aliases: vec!["gpt-4o-mini".to_owned()],
        display_name: Some("Mistral 7B".to_owned()),
        tags: vec!["chat".to_owned()],
        upstream_name: Some("mistral:7b".to_owned()),
        ttl: Some(Duration::from_secs(600)),
        priority: Priority::High,
        ..model(MISTRAL)
    };
    catalog([mistral, model(CODER), model(TINY)])
}

pub fn residency(name: &str, residency: ResidencyView, instance: Option<u64>) -> ModelView {
    ModelView {
        name: ModelName::new(name),
        residency,
        instance: instance.map(InstanceId),
        gpus: instance.map(|_| GpuId(0)).into_iter().collect(),
        since: Time(900_000),
        footprint: Some(Bytes::gib(16)),
        swap: None,
        queue: Vec::new(),
        oldest: None,
        ready_in: None,
        waiting_for: String::new(),
        pinned: false,
        kept: false,
        ttl_runs: name == MISTRAL,
        ttl_until: None,
    }
}

pub fn fault() -> Fault {
    Fault::new(FaultKind::OutOfMemory, "CUDA out of memory: declare a larger vram")
        .with_log(vec!["loading".to_owned(), "CUDA out of memory".to_owned()])
}

/// A swap that made `model` ready in 9 s, in place of `evicted`.
pub fn ended_swap(id: u64, model: &str, evicted: &[&str], outcome: SwapOutcome) -> SwapRecord {
    let evicted = evicted.iter().map(|name| Eviction {
        model: ModelName::new(name),
        instance: InstanceId(1),
        why: "idle 41 s, cheapest to bring back, frees 16.0 GiB".to_owned(),
    });
    SwapRecord {
        id: SwapId(id),
        model: ModelName::new(model),
        kind: SwapKind::Load,
        cause: SwapCause::Request,
        decision: "2 requests wait, the oldest for 1.2 s".to_owned(),
        instance: Some(InstanceId(id)),
        gpus: vec![GpuId(0)],
        evicted: evicted.collect(),
        began: Time(900_000),
        ended: Some(Time(909_000)),
        phases: vec![
            (Phase::Drain, Duration::from_millis(500)),
            (Phase::Prove, Duration::from_millis(1200)),
            (Phase::Start, Duration::from_secs(7)),
        ],
        phase: None,
        outcome: Some(outcome),
    }
}

/// Its times lie ahead of the owner's clock, which begins with each test: ages since them are 0.
pub fn view() -> View {
    let under_way = SwapRecord {
        ended: None,
        outcome: None,
        phases: vec![(Phase::Preflight, Duration::from_millis(3))],
        phase: Some((Phase::Start, Time(950_000))),
        ..ended_swap(9, CODER, &[TINY], SwapOutcome::Ready)
    };
    let coder = ModelView {
        swap: Some(SwapId(9)),
        queue: vec![RequestId(4), RequestId(5)],
        oldest: Some(Time(940_000)),
        ready_in: Some(Duration::from_secs(9)),
        waiting_for: "org/coder:7b starts (load_weights)".to_owned(),
        ..residency(CODER, ResidencyView::Starting { phase: Phase::Start }, Some(9))
    };
    let failed = ResidencyView::Failed { retry_at: Time(2_000_000), fault: fault() };
    let ledger = [
        ended_swap(7, MISTRAL, &[], SwapOutcome::Ready),
        ended_swap(8, TINY, &[CODER], SwapOutcome::Failed(fault())),
    ];
    View {
        at: Time(1_000_000),
        scheduler: SchedulerView {
            models: vec![
                residency(MISTRAL, ResidencyView::Ready, Some(7)),
                coder,
                residency(TINY, failed, None),
            ],
            gpus: vec![GpuView {
                gpu: GpuId(0),
                total: Bytes::gib(24),
                promised: Bytes::gib(20),
                free: Some(Bytes::gib(6)),
            }],
            ram: RamView {
                total: Some(Bytes::gib(64)),
                available: Some(Bytes::gib(40)),
                promised: Bytes::gib(12),
                promised_to: vec![ModelName::new(MISTRAL)],
            },
            swaps: vec![under_way],
            queued: 2,
            no_proof: None,
        },
        models: facts(),
        progress: BTreeMap::from([(
            InstanceId(9),
            ProgressNow {
                stage: "load_weights".to_owned(),
                fraction: Some(0.4),
                detail: "shard 2 of 5".to_owned(),
            },
        )]),
        gpus: vec![gpu()],
        gpu_health: PartHealth { ok: true, detail: "simulated".to_owned() },
        docker_health: None,
        outages: Vec::new(),
        leftovers: Vec::new(),
        foreign: vec![Foreign {
            name: "stranger".to_owned(),
            image: "cuda:12".to_owned(),
            pids: vec![4711],
        }],
        ledger: Arc::new(VecDeque::from(ledger.map(Arc::new))),
    }
}

fn facts() -> BTreeMap<ModelName, ModelFacts> {
    let mistral = ModelFacts {
        loaded_at: Some(Time(900_000)),
        uptime_before: Duration::from_secs(3600),
        requests_before: 40,
        starts: 2,
        endpoint: Some("http://127.0.0.1:18051".to_owned()),
        ..ModelFacts::default()
    };
    let coder =
        ModelFacts { endpoint: Some("http://127.0.0.1:18052".to_owned()), ..ModelFacts::default() };
    let tiny = ModelFacts {
        loaded_at: Some(Time(100_000)),
        unloaded_at: Some(Time(400_000)),
        uptime_before: Duration::from_secs(300),
        last_fault: Some(fault()),
        ..ModelFacts::default()
    };
    [(MISTRAL, mistral), (CODER, coder), (TINY, tiny)]
        .map(|(name, facts)| (ModelName::new(name), facts))
        .into()
}

fn gpu() -> GpuFacts {
    let holder = |pid, gib, label: &str, instance| Holder {
        pid,
        bytes: Bytes::gib(gib),
        label: label.to_owned(),
        instance,
    };
    GpuFacts {
        id: GpuId(0),
        uuid: "GPU-0".to_owned(),
        name: "Simulated 24 GiB".to_owned(),
        memory: Some(GpuMemory {
            gpu: GpuId(0),
            uuid: "GPU-0".to_owned(),
            total: Bytes::gib(24),
            free: Bytes::gib(6),
            holders: vec![
                holder(100, 16, "engine mistral", Some(InstanceId(7))),
                holder(4711, 2, "python train.py (container stranger)", None),
            ],
        }),
        utilization: Some(0.25),
    }
}

/// An orchestrator whose owner is the test.
pub struct Puppet {
    pub handle: Handle,
    /// What the owner would receive.
    pub inbox: tokio::sync::mpsc::UnboundedReceiver<Message>,
}

impl Puppet {
    pub fn new(catalog: Catalog) -> Puppet {
        let (handle, inbox) = Handle::for_tests(Arc::new(catalog));
        Puppet { handle, inbox }
    }
}

/// The world of [`view`], with mistral's gate open and two requests in flight on it.
pub fn world() -> (Puppet, Vec<wharf::orchestrator::Lease>) {
    let puppet = Puppet::new(three_models());
    let view = view();
    for record in view.ledger.iter().map(|swap| swap.as_ref().clone()) {
        let began = puppet.handle.wall(record.began);
        let began = began.duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let began_unix_ms = u64::try_from(began.as_millis()).expect("in range");
        puppet.handle.store().record_swap(SwapRow { began_unix_ms, record });
    }
    puppet.handle.publish_for_tests(view);
    let endpoint = Endpoint::new("http://127.0.0.1:18051", None);
    let gate = puppet.handle.gate_for_tests(InstanceId(7), &ModelName::new(MISTRAL), endpoint, 8);
    let leases = (0..2).map(|_| gate.try_lease().expect("an open gate")).collect();
    (puppet, leases)
}
