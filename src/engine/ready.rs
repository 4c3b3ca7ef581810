//! Waiting until an engine serves, watching everything that can tell that it will not.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Instant, sleep_until, timeout};

use super::log_lines::{Cause, Meaning, meaning};
use super::pace::{sleep_finely, until_next_look};
use super::probe::{self, Answer};
use super::{LOG_TAIL_LINES, ended, fault};
use crate::config::catalog::ModelSpec;
use crate::runtime::{ExitReport, Progress, Running};
use crate::scheduler::event::{Fault, FaultKind};

/// The log may arrive a little after the end it explains.
const LOG_QUIET: Duration = Duration::from_millis(250);
const LOG_WAIT_MAX: Duration = Duration::from_secs(2);
const LINE_CHARS_MAX: usize = 300;
/// A log that calls more often than this is asked at its usual pace.
const CALLS_MAX: u32 = 16;
/// "Still loading", as llama-server says it.
const LOADING: u16 = 503;

pub async fn wait_ready(
    spec: &ModelSpec,
    running: &Running,
    progress: &Progress,
    deadline: Instant,
) -> Result<(), Fault> {
    let (history, mut live) = running.log.follow();
    let mut unfinished = running.log.unfinished();
    let mut start = Start::new(spec, running, progress);
    for line in &history {
        start.line(line);
    }
    let mut question = start.ask();
    let mut log_open = true;
    let mut ended = std::pin::pin!(ended(running));
    // In this order: a flood of log lines may hide neither the end nor the deadline.
    loop {
        // An engine that was adopted may have survived what its log holds: it is asked first.
        if start.fatal.is_some() && start.answer.is_some() {
            start.rest_of_log(&mut live).await;
            return Err(start.fatal_fault());
        }
        tokio::select! {
            biased;
            report = &mut ended => {
                start.rest_of_log(&mut live).await;
                return Err(start.exited(&report));
            }
            () = sleep_until(deadline) => return Err(start.too_slow(FaultKind::TimedOut)),
            answer = &mut question => {
                if start.answered(answer)? {
                    running.log.engine_serves();
                    return Ok(());
                }
                question = start.ask();
            }
            line = live.recv(), if log_open => match line {
                Ok(line) => {
                    if start.line(&line) {
                        question = start.ask();
                    }
                }
                // Lines were skipped: there were some.
                Err(RecvError::Lagged(_)) => start.changed(),
                Err(RecvError::Closed) => log_open = false,
            },
            Ok(()) = unfinished.changed() => {
                let line = Arc::clone(&unfinished.borrow_and_update());
                start.unfinished(&line);
            }
            () = sleep_until(start.stalled_at()) => {
                return Err(start.too_slow(FaultKind::Stalled));
            }
        }
    }
}

/// What is known of a start so far.
struct Start<'a> {
    spec: &'a ModelSpec,
    running: &'a Running,
    progress: &'a Progress,
    began: Instant,
    /// Since when nothing changed.
    quiet_since: Instant,
    /// Since when it is asked densely: from the start, and again when something happened.
    asked_since: Instant,
    /// Its log says that it listens: asked without a pause.
    called: bool,
    calls: u32,
    answer: Option<Answer>,
    /// The listener was seen to be ours.
    trusted: bool,
    phase: Option<&'static str>,
    fatal: Option<(Cause, String)>,
    /// The first line that would explain a failure.
    hint: Option<(Cause, String)>,
}

impl<'a> Start<'a> {
    fn new(spec: &'a ModelSpec, running: &'a Running, progress: &'a Progress) -> Start<'a> {
        let now = Instant::now();
        Start {
            spec,
            running,
            progress,
            began: now,
            quiet_since: now,
            asked_since: now,
            called: false,
            calls: 0,
            answer: None,
            trusted: false,
            phase: None,
            fatal: None,
            hint: None,
        }
    }

    fn changed(&mut self) {
        self.quiet_since = Instant::now();
    }

    fn stalled_at(&self) -> Instant {
        self.quiet_since + self.spec.health.stall
    }

    fn ask(&mut self) -> BoxFuture<'a, Answer> {
        let (spec, running, trusted) = (self.spec, self.running, self.trusted);
        let pause = self.pause();
        Box::pin(async move {
            if let Some(pause) = pause {
                sleep_finely(pause).await;
            }
            probe::ask(spec, running, trusted).await
        })
    }

    /// Before the next question.
    fn pause(&mut self) -> Option<Duration> {
        let pause = until_next_look(self.asked_since.elapsed());
        (!std::mem::take(&mut self.called)).then_some(pause)
    }

    /// True: the engine is ready.
    fn answered(&mut self, answer: Answer) -> Result<bool, Fault> {
        let fault = |kind, text: &str| Err(fault(self.spec, self.running, kind, text));
        match &answer {
            Answer::Ready => return Ok(true),
            Answer::Status { .. } => self.trusted = true,
            Answer::Silent(_) => {}
            Answer::BadUrl(why) => return fault(FaultKind::BadSpec, why),
            Answer::Stranger(who) => {
                let port = self.running.identity.port;
                let text = |who: &str| {
                    format!(
                        "port {port} answers, but it is {who} that listens there, not this \
                         engine: end that program, or choose other `engine_ports:`"
                    )
                };
                let public = format!("model {}: {}", self.spec.name, text("another program"));
                return fault(FaultKind::StrangerOnPort, &text(who))
                    .map_err(|fault| fault.or_publicly(public));
            }
            Answer::OtherNames(names) => {
                let text = format!(
                    "the engine serves {} but not `{}`: remove --served-model-name from its \
                     arguments, or set `upstream_name:`",
                    quoted(names),
                    self.spec.served_name()
                );
                return fault(FaultKind::BadSpec, &text);
            }
        }
        let same = self.answer.as_ref().is_some_and(|before| is_same(before, &answer));
        if !same {
            self.asked_since = Instant::now();
            // The first answer is no change.
            if self.answer.is_some() {
                self.changed();
            }
        }
        self.answer = Some(answer);
        Ok(false)
    }

    /// True: worth asking at once.
    fn line(&mut self, line: &Arc<str>) -> bool {
        self.changed();
        let shown = || line.trim().chars().take(LINE_CHARS_MAX).collect::<String>();
        match meaning(self.spec.engine, line) {
            None => {}
            Some(Meaning::Phase(stage, fraction)) => {
                self.phase = Some(stage);
                self.progress.set(stage, fraction, "");
            }
            Some(Meaning::Ready) if self.calls < CALLS_MAX => {
                (self.asked_since, self.called) = (Instant::now(), true);
                self.calls += 1;
                return true;
            }
            Some(Meaning::Ready) => {}
            Some(Meaning::Fatal(cause)) => {
                self.fatal.get_or_insert_with(|| (cause, shown()));
            }
            Some(Meaning::Hint(cause)) => {
                self.hint.get_or_insert_with(|| (cause, shown()));
            }
        }
        false
    }

    /// A line that grows is a sign of life, and may tell how far it is (a dot for each percent).
    /// For anything else its end is awaited.
    fn unfinished(&mut self, line: &str) {
        self.changed();
        if let Some(Meaning::Phase(stage, fraction)) = meaning(self.spec.engine, line) {
            self.phase = Some(stage);
            self.progress.set(stage, fraction, "");
        }
    }

    async fn rest_of_log(&mut self, live: &mut broadcast::Receiver<Arc<str>>) {
        let until = Instant::now() + LOG_WAIT_MAX;
        while Instant::now() < until {
            match timeout(LOG_QUIET, live.recv()).await {
                Ok(Ok(line)) => {
                    self.line(&line);
                }
                Ok(Err(RecvError::Lagged(_))) => {}
                Ok(Err(RecvError::Closed)) | Err(_) => return,
            }
        }
    }

    /// The line that explains a failure best: an earlier hint outranks a mere consequence.
    fn cause(&self) -> Option<&(Cause, String)> {
        match (&self.fatal, &self.hint) {
            (Some((cause, _)), Some(hint)) if cause.kind == FaultKind::FatalLogLine => Some(hint),
            (fatal, hint) => fatal.as_ref().or(hint.as_ref()),
        }
    }

    fn during(&self) -> String {
        self.phase.map_or_else(|| "while starting".to_owned(), |phase| format!("in phase {phase}"))
    }

    fn fatal_fault(&self) -> Fault {
        let Some((cause, line)) = self.cause() else {
            return self.exited(&ExitReport { code: None, signal: None, oom_killed: false });
        };
        let text = format!("the engine failed {}: `{line}`; {}", self.during(), cause.fix);
        fault(self.spec, self.running, cause.kind, &text)
    }

    fn exited(&self, report: &ExitReport) -> Fault {
        let during = self.during();
        if report.oom_killed {
            let text = format!("{report} {during}: give it more memory, or free some");
            return fault(self.spec, self.running, FaultKind::OutOfMemory, &text);
        }
        if let Some((cause, line)) = self.cause() {
            let text = format!("the engine {report} {during}: `{line}`; {}", cause.fix);
            return fault(self.spec, self.running, cause.kind, &text);
        }
        let lines = self.running.log.last(LOG_TAIL_LINES);
        let last = lines.iter().rev().find(|line| !line.trim().is_empty());
        let last = match last {
            Some(line) => {
                let line: String = line.trim().chars().take(LINE_CHARS_MAX).collect();
                format!("its last line: `{line}`")
            }
            None => "it wrote nothing to its log".to_owned(),
        };
        let text = format!("the engine {report} {during}; {last}");
        // Not a line of which the meaning is known: it may say anything.
        let public = format!(
            "model {}: the engine {report} {during}; its log says why (for keys with `read`)",
            self.spec.name
        );
        fault(self.spec, self.running, FaultKind::Exited, &text).or_publicly(public)
    }

    /// Stalled or past the deadline; but an engine that answers something wrong is named so.
    fn too_slow(&self, kind: FaultKind) -> Fault {
        let path = self.spec.health.path.as_deref().unwrap_or("its port");
        let waited = match kind {
            FaultKind::Stalled => format!(
                "no log line and no change for {}",
                humantime::format_duration(self.spec.health.stall)
            ),
            _ => format!("after {:.1} s (start_timeout)", self.began.elapsed().as_secs_f64()),
        };
        if let Some(Answer::Status { code, excerpt }) = &self.answer
            && *code != LOADING
        {
            let text = format!(
                "the engine answers {path} with {excerpt} and never with 200 ({waited}): correct \
                 `health: {{path}}`, or see the engine's log"
            );
            return fault(self.spec, self.running, FaultKind::NeverHealthy, &text);
        }
        let answer = match &self.answer {
            Some(Answer::Status { excerpt, .. }) => format!("{path} answers {excerpt}"),
            Some(Answer::Silent(why)) => format!("{path} of {}: {why}", self.running.endpoint.base),
            _ => "it was not reached".to_owned(),
        };
        let what = match kind {
            FaultKind::Stalled => "the start stalled",
            _ => "not ready in time",
        };
        let hint = match &self.hint {
            Some((cause, line)) => format!("; perhaps `{line}`: {}", cause.fix),
            None => String::new(),
        };
        let text = format!("{what}, {}: {waited}; {answer}{hint}", self.during());
        fault(self.spec, self.running, kind, &text)
    }
}

/// Bodies may hold a clock; the kind of answer is what counts.
fn is_same(one: &Answer, other: &Answer) -> bool {
    match (one, other) {
        (Answer::Status { code: one, .. }, Answer::Status { code: other, .. }) => one == other,
        // The kernel has several words for it.
        (Answer::Silent(_), Answer::Silent(_)) => true,
        (one, other) => one == other,
    }
}

fn quoted(names: &[String]) -> String {
    match names {
        [] => "no model".to_owned(),
        names => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::watch;

    use super::*;
    use crate::config::catalog::EngineKind;
    use crate::runtime::{Endpoint, Identity, LogTail, RuntimeHandle};
    use crate::units::{InstanceId, ModelName};

    fn running() -> Running {
        Running {
            identity: Identity {
                installation: "test".to_owned(),
                instance: InstanceId(1),
                model: ModelName::new("a"),
                spec_hash: String::new(),
                gpus: Vec::new(),
                port: 1,
            },
            endpoint: Endpoint::new("http://127.0.0.1:1", None),
            handle: RuntimeHandle::External,
            log: LogTail::new(),
            exit: watch::channel(None).1,
        }
    }

    #[test]
    fn an_engine_whose_log_says_that_it_listens_is_asked_at_once() {
        let (spec, running) = (ModelSpec::plain("a"), running());
        let spec = ModelSpec { engine: EngineKind::Llamacpp, ..spec };
        let (progress, _) = Progress::new();
        let mut start = Start::new(&spec, &running, &progress);
        start.asked_since -= Duration::from_secs(60);
        assert_eq!(start.pause(), Some(Duration::from_millis(100)));
        assert!(!start.line(&Arc::from("llama_context: n_ctx = 4096")));
        assert_eq!(start.pause(), Some(Duration::from_millis(100)), "no news of that kind");
        assert!(start.line(&Arc::from("main: server is listening on http://127.0.0.1:1")));
        assert_eq!(start.pause(), None);
        assert!(start.asked_since.elapsed() < Duration::from_secs(60), "and densely after that");
        let calls = (0..1000).filter(|_| start.line(&Arc::from("model loaded"))).count();
        assert!(calls < 20, "a log that cries wolf is asked at the usual pace: {calls}");
    }
}
