//! The SQLite file: opening it without ever writing to one that is not ours or not whole, its
//! layout, and the statements.

use std::fs::{self, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, TransactionBehavior, params};
use serde::de::DeserializeOwned;

use super::rows::{Batch, Kind, Loaded, Rows};
use super::trouble::Trouble;
use super::{Activity, SwapRow};
use crate::config::catalog::Retention;
use crate::units::{ModelName, SwapId};

/// "Whrf": tells our files from those of other programs.
const APPLICATION_ID: i64 = 0x5768_7266;
/// One step per version of the layout; the file's `user_version` counts those it has had.
/// Never edit one that was released: add another.
const MIGRATIONS: [&str; 2] = [
    "CREATE TABLE activity (id INTEGER PRIMARY KEY AUTOINCREMENT, at_unix_ms INTEGER NOT NULL,
         model TEXT NOT NULL, body TEXT NOT NULL);
     CREATE INDEX activity_at ON activity (at_unix_ms);
     CREATE TABLE swaps (id INTEGER PRIMARY KEY AUTOINCREMENT, at_unix_ms INTEGER NOT NULL,
         swap INTEGER NOT NULL, model TEXT NOT NULL, body TEXT NOT NULL);
     CREATE INDEX swaps_at ON swaps (at_unix_ms);
     CREATE TABLE kept (kind TEXT NOT NULL, name TEXT NOT NULL, body TEXT NOT NULL,
         PRIMARY KEY (kind, name)) WITHOUT ROWID;",
    "CREATE INDEX swaps_swap ON swaps (swap);
     CREATE INDEX swaps_model ON swaps (model, id);",
];
const MAGIC: &[u8] = b"SQLite format 3\0";
/// The smallest page.
const SIZE_MIN: u64 = 512;
/// Larger files are not read whole at every start: what is damaged shows when it is used.
const CHECKED_MAX: u64 = 64 << 20;
const BUSY: Duration = Duration::from_secs(2);
/// The write-ahead log is cut to this when it was longer.
const WAL_MAX: i64 = 16 << 20;
/// Rows that one run of the retention deletes of a table.
const PRUNED_MAX: i64 = 1_000;

#[derive(Debug)]
pub struct Disk {
    connection: Connection,
    is_new: bool,
}

impl Disk {
    /// Brings the layout up to date. `check`: also reads it through once, if it is not large.
    pub fn open(path: &Path, check: bool) -> Result<Disk, Trouble> {
        look_at(path)?;
        make(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        // A file that is refused below stays as it is, its log included.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.busy_timeout(BUSY)?;
        if connection.is_readonly("main")? {
            return Err(Trouble::ReadOnly);
        }
        let version = version(&connection)?;
        if check && fs::metadata(path)?.len() <= CHECKED_MAX {
            let verdict: String =
                connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            if verdict != "ok" {
                return Err(Trouble::Damaged(verdict));
            }
        }
        connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.query_row(&format!("PRAGMA journal_size_limit = {WAL_MAX}"), [], |_| Ok(()))?;
        let mut disk = Disk { connection, is_new: version == 0 };
        disk.migrate(version)?;
        Ok(disk)
    }

    /// What a file says that cannot be written now; nothing is changed, not even beside it.
    pub fn read_only(path: &Path) -> Result<Loaded, Trouble> {
        look_at(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_URI;
        let absolute = path.canonicalize()?;
        let name: String = absolute.to_string_lossy().chars().map(escaped).collect();
        // What a running Wharf wrote last stands beside the file, which `immutable` would pass over.
        let mut beside = absolute.into_os_string();
        beside.push("-wal");
        let is_open = std::fs::metadata(&beside).is_ok_and(|wal| wal.len() > 0);
        let shared = || Connection::open_with_flags(format!("file:{name}?mode=ro"), flags).ok();
        let readable = |c: &Connection| version(c).is_ok();
        let connection = match is_open.then(shared).flatten().filter(readable) {
            Some(connection) => connection,
            None => Connection::open_with_flags(format!("file:{name}?immutable=1"), flags)?,
        };
        if version(&connection)? != MIGRATIONS.len() as i64 {
            return Ok(Loaded::default());
        }
        Disk { connection, is_new: false }.load()
    }

    fn migrate(&mut self, from: i64) -> Result<(), Trouble> {
        for (version, step) in (1_i64..).zip(MIGRATIONS).filter(|(version, _)| *version > from) {
            let step_of_one =
                self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            step_of_one.execute_batch(step)?;
            step_of_one.pragma_update(None, "application_id", APPLICATION_ID)?;
            step_of_one.pragma_update(None, "user_version", version)?;
            step_of_one.commit()?;
        }
        Ok(())
    }

    pub fn load(&self) -> Result<Loaded, Trouble> {
        let (activity_max, swaps_max) = Rows::LOADED_MAX;
        let mut newest =
            self.connection.prepare("SELECT id, body FROM activity ORDER BY id DESC LIMIT ?1")?;
        let read = newest.query_map([activity_max as i64], |row| {
            let id = number(row, 0)?;
            let body: String = row.get(1)?;
            Ok(parsed::<Activity>(&body).map(|activity| (id, Activity { id, ..activity })))
        })?;
        let mut activity = read.filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()?;
        activity.reverse();
        let mut swaps = self.swaps_below(u64::MAX >> 1, None, swaps_max)?;
        swaps.reverse();
        let mut all = self.connection.prepare("SELECT kind, name, body FROM kept")?;
        let read = all.query_map([], |row| {
            let (kind, name, body): (String, String, String) =
                (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(Kind::parse(&kind).map(|kind| ((kind, name), body)))
        })?;
        let kept = read.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        let (last_activity, last_swap) = (self.last("activity")?, self.last("swaps")?);
        Ok(Loaded { kept, activity, swaps, last_activity, last_swap, is_new: self.is_new })
    }

    /// The largest number that a row of the table ever had.
    fn last(&self, table: &str) -> Result<u64, Trouble> {
        let of_table = "SELECT seq FROM sqlite_sequence WHERE name = ?1";
        let last = self.connection.query_row(of_table, [table], |row| number(row, 0)).optional()?;
        Ok(last.unwrap_or(0))
    }

    /// All of it or nothing.
    pub fn write(&mut self, batch: &Batch) -> Result<(), Trouble> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut insert = transaction.prepare_cached(
                "INSERT OR IGNORE INTO activity (id, at_unix_ms, model, body) VALUES (?1, ?2, ?3, ?4)",
            )?;
            for (id, row) in &batch.activity {
                let at = signed(row.arrived_unix_ms);
                insert.execute(params![signed(*id), at, row.model.as_str(), text(row)])?;
            }
            let mut insert = transaction.prepare_cached(
                "INSERT OR IGNORE INTO swaps (id, at_unix_ms, swap, model, body)
                 VALUES (?1, ?2, ?3, ?4, ?5)",
            )?;
            for (id, row) in &batch.swaps {
                let (at, swap) = (signed(row.began_unix_ms), signed(row.record.id.0));
                let model = row.record.model.as_str();
                insert.execute(params![signed(*id), at, swap, model, text(row)])?;
            }
            let mut put = transaction.prepare_cached(
                "INSERT OR REPLACE INTO kept (kind, name, body) VALUES (?1, ?2, ?3)",
            )?;
            let mut delete =
                transaction.prepare_cached("DELETE FROM kept WHERE kind = ?1 AND name = ?2")?;
            let change = batch.change.iter().flat_map(|(entries, _)| entries);
            for ((kind, name), body) in batch.entries.iter().chain(change) {
                match body {
                    Some(body) => put.execute(params![kind.as_str(), name, body])?,
                    None => delete.execute(params![kind.as_str(), name])?,
                };
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// The newest first, with their numbers.
    pub fn swaps_below(
        &self,
        below: u64,
        model: Option<&ModelName>,
        limit: usize,
    ) -> Result<Vec<(u64, SwapRow)>, Trouble> {
        let of_all = "SELECT id, body FROM swaps WHERE id < ?1 ORDER BY id DESC LIMIT ?2";
        let of_model = "SELECT id, body FROM swaps WHERE id < ?1 AND model = ?3
                        ORDER BY id DESC LIMIT ?2";
        let (below, limit) = (signed(below), i64::try_from(limit).unwrap_or(i64::MAX));
        let read = |row: &Row<'_>| swap(row);
        let rows: Vec<Option<(u64, SwapRow)>> = match model {
            None => {
                let mut found = self.connection.prepare_cached(of_all)?;
                found.query_map(params![below, limit], read)?.collect::<Result<_, _>>()?
            }
            Some(model) => {
                let mut found = self.connection.prepare_cached(of_model)?;
                let of = params![below, limit, model.as_str()];
                found.query_map(of, read)?.collect::<Result<_, _>>()?
            }
        };
        Ok(rows.into_iter().flatten().collect())
    }

    /// The newest of this id.
    pub fn swap(&self, id: SwapId) -> Result<Option<(u64, SwapRow)>, Trouble> {
        let of_id = "SELECT id, body FROM swaps WHERE swap = ?1 ORDER BY id DESC LIMIT 1";
        let found = self.connection.query_row(of_id, [signed(id.0)], swap).optional()?;
        Ok(found.flatten())
    }

    /// Deletes rows that are too old or too many; whether there may be more to delete.
    pub fn prune(&mut self, retention: &Retention) -> Result<bool, Trouble> {
        let age = u64::try_from(retention.age.as_millis()).unwrap_or(u64::MAX);
        let oldest = signed(unix_ms().saturating_sub(age));
        let mut is_done = true;
        for table in ["activity", "swaps"] {
            let transaction =
                self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let too_old = format!(
                "DELETE FROM {table} WHERE id IN
                 (SELECT id FROM {table} WHERE at_unix_ms < ?1 ORDER BY at_unix_ms LIMIT ?2)"
            );
            let old = transaction.execute(&too_old, [oldest, PRUNED_MAX])?;
            let count = format!("SELECT count(*) FROM {table}");
            let count: i64 = transaction.query_row(&count, [], |row| row.get(0))?;
            let excess = count.saturating_sub(signed(retention.rows)).clamp(0, PRUNED_MAX);
            let too_many = format!(
                "DELETE FROM {table} WHERE id IN (SELECT id FROM {table} ORDER BY id LIMIT ?1)"
            );
            transaction.execute(&too_many, [excess])?;
            transaction.commit()?;
            is_done &= (old as i64) < PRUNED_MAX && excess < PRUNED_MAX;
        }
        Ok(!is_done)
    }

    /// Everything into the one file.
    pub fn close(self) -> Result<(), Trouble> {
        self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        self.connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
        self.connection.close().map_err(|(_, error)| error.into())
    }
}

/// Its layout; 0: empty. Refuses what is not ours.
fn version(connection: &Connection) -> Result<i64, Trouble> {
    let number = |pragma: &str| connection.query_row(pragma, [], |row| row.get::<_, i64>(0));
    let found = number("PRAGMA user_version")?;
    let application = number("PRAGMA application_id")?;
    let objects = number("SELECT count(*) FROM sqlite_schema")?;
    let known = MIGRATIONS.len() as i64;
    match (application, found) {
        (0, 0) if objects == 0 => Ok(0),
        (APPLICATION_ID, found) if found > known => Err(Trouble::Newer { found, known }),
        (APPLICATION_ID, 1..) => Ok(found),
        _ => Err(Trouble::Foreign),
    }
}

/// Refuses what SQLite would take for an empty file and begin anew.
fn look_at(path: &Path) -> Result<(), Trouble> {
    let size = match fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            return Err(Trouble::Damaged("it is not a plain file".to_owned()));
        }
        Ok(found) => found.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let wal = beside(path, "-wal");
    let wal_size = fs::metadata(&wal).map_or(0, |found| found.len());
    match size {
        0 if wal_size > 0 => Err(Trouble::Damaged("it is empty, and its log is not".to_owned())),
        0 => Ok(()),
        size if size < SIZE_MIN => Err(Trouble::Damaged(format!("it ends after {size} bytes"))),
        _ if start_of(path, MAGIC.len())? != MAGIC => {
            Err(Trouble::Damaged("it does not begin like a database".to_owned()))
        }
        _ if wal_size > 0 => keep_foreign_log(&wal),
        _ => Ok(()),
    }
}

/// SQLite would overwrite a log that is none. What the main file holds is whole without it.
fn keep_foreign_log(wal: &Path) -> Result<(), Trouble> {
    let magic = start_of(wal, 4)?;
    if matches!(magic[..], [0x37, 0x7f, 0x06, 0x82 | 0x83]) {
        return Ok(());
    }
    let aside = beside(wal, &format!(".damaged-{}", unix_ms()));
    fs::rename(wal, &aside)?;
    tracing::error!(
        "{} is no log of the store: it is kept as {}; the last rows before it may be missing",
        wal.display(),
        aside.display()
    );
    Ok(())
}

/// As much of the first `length` bytes as there is.
fn start_of(path: &Path, length: usize) -> Result<Vec<u8>, Trouble> {
    let mut start = Vec::new();
    fs::File::open(path)?.take(length as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// For its owner alone: it names who asked for what.
fn make(path: &Path) -> Result<(), Trouble> {
    if path.exists() {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    Ok(())
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// In a file name of a URI.
fn escaped(character: char) -> String {
    match character {
        '%' | '?' | '#' => format!("%{:02x}", character as u32),
        other => other.to_string(),
    }
}

fn swap(row: &Row<'_>) -> rusqlite::Result<Option<(u64, SwapRow)>> {
    let (id, body): (u64, String) = (number(row, 0)?, row.get(1)?);
    Ok(parsed(&body).map(|swap| (id, swap)))
}

fn number(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    Ok(row.get::<_, i64>(column)?.try_into().unwrap_or(0))
}

/// SQLite's numbers have a sign.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A row that another version wrote in words that this one does not have is passed over.
pub fn parsed<T: DeserializeOwned>(body: &str) -> Option<T> {
    serde_json::from_str(body)
        .inspect_err(|error| tracing::debug!(%error, "a row of the store is not understood"))
        .ok()
}

/// Plain data: it has a JSON text.
pub fn text(row: &impl serde::Serialize) -> String {
    serde_json::to_string(row).unwrap_or_default()
}

pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
