//! `wharf replay`: recorded traffic against the real scheduler, on a virtual clock.

mod show;
mod world;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;

use super::client::say;
use crate::replay::figures::{Figures, figures};
use crate::replay::sessions::{self, AGENTS_MAX, SessionFigures};
use crate::replay::setup::Setup;
use crate::replay::{self, Arrival, Run, WorldFault};
use crate::scheduler::Policy;
use crate::units::{Bytes, Time};

const AFTER_HELP: &str = "\
The scheduler is the one that `wharf serve` runs; only the clock, the engines and the callers are
modelled. Preflight and fetch take no time, starts and stops as long as you say, memory is free
when a stop is complete, and nobody is refused unless --queue-timeout says so.

Policies:
  fair        Wharf's own
  exhaustive  ready models serve all who come; only idle ones leave, the least recently used
              first; next is the model that was asked for first
  fifo        the same, and no request begins before one that came earlier

Figures:
  wait        from arrival to the start of service
  turn        from arrival to the model's next tenure; who a tenure left behind waits anew.
              Fair keeps a bound on it: max_wait + what models that fell due earlier may take
              (tenure + drain + move each) + its own drain and move
  starved     requests that waited longer than 10 times the mean of the run and than 60 s, or
              were never served
  work        seconds of service done until the last arrival, per hour

Examples:
  wharf replay trace.csv --slots 2 --load 20s
  wharf replay trace.csv --gpus 24GiB,48GiB --sizes 8GiB,big=40GiB,huge=20GiBx2 --plot waits.svg
  wharf replay activity.json --config models.yaml --gpus 24GiB --policy fair --json | jq .policies[0].wait
  wharf replay --generate 1 --limit 6000 --compress 10 --service-scale 0.2
  wharf replay --generate 1 --limit 6000 --csv > trace.csv
  wharf replay --sessions 8 --seed 1

Exit codes: 0 it ran, 1 it did not.";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The traffic: CSV with the columns arrival_s,model,service_s, or Wharf's own activity
    /// (`GET /api/metrics`)
    #[arg(required_unless_present_any = ["generate", "sessions"])]
    pub trace: Option<PathBuf>,
    /// Make the traffic up instead: one seed is one trace
    #[arg(long, value_name = "SEED", conflicts_with = "trace")]
    pub generate: Option<u64>,
    /// Print the made-up trace and replay nothing
    #[arg(long, requires = "generate", conflicts_with_all = ["plot", "json"])]
    pub csv: bool,
    /// Agents that wait for each answer (planner → coder → planner), 1 to 16, instead of a trace
    #[arg(long, value_name = "N", conflicts_with_all = ["trace", "generate", "plot", "csv", "limit", "compress", "service_scale"])]
    pub sessions: Option<usize>,
    /// Of the agents
    #[arg(long, default_value_t = 1, requires = "sessions")]
    pub seed: u64,
    #[arg(long, value_enum, default_value = "all")]
    pub policy: PolicyChoice,
    /// Only the first so many arrivals; made-up traces have 6000
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Divide the times of arrival by this
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = factor)]
    pub compress: f64,
    /// Multiply the times of service by this
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = factor)]
    pub service_scale: f64,
    #[command(flatten)]
    pub world: world::WorldArgs,
    /// Draw waits and residency over time
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PolicyChoice {
    Fair,
    Exhaustive,
    Fifo,
    /// Side by side
    All,
}

impl PolicyChoice {
    fn policies(self) -> &'static [Policy] {
        match self {
            PolicyChoice::Fair => &[Policy::Fair],
            PolicyChoice::Exhaustive => &[Policy::Exhaustive],
            PolicyChoice::Fifo => &[Policy::Fifo],
            PolicyChoice::All => &Policy::ALL,
        }
    }
}

fn factor(text: &str) -> Result<f64, String> {
    let factor: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if factor.is_finite() && factor > 0.0 {
        Ok(factor)
    } else {
        Err("expected a number greater than 0".to_owned())
    }
}

fn size(text: &str) -> Result<Bytes, String> {
    crate::config::values::size(text).map_err(|why| or_example(why, "8GiB"))
}

fn duration(text: &str) -> Result<Duration, String> {
    crate::config::values::duration(text).map_err(|why| or_example(why, "30s"))
}

fn or_example(why: String, example: &str) -> String {
    if why.is_empty() { format!("expected something like {example}") } else { why }
}

const GENERATED: usize = 6000;

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(agents) = args.sessions {
        return run_sessions(args, agents);
    }
    let Traffic { name, mut arrivals } = traffic(args)?;
    if args.csv {
        say(replay::generate::to_csv(&arrivals).trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    let (setup, world) = args.world.setup(&name, &mut arrivals)?;
    let runs =
        side_by_side(args.policy.policies(), |policy| replay::run(&setup, policy, &arrivals))?;
    let all: Vec<Figures> = runs.iter().map(|run| figures(run, &setup)).collect();
    let scale = scale(args);
    if let Some(path) = &args.plot {
        draw(path, &format!("{name}{scale}\n{world}"), &runs)?;
    }
    if args.json {
        let ratios = show::Ratios::of(&all);
        let object = json!({
            "traffic": name,
            "world": world,
            "compress": args.compress,
            "service_scale": args.service_scale,
            "policies": all,
            "fair_to_exhaustive": ratios,
        });
        say(&serde_json::to_string_pretty(&object)?);
    } else {
        let head = format!("{name}: {} arrivals{scale}\n{world}\n\n", arrivals.len());
        say((head + &show::table(&all)).trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

fn run_sessions(args: &Args, count: usize) -> anyhow::Result<ExitCode> {
    if !(1..=AGENTS_MAX).contains(&count) {
        bail!("--sessions {count}: expected 1 to {AGENTS_MAX} agents");
    }
    let (setup, world) = args.world.for_sessions()?;
    let agents = || sessions::agents(args.seed, count);
    let runs = side_by_side(args.policy.policies(), |policy| {
        replay::run_sessions(&setup, policy, agents())
    })?;
    let all: Vec<SessionFigures> =
        runs.iter().map(|run| sessions::session_figures(run, count)).collect();
    if args.json {
        let object =
            json!({ "sessions": count, "seed": args.seed, "world": world, "policies": all });
        say(&serde_json::to_string_pretty(&object)?);
    } else {
        let head = format!(
            "{count} agents with {} tasks each (seed {})\n{world}\n\n",
            sessions::TASKS,
            args.seed
        );
        say((head + &show::session_table(&all)).trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

/// Each policy has a thread of its own.
fn side_by_side(
    policies: &[Policy],
    run: impl Fn(Policy) -> Result<Run, WorldFault> + Sync,
) -> anyhow::Result<Vec<Run>> {
    let run = &run;
    let ran: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            policies.iter().map(|&policy| scope.spawn(move || run(policy))).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    ran.into_iter()
        .map(|ran| match ran {
            Ok(run) => Ok(run?),
            Err(_) => bail!("the scheduler broke one of its invariants: its message is above"),
        })
        .collect()
}

/// What is replayed, and what it is called.
struct Traffic {
    name: String,
    arrivals: Vec<Arrival>,
}

fn traffic(args: &Args) -> anyhow::Result<Traffic> {
    let (name, mut arrivals) = match (&args.trace, args.generate) {
        (Some(path), _) => (path.display().to_string(), replay::read::read(path)?),
        (None, Some(seed)) => {
            let arrivals = replay::generate::generate(seed, args.limit.unwrap_or(GENERATED));
            (format!("made up from seed {seed}"), arrivals)
        }
        (None, None) => bail!("a trace is missing"),
    };
    arrivals.truncate(args.limit.unwrap_or(usize::MAX));
    let first = arrivals.first().map_or(0, |arrival| arrival.at.0);
    for arrival in &mut arrivals {
        arrival.at = Time(((arrival.at.0 - first) as f64 / args.compress).round() as u64);
        let service = arrival.service.as_millis() as f64 * args.service_scale;
        arrival.service = Duration::from_millis(service.round() as u64);
    }
    Ok(Traffic { name, arrivals })
}

/// ", 10 times as fast, service × 0.2"
fn scale(args: &Args) -> String {
    let mut text = String::new();
    if args.compress != 1.0 {
        text.push_str(&format!(", {} times as fast", args.compress));
    }
    if args.service_scale != 1.0 {
        text.push_str(&format!(", service × {}", args.service_scale));
    }
    text
}

fn draw(path: &Path, title: &str, runs: &[Run]) -> anyhow::Result<()> {
    std::fs::write(path, replay::plot::plot(title, runs))
        .with_context(|| format!("failed to write {}", path.display()))
}

/// What the modelled machine is, in a line.
fn described(setup: &Setup, what: &str) -> String {
    let gpus: Vec<String> = setup.gpus.iter().map(|gpu| gpu.total.to_string()).collect();
    match gpus.as_slice() {
        [one] => format!("a GPU of {one}, {what}"),
        more => format!("{} GPUs ({}), {what}", more.len(), more.join(", ")),
    }
}
