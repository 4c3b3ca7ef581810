//! Keeps secrets out of messages: source lines are shown, the values of keys and tokens are not.

const MASK: &str = "***";

/// Shorter texts would garble messages wherever they turn up by chance.
const MIN_REDACTED: usize = 4;

/// Words at whose end a name counts as the name of a secret.
const SECRET_WORDS: [&str; 8] =
    ["key", "token", "secret", "password", "passwd", "authorization", "credential", "credentials"];

/// Whether a key, variable or flag of this name holds a secret: `key`, `api_key`, `HF_TOKEN`,
/// `--api-key`, `dbPassword`.
pub(crate) fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| name.ends_with(word))
}

/// A source line as it may be shown.
pub(super) struct MaskedLine {
    pub text: String,
    /// Column in the original → column in `text`, both from 0, in characters.
    columns: Vec<usize>,
}

/// Line `index` as it may be shown; empty if it may not be shown at all, because the key above,
/// to which it belongs, names a secret (a block of text, or a list).
pub(super) fn shown_line(lines: &[&str], index: usize, secrets: &[String]) -> MaskedLine {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let line = lines.get(index).copied().unwrap_or_default();
    let owner = lines[..index.min(lines.len())]
        .iter()
        .rev()
        .find(|above| !above.trim().is_empty() && indent(above) < indent(line))
        .and_then(|above| above.trim().trim_start_matches("- ").split_once(':'));
    if owner.is_some_and(|(name, _)| is_secret_name(name.trim())) {
        return MaskedLine { text: String::new(), columns: Vec::new() };
    }
    mask_line(line, secrets)
}

impl MaskedLine {
    pub(super) fn column_of(&self, original: usize) -> usize {
        match self.columns.get(original) {
            Some(column) => *column,
            None => self.columns.last().map_or(original, |last| last + 1),
        }
    }
}

/// Masks known secrets, and what follows the name of a secret. The latter works on text, so that it also holds for files that
/// are no YAML at all; `${…}` stays, because it names the secret without giving it away.
fn mask_line(line: &str, secrets: &[String]) -> MaskedLine {
    let chars: Vec<char> = line.trim_end_matches(['\r', '\n']).chars().collect();
    let mut masked = MaskedLine { text: String::new(), columns: Vec::new() };
    let mut width = 0;
    let mut at = 0;
    while at < chars.len() {
        if let Some((value, end)) = known_at(&chars, at, secrets).or_else(|| secret_at(&chars, at))
        {
            for c in &chars[at..value] {
                masked.columns.push(width);
                masked.text.push(*c);
                width += 1;
            }
            masked.columns.extend(std::iter::repeat_n(width, end - value));
            masked.text.push_str(MASK);
            width += MASK.len();
            at = end;
            continue;
        }
        let c = if chars[at].is_control() { ' ' } else { chars[at] };
        masked.columns.push(width);
        masked.text.push(c);
        width += 1;
        at += 1;
    }
    masked
}

/// If a known secret begins at `at`: where it begins and ends.
fn known_at(chars: &[char], at: usize, secrets: &[String]) -> Option<(usize, usize)> {
    secrets.iter().filter(|secret| secret.len() >= MIN_REDACTED).find_map(|secret| {
        let len = secret.chars().count();
        let here = chars.get(at..at + len)?;
        secret.chars().eq(here.iter().copied()).then_some((at, at + len))
    })
}

/// If the name of a secret begins at `at`: where its value begins and ends.
fn secret_at(chars: &[char], at: usize) -> Option<(usize, usize)> {
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !is_name(chars[at]) || at > 0 && is_name(chars[at - 1]) {
        return None;
    }
    let rest = |from: usize, stop: &dyn Fn(char) -> bool| {
        chars[from..].iter().position(|c| stop(*c)).map_or(chars.len(), |n| from + n)
    };
    let name_end = rest(at, &|c| !is_name(c));
    let name: String = chars[at..name_end].iter().collect();
    if !is_secret_name(&name) {
        return None;
    }
    let value = rest(name_end, &|c| !matches!(c, ' ' | '\t' | ':' | '=' | ',' | '"' | '\''));
    if value == name_end || value >= chars.len() || matches!(chars[value], '$' | '#') {
        return None;
    }
    if matches!(chars[value], '[' | '{' | '|' | '>') {
        return Some((value, chars.len()));
    }
    let quote = chars[name_end..value].iter().rev().find(|c| matches!(c, '"' | '\'')).copied();
    let end = match quote.filter(|q| chars[value - 1] == *q) {
        Some(quote) => rest(value, &|c| c == quote),
        None => rest(value, &|c| matches!(c, ' ' | ',' | '}' | ']' | '"' | '\'')),
    };
    (end > value).then_some((value, end))
}

/// Replaces every known secret in `text`.
pub(super) fn redact(text: &mut String, secrets: &[String]) {
    for secret in secrets.iter().filter(|secret| secret.len() >= MIN_REDACTED) {
        if text.contains(secret.as_str()) {
            *text = text.replace(secret.as_str(), MASK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(line: &str) -> String {
        mask_line(line, &[]).text
    }

    #[test]
    fn values_of_secrets_disappear() {
        assert_eq!(
            masked("    - { name: a, key: s3cret, models: [x] }"),
            "    - { name: a, key: ***, models: [x] }"
        );
        assert_eq!(masked("api_key: \"two words\" # note"), "api_key: \"***\" # note");
        assert_eq!(masked("- HF_TOKEN=hf_abc"), "- HF_TOKEN=***");
        assert_eq!(
            masked("args: [--api-key, abc, --port, 1]"),
            "args: [--api-key, ***, --port, 1]"
        );
        assert_eq!(
            masked("cmd: serve --api-key abc --port 1"),
            "cmd: serve --api-key *** --port 1"
        );
    }

    #[test]
    fn other_lines_stay_as_they_are() {
        for line in
            ["key: ${env.WHARF_KEY}", "max_tokens: 5", "  imgae: x", "keys:", "tokenizer: a"]
        {
            assert_eq!(masked(line), line);
        }
    }

    #[test]
    fn lines_that_belong_to_a_secret_are_not_shown() {
        let lines = ["auth:", "  key: |", "    first", "", "    second", "  name: a"];
        let shown = |index| shown_line(&lines, index, &[]).text;
        assert_eq!((shown(2).as_str(), shown(4).as_str()), ("", ""));
        assert_eq!((shown(0).as_str(), shown(5).as_str()), ("auth:", "  name: a"));
        assert_eq!(shown_line(&["a: pa55word"], 0, &["pa55word".to_owned()]).text, "a: ***");
    }

    #[test]
    fn columns_behind_a_mask_move_with_it() {
        let line = mask_line("{ key: abcdefgh, x: 1 }", &[]);
        assert_eq!(line.text, "{ key: ***, x: 1 }");
        assert_eq!(line.column_of(17), 12);
    }
}
