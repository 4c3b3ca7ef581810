//! A small client for the demo: asks a model, remembers what it saw while it waited.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

/// `X-Request-Id` of the demo's own requests.
pub const OWN_ID: &str = "wharf-demo";
/// Long enough for every swap of the demo, short enough to end.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);
/// Ample for a machine that is busy with other things.
const UP_WITHIN: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub struct Talk {
    client: Client<HttpConnector, Full<Bytes>>,
    pub gateway: String,
    pub orchestrator: String,
}

/// What one request brought.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub text: String,
    /// SSE comments received while waiting.
    pub comments: Vec<String>,
    pub first_byte: Duration,
    pub took: Duration,
    pub done: bool,
}

impl Answer {
    /// Stand-ins and the tiny GGUFs say `NAME-1 NAME-2 …`.
    pub fn is_from(&self, model: &str) -> bool {
        self.status == 200 && self.done && self.text.trim_start().starts_with(&format!("{model}-1"))
    }
}

impl Talk {
    pub fn new(gateway: u16, orchestrator: u16) -> Talk {
        Talk {
            client: Client::builder(TokioExecutor::new()).build_http(),
            gateway: format!("http://127.0.0.1:{gateway}"),
            orchestrator: format!("http://127.0.0.1:{orchestrator}"),
        }
    }

    pub async fn chat(
        &self,
        model: &str,
        stream: bool,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Answer> {
        let body = json!({
            "model": model, "stream": stream, "max_tokens": 16,
            "messages": [{"role": "user", "content": "who are you?"}],
        });
        let asked = self.chat_within(body, stream, headers);
        tokio::time::timeout(ANSWER_WITHIN, asked)
            .await
            .with_context(|| format!("{model} did not answer within {ANSWER_WITHIN:?}"))?
    }

    async fn chat_within(
        &self,
        body: Value,
        stream: bool,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Answer> {
        let began = Instant::now();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/v1/chat/completions", self.gateway))
            .header("content-type", "application/json")
            .header("x-request-id", OWN_ID);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.client.request(request.body(Full::from(body.to_string()))?).await?;
        let status = response.status().as_u16();
        let mut body = response.into_body();
        let (mut bytes, mut first_byte) = (Vec::new(), None);
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                first_byte.get_or_insert_with(|| began.elapsed());
                bytes.extend_from_slice(&data);
            }
        }
        let raw = String::from_utf8_lossy(&bytes);
        let mut answer = Answer {
            status,
            text: String::new(),
            comments: Vec::new(),
            first_byte: first_byte.unwrap_or_else(|| began.elapsed()),
            took: began.elapsed(),
            done: false,
        };
        if stream && status == 200 {
            read_events(&raw, &mut answer);
        } else {
            read_whole(&raw, &mut answer);
        }
        Ok(answer)
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path, Value::Null).await.map(|(_, value)| value)
    }

    /// Status and JSON body of a call to the orchestrator.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Value,
    ) -> anyhow::Result<(u16, Value)> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.orchestrator))
            .header("content-type", "application/json")
            .body(Full::from(body))?;
        let asked = async {
            let response = self.client.request(request).await?;
            let status = response.status().as_u16();
            let bytes = response.into_body().collect().await?.to_bytes();
            anyhow::Ok((status, bytes))
        };
        let (status, bytes) =
            tokio::time::timeout(ANSWER_WITHIN, asked).await.context(path.to_owned())??;
        let value = serde_json::from_slice(&bytes)
            .with_context(|| format!("{path} answered {status} without JSON"))?;
        Ok((status, value))
    }

    pub async fn wait_until_up(&self) -> anyhow::Result<()> {
        let until = Instant::now() + UP_WITHIN;
        while Instant::now() < until {
            if self.get("/status").await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("{} did not come up within {UP_WITHIN:?}", self.orchestrator)
    }
}

fn read_events(raw: &str, answer: &mut Answer) {
    for line in raw.lines() {
        if let Some(comment) = line.strip_prefix(':') {
            answer.comments.push(comment.trim().to_owned());
        } else if let Some(data) = line.strip_prefix("data:") {
            if data.trim() == "[DONE]" {
                answer.done = true;
            } else if let Ok(event) = serde_json::from_str::<Value>(data) {
                let delta = event["choices"][0]["delta"]["content"].as_str();
                answer.text.push_str(delta.unwrap_or_default());
                if let Some(message) = event["error"]["message"].as_str() {
                    answer.text.push_str(message);
                }
            }
        }
    }
}

fn read_whole(raw: &str, answer: &mut Answer) {
    let value: Value = serde_json::from_str(raw).unwrap_or_default();
    let content = value["choices"][0]["message"]["content"].as_str();
    let text = content.or_else(|| value["error"]["message"].as_str()).unwrap_or(raw);
    answer.text = text.to_owned();
    answer.done = content.is_some();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty(status: u16) -> Answer {
        let zero = Duration::ZERO;
        Answer {
            status,
            text: String::new(),
            comments: Vec::new(),
            first_byte: zero,
            took: zero,
            done: false,
        }
    }

    #[test]
    fn a_stream_counts_only_when_it_ended() {
        let mut answer = empty(200);
        read_events(
            ": wharf starting a\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"a-1 a-2\"}}]}\n\n",
            &mut answer,
        );
        assert!(!answer.is_from("a"), "no [DONE]");
        read_events("data: [DONE]\n\n", &mut answer);
        assert!(answer.is_from("a") && !answer.is_from("b"));
        assert_eq!(answer.comments, ["wharf starting a"]);
    }

    #[test]
    fn an_error_is_no_answer() {
        let mut answer = empty(503);
        read_whole(r#"{"error":{"message":"a-1 is a lie"}}"#, &mut answer);
        assert!(!answer.is_from("a"));
        assert_eq!(answer.text, "a-1 is a lie");
    }
}
