//! API keys: who asks, what the key may do, which models it may use.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::StatusCode;
use subtle::Choice;

use super::reject::{Reject, Viewer};
use crate::config::catalog::{ApiKey, KeyDigest, Scope, Settings};
use crate::http1::Headers;

/// Some clients leave the padding out.
const BASIC: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The key behind a request, or `None` where no keys are configured.
pub fn authorize<'a>(
    settings: &'a Settings,
    headers: &impl Headers,
    scope: Scope,
) -> Result<Option<&'a ApiKey>, Reject> {
    if settings.auth.keys.is_empty() {
        return Ok(None);
    }
    let presented = presented(headers);
    if presented.is_empty() {
        return Err(unauthorized(
            "missing_api_key",
            "no API key: send `Authorization: Bearer KEY` (or x-api-key, or Basic)",
        ));
    }
    let key = find(&settings.auth.keys, &presented)
        .ok_or_else(|| unauthorized("invalid_api_key", "the API key is not known here"))?;
    if !has_scope(key, scope) {
        return Err(Reject::new(
            StatusCode::FORBIDDEN,
            "scope_missing",
            format!(
                "API key \"{}\" lacks the scope `{}`; add it under auth.keys in models.yaml",
                key.name,
                scope_name(scope)
            ),
        ));
    }
    Ok(Some(key))
}

/// Whether the key's patterns allow a model, by its configured name or the alias asked for.
pub fn may_use(key: Option<&ApiKey>, model: &str, requested: &str) -> bool {
    key.is_none_or(|key| {
        key.models.iter().any(|pattern| matches(pattern, model) || matches(pattern, requested))
    })
}

/// What of a failure this caller may see.
pub fn viewer(key: Option<&ApiKey>, peer: Option<SocketAddr>) -> Viewer {
    let sees_logs = match key {
        Some(key) => has_scope(key, Scope::Read),
        None => peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback()),
    };
    Viewer { sees_logs }
}

/// `admin` includes `read`; `inference` is a thing of its own.
pub fn has_scope(key: &ApiKey, scope: Scope) -> bool {
    key.scopes.contains(&scope) || (scope == Scope::Read && key.scopes.contains(&Scope::Admin))
}

fn scope_name(scope: Scope) -> &'static str {
    match scope {
        Scope::Inference => "inference",
        Scope::Read => "read",
        Scope::Admin => "admin",
    }
}

fn unauthorized(code: &'static str, message: &str) -> Reject {
    Reject::new(StatusCode::UNAUTHORIZED, code, message)
}

/// Looks at every key for every credential, so that time tells nothing about which one matched.
fn find<'a>(keys: &'a [ApiKey], presented: &[KeyDigest]) -> Option<&'a ApiKey> {
    let mut found = None;
    for key in keys {
        let mut same = Choice::from(0);
        for candidate in presented {
            same |= key.key.matches(candidate);
        }
        if bool::from(same) {
            found = found.or(Some(key));
        }
    }
    found
}

fn presented(headers: &impl Headers) -> Vec<KeyDigest> {
    let mut found = Vec::new();
    if let Some(value) = headers.first("x-api-key") {
        found.push(KeyDigest::of(value.trim_ascii()));
    }
    let Some(value) = headers.first("authorization") else { return found };
    let (scheme, rest) = value.split_at(value.iter().position(|&b| b == b' ').unwrap_or(0));
    let rest = rest.trim_ascii();
    if scheme.eq_ignore_ascii_case(b"bearer") {
        found.push(KeyDigest::of(rest));
    } else if scheme.eq_ignore_ascii_case(b"basic")
        && let Ok(pair) = BASIC.decode(rest)
    {
        // The key is the password; tools that ask for a user only send it as the user.
        let colon = pair.iter().position(|&b| b == b':').unwrap_or(pair.len());
        let password = pair.get(colon + 1..).unwrap_or_default();
        found.push(KeyDigest::of(if password.is_empty() { &pair[..colon] } else { password }));
    }
    found
}

/// `*` stands for any run of characters, also an empty one.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(rest) = name.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    let mut rest = rest;
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    fn key(name: &str, key: &str, scopes: &[Scope]) -> ApiKey {
        ApiKey {
            name: name.into(),
            key: key.into(),
            models: vec!["mis*".into()],
            scopes: scopes.to_vec(),
            ..ApiKey::default()
        }
    }

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            http::HeaderName::from_static(name),
            http::HeaderValue::from_str(value).unwrap(),
        )])
    }

    #[test]
    fn all_three_ways_to_present_a_key() {
        let keys = [key("a", "sk-one", &[]), key("b", "s3cret", &[])];
        for (name, value) in [
            ("authorization", "Bearer s3cret"),
            ("authorization", "bearer  s3cret"),
            ("x-api-key", "s3cret"),
            ("authorization", "Basic YW55OnMzY3JldA=="),
            ("authorization", "Basic czNjcmV0Og=="),
        ] {
            let found = find(&keys, &presented(&headers(name, value)));
            assert_eq!(found.map(|key| key.name.as_str()), Some("b"), "{name}: {value}");
        }
        for value in ["Bearer s3cre", "Bearer s3cretX", "Bearer ", "s3cret", "Basic ???"] {
            let found = find(&keys, &presented(&headers("authorization", value)));
            assert!(found.is_none(), "{value}");
        }
    }

    #[test]
    fn an_unset_key_matches_nothing() {
        assert!(find(&[key("empty", "", &[])], &[KeyDigest::of(b"")]).is_none());
    }

    #[test]
    fn admin_reads_but_infers_only_when_told_so() {
        let admin = key("a", "k", &[Scope::Admin]);
        assert!(has_scope(&admin, Scope::Read));
        assert!(!has_scope(&admin, Scope::Inference));
        assert!(!has_scope(&key("r", "k", &[Scope::Read]), Scope::Admin));
    }

    #[test]
    fn patterns() {
        for (pattern, name, expected) in [
            ("*", "anything", true),
            ("mis*", "mistral", true),
            ("mis*", "qwen", false),
            ("*:7b", "qwen:7b", true),
            ("q*n:*b", "qwen:7b", true),
            ("qwen", "qwen:7b", false),
            ("a*a", "a", false),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn a_key_may_use_what_its_patterns_name_by_either_name() {
        let key = key("a", "k", &[]);
        assert!(may_use(Some(&key), "mistral", "gpt-4o"));
        assert!(may_use(Some(&key), "qwen", "mis-alias"));
        assert!(!may_use(Some(&key), "qwen", "gpt-4o"));
        assert!(may_use(None, "qwen", "qwen"));
    }
}
