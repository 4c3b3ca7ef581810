//! Whole requests and answers, kept for debugging where `captures` is switched on: in memory only,
//! within `captures.total` bytes, credentials masked.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;

use crate::config::catalog::CaptureSettings;
use crate::orchestrator::Handle;
use crate::runtime::redact::Secrets;

/// What one capture costs beside its bytes, roughly.
const OVERHEAD: u64 = 512;
const HEADER_OVERHEAD: u64 = 64;
const MASK: &str = "[redacted]";
/// Parts of names of headers whose values are never kept.
const SECRET_NAMES: [&str; 9] =
    ["auth", "key", "token", "cookie", "secret", "passw", "credential", "session", "signature"];
/// How soon a reload that switches captures off has freed what was kept.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub type Headers = Vec<(String, String)>;

/// One request and its answer. Bodies are cut at `captures.body`.
#[derive(Debug, Default, PartialEq)]
pub struct Capture {
    pub path: String,
    pub request_headers: Headers,
    /// As the client sent it.
    pub request_body: Vec<u8>,
    pub request_bytes: u64,
    pub response_headers: Headers,
    /// As the client got it.
    pub response_body: Vec<u8>,
    pub response_bytes: u64,
}

impl Capture {
    fn cost(&self) -> u64 {
        let bodies = self.request_body.len() + self.response_body.len();
        OVERHEAD
            + (self.path.len() + bodies) as u64
            + cost_of(&self.request_headers)
            + cost_of(&self.response_headers)
    }
}

fn cost_of(headers: &Headers) -> u64 {
    headers.iter().map(|(name, value)| (name.len() + value.len()) as u64 + HEADER_OVERHEAD).sum()
}

/// Cheap to clone; all clones are one memory.
#[derive(Clone, Debug, Default)]
pub struct Captures(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    /// By the id of their activity row, oldest first.
    rows: VecDeque<(u64, Arc<Capture>)>,
    bytes: u64,
    /// Promised to captures whose requests are under way.
    drafting: u64,
    tended: bool,
}

impl Kept {
    /// Makes room for `more` bytes; false if even nothing kept would not be enough.
    fn make_room(&mut self, more: u64, total: u64) -> bool {
        if self.drafting.saturating_add(more) > total {
            return false;
        }
        while self.bytes + self.drafting + more > total {
            let Some((_, oldest)) = self.rows.pop_front() else { break };
            self.bytes -= oldest.cost();
        }
        true
    }

    fn clear(&mut self) {
        self.rows = VecDeque::new();
        self.bytes = 0;
    }
}

impl Captures {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None`: switched off, or no room beside those whose requests are under way.
    pub fn begin(&self, settings: CaptureSettings, path: &str) -> Option<Draft> {
        if !settings.enabled {
            return None;
        }
        let mut draft = Draft {
            captures: self.clone(),
            settings,
            reserved: 0,
            capture: Capture { path: path.to_owned(), ..Capture::default() },
        };
        draft.reserve(OVERHEAD + path.len() as u64).then_some(draft)
    }

    pub fn get(&self, id: u64) -> Option<Arc<Capture>> {
        let kept = self.kept();
        let at = kept.rows.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        kept.rows.get(at).map(|(_, capture)| Arc::clone(capture))
    }

    /// Bytes in memory, also of requests that are under way.
    pub fn bytes(&self) -> u64 {
        let kept = self.kept();
        kept.bytes + kept.drafting
    }

    /// Follows a reload; false once nothing is kept.
    fn follow(&self, settings: CaptureSettings) -> bool {
        let mut kept = self.kept();
        if !settings.enabled {
            kept.clear();
        }
        kept.make_room(0, settings.total.0);
        kept.tended = !kept.rows.is_empty();
        kept.tended
    }

    /// Frees what is kept as soon as the configuration says so, without traffic too.
    fn tend(&self, handle: &Handle) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if std::mem::replace(&mut self.kept().tended, true) {
            return;
        }
        let (captures, handle) = (self.clone(), handle.clone());
        runtime.spawn(async move {
            let mut look = tokio::time::interval(LOOK_EVERY);
            loop {
                look.tick().await;
                if !captures.follow(handle.catalog().settings.captures) {
                    return;
                }
            }
        });
    }
}

/// A capture whose request is under way.
#[derive(Debug)]
pub struct Draft {
    captures: Captures,
    settings: CaptureSettings,
    /// Its share of `Kept::drafting`.
    reserved: u64,
    capture: Capture,
}

impl Draft {
    pub fn request(&mut self, headers: &HeaderMap, body: &[u8]) {
        let headers = self.afford(headers);
        self.capture.request_headers = headers;
        self.capture.request_bytes = body.len() as u64;
        let mut kept = std::mem::take(&mut self.capture.request_body);
        self.append(&mut kept, body);
        self.capture.request_body = kept;
    }

    pub fn response_head(&mut self, headers: &HeaderMap) {
        let headers = self.afford(headers);
        self.capture.response_headers = headers;
    }

    pub fn response_data(&mut self, data: &[u8]) {
        self.capture.response_bytes += data.len() as u64;
        let mut kept = std::mem::take(&mut self.capture.response_body);
        self.append(&mut kept, data);
        self.capture.response_body = kept;
    }

    /// Makes it one of the kept ones, under the id that `record` gives to its row; what the
    /// configuration says by now counts.
    pub fn keep(mut self, handle: &Handle, record: impl FnOnce(bool) -> u64) -> u64 {
        let settings = handle.catalog().settings.captures;
        let mut capture = std::mem::take(&mut self.capture);
        capture.request_body.shrink_to_fit();
        capture.response_body.shrink_to_fit();
        let cost = capture.cost();
        let mut kept = self.captures.kept();
        kept.drafting -= std::mem::take(&mut self.reserved);
        let is_kept = settings.enabled && kept.make_room(cost, settings.total.0);
        // Under the lock: who reads the row finds the capture.
        let id = record(is_kept);
        if is_kept {
            kept.bytes += cost;
            let at = kept.rows.partition_point(|(other, _)| *other < id);
            kept.rows.insert(at, (id, Arc::new(capture)));
        }
        drop(kept);
        if is_kept {
            self.captures.tend(handle);
        }
        id
    }

    fn reserve(&mut self, bytes: u64) -> bool {
        let mut kept = self.captures.kept();
        let granted = kept.make_room(bytes, self.settings.total.0);
        if granted {
            kept.drafting += bytes;
            self.reserved += bytes;
        }
        granted
    }

    fn afford(&mut self, headers: &HeaderMap) -> Headers {
        let headers = redacted(headers);
        if self.reserve(cost_of(&headers)) { headers } else { Headers::new() }
    }

    /// As much as its own bound and the room allow.
    fn append(&mut self, body: &mut Vec<u8>, data: &[u8]) {
        let limit = usize::try_from(self.settings.body.0).unwrap_or(usize::MAX);
        let wanted = body.len().saturating_add(data.len()).min(limit);
        if wanted > body.capacity() {
            let capacity = wanted.max(body.capacity().saturating_mul(2)).min(limit);
            if self.reserve((capacity - body.capacity()) as u64) {
                body.reserve_exact(capacity - body.len());
            }
        }
        let room = wanted.min(body.capacity()).saturating_sub(body.len());
        body.extend_from_slice(&data[..room]);
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        self.captures.kept().drafting -= self.reserved;
    }
}

/// Sorted by name; several values of one name are joined.
fn redacted(headers: &HeaderMap) -> Headers {
    let secrets = Secrets::default();
    let mut shown: Headers = headers
        .keys()
        .map(|name| {
            let name = name.as_str();
            if SECRET_NAMES.iter().any(|part| name.contains(part)) {
                return (name.to_owned(), MASK.to_owned());
            }
            let values = headers.get_all(name).iter();
            let values: Vec<_> =
                values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
            (name.to_owned(), secrets.redact(&values.join(", ")).into_owned())
        })
        .collect();
    shown.sort_unstable();
    shown
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::catalog::Catalog;
    use crate::units::Bytes;

    const ON: CaptureSettings =
        CaptureSettings { enabled: true, total: Bytes(64 << 10), body: Bytes(8 << 10) };

    fn handle(captures: CaptureSettings) -> Handle {
        let mut catalog = Catalog::default();
        catalog.settings.captures = captures;
        Handle::for_tests(Arc::new(catalog)).0
    }

    fn draft(captures: &Captures, request: usize, response: usize) -> Draft {
        let mut draft = captures.begin(ON, "/v1/chat/completions").unwrap();
        draft.request(&HeaderMap::new(), &vec![b'q'; request]);
        for _ in 0..response / 100 {
            draft.response_data(&[b'a'; 100]);
        }
        draft
    }

    #[tokio::test]
    async fn memory_is_bounded_however_much_comes() {
        let (captures, handle) = (Captures::default(), handle(ON));
        for id in 1..=500 {
            draft(&captures, 1 << 20, 1 << 20).keep(&handle, |_| id);
            assert!(captures.bytes() <= ON.total.0);
        }
        let newest = captures.get(500).unwrap();
        assert_eq!(newest.request_body.len(), 8 << 10);
        assert_eq!(newest.response_body.len(), 8 << 10);
        assert_eq!(newest.request_bytes, 1 << 20);
        assert_eq!(captures.get(490), None, "the oldest went first");
    }

    #[tokio::test]
    async fn requests_under_way_count_too() {
        let (captures, handle) = (Captures::default(), handle(ON));
        let drafts: Vec<Draft> = (0..100).filter_map(|_| captures.begin(ON, "/p")).collect();
        let mut drafts = drafts;
        for draft in &mut drafts {
            draft.request(&HeaderMap::new(), &[b'q'; 8 << 10]);
            assert!(captures.bytes() <= ON.total.0);
        }
        for (draft, id) in drafts.into_iter().zip(1..) {
            draft.keep(&handle, |_| id);
            assert!(captures.bytes() <= ON.total.0);
        }
        let abandoned = draft(&captures, 100, 100);
        let before = captures.bytes();
        drop(abandoned);
        assert!(captures.bytes() < before, "a dropped draft gives its room back");
        captures.follow(CaptureSettings::default());
        assert_eq!(captures.bytes(), 0);
    }

    #[tokio::test]
    async fn switching_off_frees_what_is_kept_without_any_traffic() {
        let (captures, handle) = (Captures::default(), handle(ON));
        draft(&captures, 10, 100).keep(&handle, |_| 1);
        assert!(captures.get(1).is_some());
        handle.catalog_for_tests(Catalog::default());
        let freed = async {
            while captures.bytes() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LOOK_EVERY * 20, freed).await.expect("freed");
        assert_eq!(captures.get(1), None);
        // What was under way at the reload is not kept either.
        let late = draft(&captures, 10, 100);
        assert_eq!(late.keep(&handle, |kept| if kept { 0 } else { 2 }), 2);
        assert_eq!((captures.get(2), captures.bytes()), (None, 0));
    }

    #[test]
    fn what_may_be_a_credential_is_masked() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer s3cret"),
            ("x-api-key", "s3cret"),
            ("cookie", "s3cret"),
            ("set-cookie", "s3cret"),
            ("proxy-authorization", "s3cret"),
            ("x-session-id", "s3cret"),
            ("x-note", "sk-s3cretabcdefgh"),
            ("accept", "a"),
            ("accept", "b"),
        ] {
            headers.append(name, value.parse().unwrap());
        }
        let shown = redacted(&headers);
        assert!(!format!("{shown:?}").contains("s3cret"), "{shown:?}");
        assert!(shown.contains(&("accept".to_owned(), "a, b".to_owned())));
    }
}
