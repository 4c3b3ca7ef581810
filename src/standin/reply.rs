//! What is answered: `NAME-1 NAME-2 …`, so that a reader sees which model did, token by token.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};

use super::engine::{Engine, Place};
use super::options::Style;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Completion,
}

/// One reply under way. Dropping it gives up its place in the engine.
pub struct Reply {
    engine: Arc<Engine>,
    pub(super) place: Option<Place>,
    kind: Kind,
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) prompt_tokens: u32,
    /// Tokens to answer with, and whether the client set that bound.
    total: u32,
    limited: bool,
    pub(super) sent: u32,
    /// When the prompt was begun with, and the first token there.
    began: Instant,
    first: Option<Instant>,
    sleeps: u64,
    /// Level 2 sleep without a reload of the weights.
    garbage: bool,
}

/// What the client asked for.
pub struct Asked {
    pub kind: Kind,
    pub id: u64,
    pub name: String,
    pub prompt_tokens: u32,
    pub max_tokens: Option<u32>,
}

pub(super) enum Part {
    Token(String),
    End(&'static str),
}

impl Reply {
    pub async fn begin(engine: Arc<Engine>, asked: Asked) -> Reply {
        let place = engine.enter().await;
        let now = *engine.wakefulness.borrow();
        Reply {
            total: asked.max_tokens.unwrap_or(engine.options.speed.reply_tokens),
            limited: asked.max_tokens.is_some(),
            place: Some(place),
            kind: asked.kind,
            id: asked.id,
            name: asked.name,
            prompt_tokens: asked.prompt_tokens,
            sent: 0,
            began: Instant::now(),
            first: None,
            sleeps: now.sleeps,
            garbage: now.stale,
            engine,
        }
    }

    pub(super) async fn next(&mut self) -> Part {
        if self.sent == self.total {
            return Part::End(if self.limited { "length" } else { "stop" });
        }
        let mut wakefulness = self.engine.wakefulness.subscribe();
        let sleeps = self.sleeps;
        tokio::select! {
            biased;
            // vLLM's default: a sleep aborts what is under way.
            _ = wakefulness.wait_for(|now| now.sleeps != sleeps) => return Part::End("abort"),
            () = self.pace() => {}
        }
        self.sent += 1;
        self.first.get_or_insert_with(Instant::now);
        let name = if self.garbage { "garbage" } else { &self.name };
        let gap = if self.sent == 1 { "" } else { " " };
        Part::Token(format!("{gap}{name}-{}", self.sent))
    }

    async fn pace(&self) {
        let speed = &self.engine.options.speed;
        let gap = if self.sent == 0 {
            speed.ttft
        } else if speed.tokens_per_second > 0.0 {
            Duration::from_secs_f64(1.0 / speed.tokens_per_second)
        } else {
            Duration::ZERO
        };
        if gap.is_zero() && !self.engine.is_frozen() {
            // Many replies at full speed shall take turns.
            tokio::task::yield_now().await;
            return;
        }
        tokio::select! {
            biased;
            () = self.engine.frozen() => std::future::pending().await,
            () = tokio::time::sleep(gap) => {}
        }
    }

    /// The whole answer as one JSON object.
    pub async fn whole(mut self) -> Value {
        let mut text = String::new();
        let finish = loop {
            match self.next().await {
                Part::Token(token) => text.push_str(&token),
                Part::End(finish) => break finish,
            }
        };
        let choice = match self.kind {
            Kind::Chat => json!({
                "index": 0, "message": {"role": "assistant", "content": text},
                "logprobs": null, "finish_reason": finish,
            }),
            Kind::Completion => {
                json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish})
            }
        };
        let mut answer = self.envelope(false, json!([choice]));
        answer["usage"] = self.usage();
        self.add_timings(&mut answer);
        answer
    }

    /// The answer as server-sent events.
    pub fn stream(self, include_usage: bool) -> Body {
        let frames = Frames { reply: self, include_usage, stage: Stage::Role };
        Body::from_stream(stream::unfold(frames, |mut frames| async move {
            let frame = frames.next().await?;
            Some((Ok::<_, std::convert::Infallible>(Bytes::from(frame)), frames))
        }))
    }

    fn envelope(&self, chunk: bool, choices: Value) -> Value {
        let (prefix, object) = match (self.kind, chunk) {
            (Kind::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
            (Kind::Chat, false) => ("chatcmpl", "chat.completion"),
            (Kind::Completion, _) => ("cmpl", "text_completion"),
        };
        json!({
            "id": format!("{prefix}-{}", self.id), "object": object, "created": unix_seconds(),
            "model": self.name, "choices": choices,
        })
    }

    /// llama.cpp tells its figures in every answer, and in the last event of every stream.
    fn add_timings(&self, answer: &mut Value) {
        if self.engine.options.style != Style::Llamacpp {
            return;
        }
        let first = self.first.unwrap_or_else(Instant::now);
        let (prompt, predicted) = (first.duration_since(self.began), first.elapsed());
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        // Never by zero: the smallest time that is told is a microsecond.
        let speed = |n: u32, time: Duration| f64::from(n) / time.as_secs_f64().max(1e-6);
        answer["timings"] = json!({
            "cache_n": 0,
            "prompt_n": self.prompt_tokens, "prompt_ms": ms(prompt),
            "prompt_per_second": speed(self.prompt_tokens, prompt),
            "predicted_n": self.sent, "predicted_ms": ms(predicted),
            "predicted_per_second": speed(self.sent, predicted),
        });
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.sent,
            "total_tokens": self.prompt_tokens + self.sent,
        })
    }
}

struct Frames {
    reply: Reply,
    include_usage: bool,
    stage: Stage,
}

enum Stage {
    Role,
    Tokens,
    Usage,
    Done,
    Over,
}

impl Frames {
    async fn next(&mut self) -> Option<String> {
        let event = match self.stage {
            Stage::Role => {
                self.stage = Stage::Tokens;
                match self.reply.kind {
                    Kind::Chat => self.chunk(json!({"role": "assistant", "content": ""}), None),
                    Kind::Completion => self.part().await,
                }
            }
            Stage::Tokens => self.part().await,
            Stage::Usage => {
                self.stage = Stage::Done;
                let mut last = self.reply.envelope(true, json!([]));
                last["usage"] = self.reply.usage();
                last
            }
            Stage::Done => {
                self.stage = Stage::Over;
                self.reply.place = None;
                return Some("data: [DONE]\n\n".to_owned());
            }
            Stage::Over => return None,
        };
        Some(format!("data: {event}\n\n"))
    }

    async fn part(&mut self) -> Value {
        match (self.reply.next().await, self.reply.kind) {
            (Part::Token(token), Kind::Chat) => self.chunk(json!({"content": token}), None),
            (Part::Token(token), Kind::Completion) => self.chunk(json!(token), None),
            (Part::End(finish), kind) => {
                self.stage = if self.include_usage { Stage::Usage } else { Stage::Done };
                let nothing = if kind == Kind::Chat { json!({}) } else { json!("") };
                let mut last = self.chunk(nothing, Some(finish));
                self.reply.add_timings(&mut last);
                last
            }
        }
    }

    fn chunk(&self, content: Value, finish: Option<&str>) -> Value {
        let field = if self.reply.kind == Kind::Chat { "delta" } else { "text" };
        let choice = json!({"index": 0, field: content, "logprobs": null, "finish_reason": finish});
        self.reply.envelope(true, json!([choice]))
    }
}

pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
