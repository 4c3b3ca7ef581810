//! The scripted session: every answer must come from the right model.

use anyhow::{bail, ensure};
use futures_util::future::join_all;
use hyper::Method;
use serde_json::{Value, json};

use super::screen::Screen;
use super::talk::{Answer, Talk};
use super::worlds::Stage;

const BURST: usize = 24;

/// Requests to all models (streaming and not), a forced swap, a burst; then the table of swaps.
pub async fn run(
    screen: &Screen,
    talk: &Talk,
    stage: &Stage,
    names_itself: bool,
) -> anyhow::Result<()> {
    let names: Vec<&str> = stage.models.iter().map(|model| model.name.as_str()).collect();
    let mut wrong = Vec::new();
    let mut asked = 0;
    for stream in [false, true] {
        for name in &names {
            let answer = talk.chat(name, stream, &[]).await?;
            asked += 1;
            tell(screen, name, stream, &answer);
            check(name, &answer, names_itself, &mut wrong);
        }
    }
    force_swap(screen, talk, names[0]).await?;
    screen.say(format!("burst: {BURST} requests at once over {} models", names.len()));
    let burst = (0..BURST).map(|n| {
        let name = names[n % names.len()];
        async move { (name, talk.chat(name, n % 2 == 0, &[]).await) }
    });
    for (name, answer) in join_all(burst).await {
        asked += 1;
        check(name, &answer?, names_itself, &mut wrong);
    }
    table(screen, &talk.get("/swaps?limit=100").await?);
    let status = talk.get("/status").await?;
    ensure!(status["queued"] == 0 && status["in_flight"] == 0, "requests are left over: {status}");
    if !wrong.is_empty() {
        bail!("{} of {asked} answers were wrong:\n  {}", wrong.len(), wrong.join("\n  "));
    }
    screen.plain(format!("{asked} requests, {asked} answers, each from the model that was asked"));
    Ok(())
}

pub fn tell(screen: &Screen, name: &str, stream: bool, answer: &Answer) {
    let text: String = answer.text.trim().chars().take(40).collect();
    screen.say(format!(
        "{name}: {} {} after {:.2} s: \"{text}…\"",
        answer.status,
        if stream { "streamed" } else { "answered" },
        answer.first_byte.as_secs_f64(),
    ));
}

fn check(name: &str, answer: &Answer, names_itself: bool, wrong: &mut Vec<String>) {
    let right = match names_itself {
        true => answer.is_from(name),
        false => answer.status == 200 && answer.done,
    };
    if !right {
        wrong.push(format!("{name} got {} {:?}", answer.status, answer.text));
    }
}

async fn force_swap(screen: &Screen, talk: &Talk, name: &str) -> anyhow::Result<()> {
    let (status, body) = talk.call(Method::POST, "/ensure_model", json!({ "model": name })).await?;
    ensure!(status == 200, "POST /ensure_model answered {status}: {body}");
    screen.say(format!(
        "POST /ensure_model {name}: {status}, swapped {}, instead of {}",
        body["swapped"],
        body["from"].as_str().unwrap_or("nothing: there was room")
    ));
    Ok(())
}

pub fn table(screen: &Screen, swaps: &Value) {
    const PHASES: [&str; 7] = ["preflight", "fetch", "drain", "vacate", "prove", "start", "vouch"];
    screen.plain("");
    screen.plain(format!(
        "{:<6} {:<12} {:<8} {:<10} {:<14} {:>9} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7}",
        "swap",
        "model",
        "cause",
        "result",
        "evicted",
        PHASES[0],
        PHASES[1],
        PHASES[2],
        PHASES[3],
        PHASES[4],
        PHASES[5],
        PHASES[6],
        "total"
    ));
    let mut rows: Vec<&Value> = swaps["swaps"].as_array().into_iter().flatten().collect();
    rows.sort_by_key(|swap| {
        swap["id"].as_str().unwrap_or("").trim_start_matches('s').parse::<u64>().unwrap_or(0)
    });
    for swap in rows {
        let text = |key: &str| swap[key].as_str().unwrap_or("-").to_owned();
        let phase = |name: &str| match swap["phases"][name].as_f64() {
            Some(seconds) => format!("{seconds:.2}"),
            None => "-".to_owned(),
        };
        let evicted: Vec<&str> = swap["evicted"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|victim| victim["model"].as_str())
            .collect();
        screen.plain(format!(
            "{:<6} {:<12} {:<8} {:<10} {:<14} {:>9} {:>6} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7.2}",
            text("id"),
            text("model"),
            text("cause"),
            text("result"),
            evicted.join(","),
            phase(PHASES[0]),
            phase(PHASES[1]),
            phase(PHASES[2]),
            phase(PHASES[3]),
            phase(PHASES[4]),
            phase(PHASES[5]),
            phase(PHASES[6]),
            swap["seconds"].as_f64().unwrap_or(0.0)
        ));
    }
    screen.plain("(seconds)");
}
