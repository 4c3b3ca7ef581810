//! What is wrong with a configuration, where, and what to do about it; rendered for people.

use std::fmt;

use serde::Serialize;

use super::secrets;

/// A stretch of the file: line and column count from 1, in characters. Line 0: not in the file
/// (an environment variable, or the file itself).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Place {
    pub line: u32,
    pub column: u32,
    #[serde(skip)]
    pub width: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub severity: Severity,
    #[serde(flatten)]
    pub place: Place,
    /// The key's path: `models.mistral.docker.imgae`.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What was expected, or the nearest valid name: shown at the place itself.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub expected: String,
    /// How to mend it, where that takes a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The source line, secrets masked; empty if there is none to show.
    #[serde(skip)]
    pub source: String,
    /// The columns of `source` that are meant, from 0.
    #[serde(skip)]
    pub shown: (usize, usize),
}

impl Problem {
    /// A problem without a place in the file.
    /// Of what a key names, not of the text of the file.
    pub fn warning(path: &str, message: String) -> Problem {
        Problem::outside(Severity::Warning, path, message, "")
    }

    pub fn error(path: &str, message: String) -> Problem {
        Problem::outside(Severity::Error, path, message, "")
    }

    pub(super) fn outside(severity: Severity, path: &str, message: String, help: &str) -> Problem {
        Problem {
            severity,
            place: Place::default(),
            path: path.to_owned(),
            message,
            expected: String::new(),
            help: Some(help.to_owned()).filter(|h| !h.is_empty()),
            source: String::new(),
            shown: (0, 0),
        }
    }

    /// Without its source line.
    pub fn in_a_line(&self) -> String {
        let parts = [Some(&self.expected).filter(|text| !text.is_empty()), self.help.as_ref()];
        parts
            .into_iter()
            .flatten()
            .fold(self.message.clone(), |line, part| format!("{line}; {part}"))
    }

    /// Attaches the source line and hides secrets everywhere.
    pub(super) fn finish(&mut self, lines: &[&str], known: &[String]) {
        let texts = [&mut self.message, &mut self.expected, &mut self.path];
        for text in texts.into_iter().chain(self.help.as_mut()) {
            secrets::redact(text, known);
        }
        let Place { line, column, width } = self.place;
        let Some(index) = (line as usize).checked_sub(1) else { return };
        let shown = secrets::shown_line(lines, index, known);
        let start = (column as usize).saturating_sub(1);
        self.shown = (shown.column_of(start), shown.column_of(start + width as usize));
        self.source = shown.text;
    }

    /// Writes the problem with its source line, as compilers do.
    pub fn render(&self, file: &str, out: &mut impl fmt::Write) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        writeln!(out, "{severity}: {}", self.message)?;
        let Place { line, column, .. } = self.place;
        let margin = line.to_string().len().max(1);
        if line == 0 {
            if !self.path.is_empty() {
                writeln!(out, "{:margin$}--> {}", "", self.path)?;
            }
        } else {
            let gap = if self.path.is_empty() { "" } else { "  " };
            writeln!(out, "{:margin$}--> {file}:{line}:{column}{gap}{}", "", self.path)?;
            self.render_source(margin, out)?;
        }
        if let Some(help) = &self.help {
            writeln!(out, "{:margin$} = help: {help}", "")?;
        }
        Ok(())
    }

    fn render_source(&self, margin: usize, out: &mut impl fmt::Write) -> fmt::Result {
        let line = self.place.line;
        if self.source.is_empty() {
            if !self.expected.is_empty() {
                writeln!(out, "{:margin$} = {}", "", self.expected)?;
            }
            return Ok(());
        }
        let (text, start, end) = window(&self.source, self.shown.0, self.shown.1);
        let carets = "^".repeat(end.saturating_sub(start).max(1));
        let expected =
            if self.expected.is_empty() { String::new() } else { format!(" {}", self.expected) };
        writeln!(out, "{:margin$} |", "")?;
        writeln!(out, "{line} | {text}")?;
        writeln!(out, "{:margin$} | {:start$}{carets}{expected}", "", "")
    }
}

/// Cuts a long line down to the part around the carets, and the carets to the line.
fn window(text: &str, start: usize, end: usize) -> (String, usize, usize) {
    const WIDTH: usize = 100;
    let chars: Vec<char> = text.chars().collect();
    let end = end.min(chars.len()).max(start);
    if chars.len() <= WIDTH {
        return (text.to_owned(), start, end);
    }
    let from = start.saturating_sub(WIDTH / 3).min(chars.len());
    let to = (from + WIDTH).min(chars.len());
    let head = if from > 0 { "…" } else { "" };
    let tail = if to < chars.len() { "…" } else { "" };
    let part: String = chars[from..to].iter().collect();
    let shift = |at: usize| at.clamp(from, to) - from + head.chars().count();
    (format!("{head}{part}{tail}"), shift(start), shift(end))
}

/// Why a configuration cannot be used. `Display` shows every problem with its source line.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConfigErrors {
    #[error("error: cannot read {file}: {reason}")]
    Unreadable { file: String, reason: String },
    #[error("{}", Report { file, problems })]
    Invalid { file: String, problems: Vec<Problem> },
}

impl ConfigErrors {
    /// All problems, errors and warnings, in the order of the file; none if it was not read.
    pub fn problems(&self) -> &[Problem] {
        match self {
            ConfigErrors::Unreadable { .. } => &[],
            ConfigErrors::Invalid { problems, .. } => problems,
        }
    }
}

/// Shows problems one after the other, then how many there are.
pub struct Report<'a> {
    pub file: &'a str,
    pub problems: &'a [Problem],
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in self.problems {
            problem.render(self.file, f)?;
            writeln!(f)?;
        }
        let count = |severity| self.problems.iter().filter(|p| p.severity == severity).count();
        let plural = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
        let parts: Vec<String> =
            [(count(Severity::Error), "error"), (count(Severity::Warning), "warning")]
                .into_iter()
                .filter(|(n, _)| *n > 0)
                .map(|(n, word)| plural(n, word))
                .collect();
        write!(f, "{} in {}", parts.join(", "), self.file)
    }
}

/// The candidate that a person most likely meant, if one is near enough.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |s: &str| -> String {
        s.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).flat_map(char::to_lowercase).collect()
    };
    let wanted = plain(word);
    // One slip for short words, a third of the letters for long ones.
    let bound = (wanted.chars().count() / 3).clamp(1, 4);
    let steps = |candidate: &str| {
        let candidate = plain(candidate);
        let cut_short = wanted.len() > 2 && candidate.starts_with(&wanted);
        let steps = distance(&wanted, &candidate);
        let near = steps <= bound && steps < candidate.chars().count();
        (near || cut_short).then_some(if cut_short { 1.min(steps) } else { steps })
    };
    candidates
        .into_iter()
        .filter_map(|candidate| Some((steps(candidate)?, candidate)))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edits (insert, delete, replace, swap of neighbours) from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) =
        (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    rows[0] = (0..=b.len()).collect();
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_pen_find_their_word() {
        let keys = ["image", "args", "env", "volumes", "start_timeout"];
        assert_eq!(nearest("imgae", keys), Some("image"));
        assert_eq!(nearest("volume", keys), Some("volumes"));
        assert_eq!(nearest("startTimeout", keys), Some("start_timeout"));
        assert_eq!(nearest("arg", keys), Some("args"));
        assert_eq!(nearest("temperature", keys), None);
        assert_eq!(nearest("", keys), None);
    }

    #[test]
    fn long_lines_are_cut_around_the_carets() {
        let line = "x".repeat(500);
        let (text, start, end) = window(&line, 300, 310);
        assert!(text.chars().count() <= 102);
        assert_eq!(end - start, 10);
        assert!(start < 100);
    }
}
