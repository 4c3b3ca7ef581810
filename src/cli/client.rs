//! What the client commands share: connection, key, exit codes, and tables.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::trust;
use crate::api::reachable;

/// A ledger of a thousand swaps with their logs stays far below.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// What an answer that refuses may say.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For answers that wait for nothing.
pub const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest wait that the orchestrator itself allows, and some.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(3600 + 60);

/// Shown below the help of every client command.
pub const EXIT_CODES: &str = "Exit codes: 0 done; 1 unexpected; 2 wrong use; \
3 Wharf cannot be reached; 4 refused (unknown model, key, …); 5 not ready, failed or timed out.";

#[derive(Clone, Debug, Default, clap::Args)]
pub struct Connection {
    /// Where the orchestrator listens, as HOST:PORT, http://HOST:PORT or https://HOST:PORT. The first that is set
    /// counts: --url, WHARF_URL, WHARF_ORCHESTRATOR, `listen.orchestrator` of the configuration,
    /// 127.0.0.1:8888. A key, where one is needed, is read from WHARF_KEY, or from the file that
    /// WHARF_KEY_FILE names
    #[arg(long, env = "WHARF_URL", value_name = "URL")]
    pub url: Option<String>,
    /// The configuration whose `listen` counts; models.yaml by default. The certificate of its
    /// `listen.tls` is trusted, as is that of WHARF_TLS_CERT_FILE
    #[arg(long, short, env = "WHARF_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("cannot reach Wharf at {url}: {why} (is it running? the address is from {origin})")]
    Unreachable { url: String, why: String, origin: String },
    #[error("{message}")]
    Refused { status: StatusCode, message: String, body: Value },
    #[error("{0}")]
    Unexpected(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Unexpected(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Unreachable { .. } => 3,
            Failure::Refused { status, .. } if status.is_client_error() => 4,
            Failure::Refused { .. } => 5,
        }
    }
}

/// Ends a command: the error on stderr (as JSON on stdout if asked), and the exit code.
pub fn finish(result: Result<(), Failure>, json: bool) -> ExitCode {
    let Err(failure) = result else { return ExitCode::SUCCESS };
    match &failure {
        Failure::Refused { body, .. } if json => say(&pretty(body)),
        _ => eprintln!("wharf: {failure}"),
    }
    if let (Failure::Refused { body, .. }, false) = (&failure, json) {
        for line in body["cause"]["log"].as_array().into_iter().flatten() {
            eprintln!("  | {}", text(line));
        }
    }
    ExitCode::from(failure.code())
}

/// From WHARF_KEY, else from the file that `serve --key-file` made. A file that is not there yet
/// is no error: Wharf may need no key.
fn key() -> Result<Option<String>, Failure> {
    let given = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(key) = given("WHARF_KEY") {
        return Ok(Some(key));
    }
    let Some(path) = given("WHARF_KEY_FILE") else { return Ok(None) };
    match std::fs::read_to_string(&path) {
        Ok(key) => Ok(Some(key.trim().to_owned()).filter(|key| !key.is_empty())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::Usage(format!("failed to read WHARF_KEY_FILE {path}: {error}"))),
    }
}

impl Connection {
    fn address(&self) -> Address {
        let given = |value: Option<String>| value.filter(|value| !value.is_empty());
        let path = crate::config::path(self.config.clone());
        let listening = crate::config::listening_of(&path).unwrap_or_default();
        let own = given(std::env::var("WHARF_TLS_CERT_FILE").ok());
        let own = own.map(PathBuf::from).or(listening.cert_file);
        let scheme = if own.is_some() { "https" } else { "http" };
        if let Some(url) = given(self.url.clone()) {
            let origin = "--url or WHARF_URL".to_owned();
            return Address { base: with_scheme("http", &url), origin, own };
        }
        let (address, origin) =
            if let Some(listen) = given(std::env::var("WHARF_ORCHESTRATOR").ok()) {
                (listen, "WHARF_ORCHESTRATOR".to_owned())
            } else if let Some(listen) = listening.orchestrator {
                (listen.to_string(), format!("listen.orchestrator of {}", path.display()))
            } else {
                ("127.0.0.1:8888".to_owned(), "the default".to_owned())
            };
        let origin = format!("{origin}; --url says otherwise");
        Address { base: with_scheme(scheme, &address), origin, own }
    }
}

/// Where Wharf is.
struct Address {
    base: String,
    /// Where that is from.
    origin: String,
    /// The certificate that it is configured to show.
    own: Option<PathBuf>,
}

/// `host:port` as a URL; an address that only says "every interface" is reached on loopback.
fn with_scheme(scheme: &str, address: &str) -> String {
    if address.contains("://") {
        return address.trim_end_matches('/').to_owned();
    }
    let address = match address.parse::<SocketAddr>() {
        Ok(listen) => reachable(listen).to_string(),
        Err(_) => address.trim_end_matches('/').to_owned(),
    };
    format!("{scheme}://{address}")
}

/// The control API of one Wharf.
#[derive(Debug)]
pub struct Client {
    base: String,
    /// Where the address is from, for who cannot reach it.
    origin: String,
    key: Option<String>,
    http: HttpClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Client {
    pub fn new(connection: &Connection) -> Result<Client, Failure> {
        let Address { base, origin, own } = connection.address();
        let uri: http::Uri = base
            .parse()
            .map_err(|error| Failure::Usage(format!("{base} is not a URL: {error}")))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            let message = format!("{base} must look like http://127.0.0.1:8888 or https://…");
            return Err(Failure::Usage(message));
        }
        let tls = trust::config(own.as_deref());
        let tls = tls.map_err(|error| Failure::Unexpected(format!("no TLS: {error}")))?;
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        connector.enforce_http(false);
        // It adds the ALPN itself.
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        Ok(Client {
            base,
            origin,
            key: key()?,
            http: HttpClient::builder(TokioExecutor::new()).build(connector),
        })
    }

    pub fn base(&self) -> &str {
        &self.base
    }

    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.send(Method::GET, path, None, READ_TIMEOUT).await
    }

    pub async fn post(&self, path: &str, body: &Value, limit: Duration) -> Result<Value, Failure> {
        self.send(Method::POST, path, Some(body), limit).await
    }

    /// Hands on each line of a text answer as it comes, until the answer ends.
    pub async fn lines(&self, path: &str, mut each: impl FnMut(&str)) -> Result<(), Failure> {
        let asked = self.http.request(self.request(Method::GET, path, None)?);
        let response = tokio::time::timeout(READ_TIMEOUT, asked)
            .await
            .map_err(|_| self.unreachable(format!("no answer within {READ_TIMEOUT:?}")))?
            .map_err(|error| self.broken(&error))?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let bytes = Limited::new(body, REFUSAL_BYTES_MAX).collect().await;
            let bytes = bytes.map_err(|error| self.broken(&*error))?.to_bytes();
            let text = String::from_utf8_lossy(&bytes).trim().to_owned();
            let body: Value = serde_json::from_str(&text).unwrap_or_default();
            let message = body["error"]["message"].as_str().map_or(text, str::to_owned);
            return Err(Failure::Refused { status, message, body });
        }
        let mut unfinished = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.broken(&error))?;
            unfinished.extend_from_slice(&frame.into_data().unwrap_or_default());
            while let Some(end) = unfinished.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = unfinished.drain(..=end).collect();
                each(String::from_utf8_lossy(&line[..end]).as_ref());
            }
        }
        Ok(())
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Value, Failure> {
        let request = self.request(method, path, body)?;
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| self.broken(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let bytes = body.map_err(|error| self.broken(&*error))?.to_bytes();
            Ok((status, bytes))
        };
        let (status, bytes) = tokio::time::timeout(limit, exchange).await.map_err(|_| {
            let why = format!("no answer within {}", humantime::format_duration(limit));
            self.unreachable(why)
        })??;
        let body: Value = serde_json::from_slice(&bytes).map_err(|_| {
            Failure::Unexpected(format!("{}{path} did not answer with JSON ({status})", self.base))
        })?;
        if status.is_success() {
            return Ok(body);
        }
        let message = match body["error"]["message"].as_str() {
            Some(message) => message.to_owned(),
            None => format!("{}{path} answered {status}", self.base),
        };
        Err(Failure::Refused { status, message, body })
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let bytes = body.map_or(Bytes::new(), |body| Bytes::from(body.to_string()));
        request
            .body(Full::new(bytes))
            .map_err(|error| Failure::Usage(format!("--url or WHARF_KEY is not usable: {error}")))
    }

    fn broken(&self, error: &(dyn std::error::Error + 'static)) -> Failure {
        if let Some(why) = trust::trouble(error) {
            return self.unreachable(why);
        }
        // The outer error says "client error (Connect)"; the innermost one says why.
        let mut innermost = error;
        while let Some(source) = innermost.source() {
            innermost = source;
        }
        self.unreachable(innermost.to_string())
    }

    fn unreachable(&self, why: String) -> Failure {
        Failure::Unreachable { url: self.base.clone(), why, origin: self.origin.clone() }
    }
}

/// A name as one segment of a path.
pub fn encode(name: &str) -> String {
    name.bytes().fold(String::new(), |mut path, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            path.push(char::from(byte));
        } else {
            // Writing to a String never fails.
            let _ = write!(path, "%{byte:02X}");
        }
        path
    })
}

/// An answer on stdout: as JSON if asked, else as `describe` puts it for people.
pub fn show(answer: &Value, json: bool, describe: impl FnOnce(&Value) -> String) {
    say(&if json { pretty(answer) } else { describe(answer) });
}

/// A line to stdout; a reader that left (`| head`) is no error.
pub(super) fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn pretty(body: &Value) -> String {
    format!("{body:#}")
}

/// A JSON value as a cell: text without quotes, `-` for null.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(list) if list.is_empty() => "-".to_owned(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// `9.0 s`, `12 ms`, or `-`.
pub fn seconds(value: &Value) -> String {
    match value.as_f64() {
        None => "-".to_owned(),
        Some(seconds) if seconds < 1.0 => format!("{:.0} ms", seconds * 1000.0),
        Some(seconds) => format!("{seconds:.1} s"),
    }
}

/// Columns as wide as their widest cell; the last one is not padded.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    let lines: Vec<&Vec<String>> = std::iter::once(&head).chain(rows).collect();
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..head.len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |cells: &Vec<String>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(|cells| line(cells)).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_one_segment() {
        assert_eq!(encode("org/coder:7b"), "org%2Fcoder%3A7b");
        assert_eq!(encode("mistral-7b_v0.3~"), "mistral-7b_v0.3~");
        assert_eq!(encode("é"), "%C3%A9");
    }

    #[test]
    fn columns_line_up() {
        let rows =
            [vec!["a".to_owned(), "ready".to_owned()], vec!["long".to_owned(), "-".to_owned()]];
        assert_eq!(table(&["MODEL", "STATE"], &rows), "MODEL  STATE\na      ready\nlong   -");
    }

    #[test]
    fn only_http_urls_are_taken() {
        let client = |url: &str| {
            let connection = Connection { url: Some(url.to_owned()), ..Connection::default() };
            Client::new(&connection).map(|c| c.base().to_owned())
        };
        assert_eq!(client("http://127.0.0.1:8888/").expect("a URL"), "http://127.0.0.1:8888");
        assert_eq!(client("localhost:8888").expect("host and port"), "http://localhost:8888");
        assert_eq!(client("0.0.0.0:8888").expect("an address"), "http://127.0.0.1:8888");
        assert_eq!(client("[::]:8888").expect("an address"), "http://[::1]:8888");
        assert_eq!(client("https://a.lan:1/").expect("a URL"), "https://a.lan:1");
        for bad in ["ftp://example.org", "not a url", "http://"] {
            assert!(matches!(client(bad), Err(Failure::Usage(_))), "{bad}");
        }
    }
}
