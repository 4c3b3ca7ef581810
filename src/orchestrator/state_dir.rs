//! The state folder: lock, installation id, reserved ids, journal, engine logs.
//! What changes in it while Wharf runs is written by `state_writer` and `journal`.
//!
//! Everything here is small and may be lost without losing correctness, except the lock (two
//! Wharfs would fight over the same GPUs) and the installation id (without it, instances of an
//! earlier run would be strangers).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::store::Figures;
use crate::units::ModelName;

/// Says that containers were started.
pub const DOCKER: &str = "docker";
/// Of learned figures, before the store kept them.
const LEARNED: &str = "learned.json";
pub const LAST_INSTANCE: &str = "last_id";
pub const LAST_SWAP: &str = "last_swap";

/// Of instances and of swaps, which count apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastIds {
    pub instance: u64,
    pub swap: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(
        "another wharf already uses {path} (its lock is held): stop it, or give this one another `store:`"
    )]
    Locked { path: PathBuf },
    #[error("failed to use the state folder {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    pub installation: String,
    /// Held as long as we live.
    _lock: Flock<File>,
}

impl StateDir {
    pub fn open(path: &Path) -> Result<StateDir, StateError> {
        let io = |source| StateError::Io { path: path.to_owned(), source };
        for dir in [path.to_owned(), path.join("logs"), path.join("journal"), path.join("vram")] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io)?;
        }
        let path = path.canonicalize().map_err(io)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(io)?;
        let lock =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, error)| match error {
                    Errno::EWOULDBLOCK => StateError::Locked { path: path.clone() },
                    error => io(error.into()),
                },
            )?;
        let installation = installation_id(&path.join("installation")).map_err(io)?;
        Ok(StateDir { path, installation, _lock: lock })
    }

    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    pub fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    /// Where stand-in engines declare simulated memory.
    pub fn vram_ledger(&self) -> PathBuf {
        self.path.join("vram")
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// No id that was ever used here is larger.
    pub fn last_ids(&self) -> LastIds {
        let instance = self.number(LAST_INSTANCE).unwrap_or(0);
        // Instances and swaps once shared one count.
        LastIds { instance, swap: self.number(LAST_SWAP).unwrap_or(instance) }
    }

    fn number(&self, name: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(name)).ok()?.trim().parse().ok()
    }

    /// Containers of this installation may be there, whatever the configuration says now.
    pub fn ever_used_docker(&self) -> bool {
        self.path.join(DOCKER).exists()
    }

    /// Docker was looked through and holds nothing of ours, and no model uses it.
    pub fn forget_docker(&self) {
        // Left, it costs one more look.
        let _ = fs::remove_file(self.path.join(DOCKER));
    }

    /// Figures that a Wharf without a store for them left here.
    pub fn old_learned(&self) -> BTreeMap<ModelName, Figures> {
        let Ok(text) = fs::read(self.path.join(LEARNED)) else { return BTreeMap::new() };
        serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(%error, "learned.json is not readable: starting without its figures");
            BTreeMap::new()
        })
    }

    /// The store has them.
    pub fn forget_old_learned(&self) {
        // Left, it is read once more, and what the store has goes before it.
        let _ = fs::rename(self.path.join(LEARNED), self.path.join("learned.json.imported"));
    }
}

fn installation_id(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Ok(id) if !id.trim().is_empty() => return Ok(id.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // A new id would make strangers of everything that still runs.
        Err(error) => return Err(error),
    }
    let mut random = [0_u8; 8];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(path, &id)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_wharf_is_kept_out_and_the_identity_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wharf.d");
        let first = StateDir::open(&path).unwrap();
        assert!(matches!(StateDir::open(&path), Err(StateError::Locked { .. })));
        fs::write(path.join(LAST_INSTANCE), "41").unwrap();
        let installation = first.installation.clone();
        drop(first);
        let again = StateDir::open(&path).unwrap();
        assert_eq!(again.installation, installation);
        let none_of_its_own = LastIds { instance: 41, swap: 41 };
        assert_eq!(again.last_ids(), none_of_its_own);
        fs::write(path.join(LAST_SWAP), "7").unwrap();
        assert_eq!(again.last_ids(), LastIds { instance: 41, swap: 7 });
    }

    #[test]
    fn an_identity_that_cannot_be_read_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wharf.d");
        drop(StateDir::open(&path).unwrap());
        fs::write(path.join("installation"), b"\xff\xfe").unwrap();
        assert!(matches!(StateDir::open(&path), Err(StateError::Io { .. })));
        assert_eq!(fs::read(path.join("installation")).unwrap(), b"\xff\xfe");
    }
}
