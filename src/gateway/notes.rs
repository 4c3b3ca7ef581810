//! What a waiting client is told, in words.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::infer::Stage;
use super::routes::Api;
use crate::config::catalog::{ModelSpec, WaitingStyle};
use crate::orchestrator::{Handle, View};

/// Says something when the phase changes, and else at least every `every`.
pub struct Notes {
    pub style: WaitingStyle,
    handle: Handle,
    spec: Arc<ModelSpec>,
    api: Api,
    every: Duration,
    last: Option<(Instant, String)>,
}

impl Notes {
    pub fn new(
        handle: Handle,
        spec: Arc<ModelSpec>,
        api: Api,
        style: WaitingStyle,
        every: Duration,
    ) -> Notes {
        // Empty deltas have a shape for the two OpenAI streams only.
        let style = match (style, api) {
            (WaitingStyle::Reasoning, Api::Chat) => WaitingStyle::Reasoning,
            (WaitingStyle::Reasoning | WaitingStyle::Chunk, Api::Chat | Api::Completions) => {
                WaitingStyle::Chunk
            }
            _ => WaitingStyle::Comment,
        };
        Notes { style, handle, spec, api, every, last: None }
    }

    pub fn next(&mut self, stage: &Stage, now: Instant) -> Option<Bytes> {
        let view = self.handle.view();
        if let Stage::Waiting(_, spec) = stage {
            self.spec = Arc::clone(spec);
        }
        let phase = match stage {
            Stage::Forwarded => "forwarded".to_owned(),
            Stage::Admitted | Stage::Waiting(..) => phase(&view, &self.spec).unwrap_or_default(),
        };
        let due = self.last.as_ref().is_none_or(|(told, before)| {
            now.duration_since(*told) >= self.every || *before != phase
        });
        if !due {
            return None;
        }
        let text = self.text(&view, stage, &phase);
        self.last = Some((now, phase));
        Some(self.dressed(&text))
    }

    /// `starting mistral, phase=load_weights 40%, place 2, about 9 s`
    fn text(&self, view: &View, stage: &Stage, phase: &str) -> String {
        let name = &self.spec.name;
        let Stage::Waiting(request, _) = stage else {
            return format!("{name} is ready, its answer is awaited");
        };
        let model = view.model(name);
        let mut text = if phase.is_empty() {
            let why = model.map(|model| model.waiting_for.as_str()).unwrap_or_default();
            let why = if why.is_empty() { String::new() } else { format!(", {}", one_line(why)) };
            format!("waiting for {name}{why}")
        } else {
            let percent = view.progress_of(name).and_then(|progress| progress.fraction);
            let percent = percent.map_or(String::new(), |part| format!(" {:.0}%", part * 100.0));
            format!("starting {name}, phase={phase}{percent}")
        };
        if let Some(place) = view.place(name, *request) {
            text.push_str(&format!(", place {place}"));
        }
        if let Some(ready_in) = model.and_then(|model| model.ready_in).filter(|t| !t.is_zero()) {
            let passed = self.handle.now().since(view.at);
            let left = ready_in.saturating_sub(passed).as_millis().div_ceil(1000).max(1);
            text.push_str(&format!(", about {left} s"));
        }
        text
    }

    fn dressed(&self, text: &str) -> Bytes {
        match self.style {
            WaitingStyle::Chunk => self.chunk(""),
            WaitingStyle::Reasoning => self.chunk(text),
            WaitingStyle::Comment | WaitingStyle::Off => format!(": wharf {text}\n\n").into(),
        }
    }

    fn chunk(&self, reasoning: &str) -> Bytes {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let model = self.spec.name.as_str();
        let (object, choice) = match self.api {
            Api::Completions => {
                ("text_completion", json!({ "index": 0, "text": "", "finish_reason": null }))
            }
            Api::Chat | Api::Other => {
                let delta = match reasoning {
                    "" => json!({ "content": "" }),
                    text => json!({ "reasoning_content": format!("{text}\n") }),
                };
                let choice = json!({ "index": 0, "delta": delta, "finish_reason": null });
                ("chat.completion.chunk", choice)
            }
        };
        let chunk: Value = json!({
            "id": "wharf-waiting", "object": object, "created": created, "model": model,
            "choices": [choice],
        });
        format!("data: {chunk}\n\n").into()
    }
}

/// The engine's own stage where it is known, else the phase of the swap.
fn phase(view: &View, spec: &ModelSpec) -> Option<String> {
    let swap = view.model(&spec.name)?.swap.and_then(|id| view.swap(id))?;
    let (phase, _) = swap.phase?;
    let stage = view.progress_of(&spec.name).map(|progress| progress.stage.as_str());
    Some(one_line(stage.filter(|stage| !stage.is_empty()).unwrap_or(phase.as_str())))
}

/// A line end would end the comment.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
