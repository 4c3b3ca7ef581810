//! Reads traffic for a replay: a CSV with the columns `arrival_s,model,service_s`, or Wharf's own
//! activity, as `GET /api/metrics` answers it or as rows of its store.
//!
//! Times of a trace count from its first arrival. Requests that Wharf refused, or whose client
//! left, were never served, so nobody knows for how long they would have been: they are left out.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::Arrival;
use crate::units::{ModelName, Time};

pub const FILE_BYTES_MAX: u64 = 256 << 20;
pub const ARRIVALS_MAX: usize = 1_000_000;
/// Of one line of CSV.
const LINE_BYTES_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 256;
/// Seconds since 1970 are a time of arrival too, milliseconds are not.
const ARRIVAL_S_MAX: f64 = 1e10;
/// 30 days.
const SERVICE_S_MAX: f64 = 2_592_000.0;
/// Of a text that is shown in an error.
const SHOWN_MAX: usize = 40;

const COLUMNS: [&str; 3] = ["arrival_s", "model", "service_s"];

/// Why a trace cannot be read: where, and what was expected there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}{}: {problem}", Place { line: *line, column: column.as_deref() })]
pub struct ReadError {
    pub file: String,
    /// Counts from 1.
    pub line: Option<usize>,
    /// The column or key.
    pub column: Option<String>,
    pub problem: String,
}

struct Place<'a> {
    line: Option<usize>,
    column: Option<&'a str>,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        self.column.map_or(Ok(()), |column| write!(f, ", {column}"))
    }
}

/// What is wrong, before the file is named.
#[derive(Debug, Default)]
struct Problem {
    line: Option<usize>,
    column: Option<String>,
    problem: String,
}

impl Problem {
    fn new(problem: impl Into<String>) -> Problem {
        Problem { problem: problem.into(), ..Problem::default() }
    }

    fn of(column: &str, problem: impl Into<String>) -> Problem {
        Problem { column: Some(column.to_owned()), ..Problem::new(problem) }
    }

    fn at(self, line: usize) -> Problem {
        Problem { line: self.line.or(Some(line)), ..self }
    }

    fn in_file(self, file: &str) -> ReadError {
        let Problem { line, column, problem } = self;
        ReadError { file: file.to_owned(), line, column, problem }
    }
}

/// The arrivals of a file, in their order; those of one moment in the file's.
pub fn read(path: &Path) -> Result<Vec<Arrival>, ReadError> {
    let name = path.display().to_string();
    let failed = |error: std::io::Error| Problem::new(format!("cannot be read: {error}"));
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| failed(error).in_file(&name))?;
    parse(&name, &bytes)
}

/// `file`: its name, for errors.
pub fn parse(file: &str, bytes: &[u8]) -> Result<Vec<Arrival>, ReadError> {
    parsed(bytes, ARRIVALS_MAX).map_err(|problem| problem.in_file(file))
}

fn parsed(bytes: &[u8], arrivals_max: usize) -> Result<Vec<Arrival>, Problem> {
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let max = FILE_BYTES_MAX >> 20;
        return Err(Problem::new(format!("expected {max} MiB at most, found more")));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = line_of(bytes, error.valid_up_to());
        Problem::new("expected text in UTF-8, found other bytes").at(line)
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut found = Found { list: Vec::new(), max: arrivals_max };
    match text.trim_start().chars().next() {
        Some('[') => array(text, &mut found)?,
        Some('{') => lines(text, &mut found)?,
        Some(_) | None => csv(text, &mut found)?,
    }
    let mut found = found.list;
    if found.is_empty() {
        return Err(Problem::new("expected at least one request that was served, found none"));
    }
    found.sort_by_key(|arrival| arrival.at);
    let first = found[0].at;
    for arrival in &mut found {
        arrival.at = Time(arrival.at.0 - first.0);
    }
    Ok(found)
}

/// What is read so far.
struct Found {
    list: Vec<Arrival>,
    max: usize,
}

impl Found {
    fn push(&mut self, arrival: Arrival) -> Result<(), Problem> {
        if self.list.len() == self.max {
            return Err(Problem::new(format!(
                "expected {} arrivals at most, found more",
                self.max
            )));
        }
        self.list.push(arrival);
        Ok(())
    }
}

// --- CSV

fn csv(text: &str, found: &mut Found) -> Result<(), Problem> {
    let mut rows = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    let expected = "expected the header arrival_s,model,service_s or activity in JSON";
    let Some((header, line)) = rows.next() else {
        return Err(Problem::new(format!("{expected}, found nothing")));
    };
    let header = fields(header).map_err(|problem| problem.at(line))?;
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut at = [0; COLUMNS.len()];
    for (at, column) in at.iter_mut().zip(COLUMNS) {
        let mut places = (0..header.len()).filter(|place| header[*place] == column);
        let problem = match (places.next(), places.next()) {
            (Some(place), None) => {
                *at = place;
                continue;
            }
            (Some(_), Some(_)) => "expected the column once, found it twice".to_owned(),
            (None, _) => format!("{expected}, found {}", shown(&header.join(","))),
        };
        return Err(Problem::of(column, problem).at(line));
    }
    for (row, line) in rows {
        let arrival = csv_row(row, header.len(), at);
        arrival.and_then(|arrival| found.push(arrival)).map_err(|problem| problem.at(line))?;
    }
    Ok(())
}

fn csv_row(row: &str, width: usize, at: [usize; COLUMNS.len()]) -> Result<Arrival, Problem> {
    let fields = fields(row)?;
    if fields.len() != width {
        let found = fields.len();
        return Err(Problem::new(format!(
            "expected {width} fields, as in the header, found {found}"
        )));
    }
    let [arrival, model, service] = at.map(|place| fields[place].as_str());
    Ok(Arrival {
        at: Time::ZERO + seconds(COLUMNS[0], arrival, ARRIVAL_S_MAX)?,
        model: model_name(COLUMNS[1], model)?,
        service: seconds(COLUMNS[2], service, SERVICE_S_MAX)?,
    })
}

/// The fields of one line, spaces around them taken off; `"` around a field keeps what is in it.
fn fields(line: &str) -> Result<Vec<String>, Problem> {
    if line.len() > LINE_BYTES_MAX {
        let found = line.len();
        return Err(Problem::new(format!(
            "expected a line of {LINE_BYTES_MAX} bytes at most, found {found}"
        )));
    }
    let mut fields = Vec::new();
    let mut rest = line;
    loop {
        let start = rest.trim_start();
        let (field, after) = match start.strip_prefix('"') {
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                (rest[..end].trim().to_owned(), &rest[end..])
            }
            Some(quoted) => unquoted(quoted)?,
        };
        fields.push(field);
        match after.strip_prefix(',') {
            Some(more) => rest = more,
            None => return Ok(fields),
        }
    }
}

/// The field up to its closing quote, and what follows.
fn unquoted(text: &str) -> Result<(String, &str), Problem> {
    let mut field = String::new();
    let mut rest = text;
    while let Some((part, after)) = rest.split_once('"') {
        field.push_str(part);
        let Some(more) = after.strip_prefix('"') else {
            let after = after.trim_start();
            if after.is_empty() || after.starts_with(',') {
                return Ok((field, after));
            }
            let found = shown(after);
            return Err(Problem::new(format!(
                "expected a comma after a quoted field, found {found}"
            )));
        };
        field.push('"');
        rest = more;
    }
    Err(Problem::new("expected a closing \" on the same line, found none"))
}

fn seconds(column: &str, text: &str, max: f64) -> Result<Duration, Problem> {
    // Decimals only: Rust would read "inf" and "nan" too.
    let is_number =
        text.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-'));
    let value = text.parse().ok().filter(|_| is_number);
    value.and_then(|value| bounded(value, max)).ok_or_else(|| {
        Problem::of(column, format!("expected seconds from 0 to {max}, found {}", shown(text)))
    })
}

fn bounded(seconds: f64, max: f64) -> Option<Duration> {
    let ms = (seconds * 1000.0).round() as u64;
    (0.0..=max).contains(&seconds).then(|| Duration::from_millis(ms))
}

fn milliseconds(key: &str, ms: u64, max_s: f64) -> Result<Duration, Problem> {
    let expected = || format!("expected milliseconds up to {max_s} seconds, found {ms}");
    bounded(ms as f64 / 1000.0, max_s).ok_or_else(|| Problem::of(key, expected()))
}

fn model_name(column: &str, name: &str) -> Result<ModelName, Problem> {
    let problem = match name.len() {
        0 => "expected the name of a model, found nothing".to_owned(),
        1..=NAME_BYTES_MAX => return Ok(ModelName::new(name)),
        len => format!("expected a name of {NAME_BYTES_MAX} bytes at most, found {len}"),
    };
    Err(Problem::of(column, problem))
}

// --- Activity

/// A finished request: a row of the store, or of `GET /api/metrics`.
#[derive(Deserialize)]
struct Row {
    model: Option<String>,
    duration_ms: Option<u64>,
    /// From the arrival to the start of service.
    queue_ms: Option<u64>,
    /// In the store.
    arrived_unix_ms: Option<u64>,
    status: Option<u16>,
    /// In answers: of the request's end.
    timestamp: Option<String>,
    resp_status_code: Option<u16>,
}

fn array(text: &str, found: &mut Found) -> Result<(), Problem> {
    let rows: Vec<&RawValue> = serde_json::from_str(text).map_err(|error| not_json(&error, 1))?;
    let (mut line, mut seen) = (1, 0);
    for row in rows {
        // It borrows from the text: where it lies there is how far it is.
        let start = row.get().as_ptr() as usize - text.as_ptr() as usize;
        line += newlines(&text.as_bytes()[seen..start]);
        seen = start;
        activity(row.get(), line, found)?;
    }
    Ok(())
}

fn lines(text: &str, found: &mut Found) -> Result<(), Problem> {
    for (row, line) in text.lines().zip(1..).filter(|(row, _)| !row.trim().is_empty()) {
        activity(row, line, found)?;
    }
    Ok(())
}

fn activity(row: &str, line: usize, found: &mut Found) -> Result<(), Problem> {
    let row: Row = serde_json::from_str(row).map_err(|error| not_json(&error, line))?;
    let pushed = served(row).and_then(|arrival| match arrival {
        Some(arrival) => found.push(arrival),
        None => Ok(()),
    });
    pushed.map_err(|problem| problem.at(line))
}

fn not_json(error: &serde_json::Error, line: usize) -> Problem {
    // Its own position counts from where it began to read, and is in its message too.
    let text = error.to_string();
    let what = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
    let line = line + error.line().saturating_sub(1);
    Problem::new(format!("expected rows of activity in JSON: {what} (byte {})", error.column()))
        .at(line)
}

/// `None`: it never was.
fn served(row: Row) -> Result<Option<Arrival>, Problem> {
    let missing = |key, what: &str| Problem::of(key, format!("expected {what}, found nothing"));
    let (status_key, status) = match row.resp_status_code {
        Some(status) => ("resp_status_code", Some(status)),
        None => ("status", row.status),
    };
    let status = status.ok_or_else(|| missing(status_key, "the status of the answer"))?;
    let model = row.model.ok_or_else(|| missing("model", "the name of a model"))?;
    if model.is_empty() || status >= 400 {
        return Ok(None);
    }
    let took = row.duration_ms.ok_or_else(|| missing("duration_ms", "milliseconds"))?;
    let queued = row.queue_ms.ok_or_else(|| missing("queue_ms", "milliseconds"))?;
    let Some(service) = took.checked_sub(queued) else {
        let problem = format!("expected duration_ms ({took}) at most, found {queued}");
        return Err(Problem::of("queue_ms", problem));
    };
    let service = milliseconds("duration_ms", service, SERVICE_S_MAX)?;
    let (key, at) = match (row.arrived_unix_ms, row.timestamp) {
        (Some(at), _) => ("arrived_unix_ms", at),
        (None, Some(ended)) => {
            let key = "timestamp";
            let at =
                unix_ms(&ended).and_then(|ended| ended.checked_sub(took)).ok_or_else(|| {
                    let found = shown(&ended);
                    Problem::of(
                        key,
                        format!("expected a time as 2026-01-31T12:00:00Z, found {found}"),
                    )
                })?;
            (key, at)
        }
        (None, None) => return Err(missing("timestamp", "the time of the request's end")),
    };
    let at = Time::ZERO + milliseconds(key, at, ARRIVAL_S_MAX)?;
    Ok(Some(Arrival { at, model: model_name("model", &model)?, service }))
}

fn unix_ms(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(text).ok()?;
    u64::try_from(time.duration_since(UNIX_EPOCH).ok()?.as_millis()).ok()
}

// --- Words

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

fn line_of(bytes: &[u8], at: usize) -> usize {
    1 + newlines(&bytes[..at])
}

fn shown(text: &str) -> String {
    if text.is_empty() {
        return "nothing".to_owned();
    }
    let cut: String = text.chars().take(SHOWN_MAX).collect();
    let more = if cut.len() < text.len() { "…" } else { "" };
    format!("{cut:?}{more}")
}

#[cfg(test)]
mod tests;
