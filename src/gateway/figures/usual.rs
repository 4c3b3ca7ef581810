//! Usage as nearly every engine writes it, read in one pass over its bytes: an object of whole
//! numbers, and of objects of whole numbers. Anything else is left to serde, which takes several
//! times as long and says what is wrong.

use super::{Details, Usage};

impl Usage {
    /// At the beginning of `text`; `None`: not in the usual form, whatever it is.
    pub fn usual(text: &[u8]) -> Option<Usage> {
        let (mut usage, mut seen) = (Usage::default(), 0_u8);
        let mut once = |bit: u8| {
            let twice = seen & (1 << bit) != 0;
            seen |= 1 << bit;
            (!twice).then_some(())
        };
        Scan(text).object(|key, scan| {
            let (bit, place) = match key {
                b"prompt_tokens" => (0, &mut usage.prompt_tokens),
                b"completion_tokens" => (1, &mut usage.completion_tokens),
                b"input_tokens" => (2, &mut usage.input_tokens),
                b"output_tokens" => (3, &mut usage.output_tokens),
                b"cache_read_input_tokens" => (4, &mut usage.cache_read_input_tokens),
                b"cache_creation_input_tokens" => (5, &mut usage.cache_creation_input_tokens),
                b"prompt_tokens_details" => {
                    once(6)?;
                    usage.prompt_tokens_details = scan.details()?;
                    return Some(());
                }
                b"input_tokens_details" => {
                    once(7)?;
                    usage.input_tokens_details = scan.details()?;
                    return Some(());
                }
                other if !is_plain(other) => return None,
                _ if scan.0.first() == Some(&b'{') => return scan.details().map(drop),
                _ => return scan.number().map(drop),
            };
            once(bit)?;
            *place = scan.number()?;
            Some(())
        })?;
        Some(usage)
    }
}

/// A name in which nothing is escaped.
fn is_plain(name: &[u8]) -> bool {
    name.iter().all(|byte| matches!(byte, b' '..=b'~') && *byte != b'\\')
}

/// What is still to be read.
struct Scan<'a>(&'a [u8]);

impl<'a> Scan<'a> {
    fn object(
        &mut self,
        mut each: impl FnMut(&'a [u8], &mut Scan<'a>) -> Option<()>,
    ) -> Option<()> {
        self.eat(b'{')?;
        self.skip_space();
        if self.eat(b'}').is_some() {
            return Some(());
        }
        loop {
            self.eat(b'"')?;
            let (key, rest) = self.0.split_at_checked(memchr::memchr(b'"', self.0)?)?;
            self.0 = &rest[1..];
            self.skip_space();
            self.eat(b':')?;
            self.skip_space();
            each(key, self)?;
            self.skip_space();
            if self.eat(b',').is_none() {
                return self.eat(b'}');
            }
            self.skip_space();
        }
    }

    fn details(&mut self) -> Option<Option<Details>> {
        if self.0.first() != Some(&b'{') {
            return self.null().map(|()| None);
        }
        let (mut details, mut seen) = (Details::default(), false);
        self.object(|key, scan| {
            let number = scan.number()?;
            if key == b"cached_tokens" {
                details.cached_tokens = number;
                (!std::mem::replace(&mut seen, true)).then_some(())
            } else {
                is_plain(key).then_some(())
            }
        })?;
        Some(Some(details))
    }

    fn number(&mut self) -> Option<Option<u64>> {
        if self.null().is_some() {
            return Some(None);
        }
        let digits = self.while_true(|byte| byte.is_ascii_digit());
        let is_whole = !matches!(self.0.first(), Some(b'.' | b'e' | b'E') | None);
        let is_plain = !matches!(digits, [] | [b'0', _, ..]) && digits.len() < 20;
        let add = |sum: u64, digit: &u8| sum * 10 + u64::from(digit - b'0');
        (is_whole && is_plain).then(|| Some(digits.iter().fold(0, add)))
    }

    fn null(&mut self) -> Option<()> {
        self.0 = self.0.strip_prefix(b"null")?;
        Some(())
    }

    fn eat(&mut self, byte: u8) -> Option<()> {
        let (first, rest) = self.0.split_first()?;
        (*first == byte).then(|| self.0 = rest)
    }

    fn skip_space(&mut self) {
        if self.0.first().is_none_or(|byte| *byte > b' ') {
            return;
        }
        self.while_true(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n'));
    }

    fn while_true(&mut self, wanted: impl Fn(u8) -> bool) -> &'a [u8] {
        let length = self.0.iter().position(|byte| !wanted(*byte)).unwrap_or(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn by_serde(text: &[u8]) -> Option<Usage> {
        serde_json::Deserializer::from_slice(text).into_iter().next()?.ok()
    }

    #[test]
    fn what_engines_write_is_usual() {
        for text in [
            r#"{"prompt_tokens":5,"total_tokens":12,"completion_tokens":7,"prompt_tokens_details":null}, "#,
            "{\"prompt_tokens\": 12, \"completion_tokens\": 34,\n \"total_tokens\": 46}}",
            r#"{"input_tokens":10,"input_tokens_details":{"cached_tokens":7},"output_tokens":4,
                "output_tokens_details":{"reasoning_tokens":0},"total_tokens":14}"#,
            r#"{"cache_read_input_tokens":0,"cache_creation_input_tokens":18446744073709551,"x":{}}"#,
            "{ }",
        ] {
            let usual = Usage::usual(text.as_bytes());
            assert!(usual.is_some(), "{text}");
            assert_eq!(usual, by_serde(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn the_rest_is_left_to_serde() {
        for text in [
            "",
            "{",
            "null",
            "[1]",
            r#"{"prompt_tokens":5"#,
            r#"{"prompt_tokens":5.0}"#,
            r#"{"prompt_tokens":5e1}"#,
            r#"{"prompt_tokens":05}"#,
            r#"{"prompt_tokens":-5}"#,
            r#"{"prompt_tokens":"5"}"#,
            r#"{"prompt_tokens":99999999999999999999}"#,
            r#"{"prompt_tokens":5,}"#,
            r#"{"x":{null}"#,
            r#"{"prompt_tokens":5,"prompt_tokens":6}"#,
            r#"{"prompt_tokens_details":{"cached_tokens":1,"cached_tokens":1}}"#,
            r#"{"prompt\u005ftokens":5}"#,
            r#"{"service":"x","prompt_tokens":5}"#,
        ] {
            assert_eq!(Usage::usual(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        /// Parts of such objects in any order: where both say something they say the same.
        #[test]
        fn it_says_what_serde_says(parts in prop::collection::vec(0..PARTS.len(), 0..14)) {
            let text: String = parts.iter().map(|part| PARTS[*part]).collect();
            for text in [format!("{{{text}"), format!("{{\"prompt_tokens\":{text}}}"), text] {
                if let Some(usual) = Usage::usual(text.as_bytes()) {
                    prop_assert_eq!(Some(usual), by_serde(text.as_bytes()), "{}", text);
                }
            }
        }
    }

    const PARTS: [&str; 18] = [
        "{",
        "}",
        ",",
        ":",
        " ",
        "null",
        "0",
        "7",
        "12",
        ".5",
        "\"x\":",
        "\"prompt_tokens\":",
        "\"completion_tokens\":3",
        "\"prompt_tokens_details\":{",
        "\"cached_tokens\":1",
        "\"input_tokens_details\":",
        "},",
        "\"cache_read_input_tokens\":4,",
    ];
}
