//! How long requests waited, by the time of their arrival.

use std::fmt::Write as _;

use super::sheet::{CHART, LEFT, Sheet, ticks};
use super::{Run, color};

/// Arrivals of this share of the time are one point.
const BUCKETS: u64 = 200;
const HEIGHT: f64 = 124.0;
/// Above the longest wait.
const HEADROOM: f64 = 4.0;
const TICKS_MAX: u64 = 5;

/// What is shown of a bucket, and how many of a thousand waited at most so long.
const PANELS: [(&str, usize); 3] = [
    ("Wait from arrival to start of service: median", 500),
    ("95th percentile", 950),
    ("Longest", 1000),
];

/// Waits in milliseconds, each bucket's in order.
type Waits = Vec<Vec<u64>>;

pub fn panels(sheet: &mut Sheet, runs: &[Run]) {
    let end_ms = sheet.end_ms();
    let waits: Vec<Waits> = runs.iter().map(|run| waits_of(run, end_ms)).collect();
    for (name, per_mille) in PANELS {
        sheet.y += 26.0;
        sheet.text(LEFT, "sub", name);
        sheet.y += 9.0;
        panel(sheet, &waits, per_mille);
    }
}

/// Of all requests, in words.
pub fn summary(run: &Run) -> String {
    let mut waits: Vec<u64> = waits(run).map(|(_, wait)| wait).collect();
    waits.sort_unstable();
    if waits.is_empty() {
        return "no request was served".to_owned();
    }
    let seconds = |ms: u64| format!("{:.1} s", ms as f64 / 1000.0);
    let mean = waits.iter().sum::<u64>() / waits.len() as u64;
    let [p50, p95, p99] = [500, 950, 990].map(|per_mille| seconds(quantile(&waits, per_mille)));
    let longest = seconds(quantile(&waits, 1000));
    let (mean, served, loads) = (seconds(mean), waits.len(), run.stays.len());
    let unserved = run.visits.len() - served;
    format!(
        "waits: mean {mean}, p50 {p50}, p95 {p95}, p99 {p99}, longest {longest} · \
         {served} served, {unserved} not · {loads} loads"
    )
}

/// Arrivals of those that were served, and how long they waited, in milliseconds.
fn waits(run: &Run) -> impl Iterator<Item = (u64, u64)> {
    let served = |visit: &super::super::Visit| {
        let began = visit.began?;
        Some((visit.arrived.0, began.0.saturating_sub(visit.arrived.0)))
    };
    run.visits.iter().filter_map(served)
}

fn waits_of(run: &Run, end_ms: u64) -> Waits {
    let mut buckets = vec![Vec::new(); BUCKETS as usize];
    for (arrived, wait) in waits(run) {
        let at = u128::from(arrived) * u128::from(BUCKETS) / (u128::from(end_ms) + 1);
        buckets[at as usize].push(wait);
    }
    buckets.iter_mut().for_each(|bucket: &mut Vec<u64>| bucket.sort_unstable());
    buckets
}

/// The smallest that so many of a thousand do not exceed.
fn quantile(sorted: &[u64], per_mille: usize) -> u64 {
    let rank = (sorted.len() * per_mille).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

fn panel(sheet: &mut Sheet, waits: &[Waits], per_mille: usize) {
    let of = |bucket: &Vec<u64>| (!bucket.is_empty()).then(|| quantile(bucket, per_mille));
    let lines: Vec<Vec<Option<u64>>> =
        waits.iter().map(|buckets| buckets.iter().map(of).collect()).collect();
    let max = lines.iter().flatten().flatten().copied().max().unwrap_or_default().max(10);
    let bottom = sheet.y + HEIGHT;
    let y = |wait: u64| bottom - (HEIGHT - HEADROOM) * (wait as f64 / max as f64);
    for (tick, label) in ticks(max, TICKS_MAX) {
        let y = y(tick);
        sheet.put(format_args!("<path class=\"grid\" d=\"M{LEFT} {y:.1}h{CHART}\"/>"));
        sheet.label(y + 4.0, &label);
    }
    sheet.time_axis(HEIGHT);
    // The first lies on top; where others are the same, they show beside it.
    for (run, line) in lines.iter().enumerate().rev() {
        let (path, color, width) = (steps(line, y), color(run), 1.4 + run as f64);
        sheet.put(format_args!(
            "<path class=\"line\" stroke=\"{color}\" stroke-width=\"{width:.1}\" d=\"{path}\"/>"
        ));
    }
}

/// A step for each bucket; nothing where nobody arrived.
fn steps(line: &[Option<u64>], y: impl Fn(u64) -> f64) -> String {
    let mut path = String::new();
    let mut pen = None;
    for (at, wait) in line.iter().enumerate() {
        let x = |at: usize| LEFT + CHART * at as f64 / BUCKETS as f64;
        let Some(wait) = wait else {
            pen = None;
            continue;
        };
        let y = y(*wait);
        // Writing to a string does not fail.
        let _ = match pen {
            None => write!(path, "M{:.1} {y:.1}H{:.1}", x(at), x(at + 1)),
            Some(before) if before == *wait => write!(path, "H{:.1}", x(at + 1)),
            Some(_) => write!(path, "V{y:.1}H{:.1}", x(at + 1)),
        };
        pen = Some(*wait);
    }
    path
}
