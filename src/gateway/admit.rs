//! Admitting a request: which model it means, whether its key may use it, and what its headers ask.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, StatusCode};

use super::choose::may_see;
use super::forward::REQUEST_ID;
use super::nearest::nearest;
use super::parse::NAME_SHOWN_MAX;
use super::reject::Reject;
use super::{auth, parse};
use crate::config::catalog::{ApiKey, Asked, Catalog, ModelSpec, Scope, StartRule};
use crate::http1::Headers;
use crate::units::{ModelName, Priority};

const WISH: &str = "x-wharf-";
const NAMES_SHOWN_MAX: usize = 12;
/// How often a request may be passed on from one Wharf to the next: a loop ends here.
const HOPS_MAX: u32 = 3;

/// The model behind a name, an alias or `group/model`. Names that the key may not use, and unlisted
/// ones, are not offered.
pub fn model<'c>(
    catalog: &'c Catalog,
    requested: &str,
    key: Option<&ApiKey>,
) -> Result<&'c Arc<ModelSpec>, Reject> {
    let Some(Asked { spec, .. }) = catalog.asked(requested) else {
        return Err(unknown(catalog, requested, key));
    };
    if !auth::may_use(key, spec.name.as_str(), requested) {
        return Err(not_allowed(requested, key));
    }
    Ok(spec)
}

pub fn not_allowed(requested: &str, key: Option<&ApiKey>) -> Reject {
    let name = key.map_or("", |key| key.name.as_str());
    let message = format!(
        "API key \"{name}\" may not use model \"{requested}\"; its patterns are under auth.keys in \
         models.yaml"
    );
    Reject::new(StatusCode::FORBIDDEN, "model_not_allowed", message).param("model")
}

/// The peer before the slash, if it may have any model and has not told one yet.
fn silent_peer<'c>(catalog: &'c Catalog, requested: &str) -> Option<&'c str> {
    let peer = catalog.peers.get(requested.split_once('/')?.0).filter(|peer| peer.is_open())?;
    let is_its = |spec: &Arc<ModelSpec>| {
        spec.peer.as_ref() == Some(&peer.name) && catalog.is_discovered(spec)
    };
    (!catalog.models.values().any(is_its)).then_some(peer.name.as_str())
}

fn unknown(catalog: &Catalog, requested: &str, key: Option<&ApiKey>) -> Reject {
    if let Some(peer) = silent_peer(catalog, requested)
        && auth::may_use(key, requested, requested)
    {
        let message = format!(
            "the peer \"{peer}\" has not told its models yet: it does not answer, or has none"
        );
        return Reject::new(StatusCode::SERVICE_UNAVAILABLE, "peer_unavailable", message);
    }
    let is_listed = |model: &ModelName| catalog.model(model).is_some_and(|spec| !spec.unlisted);
    let names = catalog.models.keys().map(|model| (model.as_str(), model));
    let aliases = catalog.aliases.iter().map(|(alias, model)| (alias.as_str(), model));
    let usable = names
        .chain(aliases)
        .filter(|(name, model)| is_listed(model) && auth::may_use(key, model.as_str(), name))
        .map(|(name, _)| name);
    let routes = catalog.routes.iter().filter(|(name, route)| may_see(catalog, name, route, key));
    let usable: Vec<&str> = usable.chain(routes.map(|(name, _)| name.as_str())).collect();
    let shown: String = requested.chars().take(NAME_SHOWN_MAX).collect();
    let near = nearest(requested, usable.iter().copied());
    let hint = if !near.is_empty() {
        format!("did you mean {}?", quoted(&near, " or "))
    } else if usable.is_empty() {
        "no model is configured for you".to_owned()
    } else {
        let rest = usable.len().saturating_sub(NAMES_SHOWN_MAX);
        let listed = quoted(&usable[..usable.len().min(NAMES_SHOWN_MAX)], ", ");
        let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        format!("known are {listed}{more}")
    };
    let message = format!("model \"{shown}\" is not configured; {hint}");
    Reject::new(StatusCode::NOT_FOUND, "model_not_found", message).param("model").model(shown)
}

fn quoted(names: &[&str], separator: &str) -> String {
    names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(separator)
}

/// What the `X-Wharf-*` headers ask; a key bounds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    never_start: bool,
    max_wait: Option<Duration>,
    priority: Option<Priority>,
    /// How many Wharfs it came through.
    pub hops: u32,
}

impl Wishes {
    pub fn read(headers: &impl Headers) -> Result<Wishes, Reject> {
        if !headers.any_begins_with(WISH) {
            return Ok(Wishes::default());
        }
        let never_start = match text(headers, "x-wharf-start")?.as_deref() {
            None | Some("auto") => false,
            Some("never") => true,
            Some(_) => return Err(bad("X-Wharf-Start", "`never` or `auto`")),
        };
        let max_wait = match text(headers, "x-wharf-max-wait")? {
            None => None,
            Some(value) => Some(
                duration(&value)
                    .ok_or_else(|| bad("X-Wharf-Max-Wait", "a duration such as `30s` or `2m`"))?,
            ),
        };
        let priority = match text(headers, "x-wharf-priority")?.as_deref() {
            None => None,
            Some("low") => Some(Priority::Low),
            Some("normal") => Some(Priority::Normal),
            Some("high") => Some(Priority::High),
            Some(_) => return Err(bad("X-Wharf-Priority", "`low`, `normal` or `high`")),
        };
        Ok(Wishes { never_start, max_wait, priority, hops: hops(headers)? })
    }

    /// The priority that counts: within the key's bounds, else not above the model's own.
    pub fn priority(&self, spec: &ModelSpec, key: Option<&ApiKey>) -> Priority {
        let asked = self.priority.unwrap_or(spec.priority);
        match key.and_then(|key| key.priority) {
            Some((lowest, highest)) => asked.max(lowest).min(highest),
            None if is_unbound(key) => asked,
            None => asked.min(spec.priority),
        }
    }

    /// The key's `max_wait` stands in for a header, and is the least that one may ask for.
    pub fn max_wait(&self, key: Option<&ApiKey>) -> Option<Duration> {
        let least = key.and_then(|key| key.max_wait);
        match (self.max_wait, least) {
            (Some(asked), Some(least)) if !is_unbound(key) => Some(asked.max(least)),
            (asked, least) => asked.or(least),
        }
    }

    pub fn never_start(&self, key: Option<&ApiKey>) -> bool {
        self.never_start || key.is_some_and(|key| key.start == StartRule::Never)
    }
}

/// Whether wishes count as they are. Other keys may step back in the queue, not forward.
fn is_unbound(key: Option<&ApiKey>) -> bool {
    key.is_none_or(|key| auth::has_scope(key, Scope::Admin))
}

/// Whether `max_wait` may be shorter than the configured one: its operator said so.
pub fn may_hurry(key: Option<&ApiKey>) -> bool {
    is_unbound(key) || key.is_some_and(|key| key.max_wait.is_some())
}

fn hops(headers: &impl Headers) -> Result<u32, Reject> {
    let Some(value) = text(headers, "x-wharf-hops")? else { return Ok(0) };
    let hops = value.parse().map_err(|_| bad("X-Wharf-Hops", "a number"))?;
    if hops > HOPS_MAX {
        let message = format!(
            "this request came through {hops} Wharfs already (at most {HOPS_MAX}): peers lead to \
             each other in a circle; look at `peers` and `routes` there and here"
        );
        return Err(Reject::new(StatusCode::LOOP_DETECTED, "too_many_hops", message).hopeless());
    }
    Ok(hops)
}

fn text(headers: &impl Headers, name: &'static str) -> Result<Option<String>, Reject> {
    let Some(value) = headers.first(name) else { return Ok(None) };
    let value = std::str::from_utf8(value).map_err(|_| bad(name, "plain text"))?;
    Ok(Some(value.trim().to_ascii_lowercase()))
}

/// `30s`, `1m 30s`, or seconds as a plain number.
fn duration(value: &str) -> Option<Duration> {
    match value.parse::<u32>() {
        Ok(seconds) => Some(Duration::from_secs(seconds.into())),
        Err(_) => humantime::parse_duration(value).ok(),
    }
}

fn bad(header: &str, expected: &str) -> Reject {
    Reject::bad_request("header_invalid", format!("the header {header} must be {expected}"))
}

/// The client's own id where it is short and harmless, else a new one.
pub fn request_id(headers: &impl Headers, fresh: impl FnOnce() -> String) -> HeaderValue {
    let sane = |bytes: &&[u8]| {
        (1..=parse::NAME_SHOWN_MAX).contains(&bytes.len())
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:/".contains(b))
    };
    let id = match headers.first(REQUEST_ID.as_str()).filter(sane) {
        Some(value) => HeaderValue::from_bytes(value).ok(),
        None => HeaderValue::try_from(fresh()).ok(),
    };
    id.unwrap_or(HeaderValue::from_static("unknown"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, HeaderName};

    fn wishes(name: &'static str, value: &'static str) -> Result<Wishes, Reject> {
        Wishes::read(&HeaderMap::from_iter([(
            HeaderName::from_static(name),
            HeaderValue::from_static(value),
        )]))
    }

    #[test]
    fn headers_are_read() {
        assert_eq!(Wishes::read(&HeaderMap::new()).unwrap(), Wishes::default());
        assert!(wishes("x-wharf-start", "Never").unwrap().never_start);
        let wait = |value| wishes("x-wharf-max-wait", value).unwrap().max_wait;
        assert_eq!(wait("30s"), Some(Duration::from_secs(30)));
        assert_eq!(wait("90"), Some(Duration::from_secs(90)));
        assert_eq!(wait("1m 30s"), Some(Duration::from_secs(90)));
        assert_eq!(wishes("x-wharf-priority", "high").unwrap().priority, Some(Priority::High));
    }

    #[test]
    fn a_key_bounds_what_its_requests_ask() {
        let seconds = |n| Some(Duration::from_secs(n));
        let app = ApiKey {
            max_wait: seconds(60),
            priority: Some((Priority::Low, Priority::Normal)),
            start: StartRule::Never,
            ..ApiKey::default()
        };
        let asked =
            Wishes { max_wait: seconds(5), priority: Some(Priority::High), ..Wishes::default() };
        let spec = ModelSpec { priority: Priority::High, ..ModelSpec::plain("ada") };
        assert_eq!(asked.max_wait(Some(&app)), seconds(60));
        assert_eq!(asked.priority(&spec, Some(&app)), Priority::Normal);
        assert!(asked.never_start(Some(&app)));
        assert!(may_hurry(Some(&app)));
        let nothing = Wishes::default();
        assert_eq!(nothing.max_wait(Some(&app)), seconds(60));
        assert_eq!(nothing.priority(&spec, Some(&app)), Priority::Normal);

        let plain = ApiKey::default();
        let modest = ModelSpec::plain("bob");
        assert_eq!(asked.priority(&modest, Some(&plain)), Priority::Normal);
        assert_eq!(asked.max_wait(Some(&plain)), seconds(5));
        assert!(!may_hurry(Some(&plain)) && !asked.never_start(Some(&plain)));

        let boss = ApiKey { scopes: vec![Scope::Admin], ..app.clone() };
        assert_eq!(asked.max_wait(Some(&boss)), seconds(5));
        assert_eq!(asked.priority(&modest, None), Priority::High);
    }

    #[test]
    fn bad_values_name_the_header() {
        for (name, value, shown) in [
            ("x-wharf-start", "maybe", "X-Wharf-Start"),
            ("x-wharf-max-wait", "-1s", "X-Wharf-Max-Wait"),
            ("x-wharf-priority", "urgent", "X-Wharf-Priority"),
        ] {
            let reject = wishes(name, value).unwrap_err();
            assert_eq!(reject.problem().status, 400);
            assert!(reject.problem().message.contains(shown));
        }
    }

    #[test]
    fn a_request_that_goes_round_in_circles_is_refused() {
        assert_eq!(wishes("x-wharf-hops", "3").unwrap().hops, 3);
        let reject = wishes("x-wharf-hops", "4").unwrap_err();
        assert_eq!((reject.code(), reject.problem().status.as_u16()), ("too_many_hops", 508));
        assert_eq!(wishes("x-wharf-hops", "many").unwrap_err().code(), "header_invalid");
    }

    #[test]
    fn request_ids_of_clients_are_kept_when_harmless() {
        let id = |value: &'static str| {
            let headers = HeaderMap::from_iter([(
                HeaderName::from_static("x-request-id"),
                HeaderValue::from_static(value),
            )]);
            request_id(&headers, || "fresh".into())
        };
        assert_eq!(id("abc-1_2.3"), "abc-1_2.3");
        assert_eq!(id(""), "fresh");
        assert_eq!(id("a b"), "fresh");
        assert_eq!(id("{}"), "fresh");
    }
}
