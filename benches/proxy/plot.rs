//! The table as a picture: a panel for each row, a bar for each target, one SVG without scripts.

use std::fmt::Write as _;

use wharf::markup::escaped;

use super::table::{Row, TARGETS, Table, figure, median};

const WIDTH: f64 = 900.0;
const COLUMNS: usize = 2;
const LABEL: f64 = 52.0;
const VALUE: f64 = 92.0;
const BAR: f64 = 15.0;
const GAP: f64 = 4.0;
const PANEL: f64 = 92.0;
const TOP: f64 = 84.0;
const COLORS: [&str; 3] = ["#8b96a5", "#1a9a86", "#2f7ed8"];

const STYLE: &str = "\
text{font:12px system-ui,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2733}\
.page{fill:#fff}.dim{fill:#5b6675}.head{font-size:19px;font-weight:600}.sub{font-weight:600}\
.end{text-anchor:end}.range{stroke:#1f2733;stroke-width:1.2;opacity:.55}\
@media (prefers-color-scheme:dark){text{fill:#e4e9f0}.page{fill:#12161c}.dim{fill:#98a4b3}\
.range{stroke:#e4e9f0}}";

pub fn plot(table: &Table, machine: &[(&str, String)]) -> String {
    let rows: Vec<&Row> = table.rows.iter().filter(|row| row.is_shown()).collect();
    let lines = rows.len().div_ceil(COLUMNS);
    let height = TOP + lines as f64 * PANEL + 16.0;
    let words = |wanted: &str| {
        let found = machine.iter().find(|(name, _)| *name == wanted);
        found.map_or("", |(_, value)| value.as_str())
    };
    let about = format!(
        "{}; {} cores; {}; {}; kernel {}",
        words("date"),
        words("cores"),
        words("nginx"),
        words("rustc"),
        words("kernel")
    );
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>Direct, nginx and Wharf side by side</title>\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"100%\" height=\"100%\"/>\n\
         <text class=\"head\" x=\"24\" y=\"36\">Direct, nginx and Wharf side by side</text>\n\
         <text class=\"dim\" x=\"24\" y=\"58\">{}</text>\n",
        escaped(&about)
    );
    for (at, row) in rows.iter().enumerate() {
        let width = WIDTH / COLUMNS as f64;
        let x = 24.0 + (at % COLUMNS) as f64 * (width - 8.0);
        let y = TOP + (at / COLUMNS) as f64 * PANEL;
        panel(&mut svg, row, (x, y), width - 40.0);
    }
    svg.push_str("</svg>\n");
    svg
}

impl Row {
    /// Rates and what goes with them say the same twice; those that one would look for are shown.
    fn is_shown(&self) -> bool {
        let hidden = [
            "json-1-mean",
            "json-1-cpu",
            "json-32-p50",
            "json-32-p99",
            "json-256-p50",
            "json-256-cpu",
            "paced-rate",
        ];
        !hidden.contains(&self.key)
    }
}

/// The longest bar is the largest figure; the thin line is what the rounds lie between.
fn panel(svg: &mut String, row: &Row, (x, y): (f64, f64), width: f64) {
    let all = row.values.iter().flatten().copied();
    let most = all.fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let room = width - LABEL - VALUE;
    let (name, unit) = (escaped(&row.name), escaped(row.unit));
    // Writing to a string does not fail.
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{:.1}\"><tspan class=\"sub\">{name}</tspan>\
         <tspan class=\"dim\" dx=\"6\">{unit}</tspan></text>",
        y + 12.0
    );
    let shown = TARGETS.iter().filter_map(|&target| {
        let values = &row.values[target as usize];
        Some((target, values, median(values)?))
    });
    for (line, (target, values, middle)) in shown.enumerate() {
        let top = y + 20.0 + line as f64 * (BAR + GAP);
        let base = top + BAR - 3.0;
        let at = |value: f64| x + LABEL + room * (value / most).clamp(0.0, 1.0);
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let _ = writeln!(
            svg,
            "<text class=\"dim\" x=\"{x:.1}\" y=\"{base:.1}\">{name}</text>\
             <rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{BAR}\" rx=\"2\" \
             fill=\"{color}\"/><path class=\"range\" d=\"M{low:.1} {mid:.1}H{high:.1}\"/>\
             <text x=\"{value_x:.1}\" y=\"{base:.1}\">{value}</text>",
            name = target.name(),
            left = x + LABEL,
            length = (at(middle) - x - LABEL).max(1.0),
            color = COLORS[target as usize],
            low = at(least),
            high = at(largest),
            mid = top + BAR / 2.0,
            value_x = at(largest.max(middle)) + 6.0,
            value = figure(middle),
        );
    }
}
