//! Results for people, programs and the documentation.

use std::fs;
use std::io;

use serde_json::json;

use super::Run;
use super::plot;
use super::table::Table;

/// Between these, benchmark.md is made; what people wrote around them stays.
const BEGIN: &str = "<!-- Made by `make bench`; do not edit. -->";
const END: &str = "<!-- Until here. -->";

pub fn write(options: &Run, machine: &[(&str, String)], table: &Table) -> io::Result<()> {
    let mut text = String::from("| measured | |\n|---|---|\n");
    for (name, value) in machine {
        text.push_str(&format!("| {name} | {value} |\n"));
    }
    text.push_str(&format!(
        "| rounds | {}, of {} s each |\n\nClient, upstream and proxy \
         share the cores. Median (least–most) of the rounds:\n\n",
        options.rounds, options.seconds
    ));
    text.push_str(&table.markdown());
    if !table.bars().is_empty() {
        text.push('\n');
        text.push_str(&table.bars_markdown());
    }
    for remark in &table.remarks {
        text.push_str(&format!("\n- {remark}"));
    }
    println!("{text}");

    fs::create_dir_all(&options.out)?;
    let machine_json: serde_json::Map<String, serde_json::Value> =
        machine.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    let mut whole = table.json();
    whole["machine"] = machine_json.into();
    whole["rounds"] = json!(options.rounds);
    whole["seconds"] = json!(options.seconds);
    let pretty = serde_json::to_string_pretty(&whole)?;
    fs::write(options.out.join("benchmark.json"), pretty + "\n")?;
    fs::write(options.out.join("benchmark.svg"), plot::plot(table, machine))?;
    let page = options.out.join("benchmark.md");
    let old =
        fs::read_to_string(&page).unwrap_or_else(|_| format!("# Benchmark\n\n{BEGIN}\n{END}\n"));
    let parts =
        old.split_once(BEGIN).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts
        .ok_or_else(|| io::Error::other(format!("{} lacks {BEGIN} or {END}", page.display())))?;
    fs::write(&page, format!("{before}{BEGIN}\n\n{}\n\n{END}{after}", text.trim_end()))?;
    eprintln!("results: {}/benchmark.md, .json, .svg", options.out.display());
    Ok(())
}
