//! Runs as a picture: one SVG without scripts, for light and dark pages.
//!
//! Above, how long those who arrived at a moment waited, one line for each policy; below, for each
//! policy, which models were on the GPUs when. What is too much for a pixel is added up, so that
//! the picture's size is bounded, however long the runs are.

mod residency;
mod sheet;
mod waits;

use std::fmt::Write as _;

use self::sheet::{LEFT, Sheet, WIDTH, escaped};
use super::Run;
use crate::units::Time;

/// One for each policy, told apart also by those who do not see red or green.
const COLORS: [&str; 6] = ["#2f7ed8", "#e07b1a", "#8e5bd0", "#1a9a86", "#c2447c", "#8a7a2e"];

const STYLE: &str = "\
text{font:13px system-ui,'Segoe UI','DejaVu Sans',sans-serif;fill:#1f2733}\
.page{fill:#fff}.dim{fill:#5b6675}.small{font-size:11px}.head{font-size:20px;font-weight:600}\
.sub{font-weight:600}.grid{stroke:#d9dee5;fill:none}.end{text-anchor:end}.mid{text-anchor:middle}\
.lane{fill:#f3f5f8}.line{fill:none;stroke-linejoin:round;stroke-linecap:round}\
@media (prefers-color-scheme:dark){text{fill:#e4e9f0}.page{fill:#12161c}.dim{fill:#98a4b3}\
.grid{stroke:#2c343f}.lane{fill:#1a2028}}";

/// `title`: in words what was replayed.
pub fn plot(title: &str, runs: &[Run]) -> String {
    let mut sheet = Sheet::new(runs.iter().map(end_of).max().unwrap_or_default());
    heading(&mut sheet, title, runs);
    waits::panels(&mut sheet, runs);
    residency::panels(&mut sheet, runs);
    page(title, &sheet)
}

fn color(run: usize) -> &'static str {
    COLORS[run % COLORS.len()]
}

fn end_of(run: &Run) -> Time {
    let visits = run.visits.iter().map(|visit| visit.ended.unwrap_or(visit.arrived));
    let stays = run.stays.iter().map(|stay| stay.ended);
    visits.chain(stays).max().unwrap_or_default().max(run.ended)
}

/// The title, and what each policy's line looks like.
fn heading(sheet: &mut Sheet, title: &str, runs: &[Run]) {
    sheet.y = 38.0;
    let mut lines = title.lines();
    sheet.text(LEFT, "head", lines.next().unwrap_or_default());
    for line in lines {
        sheet.y += 20.0;
        sheet.text(LEFT, "dim", line);
    }
    sheet.y += 10.0;
    for (at, run) in runs.iter().enumerate() {
        sheet.y += 20.0;
        let y = sheet.y - 4.5;
        sheet.put(format_args!(
            "<path class=\"line\" stroke=\"{}\" stroke-width=\"3\" d=\"M{LEFT} {y:.1}h26\"/>",
            color(at)
        ));
        sheet.text(LEFT + 36.0, "sub", &run.policy);
        sheet.text(LEFT + 150.0, "dim", &waits::summary(run));
    }
    sheet.y += 14.0;
}

fn page(title: &str, sheet: &Sheet) -> String {
    let (height, body, title) = (sheet.y.ceil(), &sheet.body, escaped(title));
    let mut svg = String::with_capacity(body.len() + 4096);
    // Writing to a string does not fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n<title>{title}</title>\n\
         <desc>Waits of requests, and models on the GPUs, over time, for each policy.</desc>\n\
         <style>{STYLE}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n\
         {body}</svg>"
    );
    svg
}

#[cfg(test)]
mod tests;
