//! `keep:`: times of day at which a model shall be loaded.

use super::catalog::KeepWindow;
use super::decode::{At, Sink};
use super::problem::nearest;

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const WHAT: &str = "a time such as Mon-Fri 08:00-18:00";

/// One window, or a list of them.
pub(super) fn windows(at: &At<'_>, sink: &mut Sink) -> Vec<KeepWindow> {
    if !at.is_list() {
        return at.parsed(sink, WHAT, window).into_iter().collect();
    }
    let items = at.list(sink, "a list of times").unwrap_or_default();
    items.iter().filter_map(|item| item.parsed(sink, WHAT, window)).collect()
}

/// `Mon-Fri 08:00-18:00`, `Sat,Sun 10:00-02:00`, `08:00-18:00` (every day).
fn window(text: &str) -> Result<KeepWindow, String> {
    let (days, hours) = match text.trim().rsplit_once(char::is_whitespace) {
        Some((days, hours)) => (self::days(days)?, hours),
        None => ([true; 7], text.trim()),
    };
    let Some((from, to)) = hours.split_once('-') else {
        return Err("expected from-to, such as `08:00-18:00`".to_owned());
    };
    let from = minute(from)?;
    if from == 24 * 60 {
        return Err("the day begins at 00:00".to_owned());
    }
    // An end at or before the start lies on the next day, midnight among them.
    Ok(KeepWindow { days, from_min: from, to_min: minute(to)? % (24 * 60) })
}

fn minute(text: &str) -> Result<u16, String> {
    let wrong = || {
        let shown = text.trim().escape_debug();
        format!("`{shown}` is no time of day: expected 00:00 to 24:00")
    };
    let (hours, minutes) = text.trim().split_once(':').ok_or_else(wrong)?;
    let two_digits = |text: &str| match text.len() {
        1 | 2 if text.bytes().all(|b| b.is_ascii_digit()) => text.parse::<u16>().ok(),
        _ => None,
    };
    match (two_digits(hours), two_digits(minutes).filter(|_| minutes.len() == 2)) {
        (Some(24), Some(0)) => Ok(24 * 60),
        (Some(hours @ 0..24), Some(minutes @ 0..60)) => Ok(hours * 60 + minutes),
        _ => Err(wrong()),
    }
}

/// `Mon-Fri`, `Sat,Sun`, `Fri-Mon`, `Mon-Wed, Sat`.
fn days(text: &str) -> Result<[bool; 7], String> {
    let mut chosen = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        let mut day = first;
        loop {
            chosen[day] = true;
            if day == last {
                break;
            }
            day = (day + 1) % 7;
        }
    }
    Ok(chosen)
}

fn day(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let short: String = text.chars().take(3).collect();
    let found = DAYS.iter().position(|day| day.eq_ignore_ascii_case(&short));
    let whole = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    let is = |at: usize| text.len() == 3 || text.eq_ignore_ascii_case(whole[at]);
    found.filter(|at| is(*at)).ok_or_else(|| match nearest(text, DAYS.into_iter().chain(whole)) {
        Some(day) => format!("`{}` is no day: did you mean `{day}`?", text.escape_debug()),
        None => format!("`{}` is no day: expected Mon, Tue, … Sun", text.escape_debug()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_as_people_write_them() {
        let all = [true; 7];
        let read = |text| {
            let window = window(text).unwrap_or_else(|hint| panic!("{text}: {hint}"));
            (window.days, window.from_min, window.to_min)
        };
        let week = [true, true, true, true, true, false, false];
        assert_eq!(read("Mon-Fri 08:00-18:00"), (week, 480, 1080));
        assert_eq!(read("monday - friday 8:00-18:00"), (week, 480, 1080));
        assert_eq!(read("08:00-18:30"), (all, 480, 1110));
        let weekend = [false, false, false, false, false, true, true];
        assert_eq!(read("Sat,Sun 10:00-02:00"), (weekend, 600, 120));
        assert_eq!(read("Sat, Sun 10:00-24:00"), (weekend, 600, 0));
        assert_eq!(read("Sun-Mon 0:00-24:00").0, [true, false, false, false, false, false, true]);
        assert_eq!(read("0:00-24:00"), (all, 0, 0), "the whole day");
    }

    #[test]
    fn what_is_no_window_is_said() {
        for (text, hint) in [
            ("Mon-Fry 08:00-18:00", "did you mean `Fri`?"),
            ("08:00", "from-to"),
            ("8-18", "`8` is no time of day"),
            ("08:00-25:00", "`25:00` is no time of day"),
            ("24:00-02:00", "begins at 00:00"),
            ("Mon", "from-to"),
            ("", "from-to"),
        ] {
            let said = window(text).unwrap_err();
            assert!(said.contains(hint), "{text}: {said}");
        }
    }
}
