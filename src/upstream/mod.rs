//! HTTP/1.1 to one engine: connections that are driven by the request that uses them, so that an
//! answer crosses no task and no thread on its way, and a pool of idle ones for each thread.
//!
//! One exchange at a time per connection. An answer's [`Incoming`] body owns its connection and
//! gives it back with the last byte; dropped earlier, it closes it. A connection that waits for
//! bytes holds no buffer.

mod body;
mod connection;
mod head;
mod pool;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use thiserror::Error;
use tokio::time::Instant;

use crate::http1::{Fields, Lines, Prefixed};
use crate::runtime::Endpoint;

pub use body::Incoming;
pub use pool::{lanes, set_lane};

use connection::Connector;
use pool::Pool;

/// For the connection, its name's lookup and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A request to the endpoint. `Host` and `Content-Length` are added.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub method: &'a Method,
    /// Behind the endpoint's base, with a slash first.
    pub path_and_query: &'a str,
    pub headers: &'a Lines,
    /// Beside `headers`, in which they are not.
    pub more: &'a Lines,
    pub body: &'a Bytes,
}

/// An answer whose body is still to come.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: Fields,
    pub body: Incoming,
}

/// Why there is no head of an answer.
#[derive(Debug, Error)]
pub enum CallError {
    #[error("cannot connect")]
    Connect(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("no connection within {} s", .0.as_secs())]
    ConnectTimeout(Duration),
    #[error("the connection broke before the answer")]
    Broken(#[source] io::Error),
    #[error("the connection was closed before the answer")]
    Closed,
    #[error("no answer in the time for it")]
    Silent,
    #[error("{0}")]
    Invalid(String),
}

/// A connection that speaks another protocol from now on; its first bytes may have come with the head.
pub type Upgraded = Prefixed<connection::Io>;

/// The connections to one endpoint. Cheap to clone.
#[derive(Clone, Debug)]
pub struct UpstreamClient {
    connector: Arc<Connector>,
    pool: Arc<Pool>,
}

impl UpstreamClient {
    pub fn to(endpoint: &Endpoint) -> UpstreamClient {
        UpstreamClient { connector: Arc::new(Connector::to(endpoint)), pool: Arc::default() }
    }

    /// To the head of the answer, which must be here by `until`. Nothing is sent twice.
    pub async fn request(&self, call: Call<'_>, until: Instant) -> Result<Answer, CallError> {
        let sent = head::written(&self.connector, &call).map_err(CallError::Invalid)?;
        let mut connection = match self.pool.take() {
            Some(idle) => idle,
            None => self.connector.connect_until(until).await?,
        };
        let (head, rest, unsent) = connection.exchange(sent, call.body, until).await?;
        body::answer(head, rest, unsent, connection, call.method, &self.pool)
    }

    /// Opens a connection for the next request, so that it need not.
    pub async fn open_ahead(&self) -> Result<(), CallError> {
        let connection = self.connector.connect().await?;
        Pool::give_back(&self.pool, connection);
        Ok(())
    }

    /// Closes those that no request uses: some servers do not end while one is open.
    pub fn close_idle(&self) {
        self.pool.clear();
    }
}

#[cfg(test)]
mod tests;
