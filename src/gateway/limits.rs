//! How often a key may ask, and how many of its requests may be under way: before the queue, so
//! that one caller cannot fill it for all.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;

use super::reject::Reject;
use crate::config::catalog::{ApiKey, RateLimits, Settings};

const MINUTE: Duration = Duration::from_secs(60);
/// Advice to who has too many requests under way: one of them ends when it ends.
const SOON: Duration = Duration::from_secs(1);

/// Use of every limited key, by its name. Callers without a key share one entry.
#[derive(Debug, Default)]
pub struct Limiter(Mutex<BTreeMap<Option<String>, Use>>);

#[derive(Debug)]
struct Use {
    /// Requests that may be made at once, refilled evenly over a minute.
    left: f64,
    filled: Instant,
    under_way: Arc<AtomicU32>,
}

/// One request's share of `concurrency`, given back when it is dropped.
#[derive(Debug, Default)]
pub struct Permit(Option<Arc<AtomicU32>>);

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(under_way) = &self.0 {
            under_way.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Limiter {
    /// # Errors
    /// 429 with the time after which another attempt makes sense.
    pub fn enter(&self, settings: &Settings, key: Option<&ApiKey>) -> Result<Permit, Reject> {
        // Most have no limits, and need not know the time.
        match limits_of(settings, key) {
            RateLimits { requests_per_minute: None, concurrency: None } => Ok(Permit::default()),
            _ => self.enter_at(settings, key, Instant::now()),
        }
    }

    fn enter_at(
        &self,
        settings: &Settings,
        key: Option<&ApiKey>,
        now: Instant,
    ) -> Result<Permit, Reject> {
        let RateLimits { requests_per_minute: rate, concurrency } = limits_of(settings, key);
        let mut uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let keys = &settings.auth.keys;
        // A reload took keys away.
        if uses.len() > keys.len() + 1 {
            uses.retain(|name, _| {
                name.as_ref().is_none_or(|name| keys.iter().any(|key| key.name == *name))
            });
        }
        let used = uses.entry(key.map(|key| key.name.clone())).or_insert_with(|| Use {
            left: f64::INFINITY,
            filled: now,
            under_way: Arc::default(),
        });
        if let Some(limit) = concurrency
            && used.under_way.load(Ordering::Relaxed) >= limit
        {
            let what = format!("{limit} {} under way", plural(limit, "request"));
            return Err(reject("too_many_requests", key, &what, SOON));
        }
        if let Some(limit) = rate {
            used.take(limit, now).map_err(|after| {
                let what = format!("{limit} {} a minute", plural(limit, "request"));
                reject("rate_limited", key, &what, after)
            })?;
        }
        used.under_way.fetch_add(1, Ordering::Relaxed);
        Ok(Permit(Some(Arc::clone(&used.under_way))))
    }
}

/// A key's own, else those for all.
fn limits_of(settings: &Settings, key: Option<&ApiKey>) -> RateLimits {
    let usual = settings.rate_limits;
    let own = key.map_or(RateLimits::default(), |key| key.limits);
    RateLimits {
        requests_per_minute: own.requests_per_minute.or(usual.requests_per_minute),
        concurrency: own.concurrency.or(usual.concurrency),
    }
}

impl Use {
    /// Takes one of `limit` requests a minute, or says when there is one.
    fn take(&mut self, limit: u32, now: Instant) -> Result<(), Duration> {
        let per_second = f64::from(limit) / MINUTE.as_secs_f64();
        let refill = now.duration_since(self.filled).as_secs_f64() * per_second;
        self.left = (self.left + refill).min(f64::from(limit));
        self.filled = now;
        if self.left < 1.0 {
            let missing = (1.0 - self.left) / per_second;
            return Err(Duration::try_from_secs_f64(missing).unwrap_or(MINUTE));
        }
        self.left -= 1.0;
        Ok(())
    }
}

fn plural(count: u32, word: &str) -> String {
    format!("{word}{}", if count == 1 { "" } else { "s" })
}

fn reject(code: &'static str, key: Option<&ApiKey>, what: &str, after: Duration) -> Reject {
    let message = match key {
        Some(key) => format!(
            "API key \"{}\" may have {what}; its `limits` are under auth.keys in models.yaml",
            key.name
        ),
        None => format!(
            "callers without a key may have {what} together; `rate_limits` in models.yaml says so"
        ),
    };
    Reject::new(StatusCode::TOO_MANY_REQUESTS, code, message).retry_after(after)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(requests_per_minute: Option<u32>, concurrency: Option<u32>) -> RateLimits {
        RateLimits { requests_per_minute, concurrency }
    }

    fn key(name: &str, limits: RateLimits) -> ApiKey {
        ApiKey { name: name.into(), limits, ..ApiKey::default() }
    }

    fn with_keys(names: &[&str]) -> Settings {
        let mut settings = Settings::default();
        settings.auth.keys = names.iter().map(|name| key(name, RateLimits::default())).collect();
        settings
    }

    #[test]
    fn a_rate_is_refilled_evenly_and_the_wait_is_told() {
        let (limiter, settings, now) = (Limiter::default(), with_keys(&["app"]), Instant::now());
        let app = key("app", limits(Some(6), None));
        let enter = |key, at| limiter.enter_at(&settings, Some(key), at);
        for _ in 0..6 {
            enter(&app, now).unwrap();
        }
        let refused = enter(&app, now).unwrap_err();
        assert_eq!((refused.code(), refused.problem().status.as_u16()), ("rate_limited", 429));
        let after = refused.problem().retry_after.unwrap();
        assert!(after.abs_diff(Duration::from_secs(10)) < Duration::from_millis(1), "{after:?}");
        let later = now + Duration::from_millis(10_001);
        enter(&app, later).unwrap();
        assert!(enter(&app, later).is_err());
        enter(&key("other", limits(Some(6), None)), later).unwrap();
    }

    #[test]
    fn a_place_comes_back_when_its_request_ends() {
        let limiter = Limiter::default();
        let mut settings = with_keys(&["app"]);
        settings.rate_limits = limits(None, Some(2));
        let app = key("app", RateLimits::default());
        let first = limiter.enter(&settings, Some(&app)).unwrap();
        let _second = limiter.enter(&settings, Some(&app)).unwrap();
        let refused = limiter.enter(&settings, Some(&app)).unwrap_err();
        assert_eq!(refused.code(), "too_many_requests");
        let _nobody = limiter.enter(&settings, None).unwrap();
        drop(first);
        limiter.enter(&settings, Some(&app)).unwrap();
    }

    #[test]
    fn a_request_that_is_one_too_many_at_once_costs_no_rate() {
        let (limiter, settings, now) = (Limiter::default(), with_keys(&["app"]), Instant::now());
        let app = key("app", limits(Some(2), Some(1)));
        let enter = || limiter.enter_at(&settings, Some(&app), now);
        let first = enter().unwrap();
        assert_eq!(enter().unwrap_err().code(), "too_many_requests");
        drop(first);
        enter().unwrap();
        assert_eq!(enter().unwrap_err().code(), "rate_limited");
    }

    #[test]
    fn keys_of_an_older_configuration_are_forgotten() {
        let limiter = Limiter::default();
        for name in ["a", "b", "c", "d"] {
            let app = key(name, limits(Some(1), None));
            limiter.enter(&with_keys(&["d"]), Some(&app)).unwrap();
        }
        assert!(limiter.0.lock().unwrap().len() <= 3);
    }
}
