//! Swaps as JSON: rows of `/swaps`, `/swaps/{id}` and of the swaps under way in `/status`.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::render::{Snapshot, object, seconds};
use crate::scheduler::record::{SwapOutcome, SwapRecord};
use crate::store::SwapRow;
use crate::units::{SwapId, Time};

/// One swap of this run; the engine's log lines are in [`detail`] only.
pub fn row(at: &Snapshot<'_>, swap: &SwapRecord) -> Value {
    Value::Object(fields(at, swap, |time| at.wall(time)))
}

/// One swap that ended, of whichever run.
pub fn ended(at: &Snapshot<'_>, swap: &SwapRow) -> Value {
    Value::Object(ended_fields(at, swap))
}

/// One swap that ended, with everything that is known of it.
pub fn detail(at: &Snapshot<'_>, swap: &SwapRow) -> Value {
    let mut fields = ended_fields(at, swap);
    let swap = &swap.record;
    if let Some(fault) = swap.outcome.as_ref().and_then(SwapOutcome::fault) {
        fields.insert("log".to_owned(), json!(fault.log_tail));
    }
    Value::Object(fields)
}

fn ended_fields(at: &Snapshot<'_>, swap: &SwapRow) -> Map<String, Value> {
    let SwapRow { began_unix_ms, record } = swap;
    // Times of another run count from its own beginning.
    let wall = |time: Time| {
        let at = Duration::from_millis(*began_unix_ms) + time.since(record.began);
        humantime::format_rfc3339_millis(UNIX_EPOCH + at).to_string()
    };
    fields(at, record, wall)
}

fn fields(
    at: &Snapshot<'_>,
    swap: &SwapRecord,
    wall: impl Fn(Time) -> String,
) -> Map<String, Value> {
    let ended = swap.ended.unwrap_or(at.now);
    let evicted = swap.evicted.iter().map(|victim| {
        json!({
            "model": victim.model,
            "instance": victim.instance.to_string(),
            "why": victim.why,
        })
    });
    let mut fields = object(json!({
        "id": swap.id.to_string(),
        "model": swap.model,
        "kind": swap.kind,
        "cause": swap.cause,
        "decision": swap.decision,
        "from": swap.evicted.first().map(|victim| &victim.model),
        "evicted": evicted.collect::<Vec<_>>(),
        "instance": swap.instance.map(|id| id.to_string()),
        "gpus": swap.gpus,
        "began": wall(swap.began),
        "ended": swap.ended.map(wall),
        "seconds": seconds(ended.since(swap.began)),
        "phases": phases(swap),
    }));
    fields.append(&mut match (&swap.outcome, swap.phase) {
        (Some(outcome), _) => outcome_fields(outcome),
        (None, phase) => {
            let model = at.view.model(&swap.model);
            object(json!({
                "result": Value::Null,
                "phase": phase.map(|(phase, _)| phase),
                "phase_seconds": phase.map(|(_, began)| seconds(at.now.since(began))),
                "progress": at.view.progress_of(&swap.model),
                "estimate_seconds": model.and_then(|model| model.ready_in).map(seconds),
                "waiting_for": model.map(|model| &model.waiting_for),
            }))
        }
    });
    fields
}

/// Finished phases, in their order: name → seconds.
pub fn phases(swap: &SwapRecord) -> Value {
    let phases =
        swap.phases.iter().map(|(phase, took)| (phase.as_str().to_owned(), json!(seconds(*took))));
    Value::Object(phases.collect())
}

fn outcome_fields(outcome: &SwapOutcome) -> Map<String, Value> {
    let mut fields = Map::from_iter([("result".to_owned(), json!(outcome.as_str()))]);
    match outcome {
        SwapOutcome::Failed(fault) | SwapOutcome::Died(fault) => {
            fields.insert("fault".to_owned(), json!(fault.kind));
            fields.insert("message".to_owned(), json!(fault.message));
        }
        SwapOutcome::Cancelled { why } => {
            fields.insert("message".to_owned(), json!(why));
        }
        SwapOutcome::Ready | SwapOutcome::Unloaded | SwapOutcome::Asleep => {}
    }
    fields
}

/// `s12` or `12`.
pub fn parse_id(text: &str) -> Option<SwapId> {
    text.strip_prefix('s').unwrap_or(text).parse().ok().map(SwapId)
}
