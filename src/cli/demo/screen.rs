//! What happens, as it happens: one bar per GPU, and a line for every change.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::task::JoinHandle;

use super::guests::Guests;
use super::talk::Talk;
use crate::scheduler::record::Phase;
use crate::units::Bytes;

const POLL: Duration = Duration::from_millis(60);

/// Prints lines above the bars; cheap to clone.
#[derive(Clone, Debug)]
pub struct Screen {
    bars: MultiProgress,
    began: Instant,
    live: bool,
}

impl Screen {
    pub fn new() -> Screen {
        Screen {
            bars: MultiProgress::new(),
            began: Instant::now(),
            live: std::io::stdout().is_terminal(),
        }
    }

    pub fn say(&self, text: impl AsRef<str>) {
        let line = format!("{:6.1} s  {}", self.began.elapsed().as_secs_f64(), text.as_ref());
        self.plain(line);
    }

    pub fn plain(&self, line: impl AsRef<str>) {
        if self.live {
            // A terminal that went away has nobody to tell.
            let _ = self.bars.println(line);
        } else {
            // Whoever reads may have left (`| head`).
            let _ = writeln!(std::io::stdout(), "{}", line.as_ref());
        }
    }

    /// Follows the orchestrator until the handle is aborted.
    pub fn follow(&self, talk: Talk, mut guests: Guests) -> JoinHandle<()> {
        let screen = self.clone();
        tokio::spawn(async move {
            let mut seen = Seen::default();
            loop {
                if let (Ok(gpus), Ok(status), Ok(swaps)) = (
                    talk.get("/gpus").await,
                    talk.get("/status").await,
                    talk.get("/swaps?limit=50").await,
                ) {
                    screen.show_gpus(&mut seen, &gpus);
                    let arrivals = guests.news(&status);
                    for line in arrivals.into_iter().chain(seen.news(&status, &swaps)) {
                        screen.say(line);
                    }
                }
                tokio::time::sleep(POLL).await;
            }
        })
    }

    fn show_gpus(&self, seen: &mut Seen, gpus: &Value) {
        if !self.live {
            return;
        }
        for gpu in gpus["gpus"].as_array().into_iter().flatten() {
            let id = gpu["gpu"].as_u64().unwrap_or(0);
            let bar = seen.bars.entry(id).or_insert_with(|| {
                let bar = self.bars.add(ProgressBar::new(1));
                let style =
                    ProgressStyle::with_template("  GPU {prefix} [{bar:32.cyan/blue}] {msg}");
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.set_prefix(id.to_string());
                bar
            });
            let total = gpu["total_bytes"].as_u64().unwrap_or(0);
            let used = gpu["used_bytes"].as_u64().or_else(|| gpu["promised_bytes"].as_u64());
            let used = used.unwrap_or(0);
            bar.set_length(total >> 20);
            bar.set_position(used >> 20);
            let holders: Vec<String> = gpu["holders"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|holder| {
                    let name = holder["model"].as_str().or_else(|| holder["label"].as_str());
                    let bytes = Bytes(holder["bytes"].as_u64().unwrap_or(0));
                    format!("{} {bytes}", name.unwrap_or("?"))
                })
                .collect();
            bar.set_message(format!(
                "{} of {}  {}",
                Bytes(used),
                Bytes(total),
                holders.join(" · ")
            ));
        }
    }
}

/// What was shown last, so that only changes are told.
#[derive(Debug, Default)]
struct Seen {
    bars: BTreeMap<u64, ProgressBar>,
    swaps: BTreeMap<String, String>,
    waits: BTreeMap<String, String>,
    ended: BTreeSet<String>,
    /// Phases that were explained.
    explained: BTreeSet<Phase>,
}

impl Seen {
    fn news(&mut self, status: &Value, swaps: &Value) -> Vec<String> {
        let mut lines = Vec::new();
        for swap in status["swaps"].as_array().into_iter().flatten() {
            self.swap_news(swap, &mut lines);
        }
        // The newest come first.
        for swap in swaps["swaps"].as_array().into_iter().flatten().rev() {
            if let (Some(id), true) = (swap["id"].as_str(), swap["result"].is_string())
                && self.ended.insert(id.to_owned())
            {
                lines.push(ended(swap));
            }
        }
        lines
    }

    fn swap_news(&mut self, swap: &Value, lines: &mut Vec<String>) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (id, model) = (text(&swap["id"]), text(&swap["model"]));
        let stage = text(&swap["progress"]["stage"]);
        let phase = text(&swap["phase"]);
        let shown = match phase.as_str() {
            "start" if !stage.is_empty() => format!("start, {stage}"),
            _ => phase,
        };
        if self.swaps.get(&id) != Some(&shown) {
            if !self.swaps.contains_key(&id) {
                lines.push(format!("{model}: swap {id} begins: {}", text(&swap["decision"])));
            }
            let phase = Phase::ALL.into_iter().find(|each| swap["phase"] == each.as_str());
            let meaning = phase.filter(|phase| self.explained.insert(*phase)).map(meaning);
            let meaning = meaning.map(|text| format!("   ({text})")).unwrap_or_default();
            lines.push(format!("{model}: {shown}{meaning}"));
            self.swaps.insert(id.clone(), shown);
        }
        let waiting = text(&swap["waiting_for"]);
        let coarse = without_numbers(&waiting);
        let worth_telling = ["held by", "measures its memory"].iter().any(|s| waiting.contains(s));
        if worth_telling && self.waits.get(&id) != Some(&coarse) {
            lines.push(format!("{model}: {waiting}"));
            self.waits.insert(id, coarse);
        }
    }
}

/// What a phase is for, told when it is first met.
const fn meaning(phase: Phase) -> &'static str {
    match phase {
        Phase::Preflight => "command and ports are checked before anything is touched",
        Phase::Fetch => "image and weights are brought here first",
        Phase::Drain => "whoever has to leave ends its requests",
        Phase::Vacate => "whoever has to leave is stopped",
        Phase::Prove => "nothing starts before the GPU memory is seen to be free",
        Phase::Start => "the engine starts; its log tells how far it is",
        Phase::Vouch => "it must answer, and hold the memory it declared",
    }
}

/// The text without its figures: a countdown is not news.
fn without_numbers(text: &str) -> String {
    text.chars().filter(|c| !c.is_ascii_digit()).collect()
}

fn ended(swap: &Value) -> String {
    let phases: Vec<String> = Phase::ALL
        .iter()
        .filter_map(|phase| Some((phase.as_str(), swap["phases"][phase.as_str()].as_f64()?)))
        .filter(|(_, seconds)| *seconds >= 0.005)
        .map(|(phase, seconds)| format!("{phase} {seconds:.2} s"))
        .collect();
    format!(
        "{}: {} after {:.2} s ({})",
        swap["model"].as_str().unwrap_or("?"),
        swap["result"].as_str().unwrap_or("?"),
        swap["seconds"].as_f64().unwrap_or(0.0),
        phases.join(", ")
    )
}
