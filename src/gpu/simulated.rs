//! GPUs that exist only in the configuration. Stand-in engines enter what they hold in a ledger,
//! a folder with one JSON file for each process:
//!
//! `<pid>.json`: `{"pid", "start_ticks", "gpus": [0], "bytes": per GPU, "label", "instance"}`
//!
//! A living process holds its bytes. After its death they stay held for the release lag, as with
//! a real driver, counted from when the death was noticed; then the file is removed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::{Gpu, GpuError, gpu_id};
use crate::config::catalog::GpuSettings;
use crate::runtime::process::procfs;
use crate::scheduler::event::{GpuMemory, Holder, NoProof};
use crate::units::Bytes;

/// A larger file is no entry.
const ENTRY_BYTES_MAX: u64 = 64 * 1024;
/// More files are not looked at.
const ENTRIES_MAX: usize = 4096;

#[derive(Clone, Debug, Deserialize)]
struct Entry {
    pid: u32,
    start_ticks: u64,
    gpus: Vec<u16>,
    bytes: u64,
    #[serde(default)]
    label: String,
}

#[derive(Clone, Debug)]
pub struct Ledger(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    gpus: Vec<Gpu>,
    foreign: Vec<Bytes>,
    release_lag: Duration,
    /// (pid, start ticks) → when the death was noticed.
    dead: Mutex<BTreeMap<(u32, u64), Instant>>,
}

pub fn gpus(settings: &GpuSettings) -> Vec<Gpu> {
    let simulated = |(at, total): (usize, &Bytes)| Gpu {
        id: gpu_id(at),
        uuid: format!("SIM-{at}"),
        name: format!("simulated {total}"),
        total: *total,
    };
    settings.memory.iter().enumerate().map(simulated).collect()
}

impl Ledger {
    pub fn open(settings: &GpuSettings, folder: &Path) -> Result<Ledger, GpuError> {
        if settings.memory.is_empty() {
            return Err(GpuError(
                "gpu.provider is `simulated`, but gpu.memory declares no GPU: add e.g. \
                 `memory: [24GiB]`"
                    .to_owned(),
            ));
        }
        // Engines get the path in their environment and may run in another folder.
        let absolute = std::path::absolute(folder).and_then(|folder| {
            std::fs::create_dir_all(&folder)?;
            Ok(folder)
        });
        let folder = absolute.map_err(|error| {
            GpuError(format!(
                "cannot make the folder {} of the simulated GPUs: {error}",
                folder.display()
            ))
        })?;
        Ok(Ledger(Arc::new(Shared {
            folder,
            gpus: gpus(settings),
            foreign: settings.foreign.clone(),
            release_lag: settings.release_lag,
            dead: Mutex::default(),
        })))
    }

    pub fn folder(&self) -> &Path {
        &self.0.folder
    }

    pub async fn sample(&self) -> Result<Vec<GpuMemory>, NoProof> {
        let shared = Arc::clone(&self.0);
        let read = tokio::task::spawn_blocking(move || shared.read());
        read.await.unwrap_or_else(|error| {
            Err(NoProof { message: format!("reading the simulated GPUs failed: {error}") })
        })
    }
}

impl Shared {
    fn read(&self) -> Result<Vec<GpuMemory>, NoProof> {
        let mut memory: Vec<GpuMemory> = self.gpus.iter().map(empty).collect();
        for (gpu, bytes) in memory.iter_mut().zip(&self.foreign) {
            take(gpu, 0, *bytes, "stranger (simulated)");
        }
        for (entry, alive) in self.entries()? {
            let ended = if alive { "" } else { " (exited)" };
            for at in &entry.gpus {
                if let Some(gpu) = memory.get_mut(usize::from(*at)) {
                    let label = format!("{}{ended}", entry.label);
                    take(gpu, entry.pid, Bytes(entry.bytes), &label);
                }
            }
        }
        Ok(memory)
    }

    /// What still holds memory, and whether it lives.
    fn entries(&self) -> Result<Vec<(Entry, bool)>, NoProof> {
        let mut dead = self.dead.lock().unwrap_or_else(PoisonError::into_inner);
        let mut held = Vec::new();
        let mut seen = Vec::new();
        for path in self.files()? {
            // A file that is half written or broken counts as absent.
            let Some(entry) = parse(&path) else { continue };
            let key = (entry.pid, entry.start_ticks);
            let lives = procfs::stat(entry.pid)
                .is_some_and(|stat| stat.start_ticks == entry.start_ticks && !stat.is_gone());
            if lives {
                held.push((entry, true));
                continue;
            }
            let noticed = *dead.entry(key).or_insert_with(Instant::now);
            if noticed.elapsed() < self.release_lag {
                seen.push(key);
                held.push((entry, false));
            } else if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot remove a dead engine's entry");
            }
        }
        dead.retain(|key, _| seen.contains(key));
        Ok(held)
    }

    fn files(&self) -> Result<Vec<PathBuf>, NoProof> {
        let folder = match std::fs::read_dir(&self.folder) {
            Ok(folder) => folder,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                let folder = self.folder.display();
                return Err(NoProof { message: format!("cannot read {folder}: {error}") });
            }
        };
        let paths = folder.flatten().map(|file| file.path());
        let json = paths.filter(|path| path.extension().is_some_and(|end| end == "json"));
        Ok(json.take(ENTRIES_MAX).collect())
    }
}

fn parse(path: &Path) -> Option<Entry> {
    if std::fs::metadata(path).ok()?.len() > ENTRY_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn empty(gpu: &Gpu) -> GpuMemory {
    GpuMemory {
        gpu: gpu.id,
        uuid: gpu.uuid.clone(),
        total: gpu.total,
        free: gpu.total,
        holders: Vec::new(),
    }
}

fn take(gpu: &mut GpuMemory, pid: u32, bytes: Bytes, label: &str) {
    if bytes == Bytes::ZERO {
        return;
    }
    gpu.free -= bytes;
    gpu.holders.push(Holder { pid, bytes, label: label.to_owned(), instance: None });
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::config::catalog::GpuProvider;

    fn ledger(folder: &Path, release_lag: Duration, foreign: Vec<Bytes>) -> Ledger {
        let settings = GpuSettings {
            provider: GpuProvider::Simulated,
            reserve: Bytes::ZERO,
            memory: vec![Bytes::gib(24), Bytes::gib(24)],
            release_lag,
            foreign,
        };
        Ledger::open(&settings, folder).expect("a ledger")
    }

    fn engine(folder: &Path, gpus: &[u16], bytes: Bytes) -> (Child, PathBuf) {
        let child = Command::new("sleep").arg("600").spawn().expect("a process");
        let pid = child.id();
        let start_ticks = procfs::stat(pid).expect("its stat").start_ticks;
        let entry = serde_json::json!({
            "pid": pid, "start_ticks": start_ticks, "gpus": gpus, "bytes": bytes.0,
            "label": "wharf engine a", "instance": "i1",
        });
        let path = folder.join(format!("{pid}.json"));
        std::fs::write(&path, entry.to_string()).expect("written");
        (child, path)
    }

    fn end(mut child: Child) {
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    #[tokio::test]
    async fn the_living_hold_their_bytes_and_strangers_theirs() {
        let folder = tempfile::tempdir().expect("a folder");
        let ledger = ledger(folder.path(), Duration::ZERO, vec![Bytes::gib(2)]);
        let (child, _) = engine(folder.path(), &[0, 1, 9], Bytes::gib(10));
        let sample = ledger.sample().await.expect("a sample");
        assert_eq!(sample[0].free, Bytes::gib(12));
        assert_eq!(sample[1].free, Bytes::gib(14));
        assert_eq!(sample[0].holders[0].label, "stranger (simulated)");
        assert_eq!(sample[0].holders[1].pid, child.id());
        assert_eq!(sample[0].holders[1].label, "wharf engine a");
        end(child);
    }

    #[tokio::test]
    async fn the_dead_hold_them_for_the_release_lag() {
        let folder = tempfile::tempdir().expect("a folder");
        let lag = Duration::from_millis(300);
        let ledger = ledger(folder.path(), lag, Vec::new());
        let (child, path) = engine(folder.path(), &[0], Bytes::gib(10));
        ledger.sample().await.expect("a sample");
        end(child);
        let noticed = Instant::now();
        let sample = ledger.sample().await.expect("a sample");
        assert_eq!(sample[0].free, Bytes::gib(14));
        assert_eq!(sample[0].holders[0].label, "wharf engine a (exited)");
        while ledger.sample().await.expect("a sample")[0].free < Bytes::gib(24) {
            assert!(noticed.elapsed() < Duration::from_secs(20), "never released");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(noticed.elapsed() >= lag, "released after {:?}", noticed.elapsed());
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_zombie_and_a_reused_pid_hold_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let ledger = ledger(folder.path(), Duration::ZERO, Vec::new());
        let (mut zombie, _) = engine(folder.path(), &[0], Bytes::gib(1));
        zombie.kill().expect("killed");
        let entry = serde_json::json!({
            "pid": std::process::id(), "start_ticks": 1, "gpus": [0], "bytes": 1 << 30,
            "label": "an earlier process", "instance": null,
        });
        std::fs::write(folder.path().join("reused.json"), entry.to_string()).expect("written");
        let began = Instant::now();
        while ledger.sample().await.expect("a sample")[0].free < Bytes::gib(24) {
            assert!(began.elapsed() < Duration::from_secs(20), "a zombie holds memory");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        zombie.wait().expect("reaped");
    }

    #[tokio::test]
    async fn broken_files_are_ignored() {
        let folder = tempfile::tempdir().expect("a folder");
        let ledger = ledger(folder.path(), Duration::ZERO, Vec::new());
        std::fs::write(folder.path().join("1.json"), "{\"pid\": 1, \"start").expect("written");
        std::fs::write(folder.path().join("2.json"), "\u{0}\u{1}").expect("written");
        std::fs::write(folder.path().join("3.json"), vec![b' '; 1 << 20]).expect("written");
        std::fs::create_dir(folder.path().join("4.json")).expect("a folder");
        assert_eq!(ledger.sample().await.expect("a sample")[0].free, Bytes::gib(24));
    }
}
