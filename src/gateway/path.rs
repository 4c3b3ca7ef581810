//! Paths of the pass-through: which model they name, and what of them reaches its engine.
//!
//! What is judged is what is sent: the path is taken apart, decoded once, normalised and encoded
//! anew, so that no spelling of a path reads differently here and at the engine.

use std::fmt::Write as _;

/// In the path, encoded: far longer than any name.
const NAME_BYTES_MAX: usize = 1024;

/// A path behind the model's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// As the engine gets it.
    pub sent: String,
    /// Decoded, for rules. A slash inside of a segment stays `%2F`.
    pub plain: String,
}

/// Splits `org/model/v1/models` (or `org%2Fmodel/v1/models`) into the name and the rest, which is
/// empty or begins with a slash. The longest name that `resolve` knows wins.
pub fn split_name<T>(raw: &str, resolve: impl Fn(&str) -> Option<T>) -> Option<(T, String, &str)> {
    let ends = raw.match_indices('/').map(|(at, _)| at).take_while(|at| *at <= NAME_BYTES_MAX);
    let whole = (raw.len() <= NAME_BYTES_MAX).then_some(raw.len());
    let mut found = None;
    for end in ends.chain(whole) {
        let Some(name) = decoded(&raw[..end]) else { continue };
        if let Some(model) = resolve(&name) {
            found = Some((model, name, &raw[end..]));
        }
    }
    found
}

/// Percent-decoded once; `None`: a broken escape, or no UTF-8.
pub fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let [high, low, tail @ ..] = rest else { return None };
        let digit = |byte: u8| char::from(byte).to_digit(16);
        bytes.push(u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

/// One segment (or a name, whose slashes stay) as a path may carry it.
pub fn encode(text: &str, keep_slashes: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        let is_plain = byte.is_ascii_alphanumeric()
            || b"-._~!$&'()*+,;=:@".contains(&byte)
            || (keep_slashes && byte == b'/');
        if is_plain {
            encoded.push(char::from(byte));
        } else {
            // Into a String: cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// `strict`: the path is checked against a list, so nothing may be left in it that servers read in
/// different ways. Else an encoded slash or `%` is a part of a file's name.
///
/// # Errors
/// What is wrong with it.
pub fn normalise(raw: &str, strict: bool) -> Result<Target, &'static str> {
    let mut segments: Vec<String> = Vec::new();
    let mut ends_open = true;
    for segment in raw.strip_prefix('/').unwrap_or(raw).split('/') {
        let segment = decoded(segment).ok_or("an escape in it is broken or is not UTF-8")?;
        ends_open = matches!(segment.as_str(), "" | "." | "..");
        match segment.as_str() {
            "" | "." => {}
            ".." => {
                segments.pop().ok_or("it leads out of the engine's own paths")?;
            }
            _ => {
                check(&segment, strict)?;
                segments.push(segment);
            }
        }
    }
    let mut target = Target { sent: String::new(), plain: String::new() };
    for segment in &segments {
        target.sent.push('/');
        target.sent.push_str(&encode(segment, false));
        target.plain.push('/');
        target.plain.push_str(&segment.replace('/', "%2F"));
    }
    if ends_open {
        target.sent.push('/');
        target.plain.push('/');
    }
    Ok(target)
}

fn check(segment: &str, strict: bool) -> Result<(), &'static str> {
    if segment.chars().any(char::is_control) {
        return Err("it holds a control character");
    }
    if segment.contains('\\') {
        return Err("it holds a backslash");
    }
    if segment.split('/').any(|part| matches!(part, "." | "..")) {
        return Err("it hides a dot segment behind an encoded slash");
    }
    if strict && segment.contains(['/', '%', ';', '?', '#']) {
        return Err("it holds an encoded slash, `%`, `;`, `?` or `#`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strict(raw: &str) -> Result<String, &'static str> {
        normalise(raw, true).map(|target| target.sent)
    }

    #[test]
    fn every_spelling_of_a_path_is_sent_as_one() {
        for raw in [
            "/v1/models",
            "//v1///models",
            "/v1/./models",
            "/v1/x/../models",
            "/v1/%2e/models",
            "/v1/x/%2e%2E/models",
            "/%761/mode%6cs",
            "/v1/%6D%6f%64els",
        ] {
            assert_eq!(strict(raw).as_deref(), Ok("/v1/models"), "{raw}");
        }
        assert_eq!(strict("").as_deref(), Ok("/"));
        assert_eq!(strict("/").as_deref(), Ok("/"));
        assert_eq!(strict("/a/").as_deref(), Ok("/a/"));
        assert_eq!(strict("/a/b/..").as_deref(), Ok("/a/"));
        assert_eq!(strict("/ä b").as_deref(), Ok("/%C3%A4%20b"));
    }

    #[test]
    fn what_servers_read_in_different_ways_is_refused() {
        for raw in [
            "/..",
            "/../sleep",
            "/v1/../../sleep",
            "/%2e%2e/sleep",
            "/v1%2fmodels",
            "/v1/..%2fsleep",
            "/v1/%252e%252e/sleep",
            "/%2573leep",
            "/v1\\models",
            "/v1%5cmodels",
            "/v1/..;/sleep",
            "/v1;a=b/models",
            "/v1/models%3fx",
            "/v1/models%00",
            "/v1/models%0d%0a",
            "/v1/%zz",
            "/v1/%2",
            "/v1/%ff",
        ] {
            assert!(strict(raw).is_err(), "{raw}: {:?}", strict(raw));
        }
    }

    #[test]
    fn a_file_with_a_slash_in_its_name_reaches_a_server_that_knows_such() {
        let target = normalise("/userdata/workflows%2Fmy%20one.json", false).unwrap();
        assert_eq!(target.sent, "/userdata/workflows%2Fmy%20one.json");
        assert_eq!(target.plain, "/userdata/workflows%2Fmy one.json");
        assert_eq!(normalise("/a%25b;c", false).unwrap().sent, "/a%25b;c");
        for raw in ["/a%2f..%2fb", "/a%2f%2e%2e", "/a%5cb", "/%00"] {
            assert!(normalise(raw, false).is_err(), "{raw}");
        }
    }

    #[test]
    fn the_longest_name_wins_however_it_is_written() {
        const NAMES: [&str; 4] = ["a", "a/b", "qwen2.5-coder:7b", "org/model"];
        let split = |raw| {
            let known = |name: &str| NAMES.into_iter().find(|known| *known == name);
            split_name(raw, known).map(|(name, _, rest)| (name, rest))
        };
        assert_eq!(split("a/v1/models"), Some(("a", "/v1/models")));
        assert_eq!(split("a/b/v1"), Some(("a/b", "/v1")));
        assert_eq!(split("a%2fb/v1"), Some(("a/b", "/v1")));
        assert_eq!(split("a%2Fb"), Some(("a/b", "")));
        assert_eq!(split("org/model/"), Some(("org/model", "/")));
        assert_eq!(split("qwen2.5-coder:7b/x"), Some(("qwen2.5-coder:7b", "/x")));
        assert_eq!(split("qwen2.5-coder%3A7b/x"), Some(("qwen2.5-coder:7b", "/x")));
        assert_eq!(split("a%2fv1%2fmodels"), None);
        assert_eq!(split("/a/v1"), None);
        assert_eq!(split("b/a"), None);
    }
}
