//! `wharf replay`: recorded traffic against the real scheduler, on a virtual clock.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};

use crate::replay::figures::{self, Figures};
use crate::replay::setup::{Costs, FOR_EVER, Machine, Setup, Size, Terms};
use crate::replay::{self, Arrival};
use crate::scheduler::Policy;
use crate::units::{Bytes, GpuId, ModelName, Time};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recorded traffic: columns arrival_s,model,service_s
    pub trace: PathBuf,
    /// fair, exhaustive, fifo, or all side by side
    #[arg(long, default_value = "all")]
    pub policy: PolicyChoice,
    /// The first N arrivals only
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Arrival times are divided by this
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub compress: f64,
    /// Service times are multiplied by this
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub service_scale: f64,
    /// One GPU on which so many models of equal size fit
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub slots: u32,
    /// GPUs of these sizes instead
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = size, requires = "sizes", conflicts_with = "slots")]
    pub gpus: Vec<Bytes>,
    /// Sizes of models on each of their GPUs: 8GiB for all, MODEL=20GiB, MODEL=40GiBx2 on two GPUs
    #[arg(long, value_name = "SIZES", value_delimiter = ',')]
    pub sizes: Vec<String>,
    /// What a start takes
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub load: Duration,
    /// What a stop takes
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    pub unload: Duration,
    /// Requests that a model serves at once
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub concurrency: u32,
    /// Notice to leave falls due when a request has waited so long
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub max_wait: Option<Duration>,
    /// Refuse who has waited so long
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub queue_timeout: Option<Duration>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum PolicyChoice {
    Fair,
    Exhaustive,
    Fifo,
    All,
}

impl PolicyChoice {
    fn policies(self) -> Vec<Policy> {
        match self {
            PolicyChoice::Fair => vec![Policy::Fair],
            PolicyChoice::Exhaustive => vec![Policy::Exhaustive],
            PolicyChoice::Fifo => vec![Policy::Fifo],
            PolicyChoice::All => Policy::ALL.to_vec(),
        }
    }
}

fn size(text: &str) -> Result<Bytes, String> {
    crate::config::values::size(text)
}

fn duration(text: &str) -> Result<Duration, String> {
    crate::config::values::duration(text)
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let arrivals = arrivals(args)?;
    let setup = setup(args, &arrivals)?;
    let gpus: Vec<GpuId> = setup.gpus.iter().map(|gpu| gpu.id).collect();
    let mut all = Vec::new();
    for policy in args.policy.policies() {
        let run = replay::run(&setup, policy, &arrivals)?;
        all.push(figures::figures(&run, &arrivals, &gpus));
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        print!("{}", table(&all));
    }
    Ok(ExitCode::SUCCESS)
}

fn arrivals(args: &Args) -> anyhow::Result<Vec<Arrival>> {
    let mut arrivals = read(&args.trace)?;
    arrivals.sort_by_key(|a| a.at);
    arrivals.truncate(args.limit.unwrap_or(usize::MAX));
    if !(args.compress > 0.0 && args.service_scale >= 0.0) {
        bail!("--compress must be greater than 0, and --service-scale not less");
    }
    for arrival in &mut arrivals {
        arrival.at = Time((arrival.at.0 as f64 / args.compress).round() as u64);
        let service = arrival.service.as_secs_f64() * args.service_scale;
        arrival.service = Duration::from_millis((service * 1000.0).round() as u64);
    }
    Ok(arrivals)
}

fn read(path: &Path) -> anyhow::Result<Vec<Arrival>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("failed to read {}", path.display()))?;
    let mut arrivals = Vec::new();
    for (at, line) in text.lines().enumerate().skip(1) {
        let wrong = || anyhow!("{}:{}: not arrival_s,model,service_s", path.display(), at + 1);
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let [arrival, model, service] = cells[..] else { return Err(wrong()) };
        let seconds = |cell: &str| cell.parse::<f64>().map_err(|_| wrong());
        arrivals.push(Arrival {
            at: Time((seconds(arrival)? * 1000.0).round() as u64),
            model: ModelName::new(model),
            service: Duration::from_millis((seconds(service)? * 1000.0).round() as u64),
        });
    }
    Ok(arrivals)
}

fn setup(args: &Args, arrivals: &[Arrival]) -> anyhow::Result<Setup> {
    let models: BTreeSet<ModelName> = arrivals.iter().map(|a| a.model.clone()).collect();
    let machine = if args.gpus.is_empty() {
        Machine::Slots(args.slots)
    } else {
        Machine::Gpus { memory: args.gpus.clone(), sizes: sizes(args, &models)? }
    };
    let terms = Terms {
        costs: Costs {
            start: args.load,
            stop: args.unload,
            sleep: None,
            wake: None,
            residue: Bytes::ZERO,
        },
        concurrency: Some(args.concurrency),
        max_wait: args.max_wait,
        queue_timeout: args.queue_timeout.unwrap_or(FOR_EVER),
    };
    Ok(Setup::of_trace(&models, &machine, &terms)?)
}

fn sizes(args: &Args, models: &BTreeSet<ModelName>) -> anyhow::Result<BTreeMap<ModelName, Size>> {
    let mut sizes = BTreeMap::new();
    for text in &args.sizes {
        let (name, rest) = text.rsplit_once('=').map_or((None, text.as_str()), |(n, r)| (Some(n), r));
        let (bytes, gpus) = rest.rsplit_once('x').unwrap_or((rest, "1"));
        let wrong = |why: String| anyhow!("--sizes {text}: {why}");
        let bytes = size(bytes).map_err(wrong)?;
        let gpus = gpus.parse().map_err(|_| wrong(format!("{gpus} is no number of GPUs")))?;
        let size = Size { bytes, gpus };
        match name {
            Some(name) => {
                sizes.insert(ModelName::new(name), size);
            }
            None => {
                for model in models {
                    sizes.entry(model.clone()).or_insert(size);
                }
            }
        }
    }
    Ok(sizes)
}

fn table(all: &[Figures]) -> String {
    let mut text = String::new();
    let mut row = |name: &str, of: &dyn Fn(&Figures) -> String| {
        let cells: String = all.iter().map(|f| format!("{:>14}", of(f))).collect();
        text.push_str(&format!("{name:<28}{cells}\n"));
    };
    row("", &|f| f.policy.clone());
    row("wait, mean (s)", &|f| format!("{:.1}", f.wait.mean_s));
    row("wait, p50 (s)", &|f| format!("{:.1}", f.wait.p50_s));
    row("wait, p95 (s)", &|f| format!("{:.1}", f.wait.p95_s));
    row("wait, p99 (s)", &|f| format!("{:.1}", f.wait.p99_s));
    row("wait, max (s)", &|f| format!("{:.1}", f.wait.max_s));
    row("loads", &|f| f.loads.to_string());
    row("GPU busy", &|f| format!("{:.1} %", f.gpu_busy * 100.0));
    row("GPU moving", &|f| format!("{:.1} %", f.gpu_moving * 100.0));
    row("starved", &|f| f.starved.to_string());
    row("refused, cut, unserved", &|f| format!("{}, {}, {}", f.refused, f.cut, f.unserved));
    row("work per hour (s)", &|f| format!("{:.0}", f.work_s_per_hour));
    row("makespan (s)", &|f| format!("{:.0}", f.makespan_s));
    text
}
