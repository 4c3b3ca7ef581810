//! The time of day: tells the owner when the keep windows of a model open and close.
//!
//! The scheduler knows no clock but its own. Windows are times of day in the machine's time zone,
//! so it is the C library that says which minute of which weekday it is, over summer time and
//! stepped clocks: we look every few seconds instead of computing when the next one begins.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::handle::{Inbox, Message, Shared};
use crate::config::catalog::{Catalog, LocalTime};
use crate::scheduler::event::Event;
use crate::units::ModelName;

/// Windows are given in minutes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Until the owner ends.
pub(super) fn follow(shared: Arc<Shared>, inbox: Inbox) {
    tokio::spawn(async move {
        let mut told = Told::default();
        loop {
            let events = told.look(&shared.catalog.load_full(), local_time());
            for event in events {
                inbox.send(Message::Effect(event));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = inbox.closed() => return,
            }
        }
    });
}

/// What the owner was told.
#[derive(Default)]
struct Told {
    open: BTreeSet<ModelName>,
    of: Option<Arc<Catalog>>,
}

impl Told {
    /// What has changed since. After a reload all is told again: a model that left for a moment
    /// was forgotten.
    fn look(&mut self, catalog: &Arc<Catalog>, now: Option<LocalTime>) -> Vec<Event> {
        let Some(now) = now else { return Vec::new() };
        let is_open = |name: &&ModelName| {
            let spec = catalog.model(name);
            spec.is_some_and(|spec| spec.keep.iter().any(|window| window.is_open(now)))
        };
        let open: BTreeSet<ModelName> = catalog.models.keys().filter(is_open).cloned().collect();
        let reloaded = self.of.as_ref().is_some_and(|of| !Arc::ptr_eq(of, catalog));
        let changed = |model: &ModelName, kept| Event::KeepChanged { model: model.clone(), kept };
        let closes = self.open.difference(&open).map(|model| changed(model, false));
        let opens = open.iter().filter(|model| reloaded || !self.open.contains(*model));
        let events = closes.chain(opens.map(|model| changed(model, true))).collect();
        (self.open, self.of) = (open, Some(Arc::clone(catalog)));
        events
    }
}

/// `None`: the C library cannot say.
#[expect(unsafe_code, reason = "the time zone of the machine is known to the C library only")]
fn local_time() -> Option<LocalTime> {
    use nix::libc;
    unsafe extern "C" {
        fn tzset();
    }
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?;
    let unix = libc::time_t::try_from(unix.as_secs()).ok()?;
    let mut local = std::mem::MaybeUninit::<libc::tm>::uninit();
    // SAFETY: both pointers are valid for the call, and nobody writes the environment after the
    // start, from which `tzset` reads TZ. `tm` is initialised if `localtime_r` returns non-null.
    let local = unsafe {
        tzset();
        if libc::localtime_r(&raw const unix, local.as_mut_ptr()).is_null() {
            return None;
        }
        local.assume_init()
    };
    let minute = u16::try_from(local.tm_hour * 60 + local.tm_min).ok()?;
    // The C library's week begins on Sunday.
    let weekday = usize::try_from((local.tm_wday + 6) % 7).ok()?;
    Some(LocalTime { weekday, minute })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::catalog::{KeepWindow, ModelSpec};

    fn catalog(keep: Vec<KeepWindow>) -> Arc<Catalog> {
        let spec = ModelSpec { keep, ..ModelSpec::plain("ada") };
        let models = [(spec.name.clone(), Arc::new(spec))].into();
        Arc::new(Catalog { models, ..Catalog::default() })
    }

    fn office_hours() -> KeepWindow {
        let days = [true, true, true, true, true, false, false];
        KeepWindow { days, from_min: 8 * 60, to_min: 18 * 60 }
    }

    #[test]
    fn a_window_is_told_once_when_it_opens_and_once_when_it_closes() {
        let catalog = catalog(vec![office_hours()]);
        let mut told = Told::default();
        let kept = |kept| vec![Event::KeepChanged { model: "ada".into(), kept }];
        let mut at = |weekday, hour: u16, minute: u16| {
            told.look(&catalog, Some(LocalTime { weekday, minute: hour * 60 + minute }))
        };
        assert_eq!(at(0, 7, 59), []);
        assert_eq!(at(0, 8, 0), kept(true));
        assert_eq!(at(0, 17, 59), []);
        assert_eq!(at(0, 18, 0), kept(false));
        assert_eq!(at(4, 12, 0), kept(true));
        assert_eq!(at(5, 12, 0), kept(false));
    }

    #[test]
    fn a_reload_tells_again_what_is_open_and_closes_what_is_gone() {
        let mut told = Told::default();
        let noon = Some(LocalTime { weekday: 0, minute: 720 });
        let kept = |kept| vec![Event::KeepChanged { model: "ada".into(), kept }];
        assert_eq!(told.look(&catalog(vec![office_hours()]), noon), kept(true));
        assert_eq!(told.look(&catalog(vec![office_hours()]), noon), kept(true));
        assert_eq!(told.look(&catalog(Vec::new()), noon), kept(false));
    }

    #[test]
    fn the_machine_knows_its_time_of_day() {
        let now = local_time().unwrap();
        assert!(now.weekday < 7 && now.minute < 24 * 60, "{now:?}");
    }
}
