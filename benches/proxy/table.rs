//! Figures of all rounds, what they say together, and the bars they are held against.

use std::fmt::Write as _;

use serde_json::{Value, json};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Direct,
    Nginx,
    Wharf,
}

pub const TARGETS: [Target; 3] = [Target::Direct, Target::Nginx, Target::Wharf];

impl Target {
    pub fn name(self) -> &'static str {
        ["direct", "nginx", "Wharf"][self as usize]
    }
}

/// One row: a figure of each target, once for each round.
pub struct Row {
    pub key: &'static str,
    pub name: String,
    pub unit: &'static str,
    pub values: [Vec<f64>; 3],
}

#[derive(Default)]
pub struct Table {
    pub rows: Vec<Row>,
    pub remarks: Vec<String>,
}

pub struct Bar {
    pub name: String,
    pub bound: String,
    pub value: f64,
    pub unit: &'static str,
    pub met: bool,
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().checked_sub(1)? / 2;
    let upper = sorted[sorted.len() / 2];
    Some((sorted[middle] + upper) / 2.0)
}

impl Table {
    pub fn note(
        &mut self,
        (key, unit): (&'static str, &'static str),
        name: &str,
        target: Target,
        value: f64,
    ) {
        let at = self.rows.iter().position(|row| row.key == key).unwrap_or_else(|| {
            let name = name.to_owned();
            self.rows.push(Row { key, name, unit, values: Default::default() });
            self.rows.len() - 1
        });
        self.rows[at].values[target as usize].push(value);
    }

    pub fn remark(&mut self, text: String) {
        if !self.remarks.contains(&text) {
            self.remarks.push(text);
        }
    }

    fn values(&self, key: &str, target: Target) -> &[f64] {
        let row = self.rows.iter().find(|row| row.key == key);
        row.map_or(&[], |row| row.values[target as usize].as_slice())
    }

    fn median(&self, key: &str, target: Target) -> Option<f64> {
        median(self.values(key, target))
    }

    /// What a proxy adds to the direct way, round by round.
    fn added(&self, key: &str, target: Target) -> Option<f64> {
        let pairs = self.values(key, target).iter().zip(self.values(key, Target::Direct));
        median(&pairs.map(|(with, without)| with - without).collect::<Vec<_>>())
    }

    /// The bars for which there are figures.
    pub fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let mut bar =
            |name: &str, value: Option<f64>, sign: &str, bound: f64, unit: &'static str| {
                let Some(value) = value else { return };
                let met = if sign == "≥" { value >= bound } else { value <= bound };
                let bound = format!("{sign} {bound} {unit}").trim_end().to_owned();
                bars.push(Bar { name: name.to_owned(), bound, value, unit, met });
            };
        let ratio =
            |key: &str| Some(self.median(key, Target::Wharf)? / self.median(key, Target::Nginx)?);
        let latency = |target| self.added("json-1-p50", target);
        bar("JSON at 32 connections, Wharf / nginx", ratio("json-32"), "≥", 1.0, "");
        bar("JSON at 256 connections, Wharf / nginx", ratio("json-256"), "≥", 0.9, "");
        let added = latency(Target::Wharf).zip(latency(Target::Nginx));
        let added = added.map(|(wharf, nginx)| wharf / nginx);
        bar("Latency (p50) added at 1 connection, Wharf / nginx", added, "≤", 1.3, "");
        bar("SSE streams/s at 32, Wharf / nginx", ratio("sse-32"), "≥", 1.0, "");
        let chunk = |key: &str| self.added(key, Target::Wharf);
        bar("Added delay per chunk, 1,000 streams, p50", chunk("paced-p50"), "≤", 100.0, "µs");
        bar("Added delay per chunk, 1,000 streams, p99", chunk("paced-p99"), "≤", 1000.0, "µs");
        let wharf = |key: &str| self.median(key, Target::Wharf);
        bar("Memory per open stream", wharf("slow-memory"), "≤", 24.0, "KiB");
        bar("Idle RSS", wharf("idle-rss"), "≤", 20.0, "MiB");
        bar("Idle CPU", wharf("idle-cpu"), "≤", 0.2, "% of a core");
        bar("Ready with 500 models", wharf("start-500"), "≤", 300.0, "ms");
        bars
    }

    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| row | unit | direct | nginx | Wharf | Wharf / nginx |\n|---|---|--:|--:|--:|--:|\n",
        );
        for row in &self.rows {
            // Writing to a string does not fail.
            let _ = write!(text, "| {} | {} |", row.name, row.unit);
            for values in &row.values {
                let _ = write!(text, " {} |", cell(values));
            }
            let ratio = median(&row.values[2]).zip(median(&row.values[1]).filter(|&by| by > 0.0));
            let ratio =
                ratio.map_or(String::new(), |(wharf, nginx)| format!("{:.2}", wharf / nginx));
            let _ = writeln!(text, " {ratio} |");
        }
        text
    }

    pub fn bars_markdown(&self) -> String {
        let mut text = String::from("| bar | must be | is | |\n|---|---|--:|---|\n");
        for bar in self.bars() {
            let met = if bar.met { "met" } else { "**missed**" };
            let value = format!("{} {}", figure(bar.value), bar.unit);
            let _ =
                writeln!(text, "| {} | {} | {} | {met} |", bar.name, bar.bound, value.trim_end());
        }
        text
    }

    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(row_json).collect();
        let bars: Vec<Value> = self
            .bars()
            .iter()
            .map(|bar| json!({ "name": bar.name, "bound": bar.bound, "value": bar.value, "met": bar.met }))
            .collect();
        json!({ "rows": rows, "bars": bars, "remarks": self.remarks })
    }
}

fn row_json(row: &Row) -> Value {
    let mut value = json!({ "key": row.key, "name": row.name, "unit": row.unit });
    for target in TARGETS {
        let values = &row.values[target as usize];
        if let Some(median) = median(values) {
            value[target.name()] = json!({ "median": median, "rounds": values });
        }
    }
    value
}

/// The median, and between what the rounds lie.
fn cell(values: &[f64]) -> String {
    let Some(median) = median(values) else { return "–".to_owned() };
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.len() == 1 {
        return figure(median);
    }
    format!("{} ({}–{})", figure(median), figure(least), figure(most))
}

/// Three digits that mean something, thousands with commas.
pub fn figure(value: f64) -> String {
    if value.abs() < 100.0 {
        let digits = if value.abs() < 1.0 {
            3
        } else if value.abs() < 10.0 {
            2
        } else {
            1
        };
        return format!("{value:.digits$}");
    }
    let whole = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 { format!("-{text}") } else { text }
}
