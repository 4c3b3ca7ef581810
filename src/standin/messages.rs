//! `/v1/messages`: the same replies in Anthropic's shape.

use std::convert::Infallible;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value, json};

use super::reply::{Part, Reply};

/// The whole answer as one JSON object.
pub async fn whole(mut reply: Reply) -> Value {
    let mut text = String::new();
    let finish = loop {
        match reply.next().await {
            Part::Token(token) => text.push_str(&token),
            Part::End(finish) => break finish,
        }
    };
    let mut answer = envelope(&reply);
    answer["content"] = json!([{"type": "text", "text": text}]);
    answer["stop_reason"] = json!(stop_reason(finish));
    answer["usage"]["output_tokens"] = json!(reply.sent);
    answer
}

/// The answer as server-sent events.
pub fn stream(reply: Reply) -> Body {
    let events = Events { reply, stage: Stage::Start };
    Body::from_stream(stream::unfold(events, |mut events| async move {
        let frame = events.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(frame)), events))
    }))
}

fn envelope(reply: &Reply) -> Value {
    json!({
        "id": format!("msg_{}", reply.id), "type": "message", "role": "assistant",
        "model": reply.name, "content": [], "stop_reason": null, "stop_sequence": null,
        "usage": {"input_tokens": reply.prompt_tokens, "output_tokens": 0},
    })
}

fn stop_reason(finish: &str) -> &str {
    match finish {
        "length" => "max_tokens",
        "stop" => "end_turn",
        other => other,
    }
}

struct Events {
    reply: Reply,
    stage: Stage,
}

enum Stage {
    Start,
    Block,
    Tokens,
    Delta(&'static str),
    Stop,
    Over,
}

impl Events {
    async fn next(&mut self) -> Option<String> {
        let event = match self.stage {
            Stage::Start => {
                self.stage = Stage::Block;
                json!({"type": "message_start", "message": envelope(&self.reply)})
            }
            Stage::Block => {
                self.stage = Stage::Tokens;
                let block = json!({"type": "text", "text": ""});
                json!({"type": "content_block_start", "index": 0, "content_block": block})
            }
            Stage::Tokens => match self.reply.next().await {
                Part::Token(text) => {
                    let delta = json!({"type": "text_delta", "text": text});
                    json!({"type": "content_block_delta", "index": 0, "delta": delta})
                }
                Part::End(finish) => {
                    self.stage = Stage::Delta(finish);
                    json!({"type": "content_block_stop", "index": 0})
                }
            },
            Stage::Delta(finish) => {
                self.stage = Stage::Stop;
                json!({
                    "type": "message_delta",
                    "delta": {"stop_reason": stop_reason(finish), "stop_sequence": null},
                    "usage": {"output_tokens": self.reply.sent},
                })
            }
            Stage::Stop => {
                self.stage = Stage::Over;
                self.reply.place = None;
                json!({"type": "message_stop"})
            }
            Stage::Over => return None,
        };
        let name = event["type"].as_str().unwrap_or_default();
        Some(format!("event: {name}\ndata: {event}\n\n"))
    }
}
