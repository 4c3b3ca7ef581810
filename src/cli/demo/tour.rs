//! What each world shows in its first minute.

use std::time::{Duration, Instant};

use anyhow::ensure;
use futures_util::future::join_all;
use serde_json::Value;
use tokio::sync::Mutex;

use super::exercise::{table, tell};
use super::screen::Screen;
use super::server::Server;
use super::talk::Talk;
use super::worlds::{Stage, World};

const TASKS: usize = 4;
const STEPS: usize = 4;

pub async fn run(
    world: World,
    screen: &Screen,
    server: &mut Server,
    stage: &Stage,
) -> anyhow::Result<()> {
    match world {
        World::Laptop | World::Homelab => one_after_another(screen, &server.talk, stage).await,
        World::Team => team(screen, server, stage).await,
        World::Agents => agents(screen, &server.talk).await,
    }
}

async fn one_after_another(screen: &Screen, talk: &Talk, stage: &Stage) -> anyhow::Result<()> {
    for model in stage.models.iter().chain(stage.models.first()) {
        screen.say(format!("→ a request for {} arrives", model.name));
        let answer = talk.chat(&model.name, true, &[]).await?;
        tell(screen, &model.name, true, &answer);
    }
    table(screen, &talk.get("/swaps?limit=100").await?);
    Ok(())
}

/// A health sweep swaps nothing; a crash loses nothing.
async fn team(screen: &Screen, server: &mut Server, stage: &Stage) -> anyhow::Result<()> {
    let talk = server.talk.clone();
    let wanted = stage.models.iter().take(8);
    screen.say("→ requests for 8 of the 25 models arrive at once");
    let answers = join_all(
        wanted
            .map(|model| async { (model.name.as_str(), talk.chat(&model.name, true, &[]).await) }),
    );
    for (name, answer) in answers.await {
        tell(screen, name, true, &answer?);
    }
    let before = swaps(&talk).await?;
    let sweep =
        join_all(stage.models.iter().map(|model| async {
            talk.chat(&model.name, false, &[("x-wharf-start", "never")]).await
        }));
    let mut ready = 0;
    for answer in sweep.await {
        ready += usize::from(answer?.status == 200);
    }
    let after = swaps(&talk).await?;
    screen.say(format!(
        "health sweep with X-Wharf-Start: never over {} models: {ready} answered, the rest 503 at once; \
         swaps before {before}, after {after}",
        stage.models.len()
    ));
    ensure!(before == after, "the sweep swapped something");
    screen.say(format!("kill -9 {} (wharf), while its engines run", server.pid()));
    server.kill_and_restart().await?;
    let loaded = talk.get("/status").await?["loaded_models"].as_array().map_or(0, Vec::len);
    screen.say(format!(
        "restarted: {loaded} running engines adopted, {} swaps since",
        swaps(&talk).await?
    ));
    let answer = talk.chat(&stage.models[0].name, true, &[]).await?;
    tell(screen, &stage.models[0].name, true, &answer);
    Ok(())
}

/// Overlapping agents that alternate planner and coder; each waits for its answer before it asks
/// on. First served strictly in order of arrival, as a plain proxy in front of one engine does.
async fn agents(screen: &Screen, talk: &Talk) -> anyhow::Result<()> {
    screen.say(format!("{TASKS} agents, each alternates planner and coder, {STEPS} steps"));
    let in_order = Mutex::new(());
    screen.say("round 1 of 2: strictly in order of arrival, as a plain proxy does; about 50 s");
    let fifo = alternate(talk, Some(&in_order)).await?;
    screen.say("round 2 of 2: the same requests, in the order that Wharf chooses");
    let ours = alternate(talk, None).await?;
    screen.plain("");
    screen
        .plain(format!("{:<24} {:>6} {:>9} {:>15}", "order", "swaps", "seconds", "answers/minute"));
    for (order, (swaps, took)) in [("order of arrival", fifo), ("wharf (default policy)", ours)] {
        let per_minute = (TASKS * STEPS) as f64 / took.as_secs_f64() * 60.0;
        screen.plain(format!(
            "{order:<24} {swaps:>6} {:>9.1} {per_minute:>15.1}",
            took.as_secs_f64()
        ));
    }
    Ok(())
}

async fn alternate(talk: &Talk, in_order: Option<&Mutex<()>>) -> anyhow::Result<(u64, Duration)> {
    let (began, before) = (Instant::now(), swaps(talk).await?);
    let tasks = (0..TASKS).map(|task| async move {
        for step in 0..STEPS {
            let name = ["planner", "coder"][(task + step) % 2];
            // tokio's mutex is fair: first come, first served.
            let turn = match in_order {
                Some(in_order) => Some(in_order.lock().await),
                None => None,
            };
            let answer = talk.chat(name, false, &[]).await?;
            drop(turn);
            ensure!(answer.is_from(name), "{name} got {} {:?}", answer.status, answer.text);
        }
        anyhow::Ok(())
    });
    for task in join_all(tasks).await {
        task?;
    }
    Ok((swaps(talk).await? - before, began.elapsed()))
}

async fn swaps(talk: &Talk) -> anyhow::Result<u64> {
    let swaps: Value = talk.get("/swaps?limit=1000").await?;
    let ready =
        swaps["swaps"].as_array().into_iter().flatten().filter(|swap| swap["result"] == "ready");
    Ok(ready.count() as u64)
}
