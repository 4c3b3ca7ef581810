//! What handlers read from a request, with errors in our own shape.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use http::StatusCode;
use http::request::Parts;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::error::bad;
use crate::gateway::reject::Reject;

/// Control bodies are a few fields.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
const BODY_TIME_MAX: Duration = Duration::from_secs(30);

/// The percent-decoded wildcard of a path.
pub struct PathText(pub String);

impl<S: Send + Sync> FromRequestParts<S> for PathText {
    type Rejection = Reject;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Reject> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(text)) => Ok(PathText(text)),
            Err(error) => Err(bad("path", error.body_text())),
        }
    }
}

/// The query string as a struct.
pub struct QueryText<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for QueryText<T> {
    type Rejection = Reject;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Reject> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(QueryText(value)),
            Err(error) => Err(bad("query", error.body_text())),
        }
    }
}

/// A JSON object, whatever its content type says; an empty body means `{}`.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Reject;

    async fn from_request(request: Request, state: &S) -> Result<Self, Reject> {
        let body = timeout(BODY_TIME_MAX, Bytes::from_request(request, state)).await;
        let bytes = body
            .map_err(|_| {
                let message = format!("the body did not come within {BODY_TIME_MAX:?}");
                Reject::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", message)
            })?
            .map_err(|error| match error.status() {
                StatusCode::PAYLOAD_TOO_LARGE => Reject::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "body_too_large",
                    format!("the body is larger than {BODY_BYTES_MAX} bytes"),
                ),
                _ => bad("body", error.body_text()),
            })?;
        let text = match bytes.trim_ascii_start().first() {
            None => b"{}".as_slice(),
            Some(b'{') => &bytes,
            // serde would also fill a struct from an array.
            Some(_) => return Err(bad("body", "the body must be a JSON object: {…}")),
        };
        match serde_json::from_slice(text) {
            Ok(body) => Ok(Body(body)),
            Err(error) => Err(bad("body", format!("the body is not as expected: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body as Bytes;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Forced {
        #[serde(default)]
        force: bool,
    }

    async fn read(body: &'static str) -> Result<bool, String> {
        let body = Body::<Forced>::from_request(Request::new(Bytes::from(body)), &()).await;
        body.map(|body| body.0.force).map_err(|reject| reject.problem().message.clone())
    }

    #[tokio::test]
    async fn only_an_object_is_a_body_and_nothing_means_an_empty_one() {
        assert_eq!(read("").await, Ok(false));
        assert_eq!(read(" {\"force\":true}").await, Ok(true));
        for body in ["[true]", "true", "null", "\"force\""] {
            let why = read(body).await.unwrap_err();
            assert!(why.contains("must be a JSON object"), "{body}: {why}");
        }
    }
}
