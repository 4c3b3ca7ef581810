//! Keeps secrets out of what engines write: applied to every line before it is kept or passed on,
//! so that faults, the journal, `/status` and log streams are built from clean text.
//!
//! Two nets: values that are known (the instance's key, variables with telling names), and texts
//! that look like a secret. What belongs to a tokenizer (`eos_token`, `max_tokens`) is let through.

use std::borrow::Cow;

use super::EngineKey;

const MASK: &str = "***";
/// Shorter values would garble lines wherever they turn up by chance.
const KNOWN_CHARS_MIN: usize = 6;
/// Of what follows `hf_`, `sk-`, `Bearer `.
const TOKEN_CHARS_MIN: usize = 6;
/// Of the value behind a name such as `x_token`, which may be a tokenizer's.
const VALUE_CHARS_MIN: usize = 8;
/// Of the value behind a plain `token`.
const BARE_CHARS_MIN: usize = 16;

const ENV_WORDS: [&str; 6] = ["KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL"];
/// Ends of names whose value is a secret, whatever it looks like.
const NAMES: [&str; 9] = [
    "api_key",
    "api_keys",
    "apikey",
    "access_key",
    "secret_key",
    "secret",
    "password",
    "passwd",
    "authorization",
];
const PREFIXES: [&str; 5] = ["hf_", "sk-", "nvapi-", "ghp_", "glpat-"];
const NO_SECRET: [&str; 6] = ["none", "null", "true", "false", "auto", "unset"];

/// Values that must not be shown. No `Debug`.
#[derive(Clone, Default)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// Of an engine's environment: the values of variables whose names tell that they are secret.
    pub fn of_env<'a>(env: impl IntoIterator<Item = (&'a str, &'a str)>) -> Secrets {
        let mut secrets = Secrets::default();
        for (_, value) in env.into_iter().filter(|(name, _)| is_secret_variable(name)) {
            secrets.add(value);
        }
        secrets
    }

    #[must_use]
    pub fn and(mut self, key: Option<EngineKey>) -> Secrets {
        if let Some(key) = key {
            self.add(key.expose());
        }
        self
    }

    fn add(&mut self, value: &str) {
        let value = value.trim();
        let telling = value.chars().count() >= KNOWN_CHARS_MIN
            && !value.chars().all(|c| c.is_ascii_digit())
            && !is_no_secret(value);
        if telling && !self.0.iter().any(|known| known == value) {
            self.0.push(value.to_owned());
            // One may be a part of another.
            self.0.sort_by_key(|known| std::cmp::Reverse(known.len()));
        }
    }

    /// The line as it may be kept.
    pub fn redact<'a>(&self, line: &'a str) -> Cow<'a, str> {
        let mut line = Cow::Borrowed(line);
        for secret in &self.0 {
            if line.contains(secret.as_str()) {
                line = Cow::Owned(line.replace(secret.as_str(), MASK));
            }
        }
        match patterns(&line) {
            Some(masked) => Cow::Owned(masked),
            None => line,
        }
    }
}

fn is_secret_variable(name: &str) -> bool {
    let name = name.to_ascii_uppercase().replace("TOKENIZER", "").replace("TOKENS", "");
    ENV_WORDS.iter().any(|word| name.contains(word))
}

fn is_no_secret(value: &str) -> bool {
    NO_SECRET.iter().any(|word| value.eq_ignore_ascii_case(word))
}

/// `None`: nothing in the line looks like a secret.
fn patterns(line: &str) -> Option<String> {
    let mut masked = String::new();
    let (mut at, mut kept) = (0, 0);
    while at < line.len() {
        let rest = &line[at..];
        let word = &rest[..run(rest, is_word)];
        if word.is_empty() {
            at += match password_in_url(rest) {
                Some((start, end)) => {
                    masked += &line[kept..at + start];
                    masked += MASK;
                    kept = at + end;
                    end
                }
                None => rest.chars().next().map_or(1, char::len_utf8),
            };
            continue;
        }
        if let Some((start, end)) = secret_at(word, &rest[word.len()..]) {
            masked += &line[kept..at + start];
            masked += MASK;
            kept = at + end;
            at = kept;
        } else {
            at += word.len();
        }
    }
    (kept > 0).then(|| masked + &line[kept..])
}

/// Where the secret that begins with or after this word lies, counted from the word's start.
fn secret_at(word: &str, after: &str) -> Option<(usize, usize)> {
    if let Some(prefix) = PREFIXES.iter().find(|prefix| word.starts_with(**prefix)) {
        let body = &word[prefix.len()..];
        // `hf_transfer` and `hf_hub_download` are names.
        let telling = *prefix != "hf_"
            || body.contains(|c: char| c.is_ascii_digit() || c.is_ascii_uppercase());
        return (telling && body.len() >= TOKEN_CHARS_MIN).then_some((0, word.len()));
    }
    let offset = word.len();
    if word.eq_ignore_ascii_case("bearer") {
        let gap = run(after, |c| c == ' ');
        let end = gap + run(&after[gap..], is_token);
        return (gap > 0 && end - gap >= TOKEN_CHARS_MIN).then_some((offset + gap, offset + end));
    }
    let name = word.trim_start_matches('-').to_ascii_lowercase().replace('-', "_");
    let certain = NAMES.iter().any(|end| name.ends_with(end));
    let bare = name == "token" && !word.starts_with('-');
    let likely = name.ends_with("_token") || name == "token";
    if !(certain || likely) {
        return None;
    }
    let (start, end) = value(after, word.starts_with("--"), name.ends_with("authorization"))?;
    let text = &after[start..end];
    // A tokenizer's own word for what it reads is short, and a word.
    let is_long = text.chars().count() >= if bare { BARE_CHARS_MIN } else { VALUE_CHARS_MIN };
    let is_random = !bare || text.contains(|c: char| c.is_ascii_digit());
    let telling = certain || is_long && is_random && text.chars().all(is_token);
    (telling && !is_no_secret(text)).then_some((offset + start, offset + end))
}

/// The value that follows a name: `=x`, `: "x"`, `': ['x', 'y']`, and ` x` after a flag.
fn value(after: &str, is_flag: bool, to_the_end: bool) -> Option<(usize, usize)> {
    let mut at = run(after, |c| matches!(c, '"' | '\''));
    at += run(&after[at..], |c| c == ' ');
    if after[at..].starts_with(['=', ':']) {
        at += 1;
    } else if !is_flag || at == 0 {
        return None;
    }
    at += run(&after[at..], |c| c == ' ');
    let until = |start: usize, stop: &dyn Fn(char) -> bool| {
        let length = after[start..].find(stop).unwrap_or(after.len() - start);
        (length > 0).then_some((start, start + length))
    };
    match after[at..].chars().next()? {
        '[' | '(' => until(at + 1, &|c| matches!(c, ']' | ')')),
        quote @ ('"' | '\'') => until(at + 1, &|c| c == quote),
        _ if to_the_end => until(at, &|c| matches!(c, '"' | '\'' | ',')),
        _ => until(at, &|c| {
            c.is_whitespace() || matches!(c, ',' | ';' | ')' | ']' | '}' | '"' | '\'')
        }),
    }
}

/// `://user:pass@`: where the password lies.
fn password_in_url(rest: &str) -> Option<(usize, usize)> {
    let user = rest.strip_prefix("://")?;
    let user = &user[..user.find(|c: char| c == '/' || c.is_whitespace()).unwrap_or(user.len())];
    let end = user.rfind('@')?;
    let colon = user[..end].find(':')?;
    (end > colon + 1).then_some((3 + colon + 1, 3 + end))
}

/// Length of the run of such characters at the beginning.
fn run(text: &str, of: impl Fn(char) -> bool) -> usize {
    text.find(|c| !of(c)).unwrap_or(text.len())
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-')
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+' | '/' | '=' | '~')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(line: &str) -> String {
        Secrets::default().redact(line).into_owned()
    }

    #[test]
    fn what_looks_like_a_secret_is_masked() {
        for (line, expected) in [
            ("token hf_AbCdEf0123456789 is bad", "token *** is bad"),
            ("OPENAI sk-proj-abcdef used", "OPENAI *** used"),
            ("Authorization: Bearer abc.def-ghi", "Authorization: ***"),
            ("sent \"Bearer abcdefgh\" to hub", "sent \"Bearer ***\" to hub"),
            ("vllm serve m --api-key abc --port 1", "vllm serve m --api-key *** --port 1"),
            ("vllm serve m --api-key=abc", "vllm serve m --api-key=***"),
            (
                "args: {'api_key': ['one', 'two'], 'model': 'm'}",
                "args: {'api_key': [***], 'model': 'm'}",
            ),
            ("Namespace(api_key='abc', port=1)", "Namespace(api_key='***', port=1)"),
            ("{\"apiKey\":\"abc\",\"a\":1}", "{\"apiKey\":\"***\",\"a\":1}"),
            ("HF_TOKEN=abcdefgh12 python", "HF_TOKEN=*** python"),
            ("password: hunter2, user: me", "password: ***, user: me"),
            ("proxy http://me:pa55@proxy:8080/x", "proxy http://me:***@proxy:8080/x"),
            ("schlüssel=ä api_key=ü ok", "schlüssel=ä api_key=*** ok"),
        ] {
            assert_eq!(shown(line), expected);
        }
    }

    #[test]
    fn what_an_engine_says_of_tokens_and_keys_stays() {
        for line in [
            "llama_model_loader: - kv 18: tokenizer.ggml.bos_token_id u32 = 1",
            "print_info: EOS token        = 2 '</s>'",
            "special tokens: eos_token='<|im_end|>', pad_token: 151643, image_token=<image>",
            "Avg generation throughput: 12.3 tokens/s, max_tokens=4096",
            "KeyError: 'model.layers.0.mlp.gate_proj.weight'",
            "Unexpected key lm_head.weight in state_dict; missing key(s): a, b",
            "using hf_transfer, hf_hub_download and hf_overrides={}",
            "api_key=None, hf_token: null, --api-key",
            "GPU KV cache size: 190,000 tokens (http://127.0.0.1:8000/v1)",
            "risk-averse task-specific disk-cache",
        ] {
            assert_eq!(shown(line), line);
        }
    }

    #[test]
    fn known_values_are_masked_wherever_they_stand() {
        let key = EngineKey::new("0123456789abcdef");
        let env = [
            ("HF_TOKEN", "an-odd-token"),
            ("DB_PASSWORD", "s3cret"),
            ("PGPASSWORD", "model"),
            ("MY_KEY_2", "an-odd"),
            ("MAX_TOKENS", "mistral"),
            ("TOKENIZER_MODE", "mistral"),
            ("SOME_KEY", "true"),
            ("KEY_SIZE", "4096"),
            ("MODEL", "mistral"),
        ];
        let secrets = Secrets::of_env(env).and(key);
        let said =
            secrets.redact("an-odd-token s3cret! an-odd 0123456789abcdef mistral true 4096 model");
        assert_eq!(said, "*** ***! *** *** mistral true 4096 model");
        assert!(matches!(secrets.redact("nothing here"), Cow::Borrowed(_)));
    }
}
