//! Brings files into the page cache before somebody reads them, on a thread of its own.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tokio_util::sync::CancellationToken;

use crate::units::Bytes;

/// The kernel reads at most so much for one piece of advice, whatever was asked for.
const ADVICE_BYTES: u64 = 128 << 10;
/// Asked for at a time; the next is asked for before this one has come.
const WINDOW_BYTES: u64 = 4 << 20;
const WINDOWS_AHEAD: u64 = 4;
/// Between two looks at the memory that is left.
const LOOK_BYTES: u64 = 64 << 20;

/// How much may be read.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of all files together.
    pub most: Bytes,
    /// Memory that must stay available, and that is no more filled with what is read: the cache counts
    /// as available, and would push its own beginning out.
    pub reserve: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Whole,
    /// Called off.
    Stopped,
    /// `Bounds::most` is reached.
    Limit,
    /// More would leave too little memory.
    Memory,
}

#[derive(Clone, Copy, Debug)]
pub struct Done {
    pub read: Bytes,
    pub total: Bytes,
    pub took: Duration,
    pub end: End,
}

/// Blocks until the files are in the cache, or until it is stopped or bounded. What cannot be read
/// is left out: whoever needs it says so. `available`: memory that can be had; `told`: how far it
/// is, of how much.
pub fn read_ahead(
    files: &[PathBuf],
    bounds: Bounds,
    stop: &CancellationToken,
    available: impl Fn() -> Option<Bytes>,
    told: impl FnMut(Bytes, Bytes),
) -> Done {
    let began = Instant::now();
    let room = available().map_or(Bytes::MAX, |all| Bytes(all.0.saturating_sub(bounds.reserve.0)));
    let opened = files.iter().filter_map(|path| {
        let file = File::open(path).ok()?;
        let bytes = file.metadata().ok()?.len();
        Some((file, bytes))
    });
    let files: Vec<(File, u64)> = opened.collect();
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    let mut reading = Reading { bounds, room, stop, available, told, read: 0, total };
    let end = files.iter().find_map(|(file, bytes)| reading.file(file, *bytes));
    let (read, took) = (Bytes(reading.read), began.elapsed());
    Done { read, total: Bytes(total), took, end: end.unwrap_or(End::Whole) }
}

struct Reading<'a, A, T> {
    bounds: Bounds,
    /// What was available at the beginning, but for the reserve.
    room: Bytes,
    stop: &'a CancellationToken,
    available: A,
    told: T,
    read: u64,
    total: u64,
}

impl<A: Fn() -> Option<Bytes>, T: FnMut(Bytes, Bytes)> Reading<'_, A, T> {
    /// `None`: the next one.
    fn file(&mut self, file: &File, bytes: u64) -> Option<End> {
        let (mut at, mut advised) = (0, 0);
        while at < bytes {
            let window = WINDOW_BYTES.min(bytes - at);
            if let Some(end) = self.must_end(window) {
                return Some(end);
            }
            let until = (at + WINDOW_BYTES * WINDOWS_AHEAD).min(bytes);
            while advised < until {
                advise(file, advised, ADVICE_BYTES);
                advised += ADVICE_BYTES;
            }
            at += window;
            // Waits until this window is there: no more is under way than those ahead of it.
            file.read_exact_at(&mut [0], at - 1).ok()?;
            self.read += window;
            (self.told)(Bytes(self.read), Bytes(self.total));
        }
        None
    }

    fn must_end(&self, window: u64) -> Option<End> {
        if self.stop.is_cancelled() {
            return Some(End::Stopped);
        }
        if self.read + window > self.bounds.most.0 {
            return Some(End::Limit);
        }
        if self.read + window > self.room.0 {
            return Some(End::Memory);
        }
        // Others take memory meanwhile.
        let look = self.read % LOOK_BYTES < WINDOW_BYTES;
        let wanted = self.bounds.reserve + Bytes(LOOK_BYTES + WINDOW_BYTES * WINDOWS_AHEAD);
        let short = look && (self.available)().is_some_and(|left| left < wanted);
        short.then_some(End::Memory)
    }
}

/// A file system that does not take advice reads when it is asked to.
fn advise(file: &File, at: u64, bytes: u64) {
    let willneed = PosixFadviseAdvice::POSIX_FADV_WILLNEED;
    let _ = posix_fadvise(file, at.cast_signed(), bytes.cast_signed(), willneed);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLENTY: Option<Bytes> = Some(Bytes::MAX);

    fn files(dir: &std::path::Path, windows: &[u64]) -> Vec<PathBuf> {
        let file = |(n, windows): (usize, &u64)| {
            let path = dir.join(format!("{n}"));
            File::create(&path).expect("made").set_len(windows * WINDOW_BYTES + 1).expect("sized");
            path
        };
        windows.iter().enumerate().map(file).collect()
    }

    fn bounds(most: Bytes) -> Bounds {
        Bounds { most, reserve: Bytes::gib(1) }
    }

    #[test]
    fn all_files_are_read_and_what_is_not_there_is_left_out() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut files = files(dir.path(), &[2, 1]);
        files.insert(1, dir.path().join("gone"));
        let mut last = (Bytes::ZERO, Bytes::ZERO);
        let stop = CancellationToken::new();
        let told = |read, total| last = (read, total);
        let done = read_ahead(&files, bounds(Bytes::MAX), &stop, || PLENTY, told);
        let all = Bytes(3 * WINDOW_BYTES + 2);
        assert_eq!((done.end, done.read, done.total), (End::Whole, all, all));
        assert_eq!(last, (all, all));
    }

    #[test]
    fn it_ends_when_it_is_called_off() {
        let dir = tempfile::tempdir().expect("a folder");
        let (files, stop) = (files(dir.path(), &[8]), CancellationToken::new());
        let told = |read, _| {
            if read == Bytes(2 * WINDOW_BYTES) {
                stop.cancel();
            }
        };
        let done = read_ahead(&files, bounds(Bytes::MAX), &stop, || PLENTY, told);
        assert_eq!((done.end, done.read), (End::Stopped, Bytes(2 * WINDOW_BYTES)));
    }

    #[test]
    fn neither_the_limit_nor_the_reserve_is_passed() {
        let dir = tempfile::tempdir().expect("a folder");
        let (files, stop) = (files(dir.path(), &[40]), CancellationToken::new());
        let most = bounds(Bytes(3 * WINDOW_BYTES));
        let done = read_ahead(&files, most, &stop, || PLENTY, |_, _| {});
        assert_eq!((done.end, done.read), (End::Limit, most.most));
        // What is read stays "available" in the kernel's words.
        let available = || Some(Bytes((1 << 30) + 30 * WINDOW_BYTES));
        let done = read_ahead(&files, bounds(Bytes::MAX), &stop, available, |_, _| {});
        assert_eq!((done.end, done.read), (End::Memory, Bytes(30 * WINDOW_BYTES)));
        // Somebody else takes it.
        let read = std::cell::Cell::new(0);
        let available = || Some(Bytes((1 << 30) + (200 << 20) - 2 * read.get()));
        let told = |now: Bytes, _| read.set(now.0);
        let done = read_ahead(&files, bounds(Bytes::MAX), &stop, available, told);
        assert_eq!(done.end, End::Memory);
        assert!(done.read.0 > 0 && done.read <= Bytes(100 << 20), "{}", done.read);
    }
}
