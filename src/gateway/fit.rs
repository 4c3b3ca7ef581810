//! The body of a request as the engine of one model gets it.

use bytes::Bytes;

use super::parse::Asked;
use super::reject::Reject;
use super::routes::{Api, BodyKind, Inference};
use super::{filter, multipart, parse};
use crate::config::catalog::{EngineKind, ModelSpec};
use crate::http1::Headers;

#[derive(Debug)]
pub struct Fitted {
    pub body: Bytes,
    pub stream: bool,
    /// The chunk with the usage was not asked for by the client.
    pub remove_usage: bool,
}

/// `known`: the model is known without the body, which may name any or none.
pub fn read<'b>(
    inference: &Inference,
    body: &'b Bytes,
    headers: &impl Headers,
    known: bool,
) -> Result<Asked<'b>, Reject> {
    match inference.body {
        BodyKind::Json if known => parse::parse_any(body),
        BodyKind::Json => parse::parse(body),
        BodyKind::Form => multipart::parse(body, headers),
    }
}

/// Under the name that the engine knows, with the model's filters. `asked`: read from `body`.
pub fn fit(
    inference: &Inference,
    body: &Bytes,
    asked: Asked<'_>,
    spec: &ModelSpec,
) -> Result<Fitted, Reject> {
    let filtered;
    let (mut body, mut asked) = (body.clone(), asked);
    if inference.body == BodyKind::Json
        && let Some(other) = filter::shaped(&body, spec, inference.upstream)?
    {
        body = other;
        filtered = body.clone();
        asked = parse::parse_any(&filtered)?;
    }
    let stream = asked.stream;
    let mut edits = Vec::new();
    edits.extend(asked.rename(spec.served_name()));
    let usage =
        (stream && may_inject(inference, spec)).then(|| asked.include_usage(&body)).flatten();
    let remove_usage = usage.is_some();
    edits.extend(usage);
    Ok(Fitted { body: parse::apply(body.clone(), edits), stream, remove_usage })
}

/// llama.cpp tells its figures in every stream by itself.
fn may_inject(inference: &Inference, spec: &ModelSpec) -> bool {
    spec.include_usage
        && matches!(inference.api, Api::Chat | Api::Completions)
        && spec.engine != EngineKind::Llamacpp
        // Whoever configures that field means it.
        && !spec.filters.touch("stream_options")
}
