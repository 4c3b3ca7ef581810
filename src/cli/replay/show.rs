//! Figures side by side, for people.

use serde::Serialize;

use crate::replay::figures::Figures;
use crate::replay::sessions::SessionFigures;
use crate::scheduler::Policy;
use crate::units::Bytes;

/// Models that are shown one by one.
const MODELS_SHOWN: usize = 10;

/// Fair's waits as shares of those of exhaustive: less than 1 is better.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratios {
    pub mean: f64,
    pub p95: f64,
    pub p99: f64,
    pub work: f64,
}

impl Ratios {
    pub fn of(all: &[Figures]) -> Option<Ratios> {
        let of = |policy: Policy| all.iter().find(|figures| figures.policy == policy.as_str());
        let (fair, other) = (of(Policy::Fair)?, of(Policy::Exhaustive)?);
        let ratio = |of: fn(&Figures) -> f64| {
            let (fair, other) = (of(fair), of(other));
            // Nobody waited under either: alike.
            if fair == other { 1.0 } else { fair / other }
        };
        Some(Ratios {
            mean: ratio(|f| f.wait.mean_s),
            p95: ratio(|f| f.wait.p95_s),
            p99: ratio(|f| f.wait.p99_s),
            work: ratio(|f| f.work_s_per_hour),
        })
    }
}

struct Table {
    text: String,
}

impl Table {
    fn row(&mut self, name: &str, cells: impl Iterator<Item = String>) {
        let cells: String = cells.map(|cell| format!("  {cell:>12}")).collect();
        self.text.push_str(format!("{name:<28}{cells}").trim_end());
        self.text.push('\n');
    }
}

pub fn table(all: &[Figures]) -> String {
    let mut table = Table { text: String::new() };
    let ratios = Ratios::of(all);
    let title = ratios.map(|_| "fair ÷ exh.".to_owned());
    table.row("", all.iter().map(|f| f.policy.clone()).chain(title));
    let mut row = |name: &str, of: &dyn Fn(&Figures) -> String, ratio: Option<f64>| {
        let ratio = ratio.map(|ratio| format!("{ratio:.3}"));
        table.row(name, all.iter().map(of).chain(ratio));
    };
    row("wait, mean", &|f| seconds(f.wait.mean_s), ratios.map(|r| r.mean));
    row("      p50", &|f| seconds(f.wait.p50_s), None);
    row("      p95", &|f| seconds(f.wait.p95_s), ratios.map(|r| r.p95));
    row("      p99", &|f| seconds(f.wait.p99_s), ratios.map(|r| r.p99));
    row("      max", &|f| seconds(f.wait.max_s), None);
    row("longest wait for a turn", &|f| seconds(f.longest_turn_s), None);
    row("starved", &|f| f.starved.to_string(), None);
    row("loads", &|f| f.loads.to_string(), None);
    row("bytes moved", &|f| Bytes(f.bytes_moved).to_string(), None);
    row("GPU busy", &|f| percent(f.gpu_busy), None);
    row("GPU moving models", &|f| percent(f.gpu_moving), None);
    row("work per hour", &|f| seconds(f.work_s_per_hour), ratios.map(|r| r.work));
    row("makespan", &|f| seconds(f.makespan_s), None);
    row("served", &|f| f.served.to_string(), None);
    for (name, of) in ENDS {
        if all.iter().any(|figures| of(figures) > 0) {
            row(name, &|f| of(f).to_string(), None);
        }
    }
    let mut text = table.text;
    text.push_str(&bounds(all));
    text.push_str(&models(all));
    text
}

type Count = fn(&Figures) -> usize;

/// Ends that most runs do not have.
const ENDS: [(&str, Count); 3] = [
    ("refused", |f| f.refused),
    ("cut by a drain deadline", |f| f.cut),
    ("never served", |f| f.unserved),
];

fn bounds(all: &[Figures]) -> String {
    let told = |figures: &Figures| {
        let turns = figures.bound.as_ref()?;
        let model = turns.longest_model.as_ref()?;
        Some(format!(
            "\n{}: {} waits for a turn, {} beyond their bound; the longest {} for {model} from {} \
             on (bound {}), the closest to its bound took {} of it\n",
            figures.policy,
            turns.waited,
            turns.beyond,
            seconds(turns.longest_s),
            seconds(turns.longest_from_s),
            seconds(turns.longest_bound_s),
            percent(turns.tightest),
        ))
    };
    all.iter().filter_map(told).collect()
}

/// Mean and largest wait of the models that are asked for most.
fn models(all: &[Figures]) -> String {
    let Some(first) = all.first() else { return String::new() };
    let mut names: Vec<_> = first.models.iter().collect();
    names.sort_by_key(|(name, figures)| (std::cmp::Reverse(figures.arrivals), (*name).clone()));
    let mut table = Table { text: "\n".to_owned() };
    table.row(
        "wait, mean and max",
        std::iter::once("arrivals".to_owned()).chain(all.iter().map(|f| f.policy.clone())),
    );
    for (name, figures) in names.iter().take(MODELS_SHOWN) {
        let waits = all.iter().map(|f| {
            let wait = f.models.get(*name).map(|m| m.wait).unwrap_or_default();
            format!("{:.1} {:.0} s", wait.mean_s, wait.max_s)
        });
        let arrivals = figures.arrivals.to_string();
        table.row(&format!("  {name}"), std::iter::once(arrivals).chain(waits));
    }
    if names.len() > MODELS_SHOWN {
        let more = names.len() - MODELS_SHOWN;
        table.text.push_str(&format!("  and {more} more (--json has them all)\n"));
    }
    table.text
}

pub fn session_table(all: &[SessionFigures]) -> String {
    let mut table = Table { text: String::new() };
    table.row("", all.iter().map(|f| f.policy.clone()));
    table.row("swaps per task", all.iter().map(|f| format!("{:.2}", f.swaps_per_task)));
    table.row("makespan", all.iter().map(|f| seconds(f.makespan_s)));
    table.row("waiting per task", all.iter().map(|f| seconds(f.wait_per_task_s)));
    table.row("loads", all.iter().map(|f| f.loads.to_string()));
    table.row("requests", all.iter().map(|f| f.requests.to_string()));
    table.text
}

fn seconds(seconds: f64) -> String {
    format!("{seconds:.1} s")
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}
