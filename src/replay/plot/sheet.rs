//! The paper: where time lies on it, axes, text.

use std::fmt::{Arguments, Write as _};

use crate::units::Time;

pub const WIDTH: f64 = 1200.0;
pub const LEFT: f64 = 170.0;
/// Of everything that has time as its axis.
pub const CHART: f64 = WIDTH - LEFT - 30.0;
/// Of a name in the margin.
const LABEL_CHARS_MAX: usize = 22;
/// Of any other text, and of names that show when they are pointed at.
const TEXT_CHARS_MAX: usize = 160;

const SECOND: u64 = 1000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
/// Distances of ticks; above, whole days by 1, 2, 5 and their tens.
const STEPS: [u64; 22] = [
    10,
    20,
    50,
    100,
    200,
    500,
    SECOND,
    2 * SECOND,
    5 * SECOND,
    10 * SECOND,
    20 * SECOND,
    30 * SECOND,
    MINUTE,
    2 * MINUTE,
    5 * MINUTE,
    10 * MINUTE,
    20 * MINUTE,
    HOUR,
    2 * HOUR,
    4 * HOUR,
    12 * HOUR,
    DAY,
];

pub struct Sheet {
    pub body: String,
    /// The next thing goes below it.
    pub y: f64,
    end_ms: u64,
}

impl Sheet {
    /// Time goes from zero to `end`.
    pub fn new(end: Time) -> Sheet {
        Sheet { body: String::new(), y: 0.0, end_ms: end.0.max(1) }
    }

    pub fn end_ms(&self) -> u64 {
        self.end_ms
    }

    pub fn x(&self, time: Time) -> f64 {
        LEFT + CHART * (time.0.min(self.end_ms) as f64 / self.end_ms as f64)
    }

    pub fn put(&mut self, element: Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }

    pub fn text(&mut self, x: f64, class: &str, text: &str) {
        let (y, text) = (self.y, escaped(&cut(text, TEXT_CHARS_MAX)));
        self.put(format_args!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>"));
    }

    /// A name in the margin, whole when pointed at.
    pub fn label(&mut self, y: f64, name: &str) {
        let (x, whole) = (LEFT - 10.0, escaped(&cut(name, TEXT_CHARS_MAX)));
        let name = escaped(&cut(name, LABEL_CHARS_MAX));
        self.put(format_args!(
            "<text class=\"small end\" x=\"{x:.1}\" y=\"{y:.1}\"><title>{whole}</title>{name}</text>"
        ));
    }

    /// Lines down at round times over `height` from here, and the times below them; goes there.
    pub fn time_axis(&mut self, height: f64) {
        let (top, bottom) = (self.y, self.y + height);
        self.y = bottom + 15.0;
        for (tick, label) in ticks(self.end_ms, 12) {
            let x = self.x(Time(tick));
            self.put(format_args!("<path class=\"grid\" d=\"M{x:.1} {top:.1}V{bottom:.1}\"/>"));
            self.text(x, "dim small mid", &label);
        }
    }
}

/// Round times from zero to `max_ms`, `count` at most beside zero, and their words.
pub fn ticks(max_ms: u64, count: u64) -> impl Iterator<Item = (u64, String)> {
    let fits = |step: &u64| max_ms / step <= count;
    let days = (0..12).flat_map(|zeros| [1, 2, 5].map(|days| days * DAY * 10_u64.pow(zeros)));
    let step = STEPS.into_iter().chain(days).find(fits).unwrap_or(max_ms.max(1));
    (0..=max_ms / step).map(move |n| (n * step, label(n * step, step)))
}

/// In the largest unit of which the steps are whole: all of an axis in one.
fn label(ms: u64, step: u64) -> String {
    let units = [(DAY, "d"), (HOUR, "h"), (MINUTE, "min"), (SECOND, "s")];
    match units.into_iter().find(|(unit, _)| step.is_multiple_of(*unit)) {
        _ if ms == 0 => "0".to_owned(),
        Some((unit, name)) => format!("{} {name}", ms / unit),
        None => format!("{} s", ms as f64 / SECOND as f64),
    }
}

fn cut(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    text.chars().take(chars_max - 1).chain(['…']).collect()
}

/// For XML, which has no place for most control characters either.
pub fn escaped(text: &str) -> String {
    let allowed = |c: char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    let safe: String = text.chars().map(|c| if allowed(c) { c } else { '\u{fffd}' }).collect();
    crate::markup::escaped(&safe)
}
