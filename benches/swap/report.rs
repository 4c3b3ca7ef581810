//! Medians and the 90th percentile, by phase.

use std::time::Duration;

/// What the engine (and Docker) took alone.
pub struct Own {
    pub create: Option<Duration>,
    pub start: Duration,
    pub stop: Duration,
    pub remove: Option<Duration>,
}

impl Own {
    /// Its removal is not counted: nobody would have to wait for it.
    fn total(&self) -> Duration {
        self.create.unwrap_or_default() + self.start + self.stop
    }
}

pub struct Round {
    pub wall: Duration,
    /// To the first byte of a request to the model once it was ready.
    pub hot: Duration,
    pub phases: Vec<(String, Duration)>,
    pub own: Own,
}

#[derive(Default)]
pub struct Report {
    pub rounds: Vec<Round>,
}

impl Report {
    pub fn print(&self, title: &str) {
        println!("{title}: {} swaps, milliseconds", self.rounds.len());
        println!("{:<44} {:>9} {:>9}", "", "median", "p90");
        let row = |name: &str, of: &dyn Fn(&Round) -> f64| {
            let mut list: Vec<f64> = self.rounds.iter().map(of).collect();
            list.sort_unstable_by(f64::total_cmp);
            let at = |part: usize| list.get((list.len() * part / 100).min(list.len() - 1));
            if let (Some(median), Some(late)) = (at(50), at(90)) {
                println!("{name:<44} {median:>9.2} {late:>9.2}");
            }
        };
        let ledger = |round: &Round| round.phases.iter().map(|(_, took)| ms(*took)).sum::<f64>();
        let phase = |round: &Round, name: &str| {
            round.phases.iter().find(|(phase, _)| phase == name).map_or(0.0, |(_, took)| ms(*took))
        };
        for name in ["preflight", "fetch", "drain", "vacate", "prove", "start", "vouch"] {
            row(&format!("  phase {name}"), &|round| phase(round, name));
        }
        row("  the swap in the ledger", &ledger);
        row("  beside it (to the scheduler, first byte)", &|r| ms(r.wall) - ledger(r));
        row("  a request once it is ready", &|r| ms(r.hot));
        if self.rounds.iter().any(|round| round.own.create.is_some()) {
            row("alone: create", &|r| r.own.create.map_or(0.0, ms));
            row("alone: remove (not counted)", &|r| r.own.remove.map_or(0.0, ms));
        }
        row("alone: start until it answers", &|r| ms(r.own.start));
        row("alone: stop", &|r| ms(r.own.stop));
        row("vacate less stop alone", &|r| phase(r, "vacate") - ms(r.own.stop));
        row("start less create and start alone", &|r| {
            phase(r, "start") - ms(r.own.start) - r.own.create.map_or(0.0, ms)
        });
        row("request sent to first byte", &|r| ms(r.wall));
        row("SWAP TAX", &|r| ms(r.wall) - ms(r.own.total()));
        row("SWAP TAX by the ledger", &|r| ledger(r) - ms(r.own.total()));
        println!();
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
