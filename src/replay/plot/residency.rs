//! Which models were on the GPUs: a lane for each.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::super::Stay;
use super::sheet::{CHART, LEFT, Sheet, escaped};
use super::{Run, color};
use crate::units::{ModelName, Time};

/// Lanes of a policy; what has none shares the last.
const LANES_MAX: usize = 16;
const LANE: f64 = 11.0;
const GAP: f64 = 3.0;
/// Stays of one policy that are drawn one by one; of more, how much of a bucket they took.
const STAYS_MAX: usize = 500;
const BUCKETS: usize = 300;
/// Heights within a lane are told in so many steps, so that equal neighbours become one.
const LEVELS: f64 = 10.0;
/// Between the hues of neighbours, in degrees: the golden angle.
const HUE_STEP: f64 = 137.5;

/// Parts of a stay, in the order in which they come, and how each is filled.
const STARTING: usize = 0;
const READY: usize = 1;
const LEAVING: usize = 2;

pub fn panels(sheet: &mut Sheet, runs: &[Run]) {
    let lanes = Lanes::of(runs);
    patterns(sheet, &lanes);
    key(sheet);
    for (at, run) in runs.iter().enumerate() {
        sheet.y += 26.0;
        let color = color(at);
        let y = sheet.y - 10.0;
        sheet.put(format_args!(
            "<rect fill=\"{color}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"11\" height=\"11\"/>"
        ));
        sheet.text(LEFT + 18.0, "sub", &format!("Models on the GPUs: {}", run.policy));
        sheet.y += 9.0;
        panel(sheet, &lanes, run);
    }
    sheet.y += 20.0;
}

/// Which lane a model has, those first that stayed longest.
struct Lanes<'a> {
    of: BTreeMap<&'a ModelName, usize>,
    labels: Vec<String>,
    /// Models in the last lane, if it is not one's own.
    shared: usize,
}

impl<'a> Lanes<'a> {
    fn of(runs: &'a [Run]) -> Lanes<'a> {
        let mut stayed = BTreeMap::<&ModelName, u128>::new();
        for stay in runs.iter().flat_map(|run| &run.stays) {
            *stayed.entry(&stay.model).or_default() += stay.ended.since(stay.began).as_millis();
        }
        let mut models: Vec<_> = stayed.into_iter().collect();
        models.sort_by_key(|(model, stayed)| (std::cmp::Reverse(*stayed), *model));
        let own = if models.len() > LANES_MAX { LANES_MAX - 1 } else { models.len() };
        let shared = models.len() - own;
        let mut labels: Vec<String> =
            models[..own].iter().map(|(model, _)| model.to_string()).collect();
        if shared > 0 {
            labels.push(format!("{shared} others"));
        }
        let of = models.iter().enumerate().map(|(at, (model, _))| (*model, at.min(own))).collect();
        Lanes { of, labels, shared }
    }

    fn is_shared(&self, lane: usize) -> bool {
        self.shared > 0 && lane + 1 == self.labels.len()
    }

    fn color(&self, lane: usize) -> String {
        if self.is_shared(lane) {
            return "#8b95a3".to_owned();
        }
        let hue = (205.0 + HUE_STEP * lane as f64) % 360.0;
        format!("hsl({hue:.0},58%,52%)")
    }

    fn fill(&self, lane: usize, part: usize) -> String {
        let color = self.color(lane);
        match part {
            STARTING => format!("fill=\"url(#start{lane})\""),
            READY => format!("fill=\"{color}\""),
            _ => format!("fill=\"{color}\" opacity=\".35\""),
        }
    }
}

fn patterns(sheet: &mut Sheet, lanes: &Lanes<'_>) {
    sheet.put(format_args!("<defs>"));
    for lane in 0..lanes.labels.len() {
        pattern(sheet, &format!("start{lane}"), &lanes.color(lane));
    }
    pattern(sheet, "start", "#8b95a3");
    sheet.put(format_args!("</defs>"));
}

fn pattern(sheet: &mut Sheet, id: &str, color: &str) {
    sheet.put(format_args!(
        "<pattern id=\"{id}\" width=\"5\" height=\"5\" patternUnits=\"userSpaceOnUse\" \
         patternTransform=\"rotate(45)\"><rect width=\"5\" height=\"5\" fill=\"{color}\" \
         opacity=\".25\"/><rect width=\"2\" height=\"5\" fill=\"{color}\"/></pattern>"
    ));
}

/// What the fillings mean.
fn key(sheet: &mut Sheet) {
    sheet.y += 26.0;
    let fills = [
        ("fill=\"url(#start)\"", "being started"),
        ("fill=\"#8b95a3\"", "ready"),
        ("fill=\"#8b95a3\" opacity=\".35\"", "leaving, its memory not yet free"),
    ];
    let mut x = LEFT;
    for (fill, name) in fills {
        let y = sheet.y - 10.0;
        sheet.put(format_args!("<rect {fill} x=\"{x}\" y=\"{y:.1}\" width=\"26\" height=\"11\"/>"));
        sheet.text(x + 34.0, "dim", name);
        x += 170.0;
    }
}

fn panel(sheet: &mut Sheet, lanes: &Lanes<'_>, run: &Run) {
    let top = sheet.y;
    let lane_top = |lane: usize| top + (LANE + GAP) * lane as f64;
    for (lane, label) in lanes.labels.iter().enumerate() {
        let y = lane_top(lane);
        sheet.put(format_args!(
            "<rect class=\"lane\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{CHART}\" height=\"{LANE}\"/>"
        ));
        sheet.label(y + 9.5, label);
    }
    sheet.time_axis((LANE + GAP) * lanes.labels.len() as f64);
    let mut by_lane = vec![Vec::new(); lanes.labels.len()];
    for stay in &run.stays {
        if let Some(lane) = lanes.of.get(&stay.model) {
            by_lane[*lane].push(stay);
        }
    }
    let one_by_one = run.stays.len() <= STAYS_MAX;
    for (lane, stays) in by_lane.iter().enumerate() {
        if one_by_one && !lanes.is_shared(lane) {
            stays.iter().for_each(|stay| one(sheet, lanes, lane, lane_top(lane), stay));
        } else {
            added_up(sheet, lanes, lane, lane_top(lane), stays);
        }
    }
}

/// Starting, ready, leaving: from when to when.
fn parts(stay: &Stay) -> [(Time, Time); 3] {
    let left = stay.left.unwrap_or(stay.ended).clamp(stay.began, stay.ended.max(stay.began));
    // What never was ready did nothing but start.
    let ready = stay.ready.map_or(stay.ended, |ready| ready.min(left));
    let left = left.max(ready);
    [(stay.began, ready), (ready, left), (left, stay.ended)]
}

fn one(sheet: &mut Sheet, lanes: &Lanes<'_>, lane: usize, y: f64, stay: &Stay) {
    let gpus: Vec<String> = stay.gpus.iter().map(ToString::to_string).collect();
    let clock = |at: Time| humantime::format_duration(Duration::from_millis(at.0));
    let ready = stay.ready.map_or("never ready".to_owned(), |at| format!("ready at {}", clock(at)));
    let (model, gpus, bytes) = (&stay.model, gpus.join(", "), stay.bytes);
    let (began, ended) = (clock(stay.began), clock(stay.ended));
    let title =
        format!("{model} on GPU {gpus}, {bytes}: begun at {began}, {ready}, gone at {ended}");
    sheet.put(format_args!("<g><title>{}</title>", escaped(&title)));
    for (part, (from, to)) in parts(stay).into_iter().enumerate() {
        let (x, end, fill) = (sheet.x(from), sheet.x(to), lanes.fill(lane, part));
        if to > from {
            // A stay that is short against the whole is still seen.
            let width = (end - x).max(0.4);
            sheet.put(format_args!(
                "<rect {fill} x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{LANE}\"/>"
            ));
        }
    }
    sheet.put(format_args!("</g>"));
}

/// How much of each bucket went to each part, as heights: ready at the bottom.
fn added_up(sheet: &mut Sheet, lanes: &Lanes<'_>, lane: usize, y: f64, stays: &[&Stay]) {
    let mut shares = vec![[0.0_f64; 3]; BUCKETS];
    let bucket_ms = sheet.end_ms() as f64 / BUCKETS as f64;
    for stay in stays {
        for (part, (from, to)) in parts(stay).into_iter().enumerate() {
            let (from, to) = (from.0 as f64 / bucket_ms, to.0 as f64 / bucket_ms);
            let buckets = shares.iter_mut().enumerate();
            for (at, share) in buckets.skip(from as usize).take_while(|(at, _)| (*at as f64) < to) {
                share[part] += (to.min(at as f64 + 1.0) - from.max(at as f64)).max(0.0);
            }
        }
    }
    // Several at once, or many in the shared lane, fill it together.
    let most = shares.iter().map(|parts| parts.iter().sum()).fold(1.0, f64::max);
    for part in [STARTING, READY, LEAVING] {
        let below = |parts: &[f64; 3]| match part {
            READY => 0.0,
            STARTING => parts[READY],
            _ => parts[READY] + parts[STARTING],
        };
        let level = |share: f64| (share / most * LEVELS).round() as u32;
        let heights = shares.iter().map(|parts| {
            let below = below(parts);
            (level(below), level(below + parts[part]))
        });
        let path = bars(&heights.collect::<Vec<_>>(), y);
        if !path.is_empty() {
            let fill = lanes.fill(lane, part);
            sheet.put(format_args!("<path {fill} d=\"{path}\"/>"));
        }
    }
}

/// Of each bucket from one level to another; equal neighbours are one bar.
fn bars(levels: &[(u32, u32)], y: f64) -> String {
    let mut path = String::new();
    let mut at = 0;
    for run in levels.chunk_by(PartialEq::eq) {
        let (from, to) = run[0];
        if to > from {
            let x = |at: usize| LEFT + CHART * at as f64 / BUCKETS as f64;
            let height = |level: u32| LANE * f64::from(level) / LEVELS;
            let (bottom, width) = (y + LANE - height(from), x(at + run.len()) - x(at));
            // Writing to a string does not fail.
            let _ = write!(
                path,
                "M{:.1} {bottom:.1}h{width:.1}v-{:.1}h-{width:.1}z",
                x(at),
                height(to) - height(from)
            );
        }
        at += run.len();
    }
    path
}
