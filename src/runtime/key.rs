//! The key that an engine asks of its callers, and how an instance comes by it.

use std::fmt;
use std::sync::Arc;

use http::HeaderValue;

/// Of a random key; twice that many characters.
const RANDOM_BYTES: usize = 24;

/// It is shown nowhere: `Debug` masks it, and it cannot be serialised.
#[derive(Clone, PartialEq, Eq)]
pub struct EngineKey {
    text: Arc<str>,
    bearer: HeaderValue,
}

impl EngineKey {
    /// `None`: empty, or holding what no header can carry.
    pub fn new(text: &str) -> Option<EngineKey> {
        let mut bearer = HeaderValue::try_from(format!("Bearer {text}")).ok()?;
        bearer.set_sensitive(true);
        (!text.trim().is_empty()).then(|| EngineKey { text: text.into(), bearer })
    }

    /// A new one, from the operating system's randomness; `None`: it gave none.
    pub fn random() -> Option<EngineKey> {
        let mut bytes = [0_u8; RANDOM_BYTES];
        getrandom::fill(&mut bytes).ok()?;
        EngineKey::new(&bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    /// The value of `Authorization`.
    pub fn bearer(&self) -> HeaderValue {
        self.bearer.clone()
    }

    /// For the engine's environment, and to find it in a log; for nothing else.
    pub fn expose(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for EngineKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The key of an instance that is about to start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LaunchKey {
    /// The engine asks for none, or for one that is known only once it runs.
    #[default]
    None,
    /// Its configured command or environment gives it this one.
    Configured(EngineKey),
    /// Made for this instance alone. Handed in by the environment: anyone may read arguments.
    Made { variable: &'static str, key: EngineKey },
}

impl LaunchKey {
    pub fn key(&self) -> Option<EngineKey> {
        match self {
            LaunchKey::None => None,
            LaunchKey::Configured(key) | LaunchKey::Made { key, .. } => Some(key.clone()),
        }
    }

    /// What is to be added to the engine's environment.
    pub fn env(&self) -> Option<(String, String)> {
        match self {
            LaunchKey::None | LaunchKey::Configured(_) => None,
            LaunchKey::Made { variable, key } => {
                Some(((*variable).to_owned(), key.expose().to_owned()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_key_has_192_bits_and_never_comes_twice() {
        let (one, other) = (EngineKey::random().unwrap(), EngineKey::random().unwrap());
        assert_eq!(one.expose().len(), 2 * RANDOM_BYTES);
        assert!(one.expose().bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_ne!(one, other);
    }

    #[test]
    fn nothing_that_holds_a_key_prints_it() {
        let key = EngineKey::new("s3cret-s3cret").unwrap();
        let made = LaunchKey::Made { variable: "VLLM_API_KEY", key: key.clone() };
        for shown in [format!("{key:?}"), format!("{made:?}"), format!("{:?}", key.bearer())] {
            assert!(!shown.contains("s3cret"), "{shown}");
        }
        assert_eq!(key.bearer(), "Bearer s3cret-s3cret");
    }

    #[test]
    fn what_no_header_can_carry_is_no_key() {
        for text in ["", "  ", "two\nlines", "nul\0"] {
            assert!(EngineKey::new(text).is_none(), "{text:?}");
        }
    }
}
