//! The requests of whoever tries the demo, read from the server's log: when each came, what it
//! waits for, and who answered it. The demo's own carry an id of their own and are left out.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use serde_json::Value;

use super::talk::OWN_ID;

/// What the server must log for this.
pub const LOG_FILTER: &str = "info,wharf::gateway::account=debug";

/// Read at once; more is read at the next look.
const BYTES_MAX: u64 = 64 << 10;
/// Lines told at one look; the rest are counted.
const LINES_MAX: usize = 8;
/// Requests whose wait is followed.
const FOLLOWED_MAX: usize = 64;

#[derive(Debug)]
pub struct Guests {
    log: PathBuf,
    read: u64,
    /// Not answered yet and not told what they wait for, by id: the model.
    new: BTreeMap<String, String>,
}

impl Guests {
    pub fn new(log: PathBuf) -> Guests {
        Guests { log, read: 0, new: BTreeMap::new() }
    }

    /// What happened since the last look. `status`: the orchestrator's, for what is waited for.
    pub fn news(&mut self, status: &Value) -> Vec<String> {
        let text = self.appended().unwrap_or_default();
        let mut lines: Vec<String> = text.lines().filter_map(|line| self.told(line)).collect();
        let mut waits = Vec::new();
        self.new.retain(|_, model| {
            let why = status["models"][model.as_str()]["waiting_for"].as_str().unwrap_or_default();
            if !why.is_empty() {
                waits.push(format!("your request for {model} waits: {why}"));
            }
            why.is_empty()
        });
        lines.append(&mut waits);
        if lines.len() > LINES_MAX {
            let more = lines.len() - LINES_MAX;
            lines.truncate(LINES_MAX);
            lines.push(format!("… and {more} more lines about your requests"));
        }
        lines
    }

    /// Whole lines that the log has gained.
    fn appended(&mut self) -> std::io::Result<String> {
        let mut file = File::open(&self.log)?;
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        file.take(BYTES_MAX).read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        self.read += whole as u64;
        Ok(String::from_utf8_lossy(&bytes[..whole]).into_owned())
    }

    fn told(&mut self, line: &str) -> Option<String> {
        let (_, said) = line.split_once(" DEBUG request ")?;
        let field = |name: &str| {
            let value = said.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_default().trim_matches('"')
        };
        let (request, model) = (field("request"), field("model"));
        if request == OWN_ID {
            return None;
        }
        match said.split(' ').next()? {
            "arrived" => {
                if self.new.len() < FOLLOWED_MAX {
                    self.new.insert(request.to_owned(), model.to_owned());
                }
                Some(format!("→ your request for {model} arrives"))
            }
            "ended" => {
                self.new.remove(request);
                let took = field("seconds").parse::<f64>().unwrap_or_default();
                Some(match field("outcome") {
                    "ok" => format!("your request for {model}: answered by {model} in {took:.2} s"),
                    "client_gone" => {
                        format!("your request for {model}: its client left after {took:.2} s")
                    }
                    other => format!("your request for {model}: {other} after {took:.2} s"),
                })
            }
            "refused" => Some(format!("your request was refused: {}", field("code"))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde_json::json;

    use super::*;

    fn log(guests: &Guests, text: &str) {
        let mut file = File::options().create(true).append(true).open(&guests.log).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_request_is_told_from_its_arrival_to_its_answer() {
        let dir = tempfile::tempdir().unwrap();
        let mut guests = Guests::new(dir.path().join("wharf.log"));
        assert!(guests.news(&Value::Null).is_empty(), "no log yet");
        let at = "2026-01-01T00:00:00.000000Z DEBUG request ";
        log(
            &guests,
            &format!(
                "{at}arrived request=wharf-demo model=llava\n{at}arrived request=r-1 model=org/coder:7b\n{at}end"
            ),
        );
        let waits = json!({"models": {"org/coder:7b": {"waiting_for": "room: mistral is busy"}}});
        assert_eq!(
            guests.news(&waits),
            [
                "→ your request for org/coder:7b arrives",
                "your request for org/coder:7b waits: room: mistral is busy"
            ]
        );
        assert!(guests.news(&waits).is_empty(), "told once, and half a line is none");
        log(
            &guests,
            &format!(
                "ed request=\"r-1\" model=org/coder:7b outcome=\"ok\" seconds=4.5678\n{at}refused request=\"r-2\" code=\"model_not_found\"\n"
            ),
        );
        assert_eq!(
            guests.news(&waits),
            [
                "your request for org/coder:7b: answered by org/coder:7b in 4.57 s",
                "your request was refused: model_not_found"
            ]
        );
        for n in 0..20 {
            log(&guests, &format!("{at}arrived request=r{n} model=a\n"));
        }
        let many = guests.news(&Value::Null);
        assert_eq!(many.len(), LINES_MAX + 1);
        assert_eq!(many[LINES_MAX], "… and 12 more lines about your requests");
    }
}
