//! Why the store's file cannot be used, in words that name it and the fix.

use std::path::Path;

use rusqlite::ErrorCode;

#[derive(Debug)]
pub enum Trouble {
    /// Not what Wharf wrote: cut short, overwritten, or another kind of file.
    Damaged(String),
    /// Of a later version of Wharf.
    Newer {
        found: i64,
        known: i64,
    },
    /// A database, but of another program.
    Foreign,
    ReadOnly,
    Io(std::io::Error),
    Sqlite(rusqlite::Error),
}

impl Trouble {
    /// Only another file at that place can help, so that there is no use in trying again before.
    pub fn is_of_the_file(&self) -> bool {
        match self {
            Trouble::Damaged(_) | Trouble::Newer { .. } | Trouble::Foreign => true,
            Trouble::ReadOnly | Trouble::Io(_) | Trouble::Sqlite(_) => false,
        }
    }

    pub fn text(&self, path: &Path) -> String {
        let file = path.display();
        match self {
            Trouble::Damaged(how) => format!(
                "the store {file} is damaged ({how}); it is left as it is: move it away, with \
                 {file}-wal and {file}-shm if they are there, and Wharf begins a new one within \
                 seconds (sqlite3's .recover may get rows out of the old one)"
            ),
            Trouble::Newer { found, known } => format!(
                "the store {file} was written by a newer Wharf (layout {found}, this one knows \
                 {known}) and is left as it is: run that version, or name another file with `store:`"
            ),
            Trouble::Foreign => format!(
                "the store {file} is the database of another program and is left as it is: name \
                 another file with `store:`"
            ),
            Trouble::ReadOnly => format!(
                "the store {file} cannot be written: make it and its folder writable for the user \
                 that Wharf runs as, or name another file with `store:`"
            ),
            Trouble::Io(error) => format!(
                "the store {file} cannot be used: {error}; check its folder and disk, or name \
                 another file with `store:`"
            ),
            Trouble::Sqlite(error) => match error.sqlite_error_code() {
                Some(ErrorCode::DiskFull) => {
                    format!("the store {file} cannot be written: its disk is full; free some space")
                }
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => format!(
                    "the store {file} is locked by another program: end what has it open (fuser \
                     {file} tells)"
                ),
                _ => format!(
                    "the store {file} cannot be used: {error}; check its folder and disk (full? \
                     read-only?), or name another file with `store:`"
                ),
            },
        }
    }
}

impl From<rusqlite::Error> for Trouble {
    fn from(error: rusqlite::Error) -> Trouble {
        match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                Trouble::Damaged(error.to_string())
            }
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => Trouble::ReadOnly,
            _ => Trouble::Sqlite(error),
        }
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Trouble {
        match error.kind() {
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
                Trouble::ReadOnly
            }
            _ => Trouble::Io(error),
        }
    }
}
