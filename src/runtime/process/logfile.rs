//! The log file of one instance: written by the engine itself, so that it outlives Wharf;
//! tailed and kept small from here.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::runtime::LogTail;
use crate::units::InstanceId;

/// Disk space above which the oldest part of a log is given back.
const DISK_BYTES_MAX: u64 = 4 << 20;
/// Kept of it then.
const DISK_BYTES_KEPT: u64 = 1 << 20;
/// Read back of an adopted instance's log: a little more than `LogTail` keeps.
const REREAD_BYTES: u64 = 128 << 10;
/// Read at most per call, so that a chatty engine does not hold up the look-out for its exit.
const READ_BYTES_MAX: usize = 1 << 20;
/// Of those, at a stretch: no word comes of what was written before.
const READS_MAX: u32 = 16;
/// A line that does not end is cut here.
const LINE_BYTES_MAX: usize = 8 << 10;
/// Logs of ended instances kept for their readers.
const ENDED_LOGS_KEPT: usize = 32;

pub fn path(dir: &Path, instance: InstanceId) -> PathBuf {
    dir.join(format!("instance-{instance}.log"))
}

/// For the engine's stdout and stderr. Appending keeps two writers apart, and keeps the engine
/// writing at the end after the file was cut.
pub fn create(path: &Path) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Removes the logs of all but the newest ended instances.
pub fn prune(dir: &Path, is_live: impl Fn(InstanceId) -> bool) {
    let mut ended: Vec<u64> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let id = name.to_str()?.strip_prefix("instance-i")?.strip_suffix(".log")?;
            id.parse().ok()
        })
        .filter(|id| !is_live(InstanceId(*id)))
        .collect();
    ended.sort_unstable_by(|a, b| b.cmp(a));
    for id in ended.into_iter().skip(ENDED_LOGS_KEPT) {
        // Another try comes with the next start.
        let _ = std::fs::remove_file(path(dir, InstanceId(id)));
    }
}

#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    file: File,
    offset: u64,
    partial: Vec<u8>,
    log: LogTail,
}

impl Tail {
    /// Follows the file from its beginning.
    pub fn open(path: &Path, log: LogTail) -> io::Result<Tail> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Tail { path: path.to_owned(), file, offset: 0, partial: Vec::new(), log })
    }

    /// Follows the file of an adopted instance, from its last full lines.
    pub fn reopen(path: &Path, log: LogTail) -> io::Result<Tail> {
        let mut tail = Tail::open(path, log)?;
        let size = tail.file.metadata()?.len();
        if size > REREAD_BYTES {
            tail.offset = size - REREAD_BYTES;
            let mut head = vec![0; LINE_BYTES_MAX];
            let read = tail.file.read_at(&mut head, tail.offset)?;
            let cut = head[..read].iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            tail.offset += cut as u64;
        }
        Ok(tail)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what is new, to its end or until much was read.
    pub fn read_all(&mut self) -> io::Result<()> {
        for _ in 0..READS_MAX {
            if !self.read_new()? {
                break;
            }
        }
        Ok(())
    }

    /// Reads what is new. Returns whether there was anything.
    pub fn read_new(&mut self) -> io::Result<bool> {
        if self.file.metadata()?.len() < self.offset {
            // Somebody else cut the file.
            self.offset = 0;
        }
        let mut buffer = vec![0; 64 << 10];
        let mut total = 0;
        while total < READ_BYTES_MAX {
            let read = self.file.read_at(&mut buffer, self.offset)?;
            if read == 0 {
                break;
            }
            self.offset += read as u64;
            total += read;
            self.split(&buffer[..read]);
        }
        if total > 0 {
            if !self.partial.is_empty() {
                self.log.grow(&String::from_utf8_lossy(&self.partial));
            }
            self.keep_small()?;
        }
        Ok(total > 0)
    }

    /// The last line, should it lack its end.
    pub fn finish(&mut self) {
        while self.read_new().is_ok_and(|read| read) {}
        self.end_line();
    }

    /// Progress bars redraw their line with a carriage return: each state is a line here.
    fn split(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' | b'\r' => self.end_line(),
                0 => {}
                byte => {
                    self.partial.push(*byte);
                    if self.partial.len() >= LINE_BYTES_MAX {
                        self.end_line();
                    }
                }
            }
        }
    }

    fn end_line(&mut self) {
        if !self.partial.is_empty() {
            self.log.push(&String::from_utf8_lossy(&self.partial));
            self.partial.clear();
        }
    }

    fn keep_small(&mut self) -> io::Result<()> {
        const BLOCK: u64 = 512;
        if self.file.metadata()?.blocks() * BLOCK <= DISK_BYTES_MAX {
            return Ok(());
        }
        // After a burst most of it may be unread: that stays.
        let cut = self.offset.saturating_sub(DISK_BYTES_KEPT).cast_signed();
        if cut == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if fallocate(&self.file, flags, 0, cut).is_err() {
            // A file system without holes: all of it goes, once all of it was read. Lines written
            // in this very moment are lost.
            if self.file.metadata()?.len() > self.offset {
                return Ok(());
            }
            self.file.set_len(0)?;
            self.offset = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn lines_come_whole_whatever_ends_them() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = path(dir.path(), InstanceId(1));
        let mut file = create(&path).expect("a file");
        let log = LogTail::new();
        let mut tail = Tail::open(&path, log.clone()).expect("a tail");
        file.write_all(b"one\r\ntwo 10%\rtwo 20%\rthr").expect("written");
        assert!(tail.read_new().expect("read"));
        assert_eq!(log.last(9), ["one", "two 10%", "two 20%"]);
        file.write_all(b"ee").expect("written");
        tail.finish();
        assert_eq!(log.last(1), ["three"]);
        assert!(!tail.read_new().expect("read"));
    }

    #[test]
    fn the_file_stays_small_and_loses_nothing_new() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = path(dir.path(), InstanceId(1));
        let mut file = create(&path).expect("a file");
        let log = LogTail::new();
        let mut tail = Tail::open(&path, log.clone()).expect("a tail");
        let line = "x".repeat(1000);
        for n in 0..20_000 {
            writeln!(file, "{n} {line}").expect("written");
            if n % 100 == 0 {
                tail.read_new().expect("read");
            }
        }
        tail.finish();
        let disk = std::fs::metadata(&path).expect("there").blocks() * 512;
        assert!(disk <= DISK_BYTES_MAX + (1 << 20), "{disk} bytes on disk");
        assert!(log.last(1)[0].starts_with("19999 "));

        let again = LogTail::new();
        Tail::reopen(&path, again.clone()).expect("a tail").finish();
        let lines = again.last(usize::MAX);
        assert!(lines.len() > 50, "{}", lines.len());
        assert!(lines.iter().all(|line| line.len() > 1000), "only whole lines");
    }

    #[test]
    fn a_line_that_grows_is_told_of_before_it_ends() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = path(dir.path(), InstanceId(1));
        let mut file = create(&path).expect("a file");
        let log = LogTail::new();
        let mut tail = Tail::open(&path, log.clone()).expect("a tail");
        let mut unfinished = log.unfinished();
        for dots in [".", "..", "..."] {
            file.write_all(b".").expect("written");
            tail.read_new().expect("read");
            assert!(unfinished.has_changed().expect("a sender"));
            assert_eq!(&**unfinished.borrow_and_update(), dots);
        }
        tail.read_new().expect("read");
        assert!(!unfinished.has_changed().expect("a sender"), "nothing was written");
        file.write_all(b"\n").expect("written");
        tail.read_new().expect("read");
        assert!(!unfinished.has_changed().expect("a sender"), "it ended");
        assert_eq!(log.last(9), ["..."]);
    }

    #[test]
    fn a_burst_larger_than_what_is_kept_is_read_to_its_end() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = path(dir.path(), InstanceId(1));
        let mut file = create(&path).expect("a file");
        let log = LogTail::new();
        let mut tail = Tail::open(&path, log.clone()).expect("a tail");
        file.write_all(&b"loading\n".repeat(600 << 10)).expect("written");
        file.write_all(b"CUDA out of memory\n").expect("written");
        assert!(tail.read_new().expect("read"));
        assert_eq!(tail.offset, READ_BYTES_MAX as u64, "the first look ends within the burst");
        tail.finish();
        assert_eq!(log.last(1), ["CUDA out of memory"]);
        let disk = std::fs::metadata(&path).expect("there").blocks() * 512;
        assert!(disk <= DISK_BYTES_MAX, "{disk} bytes on disk");
    }

    #[test]
    fn only_the_newest_ended_logs_are_kept() {
        let dir = tempfile::tempdir().expect("a folder");
        for id in 0..50 {
            create(&path(dir.path(), InstanceId(id))).expect("a file");
        }
        prune(dir.path(), |id| id == InstanceId(3));
        let exists = |id| path(dir.path(), InstanceId(id)).exists();
        assert!(exists(3) && exists(49) && exists(18) && !exists(17) && !exists(2));
    }
}
