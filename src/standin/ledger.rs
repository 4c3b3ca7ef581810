//! Simulated GPU memory: what this engine holds, in a file of its own in a shared folder.
//!
//! The simulated GPU reads the folder. The file is not removed at exit, as memory of a real GPU
//! is not free the moment its process is gone; the simulation removes it after its release lag.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::runtime::process::procfs;
use crate::units::Bytes;

/// Folder of the entries.
pub const FOLDER: &str = "WHARF_VRAM_LEDGER";
/// Total bytes of each GPU of the machine, by position: `25769803776,25769803776`.
pub const TOTAL: &str = "WHARF_VRAM_TOTAL";
/// Positions of the GPUs given to this engine: `0,1`.
const GPUS: &str = "WHARF_GPUS";
const INSTANCE: &str = "WHARF_INSTANCE";

/// One file, `<pid>.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub pid: u32,
    pub start_ticks: u64,
    pub gpus: Vec<u16>,
    /// On each of `gpus`.
    pub bytes: u64,
    pub label: String,
    pub instance: Option<String>,
}

#[derive(Debug)]
pub struct Ledger {
    folder: PathBuf,
    entry: Entry,
    totals: Vec<Bytes>,
}

/// What a claim met.
#[derive(Debug, PartialEq, Eq)]
pub struct Shortage {
    pub gpu: u16,
    pub total: Bytes,
    pub free: Bytes,
    pub wanted: Bytes,
}

impl Ledger {
    /// `None` without a ledger folder or without a GPU. `owner` is the process that holds the
    /// memory.
    pub fn from_env(owner: u32, label: &str) -> Option<Ledger> {
        let var = |key| std::env::var(key).ok();
        let folder = PathBuf::from(var(FOLDER)?);
        let gpus: Vec<u16> = match var(GPUS) {
            Some(gpus) => gpus.split(',').filter_map(|gpu| gpu.trim().parse().ok()).collect(),
            None => vec![0],
        };
        if gpus.is_empty() {
            return None;
        }
        let totals = var(TOTAL).unwrap_or_default();
        let totals = totals.split(',').filter_map(|total| total.trim().parse().ok().map(Bytes));
        let start_ticks = procfs::stat(owner)?.start_ticks;
        let entry = Entry {
            pid: owner,
            start_ticks,
            gpus,
            bytes: 0,
            label: label.to_owned(),
            instance: var(INSTANCE),
        };
        Some(Ledger { folder, entry, totals: totals.collect() })
    }

    /// Total memory of the smallest GPU used, where it is known.
    pub fn total(&self) -> Option<Bytes> {
        self.entry.gpus.iter().filter_map(|gpu| self.total_of(*gpu)).min()
    }

    fn total_of(&self, gpu: u16) -> Option<Bytes> {
        self.totals.get(usize::from(gpu)).copied()
    }

    /// Would `bytes` on each GPU fit beside what others hold?
    pub fn room_for(&self, bytes: Bytes) -> Result<(), Shortage> {
        let held = held_by_others(&self.folder, self.entry.pid);
        for gpu in &self.entry.gpus {
            let Some(total) = self.total_of(*gpu) else { continue };
            let free = total.saturating_sub(held.get(gpu).copied().unwrap_or_default());
            if free < bytes {
                return Err(Shortage { gpu: *gpu, total, free, wanted: bytes });
            }
        }
        Ok(())
    }

    /// Holds `bytes` on each GPU from now on. Of two engines that grow into the same memory at
    /// least one sees the shortage, since both write before they look.
    pub fn hold(&mut self, bytes: Bytes) -> io::Result<Result<(), Shortage>> {
        self.entry.bytes = bytes.0;
        std::fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{}.json", self.entry.pid));
        let new = path.with_extension("json.tmp");
        std::fs::write(&new, serde_json::to_vec(&self.entry)?)?;
        std::fs::rename(&new, &path)?;
        Ok(self.room_for(bytes))
    }
}

/// Bytes on each GPU held by living processes other than `except`.
fn held_by_others(folder: &Path, except: u32) -> BTreeMap<u16, Bytes> {
    let mut held = BTreeMap::<u16, Bytes>::new();
    for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = file.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let entry = std::fs::read(&path).ok();
        let entry = entry.and_then(|text| serde_json::from_slice::<Entry>(&text).ok());
        let Some(entry) = entry.filter(|entry| entry.pid != except) else { continue };
        let lives = procfs::stat(entry.pid)
            .is_some_and(|stat| stat.start_ticks == entry.start_ticks && !stat.is_gone());
        if lives {
            for gpu in entry.gpus {
                *held.entry(gpu).or_default() += Bytes(entry.bytes);
            }
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(folder: &Path, pid: u32, gpus: &[u16]) -> Ledger {
        let start_ticks = procfs::stat(pid).expect("a living process").start_ticks;
        let entry = Entry {
            pid,
            start_ticks,
            gpus: gpus.to_vec(),
            bytes: 0,
            label: "test".into(),
            instance: None,
        };
        Ledger { folder: folder.to_owned(), entry, totals: vec![Bytes::gib(24), Bytes::gib(16)] }
    }

    #[test]
    fn a_claim_beyond_the_total_is_a_shortage() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut other = std::process::Command::new("sleep").arg("600").spawn().expect("a process");
        let mut one = ledger(folder.path(), std::process::id(), &[0, 1]);
        let mut two = ledger(folder.path(), other.id(), &[1]);
        assert_eq!(one.total(), Some(Bytes::gib(16)));
        assert_eq!(one.hold(Bytes::gib(10)).expect("written"), Ok(()));
        let shortage =
            Shortage { gpu: 1, total: Bytes::gib(16), free: Bytes::gib(6), wanted: Bytes::gib(9) };
        assert_eq!(two.room_for(Bytes::gib(9)), Err(shortage));
        assert_eq!(two.hold(Bytes::gib(6)).expect("written"), Ok(()));
        assert!(one.hold(Bytes::gib(11)).expect("written").is_err());

        other.kill().expect("killed");
        other.wait().expect("reaped");
        assert_eq!(one.hold(Bytes::gib(11)).expect("written"), Ok(()), "the dead hold nothing");
    }
}
