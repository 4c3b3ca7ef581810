//! `wharf top`: models, requests, swaps and GPUs, a picture every second.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Read as _, Write as _, stdin, stdout};
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::client::{self, Client, Connection, Failure, table, text};
use super::status;

const EVERY: Duration = Duration::from_secs(1);

const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

#[derive(Debug, clap::Args)]
#[command(after_help = format!(
    "q or Ctrl-C ends it. Where stdout is no terminal, one picture is printed.\n\n\
     Examples:\n  wharf top\n  wharf top --once\n  \
     wharf top --json | jq '.models[] | select(.in_flight > 0) | .model'\n\n\
     TOKENS/S is the speed of the last answer; TTL LEFT the time until an idle model leaves.\n\n{}",
    client::EXIT_CODES
))]
pub struct Args {
    /// Print one picture and end; --json does so, too
    #[arg(long)]
    pub once: bool,
    #[command(flatten)]
    pub connection: Connection,
}

pub async fn run(args: Args) -> ExitCode {
    client::finish(top(&args).await, args.connection.json)
}

async fn top(args: &Args) -> Result<(), Failure> {
    let client = Client::new(&args.connection)?;
    let first = look(&client).await?;
    if args.once || args.connection.json || !stdout().is_terminal() {
        client::show(&first, args.connection.json, |seen| picture(client.base(), seen));
        return Ok(());
    }
    live(&client, first).await
}

/// What one picture shows: `models` (those that are up first), `swaps`, `gpus`, and the sums.
pub async fn look(client: &Client) -> Result<Value, Failure> {
    let (status, models, gpus, activity) = tokio::join!(
        client.get("/status"),
        client.get("/models"),
        client.get("/gpus"),
        client.get("/api/metrics"),
    );
    let (status, models, gpus) = (status?, models?, gpus?);
    // Speeds are a courtesy: without them the rest is shown all the same.
    let speeds = speeds(&activity.unwrap_or_default());
    let now = time(&status["time"]);
    let rows = models["models"].as_array().into_iter().flatten();
    let mut rows: Vec<Value> =
        rows.map(|row| model(row, &status["models"], now, &speeds)).collect();
    rows.sort_by_key(|row| (row["state"] == "stopped", row["state"] == "failed"));
    Ok(json!({
        "time": status["time"],
        "status": status["status"],
        "mode": status["mode"],
        "in_flight": status["in_flight"],
        "queued": status["queued"],
        "no_proof": status["no_proof"],
        "models": rows,
        "swaps": status["swaps"],
        "gpus": gpus["gpus"],
        "host_memory": gpus["host_memory"],
    }))
}

/// Tokens per second of the last answer of each model that told.
fn speeds(activity: &Value) -> BTreeMap<String, (u64, f64)> {
    let mut newest: BTreeMap<String, (u64, f64)> = BTreeMap::new();
    for row in activity.as_array().into_iter().flatten() {
        let speed = row["tokens"]["tokens_per_second"].as_f64().filter(|speed| *speed > 0.0);
        let (Some(name), Some(id), Some(speed)) =
            (row["model"].as_str(), row["id"].as_u64(), speed)
        else {
            continue;
        };
        let newest = newest.entry(name.to_owned()).or_insert((id, speed));
        if id > newest.0 {
            *newest = (id, speed);
        }
    }
    newest
}

fn model(
    row: &Value,
    states: &Value,
    now: Option<f64>,
    speeds: &BTreeMap<String, (u64, f64)>,
) -> Value {
    let name = row["model_id"].as_str().unwrap_or_default();
    let state = &states[name];
    // In the grace the ttl is over: 0.
    let ttl_left = time(&row["leaves_at"]).zip(now).map(|(leaves, now)| {
        (leaves - row["grace_seconds"].as_f64().unwrap_or_default() - now).max(0.0)
    });
    json!({
        "model": name,
        "state": state["state"],
        "phase": state["phase"],
        "gpus": state["gpus"],
        "vram_bytes_per_gpu": state["vram_bytes_per_gpu"],
        "in_flight": state["in_flight"],
        "queued": state["queued"],
        "request_count": row["request_count"],
        "tokens_per_second": speeds.get(name).map(|(_, speed)| speed),
        "ttl_left_seconds": ttl_left,
        "ready_in_seconds": state["ready_in_seconds"],
        "retry_in_seconds": state["retry_in_seconds"],
        "message": state["message"],
        "waiting_for": state["waiting_for"],
    })
}

/// Seconds since 1970.
fn time(rfc3339: &Value) -> Option<f64> {
    let time = humantime::parse_rfc3339(rfc3339.as_str()?).ok()?;
    Some(time.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs_f64())
}

/// For people.
pub fn picture(base: &str, seen: &Value) -> String {
    let models = seen["models"].as_array().map_or(&[][..], Vec::as_slice);
    let ready = models.iter().filter(|model| model["state"] == "ready").count();
    let mut told = format!(
        "Wharf at {base}: {}, {}; {ready} of {} models ready, {} in flight, {} waiting",
        text(&seen["status"]),
        text(&seen["mode"]),
        models.len(),
        text(&seen["in_flight"]),
        text(&seen["queued"]),
    );
    if let Some(why) = seen["no_proof"].as_str() {
        told.push_str(&format!("\nnothing starts: {why}"));
    }
    let list = |key: &str, line: fn(&Value) -> String| -> Vec<String> {
        seen[key].as_array().into_iter().flatten().map(line).collect()
    };
    let rows: Vec<Vec<String>> = models.iter().map(row).collect();
    let head = ["MODEL", "STATE", "GPUS", "IN FLIGHT", "WAITING", "TOKENS/S", "TTL LEFT", "NOTE"];
    let mut bars = list("gpus", status::gpu);
    bars.extend(status::ram(&seen["host_memory"]));
    for block in [list("swaps", status::swap).join("\n"), bars.join("\n"), table(&head, &rows)] {
        if !block.is_empty() {
            told.push_str(&format!("\n\n{block}"));
        }
    }
    told
}

fn row(model: &Value) -> Vec<String> {
    let speed = model["tokens_per_second"].as_f64();
    vec![
        text(&model["model"]),
        status::state(model),
        text(&model["gpus"]),
        text(&model["in_flight"]),
        text(&model["queued"]),
        speed.map_or_else(|| "-".to_owned(), |speed| format!("{speed:.1}")),
        model["ttl_left_seconds"].as_f64().map_or_else(|| "-".to_owned(), clock),
        status::note(model),
    ]
}

/// `14:05`, `2:00:00`
fn clock(seconds: f64) -> String {
    let seconds = Duration::from_secs_f64(seconds.clamp(0.0, 1e9)).as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

async fn live(client: &Client, first: Value) -> Result<(), Failure> {
    let screen = Screen::enter();
    let mut keys = keys();
    let mut shown = picture(client.base(), &first);
    loop {
        screen.draw(&shown);
        let next = async {
            tokio::time::sleep(EVERY).await;
            look(client).await
        };
        tokio::select! {
            looked = next => shown = match looked {
                Ok(seen) => picture(client.base(), &seen),
                // Wharf may be on its way back.
                Err(failure) => format!("{failure}\n\ntrying again every second; q ends"),
            },
            () = quit(&mut keys) => return Ok(()),
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

/// What is typed, by a thread: a read of a terminal cannot be given up.
fn keys() -> mpsc::Receiver<u8> {
    let (typed, keys) = mpsc::channel(16);
    std::thread::spawn(move || {
        for key in stdin().lock().bytes().map_while(Result::ok) {
            if typed.blocking_send(key).is_err() {
                break;
            }
        }
    });
    keys
}

/// Without a keyboard it is Ctrl-C that ends it.
async fn quit(keys: &mut mpsc::Receiver<u8>) {
    while let Some(key) = keys.recv().await {
        if matches!(key, b'q' | b'Q') {
            return;
        }
    }
    std::future::pending().await
}

/// The terminal's other screen; dropped, everything is as it was.
struct Screen {
    before: Option<Termios>,
}

impl Screen {
    fn enter() -> Screen {
        let before = tcgetattr(stdin()).ok();
        if let Some(before) = &before {
            // Keys come at once and are not shown; Ctrl-C stays a signal.
            let mut quiet = before.clone();
            quiet.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, &quiet);
        }
        put(ENTER);
        Screen { before }
    }

    /// Cut to the size of the terminal, so that it never scrolls.
    fn draw(&self, picture: &str) {
        let size = console::Term::stdout().size_checked();
        let (height, width) = size.map_or((24, 80), |(h, w)| (usize::from(h), usize::from(w)));
        let mut drawn = HOME.to_owned();
        for (at, line) in picture.lines().take(height).enumerate() {
            if at > 0 {
                drawn.push_str("\r\n");
            }
            drawn.extend(line.chars().filter(|c| !c.is_control()).take(width));
            drawn.push_str(CLEAR_LINE);
        }
        put(&(drawn + CLEAR_BELOW));
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        put(LEAVE);
        if let Some(before) = &self.before {
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// A terminal that went away has nobody to tell.
fn put(text: &str) {
    let mut out = stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_is_that_of_the_newest_answer_that_told_one() {
        let row = |id: u64, model: &str, speed: f64| json!({ "id": id, "model": model, "tokens": { "tokens_per_second": speed } });
        let rows =
            json!([row(3, "a", 30.0), row(2, "a", 20.0), row(4, "a", -1.0), row(1, "b", -1.0)]);
        let speeds = speeds(&rows);
        assert_eq!(speeds.get("a"), Some(&(3, 30.0)));
        assert_eq!(speeds.get("b"), None);
    }

    #[test]
    fn a_ttl_counts_down_to_its_end_and_not_through_the_grace() {
        let row =
            json!({ "model_id": "a", "leaves_at": "2026-01-01T00:03:00Z", "grace_seconds": 60.0 });
        let shown = model(&row, &json!({}), time(&json!("2026-01-01T00:00:30Z")), &BTreeMap::new());
        assert_eq!(shown["ttl_left_seconds"], 90.0);
        let shown = model(&row, &json!({}), time(&json!("2026-01-01T00:02:30Z")), &BTreeMap::new());
        assert_eq!(shown["ttl_left_seconds"], 0.0);
        assert_eq!((clock(90.0), clock(7205.9)), ("1:30".to_owned(), "2:00:05".to_owned()));
    }
}
